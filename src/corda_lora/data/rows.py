"""Rows of a data set, as they stand in the file: cells of text files stay text, to the last character."""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import CordaError, DataConfig

Row = dict[str, Any]


def load_rows(config: DataConfig) -> tuple[Sequence[Row], list[str]]:
    """The rows that `config.data` and `config.rows` name, and the names of their columns.

    Raises:
        CordaError: there is no such file, folder or data set, or it cannot be read.
    """
    path, suffix = check_file(config), Path(config.data).suffix.lower()
    if path.is_file() and suffix in (*READERS, *DELIMITERS):
        try:
            table = suffix in DELIMITERS
            rows = _read_table(path, DELIMITERS[suffix], config.columns) if table else READERS[suffix](path)
        except OSError as error:
            raise CordaError(f"cannot read {path}: {error.strerror}") from error
        return _slice(rows, config), list(dict.fromkeys(column for row in rows for column in row))
    dataset = _load_dataset(config, path)
    return _undecoded(dataset), list(dataset.column_names)


def check_file(config: DataConfig) -> Path:
    """The path of a file, or of what else the data may be. For use before anything heavy is imported.

    Raises CordaError if it can only be a file, and there is none, or it is one that cannot be read.
    """
    if not config.data.strip():
        raise CordaError("the name of the data is empty: give a file, a folder or the name of a data set")
    path = Path(config.data)
    suffix = path.suffix.lower()
    kinds = (*READERS, *DELIMITERS, ".parquet")
    if path.is_file() and suffix not in kinds:
        raise CordaError(f"cannot tell what kind of file {path} is: its name must end in {', '.join(kinds)}")
    if suffix in kinds and not path.exists():
        raise CordaError(f"there is no file {path}")
    if path.is_file() and not path.stat().st_size:
        raise CordaError(f"{path} is empty")
    if config.columns is not None and not (path.is_file() and suffix in DELIMITERS):
        raise CordaError(f"columns names those of a .csv or .tsv file, and {config.data} is none")
    return path


def _slice(rows: list[Row], config: DataConfig) -> list[Row]:
    """Rows of a file, which is all "train", by a slice such as "train[:10%]"."""
    if config.rows == "train":
        return rows
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(config.rows).to_absolute({"train": len(rows)})
    except Exception as error:  # ValueError, AssertionError, ...
        reason = _first_line(error)
        raise CordaError(f"cannot load data {config.data!r} (rows {config.rows!r}): {reason}") from error
    return [row for part in parts for row in rows[slice(part.from_, part.to)]]


def _load_dataset(config: DataConfig, path: Path) -> Any:
    """A `datasets.Dataset`: from Parquet, from a folder that `save_to_disk` wrote, or from the hub."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=config.data, split=config.rows)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(config.data)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            instruction = datasets.ReadInstruction.from_spec(config.rows)
            parts = instruction.to_absolute({name: len(split) for name, split in splits.items()})
            slices = [(splits[part.splitname], part.from_, part.to) for part in parts]
            return datasets.concatenate_datasets([s.select(range(len(s))[a:b]) for s, a, b in slices])
        return datasets.load_dataset(config.data, config.name, split=config.rows)
    except Exception as error:  # `datasets` raises many kinds; all mean that this data cannot be had
        reason = " ".join(str(error.__cause__ or error).strip().split("\n")[:2])  # the second: what there is instead
        reason = f"the folder holds no data that `datasets` can read ({reason})" if path.is_dir() else reason
        raise CordaError(f"cannot load data {config.data!r} (rows {config.rows!r}): {reason}") from error


def _undecoded(dataset: Any) -> Any:
    """The data set with its images as they are stored, so that one which cannot be read is known by its row."""
    import datasets

    for name, feature in dataset.features.items():
        item = getattr(feature, "feature", feature)
        if isinstance(item, datasets.Image):
            stored = datasets.Image(decode=False)
            dataset = dataset.cast_column(name, stored if item is feature else type(feature)(stored))
    return dataset


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# --- text files ------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        CordaError: it is not UTF-8.
    """
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CordaError(f"{path} is UTF-16, and only UTF-8 is read: iconv -f UTF-16 -t UTF-8 {path}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CordaError(
            f"{path} is not UTF-8 (line {line} has the byte 0x{content[error.start]:02x}), but Latin-1 or the like: "
            f"iconv -f LATIN1 -t UTF-8 {path}"
        ) from error


def _parse(text: str, where: str) -> Any:
    """JSON, with numbers as the text they are written in."""
    try:
        value = json.loads(text, parse_float=str, parse_int=str, parse_constant=lambda name: None)
        if "\\ud" in text.lower():  # half of a surrogate pair is no character: no tokenizer takes it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except ValueError as error:
        raise CordaError(f"{where} cannot be read as JSON: {_first_line(error)}") from error
    except RecursionError as error:
        raise CordaError(f"{where} is not data: its JSON is nested too deeply") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise CordaError(f'{where} is not a row: a row is a JSON object, such as {{"prompt": ..., "response": ...}}')
    return value


def _read_jsonl(path: Path) -> list[Row]:
    lines = read_text(path).split("\n")
    numbered = [(f"{path} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return [_object(_parse(line, where), where) for where, line in numbered]


def _read_json(path: Path) -> list[Row]:
    """A list of objects, or an object on each line."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = _parse(text, str(path))
        return [_object(row, f"item {number} of {path}") for number, row in enumerate(rows, 1)]
    try:
        return [_object(_parse(text, str(path)), str(path))]
    except CordaError:
        return _read_jsonl(path)


def _read_table(path: Path, delimiter: str, columns: Sequence[str] | None) -> list[Row]:
    """A header, unless `columns` stands for it, then a row on each line, or on several where quotes say so.

    A CSV whose first line has semicolons and no comma is separated by them, as spreadsheets write it where the comma is
    a decimal mark.
    """
    csv.field_size_limit(sys.maxsize)
    text = read_text(path)
    first = text.partition("\n")[0]
    if delimiter == "," and ";" in first and "," not in first and (columns is None or len(columns) > 1):
        delimiter = ";"
    # Ends of lines are kept, so that a new line in a quoted cell stays what it is.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    start = 1
    try:
        header = next(reader, []) if columns is None else list(columns)
        if twice := [name for name in header if header.count(name) > 1]:
            raise CordaError(f"{path} has two columns named {twice[0]!r}")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise CordaError(
                    f"{path} line {start} has {len(cells)} cells for {len(header)} columns: "
                    f"a cell with a {NAMES[delimiter]} in it stands in double quotes"
                )
            if cells:
                rows.append(dict(zip(header, cells)))
            start = reader.line_num + 1
    except csv.Error as error:
        kind = "TSV" if delimiter == "\t" else "CSV"
        raise CordaError(f"{path} line {start} is not {kind}: {_first_line(error)}") from error
    return rows


def _read_lines(path: Path) -> list[Row]:
    return [{"text": line.removesuffix("\r")} for line in read_text(path).removesuffix("\n").split("\n")]


READERS: dict[str, Callable[[Path], list[Row]]] = {".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_lines}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}
