"""Rounding to a few levels so that a layer's outputs stay near, not its numbers: OPTQ, as a pure function on tensors.

Rounding each number to the nearest level ignores that the inputs x of a layer are correlated: C = E[x xᵀ]. OPTQ (GPTQ,
arXiv 2210.17323) rounds column after column, and lets the columns to come take up the error of each. With the upper
triangular U of UᵀU = C_λ⁻¹, the error e_j = (w_j − q_j) / U_jj of column j changes the columns k > j by −e_j U_jk. They
are then the best for what is rounded already, in the mean square of the outputs.

The scale of a block of numbers along a row is the largest of them when its first column is reached.
"""

import torch
from torch import Tensor

from .decomposition import regularize


def optq(W: Tensor, C: Tensor, levels: Tensor, block: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Which level each number of W (m, n) takes, (m, n) int64, and the scales (m, n / block), float32: what a number
    stands for is levels[code] · scale.

    Args:
        C: (n, n) of the inputs.
        levels: ascending, between −1 and 1.
        block: how many numbers of a row share a scale; it divides n.

    Raises torch.linalg.LinAlgError where C_λ is singular to float64.
    """
    W, levels = W.to(torch.float64, copy=True), levels.to(W.device, torch.float64)
    m, n = W.shape
    between = (levels[1:] + levels[:-1]) / 2
    L = torch.linalg.cholesky(regularize(C, damping))
    U = torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
    codes = torch.empty(m, n, dtype=torch.int64, device=W.device)
    scales = torch.empty(m, n // block, device=W.device)
    for i, begin in enumerate(range(0, n, block)):
        end = begin + block
        scales[:, i] = W[:, begin:end].abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny)
        scale, errors = scales[:, i].double(), W.new_empty(m, block)
        for j in range(begin, end):
            codes[:, j] = torch.bucketize(W[:, j] / scale, between)
            errors[:, j - begin] = (W[:, j] - levels[codes[:, j]] * scale) / U[j, j]
            W[:, j + 1 : end] -= errors[:, j - begin, None] * U[j, j + 1 : end]
        W[:, end:] -= errors @ U[begin:end, end:]
    return codes, scales
