"""Samples → token batches: rows of a data set, templates over their columns, tokens."""

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import CordaError, DataConfig

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


class Sample(NamedTuple):
    """What is asked, what is answered ("" and the whole text if there is only text), and the row it came from."""

    prompt: str
    response: str
    row: dict[str, Any]


def load_samples(config: DataConfig) -> list[Sample]:
    """Read, draw and render the samples that `config` names.

    Raises:
        CordaError: no such file or data set, an unknown column in a template, no row.
    """
    return load_rounds(config, 1)[0]


def load_rounds(config: DataConfig, rounds: int) -> list[list[Sample]]:
    """Several independent draws of `config.samples` samples; the first is that of `load_samples`.

    Raises CordaError as `load_samples` does, and if the data has no more rows than one round takes, so that all rounds
    would be the same.
    """
    rows = load_rows(config)
    columns = list(rows.column_names)
    prompt, response = _templates(config, columns)
    for template in (prompt, response):
        for _, field, _, _ in string.Formatter().parse(template):
            column = None if field is None else field.split("[")[0].split(".")[0]
            if column is not None and column not in columns:
                raise CordaError(
                    f"{config.data} has no column {column!r} for the template {template!r}: it has {', '.join(columns)}"
                )
    indices, draw = list(range(len(rows))), random.Random(config.seed)
    if not indices:
        raise CordaError(f"{config.data} ({config.rows}) has no rows")
    all_rows = config.samples is None or config.samples >= len(indices)
    if all_rows and rounds > 1:
        raise CordaError(
            f"{rounds} rounds of {config.samples or 'all'} samples would all be the {len(indices)} rows of "
            f"{config.data}: give fewer samples, or one round"
        )
    drawn = [indices if all_rows else sorted(draw.sample(indices, config.samples)) for _ in range(rounds)]  # type: ignore[arg-type]
    samples = [[_render(row, prompt, response, config.data) for row in rows.select(indices)] for indices in drawn]
    for one in samples:
        if not any((s.prompt + s.response).strip() for s in one):
            raise CordaError(f"every sample of {config.data} is empty text")
    return samples


def _render(row: dict[str, Any], prompt: str, response: str, data: str) -> Sample:
    try:
        return Sample(prompt.format_map(row), response.format_map(row), row)
    except (IndexError, KeyError, AttributeError, ValueError) as error:
        raise CordaError(f"a row of {data} does not fit the template: {error!r} in {row}") from error


def load_rows(config: DataConfig) -> Any:
    """The `datasets.Dataset` that `config.data` and `config.rows` name."""
    import datasets

    suffix = Path(config.data).suffix.lower()
    is_file = suffix in BUILDERS or Path(config.data).exists()
    if is_file and not Path(config.data).is_file():
        raise CordaError(f"there is no file {config.data}")
    if is_file and suffix not in BUILDERS:
        raise CordaError(f"cannot tell what kind of file {config.data} is: its name must end in {', '.join(BUILDERS)}")
    if is_file and not Path(config.data).stat().st_size:
        raise CordaError(f"{config.data} is empty")
    options: dict[str, Any] = {"delimiter": "\t"} if suffix == ".tsv" else {}
    datasets.disable_progress_bars()
    try:
        if is_file:
            return datasets.load_dataset(BUILDERS[suffix], data_files=config.data, split=config.rows, **options)
        return datasets.load_dataset(config.data, config.name, split=config.rows)
    except Exception as error:  # `datasets` raises many kinds; all mean that this data cannot be had
        reason = " ".join(str(error.__cause__ or error).strip().split("\n")[:2])  # the second: what there is instead
        raise CordaError(f"cannot load data {config.data!r} (rows {config.rows!r}): {reason}") from error


def _templates(config: DataConfig, columns: Sequence[str]) -> tuple[str, str]:
    """Prompt and response template, with the defaults that the columns allow."""
    prompt, response = config.prompt, config.response
    if not response:
        if "response" in columns:
            response = "{response}"
        elif not prompt and "text" in columns:
            return "", "{text}"
        prompt = prompt or ("{prompt}" if "prompt" in columns else "")
    if not prompt + response:
        raise CordaError(
            f"{config.data} has none of the columns text, prompt, response: say with templates what of a row is used; "
            f"it has {', '.join(columns)}"
        )
    return prompt, response
