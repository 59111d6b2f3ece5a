"""Which model: of every command."""

from dataclasses import dataclass
from typing import Literal

from .values import CordaError, check_fields, short, split


@dataclass
class ModelConfig:
    """The model, and how it is loaded.

    Args:
        model: a name on the hub, a directory, or a .gguf file (whose weights are expanded).
        revision: the branch, tag or commit of a model on the hub.
        dtype: the type of the weights. `auto` is the type in the checkpoint.
        trust_remote_code: run code that the model brings, or that its config.json names on the hub.
        labels: of a classifier, in the order of its outputs, with commas between or as a list; one alone names a number
            that is predicted. Default: what the adapter or the data says.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    labels: str | list[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.labels = split(self.labels) or None
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise CordaError(f"labels is {short(self.labels)}, but must be names that differ")
