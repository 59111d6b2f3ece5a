"""Drift against task loss: methods compared by what they forget where they have learned the same.

One learning rate says little: a higher one learns more and drifts more. So each method is run at several, each rate
gives a point (task loss, drift), and methods are compared at equal task loss, between the points of each. This file is
arithmetic on the dictionary that `corda compare` writes (`comparison`, see `report.write_report`): no model, no torch.

Three choices:

- Drift counts in its logarithm: means over seeds, lines between points, intervals. It spans three orders of magnitude,
  methods are compared by ratios, and a method's log drift is nearer to a line against its task loss than its drift is:
  predicting a rate of the hull from its two neighbours errs by 10 % so, by 11 % along a line in drift itself; by 29 and
  39 % where drift more than doubles between these (medians over the 68 and 17 such triples of drift on nq_test in
  benchmarks/results: keep_and_learn, learn_fast, both also at rank 8, and learn_fast_mbpp).
- The lower hull joins the points that no other point of the method beats in both. It is not the convex hull, whose
  chords pass under measured points: LoRA's log drift bends the other way, so a chord would promise a drift that the
  runs between its ends have refuted, the lower the more extreme the rates that were tried.
- Nothing is said outside of the losses a method reached, and only runs that are done count.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.measures import KEPT, MEASURES

FLOOR = 1e-7  # drift below this is rounding, and has no useful logarithm
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 1 to 10 degrees

Ability = tuple[str, str]  # ("keep" or "text", the data's name)


class Estimate(NamedTuple):
    """A value and its 95 % t-interval over seeds; `low` and `high` are None if it rests on one seed."""

    value: float
    low: float | None
    high: float | None
    seeds: int


class Point(NamedTuple):
    """A method at one learning rate: means over seeds, and each seed's own (task loss, log drift)."""

    rate: float
    loss: float
    log_drift: float
    seeds: dict[int, tuple[float, float]]


class Best(NamedTuple):
    rate: float
    loss: Estimate
    note: str  # what to know before trusting it: "" if nothing


class Ratios(NamedTuple):
    """How many times less one method drifts than another, over the task losses that both reach."""

    loss: list[float]  # a uniform grid over that range
    ratio: list[Estimate]
    share: float  # of that range, where the ratio is at least the factor asked for


class CurvePoint(NamedTuple):
    step: float
    seconds: float
    loss: float


class Reach(NamedTuple):
    """Steps and seconds (with the preparation) to a task loss; `reached` of the `seeds` runs got there."""

    steps: Estimate | None
    seconds: Estimate | None
    reached: int
    seeds: int


# --- what the runs say


def task(comparison: dict[str, Any]) -> str:
    """The name of the data to learn: the first, if there are several."""
    return next(iter(comparison["base"]["learn"]))


def abilities(comparison: dict[str, Any]) -> list[Ability]:
    """Everything whose drift was measured in some run: data to keep first, then running text."""
    results = [run["results"] for run in comparison["runs"] if is_done(run)]
    return list(
        dict.fromkeys(
            (kind, name)
            for kind in KEPT
            for result in results
            for name, numbers in result.get(kind, {}).items()
            if is_finite(numbers.get("drift"))
        )
    )


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def is_done(run: dict[str, Any]) -> bool:
    """Whether a run counts: it says so, and its task loss is a number."""
    return run["status"] == "done" and is_finite(task_loss(run))


def status(run: dict[str, Any]) -> str:
    """A run's status; a run that ended with a task loss that is no number has diverged, whatever it says."""
    return "diverged" if run["status"] == "done" and not is_done(run) else run["status"]


def task_loss(run: dict[str, Any]) -> float:
    return next(iter(run["results"]["learn"].values()))["loss"]


def done_runs(comparison: dict[str, Any], method: str, rate: float | None = None) -> list[dict[str, Any]]:
    """A method's runs that count, at one learning rate or at all."""
    runs = [run for run in comparison["runs"] if run["method"] == method and is_done(run)]
    return [run for run in runs if rate is None or run["learning_rate"] == rate]


