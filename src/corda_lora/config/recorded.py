"""The options that an output was made with, as an earlier version wrote them down, beside those of this one."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from .compare import CompareConfig
from .data import ContextConfig
from .eval import EvalConfig, JudgeConfig
from .init import CordaConfig
from .lora import LoraStart
from .model import ModelConfig
from .train import KeepConfig, TrainConfig
from .values import short

KINDS = [ModelConfig, CordaConfig, LoraStart, TrainConfig, KeepConfig, ContextConfig, EvalConfig, JudgeConfig]
GONE = {"allocation": "compactness"}  # options of earlier versions, and their defaults


def difference(old: Any, new: Any, name: str = "") -> str:
    """The first option in which two records differ, in words; "" if they do not (see `differing_options`)."""
    if same_options(old, new):
        return ""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if re.fullmatch("[0-9a-f]{64}", f"{old}") and re.fullmatch("[0-9a-f]{64}", f"{new}"):
            return f"{name} has another checksum"
        return f"{name} was {short(old)} there and is {short(new)} here"
    option = differing_options(old, new)[0]
    whole = f"{name}.{option}".strip(".")
    if option not in new:
        return f"{whole} was {short(old[option])} there{', an option that is gone' * (option in GONE)}"
    return difference(old.get(option), new[option], whole)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The `difference` in each option in which two records differ."""
    return [difference(_part(old, option), _part(new, option)) for option in differing_options(old, new)]


def _part(record: Mapping[str, Any], option: str) -> dict[str, Any]:
    return {option: record[option]} if option in record else {}


def differing_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The options in which two records differ, as JSON has them. What only one of the two has came or went since: it
    counts as being at its default in the other."""
    return [
        name
        for name, value in {**one, **other}.items()
        if not (same_options(one[name], other[name]) if name in one and name in other else value in _defaults(name))
    ]


def same_options(one: Any, other: Any) -> bool:
    """Whether the values of two records are the same (see `differing_options`)."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_options, one, other))
    if not isinstance(one, dict) or not isinstance(other, dict):
        return bool(one == other)
    return not differing_options(one, other)


def _defaults(name: str) -> list[Any]:
    """None, and the default of an option, as JSON has it, in each configuration that has, or had, one of this name."""
    options = [option for kind in [*KINDS, CompareConfig] for option in fields(kind) if option.name == name]
    defaults = [f.default if f.default_factory is MISSING else f.default_factory() for f in options]
    as_json = [json.loads(json.dumps(value, default=_plain)) for value in defaults if value is not MISSING]
    return [None, *as_json] + [value for option, value in GONE.items() if option == name]


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
