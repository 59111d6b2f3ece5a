"""What a value of an option must be: its range, its choices, and the sentence on one that does not fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


class CordaError(ValueError):
    """An error that the user can mend. The message is one sentence that names the input and what is wrong with it; the
    command line prints it and exits with 2."""


@dataclass(frozen=True)
class Range:
    """The range of a number, written beside a field as `Annotated[int, Range(ge=1)]`. Infinity and NaN are outside."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf  # false for NaN; true for an int that no float can hold
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __repr__(self) -> str:
        """The range in words, for messages and for --help."""
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {bound:,}" for word, bound in words.items() if bound is not None)


LARGEST = 2**31 - 1  # the largest whole number that all libraries take
Count = Annotated[int, Range(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Range(ge=0, le=LARGEST)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]  # NumPy's range
Positive = Annotated[float, Range(ge=1e-9, le=1e30)]  # models compute in float32, which ends at 3e38
NonNegative = Annotated[float, Range(ge=0)]
Weight = Annotated[float, Range(ge=0, le=1e30)]  # the sum of several is finite, too
Share = Annotated[float, Range(ge=0, lt=1)]


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def check_fields(config: Any) -> None:
    """Raises CordaError if a field of a dataclass is outside its `Range` or is none of its `Literal`'s values."""
    hints = get_type_hints(type(config), include_extras=True)
    for f in fields(config):
        check_value(f.name, getattr(config, f.name), hints[f.name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises CordaError if `value` does not fit `hint`. `name` is the option's name in the message."""
    if not _fits(value, hint):
        raise CordaError(misfit(name, repr(value), hint))


def misfit(name: str, value: str, hint: Any) -> str:
    """The sentence on a value that does not fit its option's type hint."""
    return f"{name} is {_middle_left_out(value) or 'empty'}, but must be {', or '.join(_said(hint))}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type hint, as far as the hint has ranges and literals; other types are not checked."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return isinstance(value, bool)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is Annotated:
        kinds = (int,) if arguments[0] is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and value in arguments[1]
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if arguments and origin is not dict:  # a union
        return any(_fits(value, argument) for argument in arguments)
    return value is None if hint is type(None) else True


def _said(hint: Any) -> Iterator[str]:
    """The alternatives of a type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in WORDS:
        yield WORDS[hint]
    elif is_dataclass(hint) or origin is dict:
        yield "a mapping"
    elif origin is Literal:
        yield f"one of {', '.join(map(str, arguments))}"
    elif origin is Annotated:
        yield f"a {'whole ' if arguments[0] is int else ''}number {arguments[1]!r}"
    elif origin is list:
        yield f"a list, each item {', or '.join(_said(arguments[0]))}"
    else:
        for argument in arguments:
            yield from _said(argument)


def check_pattern(name: str, pattern: str) -> None:
    """Raises CordaError if `pattern` is no regular expression."""
    import regex  # not above: --help has no use for it

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise CordaError(f"{name} {short(pattern)} is no regular expression: {error}") from error


def check_patterns(config: Any, *names: str) -> None:
    for name in names:
        if isinstance(pattern := getattr(config, name), str):
            check_pattern(name, pattern)


def find_all(name: str, pattern: str, text: str, whole: bool = False) -> list[Any]:
    """The matches of a regular expression in a text.

    Args:
        name: the option's name in a message.
        whole: only a match of the whole text.

    Raises CordaError if they take longer than a second: some expressions take time exponential in the text's length.
    """
    import regex

    try:
        if whole:
            match = regex.fullmatch(pattern, text, timeout=1)
            return [match] if match else []
        return list(regex.finditer(pattern, text, timeout=1))
    except TimeoutError as error:
        raise CordaError(f"{name} {short(pattern)} takes more than a second on the text {short(text)}") from error


def split(names: str | list[str] | None) -> list[str]:
    """Names as a list, also where they are one text with commas between."""
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names or ())


def short(value: Any, length: int = 80) -> str:
    """The repr of a value, with its middle left out if it is long."""
    return _middle_left_out(repr(value), length)


def _middle_left_out(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"
