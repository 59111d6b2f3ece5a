"""A comparison in sentences: its results, how to read them, and how they were made."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..compare.frontier import (
    NEAR,
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
from ..compare.near import near, near_loss
from ..evaluation.measures import MEASURES
from .tables import Cell, difference_cell, highest_score, loss_cell, median_ratio, steps_cell
from .text import counts, label, labels_of, loss_unit, plural, setting_text, spread, times_text
from .verdicts import LEARNED, kept_how, moved, percent, times_as_likely


def headline(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """One sentence each on drift at equal task loss, on task loss and on steps, and on reasons to doubt them. The most
    important comes first."""
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
            sentences.append(f"{fastest['title']} needs the fewest steps to reach {title}’s final loss: {steps}.")
    for ability in abilities(comparison)[:1]:  # the first ability to keep, if there is one
        at_best, ratio_at_best = drift_sentence(comparison, ability, ref, others)
        over_range, ratio_over_range = range_sentence(comparison, ability, ref, others)
        both = [over_range, at_best] if ratio_over_range > 2 * ratio_at_best else [at_best, over_range]
        first_place = ability[0] == "keep" and (ratio_at_best or ratio_over_range)  # no difference is said last
        place = 0 if first_place else len(sentences)
        sentences[place:place] = [sentence for sentence in both if sentence]
    first = min([ref, *others], key=lambda row: row["loss"].value)
    for row in [ref] if first is ref else [ref, first]:
        if row["best"].note:
            best = row["best"]
            sentences.append(f"{row['title']}’s best learning rate ({setting_text(best.setting)}): {best.note}.")
    return sentences


def text_of(cell: Cell) -> str:
    return f"{cell.text} {cell.extra}".strip()


def loss_sentence(ref: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Which method learned most, and whether the difference is more than the seeds' spread."""
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
    """A ratio, halved if it has no interval over seeds: so the largest ratio is not chosen by the luck of one seed."""
    return times.value if times.low is not None else times.value / 2


def range_sentence(
    comparison: dict[str, Any], ability: Ability, ref: dict[str, Any], others: list[dict[str, Any]]
) -> tuple[str, float]:
    """The method that drifts least over the task losses that it and the reference both reach, and its median ratio.

    ("", 0) if no method drifts clearly less than the reference."""
    hulls = {row["title"]: lower_hull(points(comparison, row["method"], ability)) for row in [ref, *others]}
    by_title = {row["title"]: ratios(hulls[row["title"]], hulls[ref["title"]]) for row in others}
    both = {name: at for name, at in by_title.items() if at is not None and at.loss[0] < at.loss[-1]}
    if not both:
        return "", 0.0
    title = max(both, key=lambda name: claim(median_ratio(both[name])))
    half, losses = median_ratio(both[title]), both[title].loss
    if half.value < 1.5:
        return "", 0.0
    notes = []
    if half.low is not None:
        notes.append(f"95\u00a0% interval over {half.seeds} seeds: {spread(half, times_text)}")
    if unsure := sum(at.low is None for at in both[title].ratio):
        share = unsure / len(both[title].ratio)
        notes.append(f"no interval for {share:.0%} of these losses, as a rate next to them was run with one seed")
    less = f"{title} drifts at least {times_text(half.value)} times less than {ref['title']}"
    where = f"over half of the task losses that both reach, {losses[0]:.4f} to {losses[-1]:.4f}"
    return f"{less} on {label(comparison, ability)} {where} ({'; '.join(notes)}).", half.value


def drift_sentence(
    comparison: dict[str, Any], ability: Ability, ref: dict[str, Any], others: list[dict[str, Any]]
) -> tuple[str, float]:
    """The method that drifts least at the reference's lowest task loss, and its ratio: 0 if it is not clearly less."""
    title, where = ref["title"], label(comparison, ability)
    at = f"{title}’s best task loss on {task(comparison)} ({ref['equal_loss']:.4f})"
    theirs = lower_hull(points(comparison, ref["method"], ability))
    hulls = {row["title"]: lower_hull(points(comparison, row["method"], ability)) for row in others}
    all_ratios = {name: ratio_at(hull, theirs, ref["equal_loss"]) for name, hull in hulls.items()}
    by_title = {name: ratio for name, ratio in all_ratios.items() if ratio is not None}
    if not by_title:
        return f"No other method was measured on both sides of {at}.", 0.0
    least = max(by_title, key=lambda name: claim(by_title[name]))
    ratio = by_title[least]
    if ratio.value < 1.1:
        return f"At {at}, no other method that reaches it drifts clearly less than {title} on {where}.", 0.0
    sure = "no interval: fewer than two seeds on both sides of that loss"
    if ratio.low is not None:
        sure = f"95\u00a0% interval over {ratio.seeds} seeds: {spread(ratio, times_text)}"
        sure += "; the seeds’ spread could explain it" if ratio.low <= 1 else ""
    times = times_text(ratio.value)
    return f"At {at}, {least} drifts {times} times less than {title} on {where} ({sure}).", ratio.value


