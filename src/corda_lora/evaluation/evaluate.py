"""Measure what a tuned model learned and what it kept: losses, accuracies, drift from the base model.

The base and the tuned model are one model with its adapter off and on (`disable_adapter`). Every batch runs through
both, one after the other, and none of the base model's outputs are stored. Where many tuned models are compared with
one base model, or where its weights are overwritten, its outputs are stored once: see `base_outputs`.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import CordaError, EvalConfig
from ..data.batches import Encoded, encode, encode_all, text_of
from ..data.labels import check_labels
from ..data.overview import check_fit, overview
from ..data.samples import UNCUT, Sample, load_samples
from ..models.targets import is_classifier, known_labels
from ..progress import console, quiet
from .answers import TUNED, Sides, read_answers, sides
from .base_outputs import BaseOutputs, record_base
from .choices import check_choices, read_choices
from .generation import read_continuations
from .labels import read_labels
from .measures import (
    KEPT,
    KINDS,
    MEASURES,
    OF_LABELS,
    Measure,
    Sampled,
    agreement,
    drift,
    loss,
    means,
    recall,
    tokens,
)
from .tasks.registry import checked_tasks

BothSides = dict[tuple[str, str], dict[str, Any]]  # of (kind, data), what each sample gave on each side


@dataclass(frozen=True)
class Measured:
    """A data set to measure on, as it was read.

    Attributes:
        samples: as they stand in the data.
        encoded: as tokens, see `measured_samples`.
    """

    kind: str
    name: str
    samples: Sequence[Sample]
    encoded: list[Encoded]

    @property
    def label(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Request:
    """What a pass runs: the model's sides over the samples of one data set. `base` is that of `evaluate`."""

    model: nn.Module
    tokenizer: Any
    config: EvalConfig
    progress: bool
    compared: Sides
    base: BaseOutputs | None
    data: Measured


def _answers(request: Request) -> Iterator[tuple[str, Any]]:
    r, reference = request, None
    if r.base is not None and r.data.kind in KEPT:
        reference = partial(r.base.log_probs, r.data.label)
    return read_answers(
        r.model, r.tokenizer, r.data.encoded, r.config.batch_tokens, r.progress, r.data.kind, r.compared, reference
    )


def _continuations(request: Request) -> Iterator[tuple[str, Any]]:
    r = request
    return read_continuations(r.model, r.tokenizer, r.data.samples, r.config, r.progress, r.compared)


def _labels(request: Request) -> Iterator[tuple[str, Any]]:
    r = request
    return read_labels(r.model, r.tokenizer, r.data.encoded, r.config.batch_tokens, r.progress, r.data.kind, r.compared)


def _choices(request: Request) -> Iterator[tuple[str, Any]]:
    r = request
    return read_choices(r.model, r.tokenizer, r.data.samples, r.config.batch_tokens, r.progress, r.compared)


# A pass runs the model over a data set once and yields (side, view). All measures that read the same pass share it.
PASSES: dict[str, Callable[[Request], Iterator[tuple[str, Any]]]] = {
    "answers": _answers,
    "continuations": _continuations,
    "choices": _choices,
    "labels": _labels,
}


def read_measured(
    config: EvalConfig, tokenizer: Any, progress: bool = True, labels: Sequence[str] | None = None
) -> list[Measured]:
    """All data in `config`, read and as tokens: what is wrong with it is known before a model is loaded.

    Args:
        labels: of a classifier, where they are known without the model.

    Raises:
        CordaError: data cannot be loaded or cut to its max_length, or has nothing to measure, or not those labels; or
            there is none.
    """
    loaded = {kind: [(data, load_samples(data)) for data in config.data(kind)] for kind in KINDS}
    if not any(loaded.values()) and not config.tasks:
        raise CordaError("nothing to measure: give some of keep, learn, text, choices, tasks")
    for data, samples in loaded["choices"]:
        check_choices(data.data, samples)
    found: dict[tuple[str, str], Measured] = {}
    for kind, pairs in loaded.items():
        for data, samples in pairs:
            if labels:
                check_labels(data.data, samples, labels)
            names = [data.data, f"{data.data} ({data.rows})", *(f"{data.data} ({n})" for n in range(3, len(pairs) + 1))]
            name = next(name for name in names if (kind, name) not in found)
            shown, encoded = measured_samples(kind, tokenizer, samples, data.max_length)
            each = found[kind, name] = Measured(kind, name, samples, encoded)
            about = overview(each.label, tokenizer, shown, encoded, data.max_length, end=kind == "learn")
            if progress:
                console.print(about)
    return list(found.values())


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    config: EvalConfig,
    progress: bool = True,
    base: BaseOutputs | None = None,
    record: dict[str, Tensor] | None = None,
    scores: BothSides | None = None,
    data: Sequence[Measured] | None = None,
) -> dict[str, Any]:
    """Measure all data in `config`, on the base model and, if `model` carries an adapter, on the tuned one.

    Args:
        base: the base model's stored outputs. With them, only `model` is run, as the tuned model.
        record: a dictionary to fill with what `BaseOutputs.save` stores. `model` has to be the base model.
        scores: a dictionary to fill with what each sample gave: {(kind, data): {side: {measure: `Sampled`}}}, and for
            tasks {("tasks", name): {side: `Scores`}}.
        data: what `read_measured` has read, if it was called before.

    Returns:
        {kind: {data: {"base": {measure: value}, "tuned": {...}}}}: kinds as in `KINDS`, data by name, measures as in
        `MEASURES`. The kind "tasks" has the benchmarks, each with its metric and its number of samples.

    Raises:
        CordaError: data cannot be loaded, no measure of its kind is defined for the model, or a task asks what the
            model cannot do. All data is loaded before anything is measured.
    """
    data, tasks = read_measured(config, tokenizer, progress) if data is None else data, checked_tasks(config)
    for each in data:
        check_labels(each.name, each.samples, known_labels(model))
    measures = {each.kind: measures_of(each.kind, config, model) for each in data}
    for task in tasks:
        task.requires(model, tokenizer, config)
    for each in data:
        check_fit(model, (e.ids for e in each.encoded))
    model.eval()
    compared = TUNED if base is not None else sides(model)
    results: dict[str, Any] = {}
    for each in data:
        if record is not None and each.kind in KEPT:
            record |= record_base(model, tokenizer, each.encoded, config.batch_tokens, progress, each.label)
        sampled = None if scores is None else scores.setdefault((each.kind, each.name), {})
        request = Request(model, tokenizer, config, progress, compared, base, each)
        results.setdefault(each.kind, {})[each.name] = _run(request, measures[each.kind], sampled)
    for task in tasks:
        by_side = {}
        for side, active in compared.items():
            with active(), quiet(not progress):
                by_side[side] = task.run(model, tokenizer, config)
        results.setdefault("tasks", {})[task.name] = {side: task.result(scored) for side, scored in by_side.items()}
        if scores is not None:
            scores.setdefault(("tasks", task.name), {}).update(by_side)
    return results


