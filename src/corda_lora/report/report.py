"""A comparison as something to show: one HTML file, Markdown, CSV, and pictures.

Every number is `frontier`'s. The HTML's tables are written here; its charts are drawn by the script in report.html from
the JSON that is embedded there.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..compare.frontier import (
    Ability,
    CurvePoint,
    Estimate,
    Point,
    Ratios,
    abilities,
    best_rate,
    done_runs,
    exponential,
    is_finite,
    learning_curve,
    lower_hull,
    mean_curve,
    mean_interval,
    milestones,
    points,
    ratio_at,
    ratios,
    reach,
    reference_method,
    status,
    summary,
    task,
    training_seconds,
)

# Method i has color i % 8; the second eight are hollow and dashed, and have another marker. So color, marker and dash
# tell sixteen apart, and without the colors, markers and dashes still do. report.html has the same markers, and colors
# of its own for a dark page.
COLORS = ("#0072b2", "#d55e00", "#00805c", "#b0508c", "#9a6f00", "#3a9bdc", "#4d4d4d", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MEANINGFUL = 0.05  # of exact matches: below this for everyone, chance decides who is ahead


def write_report(folder: Path, comparison: dict[str, Any]) -> None:
    """Write report.html, report.md, runs.csv, curves.png and .svg, and frontier.png and .svg if drift was measured.

    Args:
        comparison: what was run and what came out (JSON):
            {"name", "command", "recipe": settings, "machine", "versions": {package: version}, "commit" or None,
             "methods": {method: {"title", "source"}} in display order,
             "base": {"learn": {data: {"loss", ...}}, "keep": ..., "text": ..., "choices": ...},
             "runs": [{"method", "learning_rate", "seed", "status", "why", "results": as base, with "drift" and
                       "agreement" in keep and text, "curve": [[step, seconds, held-out task loss], ...], "steps",
                       "seconds", "prepare_seconds", "peak_bytes" or None, "parameters": {"adapter", "trainable"}}]}
            Statuses are "done", "diverged", "failed", "does not fit" and "not run"; what follows `why` is there for
            runs that are done. Losses and drift are in nats per token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html_report(comparison), encoding="utf-8")
    (folder / "report.md").write_text(markdown_report(comparison), encoding="utf-8")
    write_csv(folder / "runs.csv", comparison)
    draw(folder, comparison)


# --- numbers as text


def number(value: Any, digits: int = 3) -> str:
    """So many significant digits; an exponent only where there is no reading it without."""
    if not is_finite(value):
        return "—"
    if value and not 1e-4 <= abs(value) < 1e6:
        return rate_text(float(f"{value:.{digits - 1}e}"))
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def rate_text(rate: float) -> str:
    """5e-4 for 0.0005."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def times_text(ratio: float) -> str:
    """A ratio of drifts: two digits, or three from 100 on."""
    return number(ratio, 2 if ratio < 100 else 3)


def plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def label(comparison: dict[str, Any], ability: Ability) -> str:
    """An ability's name; with its kind, if there is another of that name."""
    kind, name = ability
    return f"{name} ({kind})" if [other for _, other in abilities(comparison)].count(name) > 1 else name


# --- tables, for HTML and Markdown alike


class Cell(NamedTuple):
    text: str = "—"
    extra: str = ""  # an interval or a remark, in small print
    key: Any = None  # number or text: what a sort compares; None comes last in both directions


class Column(NamedTuple):
    group: str
    label: str
    better: str  # "low", "high", or "" where neither is
    cells: list[Cell]
    base: str = ""  # the base model's


def loss_cell(e: Estimate | None) -> Cell:
    if e is None:
        return Cell()
    return Cell(f"{e.value:.4f}", "" if e.high is None else f"± {e.high - e.value:.4f}", e.value)


def difference_cell(e: Estimate | None) -> Cell:
    cell = loss_cell(e)
    return cell if e is None else cell._replace(text=f"{e.value:+.4f}".replace("-", "−"))


