"""How well the samples that were shown stand for others of their kind, and how many would."""

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import nn

from ..algebra.decomposition import energies
from ..config.data import OTHERS_LEAK
from .context import Batch, Context
from .layer import LayerStart
from .walk import Place, walk


@torch.no_grad()
def held_out_leaks(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    layers: Mapping[str, LayerStart],
    batches: Sequence[Batch],
    place: Place,
    skip_tokens: int = 0,
    tokens: str = "all",
) -> dict[str, float]:
    """The leak tr(A C Aᵀ) of each layer, with C of samples that its components were not chosen from. A layer that none
    of their tokens came to is missing."""
    leaks: dict[str, float] = {}
    for _, groups in walk(model, targets, Context(batches, skip_tokens=skip_tokens, tokens=tokens), place):
        for members, covariances in groups or []:
            for C in covariances:
                leaks |= {name: float(energies(layers[name].A.to(C.device).double(), C).sum()) for name in members}
    return leaks


def times_as_much(shown: Mapping[str, float], held_out: Mapping[str, float]) -> float | None:
    """How many times as much others leak as those shown, in the median layer; None where nothing leaks."""
    ratios = [held_out[name] / leak for name, leak in shown.items() if leak > 0 and name in held_out]
    return median(ratios) if ratios else None


def enough_samples(samples: int, times: float) -> int:
    """How many samples it takes until others leak only `OTHERS_LEAK` times as much, from how many `times` as much they
    leak with so many `samples`.

    Components that are chosen for a small leak on n samples leak too little there by 1 − k/n, and too much elsewhere by
    1 / (1 − k/n), as residuals of a fit with k parameters do. So `times` is (1 − k/n)⁻². On SmolLM2 and NQ-open, k was
    46 to 98 from 64 to 2,000 samples (docs/keeping.md).
    """
    k = samples * (1 - max(times, 1.0) ** -0.5)
    return round(k / (1 - OTHERS_LEAK**-0.5))
