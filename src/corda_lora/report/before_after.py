"""What a training gained and lost, in sentences, as a table for the terminal, and as a page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from ..config import EvalConfig
from ..devices import machine_name
from ..evaluation.before_after import LEVEL, RESAMPLES, Change
from ..evaluation.measures import MEASURES
from ..files import write_json, write_text
from .html import filled_page, html_pairs
from .text import plural

SHOWN = 5  # answers that changed, of each task, each way
COLUMNS = ("data", "measure", "samples", "before", "after", "change", "95 % interval", "")


def name_of(change: Change) -> str:
    """A task's name, or the kind and the file of data."""
    return change.data if change.kind == "tasks" else f"{change.kind} {Path(change.data).name}"


def difference(change: Change, value: float) -> str:
    """A difference of two values with its sign; of shares in points."""
    measure = MEASURES[change.measure]
    if not math.isfinite(value):
        return "—"
    text = f"{100 * value:+.1f}" if measure.form.endswith("%") else format(value, f"+{measure.form}")
    return text.replace("-", "−")


def with_unit(change: Change, value: float) -> str:
    unit = " points" if MEASURES[change.measure].form.endswith("%") else ""
    return difference(change, value) + unit


def gained_and_lost(changes: Sequence[Change]) -> list[str]:
    """The verdict first. A data set is lost if any of its measures is, and gained if one is and none is lost."""
    sets = [list(group) for _, group in groupby(changes, lambda change: (change.kind, change.data))]
    outcomes = [{change.outcome for change in group} for group in sets]
    lost = [i for i, found in enumerate(outcomes) if "lost" in found]
    gained = [i for i, found in enumerate(outcomes) if "gained" in found and "lost" not in found]
    kept = len(sets) - len(lost)

    def described(i: int, outcome: str) -> str:
        most = next(change for change in sets[i] if change.outcome == outcome)
        return (
            f"{name_of(most)} ({MEASURES[most.measure].label} {with_unit(most, most.change)}, 95 % interval "
            f"{difference(most, most.low)} to {difference(most, most.high)})"
        )

    of = f"{len(sets)} of {len(sets)}"
    said = [f"kept: no measurable loss on {of}"]
    if lost:
        said = [f"lost on {len(lost)} of {len(sets)}: {', '.join(described(i, 'lost') for i in lost)}"]
        said += [f"no measurable loss on the other {kept}"] if kept else []
    if gained:
        said.append(f"gained on {len(gained)} of {len(sets)}: {', '.join(described(i, 'gained') for i in gained)}")
    hidden = [change for change in changes if change.outcome != "lost" and change.hidden_loss > 0]
    if hidden:
        each = [f"{name_of(change)} {with_unit(change, -change.sign * change.hidden_loss)}" for change in hidden]
        said.append(f"what these samples do not exclude: {', '.join(each)}; more samples narrow it")
    return said


def cells(change: Change) -> list[str]:
    """One row of the table: see `COLUMNS`."""
    measure = MEASURES[change.measure]
    return [
        name_of(change),
        measure.label,
        f"{change.samples:,}",
        format(change.before, measure.form),
        format(change.after, measure.form),
        difference(change, change.change),
        f"{difference(change, change.low)} to {difference(change, change.high)}",
        change.outcome or "no measurable change",
    ]


def changes_table(changes: Sequence[Change]) -> Table:
    """One row for each measure and data set."""
    found = Table(caption=HOW)
    for name in COLUMNS:
        found.add_column(name, justify="left" if name in ("data", "measure", "") else "right")
    for change in changes:
        found.add_row(*cells(change))
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
    config: EvalConfig,
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
        write_text(folder / "report.html", _page(measured, tasks, config, command))


def _page(measured: dict[str, Any], tasks: dict[str, Any], config: EvalConfig, command: str) -> str:
    """What was gained and lost, as a self-contained page."""
    changes = [Change(**row) for row in measured["changes"]]
    first, *more = [sentence[0].upper() + sentence[1:] for sentence in measured["gained_and_lost"]]
    packages = ("corda-lora", "torch", "transformers", "peft")
    circumstances = {name: str(value) for name, value in asdict(config).items() if value}
    circumstances |= {"machine": machine_name()} | {package: version(package) for package in packages}
    parts = {
        "name": f"{measured['before']} → {measured['after']}",
        "first": first,
        "about": f"{plural(len(changes), 'measure')} · {LEVEL:.0%} intervals",
        "resamples": f"{RESAMPLES:,}",
        "command": command,
    }
    answers = [_changed_answers(name, sides["base"], sides["tuned"]) for name, sides in tasks.items()]
    html = {
        "more": "".join(f"<li>{escape(sentence)}</li>" for sentence in more),
        "changes": _changes_table(changes),
        "answers": "".join(answers),
        "circumstances": html_pairs(circumstances.items()),
    }
    return filled_page("before_after.html", {name: escape(text) for name, text in parts.items()} | html)


def _changes_table(changes: Sequence[Change]) -> str:
    heads = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in COLUMNS[1:-1])
    head = f'<th scope="col"><button>{COLUMNS[0]}</button></th>{heads}<th></th><th></th>'
    rows = []
    for change in changes:
        name, *texts, outcome = cells(change)
        keys = [MEASURES[change.measure].label, change.samples, change.before, change.after, change.change, change.low]
        row = "".join(f'<td data-key="{escape(str(key))}">{escape(text)}</td>' for key, text in zip(keys, texts))
        unit = [c for c in changes if MEASURES[c.measure].form[-1] == MEASURES[change.measure].form[-1]]
        edges = [abs(x) for c in unit for x in (c.low, c.high, c.change) if math.isfinite(x)]
        rows.append(
            f'<tr class="{change.outcome}"><th scope="row" data-key="{escape(name)}">{escape(name)}</th>{row}'
            f"<td>{_interval(change, max(edges, default=0.0) or 1.0)}</td><td>{escape(outcome)}</td></tr>"
        )
    caption = "<caption>Before and after</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _interval(change: Change, edge: float) -> str:
    """The interval and the change on a line from −edge to edge, losses to the left."""
    if not math.isfinite(change.low + change.high + change.change):
        return ""
    low, high, at = sorted((change.low, change.high))[0], max(change.low, change.high), change.change
    x = [80 + 74 * change.sign * value / edge for value in (low, high, at)]
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
