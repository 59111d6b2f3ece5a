"""What stays as it is while a CorDA adapter trains, by split:

    anchored           A, the whole factor
    paper, balanced    the second half of A and of B: the start, which is subtracted (see `lora`)
    seeded             nothing
    residual           nothing: the start was taken out of the base (see `quantize`), so all of A and B trains

A whole factor is frozen by PEFT's own means (`frozen_peft_weight_names`). Half of a factor is held by `HalvedLinear`:
its `weight` is one ordinary parameter, so that whatever copies, casts, shards, swaps or saves a LoRA does the same with
this one, and the gradient of its second half is exactly zero.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback

from ..config import CordaError

BUCKETS = 64
FREE = ("seeded", "residual")  # splits that hold nothing


class HalvedLinear(nn.Linear):
    """A factor of a LoRA whose second half does not train.

    `lora_A` (axis 0): weight [trained; held], (2r, d_in). `lora_B` (axis 1): weight [trained, held], (d_out, 2r).

    The halves are multiplied one after the other, by the same kernel in the same order: halves that are each other's
    negative cancel to the last bit. The gradient of `weight` is zero in the held half, so an optimizer does not move
    it; where the optimizer has a weight decay, the held half is put back after each step. Kernels that read `weight`
    and pass by this forward (axolotl's, unsloth's) give the held half a gradient, which is dropped before each step.
    """

    def __init__(self, weight: nn.Parameter, axis: int):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.axis = axis
        _hold_through_steps(self)

    def __setstate__(self, state: Any) -> None:  # of a copy
        super().__setstate__(state)
        _hold_through_steps(self)

    def forward(self, x: Tensor) -> Tensor:
        trained, held = self.weight.chunk(2, dim=self.axis)
        # Contiguous copies: the kernel that a library chooses may hang on strides and alignment.
        trained, held = trained.contiguous(), held.detach().contiguous()
        if self.axis == 0:
            return torch.cat([F.linear(x, trained), F.linear(x, held)], dim=-1)
        x_trained, x_held = x.chunk(2, dim=-1)
        return F.linear(x_trained, trained) + F.linear(x_held, held)


# --- through an optimizer's step -------------------------------------------------------------------------------------

_halved: WeakSet[HalvedLinear] = WeakSet()
_before: WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def _keep_held_halves(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    if decays and any(_in_deepspeed(layer.weight) for layer in _halved):
        raise CordaError(
            "weight decay would shrink the held half of the adapter in DeepSpeed: train with weight_decay 0"
        )
    decay = {id(p): group.get("weight_decay") for group in optimizer.param_groups for p in group["params"]}
    layers = [layer for layer in _halved if id(layer.weight) in decay]
    for layer in layers:
        if layer.weight.grad is not None and not _is_shard(layer.weight):
            layer.weight.grad.chunk(2, dim=layer.axis)[1].zero_()
    decayed = [layer for layer in layers if decay[id(layer.weight)]]
    if any(_is_shard(layer.weight) for layer in decayed):
        raise CordaError("weight decay would shrink the held half of a sharded adapter: train with weight_decay 0")
    if halves := [layer.weight.detach().chunk(2, dim=layer.axis)[1] for layer in decayed]:
        _before[optimizer] = [(half, half.clone()) for half in halves]


def _is_shard(weight: Tensor) -> bool:
    """Of FSDP2, or of FSDP1, which flattens."""
    return isinstance(weight, DTensor) or weight.ndim != 2


def _in_deepspeed(weight: Tensor) -> bool:
    """Of its ZeRO 1 and 2, or 3: the optimizer steps on flat copies, in which no half is to be found."""
    return hasattr(weight, "get_full_hp_param") or hasattr(weight, "ds_id")


def _put_held_halves_back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for half, value in _before.pop(optimizer, ()):
        half.copy_(value)


@cache
def _register_hooks() -> None:
    """On all optimizers of torch: whoever trains the adapter makes its own. Not before there is anything to hold."""
    register_optimizer_step_pre_hook(_keep_held_halves)
    register_optimizer_step_post_hook(_put_held_halves_back)


def _hold_through_steps(layer: HalvedLinear) -> None:
    _halved.add(layer)
    _register_hooks()


# --- to hold ---------------------------------------------------------------------------------------------------------


def hold(peft_model: nn.Module, adapter_name: str = "default") -> None:
    """Hold still what a CorDA adapter holds still, however it was loaded: to be called before the optimizer is made.

    To call it twice does no harm. A warning says so if what is to be held has been trained already.

    Args:
        peft_model: a `PeftModel`, or a transformers model that loaded the adapter itself (`load_adapter`).

    Raises:
        CordaError: the adapter is not CorDA's.
    """
    marks = marks_of(peft_model, adapter_name)
    freeze(peft_model, marks["split"], adapter_name)
    weights = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    warn_if_trained(_whole(weights), marks)


def marks_of(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """What `install` wrote into PEFT's configuration (see `lora`). Raises CordaError if the adapter is not CorDA's."""
    config = getattr(peft_model, "peft_config", {}).get(adapter_name)
    marks = (getattr(config, "auto_mapping", None) or {}).get("corda")
    if marks is None:
        raise CordaError(f"the model has no adapter {adapter_name!r} that is CorDA's, so there is nothing to hold")
    return dict(marks)


def freeze(peft_model: nn.Module, split: str, adapter_name: str = "default") -> None:
    """Let an optimizer move only what trains in this split."""
    if split in FREE:
        return
    for layer in (m for m in peft_model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A):
        if split == "anchored":
            if adapter_name not in layer.frozen_peft_weight_names:
                layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}
                layer.lora_B[adapter_name].register_forward_pre_hook(_as_weight)
            layer._freeze_non_trainable_peft_weights(adapter_name)
        else:
            for axis, factors in enumerate((layer.lora_A, layer.lora_B)):
                if not isinstance(factors[adapter_name], HalvedLinear):
                    if _is_shard(factors[adapter_name].weight):
                        raise CordaError(f"a {split} adapter is to be held before it is sharded: call hold() first")
                    factors[adapter_name] = HalvedLinear(factors[adapter_name].weight, axis)


def _as_weight(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Inputs in the dtype of the module's weight: some trainers (TRL, over NF4) cast only the factor that trains."""
    (x,), dtype = inputs, module.weight.dtype
    return (x if torch.is_autocast_enabled(x.device.type) else x.to(dtype),)  # type: ignore[arg-type]


