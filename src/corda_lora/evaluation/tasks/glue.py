"""GLUE: tasks of classifiers, measured on the development sets, whose labels are public."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...config import CordaError, DataConfig, EvalConfig
from ...data.rows import read_text
from ..measures import f1_of, pearson_of, spearman_of
from .registry import Scores, mean, task

HUB = "nyu-mll/glue"
MAX_LENGTH = 512  # tokens, as in the papers


class Columns(NamedTuple):
    """Where dev.tsv of a task, as GLUE publishes it, has the text, the second text and the label.

    Attributes:
        names: of all columns, where the file's first line does not name them.
    """

    text: str
    label: str
    pair: str = ""
    names: tuple[str, ...] = ()


COLUMNS = {
    "cola": Columns("sentence", "label", names=("source", "label", "mark", "sentence")),
    "sst2": Columns("sentence", "label"),
    "mrpc": Columns("#1 String", "Quality", "#2 String"),
    "qnli": Columns("question", "label", "sentence"),
    "rte": Columns("sentence1", "label", "sentence2"),
    "stsb": Columns("sentence1", "score", "sentence2"),
}


def glue_samples(name: str, config: EvalConfig) -> list[Any]:
    """The texts and labels of a task's development set, from FOLDER/dev.tsv in `data_dir`, where FOLDER is the task's
    name in any letters (CoLA, SST-2), or else from the hub.

    Raises CordaError if there is no such file, or it has other columns.
    """
    from ...data.samples import Sample, load_samples

    if config.data_dir is None:
        data = DataConfig(HUB, name=name, rows="validation", label="label", max_length=MAX_LENGTH)
        return load_samples(data)[: config.limit]
    path, columns = _local_file(name, config.data_dir), COLUMNS[name]
    # Quotes are characters like others, and so are the many that `splitlines` takes for ends of lines.
    lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    header = columns.names or tuple(lines.pop(0).split("\t") if lines else ())
    wanted = [column for column in columns[:3] if column]
    if missing := [column for column in wanted if column not in header]:
        raise CordaError(f"{path} has no column {missing[0]!r}, which {name} needs: it has {', '.join(header)}")
    samples = []
    for number, line in enumerate(lines, 1 if columns.names else 2):
        row: dict[str, Any] = dict(zip(header, line.split("\t")))
        if missing := [column for column in wanted if not row.get(column, "").strip()]:
            raise CordaError(f"{path} line {number} has no {missing[0]}")
        pair = row[columns.pair] if columns.pair else ""
        samples.append(Sample(row[columns.text], "", row, label=row[columns.label].strip(), pair=pair))
    if not samples:
        raise CordaError(f"{path} has no rows")
    return samples[: config.limit]


def _local_file(name: str, folder: Path) -> Path:
    for path in sorted(folder.iterdir()):
        if path.name.lower().replace("-", "") == name and (path / "dev.tsv").is_file():
            return path / "dev.tsv"
    raise CordaError(f"{name} needs dev.tsv in a folder {name} of {folder}, and there is none")


def _run(name: str, right: bool, model: Any, tokenizer: Any, config: EvalConfig) -> Scores:
    """`right`: whether a sample's value is 1 if its label is right, or what was predicted."""
    from ...data.batches import encode
    from ...models.targets import known_labels
    from ..labels import read_labels

    samples, labels = glue_samples(name, config), known_labels(model)
    assert labels is not None
    encoded = [encode(tokenizer, sample, MAX_LENGTH) for sample in samples]
    compared = {"as it is": nullcontext}
    [(_, view)] = read_labels(model, tokenizer, encoded, config.batch_tokens, True, name, compared)
    predicted, targets = view.predicted.tolist(), view.targets.tolist()
    said = [value if len(labels) == 1 else labels[value] for value in predicted]
    details = [
        {"text": s.prompt, **({"pair": s.pair} if s.pair else {}), "label": s.label, "predicted": answer}
        for s, answer in zip(samples, said)
    ]
    if right:
        return Scores([float(p == t) for p, t in zip(predicted, targets)], details)
    return Scores(list(map(float, predicted)), details, list(map(float, targets)))


def _enter(name: str, metric: str, meaning: str, of: str = "", over: Callable[[Any, Any], float] = mean) -> None:
    source = of or name

    def check(config: EvalConfig) -> list[Any]:
        return glue_samples(source, config)

    def requires(model: Any, tokenizer: Any, config: EvalConfig) -> None:
        from ...data.labels import check_labels
        from ...models.targets import known_labels

        check_labels(name, glue_samples(source, config), known_labels(model))

    entered = task(name, metric, meaning, mean=over, check=check, requires=requires)
    entered(partial(_run, source, over is mean))


_enter("cola", "matthews", "GLUE's sentences, acceptable or not", over=pearson_of)
_enter("sst2", "accuracy", "GLUE's sentences of reviews, positive or not")
_enter("mrpc", "accuracy", "GLUE's pairs of sentences, which say the same or not")
_enter("mrpc_f1", "f1", "F1 of mrpc", "mrpc", f1_of)
_enter("qnli", "accuracy", "GLUE's questions with sentences, which answer them or not")
_enter("rte", "accuracy", "GLUE's pairs of sentences, of which the first implies the second or not")
_enter("stsb", "pearson", "GLUE's pairs of sentences, how alike from 0 to 5", over=pearson_of)
_enter("stsb_spearman", "spearman", "rank correlation of stsb", "stsb", spearman_of)
