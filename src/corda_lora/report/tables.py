"""The tables of a comparison, as columns of cells, for HTML and Markdown alike."""

from typing import Any, NamedTuple

from ..compare.frontier import (
    WIDER,
    Ability,
    Estimate,
    Ratios,
    abilities,
    around,
    is_finite,
    lower_hull,
    milestones,
    points,
    ratios,
    reach,
    reference_method,
    setting_of,
    status,
    task,
    training_seconds,
)
from ..compare.near import near, near_loss, unnamed
from ..evaluation.measures import MEASURES
from .text import counts, label, number, plural, setting_text, spread, times_text


class Cell(NamedTuple):
    text: str = "—"
    extra: str = ""  # an interval or a remark, in small print
    key: Any = None  # the number or text to sort by; None comes last in both directions


class Column(NamedTuple):
    group: str
    label: str
    better: str  # "low", "high", or "" where neither is better
    cells: list[Cell]
    base: str = ""  # the base model's value


def loss_cell(e: Estimate | None) -> Cell:
    return measure_cell(e, MEASURES["loss"].form)


def difference_cell(e: Estimate | None) -> Cell:
    cell = loss_cell(e)
    return cell if e is None else cell._replace(text=f"{e.value:+.4f}".replace("-", "−"))


def drift_cell(e: Estimate | None) -> Cell:
    return Cell() if e is None else Cell(number(e.value), spread(e, number), e.value)


def ratio_cell(e: Estimate | None) -> Cell:
    return Cell() if e is None else Cell(times_text(e.value), spread(e, times_text), e.value)


def measure_cell(e: Estimate | None, form: str) -> Cell:
    """A mean with its interval, both printed by the format specification `form`."""
    if e is None:
        return Cell()
    return Cell(format(e.value, form), "" if e.high is None else f"± {format(e.high - e.value, form)}", e.value)


def steps_cell(e: Estimate | None) -> Cell:
    if e is None:
        return Cell()
    return Cell(f"{e.value:.0f}", "" if e.high is None else f"± {number(e.high - e.value, 2)}", e.value)


def plain_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(number(value), "", value)