def spread(e: Estimate, text: Callable[[float], str]) -> str:
    """The interval of a drift or of a ratio of two. Where rates of one loss lie close, seeds may leave it open."""
    if e.low is None or e.high is None:
        return ""
    return "not settled by its seeds" if e.high > 100 * e.low else f"{text(e.low)} to {text(e.high)}"


def drift_cell(e: Estimate | None) -> Cell:
    return Cell() if e is None else Cell(number(e.value), spread(e, number), e.value)


def ratio_cell(e: Estimate | None) -> Cell:
    return Cell() if e is None else Cell(times_text(e.value), spread(e, times_text), e.value)


def share_cell(e: Estimate | None) -> Cell:
    if e is None:
        return Cell()
    return Cell(f"{e.value:.1%}", "" if e.high is None else f"± {e.high - e.value:.1%}", e.value)


def steps_cell(e: Estimate | None) -> Cell:
    if e is None:
        return Cell()
    return Cell(f"{e.value:.0f}", "" if e.high is None else f"± {number(e.high - e.value, 2)}", e.value)


def plain_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(number(value), "", value)


def summary_columns(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[Column]:
    """The table of methods, each at its best learning rate; `rows` are `frontier.summary`'s."""
    base, data, reference = comparison["base"], task(comparison), reference_method(comparison)
    name = comparison["methods"][reference]["title"] if reference else ""

    def rate(row: dict[str, Any]) -> Cell:
        best = row["best"]
        return Cell(rate_text(best.rate), best.note.replace(": more may be had", ""), best.rate) if best else Cell()

    def equal(row: dict[str, Any], ability: Ability) -> Cell:
        found, at = points(comparison, row["method"], ability), row["equal_loss"]
        if row["equal"][ability] or not found or at is None:
            return drift_cell(row["equal"][ability])
        return Cell("—", "not reached" if min(p.loss for p in found) > at else "learns more at every rate")

    def reach(row: dict[str, Any], which: str) -> Cell:
        found = row["reach"]
        cell = steps_cell(getattr(found, which) if found else None)
        if found and cell.key is None:
            return Cell("—", "not reached")
        if found and found.reached < found.seeds and row["method"] != reference:  # some of its own end above their mean
            return Cell(cell.text, f"{found.reached} of {plural(found.seeds, 'seed')}", cell.key)
        return cell

    def parameters(value: float | None) -> Cell:
        return Cell(f"{number(value / 1e6)} M", "", value) if value else Cell()

    def runs(row: dict[str, Any]) -> Cell:
        return Cell(f"{row['done']} of {row['runs']}", counts(row["not_done"]), row["done"])

    loss = f"{base['learn'][data]['loss']:.4f}"
    columns = [
        Column("", "learning rate", "", [rate(row) for row in rows]),
        Column("task loss", data, "low", [loss_cell(row["loss"]) for row in rows], loss),
        Column("task loss", f"less {name}’s", "low", [difference_cell(row["beside"]) for row in rows]),
    ]
    for a in abilities(comparison):
        cells = [equal(row, a) for row in rows]
        columns.append(Column(f"drift at {name}’s task loss", label(comparison, a), "low", cells))
    for a in abilities(comparison)[:1]:
        found = all_ratios(comparison, a, reference) if reference else {}
        cells = [ratio_cell(at and over_half(at)) for at in (found.get(row["method"]) for row in rows)]
        columns.append(Column("times less drift", f"{label(comparison, a)}, half of the range", "high", cells))
    for a in abilities(comparison):
        cells = [drift_cell(row["drift"][a]) for row in rows]
        columns.append(Column("drift at its own task loss", label(comparison, a), "low", cells, "0"))
    for which in ("steps", "seconds"):
        columns.append(Column(f"to {name}’s last loss", which, "low", [reach(row, which) for row in rows]))
    for key in dict.fromkeys(key for row in rows for key in row["scores"]):
        kind, source, measure = key
        share = base.get(kind, {}).get(source, {}).get(measure)
        cells = [share_cell(row["scores"].get(key)) for row in rows]
        if measure == "accuracy" or max(share or 0.0, *(cell.key or 0.0 for cell in cells)) >= MEANINGFUL:
            columns.append(Column("right answers", source, "high", cells, "" if share is None else f"{share:.1%}"))
    columns.append(Column("seconds", "training", "low", [plain_cell(row["seconds"]) for row in rows]))
    columns.append(Column("seconds", "preparing", "", [plain_cell(row["prepare_seconds"]) for row in rows]))
    if any(row["peak_bytes"] for row in rows):
        cells = [plain_cell(row["peak_bytes"] and row["peak_bytes"] / 1e9) for row in rows]
        columns.append(Column("memory", "peak, GB", "low", cells))
    columns.append(Column("parameters", "adapter", "", [parameters(row["adapter"]) for row in rows]))
    columns.append(Column("parameters", "trained", "", [parameters(row["trainable"]) for row in rows]))
    columns.append(Column("runs", "done", "", [runs(row) for row in rows]))
    return columns


def milestone_columns(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[Column]:
    """Steps and seconds of each method, at its best learning rate, to some losses on the way down."""
    columns = []
    for which in ("steps", "seconds"):
        for loss in milestones(comparison):
            found = [reach(comparison, row["method"], row["best"].rate, loss) if row["best"] else None for row in rows]
            cells = [steps_cell(getattr(at, which)) if at else Cell() for at in found]
            columns.append(Column(f"{which} to a held-out loss of", f"{loss:.4f}", "low", cells))
    return columns


def over_half(at: Ratios) -> Estimate:
    """What the ratio is at least over half of the range: its median."""
    return sorted(at.ratio, key=lambda r: r.value)[len(at.ratio) // 2]


def equal_loss_columns(found: dict[str, Ratios]) -> list[Column]:
    """How many times less each method drifts than one it is compared with, over the task losses that both reach."""

    def at(i: int) -> list[Cell]:
        return [ratio_cell(both.ratio[i]) for both in found.values()]

    shared, less = "task losses of both", "times less drift (below 1: more)"
    ends = [[Cell(f"{both.loss[i]:.4f}", "", both.loss[i]) for both in found.values()] for i in (0, -1)]
    return [
        Column(shared, "from", "", ends[0]),
        Column(shared, "to", "", ends[1]),
        Column(less, "over half of it at least", "high", [ratio_cell(over_half(both)) for both in found.values()]),
        Column(less, "at its lowest loss", "high", at(0)),
        Column(less, "in its middle", "high", at(50)),  # of 101
        Column(less, "at its highest loss", "high", at(-1)),
    ]


def all_ratios(comparison: dict[str, Any], ability: Ability, reference: str) -> dict[str, Ratios]:
    """Each method that has task losses in common with the reference, beside it."""
    hulls = {method: lower_hull(points(comparison, method, ability)) for method in comparison["methods"]}
    found = {method: ratios(hull, hulls[reference]) for method, hull in hulls.items() if method != reference}
    return {method: at for method, at in found.items() if at}


def run_columns(comparison: dict[str, Any]) -> list[Column]:
    """The table of all runs."""
    runs = comparison["runs"]

    def measured(kind: str, name: str, key: str) -> list[Any]:
        values = [(run.get("results") or {}).get(kind, {}).get(name, {}).get(key) for run in runs]
        return [value if is_finite(value) else None for value in values]

    data = task(comparison)
    rates = [Cell(rate_text(run["learning_rate"]), "", run["learning_rate"]) for run in runs]
    losses = [Cell() if x is None else Cell(f"{x:.4f}", "", x) for x in measured("learn", data, "loss")]
    drifts = {a: [plain_cell(x) for x in measured(*a, "drift")] for a in abilities(comparison)}
    return [
        Column("", "learning rate", "", rates),
        Column("", "seed", "", [Cell(str(run["seed"]), "", run["seed"]) for run in runs]),
        Column("", "status", "", [Cell(status(run), run["why"], status(run)) for run in runs]),
        Column("", f"task loss, {data}", "", losses),
        *(Column("", f"drift, {label(comparison, a)}", "", cells) for a, cells in drifts.items()),
        Column("", "training, s", "", [plain_cell(training_seconds(run)) for run in runs]),
    ]


def counts(not_done: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in not_done.items())


def best_of(column: Column) -> float | None:
    """The key of the column's best cell, if one is better than another."""
    keys = [cell.key for cell in column.cells if isinstance(cell.key, (int, float))]
    if not column.better or len(set(keys)) < 2:
        return None
    return min(keys) if column.better == "low" else max(keys)


# --- what came out, in words


def headline(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """A sentence each on drift at equal task loss, on task loss and on steps; and what to know before trusting them."""
    reference = reference_method(comparison)
    if reference is None:
        return ["No run is done: there is nothing to compare yet."]
    ref = next(row for row in rows if row["method"] == reference)
    others = [row for row in rows if row["best"] and row is not ref]
    title = ref["title"]
    if not others:
        return [f"Only {title} is done: there is nothing to compare it with yet."]
    sentences = [loss_sentence(ref, others)]
    arrived = [row for row in others if row["reach"] and row["reach"].steps]
    if arrived:
        fastest = min(arrived, key=lambda row: row["reach"].steps.value)
        steps = f"{text_of(steps_cell(fastest['reach'].steps))} of {fastest['steps']:.0f}"
        if round(fastest["reach"].steps.value) < ref["steps"]:
            sentences.append(f"{fastest['title']} takes the fewest steps to the loss where {title} ends: {steps}.")
    for ability in abilities(comparison)[:1]:  # an ability to keep, if there is one: what the comparison is about
        at_best, there = drift_sentence(comparison, ability, ref, others)
        over_range, elsewhere = range_sentence(comparison, ability, ref, others)
        place = 0 if ability[0] == "keep" and (there or elsewhere) else len(sentences)  # nothing found comes last
        said = [over_range, at_best] if elsewhere > 2 * there else [at_best, over_range]
        sentences[place:place] = [sentence for sentence in said if sentence]
    first = min([ref, *others], key=lambda row: row["loss"].value)
    for row in [ref] if first is ref else [ref, first]:
        if row["best"].note:
            sentences.append(f"{row['title']}’s best rate is {row['best'].note}.")
    return sentences


def text_of(cell: Cell) -> str:
    return f"{cell.text} {cell.extra}".strip()


def loss_sentence(ref: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Who learned most, and whether that is more than the seeds' spread."""
    first = min([ref, *others], key=lambda row: row["loss"].value)
    sentence = f"{first['title']} ends at the lowest task loss, {text_of(loss_cell(first['loss']))}"
    if first is ref:
        return f"{sentence}."
    sentence += f", against {ref['title']}’s {text_of(loss_cell(ref['loss']))}"
    if first["beside"].high is None:
        return f"{sentence} (too few seeds to be sure)."
    why = ": the seeds’ spread could explain it" if first["beside"].high >= 0 else ""
    return f"{sentence}; seed by seed the difference is {text_of(difference_cell(first['beside']))}{why}."


def claim(times: Estimate) -> float:
    """What a ratio counts when the largest is looked for: half, if no seeds vouch for it."""
    return times.value if times.low is not None else times.value / 2


def range_sentence(
    comparison: dict[str, Any], ability: Ability, ref: dict[str, Any], others: list[dict[str, Any]]
) -> tuple[str, float]:
    """Who drifts how many times less over at least half of the task losses that it and the reference both reach;
    empty if nobody drifts clearly less."""
    hulls = {row["title"]: lower_hull(points(comparison, row["method"], ability)) for row in [ref, *others]}
    found = {row["title"]: ratios(hulls[row["title"]], hulls[ref["title"]]) for row in others}
    both = {name: at for name, at in found.items() if at is not None and at.loss[0] < at.loss[-1]}
    if not both:
        return "", 0.0
    title = max(both, key=lambda name: claim(over_half(both[name])))
    half, losses = over_half(both[title]), both[title].loss
    if half.value < 1.5:
        return "", 0.0
    notes = []
    if half.low is not None:
        notes.append(f"95\u00a0% interval over {half.seeds} seeds: {spread(half, times_text)}")
    if unsure := sum(at.low is None for at in both[title].ratio):
        share = unsure / len(both[title].ratio)
        notes.append(f"{share:.0%} of these losses lie beside rates run with one seed: no interval there")
    less = f"{title} drifts {times_text(half.value)} times less than {ref['title']} on {label(comparison, ability)}"
    where = f"over at least half of the task losses that both reach, {losses[0]:.4f} to {losses[-1]:.4f}"
    return f"{less}, or still less, {where} ({'; '.join(notes)}).", half.value


def drift_sentence(
    comparison: dict[str, Any], ability: Ability, ref: dict[str, Any], others: list[dict[str, Any]]
) -> tuple[str, float]:
    """Who drifts least where the reference has its lowest task loss, how sure that is, and how many times less."""
    title, where = ref["title"], label(comparison, ability)
    at = f"{title}’s best task loss on {task(comparison)} ({ref['equal_loss']:.4f})"
    theirs = lower_hull(points(comparison, ref["method"], ability))
    hulls = {row["title"]: lower_hull(points(comparison, row["method"], ability)) for row in others}
    found = {name: ratio_at(hull, theirs, ref["equal_loss"]) for name, hull in hulls.items()}
    there = {name: ratio for name, ratio in found.items() if ratio is not None}
    if not there:
        return f"No other method was measured on both sides of {at}.", 0.0
    least = max(there, key=lambda name: claim(there[name]))
    ratio = there[least]
    if ratio.value < 1.1:
        return f"At {at}, no other method that reaches it drifts clearly less than {title} on {where}.", 0.0
    sure = "no interval: fewer than two seeds on both sides of that loss"
    if ratio.low is not None:
        sure = f"95\u00a0% interval over {ratio.seeds} seeds: {spread(ratio, times_text)}"
        sure += "; the seeds’ spread could explain it" if ratio.low <= 1 else ""
    times = times_text(ratio.value)
    return f"At {at}, {least} drifts {times} times less than {title} on {where} ({sure}).", ratio.value


def run_count(comparison: dict[str, Any]) -> str:
    """How many runs there are, and what became of those that do not count."""
    states = Counter(status(run) for run in comparison["runs"])
    done = states.pop("done", 0)
    return "; ".join(filter(None, [f"{done} of {plural(len(comparison['runs']), 'run')} done", counts(states)]))


def settings(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings, flat: ("train.max_steps", "150")."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from settings(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)


def circumstances(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Where and with what it ran."""
    versions = ", ".join(f"{package} {version}" for package, version in comparison["versions"].items())
    return [
        ("machine", comparison["machine"] or "not known"),
        ("versions", versions),
        ("commit", comparison["commit"] or "not known"),
    ]


def notes(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """How to read the numbers."""
    reference = reference_method(comparison)
    name = comparison["methods"][reference]["title"] if reference else "the reference"
    found = [
        "Task loss and drift are in nats per token of held-out answers. Drift is the mean KL divergence of the tuned "
        "model’s predictions from the base model’s: 0 for the base model itself. Lower is better in both.",
        "A method’s best rate is the learning rate of its lowest mean task loss. At an end of its sweep, more may be "
        "had beyond. Only runs that are done count; those that are not are listed with their reasons.",
        "± and “to” give 95 % t-intervals over seeds, for each method by itself; none where fewer than two seeds ran, "
        "“not settled” where it spans a factor of more than 100. "
        f"“less {name}’s”: the difference at the best rates, seed by seed, as a seed is the same samples in the same "
        "order for all. "
        "The best of many methods is best partly by luck, which no interval here accounts for.",
        "Learning curves, and steps and seconds to a loss, are of the first of the task’s held-out samples "
        f"({comparison['recipe'].get('curve_samples', 'few')}): losses there are not those of the table.",
        f"Times less drift, half of the range: than {name}, over at least half of the task losses that both reach.",
        "Drift at equal task loss is read off the line, in log drift, between the two learning rates around that loss; "
        f"nothing is extrapolated. The loss is {name}’s lowest; “learns more at every rate”: the method was not run at "
        "a rate low enough to learn so little. Intervals there count the seeds’ spread in task loss, too.",
        f"Steps and seconds are to the held-out loss where {name} ends at its best rate, on the mean of the seeds’ "
        "learning curves; those seconds count the preparation. Training is timed from the first measured step on, as "
        "compiling comes before. Runs that shared a GPU slowed each other.",
    ]
    for kind, source, measure in dict.fromkeys(key for row in rows for key in row["scores"] if key[2] == "exact_match"):
        shares = [comparison["base"].get(kind, {}).get(source, {}).get(measure) or 0.0]
        shares += [e.value for row in rows for key, e in row["scores"].items() if key == (kind, source, measure)]
        if max(shares) < MEANINGFUL:
            found.append(
                f"Exact match on {source} is at most {max(shares):.1%} for every method and the base model: too little "
                "to compare. It is in runs.csv."
            )
    return found


# --- Markdown and CSV


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
    if rows and milestones(comparison):
        lines += ["## How soon it was learned", ""]
        lines += markdown_table("method", [row["title"] for row in rows], milestone_columns(comparison, rows))
    for ability in abilities(comparison):
        if reference and (found := all_ratios(comparison, ability, reference)):
            heading = f"## Drift on {label(comparison, ability)}, beside {titles[reference]}, at equal task loss"
            lines += [plain(heading), ""]
            lines += markdown_table("method", [titles[method] for method in found], equal_loss_columns(found))
    lines += ["## How to read this", "", *(f"- {plain(note)}" for note in notes(comparison, rows)), ""]
    lines += [f"## Runs: {run_count(comparison)}", ""]
    lines += markdown_table("method", [titles[run["method"]] for run in comparison["runs"]], run_columns(comparison))
    lines += ["## Methods", ""]
    lines += [f"- {plain(method['title'])}: {plain(method['source'])}" for method in comparison["methods"].values()]
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    pairs = [*circumstances(comparison), *settings(comparison["recipe"])]
    lines += [f"| {plain(key)} | {plain(value)} |" for key, value in pairs]
    lines += ["", "## Again", "", "```", comparison["command"], "```"]
    return "\n".join(lines) + "\n"


def markdown_table(corner: str, names: Sequence[str], columns: list[Column], base: Sequence[Cell] = ()) -> list[str]:
    """Rows of a Markdown table and an empty line; the best of each column in bold."""

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
    """Text that means itself in Markdown, and stays in its cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def titles_of(comparison: dict[str, Any]) -> dict[str, str]:
    return {method: about["title"] for method, about in comparison["methods"].items()}


def write_csv(path: Path, comparison: dict[str, Any]) -> None:
    """A row for each run, whatever became of it, with everything measured; a column's name is its path."""
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
        row = {key: run.get(key) for key in fields} | {"seconds": training_seconds(run)}
        row |= {f"{key} parameters": value for key, value in (run.get("parameters") or {}).items()}
        for kind, datas in (run.get("results") or {}).items():
            for data, numbers in datas.items():
                row |= {f"{kind} {data} {key}": value for key, value in numbers.items()}
        rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*fields, *(key for row in rows for key in row)])))
        writer.writeheader()
        writer.writerows(rows)


# --- HTML


def html_report(comparison: dict[str, Any]) -> str:
    """report.html, filled in: a self-contained page."""
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
        "soon": html_table("How soon it was learned", list(titles.values()), milestone_columns(comparison, rows)),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in notes(comparison, rows)),
        "run_count": escape(run_count(comparison)),
        "runs": html_table("All runs", [titles[run["method"]] for run in comparison["runs"]], run_columns(comparison)),
        "sources": html_pairs((about["title"], about["source"]) for about in comparison["methods"].values()),
        "circumstances": html_pairs(circumstances(comparison)),
        "settings": html_pairs(settings(comparison["recipe"])),
        "command": escape(comparison["command"]),
        "data": embedded(chart_data(comparison)),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def html_table(caption: str, names: Sequence[str], columns: list[Column], base: bool = False) -> str:
    """A table that the page's script sorts: each cell carries its key, the best of a column its mark."""

    def cell(column: Column, c: Cell) -> str:
        best = c.key is not None and c.key == best_of(column)
        key = "" if c.key is None else f' data-key="{escape(sort_key(c.key))}"'
        mark = ' class="best"' if best else ""
        extra = f"<small>{escape(c.extra)}</small>" if c.extra else ""
        return f"<td{key}{mark}>{escape(c.text)}{' <span>best</span>' if best else ''}{extra}</td>"

    heads = [f'<th scope="col" data-better="{c.better}"><button>{escape(c.label)}</button></th>' for c in columns]
    head = f'<th scope="col"><button>method</button></th>{"".join(heads)}'
    if any(column.group for column in columns):  # two rows: the groups above, the first column through both
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
    """JSON that may stand inside <script>: no tag can open or close in it, and what is no number is null."""
    text = json.dumps(without_nan(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def chart_data(comparison: dict[str, Any]) -> dict[str, Any]:
    """What the page's charts show, with the text of their tooltips."""
    base, titles = comparison["base"], titles_of(comparison)
    tabs = []
    for ability in abilities(comparison):
        found = {method: points(comparison, method, ability) for method in titles}
        tables = {}
        for reference, title in titles.items():
            if beside := all_ratios(comparison, ability, reference):
                names = [titles[method] for method in beside]
                tables[reference] = html_table(f"Drift beside {title}", names, equal_loss_columns(beside))
        tabs.append(
            {
                "label": label(comparison, ability),
                "methods": {method: frontier_series(comparison, method, ps) for method, ps in found.items() if ps},
                "edge": frontier_edge(list(found.values())),
                "beside": tables,
            }
        )
    curves = {method: curve_series(comparison, method) for method in titles}
    means = [best_curves(comparison, method)[1] for method in titles]
    return {
        "titles": titles,
        "reference": reference_method(comparison),
        "task": task(comparison),
        "base": base["learn"][task(comparison)]["loss"],
        "abilities": tabs,
        "curves": {method: curve for method, curve in curves.items() if curve},
        "curves_edge": curves_edge(means),
    }


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


def frontier_series(comparison: dict[str, Any], method: str, found: list[Point]) -> dict[str, Any]:
    """A method's points, with the range of its seeds, and its lower hull."""
    title, data = comparison["methods"][method]["title"], task(comparison)
    shown = []
    for p in found:
        xs, ys = ([seed[i] for seed in p.seeds.values()] for i in (0, 1))
        loss, drift = loss_cell(mean_interval(xs)), drift_cell(exponential(mean_interval(ys)))
        shown.append(
            {
                "x": [p.loss, min(xs), max(xs)],
                "y": [math.exp(y) for y in (p.log_drift, min(ys), max(ys))],
                "tip": [
                    title,
                    f"learning rate {rate_text(p.rate)}, {plural(len(p.seeds), 'seed')}",
                    f"{data} loss {loss.text} {loss.extra}",
                    f"drift {drift.text}" + (f" ({drift.extra})" if drift.extra else ""),
                ],
            }
        )
    return {"points": shown, "line": [[p.loss, math.exp(p.log_drift)] for p in lower_hull(found)]}


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


# --- pictures


def look(i: int) -> dict[str, Any]:
    """Color, marker and line of the method in place i."""
    color, hollow = COLORS[i % 8], i % 16 >= 8
    return {
        "color": color,
        "marker": MARKERS[(i + 4) % 8 if hollow else i % 8],
        "markerfacecolor": "white" if hollow else color,
        "linestyle": "--" if hollow else "-",
        "linewidth": 1.3,
        "markersize": 5,
    }


def draw_frontier(ax: Any, found: list[Point], edge: float, title: str, style: dict[str, Any]) -> None:
    """A method's lower hull, its points up to a task loss of `edge`, and the range of their seeds."""
    if not found:
        return
    hull, found = lower_hull(found), [p for p in found if p.loss <= edge]
    ax.plot([p.loss for p in hull], [math.exp(p.log_drift) for p in hull], label=title, **style)
    ax.plot([p.loss for p in found], [math.exp(p.log_drift) for p in found], **style | {"linestyle": ""})
    for p in found:
        xs, ys = zip(*p.seeds.values())
        middle, x, y = math.exp(p.log_drift), (min(xs), max(xs)), (math.exp(min(ys)), math.exp(max(ys)))
        ax.plot(x, (middle, middle), color=style["color"], linewidth=0.8)
        ax.plot((p.loss, p.loss), y, color=style["color"], linewidth=0.8)


def draw_curves(ax: Any, comparison: dict[str, Any], method: str, title: str, style: dict[str, Any]) -> None:
    """A method's mean learning curve at its best rate, and the range of its seeds."""
    rate, mean, curves = best_curves(comparison, method)
    if not mean:
        return
    steps = [point.step for point in mean]
    losses = [[point.loss for point in seeds] for seeds in zip(*curves)]
    ax.plot(steps, [point.loss for point in mean], label=f"{title}, {rate}", **style)
    ax.fill_between(
        steps, list(map(min, losses)), list(map(max, losses)), color=style["color"], alpha=0.15, linewidth=0
    )


def draw(folder: Path, comparison: dict[str, Any]) -> None:
    """The two charts as PNG and SVG, the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    methods, names, data = titles_of(comparison), abilities(comparison), task(comparison)
    # text stays text: small, searchable, in the reader's own font
    with plt.rc_context({"svg.hashsalt": "corda", "svg.fonttype": "none", "axes.titlesize": 11}):
        if names:
            wide = min(3, len(names))
            high = -(-len(names) // wide)
            size = (4.2 * wide + 2.8, 4.4 * high)
            figure, grid = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
            for ax, ability in zip(grid.flat, names):
                found = {title: points(comparison, method, ability) for method, title in methods.items()}
                edge = frontier_edge(list(found.values()))
                for i, (title, ps) in enumerate(found.items()):
                    draw_frontier(ax, ps, edge, title, look(i))
                say_outside(ax, [title for title, ps in found.items() if any(p.loss > edge for p in ps)])
                ax.set(yscale="log", title=label(comparison, ability), xlabel=f"{data} loss (nats per token)")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("")
                ax.set_ylabel("drift (nats per token)" if ax in grid[:, 0] else "")
            for ax in grid.flat[len(names) :]:
                ax.remove()
            save_picture(figure, folder / "frontier")
        figure, ax = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
        for i, (method, title) in enumerate(methods.items()):
            draw_curves(ax, comparison, method, title, look(i))
        means = {title: best_curves(comparison, method)[1] for method, title in methods.items()}
        edge, low = curves_edge(list(means.values())), min((p.loss for mean in means.values() for p in mean), default=0)
        if outside := [title for title, mean in means.items() if any(p.loss > edge for p in mean)]:
            ax.set_ylim(low - 0.05 * (edge - low), edge)
            say_outside(ax, outside)
        ax.set(xlabel="step", ylabel=f"held-out {data} loss (nats per token)")
        save_picture(figure, folder / "curves")


def say_outside(ax: Any, titles: list[str]) -> None:
    """Whose points a picture does not show."""
    if titles:
        text = "some points lie outside: " + ", ".join(titles)
        ax.text(0.99, 0.99, text, transform=ax.transAxes, ha="right", va="top", fontsize=8, alpha=0.7)


def save_picture(figure: Any, path: Path) -> None:
    """Legend, PNG and SVG."""
    import matplotlib.pyplot as plt

    entries: dict[str, Any] = {}
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        entries |= {title: line for line, title in zip(*ax.get_legend_handles_labels())}
    if entries:
        figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
