"""The quantized base of an adapter: in a directory that transformers loads, or in place of a model in memory.

Target layers were quantized when they were decomposed (see `preprocess.layer.quantize_layer`), a residual where the
adapter holds a part of the weight. The other linear layers are quantized here as they are, and the rest (embeddings,
norms, the output head) stays in the model's own dtype: so transformers itself quantizes a model.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..data.images import processor_of
from ..devices import compute_device
from ..files import whole_file, write_json
from ..models.lockstep import Stored, find_blocks, on_device, tensors_of
from ..models.residual import mark_residual
from ..models.weights import (
    Quantized,
    digest_of,
    is_4bit,
    quantization_config,
    quantize,
    quantized_layer,
    quantized_names,
    weight_of,
    weight_shape,
)
from ..preprocess.pipeline import Start


@torch.no_grad()
def write_base(model: nn.Module, start: Start, folder: Path, stored: Stored, tokenizer: Any = None) -> None:
    """Write the quantized model into a folder, a file for each block. Files that are there already are left: they are
    whole, and of the same run.

    Args:
        model: the full model; it may be without its weights.
        stored: parameters whose values are in a checkpoint (see `models.open_model`).
    """
    device = compute_device(model, start.config.device)
    names, left = quantized_names(model, start.layers)
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(model, start))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        if not (folder / file).is_file():
            written: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                module, _, kind = name.rpartition(".")
                if kind == "weight" and module in names:
                    quantized = _quantized(model, start, module, device, stored)
                    written |= {f"{module}.{key}": x.cpu() for key, x in quantized.items()}
                else:
                    read = stored.get(tensor)
                    written[name] = (read() if read else tensor.detach().cpu()).contiguous()
            with whole_file(folder / file) as partial:
                save_file(written, partial, metadata={"format": "pt"})
        with safe_open(folder / file, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file)
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = _describe(model, start, left)
    _mark(config, model, start, device, stored)
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        (processor_of(tokenizer) or tokenizer).save_pretrained(folder)


def _parts(model: nn.Module, start: Start) -> Iterator[dict[str, Tensor]]:
    """The model's tensors by name, those of each block together. A tensor with several names (a tied output head) has
    its first."""
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    rest = {name: tensor for tensor, name in names.items()}
    for block in find_blocks(model, list(start.layers)):
        yield {name: rest.pop(name) for name in list(rest) if name.startswith(f"{block}.")}
    yield rest


def _quantized(model: nn.Module, start: Start, name: str, device: torch.device, stored: Stored) -> Quantized:
    """The quantized weight of a layer: its residual's, if it is adapted."""
    if name in start.layers:
        assert start.quantized is not None
        return start.quantized(name)
    return _as_it_is(model, start, name, device, stored)


def _as_it_is(model: nn.Module, start: Start, name: str, device: torch.device, stored: Stored) -> Quantized:
    """The quantized weight of a layer, with nothing taken out."""
    layer = model.get_submodule(name)
    with on_device(tensors_of(layer), device, stored):
        W = weight_of(layer)
        return quantize(W, W.dtype, start.config.double_quantization)[0]


def _mark(settings: Any, model: nn.Module, start: Start, device: torch.device, stored: Stored) -> None:
    """Write into a configuration that the quantized model is a residual, if it is one. The model is still full."""
    if not start.config.has_residual:
        return

    def compared() -> Iterator[tuple[str, list[str], str]]:
        for name in start.layers:
            assert start.quantized is not None
            shape, whole = weight_shape(model.get_submodule(name)), _as_it_is(model, start, name, device, stored)
            yield name, [digest_of(shape, start.quantized(name)["weight"])], digest_of(shape, whole["weight"])

    mark_residual(settings, start.record["fingerprint"], compared())


def _describe(model: nn.Module, start: Start, left: Iterable[str]) -> Any:
    """The model's configuration, which says how it is quantized."""
    config: Any = type(model.config).from_dict(model.config.to_dict())  # type: ignore[operator, union-attr]
    config.architectures = [type(model).__name__]
    dtype = next(model.parameters()).dtype
    config.dtype = dtype
    config.quantization_config = quantization_config(dtype, start.config.double_quantization, list(left))
    return config


@torch.no_grad()
def quantize_in_place(model: Any, start: Start) -> None:
    """Quantize a loaded model, one layer at a time; it is then as transformers loads a model in 4 bits."""
    from transformers.quantizers.auto import AutoHfQuantizer

    names, left = quantized_names(model, start.layers)
    dtype = next(model.parameters()).dtype
    _mark(model.config, model, start, compute_device(model, start.config.device), {})
    for name in names:
        layer = model.get_submodule(name)
        stored = _quantized(model, start, name, layer.weight.device, {})
        stored = {key: tensor.to(layer.weight.device) for key, tensor in stored.items()}
        model.set_submodule(name, quantized_layer(layer, stored, dtype))
    config = quantization_config(dtype, start.config.double_quantization, left)
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer.postprocess_model(model)


@torch.no_grad()
def dequantize_in_place(model: Any) -> None:
    """Turn a model in 4 bits into an ordinary one, one layer at a time: each weight becomes what it stands for."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and is_4bit(layer):
            W, (m, n) = weight_of(layer), weight_shape(layer)
            conv1d = getattr(layer, "source_cls", nn.Linear) is Conv1D
            with torch.device("meta"):
                made: Any = Conv1D(m, n) if conv1d else nn.Linear(n, m, bias=False)
            made.weight, made.bias = nn.Parameter(W.T.contiguous() if conv1d else W, requires_grad=False), layer.bias
            model.set_submodule(name, made)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    # How bitsandbytes' tensors were put together when it was loaded, which transformers cannot revert when it saves.
    kept = [
        c for c in getattr(model, "_weight_conversions", None) or () if "Bnb" not in repr(getattr(c, "operations", ""))
    ]
    model._weight_conversions = kept or None
