"""A comparison as a Markdown page and as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..compare.frontier import abilities, milestones, reference_method, summary, training_seconds
from .sentences import circumstances, headline, near_sentences, notes, run_count, settings, verdict_sentences
from .tables import (
    Cell,
    Column,
    all_ratios,
    best_of,
    equal_loss_columns,
    milestone_columns,
    near_columns,
    run_columns,
    summary_columns,
)
from .text import label, titles_of


def markdown_report(comparison: dict[str, Any]) -> str:
    rows = summary(comparison)
    reference, titles = reference_method(comparison), titles_of(comparison)
    first, *more = headline(comparison, rows)
    base = [Cell(column.base) for column in summary_columns(comparison, rows)]
    lines = [f"# {plain(comparison['name'])}", "", f"**{plain(first)}**", ""]
    lines += [*(f"- {plain(sentence)}" for sentence in more), ""]
    if abilities(comparison):
        lines += ["![Drift against task loss](frontier.png)", ""]
    lines += ["![Learning curves](curves.png)", "", "## Methods, each at its best learning rate", ""]
    lines += markdown_table("method", [row["title"] for row in rows], summary_columns(comparison, rows), base)
    if verdicts := verdict_sentences(comparison, rows):
        lines += [*(f"- {plain(sentence)}" for sentence in verdicts), ""]
    if columns := near_columns(comparison):
        lines += [f"## Near {plain(titles[reference or ''])}’s best task loss, and what nobody named", ""]
        lines += [*(f"- {plain(sentence)}" for sentence in near_sentences(comparison)), ""]
        lines += markdown_table("method", list(titles.values()), columns)
    if rows and milestones(comparison):
        lines += ["## How fast losses were reached", ""]
        lines += markdown_table("method", [row["title"] for row in rows], milestone_columns(comparison, rows))
    for ability in abilities(comparison):
        if reference and (ratios := all_ratios(comparison, ability, reference)):
            heading = f"## Drift on {label(comparison, ability)} at equal task loss, compared with {titles[reference]}"
            lines += [plain(heading), ""]
            lines += markdown_table("method", [titles[method] for method in ratios], equal_loss_columns(ratios))
    lines += ["## How to read this", "", *(f"- {plain(note)}" for note in notes(comparison, rows)), ""]
    lines += [f"## Runs: {run_count(comparison)}", ""]
    lines += markdown_table("method", [titles[run["method"]] for run in comparison["runs"]], run_columns(comparison))
    lines += ["## Methods", ""]
    lines += [f"- {plain(method['title'])}: {plain(method['source'])}" for method in comparison["methods"].values()]
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    pairs = [*circumstances(comparison), *settings(comparison["recipe"])]
    lines += [f"| {plain(key)} | {plain(value)} |" for key, value in pairs]
    lines += ["", "## How to run it again", "", "```", comparison["command"], "```"]
    return "\n".join(lines) + "\n"


def markdown_table(corner: str, names: Sequence[str], columns: list[Column], base: Sequence[Cell] = ()) -> list[str]:
    """The lines of a Markdown table, and an empty line. The best cell of each column is bold."""

    def text(column: Column, cell: Cell) -> str:
        best = cell.key is not None and cell.key == best_of(column)
        shown = f"**{plain(cell.text)}**" if best else plain(cell.text)
        return f"{shown} ({plain(cell.extra)})" if cell.extra else shown

    table = [[corner, *(plain(f"{c.group}: {c.label}" if c.group else c.label) for c in columns)]]
    table += [["base model", *(cell.text for cell in base)]] if base else []
    for i, name in enumerate(names):
        table.append([plain(name), *(text(column, column.cells[i]) for column in columns)])
    head, *body = [f"| {' | '.join(row)} |" for row in table]
    return [head, "|---" * len(table[0]) + "|", *body, ""]


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, so that it fits a cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def as_text(value: Any) -> Any:
    """A cell of a CSV. A spreadsheet would run a text that begins like a formula, so an apostrophe goes before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_csv(path: Path, comparison: dict[str, Any]) -> None:
    """One row for each run, also for those that are not done, with every measured value. A column is named by kind,
    data and measure."""
    fields = (
        "method",
        "learning_rate",
        "seed",
        "status",
        "why",
        "commit",
        "machine",
        "steps",
        "seconds",
        "prepare_seconds",
        "peak_bytes",
    )
    rows = []
    for run in comparison["runs"]:
        row = {key: run.get(key) for key in fields} | {"seconds": training_seconds(run)} | run.get("swept", {})
        row |= {f"{key} parameters": value for key, value in (run.get("parameters") or {}).items()}
        for kind, datas in (run.get("results") or {}).items():
            for data, numbers in datas.items():
                row |= {f"{kind} {data} {key}": value for key, value in numbers.items()}
        rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys([*fields, *(key for row in rows for key in row)]))
        writer = csv.writer(file)
        writer.writerow(map(as_text, names))
        writer.writerows([as_text(row.get(name)) for name in names] for row in rows)
