"""The contents and limits of a comparison's two charts, which html.py and pictures.py draw."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..compare.frontier import CurvePoint, Point, best_rate, done_runs, learning_curve, lower_hull, mean_curve
from .text import rate_text


def frontier_edge(found: Sequence[list[Point]]) -> float:
    """The task loss up to which a picture shows points: all lower hulls and a quarter more, and as far above the median
    as one and a half times what lies below it. One run at a rate far too high would press all others into a corner."""
    hulls = [p.loss for ps in found for p in lower_hull(ps)] or [0.0]
    middle, lowest = median([p.loss for ps in found for p in ps] or [0.0]), min(hulls)
    return max(max(hulls) + (max(hulls) - lowest) / 4, middle + 1.5 * (middle - lowest))


def curves_edge(means: Sequence[list[CurvePoint]]) -> float:
    """The held-out loss up to which a picture shows learning curves: as far above the median of where they begin as
    one and a half times what they fall from there. One that begins with a broken model would press all others flat."""
    begin = median([mean[0].loss for mean in means if mean] or [0.0])
    return begin + 1.5 * (begin - min((p.loss for mean in means for p in mean), default=0.0))


def best_curves(comparison: dict[str, Any], method: str) -> tuple[str, list[CurvePoint], list[list[CurvePoint]]]:
    """A method's best rate, as text, the mean of its learning curves there, and the seeds' own at the same steps. The
    base model's step 0 is left out: from there all fall so steeply that no difference would show."""
    best = best_rate(comparison, method)
    if best is None:
        return "", [], []
    curves = [learning_curve(comparison, run) for run in done_runs(comparison, method, best.rate)]
    mean = [point for point in mean_curve(curves) if point.step > 0]
    steps = {point.step for point in mean}
    return rate_text(best.rate), mean, [[point for point in curve if point.step in steps] for curve in curves]
