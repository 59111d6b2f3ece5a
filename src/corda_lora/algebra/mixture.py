"""Several abilities in one covariance, each as much as its weight says, as pure functions on tensors.

The covariances C_k of the abilities k = 1 ... K (and likewise D_k) are mixed as

    C = t̄ · Σ α_k C_k / t_k        t_k = tr C_k,   t̄ = Σ α_k t_k,   α ≥ 0,   Σ α = 1

C_k / t_k does not change when all inputs of a context are c times as large, nor with its number of tokens. Its a C_k aᵀ
/ t_k is the share of the ability's input energy that lies along a, of a random a 1/n. So a weight means the same for a
loud context and for a quiet one, in each layer: how much a share of its energy counts. t̄ gives C the scale of what
went in. One ability, or several with one covariance, are mixed to this covariance itself.

**Weights by layer.** An adapter whose rows A are the r directions that C uses least leaks Σ α_k tr(A C_k Aᵀ)/t_k. What
should be small is the largest leak. Its least value over all A is, with P = AᵀA relaxed to 0 ≤ P ≤ I, tr P = r,

    min over P of max over k of tr(P C_k)/t_k  =  max over α of (the sum of the r smallest eigenvalues of Σ α_k C_k/t_k)

by von Neumann's theorem: tr(P C_k) is linear in P, and the sum is concave in α (Ky Fan). So the weights of a layer are
a concave problem in K − 1 variables: `even_weights`. Compactness as Eq. 6 has it (see `compactness`), the ratio of the
extreme eigenvalues, is quasiconvex in α; but its least value leaves the least compact ability without a weight, and the
regularization all but fixes the smallest eigenvalue.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 24
NOTHING = 1e-12  # of an ability's energy, is what rounding leaves of a leak of zero


def mixed(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """C (n, n) of the C_k (n, n), in their dtype. A C_k of zeros (no token, no answer) takes no part.

    Args:
        weights: α, of any sum.
    """
    traces = [float(M.diagonal().double().sum()) for M in matrices]
    parts = [(a, t, M) for a, t, M in zip(weights, traces, matrices) if a > 0 and t > 0]
    if not parts:
        return torch.zeros_like(matrices[0])
    mean = sum(a * t for a, t, _ in parts) / sum(a for a, _, _ in parts) ** 2
    result = parts[0][2] * (mean * parts[0][0] / parts[0][1])
    for a, t, M in parts[1:]:
        result.add_(M, alpha=mean * a / t)
    return result


def even_weights(matrices: Sequence[Tensor], r: int, gap: float = 0.02) -> list[float]:
    """The α for which the largest leak of the r directions that the mixture uses least is smallest.

    By multiplicative weights: the ability that leaks more than the others gets more weight. It ends where the largest
    leak is within `gap` of its bound, or after `ITERATIONS` eigendecompositions, with the best α seen.

    Args:
        matrices: C_k (n, n). One of zeros gets no weight. Where r directions are used by none of them (fewer tokens
            than inputs of the layer), the others have the same.
    """
    traces = torch.stack([M.diagonal().double().sum() for M in matrices])
    there = (traces > 0).nonzero().flatten().tolist()
    if not there:
        return [1 / len(matrices)] * len(matrices)
    shares = [matrices[k].double() / traces[k] for k in there]
    alpha = torch.full((len(there),), 1 / len(there), dtype=torch.float64)
    best, bound, found = -1.0, float("inf"), alpha
    for step in range(ITERATIONS):
        C = torch.zeros_like(shares[0])
        for a, share in zip(alpha.tolist(), shares):
            C.add_(share, alpha=a)
        _, V = torch.linalg.eigh(C)
        A = V[:, :r]  # (n, r), ascending
        leaks = torch.stack([((M @ A) * A).sum() for M in shares]).cpu().clamp(min=0)
        if float(leaks.max()) <= NOTHING:  # r directions that no ability uses: all weights are as good
            return [float(k in there) / len(there) for k in range(len(matrices))]
        bound = min(bound, float(leaks.max()))
        if (value := float(alpha @ leaks)) > best:
            best, found = value, alpha
        if bound - best <= gap * bound or len(there) == 1:
            break
        alpha = alpha * torch.exp(2 / (1 + step) ** 0.5 * (leaks / leaks.max() - 1))
        alpha = alpha / alpha.sum()
    weights = [0.0] * len(matrices)
    for k, a in zip(there, found.tolist()):
        weights[k] = a
    return weights
