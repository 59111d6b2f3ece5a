"""Rounding to a few levels so that a layer's outputs stay near, not its numbers: OPTQ, as a pure function on tensors.

Rounding each number to the nearest level ignores that the inputs x of a layer are correlated. OPTQ (GPTQ, arXiv
2210.17323) rounds column after column, and lets the columns to come take up the error of each, so that tr(E H Eᵀ) of
the errors E = W − Q is small, for a metric H (n, n) such as the mean of x xᵀ.

**No inverse is needed.** With H = L Lᵀ, L lower triangular, the columns are rounded from the last to the first (LDLQ,
arXiv 2307.13304, which is the same as OPTQ):

    tr(E H Eᵀ) = ‖E L‖_F²              (E L)_k = L_kk e_k + Σ_{i>k} L_ik e_i

Column k is rounded where (E L)_k would be zero, at w_k + Σ_{i>k} e_i L_ik / L_kk, so what is left of it is L_kk times
the error of one rounding. Those with the largest H_kk come first (GPTQ's `act_order`): the others take up their errors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 64  # columns whose errors reach the others in one product


def optq(W: Tensor, H: Tensor, levels: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Which level each number of W (m, n) takes, (m, n) uint8, on the device of H.

    Args:
        H: (n, n), positive definite.
        levels: ascending.
        scales: (m, n / block), float32: what a number stands for is levels[code] · its block's scale, rounded to
            `dtype`.

    Raises torch.linalg.LinAlgError where H is singular to float64.
    """
    (m, n), levels, scales = W.shape, levels.to(H.device), scales.to(H.device)
    order = H.diagonal().argsort()  # the last is rounded first
    L = torch.linalg.cholesky(H.double()[order[:, None], order])
    W = W.T.to(H.device, torch.float64)[order]  # (n, m), as all that follows: columns are rows
    scales = scales.T[order // (n // scales.shape[1])]
    codes = torch.empty(n, m, dtype=torch.uint8, device=H.device)
    errors = torch.empty_like(W)
    round_chunk = _round_chunk if not H.is_cuda or (kernel := _kernel()) is None else kernel
    for end in range(n, 0, -CHUNK):
        begin = max(0, end - CHUNK)
        chunk = slice(begin, end)
        taken = L[end:, chunk].T @ errors[end:]  # Σ e_i L_ik
        round_chunk(W[chunk], taken, L[chunk, chunk], scales[chunk], levels, dtype, codes[chunk], errors[chunk])
    return torch.empty_like(codes).index_copy_(0, order, codes).T


def _round_chunk(
    W: Tensor,
    taken: Tensor,
    L: Tensor,
    scales: Tensor,
    levels: Tensor,
    dtype: torch.dtype,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Round c columns, the last first, into `codes` and `errors`.

    Args:
        W, scales, codes, errors: (c, m): columns are rows.
        taken: (c, m), what they are to take up of the columns rounded before.
        L: (c, c), lower triangular.
    """
    between = ((levels[1:] + levels[:-1]) / 2).double()
    for k in range(len(W) - 1, -1, -1):
        code = torch.bucketize((W[k] + taken[k] / L[k, k]) / scales[k], between)
        errors[k] = W[k] - (levels[code] * scales[k]).to(dtype)
        codes[k] = code
        taken[:k] += L[k, :k, None] * errors[k]


def _kernel() -> Callable[..., None] | None:
    """`kernels.round_chunk`, which does the same on a GPU in one launch; None where Triton is not installed."""
    try:
        from .kernels import round_chunk
    except ImportError:
        return None
    return round_chunk
