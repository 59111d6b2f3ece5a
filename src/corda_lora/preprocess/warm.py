"""What a GPU must load before it can work, loaded while the model and the context are read."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from ..algebra.covariance import add_gram, mirror
from ..config import CordaConfig
from ..devices import accelerator, compute_device, to_this_gpu
from .layer import decompose_layer

N, HEAD = 1024, 128  # of the matrices here, and of a head of attention


@contextmanager
def warming(config: CordaConfig, model: nn.Module | None = None) -> Iterator[None]:
    """For a `with` block a thread has the CUDA device, if there is one, do on small matrices what it will do in a
    block: a process that does so for the first time waits some two seconds for libraries and kernels.

    Args:
        model: where it is loaded already: then the device is the one that it runs on.
    """
    with ThreadPoolExecutor(1, initializer=to_this_gpu()) as thread:
        warmed = thread.submit(_warm, config, model)
        yield
        warmed.exception()  # of no interest: what fails here fails where it is needed, with a sentence


def _warm(config: CordaConfig, model: nn.Module | None) -> None:
    if model is not None:
        device = compute_device(model, config.device)
    else:
        device = accelerator() if config.device is None else torch.device(config.device)
    if device.type == "cuda":
        _work(config.mode, device)


def _work(mode: Literal["kpm", "ipm"], device: torch.device) -> None:
    """What a block does: half-precision products and attention, a covariance, a decomposition in float64."""
    W = torch.arange(N * N, device=device).sin().view(N, N)
    x = W.bfloat16()
    heads = x.view(1, N, -1, HEAD).transpose(1, 2)
    functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    functional.silu(functional.embedding(torch.arange(N, device=device), x) @ x)
    C = mirror(add_gram(None, x))
    decompose_layer(W, C, CordaConfig(mode=mode, r=8), fell_back=lambda: None)
