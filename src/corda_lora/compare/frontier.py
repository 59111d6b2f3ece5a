"""Drift against task loss: how much methods forget where they have learned equally much.

One learning rate says little, because a higher rate learns more and drifts more. So each method is run at several
rates. Each rate gives a point (task loss, drift), and methods are compared at equal task loss, by interpolation between
their points. An entry that sweeps an option beside the rate gives a point for each value and rate. This file is
arithmetic on the dictionary that `corda compare` writes (`comparison`, described at `report.write_report`). It needs no
model and no torch.

Four choices:

- Means over seeds, interpolation and intervals use the logarithm of drift. Drift spans three orders of magnitude,
  methods are compared by ratios, and log drift is closer to linear in the task loss than drift is. Predicting a point
  of a hull from its two neighbours has a median error of 10 % by a line in log drift and 11 % by a line in drift. Where
  drift more than doubles between the neighbours, the errors are 29 % and 39 %. (68 and 17 such triples of drift on
  nq_test in benchmarks/results: keep_and_learn, learn_fast, both also at rank 8, and learn_fast_mbpp.)
- The lower hull joins the points that no other point of the method beats in both task loss and drift. It is not the
  convex hull, whose chords pass below measured points. LoRA's log drift is not convex in the task loss, so a chord
  would claim a lower drift than the runs between its ends have shown.
- The points of all values of a swept option make one hull: its user may choose either. So the line between two
  neighbours of the hull may lie between two values, two rates, or both. A run between them was not made, but the ends
  are near, as a sweep over two options has many points. More points also find a lower hull by luck: a point with one
  seed may be a lucky one, and the intervals do not account for having been the lowest of many.
- Nothing is extrapolated beyond the losses that a method reached, and only runs that are done count.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.measures import KEPT, MEASURES, OF_LABELS

WIDER = ", so other rates may do better"
FLOOR = 1e-7  # drift below this is rounding error, and its logarithm means nothing
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 1 to 10 degrees

NEAR = 0.005  # a task loss so little above the reference's best (nats per token) is near it

Ability = tuple[str, str]  # ("keep" or "text", the data's name)
Swept = tuple[()] | tuple[str, Any]  # an option and its value; () without a swept option


class Setting(NamedTuple):
    """The learning rate of a run, and the value of the option that its entry sweeps."""

    rate: float
    swept: Swept = ()


class Estimate(NamedTuple):
    """A value and its 95 % t-interval over seeds; `low` and `high` are None if it rests on one seed."""

    value: float
    low: float | None
    high: float | None
    seeds: int


class Point(NamedTuple):
    """A method at one setting: means over seeds, and the (task loss, log drift) of each seed."""

    setting: Setting
    loss: float
    log_drift: float
    seeds: dict[int, tuple[float, float]]


class Best(NamedTuple):
    setting: Setting
    loss: Estimate
    note: str  # a reason to doubt it, or ""


class Ratios(NamedTuple):
    """How many times less one method drifts than another, over the task losses that both reach."""

    loss: list[float]  # a uniform grid over that range
    ratio: list[Estimate]  # at each loss
    share: float  # the share of the range where the ratio is at least the requested factor


class CurvePoint(NamedTuple):
    step: float
    seconds: float
    loss: float


class Reach(NamedTuple):
    """Steps and seconds (preparation included) to a task loss, which `reached` of the `seeds` runs reached."""

    steps: Estimate | None
    seconds: Estimate | None
    reached: int
    seeds: int


# --- reading the runs


def task(comparison: dict[str, Any]) -> str:
    """The name of the first data to learn, on which the task loss is measured."""
    return next(iter(comparison["base"]["learn"]))


def abilities(comparison: dict[str, Any]) -> list[Ability]:
    """All data on which some run's drift was measured: data to keep first, then running text."""
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


def is_done(run: Mapping[str, Any]) -> bool:
    """Whether a run counts: its status is "done" and its task loss is finite."""
    return run["status"] == "done" and is_finite(task_loss(run))


