"""How well the samples that were shown stand for others of their kind, and how many would."""

from collections.abc import Mapping
from statistics import median

import torch
from torch import nn

from ..algebra.decomposition import energies
from ..config.data import OTHERS_LEAK
from ..processes import Processes
from ..progress import progress_bar
from .context import Context
from .pipeline import Start
from .share import Share, SharedCollector
from .walk import Place, walk


@torch.no_grad()
def held_out_leaks(
    model: nn.Module,
    start: Start,
    context: Context,
    place: Place,
    processes: Processes | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """The leak tr(A C Aᵀ) of each layer of a start, with C of samples that its components were not chosen from. A layer
    that none of their tokens came to is missing. Several processes share the batches, if there are as many."""
    leaks: dict[str, float] = {}
    targets = {name: model.get_submodule(name) for name in start.layers}
    collector = None
    if processes and len(context.batches) >= processes.size:
        share = Share(processes, model, targets, start.config, place.device)
        context = share.part(context)
        collector = SharedCollector(model, targets, context, 1, share)
    with progress_bar("other samples", len(targets), progress) as advance:
        for _, groups in walk(model, targets, context, place, collector=collector):
            for members, covariances in groups or []:
                for C in covariances:
                    As = {name: start.layers[name].A.to(C.device).double() for name in members}
                    leaks |= {name: float(energies(A, C).sum()) for name, A in As.items()}
                advance(len(members))
    if collector is not None:
        for told in collector.share.processes.gather(leaks):
            leaks |= told
    return {name: leaks[name] for name in targets if name in leaks}


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
