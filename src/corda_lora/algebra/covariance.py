"""Covariances of a layer's inputs: pure tensors.

    C = XᵀX / t      X: (t, d_in), one row a real token

(DESIGN and paper write X as d_in × t; here rows are tokens, as activations come.) Padding never gets here: the caller
selects the rows. PEFT's CorDA normalizes otherwise, sample by sample: see `Covariance.add_samples`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
BLOCKS = 6  # of columns: XᵀX is symmetric, and of so many blocks a side only those on and below the diagonal are made


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32 matrices in here: `highest`, in real float32, also where the user has allowed TF32 for
    training; or `high`, where TF32 will do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_gram(
    total: Tensor | None, x: Tensor, lengths: Sequence[int] | None = None, scales: Tensor | None = None
) -> Tensor:
    """Σ_i s_i² X_iᵀX_i, added in place to the lower triangle of `total` (d, d) if there is one. What is above the
    diagonal means nothing (see `mirror`). Summed in float32 or better, with no wait for the device.

    Products of two bfloat16 or float16 numbers are exact in float32, so on a GPU, which multiplies them with a float32
    result, no float32 copy of the activations is made, and s_i² comes to the sum of a sample, not to its rounded rows.

    Args:
        x: (t, d), the rows of the X_i one after the other.
        lengths: rows of each X_i; default: all of one.
        scales: s (b,) on the device of x, float32 or better; default: ones.
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
    """(t,): to which of the samples, one after the other, a row belongs. Made on the device: only the lengths are
    moved, and as the sum of them is given, nobody waits for it."""
    rows = torch.tensor(lengths).to(device, non_blocking=True)
    return torch.arange(len(lengths), device=device).repeat_interleave(rows, output_size=sum(lengths))


def mirror(C: Tensor) -> Tensor:
    """Make C (d, d) symmetric: its lower triangle, in place, with little memory."""
    for low, high in pairwise(len(C) * i // BLOCKS for i in range(BLOCKS + 1)):
        C[:low, low:high] = C[low:high, :low].T
        block = C[low:high, low:high]
        block.copy_(block.tril() + block.tril(-1).T)
    return C


def _kernel() -> Any:
    """The same on a GPU in one pass, where Triton is there to compile it."""
    try:
        from .kernels import add_gram
    except ImportError:
        return None
    return add_gram


class Covariance:
    """Running sum of XᵀX over batches.

    Attributes:
        total: (d, d), float32 (float64 if the inputs are); its lower triangle.
        count: rows seen, or samples: what the sum is divided by.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` (t, d)."""
        self.total = add_gram(self.total, x)
        self.count += x.shape[0]

    def add_samples(self, x: Tensor, lengths: Sequence[int]) -> None:
        """Add the rows of `x` (t, d), sample after sample, as PEFT does: each sample, of so many rows, is divided by
        its largest number (the absolute value of that, not the largest absolute value), and samples are counted.

        Where the largest number is 0 the sum is NaN or Inf from then on.
        """
        if lengths:
            largest = x.amax(dim=1).to(torch.float32 if x.dtype in HALF else x.dtype)  # (t,)
            sample = _sample_of_rows(lengths, x.device)
            largest = largest.new_full((len(lengths),), -torch.inf).scatter_reduce(0, sample, largest, "amax")  # (b,)
            self.total = add_gram(self.total, x, lengths, largest.abs().reciprocal())
            self.count += len(lengths)

    def mean(self) -> Tensor:
        """C (d, d), in place of the sum. Raises ValueError if nothing was added."""
        if self.total is None or self.count == 0:
            raise ValueError("no token has been added")
        return mirror(self.total.div_(self.count))
