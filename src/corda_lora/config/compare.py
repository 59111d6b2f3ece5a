"""What is compared, and on what: `corda compare`."""

import re
from dataclasses import dataclass, field
from typing import Any

from .data import DataConfig
from .eval import EvalConfig
from .train import TrainConfig
from .values import CordaError, Count, Positive, Range, check_fields, check_patterns, short


@dataclass
class MethodConfig:
    """One entry of a comparison.

    Args:
        method: the name of a method (see `corda_lora.methods.METHODS`). Default: the name of the entry.
        learning_rates: the learning rates to sweep, at least two (one is enough with a `sweep`). Default: the method's
            own.
        options: hyperparameters of the method that differ from its defaults, such as {ratio: 4} for lora+. Our methods
            take any options of `corda init`.
        sweep: one of the method's options with the values to run, such as {keep: [3, 10, 30]}. Every value is run at
            every learning rate, and the frontier is over both.
        all_seeds: run every rate (and value) with every seed, not only those around the best. This gives an interval of
            drift at equal loss all along the frontier.
    """

    method: str = ""
    learning_rates: list[Positive] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    all_seeds: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def swept_option(self) -> str:
        """The option that `sweep` names; "" without one."""
        return next(iter(self.sweep), "")

    @property
    def swept_values(self) -> list[Any]:
        """Its values in ascending order, each once."""
        return sorted({value for values in self.sweep.values() for value in values})


def _check_sweep(name: str, entry: MethodConfig) -> None:
    """Raises CordaError if an entry's sweep is none of one option over several values."""
    if len(entry.sweep) > 1:
        raise CordaError(f"{name} sweeps {', '.join(entry.sweep)}: beside the learning rate, one option can be swept")
    for option, values in entry.sweep.items():
        if option in entry.options:
            raise CordaError(f"{name} gives {option} under options and under sweep: leave one of them out")
        numbers = all(isinstance(value, (int, float)) and value in Range(ge=-1e30, le=1e30) for value in values)
        if not numbers and not all(isinstance(value, str) and "/" not in value for value in values):
            raise CordaError(f"{name} sweeps {option} over {short(values)}, but must over numbers, or over words")
        if len(set(values)) < 2:
            raise CordaError(f"{name} sweeps {option} over one value: give at least two, or set it under options")


@dataclass
class CompareConfig:
    """What is compared, and on what. Everything but the methods is the same for all runs.

    Args:
        methods: the entries to compare: a list of names of methods, or a mapping of names of your choice to options of
            MethodConfig (nothing for the defaults).
        data: samples of the task to learn. Methods that analyse a task before they train (ipm, EVA, LoRA-GA) analyse
            these.
        context: samples of the ability to keep, for methods that analyse it before they train (kpm, LoRA-Null).
        context_samples: the number of samples that such a method analyses.
        eval: what is measured of every run, and once of the base model: see EvalConfig. The first `learn` is the task.
        train: the training of every run. The comparison sets `learning_rate`, `seed` and `checkpoints`.
        r: the rank of the adapters. A method without ranks gets as many parameters.
        lora_alpha: adapters are scaled by lora_alpha / r. Default: r.
        target_modules: the layers to adapt, as in PEFT.
        modules_to_save: further modules that methods with an adapter train whole, as in PEFT, such as the connector of
            a vision-language model.
        seeds: the number of seeds. Every learning rate is run with the first seed. The others are run where they count:
            for each method's best rate and its two neighbours, and for the two rates between which the method reaches
            the best loss of `lora` (of the first entry, if `lora` is not compared).
        curve_points: how often a run measures the task's held-out loss, the end included.
        curve_samples: the number of samples of the first `learn` data that this takes.
    """

    methods: list[str] | dict[str, MethodConfig | None]
    data: str | DataConfig
    eval: EvalConfig
    context: str | DataConfig | None = None
    context_samples: Count = 256
    train: TrainConfig = field(default_factory=TrainConfig)
    r: Count = 16
    lora_alpha: Positive | None = None
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    seeds: Count = 3
    curve_points: Count = 10
    curve_samples: Count = 128

    def __post_init__(self) -> None:
        check_fields(self)
        check_patterns(self, "target_modules")
        entries = dict.fromkeys(self.methods) if isinstance(self.methods, list) else self.methods
        self.entries = {name: entry or MethodConfig() for name, entry in entries.items()}
        for name, entry in self.entries.items():
            if not name or re.search(r"^\.|[/\0]", name) or len(name.encode()) > 200:
                raise CordaError(f"{short(name)} cannot be an entry's name: a directory is called so")
            entry.method = entry.method or name
            _check_sweep(name, entry)
            for what, values in (("learning rates", entry.learning_rates), *entry.sweep.items()):
                if len({value if isinstance(value, str) else f"{value:g}" for value in values}) < len(set(values)):
                    raise CordaError(f"two {what} of {name} have the same first six digits: runs are called by these")
            if len(set(entry.learning_rates)) == 1 and not entry.sweep:
                raise CordaError(
                    f"{name} has one learning rate ({entry.learning_rates[0]:g}): which method wins depends on the "
                    "rate, so each is compared over several; give at least two, better four"
                )
        if not self.entries:
            raise CordaError("there is no method to compare: name some under `methods`")
        if self.train.early_stopping:
            raise CordaError("all runs of a comparison take the same number of steps: leave early_stopping out")
        if not self.eval.data("learn"):
            raise CordaError(
                "nothing says how well the task was learned: give held-out samples of it under eval: learn"
            )
