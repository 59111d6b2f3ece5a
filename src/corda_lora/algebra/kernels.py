"""A Triton kernel: the lower triangle of XᵀX of half-precision rows on a GPU, weighted by sample.

cuBLAS computes both triangles, as it has no symmetric product for these types. It also cannot take weights that are on
the device without a wait.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, ROWS = 128, 64


def add_gram(total: Tensor, x: Tensor, lengths: Sequence[int], scales: Tensor | None) -> None:
    """`covariance.add_gram` of total (d, d), float32, and x (t, d), bfloat16 or float16, on a GPU."""
    d = x.shape[1]
    x = x.contiguous()
    weights = torch.ones(len(lengths), device=x.device) if scales is None else scales.square().float()
    ends = torch.tensor([0, *lengths]).cumsum(0).to(x.device, non_blocking=True)  # (b + 1,)
    tiles = triton.cdiv(d, TILE)
    with torch.cuda.device(x.device):
        _add_gram[(tiles * (tiles + 1) // 2,)](
            total, x, ends, weights, len(lengths), d, TILE, ROWS, num_warps=4, num_stages=4
        )


@triton.jit
def _add_gram(total, x, ends, weights, samples, d, TILE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute one tile (i, j), j ≤ i, of the lower triangle, summed over the rows of all samples."""
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(
        i * (i + 1) // 2 > tile, i - 1, tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    )  # in case √ was rounded
    j = tile - i * (i + 1) // 2
    left, right, row = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, ROWS)
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    before = tl.load(weights)
    for sample in range(samples):
        # The sum is kept in units of the current sample's weight, so that one sum is enough.
        weight = tl.load(weights + sample)
        sums *= before / weight
        before = weight
        end = tl.load(ends + sample + 1)
        for start in range(tl.load(ends + sample), end, ROWS):
            rows = start + row
            at = x + rows[:, None].to(tl.int64) * d
            real = rows[:, None] < end
            a = tl.load(at + left[None, :], mask=real & (left[None, :] < d), other=0.0)  # (ROWS, TILE)
            b = tl.load(at + right[None, :], mask=real & (right[None, :] < d), other=0.0)
            sums = tl.dot(tl.trans(a), b, sums)
    to = total + left[:, None].to(tl.int64) * d + right[None, :]
    inside = (left[:, None] < d) & (right[None, :] < d)
    tl.store(to, tl.load(to, mask=inside, other=0.0) + sums * before, mask=inside)
