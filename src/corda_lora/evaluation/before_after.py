"""What a training gained and lost: each measure before and after, on the same samples, with an interval.

A change is measurable if its 95 % interval leaves out 0. The interval is a paired bootstrap: samples are drawn with
replacement, each with its value before and after, and the change is computed anew (Efron & Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13: percentiles). It says what other samples of the same kind would have shown. It does
not say what another seed of the training would have given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .measures import MEASURES, Measure
from .tasks.registry import TASKS

RESAMPLES = 10_000


@dataclass(frozen=True)
class Change:
    """A measure of one data set before and after.

    Attributes:
        kind: of data, or "tasks".
        data: the name of the data or of the task.
        measure: the name of the measure, which says how it is printed and which values are better.
        samples: their number.
        before, after: its values.
        low, high: the 95 % interval of after − before.
    """

    kind: str
    data: str
    measure: str
    samples: int
    before: float
    after: float
    low: float
    high: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def sign(self) -> int:
        """1 where more is better, −1 where less is."""
        return 1 if MEASURES[self.measure].better == "high" else -1

    @property
    def telling(self) -> bool:
        """Whether there was anything to lose or gain: a score of 0 before and after shows nothing."""
        return self.sign < 0 or self.before != 0 or self.after != 0

    @property
    def outcome(self) -> str:
        """ "gained", "lost", or "" if no change is measurable."""
        if not math.isfinite(self.after):
            return "lost"
        gains = sorted((self.sign * self.low, self.sign * self.high))
        return "gained" if gains[0] > 0 else "lost" if gains[1] < 0 else ""

    @property
    def hidden_loss(self) -> float:
        """The largest loss that the interval does not leave out, in the measure's unit; 0 if it leaves out any."""
        return max(-min(self.sign * self.low, self.sign * self.high), 0.0)


def changes(scores: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Change]:
    """The change of each measure of each data set, where better values are known and both models were measured.

    Args:
        scores: what `evaluate` fills.
    """
    found = []
    for (kind, data), sides in scores.items():
        if not {"base", "tuned"} <= sides.keys():
            continue
        if kind == "tasks":
            task, scored = TASKS[data], (sides["base"], sides["tuned"])
            rated = ~np.isnan([side.values for side in scored]).any(0)  # an answer may have got no rating
            values = [tuple(np.array(x)[rated] if x else () for x in (side.values, side.labels)) for side in scored]
            if rated.any():
                found.append(_change(kind, data, task.metric, task.mean, *values))
            continue
        for name, sampled in sides["base"].items():
            measure = MEASURES[name]
            if measure.better and not measure.against_base:
                values = [(side.totals, side.counts) for side in (sampled, sides["tuned"][name])]
                found.append(_change(kind, data, name, partial(_mean, measure), *values))
    return found


def _mean(measure: Measure, totals: np.ndarray, counts: np.ndarray) -> float:
    return measure.finish(float(totals.sum() / counts.sum()))


def _change(kind: str, data: str, measure: str, mean: Callable[[Any, Any], float], *given: Sequence[Any]) -> Change:
    """`given`: what `mean` takes of each sample, before and after."""
    sides = [[np.asarray(values, float) for values in side] for side in given]
    samples = len(sides[0][0])
    of_all = [mean(*side) for side in sides]
    random = np.random.default_rng(0)
    differences = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = random.integers(samples, size=samples)
        first, second = (mean(*(values[drawn] if len(values) else values for values in side)) for side in sides)
        differences[i] = second - first
    low, high = np.quantile(differences, [0.025, 0.975])
    return Change(kind, data, measure, samples, of_all[0], of_all[1], float(low), float(high))
