"""Run many batches through a model's own forward, one block at a time.

Every batch runs `model(**batch)` in a greenlet (a coroutine that can pause anywhere, also deep inside a call) that
pauses where a block is entered. The scheduler lets all of them through block i before any enters block i + 1. Nothing
of the model's forward is rewritten or traced: masks, rotary tables and cross inputs are simply alive in the paused
frames. So the model is passed over once, only one block's weights need to be there at a time, and the hidden states
of the batches that wait can be parked elsewhere.

On a CUDA device moving and reading go on beside computing: hidden states come and go on a stream of their own, one
batch ahead and one behind, and a thread reads the weights of the next block into pinned memory. The host waits for
nothing inside a block, so that the order of things is the streams': memory of the device is allocated, used and freed
by the stream that computes; a copy begins (`beside`) after all that this stream has been given so far, and this stream
waits for it before it uses what came or frees what went.
"""

import itertools
import tempfile
import weakref
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..config import CordaError
from ..devices import has_streams

Parking = Callable[[Tensor], Tensor]
Stored = Mapping[Tensor, Callable[[], Tensor]]  # parameters whose values are in a checkpoint, and how they are read
Wait = Callable[[], None]  # the stream that computes waits for a copy; the host does not


class DifferentPathsError(RuntimeError):
    """The batches do not run the same blocks in the same order."""


