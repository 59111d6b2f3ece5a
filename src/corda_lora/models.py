"""Load a model and its tokenizer, in the class its checkpoint names."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .config import CordaError, ModelConfig


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
        return str(path.parent), {"gguf_file": path.name}
    if looks_local and not (path / "config.json").is_file():
        raise CordaError(f"there is no model in {config.model}: it has no config.json")
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return config.model, options


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