def status(run: dict[str, Any]) -> str:
    """A run's status. A run that is "done" with a task loss that is not finite counts as diverged."""
    return "diverged" if run["status"] == "done" and not is_done(run) else run["status"]


def task_loss(run: Mapping[str, Any]) -> float:
    """The final held-out loss of the task: that of the first `learn` data."""
    return next(iter(run["results"]["learn"].values()))["loss"]


def setting_of(run: Mapping[str, Any]) -> Setting:
    """A run's learning rate and swept value."""
    return Setting(run["learning_rate"], next(iter(run.get("swept", {}).items()), ()))


def as_options(swept: Swept) -> dict[str, Any]:
    """A swept option and its value as options of a method."""
    return {swept[0]: swept[1]} if swept else {}


def swept_text(swept: Swept) -> str:
    """For example "keep 10"; "" without a swept option."""
    return " ".join(f"{part:g}" if isinstance(part, (int, float)) else part for part in swept)


def done_runs(comparison: dict[str, Any], method: str, setting: Setting | None = None) -> list[dict[str, Any]]:
    """A method's runs that count, at one setting or at all of them."""
    runs = [run for run in comparison["runs"] if run["method"] == method and is_done(run)]
    return [run for run in runs if setting is None or setting_of(run) == setting]


def first_drift(run: Mapping[str, Any]) -> float | None:
    """A run's drift on the first data on which it was measured: the ability to keep, or running text."""
    drifts = [numbers.get("drift") for kind in KEPT for numbers in run["results"].get(kind, {}).values()]
    return next((drift for drift in drifts if is_finite(drift)), None)


def log_drift(drift: float) -> float:
    return math.log(max(drift, FLOOR))


def mean_interval(values: Sequence[float], center: float | None = None) -> Estimate:
    """The mean over seeds and its 95 % interval, t·s/√n on each side. `center` replaces the mean."""
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
    """The value and interval whose logarithms are given."""
    low, high = (None if x is None else math.exp(x) for x in log[1:3])
    return Estimate(math.exp(log.value), low, high, log.seeds)


# --- drift at equal task loss