def lockstep(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Any]],
    on_batch: Callable[[int], None] = lambda index: None,
    to_end: bool = False,
    park: Parking | None = None,
) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """Yield each block once, in the order the model runs them, with a function that runs all batches through it.

        for block, run in lockstep(model, blocks, batches):
            ...                # the batches wait at the entry of `block`
            run()              # each batch passes through it, in order, to the entry of the next one
            ...

    Args:
        blocks: modules that do not contain one another. All batches must enter them in the same order, each once.
        batches: keyword arguments of the model's forward. Tensors are moved by the caller or by `model` itself.
        on_batch: called with a batch's index each time before it runs on.
        to_end: run the forward to its end after the last block (for hooks on what comes after, such as a
            classification head); else it is dropped there, and the output head is never computed.
        park: where a batch's hidden states are while it waits: a function that gives a copy there (see `parking`).
            They come back when it runs on. Default: they stay where they are.

    Raises:
        DifferentPathsError (a RuntimeError): the batches do not run the same blocks in the same order.
        RuntimeError: a block is entered twice (weights shared by blocks).
    """

    def pause(block: nn.Module, args: Any, kwargs: Any) -> None:
        current = getcurrent()
        if current not in frames:  # a forward of somebody else's passes through
            return
        if park is None:
            current.parent.switch(block)
            return
        given = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()}
        homes = [(x, x.device) for x in given.values()]
        # What the last block was given may still be held by the frame (a model keeps its embeddings): park it, too.
        given |= {id(x): x for ref in last_given.get(current, ()) if (x := ref()) is not None}
        send(given.values(), park)
        waiting[current] = homes
        current.parent.switch(block)
        last_given[current] = [weakref.ref(x) for x, _ in homes]

    def send(states: Iterable[Tensor], park: Parking) -> None:
        """Begin to park a batch's hidden states. (A function: what `pause` holds is held while the batch waits.)"""
        leaving.append([])
        for x in states:
            if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
                memory = x.data
                with beside(memory.device) as wait:
                    x.data = park(x)
                leaving[-1].append((wait, memory))

    def bring(frame: greenlet) -> None:
        """Begin to copy a batch's parked hidden states back to where they were."""
        for x, home in waiting.pop(frame, ()):
            if x.device != home:
                here = torch.empty_like(x, device=home)
                with beside(home) as wait:
                    x.data = here.copy_(x, non_blocking=True)
                coming.setdefault(frame, []).append(wait)

    def free(all_but: int = 0) -> None:
        """Give up the device's memory of what has been parked."""
        while len(leaving) > all_but:
            for wait, _ in leaving[0]:
                wait()
            leaving.popleft()

    def leave(block: nn.Module, *_: Any) -> None:
        if getcurrent() in frames and len(seen) == len(blocks) and not to_end:
            raise GreenletExit  # unwinds the model's forward and ends the greenlet: nothing of it is held any longer

    def forward(batch: Mapping[str, Any]) -> None:
        model(**batch)

    @torch.no_grad()  # here, not on `lockstep`: a generator's decorator is off while the caller runs `run`
    def advance() -> nn.Module | None:
        """Run every batch to its next pause; the block they all stand at, or None at the end."""
        stops = []
        for index, frame in enumerate(frames):
            on_batch(index)
            bring(frame)
            for wait in coming.pop(frame, ()):
                wait()
            free(all_but=1)
            for following in frames[index + 1 : index + 2]:
                bring(following)
            frame.parent = getcurrent()
            stop = frame.switch() if frame else frame.switch(batches[index])
            stops.append(None if isinstance(stop, GreenletExit) else stop)  # the exception would hold on to the frame
            del stop
        free()
        if any(stop is not stops[0] for stop in stops):
            raise DifferentPathsError("the batches do not run the model's blocks in the same order")
        return stops[0]

    frames = [greenlet(forward) for _ in batches]
    last_given: dict[Any, list[weakref.ref[Tensor]]] = {}
    waiting: dict[Any, list[tuple[Tensor, torch.device]]] = {}  # the parked states of a batch, and where they were
    coming: dict[Any, list[Wait]] = {}  # of a batch whose states are on their way back
    leaving: deque[list[tuple[Wait, Tensor]]] = deque()  # of each batch, memory that is still being copied from
    hooks = [b.register_forward_pre_hook(pause, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(leave) for b in blocks]
    seen: set[nn.Module] = set()
    ahead: list[nn.Module | None] = []  # where the batches stand, once the block yielded last has been run

    def run() -> None:
        ahead.append(advance())

    try:
        run()
        while (block := ahead.pop()) is not None:
            if block in seen:
                raise RuntimeError("a block is run twice in one forward: weights shared by blocks are not supported")
            seen.add(block)
            yield block, run
    finally:
        for hook in hooks:
            hook.remove()
        for wait in itertools.chain(*coming.values()):
            wait()
        free()
        for frame in frames:
            if frame and not frame.dead:
                frame.throw(GreenletExit)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The device's second stream."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[Wait]:
    """Copies in here run beside what a CUDA device computes from now on; call what is yielded before what they filled
    is used, or what they read is freed. For any other device this is nothing: copies are made at once."""
    if not has_streams(device):
        yield lambda: None
        return
    computing, copying, done = torch.cuda.current_stream(device), _copying(device), torch.cuda.Event()
    copying.wait_stream(computing)
    with torch.cuda.stream(copying):
        yield lambda: computing.wait_event(done)
        done.record(copying)


def parking(where: str, folder: Path | None = None) -> Parking | None:
    """A place for waiting hidden states: `device` (None: they stay), `cpu`, or `disk`: memory that is a file in
    `folder`, which the system writes out when it needs to; the file goes when its tensor does, or the process."""

    def to_cpu(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)

    def to_disk(x: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
        return mapped.view(x.shape).copy_(x)

    return {"device": None, "cpu": to_cpu, "disk": to_disk}[where]


@contextmanager
def on_device(tensors: Iterable[Tensor], device: torch.device, stored: Stored | None = None) -> Iterator[None]:
    """Have parameters or buffers on `device`; afterwards they hold the very memory they held before.

    Args:
        stored: of tensors whose values are in a checkpoint, a function that reads them (see `models.open_model`).
    """
    homes = {tensor: tensor.data for tensor in tensors if tensor.device != device or (stored and tensor in stored)}
    try:
        for tensor, home in homes.items():
            read = stored.get(tensor) if stored else None
            tensor.data = (read() if read else home).to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in homes.items():
            tensor.data = home


@contextmanager
def visits(
    blocks: Sequence[nn.Module], device: torch.device, stored: Stored | None = None
) -> Iterator[Callable[[nn.Module], AbstractContextManager[None]]]:
    """Yield `on_device` for the parameters and buffers of one block after another, which are expected in this order.

    While a block is on a CUDA device a thread reads the parameters of the next one, from its checkpoint or from memory,
    into pinned memory, from where they are moved in one quick copy: the device never holds two blocks.
    """
    after = dict(zip([None, *blocks], blocks))
    ahead: dict[Tensor, Callable[[], Tensor]] = {}  # gives those of the next block, when they have been read

    def pinned(tensor: Tensor, home: Tensor) -> Tensor:
        return (stored[tensor]() if stored and tensor in stored else home).pin_memory()

    def read_after(block: nn.Module | None) -> None:
        ahead.clear()
        if has_streams(device) and block in after:
            for x in after[block].parameters():
                if x.device.type == "cpu" or (stored and x in stored):
                    ahead[x] = reader.submit(pinned, x, x.data).result

    @contextmanager
    def visit(block: nn.Module) -> Iterator[None]:
        with on_device(tensors_of(block), device, ChainMap(ahead, dict(stored or {}))):
            read_after(block)
            yield

    with ThreadPoolExecutor(1) as reader:  # no thread begins before there is something to read
        read_after(None)
        yield visit


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
