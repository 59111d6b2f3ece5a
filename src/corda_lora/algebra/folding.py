"""What quantization lost of a weight, folded back into the adapter, as pure functions on tensors.

A quantized layer computes (Q + B A) x, where Q has the values that the stored weight represents. What it lacks of W is

    E = W − Q

and B A should be the rank-r matrix nearest to E: not number by number, but where it counts. The inputs x of the layer
have the covariance C = E[x xᵀ] (n, n), so the outputs of an error X are off by tr(X C Xᵀ) in the mean square. Where in
the outputs that is decides what it does to the model's answers: with D = E[g gᵀ] (m, m), of the gradients of log p(y)
at the outputs, KL(full‖quantized) is, to second order and but for a constant (see `second_order`),

    ‖D_λ^½ X C_λ^½‖_F² = tr(D_λ X C_λ Xᵀ)              X = E − B A

`best_fit` is the B A of rank r for which this is least (Eckart and Young). With C alone it is QERA's exact solution
(arXiv 2410.06040, Theorem 1), and without either, the SVD of E, a step of LoftQ (arXiv 2310.08659).

**No roots, and no inverse.** Any factors L Lᵀ = D_λ and T Tᵀ = C_λ may take the roots' place. With the first r left
singular vectors U of LᵀE T,

    B A = L⁻ᵀ U Uᵀ Lᵀ E            B = L⁻ᵀ U,    A = UᵀLᵀE

U is of the symmetric Gram matrix Lᵀ (E C_λ Eᵀ) L, (m, m), so C needs no factor, and D a triangular one. Squaring leaves
a relative error of about 1e-16·(σ₁/σ_r)² in float64: the error of a quantized weight has no small components among the
first. Where m > n the transposed problem is solved, so that the Gram matrix is always the smaller one.

**Alternating.** E depends on what was quantized. `fold` quantizes W − B A, fits B A to what that lost, and so on, as
LoftQ does in the metric of the identity.

**Rounding for the adapter.** Of an error X of Q, B takes up all that lies in the rows of A. What is left is

    min over B of tr((X − B A) C (X − B A)ᵀ) = tr(X H Xᵀ)              H = C − C Aᵀ (A C Aᵀ)⁻¹ A C

So Q is best rounded in this metric (see `rounding`): errors then go where the adapter is.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from .decomposition import factor, regularize, split_components
from .solvers import eigh

Stored = TypeVar("Stored")
DAMPING = 0.01
LEFT_DAMPING = 0.1  # from 0.03 to 0.3 the error in C changes little; the plain error falls


def best_fit(
    error: Tensor, r: int, covariance: Tensor | None = None, outputs: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r), float64: the B A of rank r for which ‖D_λ^½ (E − B A) C_λ^½‖_F is least. Each row of A is
    as long as its column of B.

    Args:
        error: E (m, n).
        covariance: C (n, n) of the layer's inputs. Default: the identity.
        outputs: D (m, m) of the gradients at its outputs. Default: the identity.
        damping: λ, see `regularize`.

    Raises ValueError if r is not in 1 ... min(m, n); torch.linalg.LinAlgError where the covariance of the shorter side
    is singular even with λ.
    """
    return _fit(error.double(), r, _regularized(covariance, damping), _regularized(outputs, damping))


def fold(
    weight: Tensor,
    quantize: Callable[[Tensor, Tensor], tuple[Stored, Tensor]],
    A: Tensor,
    B: Tensor,
    covariance: Tensor | None = None,
    outputs: Tensor | None = None,
    rounds: int = 5,
    damping: float = DAMPING,
) -> tuple[Stored, Tensor, Tensor]:
    """The stored weight, A (r, n) and B (m, r), such that the quantized weight plus B A is near W (m, n) in the metric
    of `best_fit`. Each round quantizes W − B A and fits B A anew. The best round counts: more rounds are never worse.

    Args:
        weight: W (m, n), the full weight.
        quantize: a weight (m, n), in the dtype of W, and the metric (n, n) to round it in, see `left_by` → what is
            stored of it, and the values (m, n) that this represents.
        A, B: the start: of the first r components of W, say. B = 0 quantizes W itself first.
        rounds: 1 folds once.

    Raises what `best_fit` does.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, but folding takes at least one")
    W = weight.double()
    C, D = _regularized(covariance, damping), _regularized(outputs, damping)

    def folded(A: Tensor, B: Tensor) -> tuple[float, Stored, Tensor, Tensor]:
        stored, values = quantize((W - B @ A).to(weight.dtype), left_by(A, C))
        E = W - values.double()
        A, B = _fit(E, len(A), C, D)
        return float(_square(E - B @ A, C, D)), stored, A, B

    best = last = folded(A.to(W), B.to(W))
    for _ in range(rounds - 1):
        last = folded(*last[2:])
        best = min(best, last, key=itemgetter(0))
    return best[1:]


def left_by(A: Tensor, covariance: Tensor | None = None, damping: float = LEFT_DAMPING) -> Tensor:
    """H_λ (n, n), float64, of the adapter's A (r, n), whose rows need not be independent: what an error of the
    quantized weight costs where B is free. Where A is zero, H is C.

    Args:
        covariance: C (n, n), positive definite. Default: the identity.
    """
    A = A.double()
    H = torch.eye(A.shape[1]).to(A) if covariance is None else covariance.to(torch.float64, copy=True)
    least = 1e-9 * H.diagonal().mean()  # where A takes up everything
    AC = A @ H  # (r, n)
    energies, V = eigh(AC @ A.T)
    independent = energies > 1e-10 * energies[-1]
    rows = (V[:, independent] / energies[independent].sqrt()).T @ AC
    H.addmm_(rows.T, rows, alpha=-1)
    H.diagonal().add_((damping * H.diagonal().mean()).clamp(min=least))
    return H


def metric_norm(
    X: Tensor, covariance: Tensor | None = None, outputs: Tensor | None = None, damping: float = DAMPING
) -> float:
    """‖D_λ^½ X C_λ^½‖_F of X (m, n): C and D as in `best_fit`."""
    return float(_square(X.double(), _regularized(covariance, damping), _regularized(outputs, damping)).sqrt())


def _regularized(M: Tensor | None, damping: float) -> Tensor | None:
    """M_λ; None where M is None, or zero, which prefers no direction to another."""
    return None if M is None or not M.diagonal().any() else regularize(M, damping)


def _square(X: Tensor, C: Tensor | None, D: Tensor | None) -> Tensor:
    """tr(D X C Xᵀ), of matrices that are regularized."""
    XC = X if C is None else X @ C
    return (XC * (X if D is None else D @ X)).sum().clamp(min=0)


def _fit(E: Tensor, r: int, C: Tensor | None, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """`best_fit` of float64 and of matrices that are regularized."""
    m, n = E.shape
    if not 1 <= r <= min(m, n):
        raise ValueError(f"r is {r}, but the layer has {min(m, n)} components")
    if m > n:
        A, B = _fit(E.T, r, D, C)
        return B.T, A.T
    L = None if D is None else factor(D, damping=0)
    LE = E if L is None else L.T @ E  # (m, n)
    squares, U = eigh((LE if C is None else LE @ C) @ LE.T)  # ascending
    U, sigma = U[:, -r:].flip(1), squares[-r:].flip(0).clamp(min=0).sqrt()
    rows = U.T @ LE  # (r, n)
    columns = U if L is None else torch.linalg.solve_triangular(L.T, U, upper=True)  # (m, r)
    B, A = split_components(columns, sigma, rows, "balanced")
    return A, B