def points(comparison: dict[str, Any], method: str, ability: Ability) -> list[Point]:
    """One point for each setting of a method, in ascending order of the rates, then of the swept values."""
    kind, name = ability
    by_setting: dict[Setting, dict[int, tuple[float, float]]] = {}
    for run in done_runs(comparison, method):
        drift = run["results"].get(kind, {}).get(name, {}).get("drift")
        if is_finite(drift):
            seeds = by_setting.setdefault(setting_of(run), {})
            seeds[run["seed"]] = (task_loss(run), log_drift(drift))
    means = []
    for setting, seeds in sorted(by_setting.items()):
        losses, log_drifts = zip(*seeds.values())
        means.append(Point(setting, float(np.mean(losses)), float(np.mean(log_drifts)), seeds))
    return means


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in both task loss and drift: loss ascending, drift descending.

    Neighbours are joined by straight lines in (task loss, log drift). See the top of the file for why the hull is not
    convex.
    """
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.loss, p.log_drift)):
        if not hull or point.log_drift < hull[-1].log_drift:
            hull.append(point)
    return hull


def drift_at(hull: Sequence[Point], loss: float) -> Estimate | None:
    """A method's drift at a task loss, on its lower hull; None outside the losses that it reached.

    The interval is over seeds. The loss lies between two points a and b of the hull, with weights 1 − w and w. At each
    of the two, a seed deviates from the mean in loss and in log drift. Moving the seed's point along the line from a to
    b to the mean's loss leaves a deviation in log drift alone. The seed's deviation at the requested loss is
    (1 − w)·(its deviation at a) + w·(its deviation at b). The 95 % t-interval of these deviations, over the seeds run
    at both rates, is laid around the hull's log drift. (At a point of the hull only that rate's seeds count.) With
    fewer than two such seeds there is no interval.

    A hull for each seed would give the same to first order. But half of the seeds would not reach the lowest mean loss,
    which is the loss asked for most. The interval does not include the error of interpolating between distant rates.
    """
    at = _on_hull(hull, loss)
    return None if at is None else exponential(mean_interval(list(at[1].values()), center=at[0]))


def ratios(ours: Sequence[Point], theirs: Sequence[Point], factor: float = 1.0, grid: int = 101) -> Ratios | None:
    """How many times less `ours` drifts than `theirs` (two lower hulls) at equal task loss.

    The ratio is taken at `grid` evenly spaced losses of the range that both reached; None if there is no such range.
    Intervals are those of `drift_at`, of the differences between the two methods seed by seed: a seed means the same
    samples in the same order for both. They do not account for choosing the best of many methods, which is partly luck.
    """
    if not ours or not theirs:
        return None
    low, high = max(ours[0].loss, theirs[0].loss), min(ours[-1].loss, theirs[-1].loss)
    if low > high:
        return None
    losses = [float(x) for x in np.linspace(low, high, grid)]
    ratio = [estimate for loss in losses if (estimate := ratio_at(ours, theirs, loss)) is not None]
    return Ratios(losses, ratio, sum(r.value >= factor for r in ratio) / grid)


def ratio_at(ours: Sequence[Point], theirs: Sequence[Point], loss: float) -> Estimate | None:
    """`ratios` at one task loss; None if either method did not reach it."""
    a, b = _on_hull(ours, loss), _on_hull(theirs, loss)
    if a is None or b is None:
        return None
    differences = [b[1][seed] - a[1][seed] for seed in a[1] if seed in b[1]]
    return exponential(mean_interval(differences, center=b[0] - a[0]))


def around(hull: Sequence[Point], loss: float) -> list[tuple[Point, float]]:
    """The points of a hull between which a task loss lies, with their weights; none outside the losses reached."""
    return [(point, weight) for point, weight in _segment(hull, loss) if weight > 0]


def _segment(hull: Sequence[Point], loss: float) -> list[tuple[Point, float]]:
    """The same with both ends of the line, also where the loss is that of one of them."""
    if not hull or not hull[0].loss <= loss <= hull[-1].loss:
        return []
    if len(hull) == 1:
        return [(hull[0], 1.0)]
    right = min(bisect_right([p.loss for p in hull], loss), len(hull) - 1)
    a, b = hull[right - 1], hull[right]
    w = (loss - a.loss) / (b.loss - a.loss)
    return [(a, 1 - w), (b, w)]


def _on_hull(hull: Sequence[Point], loss: float) -> tuple[float, dict[int, float]] | None:
    """Log drift at a task loss, and each seed's deviation from it: see `drift_at`."""
    segment, ends = _segment(hull, loss), around(hull, loss)
    if not segment:
        return None
    slope = 0.0
    if len(segment) == 2:
        (a, _), (b, _) = segment
        slope = (b.log_drift - a.log_drift) / (b.loss - a.loss)
    value = sum(weight * p.log_drift for p, weight in ends)
    shared = set.intersection(*(set(p.seeds) for p, _ in ends))
    off = {
        seed: sum(w * (p.seeds[seed][1] - p.log_drift - slope * (p.seeds[seed][0] - p.loss)) for p, w in ends)
        for seed in sorted(shared)
    }
    return value, off


# --- each method at its best learning rate


def lowest_setting(losses: Mapping[Setting, Sequence[float]]) -> Setting:
    """The setting with the lowest mean task loss over seeds; the one with the lower rate of two that are equal.

    Only the settings with the most seeds compete. The others had one seed each and were worse with it."""
    most = max(map(len, losses.values()))
    return min((at for at in losses if len(losses[at]) == most), key=lambda at: (np.mean(losses[at]), at))


