"""Memory, time and traffic of preparing and training on several GPUs, from shapes alone.

Preparation is what `preprocess.plan` counts for one process, shared out as `preprocess.share` does: the context's
batches to all processes, a whole block at a time to each. Training is a step of the adapter over frozen weights, with
gradient checkpointing and the same number of tokens on each GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..config import CordaConfig, CordaError
from ..preprocess.costs import Layer, group_seconds, groups_of
from ..preprocess.machine import Machine
from ..preprocess.plan import CONTEXT, Plan, Shapes, Stage, Tokens, in_4_bits, init_plan

# Bytes/s of what a GPU sends, assumed: a third of what an H100's NVLink is sold as, and half of a 400 Gbit/s adapter
# for each GPU.
NVLINK = 1.5e11
NETWORK = 2.5e10
# The share of the rate of large products that a training step reaches, measured on a 7B model:
# benchmarks/results/keep_cost_train_2026-11-29_h200.md
TRAINED = 0.5
ADAM = 16  # bytes of a trained parameter: itself, its gradient and two moments, in float32
LOGIT = 10  # bytes of a logit: in half precision, in float32, and its gradient


class SharedStage(NamedTuple):
    """A stage on several GPUs: its seconds, the peak bytes on a GPU and in a host's memory, and the bytes that a GPU
    sends. nan where nothing is counted."""

    name: str
    seconds: float
    accelerator: float
    host: float
    traffic: float


@dataclass(frozen=True)
class SharedPlan:
    """
    Attributes:
        gpus: of all hosts together.
        preparation: one stage after the other.
        steps: a step of training with each engine.
        step_tokens: on each GPU.
        link: bytes/s that a GPU sends, assumed.
    """

    machine: Machine
    gpus: int
    hosts: int
    tokens: Tokens
    preparation: list[SharedStage]
    steps: list[SharedStage]
    step_tokens: int
    link: float

    @property
    def seconds(self) -> float:
        """Of the preparation."""
        return sum(stage.seconds for stage in self.preparation)

    def fits(self, stage: SharedStage) -> bool:
        accelerator = self.machine.accelerator or math.inf
        return not (stage.accelerator + CONTEXT > accelerator or stage.host > self.machine.cpu)


def shared_plan(
    shapes: Shapes,
    config: CordaConfig,
    tokens: Tokens,
    machine: Machine,
    gpus: int,
    hosts: int = 1,
    park: str = "auto",
    step_tokens: int = 4096,
    abilities: int = 1,
) -> SharedPlan:
    """What `corda init` and a step of `corda train` take on `gpus` GPUs of `hosts` hosts.

    Args:
        abilities: see `init_plan`.

    Raises CordaError if the machine has no accelerator, the hosts have not the same number of GPUs, or there are fewer
    layers or batches than GPUs.
    """
    if machine.accelerator is None:
        raise CordaError(
            "--gpus plans for GPUs, and this machine has none: describe one with --gpu, such as --gpu 80GB"
        )
    if gpus % hosts:
        raise CordaError(f"{hosts} hosts cannot have {gpus} GPUs in all with as many each")
    layers, batches = sum(len(layers) for _, _, layers in shapes.blocks), tokens.batches if config.reads_context else 0
    if gpus > layers:
        raise CordaError(f"{gpus} processes, one on each GPU, cannot share {layers} layers: --gpus {layers} at most")
    if 0 < batches < gpus:
        raise CordaError(
            f"{gpus} processes, one on each GPU, cannot share a context of {batches} "
            f"batch{'es' if batches > 1 else ''}: --gpus {batches} at most, or lower --batch_tokens"
        )
    link = NVLINK if hosts == 1 else NETWORK
    preparation = _preparation(shapes, config, tokens, machine, gpus, hosts, park, link, abilities)
    steps = _steps(shapes, config, machine, gpus, step_tokens, link)
    return SharedPlan(machine, gpus, hosts, tokens, preparation, steps, step_tokens, link)


# --- preparation -----------------------------------------------------------------------------------------------------


def _preparation(
    shapes: Shapes,
    config: CordaConfig,
    tokens: Tokens,
    machine: Machine,
    gpus: int,
    hosts: int,
    park: str,
    link: float,
    abilities: int,
) -> list[SharedStage]:
    rounds, tokens = max(config.rounds or 1, abilities), tokens if config.reads_context else Tokens()
    # The batches of a process follow one another: they are of few rounds, or of few abilities.
    mine = min(rounds, -(-rounds // gpus) + 1) if gpus > 1 else rounds
    part = Tokens(-(-tokens.total // gpus), tokens.batch, -(-tokens.pairs // gpus))
    few = replace(config, rounds=min(mine, config.rounds or 1))
    collecting = _fitting(shapes, few, part, machine, park, min(mine, abilities))
    deciding = _fitting(shapes, config, part, machine, park, abilities)
    # Bytes, of one round or of one ability.
    sums = [_sums(layers, config) if tokens.total else 0 for _, _, layers in shapes.blocks]
    sent = (rounds if gpus > 1 else 0) * sum(sums) * (gpus - 1) / gpus
    if not shapes.loaded:  # each process reads a part of the weights, which then pass through all of them
        sent += deciding.read_bytes * (gpus - 1) / gpus
    share = busy_share(shapes, config, machine, gpus, abilities)
    own = {"forward": Stage("forward", 0, 0, deciding.peaks[1])}  # of this process, if it decomposed all layers
    own |= {stage.name: stage for stage in deciding.stages}
    own |= {stage.name: stage for stage in collecting.stages if stage.name == "forward"}
    seconds = {name: stage.seconds for name, stage in own.items()}
    for name in {"selection", "decomposition"} & seconds.keys():
        seconds[name] *= share
    seconds["forward"] = max(0, seconds["forward"] - collecting.waits) + sent / link
    # Each host reads its part of the weights while its processes compute, or all of them.
    computing = sum(taken for name, taken in seconds.items() if name not in ("state", "factors"))
    read = deciding.read_bytes if shapes.loaded else deciding.read_bytes / hosts
    seconds["forward"] += max(0, read / machine.read - computing)
    memory = {name: stage.cpu * (gpus // hosts) for name, stage in own.items()}
    # The sums of a process's own block wait for it, of all rounds. The first process writes the output.
    memory["forward"] += (rounds - mine) * max(sums) * (gpus // hosts)
    memory["factors"] = own["factors"].cpu
    traffic = dict.fromkeys(own, 0.0) | {"forward": sent}
    return [
        SharedStage(name, seconds[name], own[name].accelerator, memory[name], traffic[name])
        for name in own
        if seconds[name]
    ]


def _fitting(shapes: Shapes, config: CordaConfig, tokens: Tokens, machine: Machine, park: str, abilities: int) -> Plan:
    """The plan of one process; hidden states and covariances wait in the CPU's memory where they do not fit the GPU."""
    plan = init_plan(shapes, config, tokens, park, machine, abilities)
    if park == "auto" and plan.peaks[0] + CONTEXT > (machine.accelerator or math.inf):
        return init_plan(shapes, config, tokens, "cpu", machine, abilities)
    return plan


