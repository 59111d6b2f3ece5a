"""What a GPU must load before it can work, loaded while the model and the context are read."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from ..algebra.covariance import add_gram, mirror
from ..config import CordaConfig
from ..devices import accelerator, compute_device, release_cache, to_this_gpu
from ..models.lockstep import find_blocks
from ..models.seeing import image_side
from ..models.targets import is_linear
from .context import Context
from .layer import decompose_layer
from .walk import Place, walk

N, HEAD = 1024, 128  # of the matrices here, and of a head of attention
LENGTH = 256  # tokens of a sample


@contextmanager
def warming(config: CordaConfig, model: nn.Module | None = None) -> Iterator[Callable[[nn.Module, int], None]]:
    """For a `with` block a thread has the CUDA device, if there is one, do on small matrices what it will do in a
    block: a process that does so for the first time waits some two seconds for libraries and kernels.

    Yields a function that has the thread also run batches of so many tokens through the first block of a model, which
    is one without its weights (see `open_model`).

    Args:
        model: where it is loaded already: then the device is the one that it runs on.
    """

    def device() -> torch.device:
        if model is not None:
            return compute_device(model, config.device)
        return accelerator() if config.device is None else torch.device(config.device)

    def work() -> None:
        if device().type == "cuda":
            _work(config.mode, device())

    def first_block(empty: nn.Module, tokens: int) -> None:
        if device().type == "cuda":
            _run_first_block(empty, tokens, device())

    with ThreadPoolExecutor(1, initializer=to_this_gpu()) as thread:
        begun = [thread.submit(work)]
        yield lambda empty, tokens: begun.append(thread.submit(first_block, empty, tokens))
        for job in begun:
            job.exception()  # of no interest: what fails here fails where it is needed, with a sentence


def _work(mode: Literal["kpm", "ipm"], device: torch.device) -> None:
    """What a block does: half-precision products and attention, a covariance, a decomposition in float64."""
    W = torch.arange(N * N, device=device).sin().view(N, N)
    x = W.bfloat16()
    heads = x.view(1, N, -1, HEAD).transpose(1, 2)
    functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    functional.silu(functional.embedding(torch.arange(N, device=device), x) @ x)
    C = mirror(add_gram(None, x))
    decompose_layer(W, C, CordaConfig(mode=mode, r=8), fell_back=lambda: None)


@torch.no_grad()
def _run_first_block(empty: nn.Module, tokens: int, device: torch.device) -> None:
    """Run a batch without padding and one with it through all that comes before the second block, and take the
    covariances, of a model like this one whose weights are zeros."""
    sees = image_side(empty)
    blocks = find_blocks(empty, [name for name, m in empty.named_modules() if is_linear(m) and not sees(name)])
    first = {name.rpartition(".")[0]: block for name, block in reversed(blocks.items())}  # of each list of blocks
    others = [block for block in blocks.values() if block not in first.values()]
    left_out = {p for block in others for p in block.parameters()}
    copies: dict[int, nn.Module | nn.Parameter] = {id(block): nn.Module() for block in others}
    for p in empty.parameters():
        if p not in left_out:
            copies[id(p)] = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device), requires_grad=False)
    model = copy.deepcopy(empty, copies)
    for parent in first:
        del model.get_submodule(parent)[1:]  # type: ignore[operator]
    name = next(iter(blocks))
    targets = {f"{name}.{n}": m for n, m in model.get_submodule(name).named_modules() if is_linear(m)}
    ids = torch.zeros(max(1, tokens // LENGTH), min(tokens, LENGTH), dtype=torch.long)
    padded = torch.ones_like(ids)
    padded[:, -1] = 0
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (torch.ones_like(ids), padded)]
    for _, groups in walk(model, targets, Context(batches, rounds=[0, 0]), Place(device)):
        del groups
    del model, copies
    release_cache(device)
