"""A preparation by several processes.

    batches         shared out in order, so that each process has as many tokens
    covariances     summed over the processes; the sum goes to the one process that decomposes the layers
    weights         a part of each block is read by each process, and handed on to the others
    layers          a block to each process; where fewer blocks are left than processes, shared out by what they cost
    results         written by each process into the folder of work that all see; the first process writes the output

Every process goes through the same blocks in the same order. After each block they tell one another which layers were
run, and the sums go to their owners. After as many blocks as there are processes, each decomposes what is its own.

What one process sums up alone has the same bytes as in a run of one process: a round whose batches are all its own, and
all that needs no context. A sum over several processes is added up in another order, and equal to rounding.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.covariance import Covariance
from ..config import CordaConfig, CordaError
from ..devices import free_bytes
from ..models.lockstep import find_blocks, tensors_of
from ..models.weights import weight_shape
from ..processes import Processes
from .backward import StepBack
from .collect import Collector, Gradients, Group
from .context import Context
from .costs import Layer, group_seconds
from .machine import H100


class Share:
    """What this process does of a preparation.

    Attributes:
        order: the layers in the order in which one process would have finished them, as far as they have come.
    """

    def __init__(
        self,
        processes: Processes,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        config: CordaConfig,
        device: torch.device,
        finished: Collection[str] = (),
    ):
        self.processes, self.config, self.device = processes, config, device
        self.shapes = {name: weight_shape(module) for name, module in targets.items()}
        todo = [name for name in targets if name not in finished]
        self.block_of = {n: block for block in find_blocks(model, todo) for n in todo if n.startswith(f"{block}.")}
        blocks = len(set(self.block_of.values()))
        self.whole_blocks = blocks - blocks % processes.size  # so many, of those that come first, are not divided
        self.block_owners: dict[str, int] = {}
        self.owners: dict[str, int] = {}
        self.loads = [0.0] * processes.size  # seconds that the layers of each process take, by the plan
        self.abilities = 1  # of the context
        self.order: list[str] = []
        if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
            raise CordaError(
                f"{device} is one GPU, and each of {processes.size} processes has its own: leave device out"
            )
        if len(targets) < processes.size:
            raise CordaError(f"{processes.size} processes cannot share {len(targets)} layers: start fewer")

    def part(self, context: Context) -> Context:
        """This process's batches: they follow one another, and have nearly the same number of tokens in each process.

        Raises CordaError if there are fewer batches than processes."""
        size, rank, batches = self.processes.size, self.processes.rank, context.batches
        self.abilities = max(1, len(context.abilities))
        if not batches:
            return context
        if len(batches) < size:
            raise CordaError(
                f"{size} processes cannot share {len(batches)} batches of the context: start fewer, or lower "
                "--batch_tokens"
            )
        ends = [0, *accumulate(_tokens(batch) for batch in batches)]
        cuts = [0]
        for process in range(1, size):
            wanted = ends[-1] * process / size
            nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - wanted))
            cuts.append(min(max(nearest, cuts[-1] + 1), len(batches) - size + process))  # one batch at least
        begin, end = [*cuts, len(batches)][rank : rank + 2]
        samples = [0, *accumulate(len(_ids(batch)) for batch in batches)]
        numbers = context.numbers or range(samples[-1])
        return replace(
            context,
            batches=batches[begin:end],
            rounds=context.rounds[begin:end],
            numbers=numbers[samples[begin] : samples[end]],
            begin=begin,
        )

    def owner(self, members: Sequence[str], seen: bool) -> int:
        """The process that decomposes layers which share their input: the one with the least to do when their block was
        come to. The same in all processes, which call this for the same layers in the same order."""
        if members[0] not in self.owners:
            least, block = self.loads.index(min(self.loads)), self.block_of.get(members[0])
            if block and (block in self.block_owners or len(self.block_owners) < self.whole_blocks):
                least = self.block_owners.setdefault(block, least)
            layers = [Layer(name, *self.shapes[name], members[0] if seen else None) for name in members]
            on_cpu = self.device.type == "cpu"
            self.loads[least] += group_seconds(layers, self.config, on_cpu, H100, self.abilities)
            self.owners |= dict.fromkeys(members, least)
        return self.owners[members[0]]

    def is_own(self, members: Sequence[str]) -> bool:
        return self.owners[members[0]] == self.processes.rank

    def sum_to(self, owner: int, total: Tensor | None, size: int, dtype: torch.dtype) -> Tensor | None:
        """Σ over the processes of `total` (size, size), in the process that owns it; None in the others."""
        import torch.distributed as dist

        if total is None:
            total = torch.zeros(size, size, dtype=dtype, device=self.device)
        with self.processes.watching():
            dist.reduce(total, owner)
        return total if owner == self.processes.rank else None

    def own_steps(
        self, steps: Iterable[StepBack], targets: Mapping[str, nn.Module], elsewhere: Callable[[int], None]
    ) -> Iterator[StepBack]:
        """The steps of a walk with the layers that this process decomposes alone, those of several blocks in one step.
        All processes get the same number of steps.

        Args:
            elsewhere: called with the number of layers of a block that other processes decompose.
        """
        waiting, gradients, there, blocks = list[Group](), dict[str, Tensor](), dict[Tensor, Tensor](), 0

        def own() -> Iterator[StepBack]:
            with _moved(there):
                yield StepBack([name for group in waiting for name in group.members], waiting, gradients)

        for step in steps:
            if step.groups is None:
                yield step
                continue
            for members, covariances in step.groups:
                self.order += members
                if self.owner(members, bool(covariances)) != self.processes.rank:
                    elsewhere(len(members))
                    continue
                waiting.append(Group(members, self._waiting(covariances)))
                there |= {x: x.data for name in members for x in tensors_of(targets[name])}
            gradients |= step.gradients
            blocks += 1
            if blocks == self.processes.size:
                yield from own()
                waiting, gradients, there, blocks = [], {}, {}, 0
        if blocks:
            yield from own()

    def _waiting(self, covariances: list[Tensor]) -> list[Tensor]:
        """On the CPU, where there is little room beside them on the device."""
        free = free_bytes(self.device)
        if free is None or free > 4 * sum(C.nbytes for C in covariances):
            return covariances
        return [C.cpu() for C in covariances]


def _ids(batch: Mapping[str, Any]) -> Tensor:
    ids: Tensor = next(batch[k] for k in ("input_ids", "inputs_embeds") if batch.get(k) is not None)
    return ids


def _tokens(batch: Mapping[str, Any]) -> int:
    """Of a batch, padding included."""
    return _ids(batch).shape[:2].numel()


@contextmanager
def _moved(there: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """For a `with` block parameters hold the memory that they held while their block was on the device."""
    homes = {tensor: tensor.data for tensor in there}
    for tensor, memory in there.items():
        tensor.data = memory
    try:
        yield
    finally:
        for tensor, home in homes.items():
            tensor.data = home


class SharedCollector(Collector):
    """Takes the covariances over the batches of all processes. All call `take` for the same layers, in the same order.
    The layers of other processes come in groups without covariances.

    Args:
        context: this process's part.
        rounds: the number of all rounds.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], context: Context, rounds: int, share: Share):
        super().__init__(model, layers, context)
        self.share, self.rounds_of_all = share, rounds

    @property
    def round_count(self) -> int:
        return self.rounds_of_all

    def take(self, names: Sequence[str]) -> list[Group]:
        self.groups: list[list[str]] = []
        own = {group.members[0]: group for group in super().take(names)}
        return [own.get(members[0], Group(members, [])) for members in self.groups]

    def take_sums(self, names: Sequence[str]) -> list[tuple[list[str], dict[int, Covariance]]]:
        share, mine = self.share, {tuple(members): of_rounds for members, of_rounds in super().take_sums(names)}
        counts: dict[tuple[str, ...], dict[int, int]] = {}
        dtypes: dict[tuple[str, ...], torch.dtype] = {}
        for told in share.processes.gather({key: _told(of_rounds) for key, of_rounds in mine.items()}):
            for key, of_rounds in told.items():
                for round, (count, dtype) in of_rounds.items():
                    counts.setdefault(key, {}).setdefault(round, 0)
                    counts[key][round] += count
                    dtypes[key] = dtype or dtypes.get(key, torch.float32)
        place, sums = {name: i for i, name in enumerate(names)}, []
        if sum(map(len, counts)) > len({name for key in counts for name in key}):
            raise RuntimeError(f"layers that share their input in one process do not in another: {sorted(counts)[0]}")
        for key in sorted(counts, key=lambda key: place[key[0]]):
            if not any(counts[key].values()):
                continue
            members, added = list(key), dict[int, Covariance]()
            self.groups.append(members)
            owner, n = share.owner(members, seen=True), weight_shape(self.layers[key[0]])[1]
            for round in sorted(counts[key]):
                part = mine.get(key, {}).pop(round, None)
                total = share.sum_to(owner, part.total if part else None, n, dtypes[key])
                if total is not None:
                    added[round] = Covariance()
                    added[round].total, added[round].count = total, counts[key][round]
            if added:
                sums.append((members, added))
        return sums


class SharedGradients(Gradients):
    """Takes D over the batches of all processes. The layers of other processes are missing."""

    def __init__(self, collector: SharedCollector):
        super().__init__(collector)
        self.share = collector.share

    def take_sums(self, names: Sequence[str], number: int) -> dict[str, Covariance]:
        mine, share, sums = super().take_sums(names, number), self.share, dict[str, Covariance]()
        told = share.processes.gather({name: _count(total) for name, total in mine.items()})
        for name in names:
            count, dtypes = sum(each[name][0] for each in told), {each[name][1] for each in told} - {None}
            total, m = mine.pop(name), weight_shape(self.collector.layers[name])[0]
            if count:
                total.total = share.sum_to(share.owners[name], total.total, m, dtypes.pop())
            total.count = count
            if share.is_own([name]):
                sums[name] = total
        return sums


def _told(of_rounds: Mapping[int, Covariance]) -> dict[int, tuple[int, Any]]:
    return {round: _count(covariance) for round, covariance in of_rounds.items()}


def _count(covariance: Covariance) -> tuple[int, Any]:
    """How many rows were added, and the dtype of their sum."""
    return covariance.count, None if covariance.total is None else covariance.total.dtype
