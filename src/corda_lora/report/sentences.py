"""A comparison in sentences: its results, how to read them, and how they were made."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..compare.frontier import (
    Ability,
    Estimate,
    abilities,
    lower_hull,
    points,
    ratio_at,
    ratios,
    reference_method,
    status,
    task,
)
from ..evaluation.measures import MEASURES
from .tables import Cell, difference_cell, highest_score, loss_cell, over_half, steps_cell
from .text import counts, label, plural, spread, times_text


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
    for key in dict.fromkeys(key for row in rows for key in row["scores"]):
        measure, highest = MEASURES[key[2]], highest_score(comparison, rows, key)
        if highest < measure.floor:
            found.append(
                f"{measure.label.capitalize()} on {key[1]} is at most {format(highest, measure.form)} for every method "
                "and the base model: too little to compare. It is in runs.csv."
            )
    return found