def _sums(layers: Sequence[Layer], config: CordaConfig) -> int:
    """Bytes of a block's C, and D if the context goes backward, in float32."""
    inputs = sum(members[0].n ** 2 for members in groups_of(layers).values() if members[0].leader)
    return 4 * (inputs + config.runs_back * sum(layer.m**2 for layer in layers if layer.leader))


def busy_share(shapes: Shapes, config: CordaConfig, machine: Machine, processes: int, abilities: int = 1) -> float:
    """The time in which several processes decompose all layers, of the time that one takes: as `Share.owner` shares
    them out."""
    blocks = [
        [group_seconds(members, config, False, machine, abilities) for members in groups_of(layers).values()]
        for _, _, layers in shapes.blocks
        if layers
    ]
    whole, seconds = len(blocks) - len(blocks) % processes, 0.0
    for i in range(0, whole, processes):
        seconds += max(map(sum, blocks[i : i + processes]))
    loads = [0.0] * processes
    for group in (group for block in blocks[whole:] for group in block):
        loads[loads.index(min(loads))] += group
    return (seconds + max(loads)) / sum(map(sum, blocks))


# --- training --------------------------------------------------------------------------------------------------------


def _steps(
    shapes: Shapes, config: CordaConfig, machine: Machine, gpus: int, tokens: int, link: float
) -> list[SharedStage]:
    """A step under each engine: forward, forward once more and backward to the inputs. Weights come while blocks
    compute."""
    item = shapes.dtype.itemsize
    blocks = [parameters * item for parameters, _, _ in shapes.blocks]
    weights = shapes.parameters * item
    if config.quantization:  # the model that is trained is the base that `init` writes
        packed = [in_4_bits(parameters, config) for parameters, _, _ in shapes.blocks]
        weights, blocks = weights - sum(blocks) + sum(packed), packed
    elif shapes.loaded:
        weights, blocks = shapes.loaded, [size for _, size, _ in shapes.blocks]
    block = max(blocks)
    widths = max(sum(m + n for _, m, n, _ in layers) for _, _, layers in shapes.blocks)
    # Each block's input, all of one block, and the logits.
    states = len(shapes.blocks) * shapes.hidden * item + 24 * shapes.hidden + 2 * widths
    logits = LOGIT * shapes.head // max(1, shapes.hidden)
    activations = tokens * (states + logits)
    trained = ADAM * (shapes.budget + shapes.saved[0])
    compute = 6 * shapes.parameters * tokens / (TRAINED * machine.multiply)
    others = (gpus - 1) / gpus
    gradients = 2 * 4 * (shapes.budget + shapes.saved[0]) * others  # all-reduce: each GPU sends them nearly twice
    gathered = 2 * weights * others  # for forward and for backward
    whole = weights + trained + activations
    # Of the next block, too; and the head with the embeddings, which are gathered throughout.
    sharded = (weights + trained) / gpus + 2 * block + 2 * shapes.head * item + activations
    rows = [("DDP", whole, gradients), ("FSDP 2", sharded, gathered + gradients / 2)]
    # DeepSpeed keeps up to a billion gathered numbers.
    rows.append(("ZeRO-3", sharded + max(0, 1e9 * item - 2 * block), gathered + gradients / 2))
    return [SharedStage(name, max(compute, sent / link), memory, math.nan, sent) for name, memory, sent in rows]
