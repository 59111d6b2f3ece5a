"""Go through a model block by block: all batches through each, then the covariances of its target layers."""

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from ..devices import free_bytes, synchronize
from ..models.lockstep import Parking, Stored, find_blocks, lockstep, on_device, tensors_of, visits
from ..models.seeing import image_side, reads_images
from ..processes import Processes
from .collect import Collector, Group
from .context import Batch, Context, has_decoder, token_masks


@dataclass(frozen=True)
class Place:
    """Where a model is run.

    Attributes:
        device: where its blocks are run, one at a time.
        stored: parameters whose values are in a checkpoint, each with a function that reads it (see `open_model`).
        park: how the hidden states of waiting batches leave the device (see `parking`). Default: they stay.
        processes: those that run it at the same time, each on a device of its own.
    """

    device: torch.device
    stored: Stored | None = None
    park: Parking | None = None
    processes: Processes | None = None


class Step(NamedTuple):
    """Target layers whose weights are on the device until the next step.

    Attributes:
        names: of the layers.
        groups: the same layers with their covariances; None if they were finished before. A caller that pops its groups
            frees their memory one by one.
    """

    names: list[str]
    groups: list[Group] | None


def walk(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    context: Context,
    place: Place,
    finished: Collection[str] = (),
    collector: Collector | None = None,
) -> Iterator[Step]:
    """Run the context through the model block by block, and yield a step for each block.

    The last step has the target layers outside of the blocks, and those that no batch ran: these have groups of one
    with no covariance. Without batches nothing is run, and no layer has a covariance.

    Args:
        finished: layers whose covariances are not needed. They are run, but not listened to.
        collector: in place of the default one; it must be made for this context.
    """
    blocks = find_blocks(model, list(targets))
    inside = {block: [n for n in targets if n.startswith(f"{name}.")] for name, block in blocks.items()}
    in_blocks = {name for names in inside.values() for name in names}
    late = [name for name in targets if name not in in_blocks]  # layers of the last step
    finished = set(finished)
    to_end = bool(late) or not blocks
    always = tensors_beside(model, blocks.values(), to_end)  # on the device throughout
    seeing = tensors_that_see(model)  # only until all batches are at the first block

    def unseen(names: Sequence[str]) -> list[Group] | None:
        return None if finished.issuperset(names) else [Group([name], []) for name in names]

    if not context.batches or finished.issuperset(targets):  # nothing to run
        with visits(list(inside), place.device, place.stored, place.processes) as visit:
            for block, names in inside.items():
                with visit(block):
                    if names:
                        yield Step(names, unseen(names))
        if late:
            with on_device(always, place.device, place.stored):
                yield Step(late, unseen(late))
        return

    if collector is None:
        collector = Collector(model, {n: m for n, m in targets.items() if n not in finished}, context)
    batches, order = inputs_of(model, context.batches, place.device, pixels=False), list(inside)
    training = model.training
    model.eval()
    try:
        with (
            on_device([t for t in always if t not in seeing], place.device, place.stored),
            collector.listening(),
            visits(order, place.device, place.stored, place.processes) as visit,
            ExitStack() as at_first,
        ):
            at_first.enter_context(on_device([*seeing, *pixels_of(batches)], place.device, place.stored))
            for block, run in lockstep(model, order, batches, collector.start, to_end, place.park):
                at_first.close()
                with visit(block):
                    run()
                    names = inside.pop(block)
                    if names and finished.issuperset(names):
                        yield Step(names, None)
                        continue
                    groups = collector.take(names)
                    if place.park is not None:  # one covariance is needed on the device at a time
                        groups = [Group(members, [place.park(C) for C in Cs]) for members, Cs in groups]
                        synchronize(place.device)  # the copies must be complete before anyone reads them
                    seen = [name for members, _ in groups for name in members]
                    late += [name for name in names if name not in seen]
                    yield Step(seen, groups)
            for names in inside.values():  # blocks that were never entered
                late += names
            if late and finished.issuperset(late):
                yield Step(late, None)
            elif late:
                groups = collector.take(late)
                seen = [name for members, _ in groups for name in members]
                alone = [name for name in late if name not in seen]
                with on_device([t for n in alone for t in tensors_of(targets[n])], place.device, place.stored):
                    yield Step(late, [*groups, *(Group([name], []) for name in alone)])
    finally:
        model.train(training)


