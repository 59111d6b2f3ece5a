"""The order of an adapter's components: which a budget of rank R pays for, in each layer a prefix.

`corda export --as ordered` writes an ordinary LoRA of the same function whose components are in the order of their
predicted gain (see `algebra.order`), and the gains into `order.safetensors` beside it, in nats per answer token of the
samples it was ordered by. An adapter that was trained as DyLoRA is in order without: each layer by itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, arange, float64

from ..algebra.order import needed_ranks
from ..config import CordaError
from ..files import sha256_of
from .lora import WEIGHTS, lora_layers

NAME = "order.safetensors"


@dataclass(frozen=True)
class Order:
    """Which components of each layer are used at a rank R.

    Attributes:
        needs: by layer, the R from which on each component is used, (r,), ascending.
        nested: whether the components were trained to work as prefixes, at the scale lora_alpha / b of b of them
            (DyLoRA). Else the scale of the whole adapter stays.
        sizes: by layer, `sizes_of` the components that were put in order, by which their adapter is known. Empty where
            any adapter of these layers and ranks will do.
    """

    needs: dict[str, Tensor]
    nested: bool = False
    sizes: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def full(self) -> float:
        """The R at which all components are used: the mean rank of the layers, weighted by their sizes; of a nested
        adapter the largest."""
        return max(float(needs[-1]) for needs in self.needs.values())

    def ranks(self, R: float) -> dict[str, int]:
        """How many components of each layer are used at R."""
        return {name: int((needs <= R + SLACK).sum()) for name, needs in self.needs.items()}

    def check(self, peft_model: PeftModel, adapter: str = "default") -> None:
        """Raises CordaError if this is the order of another adapter than the model's, or of this one before it was
        changed."""
        layers = {name: layer for name, layer in lora_layers(peft_model).items() if adapter in layer.r}
        ranks = {name: layer.r[adapter] for name, layer in layers.items()}
        same = ranks == {name: len(needs) for name, needs in self.needs.items()}
        for name, sizes in self.sizes.items() if same else ():
            here = sizes_of(layers[name].lora_A[adapter].weight, layers[name].lora_B[adapter].weight)
            same = same and torch.allclose(here, sizes, rtol=ROUNDED, atol=ROUNDED * float(sizes.max()))
        if not same:
            raise CordaError(
                f"the order is of another adapter than {adapter!r} in the model, or of this one before it was changed: "
                "load the adapter that the order lies beside, or put this one in order by `corda export --as ordered`"
            )


SLACK = 1e-4  # R may come out of a product
ROUNDED = 0.01  # the share by which a component's size may change where a model's weights are loaded as bfloat16


def sizes_of(A: Tensor, B: Tensor) -> Tensor:
    """‖b_i‖·‖a_i‖ of each component of B A, (r,), float32, on the CPU.

    Args:
        A: (r, n).
        B: (m, r).
    """
    return (A.detach().float().norm(dim=1) * B.detach().float().norm(dim=0)).cpu()


def nested_order(peft_model: PeftModel, adapter: str = "default") -> Order:
    """The order of an adapter that was trained as DyLoRA."""
    ranks = {name: layer.r[adapter] for name, layer in lora_layers(peft_model).items()}
    return Order({name: arange(1, r + 1, dtype=float64) for name, r in ranks.items()}, nested=True)


def save_order(folder: Path, gains: Mapping[str, Tensor]) -> None:
    """Write the gains (r,) of each layer's components beside an adapter's weights, whose order they are."""
    digest = json.dumps({"weights": sha256_of(folder / WEIGHTS)})
    save_file({name: gain.float().cpu() for name, gain in gains.items()}, folder / NAME, {"corda": digest})


def read_gains(directory: Path) -> dict[str, Tensor]:
    """The gains (r,) of each layer's components, descending.

    Raises CordaError if the adapter has no order, or it is damaged or of other weights.
    """
    path, weights = Path(directory) / NAME, Path(directory) / WEIGHTS
    remedy = "`corda export --as ordered` puts the components of any LoRA in order"
    if not path.is_file():
        raise CordaError(f"the adapter in {directory} has no order of its components: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            digest = json.loads((file.metadata() or {})["corda"])["weights"]
        gains = load_file(path)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CordaError(f"{path} is damaged, or holds no order") from error
    if not weights.is_file() or sha256_of(weights) != digest:
        raise CordaError(f"{path} is not of the weights beside it, which were trained or changed since: {remedy}")
    return gains


def read_order(directory: Path | str) -> Order:
    """The order of an adapter that `corda export --as ordered` has written. Raises CordaError as `read_gains` does."""
    gains, tensors = read_gains(Path(directory)), load_file(Path(directory) / WEIGHTS)
    costs, sizes = [], {}
    for name in gains:
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")  # (r, n), (m, r)
        costs.append(A.shape[1] + B.shape[0])
        sizes[name] = sizes_of(A, B)
    return Order(dict(zip(gains, needed_ranks(list(gains.values()), costs))), sizes=sizes)
