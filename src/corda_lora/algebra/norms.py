"""The nuclear norm Σσ and the spectral norm σ₁ of a matrix, without its spectrum, as pure functions on tensors.

Covariance selection needs no more of a round than these two numbers.

**By matrix products alone.** The nuclear norm is Σσ = tr(QᵀM), where Q = U Vᵀ is the polar factor of M = U Σ Vᵀ.
A sequence of odd polynomials takes M to Q: the step X ← (a + b XXᵀ + c (XXᵀ)²) X replaces each singular value σ of X by
a σ + b σ³ + c σ⁵. The coefficients below have the least error on the interval in which σ may lie (Polar Express, Amsel
et al., arXiv 2505.16932). They are multiplied by 0.99, because the next step would enlarge a σ that rounding has taken
beyond 1.

**In TF32.** TF32 is five to six times as fast on a GPU as float32 or float64, and it is accurate enough:
- Σσ is the maximum of tr(QᵀM) over all ‖Q‖₂ ≤ 1, so an error of Q lowers it to second order only. A rotation of Q by
  K, antisymmetric in the basis U, loses at most ‖K‖₂² Σσ.
- Rounding the left factor P = p(XXᵀ) is such a rotation, with K_ij of the size of (δP P⁻¹)_ij, *however small* σ_i is
  beside σ₁.
- Rounding X is worse: the error of the large components rotates the small ones. So while X has small components, X is
  multiplied as the sum of two TF32 matrices.
- Where σ₁ towers over the rest (massive activations), nearly all of the error would come from it. So the first
  component is taken out beforehand. Its size also tells how many steps are needed.
"""

import torch
from torch import Tensor

from .covariance import add_gram, float32_products, mirror
from .solvers import lanczos, leading_singular_vectors

# Odd quintics (a, b, c) that map [0, 1] into itself. GROW is optimal on [0.03, 1] and multiplies a smaller σ by 4.1.
# Each of FINISH is optimal on the interval to which its predecessor maps the σ above 0.03; the last maps to 1 ± 6e-5.
GROW = (4.09562, -11.53911, 8.43349)
FINISH = ((3.72886, -8.85511, 6.11625), (2.71822, -3.66441, 1.93619), (1.95865, -1.42286, 0.46426))
LOST = 0.0091  # max (1 − f(σ)) σ over [0, 1], where f is FINISH followed by the step that makes Q orthonormal
TOLERANCE = 1e-5  # the share of Σσ that may be lost to components that have not grown enough


def norms(M: Tensor) -> tuple[float, float]:
    """Σσ and σ₁ of M (R, n), float64, R ≤ n.

    σ₁ has a relative error of 1e-6 or less. Σσ has one of about 1e-5 or less: it is too small by what the components
    below σ₁ lose (see above).
    """
    if not M.any():
        return 0.0, 0.0
    leading = leading_singular_vectors(M.T, 1, sweeps=4)  # faster than Lanczos, but needs a gap after σ₁
    u = lanczos(lambda v: M @ (M.T @ v), len(M), M.device)[1] if leading is None else leading[1][0]  # (R,)
    row = u @ M  # (n,): σ₁ v₁ᵀ
    first = float(row.norm())
    return first + _nuclear_norm(torch.addr(M, u, row, alpha=-1), beside=first), first


def _nuclear_norm(M: Tensor, beside: float) -> float:
    """Σσ of M (R, n), float64, with an error of at most TOLERANCE·(Σσ + `beside`)."""
    size = float(torch.linalg.norm(M))  # an upper bound on σ
    if size == 0:
        return 0.0
    with float32_products("high"):
        X = start = (M / size).float()
        missing = LOST * len(M)  # an upper bound, in units of `size`; ⟨X, start⟩ ≤ Σσ, as ‖X‖₂ ≤ 1
        while missing > TOLERANCE * (beside / size + float((X * start).sum())):
            X, missing = _step(X, GROW, split=True), missing / GROW[0]
        for coefficients in FINISH:
            X = _step(X, coefficients, split=False)
    # X is orthonormal to 1e-3; Q = (3 X − XXᵀX) / 2 is orthonormal to 1e-6.
    Q = X.double()
    S = Q @ M.T
    return float(1.5 * S.trace() - 0.5 * (mirror(add_gram(None, Q.T)) * S).sum())


def _step(X: Tensor, coefficients: tuple[float, float, float], split: bool) -> Tensor:
    """(a + b XXᵀ + c (XXᵀ)²) X of X (R, n), float32. With `split`, X is not rounded to TF32."""
    a, b, c = coefficients
    A = X @ X.T
    P = torch.addmm(A, A, A, beta=b, alpha=c)
    P.diagonal().add_(a)
    if not split:
        return P @ X
    high = (X.view(torch.int32) & -(2**13)).view(torch.float32)  # the part of X that TF32 represents
    return torch.addmm(P @ high, P, X - high)
