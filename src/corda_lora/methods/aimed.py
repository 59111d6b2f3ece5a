"""A frozen A that is aimed: at the input directions in which the task gains most for what is predicted to be lost."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters.lora import install
from ..algebra.compactness import allocate
from ..algebra.decomposition import regularize
from ..algebra.second_order import Low, steepest_rows, whole
from ..config import CordaConfig, CordaError
from ..config.values import NonNegative, Positive
from ..devices import compute_device, double_device
from ..models.weights import weight_shape
from ..preprocess.layer import LayerStart
from ..preprocess.pipeline import Start
from ..preprocess.statistics import Statistics
from .baselines import labelled_batches
from .keeping import context_statistics, what_is_kept, with_penalties
from .registry import Prepared, Setup, method

ROOM = 4  # with ranks that differ, a layer gets this many times r at most


@method(
    "aimed",
    "anchored where the task gains",
    "ours; natural gradient by K-FAC, Martens & Grosse, arXiv 1503.05671",
    (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    prepares_from="keep",
    after=("keep", "keep_generic"),
)
def aimed(
    model: nn.Module,
    setup: Setup,
    by: Literal["gradient", "inputs"] = "gradient",
    allocates: bool = False,
    damping: Positive = 0.01,
    samples: int | None = None,
    keep: NonNegative = 0.0,
    keep_generic: NonNegative = 0.0,
) -> Prepared:
    """A LoRA whose A is frozen on `steepest_rows`, and whose B is trained from zero, as in the split anchored.

    Args:
        by: what tells of the task: the `gradient` of its loss at the start, or the covariance of its `inputs`.
        allocates: give each layer a rank by what its directions gain per parameter, within the same budget.
        damping: of C and D.
        samples: how many samples of the task and of the ability to keep are looked at. Default: the comparison's
            number.
        keep, keep_generic: as in `corda`.
    """

    def rows() -> dict[str, Tensor]:
        context, device = context_statistics(model, setup, "keep", samples), double_device(compute_device(model))
        if unseen := [name for name in setup.targets if name not in context.layers]:
            raise CordaError(f"no token of the context comes to {unseen[0]}, so nothing tells where to aim")
        task = (_of_gradients if by == "gradient" else _of_inputs)(model, setup, context, damping, samples)
        found = {}
        for name, module in setup.targets.items():
            directions, gains = steepest_rows(task(name, device), _whole(context.layers[name].C, device), damping)
            most = min(*weight_shape(module), ROOM * setup.r if allocates else setup.r)
            found[name] = directions[:most].float().cpu(), gains[:most].cpu()
        costs = [sum(weight_shape(module)) for module in setup.targets.values()]
        ranks = [setup.r] * len(costs)
        if allocates:
            ranks = allocate([g.flip(0) / c for (_, g), c in zip(found.values(), costs)], costs, setup.budget, "ipm")
        return {f"{name}.A": directions[:r] for (name, (directions, _)), r in zip(found.items(), ranks)}

    kept = what_is_kept(model, setup, keep, samples, keep_generic)
    A_of, layers = setup.cached(rows), {}
    for name, module in setup.targets.items():
        A = A_of[f"{name}.A"]  # (r, n)
        layers[name] = LayerStart(A, torch.zeros(weight_shape(module)[0], len(A)), torch.empty(0))
    dropout = setup.train.lora_dropout
    config = CordaConfig(r=setup.r, split="anchored", lora_alpha=setup.lora_alpha, lora_dropout=dropout)
    return with_penalties(Prepared(install(model, Start(config, layers, {}, {}))), setup, kept)


def _of_gradients(
    model: nn.Module, setup: Setup, context: Statistics, damping: float, samples: int | None
) -> Callable[[str, torch.device], Tensor]:
    """Gᵀ D_λ⁻¹ G (n, n) of a layer, of the gradient G (m, n) of the task's mean loss."""
    if getattr(model, "is_quantized", False):
        raise CordaError("aiming by the gradient needs that of full weights, and the model is quantized: by: inputs")
    weights: list[Tensor] = [module.weight for module in setup.targets.values()]  # type: ignore[misc]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    model.requires_grad_(False).eval()
    for weight in weights:
        weight.requires_grad_(True)
    batches = labelled_batches(setup, setup.context("learn", samples), model)
    answers = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    for batch in batches:
        share = int((batch["labels"][:, 1:] >= 0).sum()) / answers
        for total, gradient in zip(totals, torch.autograd.grad(model(**batch).loss, weights, allow_unused=True)):
            if gradient is not None:
                total += share * gradient.float()
    model.requires_grad_(False)
    gradients = dict(zip(setup.targets, totals))

    def of(name: str, device: torch.device) -> Tensor:
        G, D = gradients[name].to(device).double(), regularize(_whole(context.layers[name].D, device), damping)
        G = G if len(G) == len(D) else G.T  # Conv1D's
        return G.T @ torch.linalg.solve(D, G)

    return of


def _of_inputs(
    model: nn.Module, setup: Setup, context: Statistics, damping: float, samples: int | None
) -> Callable[[str, torch.device], Tensor]:
    """tr(D_λ⁻¹ D') · C' (n, n) of a layer, with C' and D' of the task."""
    task = context_statistics(model, setup, "learn", samples)

    def of(name: str, device: torch.device) -> Tensor:
        ours, D = task.layers[name], regularize(_whole(context.layers[name].D, device), damping)
        return torch.linalg.solve(D, _whole(ours.D, device).double()).trace() * _whole(ours.C, device).double()

    return of


def _whole(M: Low, device: torch.device) -> Tensor:
    return whole(Low(*(part.to(device) for part in M)))
