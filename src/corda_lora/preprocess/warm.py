"""What a GPU must load before it can work, loaded while the model and the context are read."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..algebra.covariance import add_gram, mirror
from ..config import CordaConfig
from ..data.overview import check_fit
from ..devices import accelerator, compute_device, release_cache, to_this_gpu
from ..models.lockstep import find_blocks, shared_out
from ..models.seeing import image_side
from ..models.targets import is_linear
from ..processes import Processes
from .context import Context
from .layer import decompose_layer
from .walk import Place, walk

N, HEAD = 1024, 128  # of the matrices here, and of a head of attention
LENGTH = 256  # tokens of a sample


@contextmanager
def warming(
    config: CordaConfig, model: nn.Module | None = None, processes: Processes | None = None
) -> Iterator[Callable[[nn.Module, int], object]]:
    """For a `with` block a thread has the CUDA device, if there is one, do on small matrices what it will do in a
    block: a process that does so for the first time waits some two seconds for libraries and kernels.

    Yields a function that has the thread also run batches of so many tokens through the first blocks of a model, which
    is one without its weights (see `open_model`).

    Args:
        model: where it is loaded already: then the device is the one that it runs on.
        processes: those that will share the reading of blocks.
    """

    def device() -> torch.device:
        if model is not None:
            return compute_device(model, config.device)
        return accelerator() if config.device is None else torch.device(config.device)

    def work() -> None:
        if device().type == "cuda":
            _work(config.mode, device())

    def first_blocks(empty: nn.Module, tokens: int) -> None:
        if device().type == "cuda":
            with suppress(Exception):  # the memory is full, say
                _run_first_blocks(empty, tokens, device(), processes)
            release_cache(device())

    # Nobody asks for an error: what fails here fails where it is needed, with a sentence.
    with ThreadPoolExecutor(1, initializer=to_this_gpu()) as thread:
        thread.submit(work)
        yield lambda empty, tokens: thread.submit(first_blocks, empty, tokens)


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
def _run_first_blocks(empty: nn.Module, tokens: int, device: torch.device, processes: Processes | None = None) -> None:
    """Run a batch without padding and one with it through all that comes before the third block of a model like this
    one, and take the covariances."""
    model, targets = _first_blocks(empty, device, processes)
    ids = torch.zeros(max(1, tokens // LENGTH), min(tokens, LENGTH), dtype=torch.long)
    check_fit(empty, ids.tolist())  # a GPU that looks up what is not there is of no use to this process any more
    padded = torch.ones_like(ids)
    padded[:, -1] = 0
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (torch.ones_like(ids), padded)]
    for _, groups in walk(model, targets, Context(batches, rounds=[0, 0]), Place(device)):
        del groups


def _first_blocks(
    empty: nn.Module, device: torch.device, processes: Processes | None
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a model with its first two blocks alone, whose weights are zeros, and the linear layers of these.

    What this process will read of a block is on the CPU, the rest on the device: so as much memory is pinned as two
    blocks will need, and used again by them.
    """
    sees = image_side(empty)
    linear = [name for name, module in empty.named_modules() if is_linear(module) and not sees(name)]
    lists: dict[str, list[nn.Module]] = {}
    for name, block in find_blocks(empty, linear).items():
        lists.setdefault(name.rpartition(".")[0], []).append(block)
    later = {block for blocks in lists.values() for block in blocks[2:]}
    left_out = {parameter for block in later for parameter in block.parameters()}
    readers: dict[Tensor, int] = {}
    for block in (block for blocks in lists.values() for block in blocks[:2]):
        readers |= shared_out(list(block.parameters()), processes.size if processes else 1)
    copies: dict[int, nn.Module | nn.Parameter] = {id(block): nn.Module() for block in later}
    for parameter in empty.parameters():
        if parameter not in left_out:
            own = readers.get(parameter) == (processes.rank if processes else 0)
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu" if own else device)
            copies[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
    model = copy.deepcopy(empty, copies)
    for name in lists:
        del model.get_submodule(name)[2:]  # type: ignore[operator]
    inside = [f"{name}." for name in find_blocks(model, linear)]
    return model, {n: m for n, m in model.named_modules() if is_linear(m) and n.startswith(tuple(inside))}
