"""A comparison as one self-contained HTML page.

The tables are written here. The charts are drawn by the script in report.html, from JSON embedded in the page.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from ..compare.frontier import (
    Point,
    abilities,
    exponential,
    lower_hull,
    mean_interval,
    points,
    reference_method,
    summary,
    task,
)
from .charts import best_curves, curves_edge, frontier_edge
from .sentences import circumstances, headline, near_sentences, notes, run_count, settings, verdict_sentences
from .tables import (
    Cell,
    Column,
    all_ratios,
    best_of,
    drift_cell,
    equal_loss_columns,
    loss_cell,
    milestone_columns,
    near_columns,
    run_columns,
    summary_columns,
)
from .text import label, loss_unit, number, plural, setting_text, titles_of


def html_report(comparison: dict[str, Any]) -> str:
    """The template report.html with its fields filled in."""
    rows = summary(comparison)
    first, *more = headline(comparison, rows)
    titles = titles_of(comparison)
    columns = summary_columns(comparison, rows)
    parts = {
        "name": escape(comparison["name"]),
        "first": escape(first),
        "more": "".join(f"<li>{escape(sentence)}</li>" for sentence in more),
        "about": escape(f"{plural(len(titles), 'method')} · {run_count(comparison)} · {comparison['machine']}"),
        "methods": html_table("Methods, at their best learning rates", list(titles.values()), columns, base=True),
        "near": near_section(comparison),
        "verdicts": "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict_sentences(comparison, rows)),
        "soon": html_table("How fast losses were reached", list(titles.values()), milestone_columns(comparison, rows)),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in notes(comparison, rows)),
        "run_count": escape(run_count(comparison)),
        "runs": html_table("All runs", [titles[run["method"]] for run in comparison["runs"]], run_columns(comparison)),
        "sources": html_pairs((about["title"], about["source"]) for about in comparison["methods"].values()),
        "circumstances": html_pairs(circumstances(comparison)),
        "settings": html_pairs(settings(comparison["recipe"])),
        "command": escape(comparison["command"]),
        "data": embedded(chart_data(comparison)),
    }
    return filled_page("report.html", parts)


def filled_page(template: str, parts: dict[str, str]) -> str:
    """A template of this folder with its fields filled in, with the style, the script and the charts of all pages."""
    shared = {"style": "page.css", "script": "page.js", "charts": "charts.js"}
    folder = Path(__file__).parent
    text = (folder / template).read_text(encoding="utf-8")
    parts = parts | {part: (folder / name).read_text(encoding="utf-8") for part, name in shared.items()}
    return re.sub(r"\{\{(\w+)\}\}", lambda field: parts[field[1]], text)


def near_section(comparison: dict[str, Any]) -> str:
    """The section on the task losses near the reference's best; "" for comparisons that have none."""
    columns, reference = near_columns(comparison), reference_method(comparison)
    if not columns or reference is None:
        return ""
    titles = titles_of(comparison)
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in near_sentences(comparison))
    heading = f"Near {titles[reference]}’s best task loss"
    table = html_table(heading, list(titles.values()), columns)
    return f"""
  <section class="card">
    <h2>{escape(heading)}, and what nobody named</h2>
    <ul class="read">{said}</ul>
    <div class="scroll" tabindex="0" role="region" aria-label="near the best task loss">{table}</div>
  </section>
"""