def mean_interval(values: Sequence[float], center: float | None = None) -> Estimate:
    """The mean over seeds and its 95 % interval, t·s/√n on each side (around `center`, if given)."""
    n = len(values)
    mean = float(np.mean(values)) if center is None else center
    if n < 2:
        return Estimate(mean, None, None, n)
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t."""
    return T975[degrees - 1] if degrees <= len(T975) else 1.96 + 2.372 / degrees + 2.823 / degrees**2


def exponential(log: Estimate) -> Estimate:
    """From the logarithm's interval to the value's."""
    low, high = (None if x is None else math.exp(x) for x in log[1:3])
    return Estimate(math.exp(log.value), low, high, log.seeds)


# --- drift at equal task loss


def points(comparison: dict[str, Any], method: str, ability: Ability) -> list[Point]:
    """A point for each learning rate of a method, rates ascending: mean task loss and mean log drift over seeds."""
    kind, name = ability
    by_rate: dict[float, dict[int, tuple[float, float]]] = {}
    for run in done_runs(comparison, method):
        drift = run["results"].get(kind, {}).get(name, {}).get("drift")
        if is_finite(drift):
            seeds = by_rate.setdefault(run["learning_rate"], {})
            seeds[run["seed"]] = (task_loss(run), math.log(max(drift, FLOOR)))
    found = []
    for rate, seeds in sorted(by_rate.items()):
        losses, log_drifts = zip(*seeds.values())
        found.append(Point(rate, float(np.mean(losses)), float(np.mean(log_drifts)), seeds))
    return found


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both task loss and drift: loss ascending, drift descending.

    Straight lines in (task loss, log drift) join neighbours; see the top of the file for why it is not convex.
    """
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.loss, p.log_drift)):
        if not hull or point.log_drift < hull[-1].log_drift:
            hull.append(point)
    return hull


def drift_at(hull: Sequence[Point], loss: float) -> Estimate | None:
    """A method's drift at a task loss, on its lower hull; None outside of the losses it reached.

    The interval is over seeds. The loss lies between two rates a and b of the hull, at shares 1 − w and w. A seed's
    points at a and b are off the means' by some loss and some log drift; moved to the means' losses along the line from
    a to b, they are off by log drift alone, and (1 − w)·(that at a) + w·(that at b) is how far the seed is from the
    hull at the loss asked for. The 95 % t-interval of these, over the seeds run at both rates (at one, if the loss is
    just its own), is laid around the hull's log drift. Fewer than two such seeds: no interval. (A hull for each seed
    would give the same to first order, but at the end of the range, where the losses most asked for lie, half of the
    seeds would not reach the mean's.) What it leaves out: between rates that lie far apart a line is a guess.
    """
    found = _on_hull(hull, loss)
    return None if found is None else exponential(mean_interval(list(found[1].values()), center=found[0]))


def ratios(ours: Sequence[Point], theirs: Sequence[Point], factor: float = 1.0, grid: int = 101) -> Ratios | None:
    """How many times less `ours` drifts than `theirs` (two lower hulls) at equal task loss, over the range of losses
    that both reached, at `grid` losses evenly spaced; None if there is no such range.

    An interval is as in `drift_at`, of the differences seed by seed (a seed means the same samples in the same order
    for both), for the seeds that both have there. It is a method's own: who compares the best of many should know that
    the best is partly luck.
    """
    if not ours or not theirs:
        return None
    low, high = max(ours[0].loss, theirs[0].loss), min(ours[-1].loss, theirs[-1].loss)
    if low > high:
        return None
    losses = [float(x) for x in np.linspace(low, high, grid)]
    found = [ratio_at(ours, theirs, loss) for loss in losses]
    ratio = [estimate for estimate in found if estimate is not None]
    return Ratios(losses, ratio, sum(r.value >= factor for r in ratio) / grid)


def ratio_at(ours: Sequence[Point], theirs: Sequence[Point], loss: float) -> Estimate | None:
    """`ratios` at one task loss; None if one of the two did not reach it."""
    a, b = _on_hull(ours, loss), _on_hull(theirs, loss)
    if a is None or b is None:
        return None
    differences = [b[1][seed] - a[1][seed] for seed in a[1] if seed in b[1]]
    return exponential(mean_interval(differences, center=b[0] - a[0]))


def _on_hull(hull: Sequence[Point], loss: float) -> tuple[float, dict[int, float]] | None:
    """Log drift at a task loss, and how far each seed is from it: see `drift_at`."""
    if not hull or not hull[0].loss <= loss <= hull[-1].loss:
        return None
    if len(hull) == 1:
        slope, ends = 0.0, [(hull[0], 1.0)]
    else:
        right = min(bisect_right([p.loss for p in hull], loss), len(hull) - 1)
        a, b = hull[right - 1], hull[right]
        slope = (b.log_drift - a.log_drift) / (b.loss - a.loss)
        w = (loss - a.loss) / (b.loss - a.loss)
        ends = [(p, weight) for p, weight in ((a, 1 - w), (b, w)) if weight > 0]
    value = sum(weight * p.log_drift for p, weight in ends)
    shared = set.intersection(*(set(p.seeds) for p, _ in ends))
    off = {
        seed: sum(w * (p.seeds[seed][1] - p.log_drift - slope * (p.seeds[seed][0] - p.loss)) for p, w in ends)
        for seed in sorted(shared)
    }
    return value, off


# --- each method at its best learning rate


