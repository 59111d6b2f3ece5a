"""What a training keeps: the statistics of the context, and the meter on samples of it that they have not seen."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from ..adapters.lora import lora_layers, on_residual
from ..config import CONTEXT_SAMPLES, KEEP, CordaError, DataConfig, KeepConfig
from ..data.batches import Encoded, encode
from ..data.samples import Sample, digest_of, load_others, load_samples
from ..files import read_json, sha256_of
from ..preprocess.own_text import own_text
from ..preprocess.statistics import LEAST_SAMPLES, NAME, Statistics, collect_statistics
from ..training.keeping import Keeper, PredictedDrift
from .evaluate import loss_and_drift

TRAINING = "training.json"
MEASURED = 64  # samples that the meter measures the drift on


def context_of(config: KeepConfig, start: Path | None, record: dict[str, Any] | None) -> DataConfig | None:
    """The samples of the ability to keep, as given, or as the start was made from (mode kpm); None if nothing is kept.

    Args:
        record: corda.json of the start.

    Raises CordaError if something is to be kept, and nothing says what.
    """
    if config.keep == 0:
        return None
    if isinstance(config.context, DataConfig):
        return replace(config.context, samples=config.context.samples or CONTEXT_SAMPLES)
    try:
        if record and on_residual(record) and not (config.keep or config.max_drift):
            return None  # nothing predicts the drift
        if record and record.get("data") and (record["config"]["mode"] == "kpm" or record["config"].get("keep")):
            return DataConfig(**record["data"])
        if start and (start / TRAINING).is_file():  # a plain LoRA that was trained to keep something
            kept = read_json(start / TRAINING)["recipe"].get("keep") or {}
            if kept.get("context"):
                return replace(DataConfig(**kept["context"]), samples=kept["context"]["samples"] or CONTEXT_SAMPLES)
    except (KeyError, TypeError, AttributeError) as error:
        raise CordaError(f"{start} has a damaged corda.json or {TRAINING}: {error!r}") from error
    if config.keep or config.max_drift:
        whose = f"{start} was not made from samples to keep" if start else "a plain LoRA knows of nothing to keep"
        raise CordaError(f"{whose}: give a --context")
    return None


class KeptContext(NamedTuple):
    """The ability to keep: its data, and the samples of it that are shown."""

    data: DataConfig
    samples: list[Sample]


def load_context(config: KeepConfig, start: Path | None, record: dict[str, Any] | None) -> KeptContext | None:
    """The samples of the ability to keep; None if nothing is kept.

    Raises CordaError as `context_of` and `load_samples` do.
    """
    data = context_of(config, start, record)
    if data is None:
        return None
    try:
        return KeptContext(data, load_samples(data))
    except CordaError as error:
        if config.context is not None:
            raise
        raise CordaError(f"{error}; {start} was made from it: give a --context, or --keep 0") from error


def kept_digest(context: KeptContext | None, start: Path | None, record: dict[str, Any] | None) -> str | None:
    """What tells whether the same is kept at the same price: of the context's samples, the statistics beside the start
    and its own price; None if nothing is kept."""
    if context is None:
        return None
    path = start / NAME if start else None
    price = record["config"].get("keep") if record else None
    return f"{digest_of(context.samples)} {sha256_of(path) if path and path.is_file() else ''} {price}"


def make_keeper(
    peft_model: PeftModel,
    tokenizer: Any,
    config: KeepConfig,
    context: KeptContext | None,
    start: Path | None,
    record: dict[str, Any] | None,
) -> tuple[Keeper | None, list[str]]:
    """The keeper of a training, and what to say of it in lines; None if nothing is kept.

    The statistics are those beside the start, or are collected here from the model without its adapter.

    Raises CordaError as `load_others` does, and where there are too few samples.
    """
    if context is None:
        return None, []
    data, samples = context
    with warnings.catch_warnings():  # of rows that are left out: `load_context` has said it
        warnings.simplefilter("ignore")
        other_samples = load_others(data, MEASURED)
    shown, others = ([encode(tokenizer, s, data.max_length) for s in part] for part in (samples, other_samples))
    answered = sum(e.targets > 0 for e in shown)
    if config.keep is None and config.max_drift is None and answered < LEAST_SAMPLES:
        return None, [f"no drift is predicted, and none held down: the context has {answered} samples with a response"]
    path = start / NAME if start and config.context is None else None
    statistics = Statistics.load(path) if path and path.is_file() else _collected(peft_model, tokenizer, shown)
    few = len(others) < MEASURED // 4
    measured = shown[:MEASURED] if few else others

    def drift() -> float:
        return loss_and_drift(peft_model.eval(), tokenizer, measured)["tuned"]["drift"]

    of_start = record["config"].get("keep") if record and config.context is None else None
    keep = (of_start or KEEP) if config.keep is None else config.keep
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
    predicted = PredictedDrift(peft_model, _collected(peft_model, tokenizer, own_text(peft_model, tokenizer)))
    return lambda: price * predicted()


def _collected(peft_model: PeftModel, tokenizer: Any, encoded: list[Encoded]) -> Statistics:
    """The statistics of samples, from the model without its adapter."""
    layers = {name: layer.get_base_layer() for name, layer in lora_layers(peft_model).items()}
    with peft_model.disable_adapter():
        return collect_statistics(peft_model.get_base_model(), layers, encoded, tokenizer.pad_token_id or 0)
