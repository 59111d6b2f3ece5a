"""Residuals: models without the part that an adapter holds.

Its configuration tells one, so that nobody takes it for the model: by the digest of a layer, as the configuration stays
as it is where somebody merges the adapter in, and the model is whole again.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..config import CordaError
from .lockstep import Stored, on_device, tensors_of
from .weights import digest_of, layer_digest, weight_of, weight_shape

MARK = "corda_residual"  # in config.json


def mark_residual(settings: Any, adapter: str, layers: Iterable[tuple[str, Sequence[str], str]]) -> None:
    """Write into a model's configuration that it is a residual, by the first layer that has lost something: without its
    tail a weight of low rank is as it was, and would tell the whole model for a residual, too.

    Args:
        adapter: the fingerprint of the weights that the residual's adapter is for.
        layers: of each layer its name, its digests here (see `digests_of`), and its digest in the whole model.
    """
    for name, digests, whole in layers:
        if whole not in digests:
            setattr(settings, MARK, {"layer": name, "digests": list(digests), "adapter": adapter})
            return


def digests_of(layer: nn.Module) -> list[str]:
    """The digests that a layer's weight in full precision may come to have: one for each way in which its numbers may
    be rounded when they are loaded. As float16 those of a model in float32 are rounded twice on their way."""
    return [layer_digest(layer), digest_of(weight_shape(layer), weight_of(layer).half())]


def residual_mark(model: nn.Module, stored: Stored | None = None) -> dict[str, Any] | None:
    """What `mark_residual` wrote, if a model is a residual; else None. It may carry adapters, which do not count.

    Args:
        stored: parameters whose values are in a checkpoint (see `open_model`).
    """
    mark, modules = getattr(getattr(model, "config", None), MARK, None) or {}, dict(model.named_modules())
    name = mark.get("layer")
    layer = modules.get(f"{name}.base_layer", modules.get(name))
    if layer is None:
        return None
    with on_device([t for t in tensors_of(layer) if stored and t in stored], torch.device("cpu"), stored):
        return mark if layer_digest(layer) in mark["digests"] else None


def renew_mark(model: Any, mark: dict[str, Any] | None) -> None:
    """Write the mark of a residual whose weights were changed, but not made whole, or that there is none any more."""
    vars(model.config).pop(MARK, None)
    if mark is not None:
        setattr(model.config, MARK, mark | {"digests": digests_of(model.get_submodule(mark["layer"]))})


def is_residual(model: nn.Module, stored: Stored | None = None) -> bool:
    """Whether a model is a residual. For `stored` see `residual_mark`."""
    return residual_mark(model, stored) is not None


def check_whole(model: nn.Module, stored: Stored | None = None, remedy: str = "give the full model") -> None:
    """Raises CordaError if a model is a residual. For `stored` see `residual_mark`."""
    if is_residual(model, stored):
        name = getattr(model, "name_or_path", "") or "the model"
        raise CordaError(f"{name} is a residual, a model without the part that its adapter holds: {remedy}")