def summary_columns(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[Column]:
    """The table of methods, each at its best learning rate. `rows` is what `frontier.summary` returns."""
    base, data, reference = comparison["base"], task(comparison), reference_method(comparison)
    name = comparison["methods"][reference]["title"] if reference else ""

    def rate(row: dict[str, Any]) -> Cell:
        best = row["best"]
        return Cell(setting_text(best.setting), best.note.replace(WIDER, ""), best.setting.rate) if best else Cell()

    def equal(row: dict[str, Any], ability: Ability) -> Cell:
        measured, at = points(comparison, row["method"], ability), row["equal_loss"]
        if row["equal"][ability] or not measured or at is None:
            cell = drift_cell(row["equal"][ability])
            swept = [p.setting for p, _ in around(lower_hull(measured), at or 0.0) if p.setting.swept]
            return cell._replace(extra="; ".join(filter(None, [cell.extra, " … ".join(map(setting_text, swept))])))
        return Cell("—", "not reached" if min(p.loss for p in measured) > at else "learns more at every rate")

    def reach(row: dict[str, Any], which: str) -> Cell:
        at = row["reach"]
        cell = steps_cell(getattr(at, which) if at else None)
        if at and cell.key is None:
            return Cell("—", "not reached")
        # Some of the reference's own seeds end above the loss, which is their mean; that is not worth a remark.
        if at and at.reached < at.seeds and row["method"] != reference:
            return Cell(cell.text, f"{at.reached} of {plural(at.seeds, 'seed')}", cell.key)
        return cell

    def parameters(value: float | None) -> Cell:
        return Cell(f"{number(value / 1e6)} M", "", value) if value else Cell()

    def runs(row: dict[str, Any]) -> Cell:
        return Cell(f"{row['done']} of {row['runs']}", counts(row["not_done"]), row["done"])

    loss = f"{base['learn'][data]['loss']:.4f}"
    columns = [
        Column("", "learning rate", "", [rate(row) for row in rows]),
        Column("task loss", data, "low", [loss_cell(row["loss"]) for row in rows], loss),
        Column("task loss", f"minus {name}’s", "low", [difference_cell(row["beside"]) for row in rows]),
    ]
    for a in abilities(comparison):
        cells = [equal(row, a) for row in rows]
        columns.append(Column(f"drift at {name}’s task loss", label(comparison, a), "low", cells))
    for a in abilities(comparison)[:1]:
        by_method = all_ratios(comparison, a, reference) if reference else {}
        cells = [ratio_cell(at and median_ratio(at)) for at in (by_method.get(row["method"]) for row in rows)]
        columns.append(Column(f"times less drift than {name}", f"{label(comparison, a)}, median", "high", cells))
    for a in abilities(comparison):
        cells = [drift_cell(row["drift"][a]) for row in rows]
        columns.append(Column("drift at its own task loss", label(comparison, a), "low", cells, "0"))
    if any(row["predicted"] is not None for row in rows):
        cells = [plain_cell(row["predicted"]) for row in rows]
        columns.append(Column("drift at its own task loss", "predicted, of the context", "", cells))
    for which in ("steps", "seconds"):
        columns.append(Column(f"to reach {name}’s final loss", which, "low", [reach(row, which) for row in rows]))
    for key in dict.fromkeys(key for row in rows for key in row["scores"]):
        kind, source, name = key
        measure, before = MEASURES[name], base.get(kind, {}).get(source, {}).get(name)
        cells = [measure_cell(row["scores"].get(key), measure.form) for row in rows]
        if highest_score(comparison, rows, key) >= measure.floor:
            text = "" if before is None else format(before, measure.form)
            columns.append(Column(measure.title, source, measure.better, cells, text))
    columns.append(Column("seconds", "training", "low", [plain_cell(row["seconds"]) for row in rows]))
    columns.append(Column("seconds", "preparing", "", [plain_cell(row["prepare_seconds"]) for row in rows]))
    if any(row["peak_bytes"] for row in rows):
        cells = [plain_cell(row["peak_bytes"] and row["peak_bytes"] / 1e9) for row in rows]
        columns.append(Column("memory", "peak, GB", "low", cells))
    columns.append(Column("parameters", "adapter", "", [parameters(row["adapter"]) for row in rows]))
    columns.append(Column("parameters", "trained", "", [parameters(row["trainable"]) for row in rows]))
    columns.append(Column("runs", "done", "", [runs(row) for row in rows]))
    return columns


def highest_score(comparison: dict[str, Any], rows: list[dict[str, Any]], key: tuple[str, str, str]) -> float:
    """The highest value of a measure on some data, over all methods and the base model."""
    kind, source, name = key
    values = [row["scores"][key].value for row in rows if key in row["scores"]]
    return max([comparison["base"].get(kind, {}).get(source, {}).get(name) or 0.0, *values])


def near_columns(comparison: dict[str, Any]) -> list[Column]:
    """The table of what each method keeps near the reference's best task loss: see `compare.near`. None for comparisons
    without a context, or without a method that sweeps an option."""
    reference, others = reference_method(comparison), unnamed(comparison)
    loss, rows = near_loss(comparison), list(near(comparison).values())
    if not any(run.get("swept") for run in comparison["runs"]) or reference is None or loss is None or not others:
        return []
    named, name = abilities(comparison)[0], comparison["methods"][reference]["title"]
    at, times = f"drift at a task loss of {loss:.4f}", f"times less than {name}"

    def drift(ability: Ability) -> list[Cell]:
        return [drift_cell(row.drift[ability]) if row.settings else Cell("—", "not reached") for row in rows]

    def ratio(ability: Ability) -> list[Cell]:
        return [ratio_cell(row.times.get(ability)) for row in rows]

    settings = [Cell(" … ".join(map(setting_text, row.settings)) or "—") for row in rows]
    columns = [Column("", "settings", "", settings), Column(at, label(comparison, named), "low", drift(named))]
    columns += [Column(at, f"{label(comparison, a)}, not named", "low", drift(a)) for a in others]
    columns.append(Column(times, label(comparison, named), "high", ratio(named)))
    columns += [Column(times, f"{label(comparison, a)}, not named", "high", ratio(a)) for a in others]
    losses = f"{label(comparison, named)}, over task losses"
    most = [ratio_cell(row.most) for row in rows]
    columns.append(Column(losses, f"up to {loss:.4f}: the most times less than {name}", "high", most))
    least = [ratio_cell(row.least) for row in rows]
    columns.append(Column(losses, f"that both reach: the least times less than {name}", "high", least))
    return columns


def milestone_columns(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[Column]:
    """Steps and seconds that each method needs, at its best learning rate, to reach the losses of `milestones`."""
    columns = []
    for which in ("steps", "seconds"):
        for loss in milestones(comparison):
            reached = [
                reach(comparison, row["method"], row["best"].setting, loss) if row["best"] else None for row in rows
            ]
            cells = [steps_cell(getattr(at, which)) if at else Cell() for at in reached]
            columns.append(Column(f"{which} to a held-out loss of", f"{loss:.4f}", "low", cells))
    return columns


def median_ratio(at: Ratios) -> Estimate:
    """The median over the shared task losses: over half of them the ratio is at least this."""
    return sorted(at.ratio, key=lambda r: r.value)[len(at.ratio) // 2]


def equal_loss_columns(by_method: dict[str, Ratios]) -> list[Column]:
    """How many times less each method drifts than the method that it is compared with, at equal task loss."""

    def loss(i: int) -> list[Cell]:
        return [Cell(f"{at.loss[i]:.4f}", "", at.loss[i]) for at in by_method.values()]

    def ratio(i: int) -> list[Cell]:
        return [ratio_cell(at.ratio[i]) for at in by_method.values()]

    shared, less = "task losses that both reach", "times less drift (below 1: more)"
    return [
        Column(shared, "from", "", loss(0)),
        Column(shared, "to", "", loss(-1)),
        Column(less, "median", "high", [ratio_cell(median_ratio(at)) for at in by_method.values()]),
        Column(less, "at the lowest loss", "high", ratio(0)),
        Column(less, "in the middle", "high", ratio(50)),  # of 101
        Column(less, "at the highest loss", "high", ratio(-1)),
    ]


def all_ratios(comparison: dict[str, Any], ability: Ability, reference: str) -> dict[str, Ratios]:
    """For each method that has task losses in common with the reference, how many times less it drifts."""
    hulls = {method: lower_hull(points(comparison, method, ability)) for method in comparison["methods"]}
    by_method = {method: ratios(hull, hulls[reference]) for method, hull in hulls.items() if method != reference}
    return {method: at for method, at in by_method.items() if at}


def run_columns(comparison: dict[str, Any]) -> list[Column]:
    """The table of all runs."""
    runs = comparison["runs"]

    def measured(kind: str, name: str, key: str) -> list[Any]:
        values = [(run.get("results") or {}).get(kind, {}).get(name, {}).get(key) for run in runs]
        return [value if is_finite(value) else None for value in values]

    data = task(comparison)
    rates = [Cell(setting_text(setting_of(run)), "", run["learning_rate"]) for run in runs]
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


def best_of(column: Column) -> float | None:
    """The key of the column's best cell; None if no cell is better than another."""
    keys = [cell.key for cell in column.cells if isinstance(cell.key, (int, float))]
    if not column.better or len(set(keys)) < 2:
        return None
    return min(keys) if column.better == "low" else max(keys)
