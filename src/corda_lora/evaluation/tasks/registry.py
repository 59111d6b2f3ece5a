"""Benchmarks by name: `corda eval --tasks gsm8k,nq_open`.

A task is a function that scores a model, sample by sample, under one `@task(...)`. It imports heavy libraries inside:
`corda --help` reads the names here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...config import CordaError, EvalConfig
from ..measures import MEASURES, Measure

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class Scores:
    """What a model scored on the samples of a task, in the order of the samples.

    Attributes:
        values: one for each sample, such as 1.0 for a right answer.
        details: one for each sample, ready for JSON: what was asked, answered and expected.
        labels: one for each sample, where the metric is no mean of the values: what they should be.
        unfinished: what `Task.finish` takes, if it can give values to samples that have none.
    """

    values: list[float]
    details: list[dict[str, Any]]
    labels: list[float] = field(default_factory=list)
    unfinished: str = ""


def mean(values: Sequence[float] | ndarray, labels: Sequence[float] | ndarray) -> float:
    """The mean of the samples' values."""
    return fmean(values)


def writes(model: Any, tokenizer: Any, config: EvalConfig) -> None:
    """What a task requires that has the model write. Raises CordaError if it is no causal language model."""
    from ...models.targets import require_causal

    require_causal(model)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: what `--tasks` takes.
        metric: the name of its number: the key in `evaluate`'s results, and a name in `MEASURES`.
        run: (model, tokenizer, config) → `Scores`. The model is in eval mode on its device, with its adapter on or off.
        meaning: what is asked, and how it is scored, in a line.
        mean: (values, labels) of some samples → the metric, where that is no mean of the values.
        check: raises CordaError if the task cannot run with this config (data missing, or with other columns). It is
            called before the model is loaded. It may return the samples: a comparison goes on with the same ones alone.
        requires: (model, tokenizer, config); raises CordaError if the model cannot be asked. It is called before
            anything is measured.
        finish: (`Scores.unfinished`, tokenizer, config) → the scores with what was missing, without the model; None if
            it is missing still.
    """

    name: str
    metric: str
    run: Callable[[Any, Any, EvalConfig], Scores]
    meaning: str
    mean: Callable[[Any, Any], float] = mean
    check: Callable[[EvalConfig], Any] = lambda config: None
    requires: Callable[[Any, Any, EvalConfig], None] = writes
    finish: Callable[[str, Any, EvalConfig], Scores | None] = lambda unfinished, tokenizer, config: None

    @property
    def measure(self) -> Measure:
        return MEASURES[self.metric]

    def result(self, scored: Scores) -> dict[str, float]:
        """The metric, unless it is NaN (no answer was judged), and the number of samples."""
        value = self.mean(scored.values, scored.labels)
        return ({} if math.isnan(value) else {self.metric: value}) | {"samples": len(scored.values)}


TASKS: dict[str, Task] = {}


def task(name: str, metric: str, meaning: str, **fields: Any) -> Callable[[Any], Any]:
    """Enter the function below as a task. See `Task` for the arguments."""

    def enter(run: Callable[[Any, Any, EvalConfig], Scores]) -> Callable[[Any, Any, EvalConfig], Scores]:
        TASKS[name] = Task(name, metric, run, meaning, **fields)
        return run

    return enter


def named_tasks(config: EvalConfig) -> list[Task]:
    """The tasks that a config names. Raises CordaError for an unknown name, or a `data_dir` that is no directory."""
    for name in config.tasks:
        if name not in TASKS:
            nearest = difflib.get_close_matches(name.lower(), TASKS, n=3, cutoff=0.4) or sorted(TASKS)
            raise CordaError(f"there is no task {name!r}; nearest names: {', '.join(nearest)}")
    if config.tasks and config.data_dir is not None and not config.data_dir.is_dir():
        raise CordaError(f"there is no directory {config.data_dir} (--data_dir)")
    return [TASKS[name] for name in dict.fromkeys(config.tasks)]


def checked_tasks(config: EvalConfig) -> list[Task]:
    """The tasks that a config names. Raises CordaError as `named_tasks` and the tasks' checks do."""
    tasks = named_tasks(config)
    for found in tasks:
        found.check(config)
    return tasks
