"""The start → an adapter on the model: a PEFT LoRA whose frozen part undoes its start, so the base is never changed.

CorDA trains the components B₀A₀ of W in place, beside a frozen residual:  W' + s·BA  with  W' = W − s·B₀A₀. Writing W'
over W (as PEFT does for PiSSA, OLoRA and CorDA) leaves a changed base behind: a second adapter on it talks nonsense,
taking the adapter off does not give the model back, and in bfloat16 the rounding of W' changes the model from the
start. The same function is

    W + s·(B A − B₀ A₀) = W + s·[B, −B₀] [A; A₀]

an ordinary LoRA of rank 2r on the original weights, half of it frozen. That is what is installed here, so everything
PEFT does with a LoRA (save, load, merge, disable, unload, several side by side) is right as it is, a saved directory
loads in plain PEFT, and at the start the two halves cancel exactly in any dtype. `anchored` (A frozen, B from zero)
and `seeded` (A trained, too) need no second half: rank r.
"""

import json
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import __version__
from ..config import CordaError
from ..devices import double_device
from ..files import whole_folder
from ..models.targets import fingerprint, layer_digest, task_type
from ..preprocess.pipeline import Start

RECORD = "corda.json"
TIMING = "timing.json"
SPECTRA = "spectra.safetensors"


class HeldFactor(nn.Module):
    """A factor of a LoRA, in the place of PEFT's `nn.Linear`, that trains one part and holds the other still.

    `lora_A`: weight [trained; held], each (r, d_in). `lora_B`: weight [trained, −held], each (d_out, r). Either part
    may be missing. `weight` is the whole, also in a state dict; only `trained` is a parameter.
    """

    def __init__(self, trained: Tensor | None, held: Tensor | None, axis: int):
        super().__init__()
        self.trained: nn.Parameter | None
        self.held: Tensor | None
        self.register_parameter("trained", None if trained is None else nn.Parameter(trained))
        self.register_buffer("held", held)
        self.axis = axis  # 0 for lora_A, 1 for lora_B

    @property
    def weight(self) -> Tensor:
        parts = [self.trained, self.held if self.axis == 0 or self.held is None else -self.held]
        return torch.cat([part for part in parts if part is not None], dim=self.axis)

    def forward(self, x: Tensor) -> Tensor:
        # The halves are multiplied apart, by the same kernel in the same order: equal halves cancel to the last bit.
        if self.trained is None or self.held is None:
            return F.linear(x, self.weight)
        if self.axis == 0:
            return torch.cat([F.linear(x, self.trained), F.linear(x, self.held)], dim=-1)
        trained, held = x.chunk(2, dim=-1)
        return F.linear(trained, self.trained) - F.linear(held, self.held)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        elif weight.shape != self.weight.shape:
            error_msgs.append(f"{prefix}weight: {tuple(weight.shape)} given, {tuple(self.weight.shape)} expected")
        else:
            with torch.no_grad():
                self.hold(weight)

    def hold(self, weight: Tensor) -> None:
        """Set both parts from the whole."""
        trained, held = self.trained, self.held
        if trained is not None and held is not None:
            first, second = weight.chunk(2, dim=self.axis)
            trained.copy_(first)
            held.copy_(second if self.axis == 0 else -second)
        elif trained is not None:
            trained.copy_(weight)
        elif held is not None:
            held.copy_(weight)


def install(model: nn.Module, start: Start) -> PeftModel:
    """Put the start on the model it was made from: a `PeftModel`, whose output is the model's own to the last bit. The
    start's tensors become the adapter's."""
    times = 1 if start.config.from_zero else 2
    ranks = {name: times * layer.A.shape[0] for name, layer in start.layers.items()}
    config = LoraConfig(
        target_modules=list(start.layers),
        task_type=task_type(model),
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in start.layers),
    )
    _set_ranks(config, ranks, start.config.scale)
    peft_model = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    for name, layer in lora_layers(peft_model).items():
        A, B = start.layers[name].A, start.layers[name].B
        if times == 2:
            A, B = torch.cat([A, A]), torch.cat([B, -B], dim=1)  # (2r, d_in), (d_out, 2r)
        device, dtype = layer.get_base_layer().weight.device, layer.lora_A["default"].weight.dtype
        layer.lora_A["default"].weight = nn.Parameter(A.to(device, dtype))
        layer.lora_B["default"].weight = nn.Parameter(B.to(device, dtype))
    hold_start(peft_model, str(start.config.split))
    return peft_model


