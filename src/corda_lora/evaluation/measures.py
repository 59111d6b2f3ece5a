"""The measures of a model, one function each.

A measure reads what one forward pass over the data gave (a view), and returns a number for it. `evaluate` runs the
passes, and every table reads here how a measure is printed. A new measure is one function under one `@measure(...)`.

The views are `answers.Answers`, `choices.Choices`, `generation.Continuations` and `labels.Labels`. Their `each` gives
the same view of each sample alone. This file imports no torch, so that reports of finished comparisons are written
without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..config import CordaError

if TYPE_CHECKING:
    from ..config import EvalConfig
    from .answers import Answers
    from .choices import Choices
    from .generation import Continuations
    from .labels import Labels

KINDS = ("keep", "learn", "text", "choices")  # of data: the fields of EvalConfig
# Measures of the kind "tasks" are of benchmarks: see `tasks.registry`.
KEPT = ("keep", "text")  # of these, the data whose drift is compared: what the model should not forget


def causal_head(model: Any) -> None:
    """Raises CordaError if a model does not predict the next token."""
    from ..models.targets import require_causal

    require_causal(model)


@dataclass(frozen=True)
class Measure:
    """A number that describes a model on data.

    Attributes:
        name: the key in `evaluate`'s results.
        total: the measure's sum over the tokens or samples of a view.
        reads: the pass whose views `total` takes: see `evaluate.PASSES`.
        kinds: the kinds of data that the measure is defined for: see `KINDS`.
        per: what the sum is divided by: the number of tokens, the number of samples, or nothing.
        better: which values are better; "" where neither are.
        form: the format specification for printing.
        unit: what the values are counted in; "" for a share or a count.
        meaning: added to the caption of tables where the name does not say enough.
        title: the heading in a comparison's table of methods; "" where the table has no column for this measure.
        floor: below this value the methods of a comparison cannot be told apart, and the column is left out.
        against_base: whether the measure needs the base model's predictions.
        requires: raises CordaError for a model that the measure is not defined for.
        wanted: whether the user asked for the measure.
        finish: applied to the mean.
        of_all: whether it is of all samples together, and no mean of what each sample gives.
    """

    name: str
    total: Callable[[Any], float]
    reads: str
    kinds: tuple[str, ...]
    per: Literal["token", "sample", ""] = "sample"
    better: Literal["low", "high", ""] = ""
    form: str = ".4f"
    unit: str = ""
    meaning: str = ""
    title: str = ""
    floor: float = 0.0
    against_base: bool = False
    requires: Callable[[Any], None] = causal_head
    wanted: Callable[[EvalConfig], bool] = lambda config: True
    finish: Callable[[float], float] = lambda mean: mean
    of_all: bool = False

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")


MEASURES: dict[str, Measure] = {}


def measure(reads: str, kinds: tuple[str, ...], **fields: Any) -> Callable[[Callable[[Any], float]], Measure]:
    """Register the function below as a measure, under its own name. See `Measure` for the fields."""

    def register(total: Callable[[Any], float]) -> Measure:
        name = total.__name__
        MEASURES[name] = Measure(name, total, reads, kinds, **fields)
        return MEASURES[name]

    return register


@dataclass
class Sampled:
    """A measure of one model, sample by sample, in the order of the pass, which is the same for both models.

    Attributes:
        totals: the measure's total for each sample.
        counts: what it is divided by: the tokens of each sample, or 1.
    """

    totals: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


def means(
    measures: Iterable[Measure], views: Iterable[tuple[str, Any]], sampled: dict[str, dict[str, Sampled]] | None = None
) -> dict[str, dict[str, float]]:
    """{side: {measure: value}} over (side, view) pairs, where side is "base" or "tuned".

    Each value is the measure's sum over all views of a side, divided by their tokens or samples.

    Args:
        sampled: a dictionary to fill: {side: {measure: its values sample by sample}}.
    """
    measures = list(measures)
    sums: dict[str, dict[str, float]] = {}
    counts: dict[tuple[str, str], int] = {}
    for side, view in views:
        values = sums.setdefault(side, {})
        for m in measures:
            if not m.against_base or view.base is not None:
                values[m.name] = values.get(m.name, 0) + m.total(view)
        for per in ("token", "sample"):
            counts[side, per] = counts.get((side, per), 0) + getattr(view, f"{per}s", 0)
        if sampled is not None:
            means_of = [m for m in measures if m.name in values and not m.of_all]
            by_measure = sampled.setdefault(side, {m.name: Sampled() for m in means_of})
            for single in view.each():
                for m in means_of:
                    by_measure[m.name].totals.append(m.total(single))
                    by_measure[m.name].counts.append(getattr(single, f"{m.per}s", 1))
    for side, values in sums.items():
        for m in measures:
            if m.name in values and m.per:
                values[m.name] = m.finish(values[m.name] / counts[side, m.per])
    return sums


# --- what the log-probabilities of the answers' tokens give ----------------------------------------------------------

ANSWERED = ("keep", "learn", "text")


@measure("answers", ANSWERED, per="token", better="low", unit="nats per token")
def loss(answers: Answers) -> float:
    """−log p of each answer token."""
    return -float(answers.log_probs.gather(1, answers.targets[:, None]).sum())


@measure("answers", ANSWERED, better="high", form=".1%")
def recall(answers: Answers) -> float:
    """Samples whose every answer token is the model's first choice, that is, what greedy decoding gives."""
    wrong = answers.first_choices != answers.targets  # (a,)
    return answers.samples - len(answers.rows[wrong].unique())


