"""The labels of texts: which there are, whether a model has them, and the loss of what it gives for them."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import CordaError, DataConfig, ModelConfig
from ..config.values import short
from .batches import Encoded
from .samples import Sample, load_samples


def with_labels(source: ModelConfig, data: DataConfig | None) -> ModelConfig:
    """The model with the labels that its head is for: those that are given, or else all that the data has.

    Raises CordaError as `find_labels` and `check_labels` do.
    """
    if data is None or not data.label:
        return source
    with warnings.catch_warnings():  # of rows that are left out: whoever uses them says it
        warnings.simplefilter("ignore")
        samples = load_samples(replace(data, samples=None))
    labels = find_labels(data, samples) if source.labels is None else source.labels
    check_labels(data.data, samples, labels)
    return replace(source, labels=labels)


def find_labels(data: DataConfig, samples: Sequence[Sample]) -> list[str]:
    """The labels of samples, numbers in ascending order, or words in that of the alphabet; or the name of the column
    alone, where it holds numbers with a fraction.

    Raises CordaError if there is only one label, nearly each sample has one of its own, or some are numbers and others
    stand where a number is missing, such as nan.
    """
    found = {str(sample.label) for sample in samples}
    numbers = {name: number for name in found if (number := number_of(name)) is not None}
    fractions = any(not number.is_integer() for number in numbers.values())
    if numbers and (odd := [name for name in sorted(found - numbers.keys()) if fractions or _is_float(name)]):
        raise CordaError(
            f"{data.data} has numbers in {data.label}, and {short(odd[0])}: leave the cell empty where there is no "
            "number, or name all labels with labels"
        )
    if len(numbers) == len(found):
        if fractions:
            return [data.label]
        labels = sorted(found, key=lambda name: (numbers[name], name))
    else:
        labels = sorted(found)
    if len(labels) == 1:
        raise CordaError(f"all samples of {data.data} have the label {short(labels[0])}: there are none to tell apart")
    if len(labels) > 20 and 2 * len(labels) > len(samples):
        quantity = f" (to predict it as a number: --labels {data.label})" if numbers else ""
        raise CordaError(
            f"{data.data} has {len(labels):,} labels for {len(samples):,} samples: is {data.label} the column of the "
            f"labels?{quantity}"
        )
    return labels


def check_labels(name: str, samples: Iterable[Sample], labels: Sequence[str] | None) -> None:
    """Raises CordaError if samples do not go with a model.

    Args:
        name: of the data.
        labels: of the model; None if it is no classifier.
    """
    for sample in samples:
        if (sample.label is None) != (labels is None):
            if labels is None:
                raise CordaError(f"{name} has labels, and the model has no head for any: it is no classifier")
            raise CordaError(f"the model is a classifier: say with label which column of {name} has the labels")
        if labels is None or sample.label is None:
            return
        if len(labels) == 1 and number_of(sample.label) is None:
            raise CordaError(
                f"{name} has the label {short(sample.label)}, but {labels[0]} is a number, as it is the only label"
            )
        if len(labels) > 1 and sample.label not in labels:
            known = short(", ".join(map(repr, labels)), 200)[1:-1]
            raise CordaError(f"{name} has the label {short(sample.label)}, and the model does not: it has {known}")


def number_of(text: str) -> float | None:
    """The finite number that a text stands for; None if it is none."""
    return float(text) if _is_float(text) and math.isfinite(float(text)) else None


def _is_float(text: str) -> bool:
    """Whether a text stands for a number, finite or not."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def targets_of(settings: Any, encoded: Sequence[Encoded]) -> list[int] | list[float]:
    """What a model should give for each text: the index of the label, or the number.

    Args:
        settings: the model's configuration.
        encoded: texts whose labels the model knows: see `check_labels`.
    """
    if len(settings.id2label) == 1:
        return [float(str(e.label)) for e in encoded]
    return [settings.label2id[str(e.label)] for e in encoded]


def label_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """−log p of the labels in nats, or the squared error of numbers.

    Args:
        outputs: (n, labels), logits; (n, 1) of numbers.
        targets: (n,), what `targets_of` gives.
    """
    if targets.dtype == torch.long:
        return F.cross_entropy(outputs.float(), targets, reduction=reduction)
    return F.mse_loss(outputs[:, 0].float(), targets.float(), reduction=reduction)
