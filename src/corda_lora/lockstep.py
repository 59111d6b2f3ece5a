"""Run many batches through a model's own forward, one block at a time.

Every batch runs `model(**batch)` in a greenlet (a coroutine that can pause anywhere, also deep inside a call) that
pauses where a block is entered and where it is left. The scheduler lets all of them through block i before any enters
block i + 1. Nothing of the model's forward is rewritten or traced: masks, rotary tables and cross inputs are simply
alive in the paused frames. So the model is passed over once, and only one block needs to be on the accelerator.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from .config import CordaError


def lockstep(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Any]],
    on_batch: Callable[[int], None] = lambda index: None,
    to_end: bool = False,
) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """Yield each block once, in the order the model runs them, with a function that runs all batches through it.

        for block, run in lockstep(model, blocks, batches):
            ...                # the batches wait at the entry of `block`
            run()              # each batch passes through it, in order
            ...                # they wait at its exit; what happens here sees the block's work done

    Args:
        blocks: modules that do not contain one another. All batches must enter them in the same order, each once.
        batches: keyword arguments of the model's forward. Tensors are moved by the caller or by `model` itself.
        on_batch: called with a batch's index each time before it runs on.
        to_end: run the forward to its end after the last block (for hooks on what comes after, such as a
            classification head); else it is dropped there, and the output head is never computed.

    Raises:
        RuntimeError: the batches do not take the same path, or a block is entered twice (weights shared by blocks).
    """

    def pause(block: nn.Module, *_: Any) -> None:
        current = getcurrent()
        if current in frames:  # a forward of somebody else's passes through
            current.parent.switch(block)

    def forward(batch: Mapping[str, Any]) -> None:
        model(**batch)

    @torch.no_grad()  # here, not on `lockstep`: a generator's decorator is off while the caller runs `run`
    def advance() -> nn.Module | None:
        """Run every batch to its next pause; the block they all stand at, or None at the end."""
        stops = []
        for index, frame in enumerate(frames):
            on_batch(index)
            frame.parent = getcurrent()
            stops.append(frame.switch() if frame else frame.switch(batches[index]))
        if any(stop is not stops[0] for stop in stops):
            raise RuntimeError("the batches do not run the model's blocks in the same order")
        return stops[0]

    frames = [greenlet(forward) for _ in batches]
    hooks = [h for b in blocks for h in (b.register_forward_pre_hook(pause), b.register_forward_hook(pause))]
    seen: set[nn.Module] = set()
    try:
        while (block := advance()) is not None:
            if block in seen:
                raise RuntimeError("a block is run twice in one forward: weights shared by blocks are not supported")
            seen.add(block)
            yield block, lambda: (advance(), None)[1]
            if not to_end and len(seen) == len(blocks):
                return
    finally:
        for hook in hooks:
            hook.remove()
        for frame in frames:
            if frame and not frame.dead:
                frame.throw(GreenletExit)


@contextmanager
def on_device(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Have parameters or buffers on `device`; afterwards they hold the very memory they held before."""
    homes = {tensor: tensor.data for tensor in tensors if tensor.device != device}
    for tensor, home in homes.items():
        tensor.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, home in homes.items():
            tensor.data = home


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module and what it holds."""
    return [*module.parameters(), *module.buffers()]


def find_blocks(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The model's blocks, by name: the entries of its outermost `ModuleList`s that hold any of the target layers.

    Raises CordaError if some are run more than once in a forward (ALBERT).
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{b}.") for b in blocks):
            continue
        if any(target.startswith(f"{name}.") for target in targets):
            if len(module) > len(set(module)) or hasattr(getattr(model, "config", None), "num_hidden_groups"):
                raise CordaError(f"the blocks of {name} share their weights, which CorDA cannot decompose one by one")
            blocks.update({f"{name}.{child}": block for child, block in module.named_children()})
    return blocks
