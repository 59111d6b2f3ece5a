"""Run many batches through a model's own forward, one block at a time.

Every batch runs `model(**batch)` in a greenlet, a coroutine that can pause anywhere, also deep inside a call. It pauses
where a block is entered. The scheduler lets all batches through block i before any enters block i + 1. Nothing of the
model's forward is rewritten or traced: masks, rotary tables and cross inputs stay alive in the paused frames. So the
model is passed over once, only one block's weights are needed at a time, and the hidden states of waiting batches can
be parked elsewhere.

On a CUDA device, moving and reading go on beside computing. Hidden states come and go on a stream of their own, one
batch ahead and one behind. A thread reads the weights of the next block into pinned memory. Inside a block the host
never synchronizes; ordering is left to the CUDA streams. The computing stream allocates, uses and frees all memory of
the device. A copy (`beside`) begins after all that this stream has been given so far. This stream waits for the copy
before it uses what came or frees what went.
"""

import tempfile
import weakref
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..config import CordaError
from ..devices import has_streams, to_this_gpu
from ..processes import Processes

Parking = Callable[[Tensor], Tensor]  # copies a tensor to the place where it waits
Stored = Mapping[Tensor, Callable[[], Tensor]]  # parameters whose values are in a checkpoint, and how they are read
Wait = Callable[[], None]  # makes the computing stream wait for a copy; the host does not wait


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
        to_end: run the forward to its end after the last block, for hooks on later modules such as a classification
            head. Else the forward is dropped there, and the output head is never computed.
        park: copies the hidden states of a batch to the place where they wait (see `parking`). They come back when the
            batch runs on. Default: they stay where they are.

    Raises:
        DifferentPathsError (a RuntimeError): the batches do not run the same blocks in the same order.
        RuntimeError: a block is entered twice (weights shared by blocks).
    """

    def forward(batch: Mapping[str, Any]) -> None:
        model(**batch)

    frames = [greenlet(forward) for _ in batches]
    states = _WaitingStates(park)
    seen: set[nn.Module] = set()

    def pause(block: nn.Module, args: Any, kwargs: Any) -> None:
        current = getcurrent()
        if current in frames:  # else it is somebody else's forward, which passes through
            states.leave(current, (*args, *kwargs.values()))
            current.parent.switch(block)

    def leave(block: nn.Module, *_: Any) -> None:
        if getcurrent() in frames and len(seen) == len(blocks) and not to_end:
            raise GreenletExit  # unwinds the model's forward and ends the greenlet, which then holds no tensor

    @torch.no_grad()  # here, not on `lockstep`: a generator's decorator is off while the caller runs `run`
    def advance() -> nn.Module | None:
        """Run every batch to its next pause. Returns the block at which all of them stand, or None at the end."""
        stops = []
        for index, frame in enumerate(frames):
            on_batch(index)
            states.come_back(frame)
            for following in frames[index + 1 : index + 2]:
                states.start_back(following)
            frame.parent = getcurrent()
            stop = frame.switch() if frame else frame.switch(batches[index])
            stops.append(None if isinstance(stop, GreenletExit) else stop)  # the exception would hold on to the frame
            del stop
        states.free()
        if any(stop is not stops[0] for stop in stops):
            raise DifferentPathsError("the batches do not run the model's blocks in the same order")
        return stops[0]

    hooks = [b.register_forward_pre_hook(pause, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(leave) for b in blocks]
    next_block: list[nn.Module | None] = []  # where the batches stand, once the block yielded last has been run

    def run() -> None:
        next_block.append(advance())

    try:
        run()
        while (block := next_block.pop()) is not None:
            if block in seen:
                raise RuntimeError("a block is run twice in one forward: weights shared by blocks are not supported")
            seen.add(block)
            yield block, run
    finally:
        for hook in hooks:
            hook.remove()
        states.settle()
        for frame in frames:
            if frame and not frame.dead:
                frame.throw(GreenletExit)


class _WaitingStates:
    """The hidden states of batches that wait at a block, parked away from the device.

    A batch's states `leave` when it pauses. Before it runs on they `start_back`, and then `come_back`. Copies in both
    directions run beside the computation, so the memory that was copied from is freed a batch later.

    Args:
        park: None leaves the states where they are; then nothing here does anything.
    """

    def __init__(self, park: Parking | None):
        self.park = park
        self.homes: dict[greenlet, list[tuple[Tensor, torch.device]]] = {}  # parked states, and where they were
        self.arriving: dict[greenlet, list[Wait]] = {}  # copies of a batch's states that are on their way back
        self.leaving: deque[list[tuple[Wait, Tensor]]] = deque()  # for each batch, memory that is still copied from
        self.inputs: dict[greenlet, list[weakref.ref[Tensor]]] = {}  # inputs of the block that a batch entered last

    def leave(self, frame: greenlet, inputs: Iterable[Any]) -> None:
        """Begin to park the states among a block's inputs, and those among the inputs of the block before: the frame
        may still hold them, as many models hold their embeddings."""
        if self.park is None:
            return
        states = {id(x): x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}
        held = {id(x): x for ref in self.inputs.get(frame, ()) if (x := ref()) is not None}
        self.homes[frame] = [(x, x.device) for x in states.values()]
        self.inputs[frame] = [weakref.ref(x) for x in states.values()]
        copies: list[tuple[Wait, Tensor]] = []
        self.leaving.append(copies)
        for x in (states | held).values():
            if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
                memory = x.data
                with beside(memory.device) as wait:
                    x.data = self.park(x)
                copies.append((wait, memory))

    def start_back(self, frame: greenlet) -> None:
        """Begin to copy a batch's states back to where they were."""
        for x, home in self.homes.pop(frame, ()):
            if x.device != home:
                memory = torch.empty_like(x, device=home)
                with beside(home) as wait:
                    x.data = memory.copy_(x, non_blocking=True)
                self.arriving.setdefault(frame, []).append(wait)

    def come_back(self, frame: greenlet) -> None:
        """Make the computing stream wait until a batch's states are back."""
        self.start_back(frame)
        for wait in self.arriving.pop(frame, ()):
            wait()
        self.free(all_but=1)

    def free(self, all_but: int = 0) -> None:
        """Free the memory that parked states were copied from, of all batches but the last `all_but`."""
        while len(self.leaving) > all_but:
            for wait, _ in self.leaving[0]:
                wait()
            self.leaving.popleft()

    def settle(self) -> None:
        """Make the computing stream wait for all copies."""
        for waits in self.arriving.values():
            for wait in waits:
                wait()
        self.free()


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which copies run."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[Wait]:
    """Run the copies of this `with` block beside what a CUDA device computes from now on.

    Yields a function to call before the copies' target is used, or their source is freed. On any other device copies
    are made at once, and the function does nothing.
    """
    if not has_streams(device):
        yield lambda: None
        return
    computing, copying, done = torch.cuda.current_stream(device), _copying_stream(device), torch.cuda.Event()
    copying.wait_stream(computing)
    with torch.cuda.stream(copying):
        yield lambda: computing.wait_event(done)
        done.record(copying)


