"""The start → an adapter on the model: a PEFT LoRA whose held part undoes its start, so the base is never changed.

CorDA trains the components B₀A₀ of W in place, beside a frozen residual:  W' + s·BA  with  W' = W − s·B₀A₀. Writing W'
over W (as PEFT does for PiSSA, OLoRA and CorDA) leaves a changed base behind: a second adapter on it talks nonsense,
taking the adapter off does not give the model back, and in bfloat16 the rounding of W' changes the model from the
start. The same function is

    W + s·(B A − B₀ A₀) = W + s·[B, −B₀] [A; A₀]

an ordinary LoRA of rank 2r on the original weights, half of which is held still. That is what is installed here, so
everything PEFT does with a LoRA (save, load, merge, disable, unload, several side by side) is right as it is, a saved
directory loads in plain PEFT, and at the start the two halves cancel exactly in any dtype. `anchored` (A held, B from
zero) and `seeded` (A trained, too) need no second half: rank r. Nor does an adapter on a quantized residual (`residual`
in its marks), which is written once, as a model of its own: see `quantize`. How a part is held: see `held`.

What makes the adapter CorDA's (mode, split, orientation, scale, fingerprint of the base, a description of the held
part) is under "corda" in `auto_mapping`, a free field of PEFT's configuration: whatever saves the adapter writes it to
adapter_config.json, and plain PEFT loads and saves it again without a word.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import CordaError, ModelConfig
from ..files import (
    ADAPTER_CONFIG,
    CHECKSUMS,
    check_adapter,
    check_checksums,
    read_json,
    sha256_of,
    whole_folder,
    write_checksums,
    write_json,
)
from ..models.targets import check_bare, known_labels, lora_config, new_modules
from ..models.weights import fingerprint, layer_digest, or_the_same, weight_shape
from ..preprocess.pipeline import Start
from ..preprocess.statistics import NAME as STATISTICS
from ..preprocess.statistics import Statistics
from ..version import __version__
from .card import TRAINING, Records, base_name, finish_card, write_card
from .held import BUCKETS, FREE, describe_held, freeze, warn_if_trained

RECORD = "corda.json"
TIMING = "timing.json"
SPECTRA = "spectra.safetensors"
CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
BASE_FOLDER = "base"  # of an adapter's quantized base, in its directory
SCALES = "scales"  # in CHECKSUMS, beside the names of files
LABELS = "labels"  # in `auto_mapping`: of a classifier
BASE = "corda_base"  # in `auto_mapping`: fingerprint of the residual model that a plain LoRA is for
HINT_AT_TIES = "Model has `tie_word_embeddings=True`"  # a vague warning of PEFT's: `preprocess` says what to do


def install(model: nn.Module, start: Start) -> PeftModel:
    """Put the start on the model it was made from: a `PeftModel`, whose output is the model's own to the last bit. The
    start's tensors become the adapter's."""
    halves = 1 if start.config.from_zero or start.config.has_residual else 2
    config = lora_config(model, start.layers)
    for option in ("lora_dropout", "exclude_modules", "layers_to_transform", "modules_to_save"):
        setattr(config, option, getattr(start.config, option))
    config.modules_to_save = [*(config.modules_to_save or ()), *new_modules(model)] or None
    set_ranks(config, {name: halves * layer.A.shape[0] for name, layer in start.layers.items()}, start.config.scale)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=HINT_AT_TIES)
        peft_model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    for name, layer in lora_layers(peft_model).items():
        A, B = start.layers[name].A, start.layers[name].B
        if halves == 2:
            A, B = torch.cat([A, A]), torch.cat([B, -B], dim=1)  # (2r, d_in), (d_out, 2r)
        device, dtype = layer.get_base_layer().weight.device, layer.lora_A["default"].weight.dtype
        layer.lora_A["default"].weight = nn.Parameter(A.to(device, dtype))
        layer.lora_B["default"].weight = nn.Parameter(B.to(device, dtype))
    split = "residual" if start.config.has_residual else str(start.config.split)
    weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    marks = {"mode": start.config.mode, "split": split, "scale": start.config.scale}
    marks["orientation"] = start.config.orientation
    marks["fingerprint"] = start.record.get("fingerprint")
    marks["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if split == "residual":
        marks["start"] = digest_of_factors(weights)
        name = getattr(model, "name_or_path", "")
        marks["original"] = {"model": name, "revision": None} if name else None
        if start.config.quantization:  # over the model of that name the adapter would be wrong: nobody shall load it
            whose = f"{name or 'a model'} in 4 bits without what this adapter holds"
            peft_model.peft_config["default"].base_model_name_or_path = whose
    if split not in FREE:
        marks["held"] = describe_held(weights, split)
    peft_model.peft_config["default"].auto_mapping = {"corda": marks}
    freeze(peft_model, split)
    return peft_model


def digest_of_factors(weights: Mapping[str, Tensor]) -> str:
    """sha256 over the factors among an adapter's tensors, as bfloat16: the same in whatever dtype they were saved."""
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if ".lora_" in name):
        digest.update(weights[name].detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def set_ranks(config: LoraConfig, ranks: Mapping[str, int], scale: float) -> None:
    """Write each layer's rank into PEFT's configuration, and the same scale s = lora_alpha / r for all. `r` is the
    largest rank, which is what servers compare with the largest they allow; layers that differ go into the patterns."""
    config.r = max(ranks.values())
    config.lora_alpha = _whole(scale * config.r)
    config.use_rslora = False
    config.rank_pattern = {name: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = {name: _whole(scale * r) for name, r in config.rank_pattern.items()}


def _whole(alpha: float) -> float:
    """An int where it is whole: Ollama reads `lora_alpha` as one, and refuses 16.0."""
    return int(alpha) if alpha == int(alpha) else alpha


def lora_layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers, by the name they have in the base model."""
    return {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


# --- on disk ---------------------------------------------------------------------------------------------------------


def save_adapter(
    peft_model: PeftModel,
    directory: Path,
    records: Mapping[str, Mapping[str, Any]],
    spectra: Mapping[str, Tensor] | None = None,
    statistics: Statistics | None = None,
    base: Path | None = None,
) -> None:
    """Write a standard PEFT adapter directory, right on the original model in plain PEFT, with a model card and the
    records (name of a JSON file → what is in it), `spectra.safetensors` (singular values by layer) and
    `statistics.safetensors` (of the context) beside it. The directory appears whole or not at all. The quantized model
    in the folder `base`, if there is one, is moved into it, and the adapter names it as its base.

    Raises CordaError if the directory exists and holds anything, or the disk is full.
    """
    if base is not None:
        config = peft_model.peft_config["default"]
        config.base_model_name_or_path = str((directory / BASE_FOLDER).absolute())
        config.fan_in_fan_out = False  # its layers are linear layers, whatever they were
    with whole_folder(directory) as folder:
        save_plain(peft_model, folder, records)
        versions = {"corda-lora": __version__} | {p: version(p) for p in ("torch", "transformers", "peft")}
        for name, record in records.items():
            (folder / name).write_text(json.dumps({"versions": versions, **record}, indent=1) + "\n")
        if spectra:
            save_file({name: sigma.float() for name, sigma in spectra.items()}, folder / SPECTRA)
        if statistics is not None:
            statistics.save(folder / STATISTICS)
        write_all_checksums(folder)
        if base is not None:
            base.rename(folder / BASE_FOLDER)


def save_plain(peft_model: PeftModel, folder: Path, records: Records, note: str = "") -> None:
    """What PEFT's `save_pretrained` writes, the same bytes for the same adapter, with a filled-in model card (see
    `write_card`). Checksums are left to the caller, when all else is in the folder: they take a second a gigabyte."""
    adapter = peft_model.peft_config["default"]
    if adapter.modules_to_save:  # PEFT adds a classifier's head at each loading
        adapter.modules_to_save = list(dict.fromkeys(adapter.modules_to_save))
    write_card(peft_model, folder, records, note)
    # Embeddings are never adapted; left to itself PEFT asks the hub whether they were resized.
    peft_model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    finish_card(folder, base_name(peft_model))
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for option in ("target_modules", "exclude_modules"):
        if isinstance(config[option], list):
            config[option].sort()  # PEFT holds a set, whose order differs from run to run
    if marks := peft_model.peft_config["default"].auto_mapping:  # PEFT writes its own where there is no task type
        config["auto_mapping"] = (config["auto_mapping"] or {}) | marks
    if labels := known_labels(peft_model):
        config["auto_mapping"] = (config["auto_mapping"] or {}) | {LABELS: labels}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_record(directory: Path) -> dict[str, Any] | None:
    """corda.json of an adapter directory: how the start was made, to be read and kept, but not needed; None without it.

    Raises CordaError if there is no adapter in the directory, or the record is damaged or of another adapter.
    """
    check_adapter(Path(directory))
    path = Path(directory) / RECORD
    if not path.is_file():
        return None
    try:
        record = dict(json.loads(path.read_text()))
        expected = _recorded_shapes(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CordaError(f"{path} is damaged: {error!r}") from error
    if expected and (Path(directory) / WEIGHTS).is_file():
        shapes = {n: s for n, s in _shapes_in(Path(directory) / WEIGHTS).items() if ".lora_" in n}
        if wrong := next((n for n in sorted({**expected, **shapes}) if expected.get(n) != shapes.get(n)), None):
            raise CordaError(
                f"{Path(directory) / WEIGHTS} has {wrong} of shape {shapes.get(wrong)}, but {path} says "
                f"{expected.get(wrong)}: one of the files is damaged or of another adapter"
            )
    return record


def on_residual(record: Mapping[str, Any]) -> bool:
    """Whether corda.json is of an adapter that holds a part of the model: see `CordaConfig.has_residual`."""
    config = record["config"]
    return config["split"] in ("paper", "balanced") and bool(config.get("quantization") or config.get("fold"))


def _recorded_shapes(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of the factors that a record tells of, by the names that PEFT saves them under."""
    if "layers" not in record:
        return {}
    halves = 1 if record["config"]["split"] in ("anchored", "seeded") or on_residual(record) else 2
    shapes = {}
    for name, layer in record["layers"].items():
        r, (d_out, d_in) = halves * layer["r"], layer["shape"]
        shapes[f"base_model.model.{name}.lora_A.weight"] = [r, d_in]
        shapes[f"base_model.model.{name}.lora_B.weight"] = [d_out, r]
    return shapes


def _shapes_in(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a file. Raises CordaError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CordaError(f"{path} is damaged: {error}") from error


def read_records(directory: Path) -> Records:
    """What is recorded of an adapter in its directory, by file name, for one that is made of it: how its start was
    made, and its training, without the figures of single layers, which are others there."""
    record, path = read_record(directory), directory / TRAINING
    records = {RECORD: record} if record is not None else {}
    training = dict(read_json(path)) if path.is_file() else {}
    training.pop("predicted_drift", None)
    return records | ({TRAINING: training} if training else {})


def read_marks(directory: Path) -> dict[str, Any] | None:
    """What `install` wrote into an adapter's configuration; None for an adapter that is not CorDA's.

    Raises CordaError if there is no adapter in the directory, it has no weights or other ones than were written, or its
    configuration or record is damaged.
    """
    directory = Path(directory)
    path, weights = directory / CONFIG, directory / WEIGHTS
    check_adapter(directory)
    if not weights.is_file():  # PEFT would ask the hub for weights that are not there
        raise CordaError(f"{directory} is not an adapter directory: it has no {WEIGHTS}")
    _shapes_in(weights)
    if (directory / CHECKSUMS).is_file():
        _check_checksums(directory)
    read_record(directory)
    try:
        marks = (json.loads(path.read_text()).get("auto_mapping") or {}).get("corda")
        if marks is not None:
            marks["scale"], marks["fingerprint"]
            if marks["split"] not in FREE:
                marks["held"]["sha256"], marks["held"]["norm"], marks["held"]["sketch"][BUCKETS - 1]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CordaError(f"{path} is damaged: {error!r}") from error
    return marks


def labels_of(directory: Path) -> list[str] | None:
    """The labels of a classifier's adapter, in the order of its outputs; None where it does not say any.

    Raises CordaError if there is no adapter in the directory, or its configuration is damaged."""
    check_adapter(directory)
    path = directory / CONFIG
    try:
        labels = (json.loads(path.read_text()).get("auto_mapping") or {}).get(LABELS)
        return None if labels is None else list(map(str, labels))
    except (ValueError, AttributeError, TypeError) as error:
        raise CordaError(f"{path} is damaged: {error!r}") from error


def with_labels_of(source: ModelConfig, directory: Path) -> ModelConfig:
    """The model with the labels of a classifier's adapter, if it says any.

    Raises CordaError as `labels_of` does, and if other labels are given, or the same in another order: the outputs of
    its head would be taken for each other."""
    labels = labels_of(directory)
    if labels is None:
        return source
    if source.labels not in (None, labels):
        raise CordaError(
            f"the adapter in {directory} has the labels {', '.join(labels)}, in this order: leave labels out"
        )
    return replace(source, labels=labels)


def renew_heads(peft_model: PeftModel) -> None:
    """Give the modules that are trained whole the base model's weights, as they had where the start was made. Those of
    a new head are random, so each seed has its own."""
    for module in peft_model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())


def write_all_checksums(folder: Path) -> None:
    """Of all but the card, whose metadata PEFT renews, and which a publisher edits, and the times, which differ between
    runs that are otherwise the same."""
    write_checksums(folder, "*.safetensors", "*.json")
    checksums = read_json(folder / CHECKSUMS) | {SCALES: _scales_digest(folder)}
    write_json(folder / CHECKSUMS, {name: checksum for name, checksum in checksums.items() if name != TIMING})


def _scales_digest(directory: Path) -> str:
    """sha256 of what the configuration says of ranks and scales. PEFT's `save_pretrained` writes the rest in an order
    of its own, and users may add to it."""
    config = dict(read_json(directory / CONFIG))
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    said = json.dumps([config.get(name) for name in names], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _check_checksums(directory: Path) -> None:
    """Raises CordaError if a file has changed since it was written, but not where PEFT has saved the adapter over ours,
    trained on or as it was: it writes the configuration in other bytes."""
    remedy = f"make the adapter again, or remove {CHECKSUMS} if the change is meant"
    checksums = read_json(directory / CHECKSUMS)
    saved_over: list[str] = []
    if isinstance(checksums, dict) and CONFIG in checksums and checksums[CONFIG] != sha256_of(directory / CONFIG):
        saved_over = [WEIGHTS, CONFIG]
        trained_on = checksums.get(WEIGHTS) != sha256_of(directory / WEIGHTS)
        if not trained_on and checksums.get(SCALES) != _scales_digest(directory):
            raise CordaError(f"{directory / CONFIG} is damaged: {remedy}")
    check_checksums(directory, remedy, all_but=[SCALES, *saved_over])


def check_base(model: nn.Module, directory: Path, config: peft.PeftConfig | None = None) -> None:
    """Raises CordaError if the adapter in a directory is of another model, or was made for other weights than the
    model's, or is damaged.

    Args:
        config: PEFT's, of the adapter. Default: it is read.
    """
    marks = read_marks(directory)
    if config is None:
        with _fitting(directory / CONFIG):
            config = peft.PeftConfig.from_pretrained(str(directory))
    shapes = _shapes_in(directory / WEIGHTS)
    _check_layers(model, shapes, directory, config)
    given = made_for(marks, config)
    if given and (missing := _layers_in(shapes) - {name for name, _ in model.named_modules()}):
        raise _of_another_model(directory, f"this one has no {min(missing)}", config)
    if given and _fingerprint_of(model, shapes) != given:
        raise CordaError(
            f"the adapter in {directory} was made for other weights than these "
            f"(its base was {config.base_model_name_or_path or 'not recorded'})"
            + or_the_same(model.get_submodule(min(_layers_in(shapes))), (marks or {}).get("dtype"))
        )


def made_for(marks: Mapping[str, Any] | None, config: peft.PeftConfig) -> str | None:
    """The fingerprint of the weights that an adapter was made for, by its marks and PEFT's configuration; None where
    these say nothing of them."""
    return marks["fingerprint"] if marks is not None else (config.auto_mapping or {}).get(BASE)


def _check_layers(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], directory: Path, config: peft.PeftConfig
) -> None:
    """Raises CordaError if a model has fewer blocks than an adapter with tensors of these shapes, which PEFT takes
    without a word, or a layer of another shape. (Names of which it has no like may be older ones, which PEFT knows.)"""
    modules = dict(model.named_modules())
    like = {_any_block(name) for name in modules}
    for name in sorted(_layers_in(shapes)):
        layer = modules.get(name)
        if layer is None and _any_block(name) in like:
            raise _of_another_model(directory, f"this one has no {name}", config)
        sides = [shapes.get(f"base_model.model.{name}.lora_{side}.weight") for side in "BA"]
        if isinstance(layer, (nn.Linear, Conv1D)) and all(sides):
            made_for = tuple(each[axis] for axis, each in enumerate(sides) if each)
            if made_for != weight_shape(layer):
                what = f"{name} has the shape {weight_shape(layer)} here, and {made_for} there"
                raise _of_another_model(directory, what, config)


def _any_block(name: str) -> str:
    """A layer's name without the numbers of blocks in it."""
    return re.sub(r"\.\d+", "", name)


def _of_another_model(directory: Path, why: str, config: peft.PeftConfig) -> CordaError:
    base = config.base_model_name_or_path or "not recorded"
    return CordaError(f"the adapter in {directory} is of another model: {why} (its base was {base})")


def load_adapter(
    model: nn.Module, directory: Path | str, trainable: bool = False, lora_dropout: float | None = None
) -> PeftModel:
    """Put a saved adapter, CorDA's or any of PEFT's, on the original model. A warning says so if what a CorDA adapter
    holds still was trained since it was made.

    Args:
        trainable: to train on: what CorDA holds still is held again.
        lora_dropout: while training. Default: as it was saved.

    Raises:
        CordaError: no adapter there, a damaged one, or one of another model or that was made for other weights.
    """
    check_bare(model)
    directory = Path(directory)
    marks = read_marks(directory)
    with _fitting(directory / CONFIG):
        config = peft.PeftConfig.from_pretrained(str(directory))
    check_base(model, directory, config)
    if trainable and lora_dropout is not None:
        config.lora_dropout = lora_dropout
    adapted, has = _layers_in(_shapes_in(directory / WEIGHTS)), {name for name, _ in model.named_modules()}
    try:
        with _fitting(directory / WEIGHTS), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            peft_model = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable, config=config)
    except CordaError as error:
        if not adapted or adapted & has:
            raise
        raise _of_another_model(directory, f"this one has no {min(adapted)}", config) from error
    for warning in said:
        if missing := re.search(r"missing adapter keys.*?\['([^']*)'", str(warning.message)):  # PEFT left it random
            peft_model.unload()
            tensor = missing[1].replace(".default.", ".")
            whose = _layers_in([tensor])
            if whose and not whose & adapted:
                raise _of_another_model(directory, f"it has nothing for {min(whose)}", config)
            raise CordaError(f"{directory / WEIGHTS} is damaged: it has no {tensor}")
        if not str(warning.message).startswith(HINT_AT_TIES):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    layers, modules = lora_layers(peft_model), dict(peft_model.get_base_model().named_modules())
    if unread := sorted(n for n in adapted - layers.keys() if n in modules):
        peft_model.unload()
        raise CordaError(f"{directory / CONFIG} is damaged: target_modules lacks {unread[0]}, which is adapted")
    if marks is not None:
        scales = {name: layer.scaling["default"] for name, layer in layers.items()}
        if changed := [name for name, scale in scales.items() if not math.isclose(scale, marks["scale"], rel_tol=1e-6)]:
            warnings.warn(
                f"{directory / CONFIG} scales {changed[0]} by {scales[changed[0]]:g}, but the adapter was made with "
                f"{marks['scale']:g}: somebody changed lora_alpha or r",
                stacklevel=2,
            )
        with _fitting(directory / WEIGHTS):
            weights = load_peft_weights(str(directory), device="cpu")
        warn_if_trained(weights, marks, str(directory))
    if trainable and marks is not None:
        freeze(peft_model, marks["split"])
    return peft_model


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Turn PEFT's errors about a file of an adapter into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
        raise CordaError(f"{path} is damaged, or does not fit the model: {' '.join(reason.split())}") from error


def _layers_in(weights: Iterable[str]) -> set[str]:
    """The layers that an adapter with these tensors adapts."""
    return {n.removeprefix("base_model.model.").partition(".lora_A.")[0] for n in weights if ".lora_A." in n}


def _fingerprint_of(model: nn.Module, weights: Iterable[str]) -> str:
    """The fingerprint of the layers that an adapter with these tensors adapts."""
    return fingerprint({name: layer_digest(model.get_submodule(name)) for name in _layers_in(weights)})
