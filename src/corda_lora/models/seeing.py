"""The parts of a vision-language model: its language model, and what images go through before it."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn


def base_of(model: nn.Module) -> nn.Module:
    """The model without its adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def reads_images(settings: Any) -> bool:
    """Whether a model's configuration is that of a vision-language model."""
    return getattr(settings, "vision_config", None) is not None and not hasattr(settings, "projection_dim")


def image_side(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module, by name, is outside of a vision-language model's language model and output head (and does not
    hold them): in the vision tower, or in the connector between the two. What comes there are patches, not tokens."""
    base: Any = base_of(model)
    if not reads_images(getattr(base, "config", None)):
        return lambda name: False
    language = (base.get_decoder(), base.get_output_embeddings())
    inside = [name for name, module in base.named_modules() if any(module is part for part in language)]

    def sees(name: str) -> bool:
        return bool(name) and all(
            i and not f"{name}.".startswith(f"{i}.") and not i.startswith(f"{name}.") for i in inside
        )

    return sees


def freeze_tower(model: nn.Module) -> None:
    """Keep the vision tower of a vision-language model as it is while all else trains, the connector included."""
    if reads_images(getattr(model, "config", None)):
        tower: Any = model.get_encoder(modality="image")  # type: ignore[operator]
        tower.requires_grad_(False)
        if isinstance(connector := getattr(tower, "merger", None), nn.Module):  # Qwen2-VL's is in its tower
            connector.requires_grad_(True)
