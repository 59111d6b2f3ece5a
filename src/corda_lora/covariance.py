"""Covariances of a layer's inputs: pure tensors.

    C = XᵀX / t      X: (t, d_in), one row a real token

(DESIGN and paper write X as d_in × t; here rows are tokens, as activations come.) Padding never gets here: the caller
selects the rows.
"""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def gram(x: Tensor) -> Tensor:
    """XᵀX of the rows of `x` (t, d), accumulated in float32 or better: (d, d).

    Products of two bfloat16 or float16 numbers are exact in float32, so where the device can multiply them with a
    float32 result (CUDA) no float32 copy of the activations is made.
    """
    if x.is_cuda and x.dtype in HALF:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    x = x.float() if x.dtype in HALF else x
    return x.T @ x


class Covariance:
    """Running sum of XᵀX over batches.

    Attributes:
        total: (d, d), float32 (float64 if the inputs are).
        tokens: rows seen.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` (t, d)."""
        g = gram(x)
        self.total = g if self.total is None else self.total.add_(g)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """C (d, d), in place of the sum. Raises ValueError if nothing was added."""
        if self.total is None or self.tokens == 0:
            raise ValueError("no token has been added")
        return self.total.div_(self.tokens)
