"""The start → an adapter on the model: a PEFT LoRA whose held part undoes its start, so the base is never changed.

CorDA trains the components B₀A₀ of W in place, beside a frozen residual:  W' + s·BA  with  W' = W − s·B₀A₀. Writing W'
over W (as PEFT does for PiSSA, OLoRA and CorDA) leaves a changed base behind: a second adapter on it talks nonsense,
taking the adapter off does not give the model back, and in bfloat16 the rounding of W' changes the model from the
start. The same function is

    W + s·(B A − B₀ A₀) = W + s·[B, −B₀] [A; A₀]

an ordinary LoRA of rank 2r on the original weights, half of which is held still. That is what is installed here, so
everything PEFT does with a LoRA (save, load, merge, disable, unload, several side by side) is right as it is, a saved
directory loads in plain PEFT, and at the start the two halves cancel exactly in any dtype. `anchored` (A held, B from
zero) and `seeded` (A trained, too) need no second half: rank r. How a part is held: see `held`.

What makes the adapter CorDA's (split, scale, fingerprint of the base, a description of the held part) is under "corda"
in `auto_mapping`, a free field of PEFT's configuration: whatever saves the adapter writes it to adapter_config.json,
and plain PEFT loads and saves it again without a word.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import CordaError
from ..files import CHECKSUMS, check_checksums, whole_folder, write_checksums
from ..models.targets import check_bare, fingerprint, layer_digest, lora_config
from ..preprocess.pipeline import Start
from ..version import __version__
from .held import describe_held, freeze, warn_if_trained

RECORD = "corda.json"
TIMING = "timing.json"
SPECTRA = "spectra.safetensors"
WEIGHTS = "adapter_model.safetensors"


def install(model: nn.Module, start: Start) -> PeftModel:
    """Put the start on the model it was made from: a `PeftModel`, whose output is the model's own to the last bit. The
    start's tensors become the adapter's."""
    halves = 1 if start.config.from_zero else 2
    config = lora_config(model, start.layers)
    config.lora_dropout, config.modules_to_save = start.config.lora_dropout, start.config.modules_to_save
    set_ranks(config, {name: halves * layer.A.shape[0] for name, layer in start.layers.items()}, start.config.scale)
    with _without_hint_at_ties():
        peft_model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    for name, layer in lora_layers(peft_model).items():
        A, B = start.layers[name].A, start.layers[name].B
        if halves == 2:
            A, B = torch.cat([A, A]), torch.cat([B, -B], dim=1)  # (2r, d_in), (d_out, 2r)
        device, dtype = layer.get_base_layer().weight.device, layer.lora_A["default"].weight.dtype
        layer.lora_A["default"].weight = nn.Parameter(A.to(device, dtype))
        layer.lora_B["default"].weight = nn.Parameter(B.to(device, dtype))
    split = str(start.config.split)
    weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    marks = {"split": split, "scale": start.config.scale, "fingerprint": start.record.get("fingerprint")}
    if split != "seeded":
        marks["held"] = describe_held(weights, split)
    peft_model.peft_config["default"].auto_mapping = {"corda": marks}
    freeze(peft_model, split)
    return peft_model


@contextmanager
def _without_hint_at_ties() -> Iterator[None]:
    """Without PEFT's warning of "complications" with an adapter on a tied output head: `preprocess` says which."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


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
) -> None:
    """Write a standard PEFT adapter directory, right on the original model in plain PEFT, with the records (name of a
    JSON file → what is in it) and `spectra.safetensors` (singular values by layer) beside it. The directory appears
    whole or not at all.

    Raises CordaError if the directory exists and holds anything, or the disk is full.
    """
    with whole_folder(directory) as folder:
        save_plain(peft_model, folder)
        versions = {"corda-lora": __version__} | {p: version(p) for p in ("torch", "transformers", "peft")}
        for name, record in records.items():
            (folder / name).write_text(json.dumps({"versions": versions, **record}, indent=1) + "\n")
        if spectra:
            save_file({name: sigma.float() for name, sigma in spectra.items()}, folder / SPECTRA)
        write_checksums(folder, "*.safetensors")