def tensors_beside(model: nn.Module, blocks: Collection[nn.Module], to_end: bool) -> list[Tensor]:
    """Parameters and buffers that are in no block. The output head is left out where the forward ends after the last
    block, unless it is tied to the embeddings."""
    unused = {tensor for block in blocks for tensor in tensors_of(block)}
    if not to_end and (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        unused |= set(tensors_of(head)) - set(tensors_of(model.get_input_embeddings()))  # type: ignore[operator]
    return [tensor for tensor in tensors_of(model) if tensor not in unused]


def tensors_that_see(model: nn.Module) -> set[Tensor]:
    """Parameters and buffers of a vision-language model's vision tower and connector; none of another model."""
    sees = image_side(model)
    return {tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if sees(name)}


def pixels_of(batches: Sequence[Batch]) -> list[Tensor]:
    """The pixels of batches' images: they are large, and of no use behind the first block."""
    return [x for batch in batches for name, x in batch.items() if name.startswith("pixel_")]


def inputs_of(model: nn.Module, batches: Sequence[Batch], device: torch.device, pixels: bool = True) -> list[Batch]:
    """The batches on the device, and without a cache: else every paused batch would hold its keys and values. Only a
    decoder gets labels, which its inputs are made of: no loss is needed.

    Args:
        pixels: whether images go there, too. Else the caller moves them when they are needed (see `pixels_of`).
    """
    left_out = set() if has_decoder(model) else {"labels"}

    def moved(name: str, value: Any) -> Any:
        stays = not isinstance(value, Tensor) or (name.startswith("pixel_") and not pixels)
        return value if stays else value.to(device)

    inputs = [{k: moved(k, v) for k, v in batch.items() if k not in left_out} for batch in batches]
    names = inspect.signature(model.forward).parameters
    if "use_cache" in names or reads_images(getattr(model, "config", None)):  # LLaVA's hands it on without naming it
        inputs = [{**batch, "use_cache": False} for batch in inputs]
    return inputs  # type: ignore[return-value]


def choose_parking(park: str, model: nn.Module, batches: Sequence[Batch], device: torch.device, states: int = 2) -> str:
    """Where the hidden states of waiting batches are kept, `states` of each token: "device", "cpu" or "disk".

    `auto` is the first of these with room for three times the states. A warning tells if that is not the device.
    """
    if park != "auto" or not batches:
        return "device" if park == "auto" or (park == "cpu" and device.type == "cpu") else park
    size = waiting_bytes(model, batches, states)
    if 3 * size < (free_bytes(device) or 0):
        return "device"
    choice = "cpu" if 3 * size < psutil.virtual_memory().available else "disk"
    if choice == "cpu" and device.type == "cpu":
        return "device"
    memory = {"cpu": "the CPU's memory", "disk": "files beside the output"}[choice]
    warnings.warn(f"the hidden states of waiting samples ({size / 1e9:.1f} GB) are parked in {memory}", stacklevel=3)
    return choice


def waiting_bytes(model: nn.Module, batches: Sequence[Batch], states: int = 2) -> int:
    """Bytes of `states` hidden states of each token: that of a batch which waits, and its embedding, which most models
    hold on to."""
    config = getattr(model, "config", None)
    width = getattr(config.get_text_config() if config is not None else None, "hidden_size", 0)
    tokens = sum(token_masks(batch)[0].numel() for batch in batches)
    return states * tokens * width * next(model.parameters()).element_size()
