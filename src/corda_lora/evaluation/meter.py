"""What a training keeps: the statistics of the context, and the meter on samples of it that they have not seen."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..adapters.lora import lora_layers
from ..config import CONTEXT_SAMPLES, KEEP, CordaError, DataConfig, KeepConfig
from ..data.batches import encode
from ..data.samples import digest_of, load_others, load_samples
from ..files import read_json, sha256_of
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


def kept_digest(config: KeepConfig, start: Path | None, record: dict[str, Any] | None) -> str | None:
    """What tells whether the same is kept at the same price: of the context's samples, the statistics beside the start
    and its own price; None if nothing is kept.

    Raises CordaError as `context_of` and `load_samples` do.
    """
    data = context_of(config, start, record)
    if data is None:
        return None
    try:
        samples = digest_of(load_samples(data))
    except CordaError as error:
        if config.context is not None:
            raise
        raise CordaError(f"{error}; {start} was made from it: give a --context, or --keep 0") from error
    path = start / NAME if start else None
    price = record["config"].get("keep") if record else None
    return f"{samples} {sha256_of(path) if path and path.is_file() else ''} {price}"


def make_keeper(
    peft_model: PeftModel, tokenizer: Any, config: KeepConfig, start: Path | None, record: dict[str, Any] | None
) -> tuple[Keeper | None, list[str]]:
    """The keeper of a training, and what to say of it in lines; None if nothing is kept.

    The statistics are those beside the start, or are collected here from the model without its adapter.

    Raises CordaError as `context_of` and `load_samples` do, and where there are too few samples.
    """
    data = context_of(config, start, record)
    if data is None:
        return None, []
    with warnings.catch_warnings():  # of rows that are left out: `kept_digest` has said it
        warnings.simplefilter("ignore")
        samples, other_samples = load_samples(data), load_others(data, MEASURED)
    shown, others = ([encode(tokenizer, s, data.max_length) for s in part] for part in (samples, other_samples))
    answered = sum(e.targets > 0 for e in shown)
    if config.keep is None and config.max_drift is None and answered < LEAST_SAMPLES:
        return None, [f"no drift is predicted, and none held down: the context has {answered} samples with a response"]
    path = start / NAME if start and config.context is None else None
    if path and path.is_file():
        statistics = Statistics.load(path)
    else:
        layers = {name: layer.get_base_layer() for name, layer in lora_layers(peft_model).items()}
        with peft_model.disable_adapter():
            pad_id = tokenizer.pad_token_id or 0
            statistics = collect_statistics(peft_model, layers, shown, pad_id)
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
