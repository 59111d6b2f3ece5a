"""Templates such as "Question: {question}\\nAnswer:" over the columns of a row.

A template names columns, with `[index]` or `[key]` into lists and mappings, and nothing else: `str.format` would also
reach attributes of Python's objects, and pad to any width.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config import CordaError

# A decoded escape, a doubled brace, a field, or a brace that belongs to none of these.
_TOKEN = re.compile(r"\\[nt\\]|\{\{|\}\}|\{[^{}]*\}|[{}]")
_LITERALS = {"\\n": "\n", "\\t": "\t", "\\\\": "\\", "{{": "{", "}}": "}"}
_KEYS = re.compile(r"\[([^\[\]]+)\]")
_SHOWN = 60  # characters of a value or template in a message


class MissingValueError(Exception):
    """The row has no value for a field of the template. The argument is the field, without braces."""


class Field(NamedTuple):
    """`{column[key]...}`, by its parts."""

    column: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return self.column + "".join(f"[{key}]" for key in self.keys)


def parse_template(template: str, columns: Sequence[str]) -> list[str | Field]:
    r"""The literal texts and the fields of a template, in order. `\n`, `\t` and `\\` are a new line, a tab and a
    backslash, since shells pass them on as two characters; `{{` and `}}` are braces.

    Raises:
        CordaError: a brace without its partner, a field that is no column, or anything else inside of the braces.
    """
    parts: list[str | Field] = []
    position = 0
    for match in _TOKEN.finditer(template):
        token = match[0]
        if token in "{}":
            raise CordaError(
                f"the template {short(template)} has a single {token} at character {match.start()}: "
                f"a brace that is no field is written twice, {token}{token}"
            )
        parts.append(template[position : match.start()])
        parts.append(_LITERALS[token] if token in _LITERALS else _parse_field(token[1:-1], template, columns))
        position = match.end()
    parts.append(template[position:])
    return [part for part in parts if part != ""]


def _parse_field(text: str, template: str, columns: Sequence[str]) -> Field:
    if text in columns:
        return Field(text, ())
    column, bracket, rest = text.partition("[")
    keys = tuple(_KEYS.findall(bracket + rest))
    if "".join(f"[{key}]" for key in keys) == bracket + rest and column in columns:
        return Field(column, keys)
    if re.search(r"[.:!]", column):
        raise CordaError(
            f"the template {short(template)} has {short('{' + text + '}')}: braces hold a column's name, with [index] "
            "or [key] after it, and no attribute, conversion or width"
        )
    if column in columns:
        raise CordaError(
            f"the template {short(template)} has {short('{' + text + '}')}: [index] or [key] is not closed"
        )
    raise CordaError(
        f"no column {column[:_SHOWN]!r} for the template {short(template)}: it has "
        f"{short(', '.join(columns), 200, quoted=False)}"
    )


def render(parts: Sequence[str | Field], row: Mapping[str, Any]) -> str:
    """The template with the row's values in it.

    Raises:
        MissingValueError: a value is null, absent, empty or blank.
        CordaError: a value is a list or a mapping, or a key does not fit the value.
    """
    return "".join(part if isinstance(part, str) else _text(_value(part, row), part) for part in parts)


def _value(field: Field, row: Mapping[str, Any]) -> Any:
    value = row.get(field.column)
    for depth, key in enumerate(field.keys):
        if value is None:
            raise MissingValueError(str(field))
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list):
            if not re.fullmatch(r"-?[0-9]{1,9}", key):
                raise CordaError(f"{{{field}}} asks for {key!r} of a list, where a number is needed: {short(value)}")
            value = value[int(key)] if -len(value) <= int(key) < len(value) else None
        else:
            whole = Field(field.column, field.keys[:depth])
            raise CordaError(f"{{{field}}} asks for [{key}] of a text or a number: {short(value)}; write {{{whole}}}")
    return value


def _text(value: Any, field: Field) -> str:
    if isinstance(value, (list, Mapping)) and value:
        key = 0 if isinstance(value, list) else next(iter(value))
        kind = "a list" if isinstance(value, list) else "a mapping"
        raise CordaError(f"{{{field}}} is {kind}, {short(value)}: write {{{field}[{key}]}} for one value of it")
    if is_missing(value):
        raise MissingValueError(str(field))
    return ("false", "true")[value] if isinstance(value, bool) else str(value)  # as JSON writes it


def is_missing(value: Any) -> bool:
    """Whether a cell has nothing in it: null, NaN, an empty list or mapping, an empty or blank text."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def short(value: Any, length: int = _SHOWN, quoted: bool = True) -> str:
    """A value as part of one line of a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = text if len(text) <= length else text[: length - 3] + "..."
    return repr(text) if quoted and isinstance(value, str) else text.replace("\n", "\\n")
