"""What a training gained and lost, in sentences, as a table for the terminal, and as a page."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from ..devices import machine_name
from ..evaluation.before_after import RESAMPLES, Change
from ..evaluation.measures import MEASURES
from ..files import write_json, write_text
from .html import filled_page, html_pairs
from .text import plural

SHOWN = 5  # answers that changed, of each task, each way


def name_of(change: Change) -> str:
    """A task's name, or the kind and the file of data."""
    return change.data if change.kind == "tasks" else f"{change.kind} {Path(change.data).name}"


def difference(change: Change, value: float) -> str:
    """A difference of two values with its sign; of shares in points."""
    measure = MEASURES[change.measure]
    if not math.isfinite(value):
        return "—"
    text = f"{100 * value:+.1f}" if measure.form.endswith("%") else format(value, f"+{measure.form}")
    return text.replace("-", "−") if float(text) else "0"


def with_unit(change: Change, value: float) -> str:
    unit = " points" if MEASURES[change.measure].form.endswith("%") else ""
    return difference(change, value) + unit


def interval(change: Change) -> str:
    return f"{difference(change, change.low)} to {difference(change, change.high)}"


def outcome(change: Change) -> str:
    return change.outcome or ("no measurable change" if change.telling else "0 before and after: shows nothing")


def gained_and_lost(changes: Sequence[Change]) -> list[str]:
    """The verdict first. A data set is lost if any of its measures is, and gained if one is and none is lost. One whose
    measures show nothing does not count."""
    sets = [list(group) for _, group in groupby(changes, lambda change: (change.kind, change.data))]
    silent = [group for group in sets if not any(change.telling for change in group)]
    sets = [group for group in sets if group not in silent]
    lost = _described(sets, "lost")
    gained = _described([group for group in sets if "lost" not in {change.outcome for change in group}], "gained")
    said = [f"kept: no measurable loss on {len(sets)} of {len(sets)}"] if sets else []
    if lost:
        said = [f"lost on {len(lost)} of {len(sets)}: {', '.join(lost)}"]
        said += [f"no measurable loss on the other {len(sets) - len(lost)}"] if len(sets) > len(lost) else []
    if gained:
        said.append(f"gained on {len(gained)} of {len(sets)}: {', '.join(gained)}")
    if hidden := [change for change in changes if change.outcome != "lost" and change.hidden_loss > 0]:
        each = [f"{name_of(c)} {MEASURES[c.measure].label} {with_unit(c, -c.sign * c.hidden_loss)}" for c in hidden]
        said.append(f"losses up to these are not excluded: {', '.join(each)}; more samples narrow them")
    if silent:
        names = ", ".join(name_of(group[0]) for group in silent)
        said.append(f"nothing can be said of {names}: the score is 0 before and after")
    return said or ["nothing was measured on both models"]


def _described(sets: Sequence[Sequence[Change]], outcome: str) -> list[str]:
    """Each set with the outcome, by the first of its measures that has it."""
    firsts = [next((change for change in group if change.outcome == outcome), None) for group in sets]
    return [f"{name_of(c)} ({MEASURES[c.measure].label} {with_unit(c, c.change)})" for c in firsts if c is not None]


def changes_table(changes: Sequence[Change]) -> Table:
    """One row for each measure and data set."""
    found = Table(caption=HOW)
    for name in ("data", "measure", "before", "after", "change", "95 % interval", ""):
        found.add_column(name, justify="left" if name in ("data", "measure", "") else "right")
    for change in changes:
        measure = MEASURES[change.measure]
        values = [format(value, measure.form) for value in (change.before, change.after)]
        found.add_row(
            *(name_of(change), measure.label, *values),
            *(difference(change, change.change), interval(change), change.outcome),
        )
    return found


HOW = (
    f"changes of shares in points; interval: paired bootstrap over samples, {RESAMPLES:,} resamples; "
    "measurable: the interval leaves out 0"
)


# --- the page --------------------------------------------------------------------------------------------------------


def write_evaluation(
    folder: Path,
    measured: dict[str, Any],
    scores: Mapping[tuple[str, str], Mapping[str, Any]],
    command: str,
) -> None:
    """Write results.json, a benchmark's answers as TASK.base.jsonl and TASK.tuned.jsonl, and report.html if there is a
    before and an after.

    Args:
        measured: what `corda eval` prints as JSON.
        scores: what `evaluate` fills.
    """
    write_json(folder / "results.json", measured)
    tasks = {name: sides for (kind, name), sides in scores.items() if kind == "tasks"}
    for name, sides in tasks.items():
        for side, scored in sides.items():
            lines = [json.dumps(detail, ensure_ascii=False) + "\n" for detail in scored.details]
            write_text(folder / f"{name}.{side}.jsonl", "".join(lines))
    if "changes" in measured:
        write_text(folder / "report.html", _page(measured, tasks, command))


