"""Load a model and its tokenizer, in the class its checkpoint names."""

import json
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import CordaError, ModelConfig


def load_model(config: ModelConfig) -> nn.Module:
    """The model, on the CPU, in evaluation mode.

    Raises CordaError if there is none, or it cannot be loaded.
    """
    name, options = _source(config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        architecture = transformers.AutoConfig.from_pretrained(name, **options).architectures
        kind = getattr(transformers, (architecture or ["AutoModelForCausalLM"])[0], transformers.AutoModelForCausalLM)
        if "gguf_file" in options:  # holds a language model; its numbers are expanded to float32
            kind, dtype = transformers.AutoModelForCausalLM, torch.float32 if dtype == "auto" else dtype
        model = kind.from_pretrained(name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise CordaError(f"cannot load the model {config.model!r}: {_first_line(error)}") from error
    if "gguf_file" in options:
        # The weights are plain tensors now; transformers still believes that it cannot save them.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
    return model.eval()


def open_model(config: ModelConfig) -> tuple[nn.Module, dict[Tensor, Callable[[], Tensor]]]:
    """The model without its weights, and for each parameter a function that reads it from the checkpoint's safetensors.

    The parameters have their shapes and dtypes and take no memory: each is one NaN, expanded. Give both to
    `preprocess`, which reads a block when it is reached and drops it after. A checkpoint that is not safetensors under
    the model's own names (a GGUF file, a mixture's experts stored one by one, quantized weights) is loaded whole, and
    said so: then there are no functions.

    Raises CordaError if there is no model, or a shard of it is missing or damaged.
    """
    name, options = _source(config)
    why = "a GGUF file"
    if "gguf_file" not in options:
        settings = read_settings(config)
        folder = Path(name)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            try:
                folder = Path(snapshot_download(name, revision=config.revision, allow_patterns=patterns))
            except (OSError, ValueError) as error:
                raise CordaError(f"cannot load the model {config.model!r}: {_first_line(error)}") from error
        _shard.cache_clear()
        shards = check_shards(folder)
        if class_of(settings) is not None and getattr(settings, "quantization_config", None) is None:
            model = empty_model(settings, config)
            names = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in shards}
            read: dict[Tensor, Callable[[], Tensor]] = {
                tensor: partial(_read, shards[n], n, tensor.dtype) for n, tensor in names.items()
            }
            missing = [n for n, parameter in model.named_parameters() if parameter not in read]
            if not missing:
                return model.eval(), read
            why = f"it has no {missing[0]}"
        else:
            why = "it is quantized, or its class is not in transformers"
    warnings.warn(f"the whole model is loaded: its checkpoint cannot be read block by block ({why})", stacklevel=2)
    return load_model(config), {}


def read_settings(config: ModelConfig) -> Any:
    """What config.json says of a model. Raises CordaError if there is none."""
    name, options = _source(config)
    if "gguf_file" in options:
        raise CordaError(f"{config.model} has no config.json: name the model it came from")
    try:
        return transformers.AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise CordaError(f"cannot load the model {config.model!r}: {_first_line(error)}") from error


def class_of(settings: Any) -> Any:
    """The class of transformers that config.json names; None if it names none of them."""
    return getattr(transformers, (settings.architectures or [""])[0], None)


def empty_model(settings: Any, config: ModelConfig) -> nn.Module:
    """The model without its weights: its parameters take no memory, each is one NaN, expanded to its shape."""
    dtype = settings.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with init_empty_weights():  # buffers (rotary tables) are computed as ever
            model = class_of(settings)(settings)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
    model.tie_weights()
    return model


def check_shards(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors checkpoint; empty if there is none.

    Raises CordaError if a file is missing or damaged (a header that cannot be read, or another length than it says).
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CordaError(f"{index} is damaged: {error!r}") from error
    elif (folder / "model.safetensors").is_file():
        files = {"": "model.safetensors"}
    else:
        return {}
    shards: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        path = folder / file
        if not path.is_file():
            raise CordaError(f"the checkpoint {folder} has no {file}, which its index names")
        try:
            with safe_open(path, framework="pt") as tensors:
                shards |= dict.fromkeys(tensors.keys(), path)
        except (SafetensorError, OSError) as error:
            raise CordaError(f"{path} is damaged: {_first_line(error)}") from error
    for name, file in files.items():
        if name and name not in shards:
            raise CordaError(f"{folder / file} has no {name}, which the index says it has")
    return shards


@lru_cache(maxsize=1)  # a block's tensors are mostly in one file
def _shard(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _read(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    return _shard(path).get_tensor(name).to(dtype)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with a padding token (the end-of-text token if it has none of its own)."""
    name, options = _source(config)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise CordaError(f"cannot load the tokenizer of {config.model!r}: {_first_line(error)}") from error
    if "gguf_file" in options:
        _set_special_tokens(tokenizer, Path(config.model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_special_tokens(tokenizer: Any, path: Path) -> None:
    """The special tokens that the file names: transformers (5.17) gives a GGUF's tokenizer its begin-of-text token for
    an end."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name, key in {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "pad_token": "padding_token_id",
    }.items():
        if field := fields.get(f"tokenizer.ggml.{key}"):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: name, and keyword arguments."""
    path = Path(config.model)
    looks_local = path.exists() or config.model.startswith((".", "/")) or config.model.count("/") > 1
    looks_local = looks_local or config.model.endswith("/")
    if config.model.endswith(".gguf"):
        if not path.is_file():
            raise CordaError(f"there is no file {config.model}")
        if find_spec("gguf") is None:
            raise CordaError(f"to read {config.model}, the package gguf is needed: pip install gguf")
        return str(path.parent), {"gguf_file": path.name}
    if looks_local and not (path / "config.json").is_file():
        raise CordaError(f"there is no model in {config.model}: it has no config.json")
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return config.model, options


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