def html_table(caption: str, names: Sequence[str], columns: list[Column], base: bool = False) -> str:
    """A table that the page's script can sort: each cell carries its sort key. The best cell of a column is marked."""

    def cell(column: Column, c: Cell) -> str:
        best = c.key is not None and c.key == best_of(column)
        key = "" if c.key is None else f' data-key="{escape(sort_key(c.key))}"'
        mark = ' class="best"' if best else ""
        extra = f"<small>{escape(c.extra)}</small>" if c.extra else ""
        return f"<td{key}{mark}>{escape(c.text)}{' <span>best</span>' if best else ''}{extra}</td>"

    heads = [f'<th scope="col" data-better="{c.better}"><button>{escape(c.label)}</button></th>' for c in columns]
    head = f'<th scope="col"><button>method</button></th>{"".join(heads)}'
    if any(column.group for column in columns):  # two rows of headings, with the groups in the first
        groups = [(group, len(list(same))) for group, same in groupby(column.group for column in columns)]
        head = '<th scope="col" rowspan="2"><button>method</button></th>'
        head += "".join(f'<th scope="colgroup" colspan="{n}">{escape(group)}</th>' for group, n in groups)
        head += f"</tr><tr>{''.join(heads)}"
    lines = [f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"]
    for i, name in enumerate(names):
        cells = "".join(cell(column, column.cells[i]) for column in columns)
        lines.append(f'<tr><th scope="row" data-key="{escape(name)}">{escape(name)}</th>{cells}</tr>')
    lines.append("</tbody>")
    if base:
        cells = "".join(f"<td>{escape(column.base)}</td>" for column in columns)
        lines.append(f'<tfoot><tr><th scope="row">base model</th>{cells}</tr></tfoot>')
    return "\n".join([*lines, "</table>"])


def sort_key(key: Any) -> str:
    return f"{key:.6g}" if isinstance(key, (int, float)) else str(key)


def html_pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs)


def embedded(value: Any) -> str:
    """JSON that is safe inside <script>: it has no "<", and NaN and infinity are null."""
    text = json.dumps(without_nan(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def chart_data(comparison: dict[str, Any]) -> dict[str, Any]:
    """The data of the page's charts, with the texts of their tooltips."""
    base, titles = comparison["base"], titles_of(comparison)
    tabs = []
    for ability in abilities(comparison):
        measured = {method: points(comparison, method, ability) for method in titles}
        tables = {}
        for reference, title in titles.items():
            if beside := all_ratios(comparison, ability, reference):
                names = [titles[method] for method in beside]
                tables[reference] = html_table(f"Drift compared with {title}", names, equal_loss_columns(beside))
        tabs.append(
            {
                "label": label(comparison, ability),
                "methods": {method: frontier_series(comparison, method, ps) for method, ps in measured.items() if ps},
                "edge": frontier_edge(list(measured.values())),
                "beside": tables,
            }
        )
    curves = {method: curve_series(comparison, method) for method in titles}
    means = [best_curves(comparison, method)[1] for method in titles]
    return {
        "titles": titles,
        "reference": reference_method(comparison),
        "task": task(comparison),
        "unit": loss_unit(comparison),
        "base": base["learn"][task(comparison)]["loss"],
        "abilities": tabs,
        "curves": {method: curve for method, curve in curves.items() if curve},
        "curves_edge": curves_edge(means),
    }


def frontier_series(comparison: dict[str, Any], method: str, measured: list[Point]) -> dict[str, Any]:
    """A method's points with the ranges of their seeds, and its lower hull."""
    title, data = comparison["methods"][method]["title"], task(comparison)
    shown = []
    for p in measured:
        xs, ys = ([seed[i] for seed in p.seeds.values()] for i in (0, 1))
        loss, drift = loss_cell(mean_interval(xs)), drift_cell(exponential(mean_interval(ys)))
        shown.append(
            {
                "x": [p.loss, min(xs), max(xs)],
                "y": [math.exp(y) for y in (p.log_drift, min(ys), max(ys))],
                "tip": [
                    title,
                    f"learning rate {setting_text(p.setting)}, {plural(len(p.seeds), 'seed')}",
                    f"{data} loss {loss.text} {loss.extra}",
                    f"drift {drift.text}" + (f" ({drift.extra})" if drift.extra else ""),
                ],
            }
        )
    return {"points": shown, "line": [[p.loss, math.exp(p.log_drift)] for p in lower_hull(measured)]}


def curve_series(comparison: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """A method's mean learning curve at its best rate, with the range of its seeds."""
    rate, mean, curves = best_curves(comparison, method)
    return [
        {
            "step": point.step,
            "seconds": point.seconds,
            "y": [point.loss, min(seed.loss for seed in seeds), max(seed.loss for seed in seeds)],
            "tip": [
                comparison["methods"][method]["title"],
                f"learning rate {rate}, {plural(len(seeds), 'seed')}",
                f"step {point.step:g}, {number(point.seconds)} s",
                f"{task(comparison)} loss {point.loss:.4f}",
            ],
        }
        for point, *seeds in zip(mean, *curves)
    ]
