"""Load a model and its tokenizer, in the class its checkpoint names."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import modeling_gguf_pytorch_utils

from ..config import CordaError, ModelConfig
from ..config.values import short
from ..files import check_model
from .lockstep import Stored, on_device, tensors_of
from .seeing import reads_images
from .targets import NEW, is_linear, is_of_head
from .weights import compute_as_stored, weight_of, weight_shape

# Tables that older versions stored with the weights; models compute them now.
TABLES = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
PAGES = 64  # of a file of weights, by which it is told from another
FIRST_LAYERS = 8  # linear layers of a block, and one more
ANOTHER = "it is another model"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_model(config: ModelConfig) -> nn.Module:
    """The model, on the CPU, in evaluation mode. With `labels` it is a classifier. What the checkpoint has not of its
    head is drawn with torch's random numbers, and named by `new_modules`.

    Raises CordaError if there is no such model, its weights are a pickle, a weight is missing or has another shape than
    config.json says, or it cannot be loaded.
    """
    name, options = _source(config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    kind: Any = transformers.AutoModelForCausalLM  # a GGUF file holds a language model
    if "gguf_file" in options:
        if config.labels is not None:
            raise CordaError(f"{config.model} holds a language model, which cannot be loaded with a head for labels")
        dtype = torch.float32 if dtype == "auto" else dtype  # its numbers are expanded
        modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm  # a bar that --quiet ends, as their others
    else:
        settings = read_settings(config)
        kind = class_of(settings) or kind
        if config.labels is not None:
            kind = transformers.AutoModelForSequenceClassification
            options |= _label_options(settings, config)
        options["use_safetensors"] = True
        if Path(name).is_dir():
            check_shards(Path(name))
    with _loading("the model", config.model), _gguf_read_once(options):
        # A shape that differs is reported by name, instead of in a table.
        model, report = kind.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    parameters = dict(model.named_parameters())
    missing = [weight for weight in report["missing_keys"] if weight in parameters]
    others = list(report["mismatched_keys"])
    if config.labels is not None:
        new = {weight for weight in missing if _may_be_new(weight)}
        new |= {weight for weight, *_ in others if is_of_head(weight)}  # a head for other labels
        missing, others = [w for w in missing if w not in new], [other for other in others if other[0] not in new]
        setattr(model, NEW, sorted({weight.rpartition(".")[0] for weight in new}))
    for weight, stored, expected in others:
        raise _other_shape(config.model, weight, stored, expected)
    if missing:
        more = f" and {len(missing) - 1} more of its weights" if len(missing) > 1 else ""
        raise CordaError(
            f"the checkpoint {config.model} has no {min(missing)}{more}: it is damaged or of another model"
        )
    if "gguf_file" not in options and config.labels is None:  # a classifier does without the head of a language model
        _warn_of_unexpected(config.model, model, report["unexpected_keys"])
    if "gguf_file" in options:
        # The weights are plain tensors now; transformers still believes that it cannot save them.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        # They know the folder alone, in which nothing says which file it was.
        model.name_or_path = model.config.name_or_path = config.model
    compute_as_stored(model, None if config.dtype == "auto" else getattr(torch, config.dtype))
    return model.eval()


def open_model(config: ModelConfig) -> tuple[nn.Module, dict[Tensor, Callable[[], Tensor]]]:
    """The model without its weights, and for each parameter a function that reads it from the checkpoint's safetensors.

    The parameters have their shapes and dtypes and take no memory: each is one NaN, expanded. `preprocess` takes both;
    it reads a block when it is reached, and drops it afterwards. A checkpoint that is not safetensors under the model's
    own names (a GGUF file, a mixture's experts stored one by one, quantized weights) is loaded whole, with a warning;
    then there are no functions.

    Raises CordaError if there is no such model, its weights are a pickle, a shard is missing or damaged, or a weight
    has another shape than config.json says.
    """
    if config.labels is not None:  # the names in a checkpoint of an encoder differ from those of the classifier
        return load_model(config), {}
    _, options = _source(config)
    why = "a GGUF file"
    if "gguf_file" not in options:
        settings = read_settings(config)
        _shard.cache_clear()
        shards = check_shards(_folder(config))
        if class_of(settings) is not None and getattr(settings, "quantization_config", None) is None:
            model = empty_model(settings, config)
            in_file = _names_in_file(model, shards)
            tensors = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n in in_file}
            for n, tensor in tensors.items():
                stored = torch.Size(_shard(shards[in_file[n]]).get_slice(in_file[n]).get_shape())
                if stored != tensor.shape:
                    raise _other_shape(config.model, in_file[n], stored, tensor.shape)
            readers: dict[Tensor, Callable[[], Tensor]] = {
                tensor: partial(_read, shards[in_file[n]], in_file[n], tensor.dtype) for n, tensor in tensors.items()
            }
            missing = [n for n, parameter in model.named_parameters() if parameter not in readers]
            if not missing:
                known = {n for n, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
                _warn_of_unexpected(config.model, model, in_file.keys() - known)
                return model.eval(), readers
            why = f"it has no {missing[0]}"
        else:
            why = "it is quantized, or its class is not in transformers"
    warnings.warn(f"the whole model is loaded: its checkpoint cannot be read block by block ({why})", stacklevel=2)
    return load_model(config), {}


def checkpoint_digest(config: ModelConfig) -> str:
    """A digest of what tells one checkpoint from another, without reading all of it: its configuration, and of each
    file of weights its size and PAGES pages, evenly spaced.

    Raises CordaError as `open_model` does.
    """
    _, options = _source(config)
    if "gguf_file" in options:
        digest, files = hashlib.sha256(), {Path(config.model)}
    else:
        digest = hashlib.sha256(read_settings(config).to_json_string().encode())
        files = set(check_shards(_folder(config)).values())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for page in range(PAGES):
                file.seek(size * page // PAGES)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _folder(config: ModelConfig) -> Path:
    """Where the safetensors of a checkpoint are; those of a name on the hub are fetched first."""
    name, _ = _source(config)
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.safetensors", "*.safetensors.index.json"]
    with _loading("the model", config.model):
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=patterns))


def _names_in_file(model: nn.Module, shards: Mapping[str, Path]) -> dict[str, str]:
    """For each tensor of a checkpoint its name in the model: its name in the file. They differ where a family's modules
    were moved about since it was published, as those of LLaVA were; transformers knows how. A tensor that is made of
    several, or of a part of one, keeps the file's name."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renames = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
        prefix, state = model.base_model_prefix, model.state_dict()
        return {rename_source_key(name, renames, [], prefix, state)[0]: name for name in shards}
    except (ImportError, TypeError):  # of an older transformers: where names differ, the model is loaded whole
        return {name: name for name in shards}


def read_settings(config: ModelConfig) -> Any:
    """The model's config.json, as transformers reads it.

    Raises CordaError if there is none, or it names an attention kernel on the hub: a kernel is code. (With
    `trust_remote_code` it may.)
    """
    name, options = _source(config)
    if "gguf_file" in options:
        raise CordaError(f"{config.model} has no config.json: name the model it came from")
    with _loading("the model", config.model):
        settings = transformers.AutoConfig.from_pretrained(name, **options)
        settings_and_parts = [settings, *(getattr(settings, part, None) for part in settings.sub_configs)]
    for part in settings_and_parts:
        for key in ("_attn_implementation", "_experts_implementation"):
            kernel = getattr(part, key, None)
            if "/" in str(kernel) and not config.trust_remote_code:
                raise CordaError(
                    f"config.json of {config.model} names a kernel on the hub ({short(kernel)}), which is code: remove "
                    f"{key[1:]} from it, or allow it with --trust_remote_code true"
                )
    return settings


def class_of(settings: Any) -> Any:
    """The class in transformers that config.json names; None if it names no such class."""
    return getattr(transformers, (settings.architectures or [""])[0], None)


def _label_options(settings: Any, config: ModelConfig) -> dict[str, Any]:
    """What a model's configuration says of its labels.

    Raises CordaError if it can have no head for them, or has one for the same labels in another order: the outputs of
    that head would be taken for each other."""
    assert config.labels is not None
    if type(settings) not in transformers.AutoModelForSequenceClassification._model_mapping or (
        settings.is_encoder_decoder
    ):
        raise CordaError(f"{config.model} ({settings.model_type}) cannot be loaded with a head for labels")
    names = dict(enumerate(config.labels))
    own = [str(name) for _, name in sorted(settings.id2label.items())]
    if own != config.labels and sorted(own) == sorted(config.labels):
        listed = short(", ".join(own), 200)[1:-1]
        raise CordaError(f"{config.model} has the labels {listed}, in this order: give --labels in the same")
    options: dict[str, Any] = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    options["problem_type"] = "regression" if len(names) == 1 else "single_label_classification"
    if settings.pad_token_id is None:  # decoders read the last token before the padding: see `load_tokenizer`
        ends = settings.eos_token_id
        options["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return options


def _may_be_new(weight: str) -> bool:
    """Whether a checkpoint may do without a weight of a classifier: outside of the blocks, which are numbered, and no
    embedding. It is of the head, or of the pooling before it."""
    return not re.search(r"\.\d+\.|embed|shared", weight)


def check_original(config: ModelConfig) -> None:
    """Raises CordaError if a checkpoint that is to give the full weights is quantized."""
    if is_quantized(config):
        raise CordaError(f"the original {config.model} is quantized itself: give the full model")


@torch.no_grad()
def check_same_model(model: nn.Module, original: ModelConfig) -> tuple[nn.Module, Stored]:
    """What `open_model` gives of the full model that a quantized one was made from.

    Raises CordaError if it is another model: a layer is missing or has another shape, or the weights of the first
    layers have nothing in common. (Rounded to 4 bits, weights have a cosine of 0.99 with what they were; less where an
    adapter holds a part of them. Those of two models have 0.00.)
    """
    full, stored = open_model(original)
    others, alike = dict(full.named_modules()), list[float]()
    for name, layer in model.named_modules():
        if not is_linear(layer):
            continue
        other = others.get(name)
        if other is None or not is_linear(other) or weight_shape(other) != weight_shape(layer):
            raise CordaError(f"the original {original.model} has no {name} of shape {weight_shape(layer)}: {ANOTHER}")
        if len(alike) < FIRST_LAYERS:
            with on_device(tensors_of(other), torch.device("cpu"), stored):
                Q, W = (weight_of(each).float().cpu().flatten() for each in (layer, other))
                alike.append(float(torch.cosine_similarity(Q, W, dim=0)))
    if alike and max(alike) < 0.1:
        raise CordaError(f"the weights of the original {original.model} have nothing in common with these: {ANOTHER}")
    return full, stored


def is_quantized(config: ModelConfig) -> bool:
    """Whether the weights of a checkpoint are quantized. Those of a GGUF file are expanded."""
    if config.model.endswith(".gguf"):
        return False
    return getattr(read_settings(config), "quantization_config", None) is not None


def empty_model(settings: Any, config: ModelConfig) -> nn.Module:
    """The model without its weights. Its parameters take no memory: each is one NaN, expanded to its shape."""
    dtype = settings.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    kind = class_of(settings)
    if config.labels is not None:
        for name, value in _label_options(settings, config).items():
            setattr(settings, name, value)
        kind = transformers.AutoModelForSequenceClassification._model_mapping[type(settings)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with init_empty_weights():  # buffers (rotary tables) are computed as ever
            model = kind(settings)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nothing = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(nothing, requires_grad=False))
    model.tie_weights()
    return model


def check_shards(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors checkpoint; empty if the folder has no weights.

    Raises CordaError if a file is missing or damaged (its header cannot be read, or its length is not what the header
    says), the index names a file outside the folder, or the weights are a pickle.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CordaError(f"{index} is damaged: {error!r}") from error
    elif (folder / "model.safetensors").is_file():
        files = {"": "model.safetensors"}
    elif pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise CordaError(
            f"the weights in {folder} are a pickle ({pickles[0]}), which can run any code when read: convert them "
            "once where you trust them, by from_pretrained(...) and save_pretrained(...) of transformers"
        )
    else:
        return {}
    shards: dict[str, Path] = {}
    for file in sorted(set(map(str, files.values()))):
        path = folder / file
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CordaError(f"{index} names a file outside its folder: {short(file)}")
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
    try:
        return _shard(path).get_tensor(name).to(dtype)
    except SafetensorError as error:  # it was whole when the model was opened
        raise CordaError(f"{path} was changed while it was read: {_first_line(error)}") from error


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with a padding token (the end-of-text token if it has none of its own). That of a vision-language
    model has its processor as the attribute `processor`; or, as `no_processor`, why that cannot be loaded: a text can
    be read without."""
    name, options = _source(config)
    tokenizer, why = None, ""
    if "gguf_file" not in options and reads_images(read_settings(config)):
        try:
            with _loading("the processor of", config.model):
                tokenizer = with_processor(transformers.AutoProcessor.from_pretrained(name, **options))
        except CordaError as error:
            why = str(error)
    if tokenizer is None:
        with _loading("the tokenizer of", config.model), _gguf_read_once(options):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
            if "gguf_file" in options:
                _set_special_tokens(tokenizer, Path(config.model))
        tokenizer.no_processor = why
    if "gguf_file" not in options:
        _warn_of_end(tokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_processor(processor: Any) -> Any:
    """The tokenizer of a processor, as `load_tokenizer` gives it.

    Raises CordaError if it is none of images and texts, or is of another make than transformers' own."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or not hasattr(processor, "get_text_with_replacements"):
        raise CordaError(
            f"{type(processor).__name__} is no processor that says where it writes an image into a text: this model's "
            "images cannot be read with this version of transformers"
        )
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    tokenizer.processor = processor
    return tokenizer


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of a loaded model, by the name that it was loaded from. Raises CordaError if it has none."""
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise CordaError("the model has no name to find its tokenizer by: give the tokenizer")
    return load_tokenizer(ModelConfig(name))


def _warn_of_end(tokenizer: Any, config: ModelConfig) -> None:
    """Warn where the end-of-text token is the one that the model begins with: saved from a GGUF file, for one (see
    `_set_special_tokens`). What is trained with it does not stop where the model would."""
    settings = read_settings(config).get_text_config()
    ends, begins = settings.eos_token_id, getattr(settings, "bos_token_id", None)  # T5 has none
    ends = ends if isinstance(ends, list) else [ends]
    if ends[0] is not None and begins == tokenizer.eos_token_id not in ends:
        warnings.warn(
            f"the tokenizer of {config.model} ends a text with {tokenizer.eos_token!r}, with which the model begins "
            f"one; the model stops at {tokenizer.convert_ids_to_tokens(ends[0])!r}: set the tokenizer's eos_token",
            stacklevel=3,
        )


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


@contextmanager
def _gguf_read_once(options: dict[str, Any]) -> Iterator[None]:
    """Inside this context a GGUF file is parsed once: transformers (5.17) does it anew for the configuration, the names
    of the weights and the tokenizer, each time with the whole vocabulary, which takes seconds."""
    if "gguf_file" not in options:
        yield
        return
    import gguf

    kind = gguf.GGUFReader
    read = cache(kind)
    gguf.GGUFReader = lambda path: read(Path(path))
    try:
        yield
    finally:
        gguf.GGUFReader = kind


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The arguments of `from_pretrained`: the name, and keyword arguments."""
    check_model(config.model)
    if config.model.endswith(".gguf"):
        path = Path(config.model)
        return str(path.parent), {"gguf_file": path.name}
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    return config.model, options


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Turn any error of transformers into one sentence, and silence its tables.

    A damaged file makes it raise errors of many types."""
    thing, verbosity = f"{what} {name!r}", transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except (MemoryError, CordaError):
        raise
    except ModuleNotFoundError as error:
        raise CordaError(f"to load {thing}, the package {error.name} is needed: pip install {error.name}") from error
    except Exception as error:
        here = "" if Path(name).exists() else " (and there is no directory of this name here)"
        raise CordaError(f"cannot load {thing}{here}: {_first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _warn_of_unexpected(name: str, model: nn.Module, tensors: Iterable[str]) -> None:
    """Warn of tensors in a checkpoint that the model does not take, except for those that its class ignores."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = sorted(t for t in tensors if not TABLES.search(t) and not any(re.search(i, t) for i in ignored))
    if left:
        warnings.warn(
            f"the checkpoint {name} has {len(left)} tensors that {type(model).__name__} does not have, such as "
            f"{left[0]}: they are left out, so the model may not be what its author trained",
            stacklevel=3,
        )


def _other_shape(model: str, weight: str, stored: torch.Size, expected: torch.Size) -> CordaError:
    return CordaError(
        f"the checkpoint {model} has {weight} of shape {tuple(stored)}, but its config.json says {tuple(expected)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
