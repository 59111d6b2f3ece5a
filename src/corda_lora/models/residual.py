"""Residuals: models without the part that an adapter holds.

Its configuration tells one, so that nobody takes it for the model: by the digest of a layer, as the configuration stays
as it is where somebody merges the adapter in, and the model is whole again.
"""

from typing import Any

import torch
from torch import nn

from ..config import CordaError
from .lockstep import Stored, on_device, tensors_of
from .weights import layer_digest

MARK = "corda_residual"  # in config.json


def mark_residual(settings: Any, name: str, *digests: str) -> None:
    """Write into a model's configuration that it is a residual with such a layer (see `layer_digest`): one digest for
    each way in which its numbers may come to be rounded."""
    setattr(settings, MARK, {name: digests})


def is_residual(model: nn.Module, stored: Stored | None = None) -> bool:
    """Whether a model is a residual. It may carry adapters, which do not count.

    Args:
        stored: parameters whose values are in a checkpoint (see `open_model`).
    """
    mark, modules = getattr(getattr(model, "config", None), MARK, None) or {}, dict(model.named_modules())
    for name, digests in mark.items():
        layer = modules.get(f"{name}.base_layer", modules.get(name))
        if layer is not None:
            with on_device([t for t in tensors_of(layer) if stored and t in stored], torch.device("cpu"), stored):
                return layer_digest(layer) in digests
    return False


def check_whole(model: nn.Module, stored: Stored | None = None, remedy: str = "give the full model") -> None:
    """Raises CordaError if a model is a residual. For `stored` see `is_residual`."""
    if is_residual(model, stored):
        name = getattr(model, "name_or_path", "") or "the model"
        raise CordaError(f"{name} is a residual, a model without the part that its adapter holds: {remedy}")