def best_setting(comparison: dict[str, Any], method: str) -> Best | None:
    """The setting with the lowest final task loss (see `lowest_setting`); None if no run is done.

    The note says whether the best rate is the lowest or highest of the rates tried: then a wider sweep may do better. A
    rate whose runs all diverged counts as tried; a rate whose runs failed for another reason does not.
    """
    losses: dict[Setting, list[float]] = {}
    for run in done_runs(comparison, method):
        losses.setdefault(setting_of(run), []).append(task_loss(run))
    if not losses:
        return None
    best = lowest_setting(losses)
    runs = [run for run in comparison["runs"] if run["method"] == method]
    diverged = [setting_of(run) for run in runs if status(run) == "diverged"]
    tried = sorted({setting.rate for setting in [*losses, *diverged]})
    notes = []
    if len(tried) == 1:
        notes.append(f"the only rate tried{WIDER}")
    elif best.rate in (tried[0], tried[-1]):
        end = "low" if best.rate == tried[0] else "high"
        notes.append(f"at the {end} end of its sweep{WIDER}")
    if best in diverged:
        notes.append(f"{diverged.count(best)} of {diverged.count(best) + len(losses[best])} runs at it diverged")
    return Best(best, mean_interval(losses[best]), "; ".join(notes))


def step_seconds(run: dict[str, Any]) -> float:
    """A run's seconds for each step, from the first measured step to the last. Earlier steps do not count, because some
    processes compile the blocks in them, and others compiled for an earlier run."""
    timed = [(step, seconds) for step, seconds, _ in run.get("curve") or [] if step > 0]
    if len(timed) < 2:
        timed = [(0, 0.0), (run["steps"], run["seconds"])]
    (begin, since), *_, (end, until) = timed
    return (until - since) / (end - begin)


def training_seconds(run: dict[str, Any]) -> float | None:
    """A run's steps times its `step_seconds`; None if it did not train."""
    return run["steps"] * step_seconds(run) if run.get("steps") else None


def learning_curve(comparison: dict[str, Any], run: dict[str, Any]) -> list[CurvePoint]:
    """A run's held-out task loss while it trained. Seconds include the preparation, which a user waits for, too; see
    `step_seconds` for the others. If a run did not measure the loss at step 0, the base model's is used."""
    prepare = run.get("prepare_seconds") or 0.0
    measured = [(step, loss) for step, _, loss in run.get("curve") or [] if is_finite(loss)]
    curve = [CurvePoint(step, prepare + step * step_seconds(run), loss) for step, loss in measured]
    if curve and curve[0].step > 0:
        curve.insert(0, CurvePoint(0, prepare, comparison["base"]["learn"][task(comparison)]["loss"]))
    return curve


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean of several learning curves, at the steps that all of them have."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return [CurvePoint(*map(float, np.mean([curve[step] for curve in by_step], axis=0))) for step in steps]


def crossing(curve: Sequence[CurvePoint], loss: float) -> CurvePoint | None:
    """Where a learning curve first falls to a loss, by linear interpolation between two of its points. None if it never
    does, or if its first point is already at or below that loss."""
    for a, b in pairwise(curve):
        if b.loss <= loss < a.loss:
            w = (a.loss - loss) / (a.loss - b.loss)
            return CurvePoint(a.step + w * (b.step - a.step), a.seconds + w * (b.seconds - a.seconds), loss)
    return None


def reach(comparison: dict[str, Any], method: str, setting: Setting, loss: float) -> Reach:
    """Steps and seconds until a method at one setting has fallen to a held-out task loss.

    They are read off the mean of all seeds' curves, and are None if that mean does not reach the loss. The interval is
    the t-interval of the seeds' own crossings, laid around the mean's. If some seed did not reach the loss, there is no
    interval.
    """
    curves = [learning_curve(comparison, run) for run in done_runs(comparison, method, setting)]
    crossings = [at for curve in curves if (at := crossing(curve, loss)) is not None]
    mean = crossing(mean_curve(curves), loss)
    if mean is None:
        return Reach(None, None, len(crossings), len(curves))
    if len(crossings) < len(curves):
        steps, seconds = (Estimate(x, None, None, len(crossings)) for x in mean[:2])
    else:
        steps, seconds = (mean_interval([at[i] for at in crossings], center=mean[i]) for i in (0, 1))
    return Reach(steps, seconds, len(crossings), len(curves))


def milestones(comparison: dict[str, Any]) -> list[float]:
    """The held-out task losses of the reference method's mean learning curve, at its best rate, after a quarter, half,
    three quarters and all of its steps."""
    curve = mean_curve([learning_curve(comparison, run) for run in reference_runs(comparison)])
    if not curve:
        return []
    steps, losses = [point.step for point in curve], [point.loss for point in curve]
    return [float(np.interp(share * steps[-1], steps, losses)) for share in (0.25, 0.5, 0.75, 1.0)]


# --- a row for each method


def reference_order(methods: Iterable[str]) -> list[str]:
    """LoRA, then the others as they come. The first of them with a run that is done is the reference method."""
    return sorted(methods, key=lambda method: method != "lora")


def reference_method(comparison: dict[str, Any]) -> str | None:
    """The method that the others are compared with (see `reference_order`); None if no run is done."""
    return next((m for m in reference_order(comparison["methods"]) if done_runs(comparison, m)), None)


def reference_runs(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of the reference method that count, at its best rate; none if no run is done."""
    reference = reference_method(comparison)
    best = best_setting(comparison, reference) if reference else None
    return done_runs(comparison, reference, best.setting) if reference and best else []


def summary(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method, in display order. Values that a method does not have are None.

    method, title, runs, done, not_done: {status: count};
    best: `Best`; loss: `Estimate` of the final task loss at the best rate; beside: `Estimate` of that loss minus the
    reference's at its own best rate, see `beside` and `reference_method`;
    drift: {ability: `Estimate` at the best rate};
    equal_loss: the reference's lowest task loss; equal: {ability: `Estimate` of the method's drift at that loss};
    reach: `Reach`, at the best rate, of the loss where the reference's mean learning curve ends at its own best rate;
    predicted (drift on the context, of runs with that penalty), seconds, prepare_seconds, peak_bytes, steps, adapter,
    trainable: means over the seeds at the best rate;
    scores: {(kind, data, measure's name): `Estimate` at the best rate}, for the measures with a title.
    """
    lowest = reference_runs(comparison)
    curve = mean_curve([learning_curve(comparison, run) for run in lowest])
    final = curve[-1].loss if curve else None
    return [_row(comparison, method, lowest, final) for method in comparison["methods"]]


def beside(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Estimate:
    """The final task loss of one method's runs minus that of another method's. The interval is that of the differences
    seed by seed: a seed means the same samples in the same order for both methods, and shifts both losses alike."""
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
    best = best_setting(comparison, method)
    equal_loss = float(np.mean([task_loss(run) for run in lowest])) if lowest else None
    everything = [run for run in comparison["runs"] if run["method"] == method]
    counted = done_runs(comparison, method)
    runs = done_runs(comparison, method, best.setting) if best else []
    by_ability = {ability: points(comparison, method, ability) for ability in abilities(comparison)}

    def mean(values: list[Any]) -> float | None:
        finite = [float(x) for x in values if is_finite(x)]
        return float(np.mean(finite)) if finite else None

    def at_best(ability: Ability) -> Estimate | None:
        point = next((p for p in by_ability[ability] if best and p.setting == best.setting), None)
        return point and exponential(mean_interval([y for _, y in point.seeds.values()]))

    scores: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        for measure in (*MEASURES.values(), *OF_LABELS):
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
            ability: None if equal_loss is None else drift_at(lower_hull(measured), equal_loss)
            for ability, measured in by_ability.items()
        },
        "reach": reach(comparison, method, best.setting, final) if best and final is not None else None,
        "seconds": mean([training_seconds(run) for run in runs]),
        "prepare_seconds": mean([run.get("prepare_seconds") for run in runs]),
        "predicted": mean([run.get("predicted_drift") for run in runs]),
        "peak_bytes": mean([run.get("peak_bytes") for run in runs]),
        "steps": mean([run.get("steps") for run in runs]),
        "adapter": mean([(run.get("parameters") or {}).get("adapter") for run in runs]),
        "trainable": mean([(run.get("parameters") or {}).get("trainable") for run in runs]),
        "scores": {key: mean_interval(values) for key, values in scores.items()},
    }
