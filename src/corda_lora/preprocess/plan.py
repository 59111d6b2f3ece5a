"""What `corda init` takes, from shapes alone: memory, disk, floating-point operations, and an estimate of time.

Counted block by block from what the code of each stage does and allocates; the stages are those of `preprocess`'s
seconds. Time is operations over rates: what is launched and waited for comes on top, which shows on models that are
small for their accelerator.
"""

import itertools
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.table import Table
from torch import Tensor, nn

from ..algebra.compactness import DENSE
from ..algebra.covariance import HALF
from ..algebra.decomposition import COLUMNS
from ..algebra.solvers import block_width, iterates
from ..config import CordaConfig, CordaError, DataConfig, ModelConfig
from ..data.batches import context_batches
from ..data.samples import load_rounds
from ..devices import compute_device, device_name, double_device, free_bytes, synchronize
from ..models.loading import class_of, empty_model, load_tokenizer, read_settings
from ..models.lockstep import find_blocks, tensors_of
from ..models.targets import budget_of, check_rank, find_targets, weight_shape
from .collect import token_masks
from .layer import keeps_all

PROCESS = 1.0e9  # bytes of a Python process with torch, transformers and a tokenizer
CONTEXT = 0.6e9  # bytes of an accelerator that CUDA itself takes, beside all tensors
BUS = 2e10  # bytes/s between an accelerator and pinned memory (PCIe 4)
LANCZOS = 200  # products with a vector until both extreme eigenvalues of a large matrix are found
# FLOP of decompositions of a matrix (n, n), divided by n³: of a symmetric one, with and without eigenvectors; all of
# those that `gram` takes (the second is of the part that the first did not resolve); an SVD, by how long it takes.
EIGH, EIGVALSH, GRAM, SVD = 9, 4, 15, 54
STEPS = 12  # of `norms`


@dataclass(frozen=True)
class Machine:
    """Free memory in bytes (`accelerator` None: the CPU computes); FLOP/s of products of half-precision (`multiply`),
    float32 (`single`) and float64 (`double`) matrices; `eigen`: seconds of a float64 `eigh` of (n, n) divided by n³, at
    n of a few thousands; `read`: bytes/s from the disk."""

    name: str
    accelerator: float | None
    cpu: float
    multiply: float = math.nan
    single: float = math.nan
    double: float = math.nan
    eigen: float = math.nan
    read: float = math.nan


# measured: benchmarks/results/init_7b_2026-11-22_h100.md
H100 = Machine("H100", 80e9, math.inf, 6.2e14, 5.0e13, 5.4e13, 0.127 / 4096**3, 0.9e9)


class Tokens(NamedTuple):
    """Of a context, padding included: of all batches, of the largest, and pairs Σ b·s², which attention looks at."""

    total: int = 0
    batch: int = 0
    pairs: int = 0


class Layer(NamedTuple):
    """A target, W (m, n). `leader`: the layer whose input it shares, or itself; None if it is never run."""

    name: str
    m: int
    n: int
    leader: str | None


class Shapes(NamedTuple):
    """What a plan needs of a model. `rest`: bytes that are on the device throughout; `blocks`: parameters, bytes and
    targets of each."""

    dtype: torch.dtype
    hidden: int
    parameters: int
    budget: int
    rest: int
    blocks: list[tuple[int, int, list[Layer]]]


class Stage(NamedTuple):
    """Seconds, and peak bytes of the accelerator (0 if the CPU computes) and of the CPU's memory."""

    name: str
    seconds: float
    accelerator: float
    cpu: float