def save_plain(peft_model: PeftModel, folder: Path) -> None:
    """What PEFT's `save_pretrained` writes, the same bytes for the same adapter."""
    # Embeddings are never adapted; left to itself PEFT asks the hub whether they were resized.
    peft_model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, all blanks
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT holds a set, whose order differs from run to run
    if marks := peft_model.peft_config["default"].auto_mapping:  # PEFT writes its own where there is no task type
        config["auto_mapping"] = (config["auto_mapping"] or {}) | marks
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_record(directory: Path) -> dict[str, Any] | None:
    """corda.json of an adapter directory: how the start was made, to be read and kept, but not needed; None without it.

    Raises CordaError if there is no adapter in the directory, or the record is damaged.
    """
    if not (Path(directory) / "adapter_config.json").is_file():
        raise CordaError(f"{directory} is not an adapter directory: it has no adapter_config.json")
    path = Path(directory) / RECORD
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CordaError(f"{path} is damaged: {error!r}") from error


def read_marks(directory: Path) -> dict[str, Any] | None:
    """What `install` wrote into an adapter's configuration; None for an adapter that is not CorDA's.

    Raises CordaError if there is no adapter in the directory, it has no weights or other ones than were written, or its
    configuration or record is damaged.
    """
    path = Path(directory) / "adapter_config.json"
    for name in (path.name, WEIGHTS):  # PEFT would ask the hub for weights that are not there
        if not (Path(directory) / name).is_file():
            raise CordaError(f"{directory} is not an adapter directory: it has no {name}")
    if (Path(directory) / CHECKSUMS).is_file():
        check_checksums(Path(directory), f"make the adapter again, or remove {CHECKSUMS} if the change is meant")
    read_record(directory)
    try:
        marks = (json.loads(path.read_text()).get("auto_mapping") or {}).get("corda")
        if marks is not None and marks["split"] != "seeded":
            marks["held"]["sha256"], marks["held"]["norm"], marks["held"]["sketch"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CordaError(f"{path} is damaged: {error!r}") from error
    return marks


def load_adapter(
    model: nn.Module, directory: Path | str, trainable: bool = False, lora_dropout: float | None = None
) -> PeftModel:
    """Put a saved adapter, CorDA's or any of PEFT's, on the original model. A warning says so if what a CorDA adapter
    holds still was trained since it was made.

    Args:
        trainable: to train on: what CorDA holds still is held again.
        lora_dropout: while training. Default: as it was saved.

    Raises:
        CordaError: no adapter there, a damaged one, or one that was made for other weights.
    """
    check_bare(model)
    directory = Path(directory)
    marks = read_marks(directory)
    with _fitting(directory):
        config = peft.PeftConfig.from_pretrained(str(directory))
    if marks is not None:
        with _fitting(directory):
            weights = load_peft_weights(str(directory), device="cpu")
        if marks["fingerprint"] and _fingerprint_of(model, weights) != marks["fingerprint"]:
            raise CordaError(
                f"the adapter in {directory} was made for other weights than these "
                f"(its base was {config.base_model_name_or_path or 'not recorded'})"
            )
    if trainable and lora_dropout is not None:
        config.lora_dropout = lora_dropout
    with _fitting(directory), _without_hint_at_ties():
        peft_model = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable, config=config)
    if marks is not None:
        warn_if_trained(weights, marks, str(directory))
    if trainable and marks is not None:
        freeze(peft_model, marks["split"])
    return peft_model


@contextmanager
def _fitting(directory: Path) -> Iterator[None]:
    """Turn PEFT's errors about an adapter into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CordaError(f"the adapter in {directory} is damaged, or does not fit the model: {reason}") from error


def _fingerprint_of(model: nn.Module, names: Iterable[str]) -> str | None:
    """The fingerprint of the layers that an adapter with these tensors adapts; None if the model lacks one of them."""
    layers = {n.removeprefix("base_model.model.").partition(".lora_A.")[0] for n in names if ".lora_A." in n}
    try:
        return fingerprint({name: layer_digest(model.get_submodule(name)) for name in layers})
    except AttributeError:
        return None
