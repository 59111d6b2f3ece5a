"""The drift that a change of a layer's weight causes, to second order, as pure functions on tensors.

A change ΔW of one layer's weight moves log p(y) of an answer token by Σ_t g_tᵀ ΔW x_t, summed over the tokens t of the
sample: x_t is the layer's input, g_t the gradient of log p(y) at its output. If y is drawn from the model itself, the
drift KL(base‖tuned) is, to second order, half the mean square of that (the Fisher information). Where x and g are taken
as independent, of each other and from token to token (K-FAC, Martens & Grosse, arXiv 1503.05671), this is

    predicted drift = ½ · tokens/answers · tr(D ΔW C ΔWᵀ)        in nats per answer token
    C = E[x xᵀ] (n, n)        D = E[g gᵀ] (m, m)                 means over the context's tokens

The context is not needed for it, only C and D. For an adapter ΔW = s·B A it is s² tr((Bᵀ D B)(A C Aᵀ)): products of r
rows with C and D. `Low` holds each in the size of a few rows, too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..devices import double_device
from .solvers import orthonormal


class Low(NamedTuple):
    """A symmetric positive semidefinite matrix F Fᵀ + diag(d).

    Attributes:
        factor: F (n, k), or (b, n, k) for b matrices.
        diagonal: d (n,), or (b, n).
    """

    factor: Tensor
    diagonal: Tensor


def compact(M: Tensor, k: int) -> Low:
    """M (n, n) by its k leading eigenvectors and the diagonal of the rest, in float32.

    The trace is M's. With k ≥ n nothing is lost. The eigenvectors are found by subspace iteration on k + 8 vectors
    (Halko et al., arXiv 0909.4061, algorithm 4.4), from a start that is the same at each call.
    """
    M, where = M.float(), double_device(M.device)
    if k >= len(M):
        values, vectors = torch.linalg.eigh(M.to(where).double())
    elif not bool(M.any()):
        values, vectors = M.new_zeros(k), M.new_zeros(len(M), k)
    else:
        start = torch.randn(min(k + 8, len(M)), len(M), generator=torch.Generator().manual_seed(0))
        X = start.to(where, torch.float64)
        for _ in range(4):
            X, _ = orthonormal((X.to(M) @ M).to(X))  # (k + 8, n)
        values, V = torch.linalg.eigh((X.to(M) @ M).to(X) @ X.T)  # ascending
        values, vectors = values[-k:].flip(0), X.T @ V[:, -k:].flip(1)
    F = (vectors * values.clamp_min(0).sqrt()).to(M)  # (n, k)
    return Low(F, (M.diagonal() - F.square().sum(1)).clamp_min(0))


def quadratic(X: Tensor, M: Low) -> Tensor:
    """X M Xᵀ (…, r, r) of X (…, r, n)."""
    return _times(X, M) @ X.mT


def _times(X: Tensor, M: Low) -> Tensor:
    """X M (…, r, n) of X (…, r, n)."""
    return torch.addcmul(X @ M.factor @ M.factor.mT, X, M.diagonal.unsqueeze(-2))


def predicted_drift(A: Tensor | None, B: Tensor, C: Low | Tensor, D: Low, weight: Tensor) -> Tensor:
    """`weight` · tr(D ΔW C ΔWᵀ) of ΔW = B A, () or (b,): nats per answer token with weight ½ · s² · tokens/answers.

    Its gradients, 2·weight · (Bᵀ D B) A C and 2·weight · D B (A C Aᵀ), share the products that it is made of. So they
    are computed with it, where they are wanted: at two thirds of the products that going back through it takes.

    Args:
        A: (r, n), or (b, r, n) for b layers; None where C is given as A C Aᵀ.
        B: (m, r), or (b, m, r).
        C: of the layer's inputs, (n, n); or A C Aᵀ (r, r) of an A that does not train.
        D: of the gradients at its outputs, (m, m).
        weight: () or (b,).
    """
    drift: Tensor = _PredictedDrift.apply(A, B, C, D, weight)
    return drift


class _PredictedDrift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor | None, B: Tensor, C: Low | Tensor, D: Low, weight: Tensor) -> Tensor:
        twice, of_A, of_B = 2 * weight[..., None, None], None, None
        DB = _times(B.mT, D).mT  # (…, m, r)
        inner_B = B.mT @ DB  # (…, r, r)
        if isinstance(C, Tensor):
            inner_A = C
        else:
            assert A is not None
            AC = _times(A, C)  # (…, r, n)
            inner_A = AC @ A.mT  # (…, r, r)
            of_A = twice * inner_B @ AC if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            of_B = DB @ (twice * inner_A)
        ctx.save_for_backward(of_A, of_B)
        return weight * (inner_A * inner_B).sum((-2, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_A, of_B = (None if of is None else gradient[..., None, None] * of for of in ctx.saved_tensors)
        return of_A, of_B, None, None, None


def whole(M: Low) -> Tensor:
    """F Fᵀ + diag(d), (n, n)."""
    return M.factor @ M.factor.mT + M.diagonal.diag()


def uniform(count: int, batch: int, seed: int = 0) -> Tensor:
    """The random numbers (count,) in [0, 1) by which the answers of a batch are drawn: one for each, in order."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed + 7919 * batch))


def drawn_log_likelihood(logits: Tensor, u: Tensor) -> Tensor:
    """Σ log p(y) of one y drawn from each row of logits (a, vocabulary): a scalar, whose gradients at a layer's outputs
    have the mean square D.

    Args:
        u: (a,) in [0, 1). y is the first token up to which the probabilities add up to more than u. So the same u gives
            the same y on any device, whether the rows are drawn together or a part at a time.
    """
    log_probs = logits.float().log_softmax(-1)
    sums = log_probs.detach().exp().cumsum(-1)  # (a, vocabulary)
    y = torch.searchsorted(sums, u[:, None].to(sums) * sums[:, -1:], right=True)  # (a, 1)
    return log_probs.gather(1, y.clamp(max=sums.shape[-1] - 1)).sum()
