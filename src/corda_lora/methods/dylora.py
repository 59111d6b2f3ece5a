"""DyLoRA (Valipour et al., arXiv 2210.07558): one LoRA of rank r that is trained to work at every rank b ≤ r.

Each training step draws a rank b and runs and updates the first b components alone (Algorithm 1):

    h = W x + (alpha / b) · B↓b A↓b x        A↓b: the first b rows of A, B↓b: the first b columns of B
    A↓b, B↓b  ←  their gradients' step       what lies beyond b stays as it is

so component 1 is trained in every step and component r in one of r: they come out ordered by importance, and any prefix
of them is an adapter. b is uniform over 1..r, as in the authors' code. This is the paper's DyLoRA, which updates all b
components; its variant "frozen" (which the authors' GLUE script runs) updates only the b-th.

The adapter is PEFT's own LoRA with a hook on each `lora_A`: saving, disabling and merging see all of it, always. In
evaluation the whole rank is used.
"""

from collections.abc import Iterator
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapters.lora import lora_layers
from ..config import CordaError


class RankSampler(TrainerCallback):
    """Draws b for each optimizer step, the same for all layers and all of the step's batches, from torch's CPU
    generator (which the trainer seeds, and keeps in its checkpoints). A layer of a smaller rank uses all it has.

    A loop without a trainer calls `on_step_begin` before a step's first forward, and `on_pre_optimizer_step` and
    `on_optimizer_step` around the optimizer's step.
    """

    def __init__(self, factors: list[tuple[nn.Linear, int]], r: int):
        self.factors = factors  # each lora_A with 0 and lora_B with 1, the axis along which its components lie
        self.r = self.b = r
        self.untouched: list[tuple[Tensor, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.b = int(torch.randint(1, self.r + 1, ()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.b = self.r

    def truncate(self, lora_A: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        """The forward hook of `lora_A`. Of z = A x (..., r), all but the first b are zeroed, and with them what B makes
        of them and the gradients of their rows and columns; the rest is scaled so that PEFT's alpha / r is alpha / b.
        """
        if not lora_A.training:
            return None
        r = z.shape[-1]
        b = min(self.b, r)
        return F.pad(z[..., :b] * (r / b), (0, r - b))

    # Beyond b the gradient is zero, but an optimizer with momentum or weight decay would move those components all the
    # same (in the authors' code it does). Algorithm 1 leaves them alone: so they, and their moments, are put back.

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.untouched = [(view, view.clone()) for view in self._beyond_b(kwargs["optimizer"])]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for view, before in self.untouched:
            view.copy_(before)
        self.untouched = []

    def _beyond_b(self, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        """Views of the rows of A and columns of B beyond b, and of the same part of the optimizer's moments of them.
        (Before the first step there are none; that makes them zero there, as it should.)"""
        for module, axis in self.factors:
            weight = module.weight
            moments = [x for x in optimizer.state.get(weight, {}).values() if isinstance(x, Tensor)]
            for x in (weight.detach(), *moments):
                if x.shape == weight.shape and x.is_floating_point():
                    b = min(self.b, x.shape[axis])
                    yield x.narrow(axis, b, x.shape[axis] - b)


def install(model: nn.Module, config: LoraConfig) -> tuple[PeftModel, TrainerCallback]:
    """Put a LoRA on the model that trains as DyLoRA, with the callback that the trainer must be given.

    Raises CordaError for variants of LoRA whose output is not (alpha / r) · B A x.
    """
    if config.use_dora or config.use_rslora:
        raise CordaError("DyLoRA scales by alpha / b: it cannot be combined with use_dora or use_rslora")
    peft_model = peft.get_peft_model(model, config)
    pairs = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in lora_layers(peft_model).values()]
    sampler = RankSampler(
        [(module, axis) for pair in pairs for axis, module in enumerate(pair)],
        r=max(A.out_features for A, _ in pairs),
    )
    for A, _ in pairs:
        A.register_forward_hook(sampler.truncate)
    return peft_model, sampler


def truncate(peft_model: PeftModel, b: int) -> PeftModel:
    """Cut the adapter, in place, to its first b components: an ordinary LoRA of rank b, scaled by alpha / b, on which
    nothing of DyLoRA is left. An optimizer made before does not know its weights.

    Raises CordaError if b is not in 1..r.
    """
    config = peft_model.peft_config["default"]
    layers = lora_layers(peft_model)
    r = max(layer.r["default"] for layer in layers.values())
    if not 1 <= b <= r:
        raise CordaError(f"the adapter has ranks 1 to {r}: it cannot be cut to {b}")
    for layer in layers.values():
        A, B = layer.lora_A["default"], layer.lora_B["default"]  # (r, d_in), (d_out, r)
        layer.lora_A["default"] = _linear(A.weight[:b], A.training)  # without the hook
        layer.lora_B["default"] = _linear(B.weight[:, :b], B.training)
        layer.r["default"] = min(b, layer.r["default"])
        layer.scaling["default"] = layer.lora_alpha["default"] / layer.r["default"]
    config.r = min(b, config.r)
    config.rank_pattern = {name: min(b, r) for name, r in config.rank_pattern.items()}
    return peft_model


def _linear(weight: Tensor, training: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").train(training)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear
