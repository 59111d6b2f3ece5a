"""The table of the methods that can be compared, and what each of them gets and returns.

A method is a function (model, setup, its own options) → `Prepared`: the model, ready to train. It raises `CordaError`
if it does not fit the model. A new method is one function with the decorator `@method(...)`: in `corda.py` if it is
ours, in `baselines.py` or `rivals.py` if it is another's.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import peft
import torch
from peft import LoraConfig
from peft.tuners.adalora import AdaLoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..adapters.held import HalvedLinear, held_size
from ..adapters.lora import lora_layers
from ..config import CordaConfig, CordaError, DataConfig, TrainConfig
from ..config.init import check_together
from ..config.values import check_value
from ..data.samples import Sample, load_samples
from ..files import whole_file
from ..models.weights import weight_shape

RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
SLOW_RATES = tuple(rate / 10 for rate in RATES)  # for methods that train large weights


class Prepared(NamedTuple):
    """A model ready to train, and how it is to be trained.

    Attributes:
        model: with exactly the parameters that require a gradient trained.
        optimizer: used instead of AdamW over the trainable parameters.
        callbacks: for the trainer.
        penalties, rehearsals: terms that are added to the loss, of the weights alone and over further samples: see
            `training.train`.
        compiles: False if `torch.compile` cannot trace the model's blocks.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    callbacks: Sequence[TrainerCallback] = ()
    penalties: Mapping[str, Callable[[], Tensor]] = {}
    rehearsals: Mapping[str, Callable[[], Tensor]] = {}
    compiles: bool = True


@dataclass(frozen=True)
class Setup:
    """The task, the rank and the training recipe that a method prepares a model for.

    Args:
        learn: data of the task.
        keep: data of the ability to keep, if there is any.
        samples: how many samples of either a method analyses before training.
        targets: the layers to adapt by name, as they are before the adaptation.
        r: the rank of an adapter. A method without ranks gets as many parameters (see `budget`).
        lora_alpha: adapters are scaled by lora_alpha / r.
        train: the training recipe of this run.
        steps: how many optimizer steps the run takes.
        folder: the method's cache, shared by all runs of an entry.
        task_type: PEFT's, of the model.
        heads: modules to be trained whole: see `new_modules`.
        modules_to_save: further ones.
    """

    tokenizer: Any
    learn: DataConfig
    keep: DataConfig | None
    samples: int
    targets: dict[str, nn.Module]
    r: int
    lora_alpha: float
    train: TrainConfig
    steps: int
    folder: Path
    task_type: str | None = "CAUSAL_LM"
    heads: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()

    def data(self, kind: str) -> DataConfig:
        """The data of the task ("learn") or of the ability to keep ("keep").

        Raises CordaError if the latter was not given.
        """
        data = self.learn if kind == "learn" else self.keep
        if data is None:
            raise CordaError("it looks at the ability to keep, and there are no samples of one: give a context")
        return data

    def context(self, kind: str, samples: int | None = None) -> list[Sample]:
        """Samples drawn from `data(kind)`. `samples` replaces the setup's number."""
        return load_samples(replace(self.data(kind), samples=samples or self.samples))

    def lora(self, kind: type[LoraConfig] = LoraConfig, **options: Any) -> LoraConfig:
        """PEFT's configuration with the settings that all methods share. `options` win over them."""
        common = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.train.lora_dropout,
            "target_modules": list(self.targets),
            "task_type": self.task_type,
            "modules_to_save": [*self.heads, *self.modules_to_save] or None,
            "fan_in_fan_out": all(isinstance(module, Conv1D) for module in self.targets.values()),
        }
        return kind(**(common | options))

    def cached(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that a preparation computes, on the CPU, read from `folder` if they were computed before."""
        path = self.folder / "prepared.safetensors"
        if not path.is_file():
            # EVA gives layers with the same input views of one tensor, which safetensors refuses: hence the clones.
            with whole_file(path) as partial_path:
                save_file({name: tensor.contiguous().clone() for name, tensor in compute().items()}, partial_path)
        return load_file(path)

    @property
    def budget(self) -> int:
        """The number of parameters of a LoRA of rank r on every target: Σ (d_in + d_out)·r."""
        return self.r * sum(sum(weight_shape(module)) for module in self.targets.values())


class Method(NamedTuple):
    """A method in the table.

    Attributes:
        title: its name in reports.
        source: the paper, and whose implementation is used.
        prepare: (model, setup, its own options) → `Prepared`.
        learning_rates: swept by default.
        prepares_from: the data that a slow preparation analyses ("keep", "learn", or the "weights" alone); its result
            is cached in `Setup.folder`. Empty if the preparation is quick.
        after: the options that change the training alone. A sweep over one of them begins with one preparation, which
            is made with its highest value and shared by all.
    """

    title: str
    source: str
    prepare: Callable[..., Prepared]
    learning_rates: tuple[float, ...]
    prepares_from: str = ""
    after: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}


def method(
    name: str,
    title: str,
    source: str,
    learning_rates: tuple[float, ...] = RATES,
    prepares_from: str = "",
    after: tuple[str, ...] = (),
) -> Callable[[Callable[..., Prepared]], Callable[..., Prepared]]:
    """Enter a function into the table under a name."""

    def enter(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
        METHODS[name] = Method(title, source, prepare, learning_rates, prepares_from, after)
        return prepare

    return enter


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise CordaError for an option that a method does not have, or a value that the option cannot take."""
    prepare = METHODS[name].prepare
    parameters, own = inspect.signature(prepare).parameters, _own_options(name)
    corda = {f.name for f in fields(CordaConfig)} - {"r", "lora_alpha", "target_modules", "device"}
    known = own | (corda if "options" in parameters else set())
    if unknown := [key for key in options if key not in known]:
        raise CordaError(f"method {name} has no option {unknown[0]!r}: it has {', '.join(sorted(known)) or 'none'}")
    hints = get_type_hints(getattr(prepare, "func", prepare), include_extras=True)
    for key in options.keys() & own:
        check_value(key, options[key], hints[key])
    config = corda_config(name, options)
    if config is not None:
        check_together(config, len(options.get("contexts") or ()))


def corda_config(name: str, options: Mapping[str, Any], **common: Any) -> CordaConfig | None:
    """The start that a method of ours makes with these options; None of another's method."""
    prepare = METHODS[name].prepare
    if not {"options", "orientation"} & inspect.signature(prepare).parameters.keys():
        return None
    given = _fixed(name) | dict(options)
    start = {key: value for key, value in given.items() if key in {f.name for f in fields(CordaConfig)}}
    return start_config(len(given.get("contexts") or ()), **common, **start)


def start_config(contexts: int, keep: float = 0.0, **options: Any) -> CordaConfig:
    """The start of a method of ours. Its price is paid in the training alone, with statistics beside the start. To the
    start it says which orientation is the default.

    Args:
        contexts: how many are given as such. The prices of several `corda init` does not know either.
    """
    return replace(CordaConfig(keep=0.0 if contexts > 1 else keep, **options), keep=0.0)


def recorded_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options, as what tells its starts from others. The orientation is written out where it is not the one
    that was the default in every version: a record without one is of that."""
    config = corda_config(name, options)
    return without_default(name, options if config is None else {**options, "orientation": config.orientation})


def without_default(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options without the orientation that was the default in every version."""
    return {key: value for key, value in options.items() if (key, value) != ("orientation", default_orientation(name))}


def default_orientation(name: str) -> str:
    """The orientation that was a method's default in every version: that of a record without one."""
    return str(_fixed(name).get("orientation", "covariance"))


def _fixed(name: str) -> dict[str, Any]:
    """The options that a method sets itself."""
    return dict(getattr(METHODS[name].prepare, "keywords", {}))


def _own_options(name: str) -> set[str]:
    """The options of a method that are its function's own, and not fixed by a partial, such as `mode` of
    peft-corda-kpm."""
    prepare = METHODS[name].prepare
    parameters = inspect.signature(prepare).parameters
    defaults = {key for key, p in parameters.items() if p.default is not p.empty}
    return defaults - _fixed(name).keys()


def count_parameters(model: nn.Module) -> dict[str, int]:
    """The size of the adapter and the number of trained parameters: {"adapter", "trainable"}.

    The adapter counts Σ (d_in + d_out)·r with the rank of each layer. The frozen start that a CorDA adapter stores
    beside its factors is not counted. Without low-rank layers, "adapter" is the number of trained parameters."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainable -= held_size(model)
    adapter = 0
    for layer in lora_layers(model).values() if isinstance(model, peft.PeftModel) else ():
        if isinstance(layer.lora_A["default"], HalvedLinear):
            r = layer.r["default"] // 2
        elif isinstance(layer, AdaLoraLayer):
            r = int((layer.lora_E["default"] != 0).sum())
        else:
            r = layer.r["default"]
        adapter += r * (layer.in_features + layer.out_features)
    return {"adapter": adapter or trainable, "trainable": trainable}