def best_rate(comparison: dict[str, Any], method: str) -> Best | None:
    """The learning rate of the lowest final task loss, averaged over seeds; None if no run is done.

    Of those with the most seeds: other rates were worse with the first one, and that alone says too little.

    Its note says if the best lies at an end of the rates tried, where a wider sweep may do better; a rate that only
    diverged was tried, one that failed for another reason was not.
    """
    losses: dict[float, list[float]] = {}
    for run in done_runs(comparison, method):
        losses.setdefault(run["learning_rate"], []).append(task_loss(run))
    if not losses:
        return None
    most = max(map(len, losses.values()))
    best = min((rate for rate in losses if len(losses[rate]) == most), key=lambda rate: (np.mean(losses[rate]), rate))
    runs = [run for run in comparison["runs"] if run["method"] == method]
    diverged = [run["learning_rate"] for run in runs if status(run) == "diverged"]
    tried = sorted({*losses, *diverged})
    notes = []
    if len(tried) == 1:
        notes.append("the only rate tried: more may be had")
    elif best in (tried[0], tried[-1]):
        end = "low" if best == tried[0] else "high"
        notes.append(f"at the {end} end of its sweep: more may be had")
    if best in diverged:
        notes.append(f"{diverged.count(best)} of {diverged.count(best) + len(losses[best])} runs at it diverged")
    return Best(best, mean_interval(losses[best]), "; ".join(notes))


def step_seconds(run: dict[str, Any]) -> float:
    """A run's pace from the first measured step to the last. What came before does not count: some processes compile
    the blocks in their first step, and in others that was done for a run before."""
    timed = [(step, seconds) for step, seconds, _ in run.get("curve") or [] if step > 0]
    if len(timed) < 2:
        timed = [(0, 0.0), (run["steps"], run["seconds"])]
    (begin, since), *_, (end, until) = timed
    return (until - since) / (end - begin)


def training_seconds(run: dict[str, Any]) -> float | None:
    """How long a run trains, at its pace (see `step_seconds`); None if it did not."""
    return run["steps"] * step_seconds(run) if run.get("steps") else None


def learning_curve(comparison: dict[str, Any], run: dict[str, Any]) -> list[CurvePoint]:
    """A run's held-out task loss while it trained. Seconds (see `step_seconds`) count the preparation, which a user
    waits for, too; at step 0 stands the base model's loss, if the run has not measured its own."""
    prepare = run.get("prepare_seconds") or 0.0
    measured = [(step, loss) for step, _, loss in run.get("curve") or [] if is_finite(loss)]
    curve = [CurvePoint(step, prepare + step * step_seconds(run), loss) for step, loss in measured]
    if curve and curve[0].step > 0:
        curve.insert(0, CurvePoint(0, prepare, comparison["base"]["learn"][task(comparison)]["loss"]))
    return curve


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean of several learning curves, at the steps that all have."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [CurvePoint(*map(float, np.mean([curve[step] for curve in by_step], axis=0))) for step in steps]


def crossing(curve: Sequence[CurvePoint], loss: float) -> CurvePoint | None:
    """Where a learning curve first comes down to a loss, on the line between two of its points; None if it never does,
    or was there already before its first point."""
    for a, b in pairwise(curve):
        if b.loss <= loss < a.loss:
            w = (a.loss - loss) / (a.loss - b.loss)
            return CurvePoint(a.step + w * (b.step - a.step), a.seconds + w * (b.seconds - a.seconds), loss)
    return None


def reach(comparison: dict[str, Any], method: str, rate: float, loss: float) -> Reach:
    """Steps and seconds until a method at one learning rate has come down to a held-out task loss.

    Read off the mean of all its seeds' curves; None if that does not reach it. The interval is the t-interval of the
    seeds' own crossings, laid around it; there is none if some seed did not reach the loss.
    """
    curves = [learning_curve(comparison, run) for run in done_runs(comparison, method, rate)]
    found = [at for curve in curves if (at := crossing(curve, loss)) is not None]
    mean = crossing(mean_curve(curves), loss)
    if mean is None:
        return Reach(None, None, len(found), len(curves))
    if len(found) < len(curves):
        steps, seconds = (Estimate(x, None, None, len(found)) for x in mean[:2])
    else:
        steps, seconds = (mean_interval([at[i] for at in found], center=mean[i]) for i in (0, 1))
    return Reach(steps, seconds, len(found), len(curves))


def milestones(comparison: dict[str, Any]) -> list[float]:
    """Held-out task losses on the way down: where the reference method's mean learning curve, at its best rate, is
    after a quarter, half, three quarters and all of its steps."""
    reference = reference_method(comparison)
    best = best_rate(comparison, reference) if reference else None
    if not reference or not best:
        return []
    curve = mean_curve([learning_curve(comparison, run) for run in done_runs(comparison, reference, best.rate)])
    if not curve:
        return []
    steps, losses = [point.step for point in curve], [point.loss for point in curve]
    return [float(np.interp(share * steps[-1], steps, losses)) for share in (0.25, 0.5, 0.75, 1.0)]


