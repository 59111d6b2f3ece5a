"""Two Triton kernels.

`add_gram`: the lower triangle of XᵀX of half-precision rows on a GPU, weighted by sample. cuBLAS computes both
triangles, as it has no symmetric product for these types. It also cannot take weights that are on the device without a
wait.

`round_chunk`: OPTQ's columns one after the other, in one launch. PyTorch's operations would be ten launches for each.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, ROWS = 128, 64
OUTPUTS = 16  # of a layer, in one program of `round_chunk`


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


def round_chunk(
    W: Tensor,
    taken: Tensor,
    L: Tensor,
    scales: Tensor,
    levels: Tensor,
    dtype: torch.dtype,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """`rounding._round_chunk` on a GPU; `taken` is left as it is."""
    columns, m = W.shape
    values = torch.empty(1, dtype=dtype, device=W.device)  # tells the type to round to
    between = ((levels[1:] + levels[:-1]) / 2).double()
    with torch.cuda.device(W.device):
        _round_chunk[(triton.cdiv(m, OUTPUTS),)](
            W, taken.contiguous(), L.contiguous(), scales, levels, between, values, codes, errors, m, columns,
            len(levels), triton.next_power_of_2(columns), OUTPUTS, num_warps=4,
        )  # fmt: skip


@triton.jit
def _round_chunk(  # type: ignore[no-untyped-def]
    W, taken, L, scales, levels, between, values, codes, errors, m, columns,
    LEVELS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Round all columns of some of the outputs. E (COLUMNS, OUTPUTS) has the errors of the columns that are rounded."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < m
    column = tl.arange(0, COLUMNS)
    E = tl.zeros((COLUMNS, OUTPUTS), dtype=tl.float64)
    for back in range(columns):
        k = columns - 1 - back
        at = k * m + output
        w = tl.load(W + at, mask=inside, other=0.0)
        scale = tl.load(scales + at, mask=inside, other=1.0)
        below = tl.load(L + column * columns + k, mask=column < columns, other=0.0)
        moved = tl.load(taken + at, mask=inside, other=0.0) + tl.sum(E * below[:, None], axis=0)
        wanted = (w + moved / tl.load(L + k * columns + k)) / scale.to(tl.float64)
        code = tl.zeros((OUTPUTS,), dtype=tl.int32)
        for level in range(LEVELS - 1):
            code += (wanted > tl.load(between + level)).to(tl.int32)
        value = (tl.load(levels + code) * scale).to(values.dtype.element_ty)
        error = w - value.to(tl.float64)
        tl.store(codes + at, code.to(tl.uint8), mask=inside)
        tl.store(errors + at, error, mask=inside)
        E = tl.where((column == k)[:, None], error[None, :], E)