def verdict_sentences(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """For the task and for each ability, which methods learned or kept it at their best learning rates, by the
    thresholds of `verdicts`."""
    before = comparison["base"].get("learn", {}).get(task(comparison), {}).get("loss")
    done = [row for row in rows if row["best"]]
    sentences = []
    if done and before is not None and not labels_of(comparison):  # whose base model has an untrained head
        times = [(row["title"], times_as_likely(before, row["loss"].value)) for row in done]
        judged = [(f"{'' if t >= LEARNED else 'not '}learned by", f"{title} ({t:.3g} times)") for title, t in times]
        meaning = "in brackets how many times as likely a token of a right answer is as for the base model"
        sentences.append(_verdict(task(comparison), judged, meaning))
    for ability in abilities(comparison):
        drifts = [(row["title"], row["drift"][ability].value) for row in done if row["drift"][ability]]
        judged = [(f"{kept_how(drift)} by", f"{title} ({percent(moved(drift))})") for title, drift in drifts]
        meaning = "in brackets how much of the probability of a token of an answer moved, at most, on average"
        if judged:
            sentences.append(_verdict(label(comparison, ability), judged, meaning))
    return sentences


def _verdict(name: str, judged: list[tuple[str, str]], meaning: str) -> str:
    """One sentence on (verdict, method) pairs. The methods of a verdict stand together."""
    parts = [
        f"{how} {', '.join(text for h, text in judged if h == how)}" for how in dict.fromkeys(h for h, _ in judged)
    ]
    return f"{name}, at each method’s best learning rate: {'; '.join(parts)}; {meaning}."


def near_sentences(comparison: dict[str, Any]) -> list[str]:
    """How much less methods drift near the reference's best task loss, the best of them first; how to read it."""
    reference, highest = reference_method(comparison), near_loss(comparison)
    if reference is None or highest is None:
        return []
    titles = {method: about["title"] for method, about in comparison["methods"].items()}
    named, name = label(comparison, abilities(comparison)[0]), titles[reference]
    rows = {titles[method]: row for method, row in near(comparison).items()}
    most = {title: row.most.value for title, row in rows.items() if row.most}
    least = {title: row.least.value for title, row in rows.items() if row.least and row.most}
    both, sentences = "over all task losses that both reach", []
    if most:
        best = max(most, key=lambda title: most[title])
        sentences.append(
            f"At a task loss at most {NEAR} above {name}’s best ({highest - NEAR:.4f}), {best} drifts "
            f"{times_text(most[best])} times less than {name} on {named}; {both}, at least {times_text(least[best])} "
            "times less."
        )
        steady = max(least, key=lambda title: least[title])
        if steady != best:
            sentences.append(f"{steady} drifts at least {times_text(least[steady])} times less {both}.")
    sentences.append(
        f"“Settings” are those between which the drift on {named} is interpolated at a task loss of {highest:.4f}. The "
        "other abilities, of which no method was shown anything, are read at the same settings."
    )
    return sentences


def run_count(comparison: dict[str, Any]) -> str:
    """The number of runs, and of those that do not count by status."""
    states = Counter(status(run) for run in comparison["runs"])
    done = states.pop("done", 0)
    return "; ".join(filter(None, [f"{done} of {plural(len(comparison['runs']), 'run')} done", counts(states)]))


def settings(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs such as ("train.max_steps", "150")."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from settings(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)


def circumstances(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine, the package versions and the commit."""
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
    samples = comparison["recipe"].get("curve_samples", "few")
    units = (
        "Task loss and drift are in nats per token of held-out answers. Drift is the mean KL divergence of the tuned "
        "model’s predictions from the base model’s, so it is 0 for the base model. Lower is better in both."
    )
    if labels_of(comparison):
        units = (
            f"Task loss is in {loss_unit(comparison)}, of held-out texts. Lower is better. The base model’s numbers "
            "are those of its head before training, which is random where the checkpoint has none."
        )
    drifts = [
        f"Times less drift than {name}, median: over half of the task losses that both reach, the method drifts "
        "at least so many times less.",
        f"Drift at {name}’s task loss is drift at {name}’s lowest task loss, interpolated in log drift between the two "
        "learning rates around it. Nothing is extrapolated. “Learns more at every rate” means that the method was not "
        "run at a rate low enough to learn so little. These intervals include the seeds’ spread in task loss.",
    ]
    lines = [
        units,
        "A method’s best learning rate is the one with its lowest mean task loss. If that is the lowest or highest "
        "rate of its sweep, other rates may do better. Only runs that are done count. The others "
        "are listed with their reasons.",
        "± and “to” give 95 % t-intervals over seeds, for each method by itself. There is none where fewer than two "
        "seeds ran. “Not settled” stands for an interval that spans a factor of more than 100. The best of many "
        "methods is best partly by luck, which no interval here accounts for.",
        f"“minus {name}’s” is the difference in task loss at the two best rates, seed by seed: with one seed all "
        "methods see the same samples in the same order.",
        "Learning curves, and steps and seconds to a loss, are measured on the first of the task’s held-out samples "
        f"({samples}). So their losses differ from those of the table.",
        *([] if labels_of(comparison) else drifts),
        f"Steps and seconds count until the mean of the seeds’ learning curves reaches the loss where {name} ends at "
        "its best rate. The seconds include the preparation. Training is timed from the first measured step on, "
        "because compiling comes before it. Runs that shared a GPU slowed each other.",
    ]
    for key in dict.fromkeys(key for row in rows for key in row["scores"]):
        measure, highest = MEASURES[key[2]], highest_score(comparison, rows, key)
        if highest < measure.floor:
            lines.append(
                f"{measure.label.capitalize()} on {key[1]} is at most {format(highest, measure.form)} for every method "
                "and the base model: too little to compare. It is in runs.csv."
            )
    return lines