def parking(where: str, folder: Path | None = None) -> Parking | None:
    """The function that parks a tensor on the `device` (None: it stays where it is), the `cpu` or the `disk`.

    On the disk a tensor's memory is a file in `folder`, which the system writes out when it needs to. The file is gone
    when the tensor is freed, or the process ends.
    """

    def to_cpu(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)

    def to_disk(x: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
        return mapped.view(x.shape).copy_(x)

    return {"device": None, "cpu": to_cpu, "disk": to_disk}[where]


@contextmanager
def on_device(tensors: Iterable[Tensor], device: torch.device, stored: Stored | None = None) -> Iterator[None]:
    """Move parameters or buffers to `device` for a `with` block. Afterwards they hold the very memory they held before.

    Args:
        stored: tensors whose values are in a checkpoint (see `models.open_model`).
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
    blocks: Sequence[nn.Module],
    device: torch.device,
    stored: Stored | None = None,
    processes: Processes | None = None,
) -> Iterator[Callable[[nn.Module], AbstractContextManager[None]]]:
    """Yield a function that is `on_device` for the parameters and buffers of a block. It is called for one block after
    the other, in this order.

    While a block is on a CUDA device a thread reads the parameters of the next block, from its checkpoint or from
    memory, into pinned memory. From there one quick copy moves them, so the device never holds two blocks.

    Args:
        processes: all visit these blocks. Each reads a part of what a checkpoint has of a block, and hands it on to the
            others: the checkpoint is read once.
    """
    after = dict(zip([None, *blocks], blocks))
    ahead: dict[Tensor, Callable[[], Tensor]] = {}  # parameters of the next block; each function waits for its reading
    here = ChainMap(ahead, dict(stored or {}))
    readers: dict[Tensor, int] = {}  # for each tensor that is handed on, the process that reads it
    if processes and stored:
        for block in blocks:
            readers |= shared_out([x for x in tensors_of(block) if x in stored], processes.size)

    own: dict[Tensor, Tensor] = {}  # what this process has read of a block, on the device

    def handed_on(x: Tensor) -> Tensor:
        assert processes is not None
        values = own.pop(x) if x in own else torch.empty(x.shape, dtype=x.dtype, device=device)
        processes.hand_on(values, readers[x])
        return values

    def is_own(x: Tensor) -> bool:
        return processes is not None and readers.get(x) == processes.rank

    def pinned(tensor: Tensor, home: Tensor) -> Tensor:
        return (stored[tensor]() if stored and tensor in stored else home).pin_memory()

    def read_after(block: nn.Module | None) -> None:
        ahead.clear()
        if has_streams(device) and block in after:
            for x in after[block].parameters():
                elsewhere = processes and readers.get(x, processes.rank) != processes.rank
                if not elsewhere and (x.device.type == "cpu" or (stored and x in stored)):
                    ahead[x] = reader.submit(pinned, x, x.data).result

    together: dict[Tensor, Callable[[], Tensor]] = {x: partial(handed_on, x) for x in readers}

    @contextmanager
    def visit(block: nn.Module) -> Iterator[None]:
        # All before the first is handed on: so the processes copy at the same time, not one after the other.
        own.update({x: here[x]().to(device, non_blocking=True) for x in tensors_of(block) if is_own(x)})
        with on_device(tensors_of(block), device, ChainMap(together, here)):
            read_after(block)
            yield

    # No thread begins before there is something to read. It has the GPU of this thread, of several.
    with ThreadPoolExecutor(1, initializer=to_this_gpu()) as reader:
        read_after(None)
        yield visit


def shared_out(tensors: Sequence[Tensor], processes: int) -> dict[Tensor, int]:
    """Which of several processes reads each tensor: all have about as many bytes to read."""
    loads, readers = [0] * processes, dict[Tensor, int]()
    for tensor in sorted(tensors, key=lambda x: x.nbytes, reverse=True):
        readers[tensor] = loads.index(min(loads))
        loads[readers[tensor]] += tensor.nbytes
    return readers


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module and its submodules."""
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
