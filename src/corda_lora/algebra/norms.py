"""Σσ and σ₁ of a matrix without its spectrum, which is all that covariance selection asks of a round: pure tensors.

The nuclear norm Σσ = tr(QᵀM), Q the polar factor of M (R, n), that is U Vᵀ of M = U Σ Vᵀ. Odd polynomials, one after
the other, take M there by products alone: X ← (a + b XXᵀ + c (XXᵀ)²) X makes a σ + b σ³ + c σ⁵ of each σ of X. Those
below are of least error on the interval where σ may be (Polar Express, Amsel et al., arXiv 2505.16932), times 0.99, so
that no rounding takes a σ beyond 1, from where the next would throw it further.

**In TF32**, five to six times as fast on a GPU as float32 or float64. Σσ is the largest tr(QᵀM) that there is over all
‖Q‖ ≤ 1, so that errors of Q lower it in the second order only: a rotation of Q by K, antisymmetric in the basis U,
loses at most ‖K‖₂² Σσ. What rounding of a left factor P = p(XXᵀ) does is such a rotation, K_ij of the size of
(δP P⁻¹)_ij, *however small* σ_i is beside σ₁. A rounded X is not: a rotation of the small components by what the large
ones lose. So while X has small ones, it is multiplied as the sum of two matrices, TF32 each. Where σ₁ towers over the
rest (massive activations) its share of the error would be nearly all, so it is taken out first, which also says how
many steps are needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .covariance import add_gram, float32_products, mirror
from .solvers import leading_singular_vectors

# Odd quintics (a, b, c) from [0, 1] to itself. The first is best on [0.03, 1], and σ of below grow 4.1 times; each of
# the others is best where the one before leaves what was above 0.03, and the last ends at 1 ± 6e-5.
GROW = (4.09562, -11.53911, 8.43349)
FINISH = ((3.72886, -8.85511, 6.11625), (2.71822, -3.66441, 1.93619), (1.95865, -1.42286, 0.46426))
LOST = 0.0091  # max (1 − f(σ)) σ over 0 ... 1, f: FINISH, and after it the step that makes Q orthonormal
TOLERANCE = 1e-5  # share of Σσ that may be lost to components that did not grow enough


def norms(M: Tensor) -> tuple[float, float]:
    """Σσ and σ₁ of M (R, n) float64, R ≤ n. σ₁ to 1e-6 or better; Σσ to about 1e-5, mostly less, the error being the
    part of it below σ₁ (see above) and of one sign: what is lost."""
    if not M.any():
        return 0.0, 0.0
    found = leading_singular_vectors(M.T, 1, sweeps=4)  # faster than Lanczos, which also gets there without a gap
    u = lanczos(lambda v: M @ (M.T @ v), len(M), M.device)[1] if found is None else found[1][0]  # (R,)
    row = u @ M  # (n,): σ₁ v₁ᵀ
    first = float(row.norm())
    return first + _nuclear_norm(torch.addr(M, u, row, alpha=-1), beside=first), first


def _nuclear_norm(M: Tensor, beside: float) -> float:
    """Σσ of M (R, n) float64, to TOLERANCE of the sum of it and what is `beside` it."""
    size = float(torch.linalg.norm(M))  # no σ is larger
    if size == 0:
        return 0.0
    with float32_products("high"):
        X = start = (M / size).float()
        missing = LOST * len(M)  # at most, in units of `size`; ⟨X, start⟩ ≤ Σσ, as ‖X‖ ≤ 1
        while missing > TOLERANCE * (beside / size + float((X * start).sum())):
            X, missing = _step(X, GROW, split=True), missing / GROW[0]
        for coefficients in FINISH:
            X = _step(X, coefficients, split=False)
    # Q = (3 X − XXᵀX) / 2 is orthonormal to 1e-6, where X is to 1e-3.
    Q = X.double()
    S = Q @ M.T
    return float(1.5 * S.trace() - 0.5 * (mirror(add_gram(None, Q.T)) * S).sum())


def _step(X: Tensor, coefficients: tuple[float, float, float], split: bool) -> Tensor:
    """(a + b XXᵀ + c (XXᵀ)²) X of X (R, n) float32. `split`: X is not rounded to TF32."""
    a, b, c = coefficients
    A = X @ X.T
    P = torch.addmm(A, A, A, beta=b, alpha=c)
    P.diagonal().add_(a)
    if not split:
        return P @ X
    high = (X.view(torch.int32) & -(2**13)).view(torch.float32)  # the bits that TF32 has
    return torch.addmm(P @ high, P, X - high)


def lanczos(
    multiply: Callable[[Tensor], Tensor], n: int, device: torch.device, steps: int = 400, tolerance: float = 1e-6
) -> tuple[float, Tensor]:
    """Largest eigenvalue of a symmetric matrix, positive semidefinite, given by its product with a vector (n,), and its
    eigenvector (n,). Lanczos with full reorthogonalization; ends when half as many steps more change the value by less
    than `tolerance`, relative (it is nearer by then: the error falls with the square of the vector's)."""
    steps = min(steps, n)
    checks = [*(c for c in (20, 30, 45, 68, 100, 150, 225, 340) if c < steps), steps]
    Q = torch.zeros(steps + 1, n, dtype=torch.float64, device=device)  # the Krylov basis, a row a step
    T = torch.zeros(steps, steps, dtype=torch.float64, device=device)  # the matrix in that basis, its lower triangle
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q[0] = (start / start.norm()).to(device)
    value, vector = 0.0, Q[0]
    for j in range(steps):
        w = multiply(Q[j])
        basis, limit = Q[: j + 1], 1e-12 * w.norm()
        torch.mv(basis, w, out=T[j, : j + 1])
        w = torch.addmv(w, basis.T, T[j, : j + 1], alpha=-1)
        w = torch.addmv(w, basis.T, basis @ w, alpha=-1)  # twice is enough
        beyond = w.norm()
        # Where the basis is complete, only zeros follow.
        torch.mul(w, (beyond > limit) / beyond.clamp(min=1e-300), out=Q[j + 1])
        if j + 1 in checks:
            values, vectors = torch.linalg.eigh(T[: j + 1, : j + 1].cpu())
            before, value = value, float(values[-1])
            vector = vectors[:, -1].to(device) @ basis
            if abs(value - before) <= tolerance * abs(value):
                break
    return value, vector
