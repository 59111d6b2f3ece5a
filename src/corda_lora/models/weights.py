"""The weight of a layer: as it is stored, and the values that it stands for. The one home of quantized weights.

NF4 (QLoRA, arXiv 2305.14314) is written and read through bitsandbytes, in blocks of 64 numbers along a row: each number
is one of 16 levels times its block's largest. With double quantization these largest are in 8 bits, too.

Others are read as PEFT reads them (`dequantize_module_weight`: bitsandbytes' LLM.int8, HQQ, torchao), so components can
be cut from their values. To write them, extend `quantize`, `quantized_layer` and `quantization_config`: HQQ and torchao
store a layer from its weight alone, too, but transformers (5.17) trains nothing over torchao's 4 bits; GPTQ and AWQ
round by data of their own, so a residual would have to pass through their programs.
"""

import hashlib
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..algebra.rounding import optq
from ..config import CordaError
from .seeing import image_side

BLOCK = 64  # numbers that share a scale
ALREADY = "the model is quantized already: leave quantization out, or give the full model"
# What a checkpoint holds of a quantized weight, by the end of its name: weight, weight.absmax, ...
Quantized = dict[str, Tensor]


# --- reading ---------------------------------------------------------------------------------------------------------


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer or Conv1D, quantized or not."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Tensor:
    """W (d_out, d_in) of a linear layer; of a quantized one, what its numbers stand for."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    _in_order(module)
    if not weight.dtype.is_floating_point or weight.numel() != weight_shape(module)[0] * weight_shape(module)[1]:
        weight = dequantize_module_weight(module)
    elif weight.dtype.itemsize == 1:
        raise CordaError("the base weights are float8, from which components cannot be cut: load the model in bfloat16")
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def is_4bit(module: nn.Module) -> bool:
    """Whether a layer's weight is in bitsandbytes' 4 bits."""
    return type(module.weight).__name__ == "Params4bit"


def _in_order(module: nn.Module) -> None:
    """Undo what a forward on a CPU did: it left bitsandbytes' numbers in another order."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()


def layer_digest(module: nn.Module) -> str:
    """sha256 over up to 4096 evenly spaced numbers of a layer's weight, as bfloat16: the same whatever dtype it was
    loaded in."""
    if is_4bit(module):
        _in_order(module)
        return digest_of(weight_shape(module), module.weight)  # type: ignore[arg-type]
    return digest_of(weight_shape(module), weight_of(module))


def digest_of(shape: tuple[int, int], weight: Tensor) -> str:
    """`layer_digest` of a weight of this shape, or of what is stored of it in 4 bits: then of these numbers, which stay
    the same where a device rounds their scales."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 4096)][:4096].cpu()
    if sample.dtype.is_floating_point:
        sample = sample.float().to(torch.bfloat16)
    digest = hashlib.sha256(str(shape).encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """One sha256 of all layers' digests, which tells whether an adapter was made for these weights."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def or_the_same(layer: nn.Module, made_in: str | None) -> str:
    """The end of a sentence that says by a layer's digest that its weight is another: where it may be the same, but for
    its dtype. Only float16 makes the digest another: it is of bfloat16, to which float32 is rounded alike before a cast
    to bfloat16 and after it.

    Args:
        made_in: the dtype that the layer had then, if it is known.
    """
    now = str(layer.weight.dtype).removeprefix("torch.")  # of 4 bits that of what is packed, which no cast changes
    if now == made_in or "float16" not in (now, made_in) or is_4bit(layer):
        return ""
    there = made_in or "the dtype that it had then"
    load = f"load the model in {there} (--dtype{f' {made_in}' if made_in else ''})"
    return f", or the same in {made_in or 'another dtype'}: float16 rounds them otherwise, so {load}"


# --- writing ---------------------------------------------------------------------------------------------------------


def check_quantizer(device: torch.device) -> None:
    """Raises CordaError if bitsandbytes is not installed, or does not quantize on a device."""
    if find_spec("bitsandbytes") is None:
        raise CordaError("to quantize to NF4, the package bitsandbytes is needed: pip install bitsandbytes")
    devices = sorted(_bitsandbytes().supported_torch_devices & {"cpu", "cuda", "xpu"})
    if device.type not in devices:
        raise CordaError(f"bitsandbytes quantizes on {', '.join(devices)}, not on {device.type}: --device cpu")


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def check_blocks(layers: Mapping[str, nn.Module]) -> None:
    """Raises CordaError if a row of a layer is no whole number of blocks: a block would reach into the next row, and
    there bitsandbytes (0.50) reads other values on a CPU than it wrote."""
    for name, layer in layers.items():
        m, n = weight_shape(layer)
        if n % BLOCK:
            raise CordaError(
                f"{name} ({m} × {n}) cannot be quantized in blocks of {BLOCK}, which do not divide {n}: leave it out "
                "with --exclude_modules"
            )