def evaluate_beside(
    load_base: Callable[[], nn.Module],
    load_tuned: Callable[[], nn.Module],
    tokenizer: Any,
    config: EvalConfig,
    progress: bool = True,
    scores: BothSides | None = None,
    data: Sequence[Measured] | None = None,
) -> dict[str, Any]:
    """`evaluate`, where the base model is another than the tuned one without its adapter. The base model is measured
    first, and is gone before the tuned one is loaded."""
    data = read_measured(config, tokenizer, progress) if data is None else data
    record: dict[str, Tensor] = {}
    model = load_base()
    results = evaluate(model, tokenizer, config, progress, record=record, scores=scores, data=data)
    with tempfile.TemporaryDirectory() as folder:
        BaseOutputs.save(Path(folder), record)
        base = BaseOutputs(Path(folder), model)
        del model, record
        tuned = evaluate(load_tuned(), tokenizer, config, progress, base, scores=scores, data=data)
    for kind, datas in tuned.items():
        for name, sides_of in datas.items():
            results[kind][name] |= sides_of
    return results


def measured_samples(
    kind: str, tokenizer: Any, samples: Sequence[Sample], max_length: int
) -> tuple[Sequence[Sample], list[Encoded]]:
    """The samples of a kind of data as they are measured, and as tokens.

    Running text is in windows. A response to learn ends with the end-of-text token, which was learned, too. Choices are
    never cut; they are shown with the right one.
    """
    if kind == "text":
        before = len(encode(tokenizer, Sample("", "", {}), 1).ids)  # a begin-of-text token
        samples = text_windows(tokenizer, samples, max(1, max_length - before))
    length = UNCUT if kind == "choices" else max_length
    return samples, encode_all(tokenizer, samples, length, end=kind == "learn")


def measures_of(kind: str, config: EvalConfig, model: nn.Module) -> list[Measure]:
    """The measures that are wanted for a kind of data and defined for the model.

    Raises the first measure's CordaError if none is defined for it."""
    defined, errors = [], []
    for measure in (*MEASURES.values(), *OF_LABELS):
        if kind in measure.kinds and measure.wanted(config):
            try:
                measure.requires(model)
                defined.append(measure)
            except CordaError as error:
                errors.append(error)
    if not defined:
        raise errors[0]
    return defined


def _run(request: Request, measures: Sequence[Measure], sampled: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    """{side: {measure: value}} for one data set; the measures that read the same pass share it.

    Args:
        sampled: a dictionary to fill: {side: {measure: `Sampled`}}.
    """
    results: dict[str, dict[str, float]] = {}
    for reads in dict.fromkeys(measure.reads for measure in measures):
        shared = [measure for measure in measures if measure.reads == reads]
        of_pass: dict[str, dict[str, Sampled]] | None = None if sampled is None else {}
        for side, values in means(shared, PASSES[reads](request), of_pass).items():
            results.setdefault(side, {}).update(values)
        for side, by_measure in (of_pass or {}).items():
            assert sampled is not None
            sampled.setdefault(side, {}).update(by_measure)
    return results


def text_windows(tokenizer: Any, samples: Sequence[Sample], length: int) -> list[Sample]:
    """Running text, joined line by line and cut into windows of about `length` tokens."""
    text = "\n".join(text_of(tokenizer, s) for s in samples)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [Sample("", tokenizer.decode(ids[i : i + length]), {}) for i in range(0, len(ids), length)]


def loss_and_drift(*args: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
    """{side: {"loss", "recall", "tokens"}}, for the tuned side also "drift" and "agreement" where the base model's
    predictions are known. Of a classifier, {side: {"loss"}}. The arguments are `read_answers`'s."""
    if is_classifier(args[0]):
        return means(OF_LABELS[:1], read_labels(*args, **kwargs))
    return means([loss, recall, drift, agreement, tokens], read_answers(*args, **kwargs))