def _page(measured: dict[str, Any], tasks: dict[str, Any], command: str) -> str:
    """What was gained and lost, as a self-contained page."""
    changes = [Change(**row) for row in measured["changes"]]
    first, *more = [sentence[0].upper() + sentence[1:] for sentence in measured["gained_and_lost"]]
    packages = ("corda-lora", "torch", "transformers", "peft")
    parts = {
        "name": f"{measured['before']} → {measured['after']}",
        "first": first,
        "about": f"{plural(len(changes), 'measure')} · 95 % intervals",
        "resamples": f"{RESAMPLES:,}",
        "command": command,
    }
    answers = [_changed_answers(name, sides["base"], sides["tuned"]) for name, sides in tasks.items()]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    html = {
        "more": "".join(f"<li>{escape(sentence)}</li>" for sentence in more),
        "changes": _changes_table(changes),
        "answers": "".join(answers),
        "circumstances": html_pairs([("machine", machine_name()), ("versions", versions)]),
    }
    return filled_page("before_after.html", {name: escape(text) for name, text in parts.items()} | html)


def _changes_table(changes: Sequence[Change]) -> str:
    """One row for each measure and data set; the page's script sorts by the keys of the cells."""
    names = ("data", "measure", "samples", "before", "after", "change", "95 % interval")
    heads = "".join(f'<th scope="col"><button>{name}</button></th>' for name in names)
    rows = []
    for change in changes:
        measure = MEASURES[change.measure]
        alike = [c for c in changes if MEASURES[c.measure].form[-1] == measure.form[-1]]
        edges = [abs(x) for c in alike for x in (c.low, c.high, c.change) if math.isfinite(x)]
        cells = [
            (measure.label, measure.label),
            (change.samples, f"{change.samples:,}"),
            *((value, format(value, measure.form)) for value in (change.before, change.after)),
            (change.change, difference(change, change.change)),
            (change.low, interval(change)),
        ]
        name = escape(name_of(change))
        rows.append(
            f'<tr class="{change.outcome}"><th scope="row" data-key="{name}">{name}</th>'
            + "".join(f'<td data-key="{escape(str(key))}">{escape(text)}</td>' for key, text in cells)
            + f"<td>{_interval(change, max(edges, default=0.0) or 1.0)}</td><td>{outcome(change)}</td></tr>"
        )
    head = f"<caption>Before and after</caption><thead><tr>{heads}<th></th><th></th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _interval(change: Change, edge: float) -> str:
    """The interval and the change on a line from −edge to edge, losses to the left."""
    if not math.isfinite(change.low + change.high + change.change):
        return ""
    x = [80 + 74 * change.sign * value / edge for value in (change.low, change.high, change.change)]
    return (
        '<svg width="160" height="16" aria-hidden="true"><path class="zero" d="M80 0V16"/>'
        f'<path class="range" d="M{x[0]:.1f} 8H{x[1]:.1f}"/><circle cx="{x[2]:.1f}" cy="8" r="4"/></svg>'
    )


def _changed_answers(name: str, before: Any, after: Any) -> str:
    """The first answers of a task that got worse, and those that got better."""
    pairs = list(zip(before.values, after.values, before.details, after.details))
    parts = []
    for what, picked in (
        ("got worse", [pair for pair in pairs if pair[1] < pair[0]]),
        ("got better", [pair for pair in pairs if pair[1] > pair[0]]),
    ):
        lines = [
            f"<li><p>{_text(first.get('asked', ''), tail=True)}</p><dl><dt>expected</dt>"
            f"<dd>{_text(first.get('expected', ''))}</dd><dt>before</dt><dd>{_text(first.get('answered', ''))}</dd>"
            f"<dt>after</dt><dd>{_text(second.get('answered', ''))}</dd></dl></li>"
            for *_, first, second in picked[:SHOWN]
        ]
        if lines:
            shown = f", the first {SHOWN}" if len(picked) > SHOWN else ""
            parts.append(f"<h3>{len(picked)} {what}{shown}</h3><ol>{''.join(lines)}</ol>")
    if not parts:
        return ""
    return f'<details class="card"><summary>{escape(name)}: answers that changed</summary>{"".join(parts)}</details>'


def _text(value: Any, tail: bool = False) -> str:
    """Text to show, at most 400 characters: the end of a prompt, the beginning of all else."""
    text = value if isinstance(value, str) else "; ".join(map(str, value)) if isinstance(value, list) else str(value)
    if len(text) > 400:
        text = f"… {text[-400:]}" if tail else f"{text[:400]} …"
    return escape(text)