def quantize(
    W: Tensor, dtype: torch.dtype, double: bool = False, metric: Tensor | None = None
) -> tuple[Quantized, Tensor]:
    """The NF4 of W (d_out, d_in): what is stored, and the values (d_out, d_in) in float32 that the layer will compute
    with, both on W's device. W is rounded to float32 first.

    Args:
        dtype: of the model, to which the values are rounded when they are used.
        double: whether the scales are quantized, too, to 8 bits in blocks of 256.
        metric: H (d_in, d_in), positive definite, by which levels are chosen (see `rounding.optq`). Default: each
            number takes the nearest. The scales are the same.
    """
    functional = _bitsandbytes().functional
    packed, state = functional.quantize_4bit(
        W.float().contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    state.dtype, state.code = dtype, state.code.clone()  # all layers share one, which safetensors would refuse
    if metric is not None:
        scales = state.absmax
        if double:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        codes = optq(W.float(), metric, state.code, scales.view(len(W), -1), dtype).to(W.device)
        first, second = codes.reshape(-1, 2).unbind(1)
        packed = (first << 4 | second)[:, None]
    stored = {"weight": packed} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return stored, functional.dequantize_4bit(packed, state).float()


def values_of(stored: Quantized) -> Tensor:
    """The values (d_out, d_in), in float32, that a stored weight stands for, on its device."""
    bnb, packed = _bitsandbytes(), stored["weight"]
    state = bnb.functional.QuantState.from_dict(_state(stored), packed.device)
    return bnb.functional.dequantize_4bit(packed, state).float()


def _state(stored: Quantized) -> dict[str, Tensor]:
    """What bitsandbytes makes a quant state of; it takes entries out."""
    return {name.removeprefix("weight."): tensor for name, tensor in stored.items() if name != "weight"}


def quantized_layer(layer: nn.Module, stored: Quantized, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer with a stored weight, and the bias, of a linear layer or Conv1D, on the same device."""
    classes, (m, n) = _bitsandbytes().nn, weight_shape(layer)
    device = layer.weight.device
    with torch.device("meta"):
        made = classes.Linear4bit(n, m, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4")
    made.weight = classes.Params4bit.from_prequantized(stored["weight"], _state(stored), device=device, module=made)
    made.bias = layer.bias
    made.source_cls = type(layer)  # as transformers notes it
    compute_as_stored(made)
    return made.train(layer.training)


def compute_as_stored(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Have bitsandbytes compute with the weights as they are stored. On a CPU with AVX512-BF16 its first forward that
    does not train would round the scales to bfloat16, in place: other weights from then on.

    Args:
        dtype: to compute in, and of the weights' values. Default: that of the model's configuration.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
            if dtype is not None:
                module.compute_dtype = module.weight.quant_state.dtype = dtype  # type: ignore[assignment, union-attr]


def quantized_names(model: nn.Module, targets: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """The linear layers of a model that are quantized, and the others, by name: those that transformers leaves as they
    are (the output head), those that see images, and those that are no target and whose rows are no whole number of
    blocks.

    Raises CordaError if transformers leaves a target as it is, or as `check_blocks` does.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    targets = set(targets)
    left = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    sees = image_side(model)  # the tower and the connector, which are small, and whose loss no adapter could mend
    left += [name for name, _ in model.named_modules() if sees(name) and not sees(name.rpartition(".")[0])]
    linear = {n: m for n, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear}
    taken = {name: module for name, module in linear.items() if should_convert_module(name, left)}
    if kept := sorted(targets - taken.keys()):
        raise CordaError(f"{kept[0]} stays in full precision, as transformers leaves it: --exclude_modules [{kept[0]}]")
    check_blocks({name: taken[name] for name in targets})
    left += [name for name, module in taken.items() if name not in targets and weight_shape(module)[1] % BLOCK]
    return [name for name in taken if should_convert_module(name, left)], sorted(set(left))


def packed_bytes(model: nn.Module) -> dict[Tensor, int]:
    """The bytes of the weights that a checkpoint holds in bitsandbytes' 4 or 8 bits, by its config.json: of a model
    that is without its weights, and not quantized itself (see `loading.empty_model`)."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    stored = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if not (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        return {}
    scales = 0.127 if stored.get("bnb_4bit_use_double_quant") else 0.5  # bits a number
    bits = 4 + scales if stored.get("load_in_4bit") else 8
    left = stored.get("llm_int8_skip_modules")
    left = get_keys_to_not_convert(model) if left is None else left
    linear = {n: m for n, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear}
    packed = {m.weight: m.weight.numel() for n, m in linear.items() if should_convert_module(n, left)}
    return {weight: int(numbers * bits / 8) for weight, numbers in packed.items()}


def quantization_config(dtype: torch.dtype, double: bool, left: list[str]) -> Any:
    """What transformers writes into config.json of a model in NF4, of which these modules are left as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=left,
    )
