"""The options that an output was made with, as an earlier version wrote them down, beside those of this one."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from .data import ContextConfig
from .init import CordaConfig
from .lora import LoraStart
from .model import ModelConfig
from .train import KeepConfig, TrainConfig

GONE = {"allocation": "compactness"}  # options of earlier versions, and their defaults


def gone(recorded: Any) -> Iterator[tuple[str, Any]]:
    """The options among those recorded that have gone since, and were not at their defaults."""
    for value in recorded if isinstance(recorded, list) else recorded.values() if isinstance(recorded, dict) else ():
        yield from gone(value)
    if isinstance(recorded, dict):
        yield from ((name, recorded[name]) for name in GONE if recorded.get(name, GONE[name]) != GONE[name])


def same_options(recorded: Any, given: Any) -> bool:
    """Whether options are those of a record: what only one of the two has, as it came or went since, is at its
    default."""
    if isinstance(recorded, list) and isinstance(given, list):
        return len(recorded) == len(given) and all(map(same_options, recorded, given))
    if not isinstance(recorded, dict) or not isinstance(given, dict):
        return bool(recorded == given)
    both = recorded.keys() & given.keys()
    return (
        all(same_options(recorded[name], given[name]) for name in both)
        and all(name in GONE and recorded[name] == GONE[name] for name in recorded.keys() - both)
        and all(given[name] in _defaults(name) for name in given.keys() - both)
    )


def _defaults(name: str) -> list[Any]:
    """The default of an option, in each configuration that has one of this name."""
    kinds = (ModelConfig, CordaConfig, LoraStart, TrainConfig, KeepConfig, ContextConfig)
    return [f.default for kind in kinds for f in fields(kind) if f.name == name and f.default is not MISSING]
