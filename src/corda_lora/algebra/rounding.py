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
    between = ((levels[1:] + levels[:-1]) / 2).double()
    order = H.diagonal().argsort()  # the last is rounded first
    L = torch.linalg.cholesky(H.double()[order[:, None], order])
    W = W.T.to(H.device, torch.float64)[order]  # (n, m), as all that follows: columns are rows
    block_of = order // (n // scales.shape[1])
    codes = torch.empty(n, m, dtype=torch.uint8, device=H.device)
    errors = torch.empty_like(W)
    for end in range(n, 0, -CHUNK):
        begin = max(0, end - CHUNK)
        taken = L[end:, begin:end].T @ errors[end:]  # Σ e_i L_ik
        for k in range(end - 1, begin - 1, -1):
            scale = scales[:, block_of[k]]
            code = torch.bucketize((W[k] + taken[k - begin] / L[k, k]) / scale, between)
            errors[k] = W[k] - (levels[code] * scale).to(dtype)
            codes[k] = code
            taken[: k - begin] += L[k, begin:k, None] * errors[k]
    return torch.empty_like(codes).index_copy_(0, order, codes).T
