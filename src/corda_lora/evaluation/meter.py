"""What a training keeps: the statistics of the context, and the meter on samples of it that they have not seen."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from ..adapters.card import TRAINING
from ..adapters.lora import lora_layers, on_residual
from ..config import ContextConfig, CordaError, DataConfig, KeepConfig
from ..config.data import CONTEXT_SAMPLES, prices_of
from ..config.train import KEEP
from ..data.batches import Encoded, cut_away, encode_all
from ..data.overview import unseen_samples
from ..data.samples import Sample, digest_of, load_rounds
from ..files import read_json, sha256_of
from ..preprocess.own_text import own_text
from ..preprocess.statistics import LEAST_SAMPLES, NAME, FewAnswersError, Statistics, check_samples, collect_statistics
from ..training.keeping import HOLDS_A_PART, Keeper, PredictedDrift, check_predictable, trained_beside
from .evaluate import loss_and_drift

MEASURED = 64  # samples that the meter measures the drift on


class KeptContext(NamedTuple):
    """An ability to keep.

    Attributes:
        name: of one among several; else empty.
        data: where its samples are from.
        samples: those that its statistics are, or are to be, collected from.
        shown: those that must not be measured on: the same, and what the start drew in further rounds.
        price: λ, at which it is kept, or which is steered from there.
        statistics: the file with those of the samples, if there is one already.
    """

    name: str
    data: DataConfig
    samples: list[Sample]
    shown: list[Sample]
    price: float
    statistics: Path | None


def load_contexts(config: KeepConfig, start: Path | None, record: dict[str, Any] | None) -> list[KeptContext]:
    """The abilities to keep, each at its price: as given, or else as the training kept them that the start is from, or
    else what the start was made from (mode kpm). None if nothing is kept.

    The price λ is that of one context. Of several, each has its own or λ times its weight over the mean weight.

    Args:
        record: corda.json of the start.

    Raises CordaError if something is to be kept, and nothing says what, or at what price; weights are to be found for
    one context; the samples that the start was made from have changed since; or as `load_rounds` does.
    """
    if config.keep == 0:
        return []
    try:
        datas, price, path, rounds, digests = _kept_before(start, record)
        unknown = record is not None and on_residual(record)  # nothing predicts the drift
    except (LookupError, TypeError, AttributeError) as error:
        raise CordaError(f"{start} has a damaged corda.json or {TRAINING}: {error!r}") from error
    if unknown and (config.keep or config.max_drift or config.contexts):
        raise CordaError(HOLDS_A_PART)
    if config.contexts:
        datas, price, path = [_with_samples(data) for data in config.contexts], None, None
        rounds, digests = 1, []
    elif unknown:
        return []
    price = next((known for known in (config.keep, price) if known is not None), KEEP)
    if not datas and (config.keep or config.max_drift):
        whose = f"{start} was not made from samples to keep" if start else "a plain LoRA knows of nothing to keep"
        raise CordaError(f"{whose}: give a --context")
    if config.weights == "validation" and len(datas) < 2:
        count = "one" if datas else "none"
        raise CordaError(f"weights are shared by several contexts, and there is {count}: leave weights out")
    if not datas or (price == 0 and config.max_drift is None):
        return []
    named, contexts = [data for data in datas if isinstance(data, ContextConfig)], []
    for data, own in zip(datas, prices_of(named, price or KEEP) if named else [price or KEEP]):
        name = data.ability if isinstance(data, ContextConfig) else ""
        try:
            drawn = load_rounds(data, rounds)
            contexts.append(KeptContext(name, data, drawn[0], [*chain(*drawn)], own, path))
        except CordaError as error:
            if config.context is not None:
                raise
            raise CordaError(f"{error}; {start} was made from it: give a --context, or --keep 0") from error
    now = [digest_of(each.samples) for each in contexts]
    if digests not in ([], now, [digest_of(chain(*(each.shown for each in contexts)))]):
        names = ", ".join(each.data.data for each in contexts)
        raise CordaError(f"{names} has other samples now than when {start} was made: give a --context, or --keep 0")
    if config.max_drift is None and not any(each.price for each in contexts):
        raise CordaError("the price of each context is 0, so nothing of them would be kept: give one a price")
    return contexts


def _kept_before(
    start: Path | None, record: dict[str, Any] | None
) -> tuple[list[DataConfig], float | None, Path | None, int, list[str]]:
    """The samples that the training kept that an adapter is from, or that its start was made from (mode kpm); the price
    that either names; the file of statistics beside the start; in how many rounds the samples were drawn; and their
    digests, of each data, or of all together."""
    trained = read_json(start / TRAINING) if start and (start / TRAINING).is_file() else {"recipe": {}}
    before = trained["recipe"].get("keep") or {}
    price = before.get("keep")
    steered = trained.get("drift") if before.get("max_drift") or before.get("weights") == "validation" else None
    if isinstance(steered, list) and steered:
        price = steered[-1][-1]
    if before.get("context"):
        kept = str(trained["recipe"].get("sha256", {}).get("kept") or "")  # as `kept_digest` joins them
        datas = [_with_samples(data) for data in _datas(before["context"], steered)]
        return datas, price, None, 1, kept.split(" ")[::3] if kept else []
    if record and (record.get("data") or record.get("contexts")):
        of_start = record["config"].get("keep") or None
        if record["config"]["mode"] == "kpm" or of_start:
            path = Path(start or "") / NAME
            price = of_start if price is None else price
            datas = _datas(record.get("contexts") or record["data"], steered)
            rounds = record["config"].get("rounds") or 1
            digests = [record["samples_sha256"]] if record.get("samples_sha256") else []
            return datas, price, path if path.is_file() else None, rounds, digests
    return [], price, None, 1, []


def _datas(recorded: Any, steered: Any) -> list[DataConfig]:
    """The data of a record: of one context, or a list of several, with the prices that these were steered to."""
    if not isinstance(recorded, list):
        return [DataConfig(**recorded)]
    contexts = [ContextConfig(**each) for each in recorded]
    known = steered if isinstance(steered, dict) else {}
    return [replace(c, price=known[c.ability][-1][-1]) if c.ability in known else c for c in contexts]


def _with_samples(data: DataConfig) -> DataConfig:
    return replace(data, samples=data.samples or CONTEXT_SAMPLES)


def kept_digest(contexts: Sequence[KeptContext]) -> str | None:
    """What tells whether the same is kept at the same price: of the contexts' samples, their statistics and prices;
    None if nothing is kept."""
    digests = (
        f"{digest_of(each.samples)} {sha256_of(each.statistics) if each.statistics else ''} {each.price}"
        for each in contexts
    )
    return " ".join(digests) or None


def encode_kept(tokenizer: Any, config: KeepConfig, contexts: Sequence[KeptContext]) -> list[list[Encoded]]:
    """The samples of each ability as tokens.

    Raises CordaError if one that somebody asked to keep has too few answers to collect its statistics from: by an
    option here, or by a name among those that the start was made from, of which the others would be kept without it.
    """
    asked = config.keep is not None or config.max_drift is not None or config.context is not None
    asked, remedy = (True, "") if asked else (len(contexts) > 1, "; the start names it: give --context, or --keep 0")
    found = []
    for name, data, samples, _, _, path in contexts:
        found.append(encode_all(tokenizer, samples, data.max_length))
        if path is not None or not asked:
            continue
        try:
            check_samples(_answered(found[-1]), cut_away(samples, found[-1], data.max_length))
        except FewAnswersError as error:
            raise CordaError(f"{name}: {error}{remedy}" if name else str(error)) from error
    return found


def _answered(encoded: Sequence[Encoded]) -> int:
    return sum(e.targets > 0 for e in encoded)


def make_keepers(
    peft_model: PeftModel,
    tokenizer: Any,
    config: KeepConfig,
    contexts: Sequence[KeptContext],
    encoded: Sequence[list[Encoded]],
) -> tuple[list[Keeper], list[str]]:
    """The keepers of a training, one for each ability, and what to say of them in lines.

    The statistics are those of the context's file, or are collected here from the model without its adapter.

    Args:
        encoded: what `encode_kept` found.

    Raises CordaError as `unseen_samples` and `check_predictable` do.
    """
    keepers, lines = [], list[str]()
    if contexts:
        check_predictable(peft_model)  # before the context is run
    for context, shown in zip(contexts, encoded):
        keeper, said = _make_keeper(peft_model, tokenizer, config, context, shown)
        keepers += [keeper] if keeper else []
        lines += said
    if contexts and (others := trained_beside(peft_model)):
        lines.append(
            f"the price does not see {others[0]}, which is trained, too (one of {len(others)} such parameters); the "
            "measured drift does"
        )
    return keepers, lines


def _make_keeper(
    peft_model: PeftModel, tokenizer: Any, config: KeepConfig, context: KeptContext, shown: list[Encoded]
) -> tuple[Keeper | None, list[str]]:
    name, data, samples, drawn, keep, path = context
    others = encode_all(tokenizer, unseen_samples(peft_model, tokenizer, data, drawn, MEASURED), data.max_length)
    answered, of = _answered(shown), f" of {name}" if name else ""
    if config.keep is None and config.max_drift is None and answered < LEAST_SAMPLES:
        cut = cut_away(samples, shown, data.max_length)
        return None, [
            f"no drift{of} is predicted, and none held down: the context has {answered} samples with a response{cut}"
        ]
    statistics = Statistics.load(path) if path else _collected(peft_model, tokenizer, shown)
    few = len(others) < MEASURED // 4
    measured = shown[:MEASURED] if few else others

    def drift() -> float:
        return loss_and_drift(peft_model.eval(), tokenizer, measured)["tuned"]["drift"]

    price = f"at a price of {keep:g} nats for a nat of drift"
    if config.max_drift:
        price = f"at a price that begins at {keep:g} and is steered to a drift of {config.max_drift:g}"
    elif config.weights == "validation":
        price = f"at a price that begins at {keep:g}, and more the more it drifts beside the others"
    lines = [f"keeps {name or data.data} ({statistics.samples} samples) {price}"]
    if few:
        lines.append(
            f"the drift{of} is measured on samples that are shown, as there are no others: others may drift more"
        )
    return Keeper(PredictedDrift(peft_model, statistics), keep, config.max_drift, drift, name=name), lines


def generic_penalty(peft_model: PeftModel, tokenizer: Any, price: float) -> Callable[[], Tensor]:
    """`price` times the drift that is predicted on texts that the model draws without its adapter, which stand for the
    abilities that nobody named."""
    check_predictable(peft_model)  # before the model draws
    predicted = PredictedDrift(peft_model, _collected(peft_model, tokenizer, own_text(peft_model, tokenizer)))
    return lambda: price * predicted()


def _collected(peft_model: PeftModel, tokenizer: Any, encoded: list[Encoded]) -> Statistics:
    """The statistics of samples, from the model without its adapter."""
    layers = {name: layer.get_base_layer() for name, layer in lora_layers(peft_model).items()}
    with peft_model.disable_adapter():
        return collect_statistics(peft_model.get_base_model(), layers, encoded, tokenizer.pad_token_id or 0)