# --- a row for each method


def reference_method(comparison: dict[str, Any]) -> str | None:
    """Whom the others are compared with: LoRA, if it has a run that is done, else the first method that has."""
    methods = sorted(comparison["methods"], key=lambda method: method != "lora")
    return next((method for method in methods if done_runs(comparison, method)), None)


def summary(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method, in display order; what it has no value for is None.

    method, title, runs, done, not_done: {status: count};
    best: `Best`; loss: `Estimate`, final task loss at the best rate; beside: `Estimate`, that less the reference's
    (`reference_method`) at its own best rate, see `beside`;
    drift: {ability: `Estimate` at the best rate};
    equal_loss: the reference's lowest task loss; equal: {ability: `Estimate` there};
    reach: `Reach`, at its best rate, of the loss where the reference's mean learning curve ends at its own best rate;
    seconds, prepare_seconds, peak_bytes, steps, adapter, trainable: means over the seeds at the best rate;
    scores: {(kind, data, measure's name): `Estimate` at the best rate}, for the measures with a title.
    """
    reference = reference_method(comparison)
    at = best_rate(comparison, reference) if reference else None
    lowest = done_runs(comparison, reference, at.rate) if reference and at else []
    curve = mean_curve([learning_curve(comparison, run) for run in lowest])
    final = curve[-1].loss if curve else None
    return [_row(comparison, method, lowest, final) for method in comparison["methods"]]


def beside(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Estimate:
    """The final task loss of some runs less that of others, of another method. The interval is of the differences seed
    by seed: a seed means the same samples in the same order for both, which moves both alike."""
    our_losses, their_losses = ({run["seed"]: task_loss(run) for run in runs} for runs in (ours, theirs))
    differences = [our_losses[seed] - their_losses[seed] for seed in our_losses if seed in their_losses]
    if differences:
        return mean_interval(differences)
    mean = float(np.mean([*our_losses.values()]) - np.mean([*their_losses.values()]))
    return Estimate(mean, None, None, 0)


def _row(
    comparison: dict[str, Any], method: str, lowest: Sequence[dict[str, Any]], final: float | None
) -> dict[str, Any]:
    """`lowest`: the reference's runs at its best rate; `final`: where their mean learning curve ends."""
    best = best_rate(comparison, method)
    equal_loss = float(np.mean([task_loss(run) for run in lowest])) if lowest else None
    everything = [run for run in comparison["runs"] if run["method"] == method]
    counted = done_runs(comparison, method)
    runs = done_runs(comparison, method, best.rate) if best else []
    by_ability = {ability: points(comparison, method, ability) for ability in abilities(comparison)}

    def mean(values: list[Any]) -> float | None:
        finite = [float(x) for x in values if is_finite(x)]
        return float(np.mean(finite)) if finite else None

    def at_best(ability: Ability) -> Estimate | None:
        point = next((p for p in by_ability[ability] if best and p.rate == best.rate), None)
        return point and exponential(mean_interval([y for _, y in point.seeds.values()]))

    scores: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        for measure in MEASURES.values():
            for kind in measure.kinds if measure.title else ():
                for name, values in run["results"].get(kind, {}).items():
                    if is_finite(values.get(measure.name)):
                        scores.setdefault((kind, name, measure.name), []).append(values[measure.name])
    return {
        "method": method,
        "title": comparison["methods"][method]["title"],
        "runs": len(everything),
        "done": len(counted),
        "not_done": dict(Counter(status(run) for run in everything if not is_done(run))),
        "best": best,
        "loss": best and best.loss,
        "beside": beside(runs, lowest) if runs and lowest and runs != lowest else None,
        "drift": {ability: at_best(ability) for ability in by_ability},
        "equal_loss": equal_loss,
        "equal": {
            ability: None if equal_loss is None else drift_at(lower_hull(found), equal_loss)
            for ability, found in by_ability.items()
        },
        "reach": reach(comparison, method, best.rate, final) if best and final is not None else None,
        "seconds": mean([training_seconds(run) for run in runs]),
        "prepare_seconds": mean([run.get("prepare_seconds") for run in runs]),
        "peak_bytes": mean([run.get("peak_bytes") for run in runs]),
        "steps": mean([run.get("steps") for run in runs]),
        "adapter": mean([(run.get("parameters") or {}).get("adapter") for run in runs]),
        "trainable": mean([(run.get("parameters") or {}).get("trainable") for run in runs]),
        "scores": {key: mean_interval(values) for key, values in scores.items()},
    }
