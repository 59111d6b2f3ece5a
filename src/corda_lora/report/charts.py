"""The contents and limits of a comparison's two charts, which html.py and pictures.py draw."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..compare.frontier import CurvePoint, Point, best_setting, done_runs, learning_curve, lower_hull, mean_curve
from .text import setting_text


def frontier_edge(methods: Sequence[list[Point]]) -> float:
    """The highest task loss that the frontier chart shows, given the points of each method.

    The chart shows all lower hulls and a quarter of their range more, and at least as far above the median loss as 1.5
    times the distance from there to the lowest. Without a limit, one run at a far too high rate would squeeze all other
    points into a corner."""
    hulls = [p.loss for points in methods for p in lower_hull(points)] or [0.0]
    middle, lowest = median([p.loss for points in methods for p in points] or [0.0]), min(hulls)
    return max(max(hulls) + (max(hulls) - lowest) / 4, middle + 1.5 * (middle - lowest))


def curves_edge(means: Sequence[list[CurvePoint]]) -> float:
    """The highest held-out loss that the chart of learning curves shows, given the mean curve of each method.

    It lies above the median loss at the curves' beginning, by 1.5 times the distance from there to the lowest loss.
    Without a limit, a curve that begins with a broken model would flatten all others."""
    begin = median([mean[0].loss for mean in means if mean] or [0.0])
    return begin + 1.5 * (begin - min((p.loss for mean in means for p in mean), default=0.0))


def best_curves(comparison: dict[str, Any], method: str) -> tuple[str, list[CurvePoint], list[list[CurvePoint]]]:
    """A method's best setting as text, the mean of its learning curves there, and each seed's curve at the same
    steps.

    Step 0, the base model, is left out: all curves fall so steeply from it that their differences would not show."""
    best = best_setting(comparison, method)
    if best is None:
        return "", [], []
    curves = [learning_curve(comparison, run) for run in done_runs(comparison, method, best.setting)]
    mean = [point for point in mean_curve(curves) if point.step > 0]
    steps = {point.step for point in mean}
    return setting_text(best.setting), mean, [[point for point in curve if point.step in steps] for curve in curves]