def _set_ranks(config: LoraConfig, ranks: Mapping[str, int], scale: float) -> None:
    """Write each layer's rank into PEFT's configuration, and the same scale for all; what differs from the most common
    rank goes into the patterns."""
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = scale * config.r
    config.rank_pattern = {name: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = {name: scale * r for name, r in config.rank_pattern.items()}


def hold_start(peft_model: PeftModel, split: str) -> None:
    """Freeze what must stay as it is: A of an `anchored` adapter; nothing of a `seeded` one; else the second half of A
    and of B."""
    if split == "seeded":
        return
    for layer in lora_layers(peft_model).values():
        A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        if split == "anchored":
            layer.lora_A["default"] = HeldFactor(None, A, axis=0)
        else:
            (A, A0), (B, minus_B0) = A.chunk(2, dim=0), B.chunk(2, dim=1)
            layer.lora_A["default"] = HeldFactor(A.clone(), A0.clone(), axis=0)
            layer.lora_B["default"] = HeldFactor(B.clone(), -minus_B0, axis=1)


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
        _save_plain(peft_model, folder)
        versions = {"corda-lora": __version__} | {p: version(p) for p in ("torch", "transformers", "peft")}
        for name, record in records.items():
            (folder / name).write_text(json.dumps({"versions": versions, **record}, indent=1) + "\n")
        if spectra:
            save_file({name: sigma.float() for name, sigma in spectra.items()}, folder / SPECTRA)


def _save_plain(peft_model: PeftModel, folder: Path) -> None:
    # Embeddings are never adapted; left to itself PEFT asks the hub whether they were resized.
    peft_model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, all blanks
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT holds a set, whose order differs from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_record(directory: Path) -> dict[str, Any] | None:
    """corda.json of an adapter directory; None for an adapter that is not CorDA's.

    Raises CordaError if there is no adapter in it, or the record is damaged.
    """
    if not (Path(directory) / "adapter_config.json").is_file():
        raise CordaError(f"{directory} is not an adapter directory: it has no adapter_config.json")
    path = Path(directory) / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        return {**record, "config": dict(record["config"]), "fingerprint": str(record["fingerprint"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CordaError(f"{path} is damaged: {error!r}") from error


def load_adapter(
    model: nn.Module, directory: Path | str, trainable: bool = False, lora_dropout: float = 0.0
) -> PeftModel:
    """Put a saved adapter, CorDA's or any of PEFT's, on the original model.

    Args:
        trainable: to train on: what CorDA holds still is frozen again.
        lora_dropout: while training.

    Raises:
        CordaError: no adapter there, or one that was made for other weights.
    """
    directory = Path(directory)
    record = read_record(directory)
    config = peft.PeftConfig.from_pretrained(str(directory))
    if record is not None:
        digests = {n: layer_digest(model.get_submodule(n)) for n in record["layers"] if _has(model, n)}
        if len(digests) < len(record["layers"]) or fingerprint(digests) != record["fingerprint"]:
            raise CordaError(
                f"the adapter in {directory} was made for other weights than these "
                f"(its base was {record.get('model') or 'not recorded'})"
            )
    if trainable:
        config.lora_dropout = lora_dropout
    peft_model = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable, config=config)
    if trainable and record is not None:
        hold_start(peft_model, record["config"]["split"])
    return peft_model


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


# --- to other forms --------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_lora(model: nn.Module, directory: Path | str, output: Path, r: int | None = None) -> float:
    """A plain LoRA on the original model: the adapter as it is (exact: rank 2r, or r if B started from zero), or
    compressed to rank `r`.

    Returns:
        ‖ΔW − ΔW_r‖ / ‖ΔW‖ over all layers (Frobenius); 0 if not compressed.
    """
    peft_model = load_adapter(model, directory)
    error = total = 0.0
    if r is not None:
        layers, config = lora_layers(peft_model), peft_model.peft_config["default"]
        ranks = {name: layer.r["default"] for name, layer in layers.items()}
        if r > max(ranks.values()):
            raise CordaError(f"rank {r} is no compression: the adapter's largest rank is {max(ranks.values())}")
        for name, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            A, B, rest, whole = compress(A, B, min(r, ranks[name]))
            ranks[name] = A.shape[0]  # never above the layer's own, where 2r may be
            layer.lora_A["default"].weight = nn.Parameter(A)
            layer.lora_B["default"].weight = nn.Parameter(B)
            scale = layer.scaling["default"] ** 2
            error, total = error + scale * rest, total + scale * whole
        _set_ranks(config, ranks, config.lora_alpha / config.r)
    with whole_folder(output) as folder:
        _save_plain(peft_model, folder)
    return (error / total) ** 0.5 if total else 0.0


def compress(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Best rank-r factors of B A (Eckart-Young), with ‖BA − B_r A_r‖² and ‖BA‖². A: (k, n), B: (m, k), k ≥ r; the
    factors have no more than min(m, n) components.

    The SVD is of a (k, k) matrix: B = Q_b R_b, Aᵀ = Q_a R_a, and B A = Q_b (R_b R_aᵀ) Q_aᵀ.
    """
    Q_b, R_b = torch.linalg.qr(B.double())  # (m, k), (k, k)
    Q_a, R_a = torch.linalg.qr(A.double().T)  # (n, k), (k, k)
    U, sigma, Vh = torch.linalg.svd(R_b @ R_a.T)
    root = sigma[:r].sqrt()
    new_A = root[:, None] * (Vh[:r] @ Q_a.T)
    new_B = (Q_b @ U[:, :r]) * root
    return new_A.to(A.dtype), new_B.to(B.dtype), float((sigma[r:] ** 2).sum()), float((sigma**2).sum())


@torch.no_grad()
def export_merged(model: nn.Module, directory: Path | str, output: Path, tokenizer: Any = None) -> None:
    """The whole model with the adapter merged in, in the dtype it was loaded in."""
    _needs_full_weights(model, "merged")
    merged = load_adapter(model, directory).merge_and_unload()
    with whole_folder(output) as folder:
        merged.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


@torch.no_grad()
def export_residual(model: nn.Module, directory: Path | str, output: Path, tokenizer: Any = None) -> None:
    """The residual model W' = W − s·B₀A₀ in `output`, and in `output/adapter` the rank-r adapter (B, A) for it: half
    the adapter's work at run time, but the adapter is right on this model only.

    Raises CordaError if the adapter has no residual: B started from zero, or it is a plain LoRA.
    """
    record = read_record(Path(directory))
    if record is None or record["config"]["split"] in ("anchored", "seeded"):
        raise CordaError(f"the adapter in {directory} is a LoRA on the original model: there is no residual to export")
    _needs_full_weights(model, "residual")
    peft_model = load_adapter(model, directory)
    for layer in lora_layers(peft_model).values():
        (A, A0), (B, minus_B0) = (
            layer.lora_A["default"].weight.chunk(2, dim=0),
            layer.lora_B["default"].weight.chunk(2, dim=1),
        )
        W = layer.get_base_layer().weight
        there = double_device(W.device)
        removed = layer.scaling["default"] * minus_B0.to(there).double() @ A0.to(there).double()  # (d_out, d_in)
        W.copy_((W.to(there).double() + (removed.T if layer.fan_in_fan_out else removed)).to(W.dtype))
        layer.lora_A["default"].weight = nn.Parameter(A.contiguous())
        layer.lora_B["default"].weight = nn.Parameter(B.contiguous())
    config = peft_model.peft_config["default"]
    ranks = {name: layer.r["default"] // 2 for name, layer in lora_layers(peft_model).items()}
    _set_ranks(config, ranks, config.lora_alpha / config.r)
    with whole_folder(output) as folder:
        _save_plain(peft_model, folder / "adapter")
        peft_model.unload().save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


def _needs_full_weights(model: nn.Module, form: str) -> None:
    if getattr(model, "is_quantized", False):
        raise CordaError(f"the base model is quantized, and --as {form} needs its full weights: load it unquantized")
