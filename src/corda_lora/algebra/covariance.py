"""The covariance of a layer's inputs, as pure functions on tensors.

    C = XᵀX / t      X: (t, d_in), one row for each real token

The paper writes X as d_in × t; here tokens are rows, as they are in activations. The caller leaves padding out. PEFT's
CorDA normalizes each sample by itself: see `Covariance.add_samples`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
BLOCKS = 6  # XᵀX is symmetric: of BLOCKS² blocks only those on and below the diagonal are computed


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products inside the block: `highest` is real float32, even where the user has
    allowed TF32 for training; `high` allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_gram(
    total: Tensor | None, x: Tensor, lengths: Sequence[int] | None = None, scales: Tensor | None = None
) -> Tensor:
    """Add Σ_i s_i² X_iᵀX_i to the lower triangle of `total`, in place, in float32 or better.

    The numbers above the diagonal are undefined (see `mirror`). The host does not wait for the device.

    The product of two bfloat16 or float16 numbers is exact in float32, and a GPU multiplies them with a float32 result.
    So there no float32 copy of the activations is made, and s_i² multiplies the sum of a sample, not its rounded rows.

    Args:
        total: (d, d). Default: zeros.
        x: (t, d), the rows of all samples X_i, one sample after the other.
        lengths: the number of rows of each sample. Default: x is one sample.
        scales: s (b,), float32 or better, on the device of x. Default: ones.
    """
    d = x.shape[1]
    half_on_gpu = x.is_cuda and x.dtype in HALF
    if total is None:
        total = torch.zeros(d, d, dtype=torch.float32 if x.dtype in HALF else x.dtype, device=x.device)
    if half_on_gpu and (kernel := _kernel()):
        kernel(total, x, lengths or [len(x)], scales)
        return total
    if scales is not None:
        assert lengths is not None
        x = x * scales[_sample_of_rows(lengths, x.device), None]
    elif x.dtype in HALF and not half_on_gpu:
        x = x.float()
    for low, high in pairwise(d * i // BLOCKS for i in range(BLOCKS + 1)):
        rows, columns, part = x[:, low:high].T, x[:, :high], total[low:high, :high]
        if x.dtype in HALF:
            part += torch.mm(rows, columns, out_dtype=torch.float32)
        else:
            part.addmm_(rows, columns)
    return total


def _sample_of_rows(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(t,): the sample that each row belongs to. Only the lengths are copied to the device. Their sum is given, so the
    host does not wait for it."""
    rows = torch.tensor(lengths).to(device, non_blocking=True)
    return torch.arange(len(lengths), device=device).repeat_interleave(rows, output_size=sum(lengths))


def mirror(C: Tensor) -> Tensor:
    """Copy the lower triangle of C (d, d) to the upper one, in place, with little memory."""
    for low, high in pairwise(len(C) * i // BLOCKS for i in range(BLOCKS + 1)):
        C[:low, low:high] = C[low:high, :low].T
        block = C[low:high, low:high]
        block.copy_(block.tril() + block.tril(-1).T)
    return C


def similarity(C: Tensor, D: Tensor, scales: Tensor | None = None) -> float:
    """⟨C, D⟩_F / (‖C‖_F ‖D‖_F) of two covariances (n, n): 1 where one is a multiple of the other, 0 where no direction
    is used by both.

    Args:
        scales: s (n,): the covariances of the channels divided by s are compared, C_ij / (s_i s_j). A channel of scale
            0 is left out. Default: ones.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=C.device)
    inverse = None if scales is None else torch.where(scales > 0, 1 / scales.double(), 0.0)
    for low, high in pairwise(len(C) * i // BLOCKS for i in range(BLOCKS + 1)):
        c, d = C[low:high].double(), D[low:high].double()
        if inverse is not None:
            c, d = (x * inverse * inverse[low:high, None] for x in (c, d))
        sums += torch.stack([(c * d).sum(), (c * c).sum(), (d * d).sum()])
    both, first, second = sums.tolist()
    return both / math.sqrt(first * second) if first * second > 0 else 0.0


def shrunk(C: Tensor, cells: int) -> Tensor:
    """The mean of |C_ij| over each of `cells` × `cells` equal parts of C (n, n), channels in order; |C| if n is not
    larger."""
    n = min(cells, len(C))
    return nn.functional.adaptive_avg_pool2d(C.abs()[None], n)[0]


def _kernel() -> Any:
    """`kernels.add_gram`, which does the same on a GPU in one pass; None where Triton is not installed."""
    try:
        from .kernels import add_gram
    except ImportError:
        return None
    return add_gram


class Covariance:
    """Running sum of XᵀX over batches.

    Attributes:
        total: (d, d), the lower triangle of the sum, in float32 (in float64 for float64 inputs).
        count: the number of rows, or of samples, that the sum is divided by.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` (t, d)."""
        self.total = add_gram(self.total, x)
        self.count += x.shape[0]

    def add_samples(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Add the rows of x (t, d) as PEFT does: each sample, of `lengths` rows, is divided by the absolute value of
        its largest number (not by its largest absolute value), and the sum is divided by the number of samples.

        The sum becomes NaN or Inf if the largest number of a sample is 0.
        """
        if lengths:
            largest = x.amax(dim=1).to(torch.float32 if x.dtype in HALF else x.dtype)  # (t,)
            sample = _sample_of_rows(lengths, x.device)
            largest = largest.new_full((len(lengths),), -torch.inf).scatter_reduce(0, sample, largest, "amax")  # (b,)
            self.total = add_gram(self.total, x, lengths, largest.abs().reciprocal())
            self.count += len(lengths)

    def mean(self) -> Tensor:
        """C (d, d), in the memory of the sum. Raises ValueError if nothing was added."""
        if self.total is None or self.count == 0:
            raise ValueError("no token has been added")
        return mirror(self.total.div_(self.count))
