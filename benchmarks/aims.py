"""How well the aims of keeping are met by a comparison: a short table, and a sentence for each aim.

    python benchmarks/aims.py COMPARISON.json [--loss 0.842] [--before corda-kpm-anchored] [--rivals distill]

The first ability is the one to keep. Every figure comes from `corda_lora.compare`, as in the report.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from corda_lora.compare.frontier import (
    NEAR,
    abilities,
    done_runs,
    drift_at,
    lower_hull,
    points,
    ratio_at,
    ratios,
    reference_method,
    summary,
    training_seconds,
)
from corda_lora.compare.near import near, near_loss, unnamed
from corda_lora.report.sentences import run_count
from corda_lora.report.text import number, setting_text, spread, times_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--loss", type=float, help="a task loss at which to compare with --before, such as 0.842")
    parser.add_argument("--before", default="corda-kpm-anchored", help="the entry without the penalty")
    parser.add_argument("--rivals", default="distill", help="the method of the entries to compare seconds with")
    options = parser.parse_args()
    comparison = json.loads(options.comparison.read_text())
    print(run_count(comparison))
    print("\n".join([*table(comparison), "", *sentences(comparison, options)]))


def table(comparison: dict[str, Any]) -> list[str]:
    """A line for each method, best first."""
    rows, close, highest = summary(comparison), near(comparison), near_loss(comparison)
    if not close or highest is None:
        return ["nothing to compare yet"]
    named, *others = abilities(comparison)
    heads = ["runs", "best loss", "at", f"drift at {highest:.4f}", "times less", "most near", "least", "seconds"]
    heads += [f"{name} there" for _, name in others]
    lines = ["method                              | " + " | ".join(heads)]
    for row in sorted(rows, key=lambda row: -(close[row["method"]].most.value if close[row["method"]].most else 0)):
        here = close[row["method"]]
        estimates = [here.drift[named], here.times.get(named), here.most, here.least]
        cells = [f"{row['done']}/{row['runs']}"]
        cells += [f"{row['loss'].value:.4f}", setting_text(row["best"].setting)] if row["best"] else ["—", "—"]
        cells += [number(e.value) if e else "—" for e in estimates]
        cells += [number(row["seconds"])]
        cells += [number(e.value) if (e := here.drift[ability]) else "—" for ability in others]
        lines.append(f"{row['title'][:35]:35} | " + " | ".join(cells))
    return lines


def sentences(comparison: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """One for each aim and method that could meet it."""
    reference, highest, close = reference_method(comparison), near_loss(comparison), near(comparison)
    if not close or highest is None or reference is None:
        return []
    named, title = abilities(comparison)[0], comparison["methods"][reference]["title"]
    hulls = {method: lower_hull(points(comparison, method, named)) for method in comparison["methods"]}
    entries = comparison["recipe"]["methods"]
    rivals = [method for method in hulls if entries[method]["method"] == options.rivals and hulls[method]]
    said = []
    for method, here in close.items():
        if here.most is None or method in rivals:
            continue
        name = comparison["methods"][method]["title"]
        least = times_text(here.least.value) if here.least else "—"
        said.append(
            f"{name}: at most {NEAR} above {title}'s best loss ({highest - NEAR:.4f}) it drifts up to "
            f"{times_text(here.most.value)} times less{interval(here.most)}; over all losses that both reach at least "
            f"{least} times less."
        )
        before = hulls.get(options.before)
        if options.loss and before and method != options.before:
            ours, theirs = drift_at(hulls[method], options.loss), drift_at(before, options.loss)
            if ours and theirs:
                said.append(
                    f"  at {options.loss}: {number(ours.value)}, {number(ours.value / theirs.value)} of "
                    f"{options.before}'s {number(theirs.value)}."
                )
        for rival in rivals:
            said += against(comparison, method, rival, hulls)
        for ability in unnamed(comparison):
            times = here.times.get(ability)
            if times is not None:
                worse = "" if times.value >= 1 else ": MORE"
                said.append(
                    f"  {ability[1]}, not named, at {highest:.4f}: {times_text(times.value)} times less{worse}."
                )
    return said


def against(comparison: dict[str, Any], method: str, rival: str, hulls: dict[str, Any]) -> list[str]:
    """A method beside a rival: drift over the losses that both reach, and seconds of a run (medians)."""
    both = ratios(hulls[method], hulls[rival])
    ours, theirs = (median([training_seconds(run) for run in done_runs(comparison, m)]) for m in (method, rival))
    share = f"{ours / theirs:.0%} of its seconds of training" if ours and theirs else "seconds not known"
    if both is None:
        return [f"  no task loss is reached by both it and {rival}; {share}."]
    values = sorted(r.value for r in both.ratio)
    lowest = ratio_at(hulls[method], hulls[rival], both.loss[0])
    return [
        f"  beside {rival}, {both.loss[0]:.4f} to {both.loss[-1]:.4f}: {times_text(values[0])} to "
        f"{times_text(values[-1])} times less drift, median {times_text(values[len(values) // 2])}, at the lowest loss "
        f"{times_text(lowest.value) if lowest else '—'}; {share}."
    ]


def median(values: list[Any]) -> float | None:
    known = sorted(value for value in values if value)
    return known[len(known) // 2] if known else None


def interval(e: Any) -> str:
    text = spread(e, times_text)
    return f" ({text})" if text else ""


if __name__ == "__main__":
    main()
