"""Memory, disk, floating-point operations and time that `corda init` will take, from shapes alone.

Operations and tensors are counted block by block, as the code of each stage runs and allocates them. The stages are
those of `preprocess`'s seconds. Time is operations divided by rates. Launching and waiting come on top of it, which
shows on models that are small for their accelerator.
"""

import itertools
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.covariance import HALF
from ..config import CordaConfig, CordaError, DataConfig, ModelConfig
from ..data.samples import load_rounds
from ..devices import compute_device
from ..models.loading import class_of, empty_model, load_tokenizer, read_settings
from ..models.lockstep import find_blocks, tensors_of
from ..models.targets import HEADS, budget_of, choose_targets, modules_named, new_modules, task_type
from ..models.weights import ALREADY, is_4bit, packed_bytes, quantized_names, weight_shape
from .backward import LOGITS
from .context import read_context, token_masks
from .costs import (
    Layer,
    compacting,
    decomposing,
    groups_of,
    mixing,
    quantizing,
    rate_of,
    selecting,
    small,
    stored_bytes,
)
from .layer import keeps_all
from .machine import Machine, this_machine
from .walk import tensors_that_see

PROCESS = 1.0e9  # bytes of a Python process with torch, transformers and a tokenizer
CONTEXT = 0.6e9  # bytes of the accelerator's memory that CUDA itself takes, beside all tensors
BUS = 2e10  # bytes/s between an accelerator and pinned memory (PCIe 4)


class Tokens(NamedTuple):
    """Tokens of a context, padding included.

    Attributes:
        total: of all batches.
        batch: of the largest batch.
        pairs: pairs of tokens that attention multiplies, Σ b·s².
        batches: their number; 0 where it is not known.
    """

    total: int = 0
    batch: int = 0
    pairs: int = 0
    batches: int = 0


class Shapes(NamedTuple):
    """The sizes of a model that a plan is made from.

    Attributes:
        parameters: their number.
        budget: parameters of the adapter.
        rest: bytes that are on the device throughout.
        seeing: parameters and bytes of what sees images, which is there before the first block alone.
        saved: parameters and bytes of modules that are trained whole and saved with the adapter.
        head: parameters of the output head, which is run where the context goes backward.
        blocks: the number of parameters, the bytes and the targets of each block.
        loaded: bytes of a model that is in 4 or 8 bits, which is in the CPU's memory whole; else 0.
    """

    dtype: torch.dtype
    hidden: int
    parameters: int
    budget: int
    rest: int
    head: int
    blocks: list[tuple[int, int, list[Layer]]]
    loaded: int = 0
    seeing: tuple[int, int] = (0, 0)
    saved: tuple[int, int] = (0, 0)


