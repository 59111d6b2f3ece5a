"""Which covariance, and how many components of each layer: pure tensors. (CorDA++, arXiv 2506.13187.)

A context that a layer handles with few components is *compact*: its head holds the ability, its tail is free. Two
choices rest on that.

**Covariance selection.** N independent samplings of the context give N covariances a layer. Each scores

    s = log π(C) · Σσ/σ₁          π(C) = √m · σ_max(C_λ) / σ_min(C_λ)          σ: singular values of W C_λ

and the smallest wins, layer by layer: `selection_score`. (Σσ/σ₁ is the nuclear over the spectral norm, a soft rank.)

**Rank allocation.** Take components away from the tails of all layers, the least important of the whole model first.
Taking the r-th of a layer with spectrum σ (descending, R of them) costs

    log π(C) · σ_{R−r+1} / (σ₁ + ... + σ_{R−r})

what is lost over what remains. In `kpm` the filtered components become the adapter, in `ipm` those that remain do. The
paper filters one at a time, always the cheapest. As the cost grows with r (the numerator rises, the denominator falls),
that greedy loop takes the components in the order of one global sort: `allocate`.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .norms import lanczos
from .solvers import lower_inverse

# A full symmetric eigendecomposition up to here, Lanczos above, which is faster on a GPU and on two cores.
DENSE = 1024
EPS = torch.finfo(torch.float64).eps


def log_compactness(d_out: int, lowest: float, highest: float) -> float:
    """log π(C) of a layer with d_out outputs, from the extreme eigenvalues of C_λ. With no covariance both are 1."""
    return 0.5 * math.log(d_out) + math.log(highest / lowest)


def extreme_eigenvalues(C: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue of C_λ, (n, n) float64, positive definite.

    Raises torch.linalg.LinAlgError where C_λ is not positive definite in float64.

    Above n = 1024 by Lanczos, on C and on its inverse, to about 1e-4, so that log π is right to about 1e-5. What is
    multiplied is made in float64 and rounded to float32, which is little beside that.
    """
    n = C.shape[0]
    if n <= DENSE:
        eigenvalues = torch.linalg.eigvalsh(C)
        lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
        if not lowest > EPS * highest:
            raise torch.linalg.LinAlgError("C_λ is singular to float64")
        return lowest, highest
    highest, _ = lanczos(partial(_product, C.float()), n, C.device, tolerance=1e-4)
    L_inverse = lower_inverse(torch.linalg.cholesky(C)).float()
    of_inverse, _ = lanczos(lambda v: _product(L_inverse.T, _product(L_inverse, v)), n, C.device, tolerance=1e-4)
    return 1 / of_inverse, highest


def _product(A: Tensor, v: Tensor) -> Tensor:
    """A v, of A in float32 and v (n,) in float64."""
    return (A @ v.float()).double()


def selection_score(log_pi: float, total: float, first: float) -> float:
    """s = log π(C) · Σσ/σ₁ of one covariance, from Σσ and σ₁ of W C_λ; the smallest of a layer's scores names its
    covariance. 0 if the weight is zero."""
    return log_pi * total / first if first > 0 else 0.0


def allocation_scores(log_pi: float, sigma: Tensor) -> Tensor:
    """Cost of filtering the r-th component from the tail, for r = 1 ... R: (R,) float64, ascending. σ: (R,),
    descending. The last is infinite: nothing would remain."""
    remaining = torch.cat([sigma.new_zeros(1), sigma.cumsum(0)[:-1]]).flip(0)  # (R,): σ₁ + ... + σ_{R−r}
    scores = log_pi * sigma.flip(0) / remaining
    return torch.where(remaining > 0, scores, torch.where(sigma.flip(0) > 0, torch.inf, 0.0))


def allocate(
    scores: Sequence[Tensor],
    costs: Sequence[int],
    budget: int,
    mode: str,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> list[int]:
    """The rank of every layer: the paper's greedy loop as one stable sort of all layers' scores.

    Args:
        scores: `allocation_scores` of each layer.
        costs: parameters of one component of each layer, d_in + d_out.
        budget: parameters of all. `kpm` stops before it is passed; `ipm` stops as soon as what remains fits, less
            than one component below.
        min_rank: every layer gets at least this (or all it has).
        max_rank: and at most this.

    Raises:
        ValueError: the budget does not pay for `min_rank` components of every layer.
    """
    sizes = [len(s) for s in scores]
    least = [min(min_rank, R) for R in sizes]
    most = [R if max_rank is None else max(low, min(max_rank, R)) for low, R in zip(least, sizes)]
    floor = sum(low * cost for low, cost in zip(least, costs))
    if floor > budget:
        raise ValueError(f"a budget of {budget} does not pay for {min_rank} components a layer, which take {floor}")
    # A layer's candidates, by how many are filtered: in kpm its ranks above the least, in ipm those above what remains.
    if mode == "kpm":
        spans = list(zip(least, most))
    else:
        spans = [(R - high, R - low) for R, low, high in zip(sizes, least, most)]
    device = scores[0].device
    lengths = torch.tensor([end - begin for begin, end in spans], device=device)
    layer = torch.repeat_interleave(torch.arange(len(sizes), device=device), lengths)  # of each candidate
    candidates = torch.cat([s[begin:end] for s, (begin, end) in zip(scores, spans)])
    order = torch.sort(candidates, stable=True).indices  # equal scores: the earlier layer first, as in the loop
    paid = torch.tensor(costs, device=device)[layer[order]].cumsum(0)
    if mode == "kpm":
        taken = int((paid <= budget - floor).sum())
    else:
        whole = sum(high * cost for high, cost in zip(most, costs))
        taken = int((paid < whole - budget).sum()) + (whole > budget)
    filtered = torch.bincount(layer[order[:taken]], minlength=len(sizes)).tolist()
    if mode == "kpm":
        return [low + f for low, f in zip(least, filtered)]
    return [high - f for high, f in zip(most, filtered)]
