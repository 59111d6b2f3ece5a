"""Which covariance a layer takes, and how many components (CorDA++, arXiv 2506.13187), as pure functions on tensors.

A context is *compact* for a layer that handles it with few components: the head of the layer holds the ability, and the
tail is free. Two choices follow from compactness.

**Covariance selection** (Alg. 1). N independent rounds of sampling the context give each layer N covariances. Each
covariance has the score (Eq. 7)

    s = log π(C) · Σσ/σ₁          π(C) = √m · σ_max(C_λ) / σ_min(C_λ)          σ: singular values of W C_λ

and each layer takes the covariance with the smallest score: `selection_score`. Σσ/σ₁ is the nuclear norm over the
spectral norm, a soft rank.

**Rank allocation** (Alg. 2). Components are filtered from the tails of all layers, the least important component of the
whole model first. Filtering the r-th component of a layer with the spectrum σ₁ ≥ ... ≥ σ_R costs (Eq. 9)

    log π(C) · σ_{R−r+1} / (σ₁ + ... + σ_{R−r})

which is what is lost over what remains. In mode `kpm` the filtered components become the adapter; in mode `ipm` the
remaining ones do. The paper filters one component at a time, always the cheapest. The cost grows with r, because the
numerator rises and the denominator falls. So the greedy loop takes the components in the order of one global sort:
`allocate`.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .solvers import lanczos, lower_inverse

# Up to this size a full symmetric eigendecomposition is used; above it Lanczos is faster, on a GPU and on two cores.
DENSE = 1024
EPS = torch.finfo(torch.float64).eps


def log_compactness(d_out: int, lowest: float, highest: float) -> float:
    """log π(C) (Eq. 6) of a layer with d_out outputs, from the extreme eigenvalues of C_λ. Without a covariance both
    eigenvalues are 1."""
    return 0.5 * math.log(d_out) + math.log(highest / lowest)


def extreme_eigenvalues(C: Tensor) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of C_λ, (n, n), float64, positive definite.

    Above n = 1024 Lanczos finds them, on C_λ and on its inverse, to a relative error of about 1e-4; log π is then right
    to about 1e-5. The factors that Lanczos multiplies by are computed in float64 and rounded to float32, an error that
    is small beside 1e-4.

    Raises torch.linalg.LinAlgError where C_λ is not positive definite in float64.
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
    """A v in float64, of A (n, n) in float32 and v (n,) in float64."""
    return (A @ v.float()).double()


def selection_score(log_pi: float, total: float, first: float) -> float:
    """The score s = log π(C) · Σσ/σ₁ (Eq. 7) of one covariance, from `total` = Σσ and `first` = σ₁ of W C_λ. A layer
    takes the covariance with its smallest score. The score of a zero weight is 0."""
    return log_pi * total / first if first > 0 else 0.0


def allocation_scores(log_pi: float, sigma: Tensor) -> Tensor:
    """The cost (Eq. 9) of filtering the r-th component from the tail, for r = 1 ... R: (R,), float64, ascending.

    Args:
        sigma: the layer's spectrum (R,), descending.

    The last cost is infinite, as no component would remain.
    """
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
    """The rank of every layer: the paper's greedy loop (Alg. 2) as one stable sort of all layers' scores.

    Args:
        scores: the `allocation_scores` of each layer.
        costs: the parameters of one component of each layer, d_in + d_out.
        budget: the parameters of all components together. Mode `kpm` stops before it would exceed the budget. Mode
            `ipm` stops as soon as the remaining components fit, less than one component below the budget.
        min_rank: the least rank of a layer; a layer with fewer components gets all of them.
        max_rank: the largest rank of a layer. Default: all its components.

    Raises:
        ValueError: the budget does not pay for `min_rank` components of every layer.
    """
    sizes = [len(s) for s in scores]
    least = [min(min_rank, R) for R in sizes]
    most = [R if max_rank is None else max(low, min(max_rank, R)) for low, R in zip(least, sizes)]
    floor = sum(low * cost for low, cost in zip(least, costs))
    if floor > budget:
        raise ValueError(f"a budget of {budget} does not pay for {min_rank} components a layer, which take {floor}")
    # The candidates of a layer are the components that may still be filtered once its limits on the rank are kept.
    if mode == "kpm":
        spans = list(zip(least, most))
    else:
        spans = [(R - high, R - low) for R, low, high in zip(sizes, least, most)]
    device = scores[0].device
    lengths = torch.tensor([end - begin for begin, end in spans], device=device)
    layer = torch.repeat_interleave(torch.arange(len(sizes), device=device), lengths)  # the layer of each candidate
    candidates = torch.cat([s[begin:end] for s, (begin, end) in zip(scores, spans)])
    order = torch.sort(candidates, stable=True).indices  # of equal scores the earlier layer comes first, as in the loop
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