class Stage(NamedTuple):
    """Seconds of a stage, and its peak bytes on the accelerator (0 if the CPU computes) and in the CPU's memory."""

    name: str
    seconds: float
    accelerator: float
    cpu: float


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        park: where hidden states wait; a block's covariances wait there, too, if that is not the device.
        parked_bytes: bytes that wait there.
        adapter_bytes: size of adapter_model.safetensors.
        statistics_bytes: size of statistics.safetensors.
        base_bytes: size of the quantized base, about.
        work_bytes: size of the decomposed layers, which are on the disk until the adapter is written.
        read_bytes: of the checkpoint, while the blocks are run.
        waits: seconds of the stage `forward` in which nothing computes, as weights are still read.
    """

    machine: Machine
    tokens: Tokens
    stages: list[Stage]
    park: str
    parked_bytes: int
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    statistics_bytes: int
    base_bytes: int
    work_bytes: int
    flops: int
    read_bytes: int
    waits: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peaks(self) -> tuple[float, float]:
        """Peak bytes on the accelerator and in the CPU's memory."""
        return max(stage.accelerator for stage in self.stages), max(stage.cpu for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        written = self.work_bytes + self.adapter_bytes + self.statistics_bytes + self.base_bytes
        return written + (self.parked_bytes if self.park == "disk" else 0)

    @property
    def fits(self) -> bool:
        accelerator, cpu = self.peaks
        return cpu <= self.machine.cpu and accelerator + CONTEXT <= (self.machine.accelerator or math.inf)


# --- the sizes -------------------------------------------------------------------------------------------------------


def planned_model(config: ModelConfig) -> nn.Module:
    """The model without its weights, from its config.json alone (see `models.empty_model`).

    Raises CordaError if there is none, or it names no class of transformers.
    """
    settings = read_settings(config)
    if class_of(settings) is None:
        named = ", ".join(settings.architectures or []) or "none given"
        raise CordaError(f"{config.model} cannot be planned: its class ({named}) is not in transformers")
    model = empty_model(settings, config).eval()
    if getattr(settings, "quantization_config", None) is not None and not packed_bytes(model):
        warnings.warn("the model is in a format whose size is not known, and planned as if not quantized", stacklevel=2)
    return model


def shared_inputs(model: nn.Module, targets: Iterable[str], blocks: Iterable[str]) -> dict[str, str]:
    """For each target that a forward runs, the first layer of the same block that is given the same tensor, or itself.

    The forward is run on the meta device, without numbers. If the model cannot do that, no input counts as shared.
    """
    leaders: dict[str, str] = {}
    seen: list[tuple[str, str, Tensor]] = []  # block, layer, input: kept, or another tensor could get its identity

    def listen(name: str, block: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def on_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            leaders.setdefault(name, next((n for b, n, x in seen if b == block and x is args[0]), name))
            seen.append((block, name, args[0]))

        return on_input

    try:
        settings: Any = model.config
        with torch.device("meta"):
            probe = type(model)(settings).bfloat16().eval()  # what the kernels of mixtures ask for
        for name in targets:
            block = next((b for b in blocks if name.startswith(f"{b}.")), "")
            probe.get_submodule(name).register_forward_pre_hook(listen(name, block))
        ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
        with torch.no_grad(), torch.device("meta"):
            probe(input_ids=ids, **({"decoder_input_ids": ids} if settings.is_encoder_decoder else {}))
    except Exception:  # a model may do anything that needs numbers
        return {name: name for name in targets}
    return leaders


def shapes_of(model: nn.Module, config: CordaConfig) -> Shapes:
    """Raises CordaError as `choose_targets` and `find_blocks` do, or if the layers cannot be quantized."""
    targets, packed = choose_targets(model, config), packed_bytes(model)
    if config.quantization:
        if packed or any(is_4bit(module) for module in targets.values()):
            raise CordaError(ALREADY)
        quantized_names(model, targets)
    blocks = find_blocks(model, list(targets))
    leaders = shared_inputs(model, targets, blocks)
    layers = {name: Layer(name, *weight_shape(module), leaders.get(name)) for name, module in targets.items()}
    seeing = tensors_that_see(model)
    sizes, rest = [], set(tensors_of(model)) - seeing
    for prefix, block in blocks.items():
        inside = [layers.pop(name) for name in list(layers) if name.startswith(f"{prefix}.")]
        sizes.append((sum(p.numel() for p in block.parameters()), _bytes(tensors_of(block), packed), inside))
        rest -= set(tensors_of(block))
    if layers:  # outside of the blocks; their weights are part of the rest
        sizes.append((sum(m * n for _, m, n, _ in layers.values()), 0, list(layers.values())))
    elif (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:  # not run, see `walk`
        rest -= set(tensors_of(head)) - set(tensors_of(model.get_input_embeddings()))  # type: ignore[operator]
    settings: Any = getattr(model, "config", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    head_parameters = sum(p.numel() for p in head.parameters()) if head is not None else 0
    hidden = getattr(settings.get_text_config() if settings else None, "hidden_size", 0)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = next(model.parameters()).dtype
    loaded, budget = _bytes(tensors_of(model), packed) if packed else 0, budget_of(targets, config, model)
    seen, saved = ((sum(t.numel() for t in ts), _bytes(ts, packed)) for ts in (seeing, _saved(model, config)))
    return Shapes(dtype, hidden, parameters, budget, _bytes(rest, packed), head_parameters, sizes, loaded, seen, saved)


def _saved(model: nn.Module, config: CordaConfig) -> set[Tensor]:
    """The tensors of `modules_to_save`, and of a classifier's head, which PEFT adds to them."""
    kind = task_type(model)
    endings = [*(config.modules_to_save or ()), *new_modules(model), *(HEADS.get(kind, ()) if kind else ())]
    return {t for ending in endings for module in modules_named(model, ending).values() for t in tensors_of(module)}


def _bytes(tensors: Iterable[Tensor], packed: Mapping[Tensor, int]) -> int:
    return sum(packed.get(t, t.numel() * t.element_size()) for t in tensors)


def count_tokens(batches: Sequence[Mapping[str, Any]]) -> Tokens:
    """The tokens of batches as `preprocess` takes them."""
    sizes = [token_masks(batch)[0].shape for batch in batches]
    largest = max((b * s for b, s in sizes), default=0)
    return Tokens(sum(b * s for b, s in sizes), largest, sum(b * s * s for b, s in sizes), len(sizes))


def planned_tokens(
    source: ModelConfig, datas: Sequence[DataConfig], rounds: int, batch_tokens: int, has_decoder: bool
) -> Tokens:
    """The tokens of the contexts that `corda init` would make of the data, together. If no data are named, all samples
    count as max_length tokens long."""
    each = [_planned_tokens(source, data, rounds, batch_tokens, has_decoder) for data in datas]
    total, batch, pairs, batches = zip(*each)
    return Tokens(sum(total), max(batch), sum(pairs), sum(batches))


def _planned_tokens(source: ModelConfig, data: DataConfig, rounds: int, batch_tokens: int, has_decoder: bool) -> Tokens:
    if data.data:
        samples_by_round = load_rounds(data, rounds)
        tokenizer = load_tokenizer(source)
        context = read_context(tokenizer, samples_by_round, data.max_length, batch_tokens, has_decoder)
        return count_tokens(context.batches)
    samples, length = data.samples or 1, data.max_length
    total, together = rounds * samples * length, min(max(1, batch_tokens // length), samples)
    return Tokens(total, together * length, total * length, rounds * -(-samples // together))


# --- the plan --------------------------------------------------------------------------------------------------------


def init_plan(
    model: nn.Module | Shapes,
    config: CordaConfig,
    batches: Sequence[Mapping[str, Any]] | Tokens,
    park: str = "auto",
    machine: Machine | None = None,
    abilities: int = 1,
) -> Plan:
    """What `preprocess` and `save_adapter` take, where the weights are read block by block.

    Args:
        model: a model, whose class, configuration and shapes are read but not its weights; or its `shapes_of`.
        batches: the batches of the context, or their tokens.
        park: see `preprocess`.
        machine: Default: this machine, not measured, so that the plan has no times.
        abilities: how many contexts the batches are of. Each has a C and a D of its own until they are mixed.

    Raises CordaError as `shapes_of` does.
    """
    if machine is None:
        assert isinstance(model, nn.Module)
        machine = this_machine(compute_device(model, config.device), measure=False)
    shapes = shapes_of(model, config) if isinstance(model, nn.Module) else model
    tokens = batches if isinstance(batches, Tokens) else count_tokens(batches)
    tokens = tokens if config.reads_context else Tokens()
    rounds, on_cpu, item = config.rounds or 1, machine.accelerator is None, shapes.dtype.itemsize
    multiply = "multiply" if shapes.dtype in HALF else "single"
    gram = "single" if on_cpu else multiply  # see `covariance.add_gram`
    # Run forward: a state that waits and the embeddings (see `waiting_bytes`). Backward: the input of every block, too.
    state = tokens.total * shapes.hidden * item
    waiting = (2 + config.runs_back * len(shapes.blocks)) * state
    park = _place(park, waiting, machine)
    # What is in the CPU's memory as it is loaded takes none beside it where the CPU computes.
    copied = not (shapes.loaded and on_cpu)
    rest = shapes.rest if tokens.total and copied else 0
    # Always on the device: tensors that are in no block, the masks (b, 1, s, s) bool of all batches, and hidden states.
    # Where these are parked, four batches of them: the current one's before and after the block, the next one's, and
    # the last one's.
    always = rest + tokens.pairs + (waiting if park == "device" else 4 * tokens.batch * shapes.hidden * item)
    kept = _kept(shapes, config)
    work: dict[str, Counter[str]] = {stage: Counter() for stage in ("forward", "selection", "decomposition")}
    peak = dict.fromkeys(work, 0)
    stored, parked, statistics = [], [], 0  # bytes of each block's decomposed layers, and of its C and D
    for parameters, weights, layers in shapes.blocks:
        groups = groups_of(layers)
        sums = {name: 4 * g[0].n ** 2 for name, g in groups.items() if tokens.total and g[0].leader}  # of one round
        # The other side, D of each layer.
        others = {x.name: 4 * x.m**2 for x in layers if tokens.total and x.leader and config.runs_back}
        both = sum(sums.values()) + sum(others.values())
        # Of weights that are quantized, the values of one layer's.
        unpacked = max([0, *(layer.m * layer.n for layer in layers)]) * item if shapes.loaded else 0
        held = always + weights * copied + unpacked
        parked.append(max(rounds, abilities) * sum(sums.values()) + abilities * sum(others.values()))
        if tokens.total:
            times = 3 if config.runs_back else 1  # forward; forward again, and backward, which takes as long
            work["forward"][multiply] += times * (2 * parameters * tokens.total + 4 * shapes.hidden * tokens.pairs)
            work["forward"][gram] += 5 * both // 16 * tokens.total  # the lower blocks
            widths = [m + n for _, m, n, _ in layers]
            # A token's activations: those that are alive at once; backward, all that gradients are computed from.
            alive = (24, sum(widths)) if config.runs_back else (6, max([0, *widths]))
            row = alive[0] * shapes.hidden + 2 * alive[1]
            # XXᵀ of a batch, before it is added; or D of all abilities, as they are stacked.
            product = max([0, *sums.values(), *(abilities * D for D in others.values())])
            peak["forward"] = max(peak["forward"], held + parked[-1] + product + tokens.batch * row * item)
        undone = parked[-1]  # bytes of the covariances of groups that are not decomposed yet
        for name, members in groups.items():
            seen = name in sums
            other = {layer.name: others.get(layer.name, 0) for layer in members}
            if seen and abilities > 1:  # each ability's C and D, before they are one
                cost, numbers = mixing(members, abilities, config)
                waiting_there = undone if park == "device" else abilities * sums[name]
                work["selection"].update(cost)
                peak["selection"] = max(peak["selection"], held + waiting_there + 8 * numbers)
                undone -= (abilities - 1) * (sums[name] + sum(other.values()))
            beside = held + (undone if park == "device" else sums.get(name, 0) + max(other.values()))
            costs = [
                ("decomposition", *decomposing(layer, kept[layer.name], seen, config, on_cpu)) for layer in members
            ]
            if config.quantization:
                costs += [("decomposition", *quantizing(layer, seen, config)) for layer in members]
            if config.keep:
                costs.append(("decomposition", *compacting(members)))
            if seen and (rounds > 1 or config.allocates):
                costs.append(("selection", *selecting(members, config, on_cpu)))
            for stage, cost, numbers in costs:
                work[stage].update(cost)
                peak[stage] = max(peak[stage], beside + 8 * numbers)
            undone -= rounds * sums.get(name, 0) + sum(other.values())
        # A and B, or rows, U and energies; no B or U where B starts from zero; and the spectrum (see `Decomposed`).
        columns = {layer.name: layer.n + (0 if config.from_zero else layer.m) for layer in layers}
        sigmas = {name: min(m, n) if keeps_all(config) else config.r for name, m, n, _ in layers}
        sides = sum(small(members[0].n) + sum(small(layer.m) for layer in members) for members in groups.values())
        statistics += 2 * sides * (config.keep > 0)  # in bfloat16
        energies = 8 * config.allocates
        unfinished = sum(kept[name] * (4 * columns[name] + energies) + 8 * sigmas[name] for name in columns)
        if config.quantization:
            unfinished += sum(stored_bytes(layer, config) for layer in layers)
        stored.append(unfinished + 4 * sides * (config.keep > 0))

    if tokens.total:  # as if every token stood for a patch
        work["forward"][multiply] += 2 * shapes.seeing[0] * tokens.total
        peak["forward"] = max(peak["forward"], always + shapes.seeing[1])
    if config.runs_back and tokens.total:  # the tail, as if every token were an answer
        work["forward"][multiply] += 6 * shapes.head * tokens.total
        logits = 5 * 4 * min(LOGITS, shapes.head // max(1, shapes.hidden) * tokens.batch)
        batch = 3 * tokens.batch * shapes.hidden * item
        peak["forward"] = max(peak["forward"], always + shapes.head * item + logits + batch)
    halves = 1 if config.from_zero or config.has_residual else 2  # rank 2r where the start is subtracted again
    adapter, base = 4 * shapes.budget * halves + shapes.saved[1], 0
    if config.quantization:
        inside = sum(parameters for parameters, _, _ in shapes.blocks)
        base = in_4_bits(inside, config) + (shapes.parameters - inside) * item
    seconds = {stage: sum(flop / rate_of(machine, kind) for kind, flop in cost.items()) for stage, cost in work.items()}
    read = (1 + config.runs_back) * sum(weights for _, weights, _ in shapes.blocks) + rest
    reading = (shapes.loaded or read) / machine.read
    parked_bytes = waiting + (max(parked) if park != "device" else 0)
    if park != "device":  # hidden states and covariances are moved there and back
        moved = (6 if config.runs_back else 2) * len(shapes.blocks) * state + 2 * sum(parked)
        seconds["forward"] += moved / (BUS if park == "cpu" else machine.read)
    memory = PROCESS + shapes.loaded + max(stored) + (parked_bytes if park == "cpu" else 0)
    # A block's bytes are copied to be written, and read again for their checksum. All are read at the end.
    work_bytes, adding = sum(stored), max(stored)
    writing = 2 * work_bytes / machine.read
    if not on_cpu:  # beside computing, the next block's weights are read and the last block is written
        memory += 2 * max(weights for _, weights, _ in shapes.blocks) + 2 * adding
        reading, writing, adding = max(0, reading - sum(seconds.values())), writing / len(stored), 0
    seconds["forward"] += reading
    peaks = {stage: (0, memory + most) if on_cpu else (most, memory) for stage, most in peak.items()}
    stages = [Stage(stage, seconds[stage], *peaks[stage]) for stage in work if seconds[stage]]
    factors = PROCESS + shapes.loaded + 4 * shapes.budget + 2 * adapter
    stages.append(Stage("state", writing, 0, memory + adding))
    stages.append(Stage("factors", (work_bytes + adapter) / machine.read, 0, factors))
    flops = sum(sum(cost.values()) for cost in work.values())
    return Plan(
        machine,
        tokens,
        stages,
        park,
        parked_bytes,
        shapes.parameters,
        shapes.budget,
        adapter,
        statistics,
        base,
        work_bytes,
        flops,
        shapes.loaded or read,
        reading,
    )


def in_4_bits(parameters: int, config: CordaConfig) -> int:
    """Bytes of a quantized block, as if it had nothing but linear layers: half a byte, and a scale for 64 numbers."""
    return int(parameters * (0.5 + (1 / 64 + 1 / 4096 if config.double_quantization else 1 / 16)))


def _place(park: str, waiting: int, machine: Machine) -> str:
    """Where hidden states wait, as `choose_parking` chooses."""
    if park == "auto":
        on_device = not waiting or (machine.accelerator is not None and 3 * waiting < machine.accelerator)
        park = "device" if on_device else "cpu" if 3 * waiting < machine.cpu else "disk"
    return "device" if park == "cpu" and machine.accelerator is None else park


def _kept(shapes: Shapes, config: CordaConfig) -> dict[str, int]:
    """Components of each layer that are kept on the disk. That is r, or with allocation the rank that the budget pays
    for if all layers seen by then get the same rank (see `Ranks`)."""
    layers = [layer for _, _, layers in shapes.blocks for layer in layers]
    unseen, seen, kept = sum(m + n for _, m, n, _ in layers), 0, {}
    for name, m, n, _ in layers:
        unseen, seen = unseen - m - n, seen + m + n
        k = max(config.min_rank, (shapes.budget - config.min_rank * unseen) // seen) if config.allocates else config.r
        kept[name] = min(k, m, n, config.max_rank or k)
    return kept


# --- does it fit -----------------------------------------------------------------------------------------------------


def check_room(plan: Plan, output: Path) -> None:
    """Raises CordaError if the disk of `output` has less room than the run takes there."""
    folder = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    finished = output.with_name(output.name + ".work").glob("*.safetensors")  # by a run that was broken off
    needed = plan.disk_bytes - sum(file.stat().st_size for file in finished)
    base = f"{size_text(plan.base_bytes)} for its quantized base, " if plan.base_bytes else ""
    if free < needed:
        raise CordaError(
            f"the disk of {output} has {size_text(free)} free, but {size_text(needed)} are needed: "
            f"{size_text(plan.adapter_bytes)} for the adapter, {base}the rest for unfinished work beside it"
        )


def what_fits(
    model: nn.Module,
    config: CordaConfig,
    count: Callable[[int, int], Tokens],
    batch_tokens: int,
    park: str,
    machine: Machine,
    abilities: int = 1,
) -> tuple[str, Plan] | None:
    """The first and fewest options with which a run fits the machine, and its plan; None if there are none.

    Args:
        count: gives the tokens of the context for a number of rounds and for batch_tokens.
        abilities: see `init_plan`.
    """
    shapes, rounds = shapes_of(model, config), config.rounds or 1
    options: list[tuple[str, Any]] = [("park", "cpu")] * (machine.accelerator is not None) + [("park", "disk")]
    options += [("batch_tokens", 1024)] * (batch_tokens > 1024) + [("rounds", 1)] * (rounds > 1)
    for chosen in itertools.chain(*(itertools.combinations(options, n) for n in (1, 2, 3))):
        setting: dict[str, Any] = {"park": park, "batch_tokens": batch_tokens, "rounds": rounds} | dict(chosen)
        tokens = count(setting["rounds"], setting["batch_tokens"])
        at = replace(config, rounds=setting["rounds"])
        plan = init_plan(shapes, at, tokens, setting["park"], machine, abilities)
        if plan.fits:
            return " ".join(f"--{option} {value}" for option, value in chosen), plan
    return None


def size_text(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
