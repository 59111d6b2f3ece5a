"""The penalty on predicted drift, for methods whose adapter is a LoRA."""

from torch import nn

from ..data.batches import encode
from ..preprocess.statistics import NAME, Statistics, collect_statistics
from ..training.keeping import Keeper, PredictedDrift
from .registry import Prepared, Setup


def with_penalty(prepared: Prepared, setup: Setup, statistics: Statistics | None, keep: float) -> Prepared:
    """Add `keep` times the predicted drift to the loss that a prepared model is trained with; nothing without
    statistics."""
    if statistics is None:
        return prepared
    keeper = Keeper(PredictedDrift(prepared.model, statistics), keep)
    return prepared._replace(
        callbacks=[*prepared.callbacks, keeper], penalties={**prepared.penalties, "drift": keeper.penalty}
    )


def context_statistics(model: nn.Module, setup: Setup, keep: float, samples: int | None = None) -> Statistics | None:
    """The statistics of the ability to keep, from the model without an adapter; None where nothing is kept. They are
    cached in the method's folder, which all values of `keep` share."""
    if keep == 0:
        return None
    path = setup.folder / NAME
    if not path.is_file():
        data = setup.data("keep")
        encoded = [encode(setup.tokenizer, sample, data.max_length) for sample in setup.context("keep", samples)]
        pad_id = setup.tokenizer.pad_token_id or 0
        path.parent.mkdir(parents=True, exist_ok=True)
        collect_statistics(model, setup.targets, encoded, pad_id, progress=False).save(path)
    return Statistics.load(path)