def held_size(module: nn.Module) -> int:
    """How many numbers of the trainable parameters do not train: the held halves."""
    return sum(
        m.weight.numel() // 2 for m in module.modules() if isinstance(m, HalvedLinear) and m.weight.requires_grad
    )


# --- whether it was held ---------------------------------------------------------------------------------------------


def held_parts(weights: Mapping[str, Tensor], split: str) -> Iterator[Tensor]:
    """The held part of each factor, in the order of the names. `weights`: as PEFT saves them, by name."""
    for name in sorted(weights):
        axis = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
        if split in ("paper", "balanced") and axis is not None:
            yield weights[name].detach().chunk(2, dim=axis)[1]
        elif split == "anchored" and axis == 0:
            yield weights[name].detach()


def describe_held(weights: Mapping[str, Tensor], split: str) -> dict[str, Any]:
    """What tells later whether, and by how much, the held part has moved.

    Returns:
        sha256: of the numbers as bfloat16: the same in whatever dtype they were saved.
        norm: the length of the held part, all layers together.
        sketch: BUCKETS sums of the numbers under pseudo-random signs (a count sketch, Charikar et al. 2002): the
            distance of two sketches estimates the distance of what was sketched, to 9 % (one standard deviation).
    """
    digest, square = hashlib.sha256(), 0.0
    sketch, start = torch.zeros(BUCKETS, dtype=torch.float64), 0
    for part in held_parts(weights, split):
        flat = part.cpu().reshape(-1)
        digest.update(flat.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        values = F.pad(flat.double(), (0, -len(flat) % BUCKETS))
        index = torch.arange(start, start + len(values))
        mixed = (index * 2654435761) % 2**32  # Knuth's multiplicative hash, twice
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
        signs = 1 - 2 * ((mixed >> 16) & 1)
        sketch += (values * signs).reshape(-1, BUCKETS).sum(dim=0)
        square, start = square + float(values.square().sum()), start + len(values)
    return {
        "sha256": digest.hexdigest(),
        "norm": float(f"{square**0.5:.6g}"),
        "sketch": [float(f"{value:.6g}") for value in sketch],
    }


def moved(weights: Mapping[str, Tensor], marks: Mapping[str, Any]) -> float:
    """By how much the held part differs from what it was at the start, as a share of its length; 0 if it was only
    rounded to bfloat16 or float16."""
    if marks["split"] in FREE:
        return 0.0
    recorded, now = marks["held"], describe_held(weights, marks["split"])
    if now["sha256"] == recorded["sha256"]:
        return 0.0
    difference = torch.tensor(now["sketch"]) - torch.tensor(recorded["sketch"])
    share = float(difference.norm()) / (recorded["norm"] or 1.0)
    rounded = any(weight.dtype == torch.float16 for weight in weights.values())  # then to bfloat16, not as if at once
    return 0.0 if rounded and share < 1e-3 else share


def warn_if_trained(weights: Mapping[str, Tensor], marks: Mapping[str, Any], where: str = "") -> None:
    """A warning where the held part is not what it was at the start."""
    if share := moved(weights, marks):
        part = "A" if marks["split"] == "anchored" else "the held half of A and B"
        warnings.warn(
            f"the adapter{f' in {where}' if where else ''} was trained by something that did not hold {part} still: "
            f"it moved by about {share:.1%} of its length, and what was certified of the start no longer holds",
            stacklevel=3,
        )


class HoldCallback(TrainerCallback):
    """For the Trainer of transformers, and all of TRL's: holds what a CorDA adapter holds, from before the first step,
    and raises a CordaError at a save, or at the end, if something has moved it all the same."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        hold(unwrapped(model))  # before the trainer wraps the model: DDP waits for the gradient of what was not frozen

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_init_end(args, state, control, model)  # nobody called it of a callback that was added later
        self.before = _exact(unwrapped(model))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if _exact(unwrapped(model)) != self.before:
            raise CordaError(
                f"the training moved what the adapter holds still, by step {state.global_step}: check weight_decay and "
                "the optimizer, and that no other code unfreezes lora_A"
            )

    on_train_end = on_save


def _exact(peft_model: nn.Module) -> str:
    """sha256 of the held part as it is in memory."""
    digest, split = hashlib.sha256(), marks_of(peft_model)["split"]
    weights: dict[str, Tensor] = {n: p for n, p in peft_model.named_parameters() if ".default." in n}
    for part in held_parts(_whole(weights), split):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded weights, gathered: they are small, and half of a shard is not a shard of a half."""
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


@torch.no_grad()
def gather_adapter(peft_model: nn.Module) -> None:
    """Put the adapter of a sharded model, and all that trains, together again, on the CPU, to be saved. All processes
    call this. The model cannot be run any more."""
    for module in peft_model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward has gathered for a backward that does not come
    wanted = {id(p) for name, p in peft_model.named_parameters() if p.requires_grad or ".lora_" in name}
    for module in list(peft_model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in wanted and (isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")):
                setattr(module, name, nn.Parameter(_gathered(parameter).cpu(), parameter.requires_grad))


def _gathered(parameter: nn.Parameter) -> Tensor:
    """The whole of a parameter that FSDP2 or DeepSpeed's ZeRO-3 shards."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    from deepspeed import zero  # type: ignore[import-not-found]

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def unwrapped(model: nn.Module) -> nn.Module:
    """The PEFT model inside what accelerate or DDP put around it."""
    while not hasattr(model, "peft_config") and isinstance(inside := getattr(model, "module", None), nn.Module):
        model = inside
    return model
