"""What a method keeps where it has learned nearly as much as the reference's best: of the named ability, and of others.

The named ability is the one whose samples the methods were shown (`context`). What a method does to the others, it does
by accident. So they are read at the same settings: those that the hull of the *named* ability takes at that task loss.
A hull of each ability's own would put together settings that no one model has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .frontier import (
    NEAR,
    Ability,
    Estimate,
    Point,
    Setting,
    abilities,
    around,
    best_setting,
    drift_at,
    lower_hull,
    points,
    ratio_at,
    ratios,
    reference_method,
)


class Near(NamedTuple):
    """A method near the reference's best task loss.

    Attributes:
        settings: one or two, between which the drift is interpolated; none if the method does not reach the loss.
        drift: of each ability at `near_loss`.
        times: how many times less that is than the reference's there.
        most: of all task losses from the reference's best to `NEAR` above it, the most times less drift of the named
            ability than the reference's at the same loss; None for the reference itself.
        least: the least times less, over all task losses that both reach.
    """

    settings: list[Setting]
    drift: dict[Ability, Estimate | None]
    times: dict[Ability, Estimate | None]
    most: Estimate | None
    least: Estimate | None


def near_loss(comparison: dict[str, Any]) -> float | None:
    """`NEAR` above the reference's lowest task loss; None if no run is done."""
    reference = reference_method(comparison)
    best = best_setting(comparison, reference) if reference else None
    return best and best.loss.value + NEAR


def near(comparison: dict[str, Any], loss: float | None = None) -> dict[str, Near]:
    """Each method at a task loss, by default `near_loss`. Empty if no drift was measured."""
    reference, highest = reference_method(comparison), near_loss(comparison)
    named = next(iter(abilities(comparison)), None)
    if reference is None or highest is None or named is None:
        return {}
    loss = highest if loss is None else loss
    theirs = at_named_settings(comparison, reference, named)
    return {
        method: _near(at_named_settings(comparison, method, named), theirs, named, loss, highest, method == reference)
        for method in comparison["methods"]
    }


def at_named_settings(comparison: dict[str, Any], method: str, named: Ability) -> dict[Ability, list[Point]]:
    """A method's points of every ability, at the settings of its lower hull of the named ability, in that order."""
    hull = lower_hull(points(comparison, method, named))
    found = {}
    for ability in abilities(comparison):
        by_setting = {point.setting: point for point in points(comparison, method, ability)}
        found[ability] = [by_setting[point.setting] for point in hull if point.setting in by_setting]
    return found


def _near(
    ours: dict[Ability, list[Point]],
    theirs: dict[Ability, list[Point]],
    named: Ability,
    loss: float,
    highest: float,
    is_reference: bool,
) -> Near:
    times: dict[Ability, Estimate | None] = {}
    most = least = None
    if not is_reference:
        times = {ability: ratio_at(ours[ability], theirs[ability], loss) for ability in ours}
        both = ratios(ours[named], theirs[named])
        least = min(both.ratio, key=_value) if both and both.ratio else None
        losses = np.linspace(highest - NEAR, highest, 11)
        reached = [ratio for x in losses if (ratio := ratio_at(ours[named], theirs[named], float(x)))]
        most = max(reached, key=_value, default=None)
    settings = [point.setting for point, _ in around(ours[named], loss)]
    return Near(settings, {ability: drift_at(ours[ability], loss) for ability in ours}, times, most, least)


def _value(e: Estimate) -> float:
    return e.value


def unnamed(comparison: dict[str, Any]) -> Sequence[Ability]:
    """The abilities of which the methods were shown nothing: all but the first, if there is a context."""
    return abilities(comparison)[1:] if comparison["recipe"].get("context") else []