@measure(
    "answers",
    ANSWERED,
    per="token",
    better="low",
    form=".3g",
    unit="nats per token",
    meaning="mean KL(base‖tuned) per answer token",
    against_base=True,
)
def drift(answers: Answers) -> float:
    """KL(base‖tuned) of the next token's distribution."""
    return answers.divergence()


@measure("answers", ANSWERED, per="token", better="high", form=".1%", against_base=True)
def agreement(answers: Answers) -> float:
    """Answer tokens at which base and tuned model have the same first choice."""
    assert answers.base is not None
    return float((answers.first_choices == answers.base.argmax(1)).sum())


@measure("answers", ANSWERED, per="")
def tokens(answers: Answers) -> float:
    return answers.tokens


@measure("answers", ("text",), per="token", better="low", finish=math.exp)
def perplexity(answers: Answers) -> float:
    """exp of the loss."""
    return loss.total(answers)


# --- what greedy decoding gives --------------------------------------------------------------------------------------


@measure(
    "continuations",
    ("learn", "tasks"),
    better="high",
    form=".1%",
    title="right answers",
    floor=0.05,
    wanted=lambda config: bool(config.exact_match),
)
def exact_match(continuations: Continuations) -> float:
    """Samples whose greedy answer matches the response: see `EvalConfig.exact_match`."""
    return continuations.matching()


# --- what the likelihoods of given choices give ----------------------------------------------------------------------


@measure("choices", ("choices", "tasks"), better="high", form=".1%", title="right answers")
def accuracy(choices: Choices) -> float:
    """Samples whose right choice has the highest log-likelihood, summed over its tokens, after the prompt (as
    lm-evaluation-harness's `acc`)."""
    return choices.right()


@measure("choices", ("choices", "tasks"), per="")
def samples(choices: Choices) -> float:
    return choices.samples


# --- the metrics of benchmarks that nothing above is called as -------------------------------------------------------


def metric(name: str, form: str, meaning: str = "", title: str = "score") -> None:
    """Register the metric of a task. The task itself computes it: see `tasks.registry.Task.mean`."""
    MEASURES[name] = Measure(
        name, lambda scores: sum(scores.values), "tasks", ("tasks",), "sample", "high", form, "", meaning, title
    )


metric("pass@1", ".1%", "programs that pass all tests", title="right answers")
metric("score", ".2f", "of 10, as judged")
metric("matthews", ".3f", "Matthews correlation", title="Matthews correlation")
metric("pearson", ".3f", "Pearson correlation", title="Pearson correlation")
metric("spearman", ".3f", "Spearman rank correlation", title="Spearman correlation")
metric("f1", ".3f", "F1 of the second label", title="F1")


# --- a classifier's: the same names for its loss and what else it shares ---------------------------------------------


def labels_head(least: int, most: float = math.inf) -> Callable[[Any], None]:
    """What raises CordaError if a model is no classifier with so many labels; one stands for a number."""

    def check(model: Any) -> None:
        from ..models.targets import is_classifier

        if not is_classifier(model) or not least <= len(model.config.id2label) <= most:
            raise CordaError(f"{type(model).__name__} is no classifier with so many labels")

    return check


def f1_of(predicted: Sequence[float], targets: Sequence[float]) -> float:
    """F1 of label 1, of two: the harmonic mean of precision and recall."""
    import numpy as np

    found, right = np.asarray(predicted) == 1, np.asarray(targets) == 1
    return float(2 * (found & right).sum() / max(found.sum() + right.sum(), 1))


def pearson_of(predicted: Sequence[float], targets: Sequence[float]) -> float:
    """Pearson correlation, 0 where one of the two is constant. Of two labels, 0 and 1, it is Matthews'."""
    import numpy as np

    varied = all(np.ptp(values) > 0 for values in (predicted, targets))
    return float(np.corrcoef(predicted, targets)[0, 1]) if varied else 0.0


def spearman_of(predicted: Sequence[float], targets: Sequence[float]) -> float:
    """Pearson correlation of the ranks; equal values have their mean."""
    import pandas

    x, y = (pandas.Series(list(values)).rank().to_list() for values in (predicted, targets))
    return pearson_of(x, y)


def _of_all(compute: Callable[[list[float], list[float]], float]) -> Callable[[Labels], float]:
    """A measure of all texts together, times their number, as `Measure.total` is."""
    return lambda labels: labels.samples * compute(labels.predicted.tolist(), labels.targets.tolist())


def _of_labels(
    name: str, total: Callable[[Labels], float], least: int, most: float = math.inf, **other: Any
) -> Measure:
    """The measure of that name, of classifiers with `least` to `most` labels."""
    requires = labels_head(least, most)
    return replace(MEASURES[name], total=total, reads="labels", kinds=("learn",), requires=requires, **other)


OF_LABELS = [
    _of_labels("loss", lambda v: v.loss(), 1, per="sample", unit="nats per text, or the square of a number's error"),
    _of_labels("accuracy", lambda v: v.right(), 2),
    _of_labels("matthews", _of_all(pearson_of), 2, 2, of_all=True),
    _of_labels("f1", _of_all(f1_of), 2, 2, of_all=True),
    _of_labels("pearson", _of_all(pearson_of), 1, 1, of_all=True),
    _of_labels("spearman", _of_all(spearman_of), 1, 1, of_all=True),
    _of_labels("samples", lambda v: v.samples, 1),
]
