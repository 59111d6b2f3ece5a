"""What a comparison takes, from its recipe and the model's config.json: for `corda plan RECIPE`.

Neither data on the hub nor weights are read. A sample of such data counts as max_length tokens.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import CompareConfig, CordaConfig, DataConfig, ModelConfig
from ..data.samples import load_samples
from ..methods.keeping import contexts_of
from ..methods.registry import corda_config
from ..preprocess.machine import Machine
from ..preprocess.plan import CONTEXT, Plan, init_plan, planned_tokens, shapes_of
from ..training.plan import ADAM
from .comparison import Comparison
from .runner import check_methods
from .schedule import Job, count_runs, start_of


class EntryPlan(NamedTuple):
    """What an entry takes; None where nothing says so.

    Attributes:
        runs: their number, about: which are run with further seeds depends on their results.
        start_seconds, start_bytes, disk_bytes: of the preparations that its runs share, if they are ours: time of all,
            memory of the largest beside the model's, and size of all on the disk.
        train_bytes: memory of the weights, and of what is trained with its gradients and moments. Activations come on
            top.
        run_seconds: a run's operations at the rate of large products: what it takes at least.
    """

    name: str
    runs: int
    start_seconds: float | None
    start_bytes: float | None
    disk_bytes: int | None
    train_bytes: float
    run_seconds: float | None


@dataclass(frozen=True)
class ComparisonPlan:
    """
    Attributes:
        steps: of a run; None if nothing says how many samples the data has.
        memory: the machine's, where a run computes.
    """

    machine: Machine
    parameters: int
    weights: int
    steps: int | None
    entries: list[EntryPlan]

    @property
    def memory(self) -> float:
        accelerator = self.machine.accelerator
        return self.machine.cpu if accelerator is None else accelerator - CONTEXT

    @property
    def seconds(self) -> float | None:
        """Of all starts and runs, one after the other; None if a run's are not known."""
        if any(entry.run_seconds is None for entry in self.entries):
            return None
        return sum((e.start_seconds or 0) + e.runs * (e.run_seconds or 0) for e in self.entries)

    @property
    def too_large(self) -> list[str]:
        """The entries that do not fit the machine."""
        return [e.name for e in self.entries if max(e.train_bytes, self.weights + (e.start_bytes or 0)) > self.memory]


def plan_comparison(model: Any, source: ModelConfig, recipe: CompareConfig, machine: Machine) -> ComparisonPlan:
    """
    Args:
        model: without its weights (see `preprocess.plan.planned_model`).

    Raises CordaError if the recipe names a method or an option that does not exist, or its layers are not the model's.
    """
    check_methods(recipe)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    common: dict[str, Any] = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "target_modules": recipe.target_modules}
    shapes = shapes_of(model, CordaConfig(**common, modules_to_save=recipe.modules_to_save))
    comparison = Comparison(source, recipe, Path())
    data = comparison.learn
    samples = _count(data)
    steps = recipe.train.max_steps
    if steps is None and samples is not None:
        steps = math.ceil(recipe.train.epochs * samples / recipe.train.batch_size)
    tokens = recipe.train.batch_size * data.max_length  # of a step, at most
    entries = []
    for name, scheduled in comparison.entries.items():
        entry = recipe.entries[name]
        whole = entry.method == "full"
        # Forward, backward to the inputs, backward to the weights; checkpointing runs forward once more.
        passes = 2 + whole + recipe.train.gradient_checkpointing
        seconds = None if steps is None else steps * tokens * 2 * parameters * passes / machine.multiply
        jobs = dict.fromkeys(start_of(scheduled, Job(name, swept=value)) for value in scheduled.swept or [()])
        starts = [_start(model, comparison, job, common, machine) for job in jobs]
        entries.append(
            EntryPlan(
                name,
                count_runs({name: scheduled}, recipe.seeds, {}),
                *_of_starts([start for start in starts if start is not None], machine),
                parameters * ADAM if whole else weights + (shapes.budget + shapes.saved[0]) * ADAM,
                seconds,
            )
        )
    return ComparisonPlan(machine, parameters, weights, steps, entries)


def _start(model: Any, comparison: Comparison, job: Job, common: dict[str, Any], machine: Machine) -> Plan | None:
    """The start that a preparation makes; None if its method is another's."""
    entry, options, source = comparison.recipe.entries[job.entry], comparison.options(job), comparison.source
    config = corda_config(entry.method, {"modules_to_save": comparison.recipe.modules_to_save} | options, **common)
    if config is None:
        return None
    shown = [
        data if Path(data.data).exists() else replace(data, data="") for data in _shown(comparison, config, options)
    ]
    read = planned_tokens(source, shown, config.rounds or 1, 4096, model.config.is_encoder_decoder)
    return init_plan(model, config, read, "auto", machine, len(shown))


def _shown(comparison: Comparison, config: CordaConfig, options: Mapping[str, Any]) -> Sequence[DataConfig]:
    """What a start is shown, as `methods.corda` chooses it: a context for each ability."""
    samples = options.get("samples") or comparison.recipe.context_samples
    if contexts := options.get("contexts"):
        return contexts_of(contexts, samples)
    if context := options.get("context"):
        return [DataConfig(context, samples=samples)]
    of_recipe = comparison.learn if config.mode == "ipm" else comparison.keep or comparison.learn
    return [replace(of_recipe, samples=samples)]


def _of_starts(plans: Sequence[Plan], machine: Machine) -> tuple[float | None, float | None, int | None]:
    if not plans:
        return None, None, None
    most = max(plan.peaks[machine.accelerator is None] for plan in plans)
    return sum(plan.seconds for plan in plans), most, sum(plan.disk_bytes for plan in plans)


def _count(data: DataConfig) -> int | None:
    """The number of samples: of a file, they are counted; on the hub, it is what a slice such as train[:1000] says."""
    if Path(data.data).exists():
        return len(load_samples(data))
    part = re.fullmatch(r"\w+\[(\d*):(\d+)\]", data.rows)
    rows = int(part[2]) - int(part[1] or 0) if part else None
    return min((n for n in (rows, data.samples) if n is not None), default=None)