@dataclass(frozen=True)
class Plan:
    """What a run takes. `park`, `parked_bytes`: where hidden states wait (and a block's covariances, if that is not the
    device); `adapter_bytes`: of adapter_model.safetensors; `work_bytes`: of decomposed layers, on the disk until the
    adapter is there, too."""

    machine: Machine
    tokens: Tokens
    stages: list[Stage]
    park: str
    parked_bytes: int
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    work_bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peaks(self) -> tuple[float, float]:
        """Bytes of the accelerator and of the CPU's memory."""
        return max(stage.accelerator for stage in self.stages), max(stage.cpu for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return self.work_bytes + self.adapter_bytes + (self.parked_bytes if self.park == "disk" else 0)

    @property
    def fits(self) -> bool:
        accelerator, cpu = self.peaks
        return cpu <= self.machine.cpu and accelerator + CONTEXT <= (self.machine.accelerator or math.inf)


# --- of what ---------------------------------------------------------------------------------------------------------


def planned_model(config: ModelConfig) -> nn.Module:
    """The model without its weights, from its config.json alone (see `models.empty_model`).

    Raises CordaError if there is none, or it names no class of transformers.
    """
    settings = read_settings(config)
    if class_of(settings) is None:
        named = ", ".join(settings.architectures or []) or "none given"
        raise CordaError(f"{config.model} cannot be planned: its class ({named}) is not in transformers")
    if getattr(settings, "quantization_config", None) is not None:
        warnings.warn("the model is quantized, and planned as if it were not", stacklevel=2)
    return empty_model(settings, config).eval()


def shared_inputs(model: nn.Module, targets: Iterable[str], blocks: Iterable[str]) -> dict[str, str]:
    """Of each target that a forward runs, the first layer of the same block that is given the same tensor (itself, if
    no other). From a forward without numbers; if the model cannot do that, every layer counts by itself."""
    leaders: dict[str, str] = {}
    met: list[tuple[str, str, Tensor]] = []  # block, layer, input: kept, or another could get its identity

    def listen(name: str, block: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def on_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            leaders.setdefault(name, next((n for b, n, x in met if b == block and x is args[0]), name))
            met.append((block, name, args[0]))

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
    except Exception:  # whatever it is that a model does with numbers
        return {name: name for name in targets}
    return leaders


def shapes_of(model: nn.Module, config: CordaConfig) -> Shapes:
    """Raises CordaError as `find_targets`, `check_rank` and `find_blocks` do."""
    targets = find_targets(model, config.target_modules)
    check_rank(targets, config, model)
    blocks = find_blocks(model, list(targets))
    leaders = shared_inputs(model, targets, blocks)
    layers = {name: Layer(name, *weight_shape(module), leaders.get(name)) for name, module in targets.items()}
    found, rest = [], set(tensors_of(model))
    for prefix, block in blocks.items():
        inside = [layers.pop(name) for name in list(layers) if name.startswith(f"{prefix}.")]
        found.append((sum(p.numel() for p in block.parameters()), _bytes(tensors_of(block)), inside))
        rest -= set(tensors_of(block))
    if layers:  # outside of the blocks, where all the rest is on the device
        found.append((sum(m * n for _, m, n, _ in layers.values()), 0, list(layers.values())))
    elif (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:  # is not run: see `walk`
        rest -= set(tensors_of(head)) - set(tensors_of(model.get_input_embeddings()))  # type: ignore[operator]
    settings: Any = getattr(model, "config", None)
    hidden = getattr(settings.get_text_config() if settings else None, "hidden_size", 0)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = next(model.parameters()).dtype
    return Shapes(dtype, hidden, parameters, budget_of(targets, config, model), _bytes(rest), found)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def count_tokens(batches: Sequence[Mapping[str, Any]]) -> Tokens:
    """Of batches as `preprocess` takes them."""
    sizes = [token_masks(batch)[0].shape for batch in batches]
    largest = max((b * s for b, s in sizes), default=0)
    return Tokens(sum(b * s for b, s in sizes), largest, sum(b * s * s for b, s in sizes))


def planned_tokens(source: ModelConfig, data: DataConfig, rounds: int, batch_tokens: int, has_decoder: bool) -> Tokens:
    """Of the context that `corda init` would make of the data; if none is named, of samples of max_length."""
    if data.data:
        tokenizer = load_tokenizer(source)
        made = [
            context_batches(tokenizer, s, data.max_length, batch_tokens, has_decoder) for s in load_rounds(data, rounds)
        ]
        return count_tokens([batch for batches, _ in made for batch in batches])
    samples, length = data.samples or 1, data.max_length
    total = rounds * samples * length
    return Tokens(total, min(max(1, batch_tokens // length), samples) * length, total * length)


# --- on what ---------------------------------------------------------------------------------------------------------


def this_machine(device: torch.device, dtype: torch.dtype = torch.float32, measure: bool = True) -> Machine:
    """This machine, computing on `device` on a model of `dtype`. Measuring takes about 3 seconds; without it all times
    are nan."""
    cuda = device.type == "cuda"
    name = device_name(device) if cuda else f"CPU, threads: {torch.get_num_threads()}"
    machine = Machine(f"this machine ({name})", free_bytes(device), psutil.virtual_memory().available)
    if not measure:
        return machine

    def seconds(run: Callable[[], Any]) -> float:
        run()  # the first call sets up
        calls, since = 0, time.perf_counter()
        while not calls or time.perf_counter() < since + 0.4:
            run()
            calls += 1
            synchronize(device)
        return (time.perf_counter() - since) / calls

    n = 2048 if cuda else 768
    x = torch.randn(n, n, dtype=torch.float64, device=double_device(device) if cuda else "cpu")
    double = x.repeat(2, 2) if cuda else x
    single, product = double.float().to(device if cuda else "cpu"), 2 * len(double) ** 3
    half = single.to(dtype if dtype in HALF else torch.float32)
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(1 << 20) * 64)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # or it would come from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        since = time.perf_counter()
        read = len(Path(file.name).read_bytes()) / (time.perf_counter() - since)
    return replace(
        machine,
        multiply=product / seconds(lambda: half @ half),
        single=product / seconds(lambda: single @ single),
        double=product / seconds(lambda: double @ double),
        eigen=seconds(lambda: torch.linalg.eigh(x)) / n**3,  # reads one triangle
        read=read,
    )


def described_machine(gpu: str, tflops: float | None = None, tflops64: float | None = None) -> Machine:
    """A card with memory such as "24GB" and the given speed in half and in double precision, by default an H100's; its
    other rates scale with these. Of the CPU beside it nothing is known: its memory has no limit.

    Raises CordaError if that is no size, or a speed is not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(i?)B?\s*", gpu, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise CordaError(f"--gpu is {gpu!r}, but must be the memory of a card, such as 24GB")
    for flag, given in {"tflops": tflops, "tflops64": tflops64}.items():
        if given is not None and not given > 0:
            raise CordaError(f"--{flag} is {given}, but must be above 0")
    half = 1e12 * tflops if tflops else H100.multiply
    double = 1e12 * tflops64 if tflops64 else H100.double
    default = "" if tflops and tflops64 else "; what is not given is an H100's"
    return replace(
        H100,
        name=f"a GPU of {gpu.strip()} ({half / 1e12:g} TFLOP/s in half and {double / 1e12:g} in double{default})",
        accelerator=float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper()),
        multiply=half,
        single=H100.single * half / H100.multiply,
        double=double,
        eigen=H100.eigen * H100.double / double,
    )


# --- the plan --------------------------------------------------------------------------------------------------------


def init_plan(
    model: nn.Module | Shapes,
    config: CordaConfig,
    batches: Sequence[Mapping[str, Any]] | Tokens,
    park: str = "auto",
    machine: Machine | None = None,
) -> Plan:
    """What `preprocess` and `save_adapter` take, where the weights are read block by block.

    Args:
        model: its class, configuration and shapes are looked at, not its weights; or `shapes_of` it.
        batches: the context, or its tokens.
        park: see `preprocess`.
        machine: default: this one, not measured, so that there are no times.

    Raises CordaError as `shapes_of` does.
    """
    if machine is None:
        assert isinstance(model, nn.Module)
        machine = this_machine(compute_device(model, config.device), measure=False)
    shapes = shapes_of(model, config) if isinstance(model, nn.Module) else model
    tokens = batches if isinstance(batches, Tokens) else count_tokens(batches)
    tokens = Tokens() if config.orientation == "identity" else tokens
    rounds, on_cpu, item = config.rounds or 1, machine.accelerator is None, shapes.dtype.itemsize
    multiply = "multiply" if shapes.dtype in HALF else "single"
    gram = "single" if on_cpu else multiply  # see `covariance.add_gram`
    waiting = 2 * tokens.total * shapes.hidden * item  # see `waiting_bytes`
    park = _place(park, waiting, machine)
    rest = shapes.rest if tokens.total else 0
    # Always on the device: what is in no block, masks (b, 1, s, s) bool of all batches, and the hidden states; of those
    # that are parked a batch's, before and after the block, the next one's and the last one's.
    always = rest + tokens.pairs + (waiting if park == "device" else 4 * tokens.batch * shapes.hidden * item)
    kept = _kept(shapes, config)
    work: dict[str, Counter[str]] = {stage: Counter() for stage in ("forward", "selection", "decomposition")}
    peak = dict.fromkeys(work, 0)
    stored, parked = [], []  # bytes of each block's decomposed layers, and of its covariances
    for parameters, weights, layers in shapes.blocks:
        groups: dict[str, list[Layer]] = {}
        for layer in layers:
            groups.setdefault(layer.leader or layer.name, []).append(layer)
        sums = {name: 4 * g[0].n ** 2 for name, g in groups.items() if tokens.total and g[0].leader}  # of one round
        held = always + weights
        parked.append(rounds * sum(sums.values()))
        if tokens.total:
            work["forward"][multiply] += 2 * parameters * tokens.total + 4 * shapes.hidden * tokens.pairs
            work["forward"][gram] += 5 * sum(sums.values()) // 16 * tokens.total  # the lower blocks
            row = 6 * shapes.hidden + 2 * max((m + n for _, m, n, _ in layers), default=0)  # a token's activations
            product = max(sums.values(), default=0)  # of a batch, to be added
            peak["forward"] = max(peak["forward"], held + parked[-1] + product + tokens.batch * row * item)
        ahead = parked[-1]  # covariances of groups that are not done
        for name, members in groups.items():
            seen = name in sums
            here = held + (ahead if park == "device" else sums.get(name, 0))
            costs = [
                ("decomposition", *_decomposition(layer, kept[layer.name], seen, config, on_cpu)) for layer in members
            ]
            if seen and (rounds > 1 or config.allocates):
                costs.append(("selection", *_selection(members, config, on_cpu)))
            for stage, cost, numbers in costs:
                work[stage].update(cost)
                peak[stage] = max(peak[stage], here + 8 * numbers)
            ahead -= rounds * sums.get(name, 0)
        # Rows, U unless B starts from zero, energies and spectrum (see `Decomposed`).
        columns = {layer.name: layer.n + (0 if config.from_zero else layer.m) for layer in layers}
        sigmas = {name: min(m, n) if keeps_all(config) else config.r for name, m, n, _ in layers}
        stored.append(sum(kept[name] * (4 * columns[name] + 8) + 8 * sigmas[name] for name in columns))

    adapter = 4 * shapes.budget * (1 if config.from_zero else 2)  # else PEFT subtracts the start again
    seconds = {stage: sum(flop / _rate(machine, kind) for kind, flop in cost.items()) for stage, cost in work.items()}
    reading = (sum(weights for _, weights, _ in shapes.blocks) + rest) / machine.read
    parked_bytes = waiting + (max(parked) if park != "device" else 0)
    if park != "device":  # hidden states (half of them waits twice) and covariances: there and back
        moved = len(shapes.blocks) * waiting + 2 * sum(parked)
        seconds["forward"] += moved / (BUS if park == "cpu" else machine.read)
    memory = PROCESS + max(stored) + (parked_bytes if park == "cpu" else 0)
    # A block's bytes are copied to be written, and read again for their checksum; all are read at the end.
    work_bytes, adding = sum(stored), max(stored)
    writing = 2 * work_bytes / machine.read
    if not on_cpu:  # the next block's weights are read (the last one's may not be free yet), the last one is written
        memory += 2 * max(weights for _, weights, _ in shapes.blocks) + 2 * adding
        reading, writing, adding = max(0, reading - sum(seconds.values())), writing / len(stored), 0
    seconds["forward"] += reading
    where = {stage: (0, memory + most) if on_cpu else (most, memory) for stage, most in peak.items() if seconds[stage]}
    stages = [Stage(stage, seconds[stage], *peaks) for stage, peaks in where.items()]
    factors = PROCESS + 4 * shapes.budget + 2 * adapter
    stages.append(Stage("state", writing, 0, memory + adding))
    stages.append(Stage("factors", (work_bytes + adapter) / machine.read, 0, factors))
    flops = sum(sum(cost.values()) for cost in work.values())
    return Plan(
        machine, tokens, stages, park, parked_bytes, shapes.parameters, shapes.budget, adapter, work_bytes, flops
    )


def _rate(machine: Machine, kind: str) -> float:
    """FLOP/s. QR and Cholesky (`factor`) come to a fifth of the rate of products; products with a vector (`vector`) are
    as fast as memory is read."""
    rates = {"eigen": EIGH / machine.eigen, "factor": machine.double / 5, "vector": machine.double / 32}
    return rates[kind] if kind in rates else float(getattr(machine, kind))


def _place(park: str, waiting: int, machine: Machine) -> str:
    """As `preprocess` chooses where hidden states wait."""
    if park == "auto":
        on_device = not waiting or (machine.accelerator is not None and 3 * waiting < machine.accelerator)
        park = "device" if on_device else "cpu" if 3 * waiting < machine.cpu else "disk"
    return "device" if park == "cpu" and machine.accelerator is None else park


def _kept(shapes: Shapes, config: CordaConfig) -> dict[str, int]:
    """Components of each layer on the disk: r, or with allocation what the budget gives each of the layers seen by
    then, were they alike (see `preprocess._Ranks`)."""
    layers = [layer for _, _, layers in shapes.blocks for layer in layers]
    ahead, seen, kept = sum(m + n for _, m, n, _ in layers), 0, {}
    for name, m, n, _ in layers:
        ahead, seen = ahead - m - n, seen + m + n
        k = max(config.min_rank, (shapes.budget - config.min_rank * ahead) // seen) if config.allocates else config.r
        kept[name] = min(k, m, n, config.max_rank or k)
    return kept


def _selection(layers: Sequence[Layer], config: CordaConfig, on_cpu: bool) -> tuple[dict[str, int], int]:
    """FLOP of `extremes_of` and `choose_covariance` for layers that share their input, and the float64 numbers they
    hold at once."""
    rounds, n, work, numbers = config.rounds or 1, layers[0].n, Counter[str](), 0
    by = n * n if config.orientation == "covariance" else 0
    if by:
        numbers = 2 * by  # C_λ and C
        if n <= DENSE:
            work["eigen"] += rounds * EIGVALSH * n**3
        else:
            work.update(factor=rounds * n**3, vector=rounds * LANCZOS * 2 * by)
            numbers = 5 * by + 400 * n  # the Cholesky factor, its inverse and parts of that; the Krylov basis
    for _, m, n, _ in layers if rounds > 1 else ():
        R, tall = min(m, n), m > n
        work.update(double=2 * tall * m * n * n + rounds * (2 * R * by + 2 * R * R * n))
        numbers = max(numbers, tall * (m * n + 2 * n * n), _oriented(R, n, bool(by)))
        # What is oriented, (R, n), is kept; with it M, and what `eigvalsh` or `norms` takes.
        if on_cpu:
            work.update(eigen=rounds * EIGVALSH * R**3)
            numbers = max(numbers, 2 * R * n + 3 * R * R)
        else:
            # Products in TF32, at half the rate of bfloat16; the last in float64; σ₁ by products with a vector.
            work.update(multiply=rounds * STEPS * 4 * R * R * (3 * n + R), double=rounds * 4 * R * R * n)
            work.update(vector=rounds * LANCZOS * 2 * R * n)
            numbers = max(numbers, 6 * R * n + R * R, 5 * R * n + 3 * R * R)
    return work, numbers


def _oriented(m: int, n: int, by: bool) -> int:
    """Float64 numbers in `orient`: W, W C, and of C and of the product some columns at a time."""
    return 2 * m * n + by * (m + n) * min(n, COLUMNS)


def _decomposition(layer: Layer, k: int, seen: bool, config: CordaConfig, on_cpu: bool) -> tuple[dict[str, int], int]:
    """FLOP of `decompose_layer` and `keep_components`, and the float64 numbers they hold at once."""
    _, m, n, _ = layer
    R, W, rows = min(m, n), m * n, k * n
    by = seen and config.orientation == "covariance"
    iterated = not keeps_all(config) and iterates(R, k, config.solver)
    # Beside the oriented M, (R, n): of a tall W = Q Lᵀ (but for svd, and the head on a GPU) W itself and the triangle,
    # which is oriented.
    tall = m > n and config.solver != "svd" and (on_cpu or config.mode == "kpm" or not iterated)
    M, beside = (n * n, W + n * n) if tall else (W, W)
    work = Counter(double=2 * M * n * by + 2 * tall * W * n + 2 * k * (W + n * n * seen), single=2 * W * n * seen)
    numbers = _oriented(R if tall else m, n, by) + beside - M
    if config.solver == "svd":
        work["eigen"] += SVD * R**3
        numbers = max(numbers, 4 * W + 2 * R * R)
    elif not iterated:  # two Gram matrices, and the rows not resolved; U, and for `eigh` three more of its size
        work.update(eigen=GRAM * R**3, double=5 * R * M + 2 * tall * W * n)
        numbers = max(numbers, beside + 2 * M + 4 * R * R, tall * (2 * W + 2 * n * n))
    else:  # what `_inverse_factor` holds, or the iteration: H and some b vectors
        b = block_width(R, k)
        products = 3 * R * M + 2 * R**3 if config.mode == "kpm" else 0
        work.update(double=2 * (products + R * M + 30 * R * R * b), eigen=4 * GRAM * b**3)
        inverse, iteration = M + (2 if on_cpu else 5) * R * R, R * R + 4 * b * (R + M // R)
        numbers = max(numbers, beside + M + (inverse if config.mode == "kpm" else iteration))
    # U, beside W in another dtype and its products, or C.
    return work, max(numbers, m * R + max(W + rows, (n * n + 3 * rows) * seen, (3 * W // 2 + rows) * seen))


# --- what follows ----------------------------------------------------------------------------------------------------


def check_room(plan: Plan, output: Path) -> None:
    """Raises CordaError if the disk of `output` has less room than the run takes there."""
    folder = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    finished = output.with_name(output.name + ".work").glob("*.safetensors")  # of a run that was broken off
    needed = plan.disk_bytes - sum(file.stat().st_size for file in finished)
    if free < needed:
        raise CordaError(
            f"the disk of {output} has {_size(free)} free, but {_size(needed)} are needed: {_size(plan.adapter_bytes)} "
            f"for the adapter, the rest for unfinished work beside it"
        )


def what_fits(
    model: nn.Module,
    config: CordaConfig,
    count: Callable[[int, int], Tokens],
    batch_tokens: int,
    park: str,
    machine: Machine,
) -> tuple[str, Plan] | None:
    """The first options, as few as can be, with which a run fits the machine, and its plan; None if there are none.
    `count`: the tokens of the context, by rounds and batch_tokens."""
    shapes, rounds = shapes_of(model, config), config.rounds or 1
    options: list[tuple[str, Any]] = [("park", "cpu")] * (machine.accelerator is not None) + [("park", "disk")]
    options += [("batch_tokens", 1024)] * (batch_tokens > 1024) + [("rounds", 1)] * (rounds > 1)
    for chosen in itertools.chain(*(itertools.combinations(options, n) for n in (1, 2, 3))):
        given: dict[str, Any] = {"park": park, "batch_tokens": batch_tokens, "rounds": rounds} | dict(chosen)
        tokens = count(given["rounds"], given["batch_tokens"])
        plan = init_plan(shapes, replace(config, rounds=given["rounds"]), tokens, given["park"], machine)
        if plan.fits:
            return " ".join(f"--{option} {value}" for option, value in chosen), plan
    return None


def report(plan: Plan) -> list[Table | str]:
    """What is printed of a plan."""
    on_cpu = plan.machine.accelerator is None
    table = Table()
    for column in ("stage", "time", *(() if on_cpu else ("accelerator",)), "CPU"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, seconds, accelerator, cpu in plan.stages:
        table.add_row(
            name, _time(seconds), *(_size(x) if x else "" for x in ((cpu,) if on_cpu else (accelerator, cpu)))
        )
    share = plan.adapter_parameters / plan.parameters
    waiting = "hidden states" if plan.park == "device" else "hidden states and covariances"
    return [
        f"on {plan.machine.name}",
        table,
        f"model: {plan.parameters:,} parameters",
        f"adapter: {plan.adapter_parameters:,} parameters ({share:.2%}), a file of {_size(plan.adapter_bytes)}",
        f"context: {plan.tokens.total:,} tokens; {_size(plan.parked_bytes)} of {waiting} wait (park {plan.park})",
        f"written: {_size(plan.work_bytes + plan.adapter_bytes)}; needed on the disk: {_size(plan.disk_bytes)}",
        f"time: about {_time(plan.seconds)}, for {plan.flops:.2e} floating-point operations",
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    if not seconds >= 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
