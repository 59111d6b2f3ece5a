"""The options that an output was made with, as an earlier version wrote them down, beside those of this one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from .compare import CompareConfig
from .data import ContextConfig
from .eval import EvalConfig, JudgeConfig
from .init import CordaConfig
from .lora import LoraStart
from .model import ModelConfig
from .train import KeepConfig, TrainConfig

KINDS = [ModelConfig, CordaConfig, LoraStart, TrainConfig, KeepConfig, ContextConfig, EvalConfig, JudgeConfig]
GONE = {"allocation": "compactness"}  # options of earlier versions, and their defaults


def gone(recorded: Any) -> Iterator[tuple[str, Any]]:
    """The options among those recorded that have gone since, and were not at their defaults."""
    for value in recorded if isinstance(recorded, list) else recorded.values() if isinstance(recorded, dict) else ():
        yield from gone(value)
    if isinstance(recorded, dict):
        yield from ((name, recorded[name]) for name in GONE if recorded.get(name, GONE[name]) != GONE[name])


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
    """The default of an option, as JSON has it, in each configuration that has, or had, one of this name."""
    options = [option for kind in [*KINDS, CompareConfig] for option in fields(kind) if option.name == name]
    defaults = [f.default if f.default_factory is MISSING else f.default_factory() for f in options]
    as_json = [json.loads(json.dumps(value, default=_plain)) for value in defaults if value is not MISSING]
    return as_json + [value for gone, value in GONE.items() if gone == name]


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
