"""What a training keeps: the statistics of the context, and the meter on samples of it that they have not seen."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from ..adapters.card import TRAINING
from ..adapters.lora import lora_layers, on_residual
from ..config import CordaError, DataConfig, KeepConfig
from ..config.data import CONTEXT_SAMPLES
from ..config.train import KEEP
from ..data.batches import Encoded, encode_all
from ..data.samples import Sample, digest_of, load_others, load_samples
from ..files import read_json, sha256_of
from ..preprocess.own_text import own_text
from ..preprocess.statistics import LEAST_SAMPLES, NAME, Statistics, collect_statistics
from ..training.keeping import Keeper, PredictedDrift, check_whole_base
from .evaluate import loss_and_drift

MEASURED = 64  # samples that the meter measures the drift on


class KeptContext(NamedTuple):
    """The ability to keep.

    Attributes:
        data: where its samples are from.
        samples: those that are shown.
        price: λ, at which it is kept, or which is steered from there.
        statistics: the file with those of the samples, if there is one already.
    """

    data: DataConfig
    samples: list[Sample]
    price: float
    statistics: Path | None


def load_context(config: KeepConfig, start: Path | None, record: dict[str, Any] | None) -> KeptContext | None:
    """The ability to keep, and its price: as given, or else as the training kept it that the start is from, or else
    what the start was made from (mode kpm). None if nothing is kept.

    Args:
        record: corda.json of the start.

    Raises CordaError if something is to be kept, and nothing says what; or as `load_samples` does.
    """
    if config.keep == 0:
        return None
    try:
        data, price, path = _kept_before(start, record)
        unknown = record is not None and on_residual(record)  # nothing predicts the drift
    except (LookupError, TypeError, AttributeError) as error:
        raise CordaError(f"{start} has a damaged corda.json or {TRAINING}: {error!r}") from error
    if isinstance(config.context, DataConfig):
        data, price, path = _with_samples(config.context), None, None
    elif unknown and not (config.keep or config.max_drift):
        return None
    price = next((known for known in (config.keep, price) if known is not None), KEEP)
    if data is None and (config.keep or config.max_drift):
        whose = f"{start} was not made from samples to keep" if start else "a plain LoRA knows of nothing to keep"
        raise CordaError(f"{whose}: give a --context")
    if data is None or (price == 0 and config.max_drift is None):
        return None
    try:
        return KeptContext(data, load_samples(data), price or KEEP, path)
    except CordaError as error:
        if config.context is not None:
            raise
        raise CordaError(f"{error}; {start} was made from it: give a --context, or --keep 0") from error


def _kept_before(
    start: Path | None, record: dict[str, Any] | None
) -> tuple[DataConfig | None, float | None, Path | None]:
    """The samples that the training kept that an adapter is from, or that its start was made from (mode kpm); the price
    that either names; and the file of statistics beside the start."""
    trained = read_json(start / TRAINING) if start and (start / TRAINING).is_file() else {"recipe": {}}
    before = trained["recipe"].get("keep") or {}
    price = before.get("keep")
    if before.get("max_drift") and trained.get("drift"):
        price = trained["drift"][-1][-1]  # that it was steered to
    if before.get("context"):
        return _with_samples(DataConfig(**before["context"])), price, None
    if record and record.get("data"):
        of_start = record["config"].get("keep") or None
        if record["config"]["mode"] == "kpm" or of_start:
            path = Path(start or "") / NAME
            price = of_start if price is None else price
            return DataConfig(**record["data"]), price, path if path.is_file() else None
    return None, price, None


def _with_samples(data: DataConfig) -> DataConfig:
    return replace(data, samples=data.samples or CONTEXT_SAMPLES)


def kept_digest(context: KeptContext | None) -> str | None:
    """What tells whether the same is kept at the same price: of the context's samples, its statistics and the price;
    None if nothing is kept."""
    if context is None:
        return None
    return f"{digest_of(context.samples)} {sha256_of(context.statistics) if context.statistics else ''} {context.price}"


def make_keeper(
    peft_model: PeftModel,
    tokenizer: Any,
    config: KeepConfig,
    context: KeptContext | None,
) -> tuple[Keeper | None, list[str]]:
    """The keeper of a training, and what to say of it in lines; None if nothing is kept.

    The statistics are those of the context's file, or are collected here from the model without its adapter.

    Raises CordaError as `load_others` and `check_whole_base` do, and where there are too few samples.
    """
    if context is None:
        return None, []
    check_whole_base(peft_model)  # before the context is run
    data, samples, keep, path = context
    with warnings.catch_warnings():  # of rows that are left out: `load_context` has said it
        warnings.simplefilter("ignore")
        other_samples = load_others(data, MEASURED)
    shown, others = (encode_all(tokenizer, part, data.max_length) for part in (samples, other_samples))
    answered = sum(e.targets > 0 for e in shown)
    if config.keep is None and config.max_drift is None and answered < LEAST_SAMPLES:
        return None, [f"no drift is predicted, and none held down: the context has {answered} samples with a response"]
    statistics = Statistics.load(path) if path else _collected(peft_model, tokenizer, shown)
    few = len(others) < MEASURED // 4
    measured = shown[:MEASURED] if few else others

    def drift() -> float:
        return loss_and_drift(peft_model.eval(), tokenizer, measured)["tuned"]["drift"]

    price = f"at a price of {keep:g} nats for a nat of drift"
    if config.max_drift:
        price = f"at a price that begins at {keep:g} and is steered to a drift of {config.max_drift:g}"
    lines = [f"keeps {data.data} ({statistics.samples} samples) {price}"]
    if peft_model.peft_config["default"].modules_to_save:
        lines.append("the price does not see modules_to_save, which are trained whole; the measured drift does")
    if few:
        lines.append("the drift is measured on samples that are shown, as there are no others: others may drift more")
    return Keeper(PredictedDrift(peft_model, statistics), keep, config.max_drift, drift), lines


def generic_penalty(peft_model: PeftModel, tokenizer: Any, price: float) -> Callable[[], Tensor]:
    """`price` times the drift that is predicted on texts that the model draws without its adapter, which stand for the
    abilities that nobody named."""
    check_whole_base(peft_model)  # before the model draws
    predicted = PredictedDrift(peft_model, _collected(peft_model, tokenizer, own_text(peft_model, tokenizer)))
    return lambda: price * predicted()


def _collected(peft_model: PeftModel, tokenizer: Any, encoded: list[Encoded]) -> Statistics:
    """The statistics of samples, from the model without its adapter."""
    layers = {name: layer.get_base_layer() for name, layer in lora_layers(peft_model).items()}
    with peft_model.disable_adapter():
        return collect_statistics(peft_model.get_base_model(), layers, encoded, tokenizer.pad_token_id or 0)
