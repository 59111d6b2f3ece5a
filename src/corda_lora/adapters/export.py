"""A tuned adapter → a plain LoRA on the original model, the merged model, or the residual model with its adapter."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..algebra.folding import best_fit
from ..algebra.order import ordered
from ..config import CordaError, ModelConfig
from ..data.batches import Encoded
from ..data.images import processor_of
from ..devices import double_device
from ..files import whole_folder, write_json
from ..models.loading import check_original, check_same_model
from ..models.lockstep import Stored, on_device, tensors_of
from ..models.residual import digests_of, mark_residual, renew_mark, residual_mark
from ..models.targets import tied_layers
from ..models.weights import fingerprint, layer_digest, weight_of
from ..preprocess.backward import unknown_layer
from ..preprocess.statistics import answered_batches, collect_sides, tokens_and_answers
from ..progress import track_if_slow
from .card import write_card
from .lora import (
    BASE,
    digest_of_factors,
    load_adapter,
    lora_layers,
    made_for,
    read_marks,
    read_records,
    save_plain,
    set_ranks,
    write_all_checksums,
)
from .order import NAME as ORDER
from .order import read_order, save_order
from .quantize import dequantize_in_place

RECORD = "export.json"
HALVED = ("paper", "balanced")  # splits whose adapter is W's components as they are now, less as they were


@torch.no_grad()
def export_lora(
    model: nn.Module,
    directory: Path | str,
    output: Path,
    r: int | None = None,
    uniform: bool = False,
    record: Mapping[str, Any] | None = None,
) -> float:
    """A plain LoRA on the adapter's base model, with the same scale s = lora_alpha / r in every layer.

    Factors that start from zero are written as they are. Those of the splits `paper` and `balanced`, [B, −B₀] and
    [A; A₀], nearly cancel, and would be rounded apart in half precision: their product is factored anew (to float32's
    rounding), so that the update cast to bfloat16 is as near as any LoRA's.

    Args:
        r: compress to this rank: to the best fit in each layer; of an adapter whose components are in order, to those
            that are used at this R (see `Order`), which is the same as `decoding_ranks` with `fixed`.
        uniform: pad all layers to the largest rank with zeros, which changes nothing: for what reads one rank from the
            configuration, or takes lora_alpha / rank of each tensor as the scale (llama.cpp).
        record: what made the export, written to export.json.

    Returns:
        ‖ΔW − ΔW_r‖ / ‖ΔW‖ over all layers (Frobenius); 0 if not compressed.

    Raises:
        CordaError: r is above the adapter's largest rank, or the adapter is no plain LoRA (DoRA).
    """
    marks = read_marks(Path(directory))
    peft_model, scale, factors = _factors(model, directory)
    halved = marks is not None and marks["split"] in HALVED
    base = _only_base(peft_model, marks)
    return _write_lora(peft_model, scale, factors, Path(directory), output, r, uniform, record, halved, base)


@torch.no_grad()
def export_ordered(
    model: nn.Module,
    directory: Path | str,
    output: Path,
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_tokens: int = 1024,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The same adapter as a plain LoRA whose components are in the order of their predicted gain on samples (see
    `algebra.order`), which are run through the model with the adapter on it.

    Args:
        encoded: samples with responses, of what the adapter was trained for.

    Returns:
        by layer the gain of each component (r,), in nats per answer token.

    Raises CordaError as `export_lora` does, if the adapter was not trained, and what `collect_sides` refuses.
    """
    marks = read_marks(Path(directory))
    peft_model, scale, factors = _factors(model, directory)
    layers = {name: layer.get_base_layer() for name, layer in lora_layers(peft_model).items()}
    if others := [name for name, module in layers.items() if getattr(module, "weight", torch.empty(0)).ndim != 2]:
        raise CordaError(f"{others[0]} is no linear layer, whose components could be put in order")
    if unknown := unknown_layer(peft_model.get_base_model(), layers):
        raise CordaError(
            f"{unknown}, so its components have no order: --as lora --r R cuts each layer by its plain SVD"
        )
    if _changes_nothing(factors):
        raise CordaError(
            f"the adapter in {directory} changes nothing yet, so its components gain nothing: train it first"
        )
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    if marks is not None and marks.get("start") == digest_of_factors(tensors):
        raise CordaError(
            f"the adapter in {directory} holds a part of the model and is not trained yet, so its components would be "
            "in the order of what the model itself gains by them: train it first"
        )
    batches, gains = answered_batches(encoded, pad_id, batch_tokens), {}
    tokens, answers = tokens_and_answers(batches)
    peft_model.eval()

    def put(name: str, C: Tensor | None, D: Tensor | None) -> None:
        A, B = factors[name]
        device = double_device(A.device)
        C, D = (None if M is None else M.to(device) for M in (C, D))
        new_A, new_B, squares = ordered(A.to(device), B.to(device), C, D)
        factors[name] = new_A.to(A), new_B.to(B)
        gains[name] = 0.5 * tokens / answers * scale**2 * squares * (C is not None)

    for members, C, Ds in collect_sides(peft_model.get_base_model(), layers, batches, progress):
        for name in members:
            put(name, C, Ds.pop(name))
    for name in layers.keys() - gains.keys():  # no token reached it
        put(name, None, None)
    gains = {name: gains[name] for name in layers}
    base = _only_base(peft_model, marks)
    _write_lora(peft_model, scale, factors, Path(directory), output, None, False, record, False, base, gains)
    return gains


def _changes_nothing(factors: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether B A is zero in each layer, but for rounding where its halves cancel: an adapter's start."""
    for A, B in factors.values():
        A, B = (factor.to(double_device(factor.device)).double() for factor in (A, B))
        square = float(((A @ A.T) * (B.T @ B)).sum())  # ‖B A‖²
        if not square <= 1e-12 * float(A.square().sum() * B.square().sum()):
            return False
    return True


def _only_base(peft_model: PeftModel, marks: Mapping[str, Any] | None) -> str | None:
    """The fingerprint of the only model that an adapter is right on: a residual's."""
    if marks is not None and marks["split"] == "residual":
        return str(marks["fingerprint"])
    return (peft_model.peft_config["default"].auto_mapping or {}).get(BASE)


@torch.no_grad()
def export_for_original(
    model: nn.Module,
    original: ModelConfig,
    directory: Path | str,
    output: Path,
    r: int | None = None,
    uniform: bool = False,
    record: Mapping[str, Any] | None = None,
) -> tuple[float, dict[str, float]]:
    """A plain LoRA on the full model that a quantized base was made from. It has twice the adapter's rank: s·B A less
    the best fit, of the adapter's rank, of what the base lacks, W − Q. What that misses makes it another function than
    the adapter on its base.

    Args:
        original: the full model, whose weights are read layer by layer.
        r, uniform, record: as in `export_lora`.

    Returns:
        what `export_lora` returns, and by layer how far the weights, with their adapters, are apart, over ‖W‖.

    Raises:
        CordaError: as `export_lora` does; the original is another model, or is quantized itself.
    """
    check_original(original)
    full, stored = check_same_model(model, original)
    peft_model, scale, factors = _factors(model, directory)
    differs: dict[str, float] = {}
    for name, layer in track_if_slow(list(lora_layers(peft_model).items()), "what is lost"):
        A, B = factors[name]
        taken, put, differs[name] = _lacking(full, stored, name, weight_of(layer.get_base_layer()), len(A))
        factors[name] = torch.cat([A, taken.to(A)]), torch.cat([B, -put.to(B) / scale], dim=1)
    peft_model.peft_config["default"].base_model_name_or_path = original.model
    error = _write_lora(peft_model, scale, factors, Path(directory), output, r, uniform, record, refactor=True)
    return error, differs


def _factors(model: nn.Module, directory: Path | str) -> tuple[PeftModel, float, dict[str, tuple[Tensor, Tensor]]]:
    """The adapter on its model, its most common scale, and each layer's A and B for this scale."""
    peft_model = load_adapter(model, directory)
    layers, config = lora_layers(peft_model), peft_model.peft_config["default"]
    if config.use_dora:
        raise CordaError(f"the adapter in {directory} is a DoRA, whose norms no plain LoRA has: --as merged")
    if others := [name for name, layer in layers.items() if "default" not in layer.lora_A]:
        raise CordaError(f"the adapter is on {others[0]}, which is an embedding and no linear layer: --as merged")
    scale = Counter(layer.scaling["default"] for layer in layers.values()).most_common(1)[0][0]
    factors = {}
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors[name] = (A, B if layer.scaling["default"] == scale else B * (layer.scaling["default"] / scale))
    return peft_model, scale, factors


def _write_lora(
    peft_model: PeftModel,
    scale: float,
    factors: dict[str, tuple[Tensor, Tensor]],
    directory: Path,
    output: Path,
    r: int | None,
    uniform: bool,
    record: Mapping[str, Any] | None,
    refactor: bool,
    base: str | None = None,
    gains: Mapping[str, Tensor] | None = None,
) -> float:
    """Write factors in place of the adapter's; see `export_lora`.

    Args:
        refactor: factor their products anew.
        base: the fingerprint of the only model that the adapter is right on.
        gains: of the factors' components, which are in order.
    """
    layers, config = lora_layers(peft_model), peft_model.peft_config["default"]
    largest = max(len(A) for A, _ in factors.values())
    if r is not None and r > largest:
        raise CordaError(f"rank {r} is no compression: the adapter's largest rank is {largest}")
    error = total = 0.0
    if r is not None and (directory / ORDER).is_file():
        prefixes = read_order(directory).ranks(r)
        for name, (A, B) in factors.items():
            k = prefixes[name]
            error, total = error + _square(A[k:], B[:, k:]), total + _square(A, B)
            factors[name] = (A[:k], B[:, :k]) if k else (A[:1], 0 * B[:, :1])  # PEFT knows no rank of zero
    elif r is not None or refactor:
        for name, (A, B) in track_if_slow(list(factors.items()), "factoring"):
            A, B, rest, whole = compress(A, B, min(r or len(A), len(A)))
            error, total = error + rest, total + whole
            factors[name] = (A, B)
    ranks = {name: len(A) for name, (A, _) in factors.items()}  # never above min(d_in, d_out), where 2r may be
    for name, layer in layers.items():
        A, B = factors[name]
        if uniform:
            zeros = max(ranks.values()) - len(A)
            A, B = nn.functional.pad(A, (0, 0, 0, zeros)), nn.functional.pad(B, (0, zeros))
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(A), nn.Parameter(B)
        layer.r["default"], layer.scaling["default"] = len(A), scale
    set_ranks(config, dict.fromkeys(ranks, max(ranks.values())) if uniform else ranks, scale)
    config.auto_mapping = {BASE: base} if base else None  # nothing of it is held still any more
    share = (error / total) ** 0.5 if r is not None and total else 0.0
    note = f"Compressed to rank {r}: the update differs by {share:.2e} of its length." if r is not None else ""
    with whole_folder(output) as folder:
        _write_record(folder, record)
        save_plain(peft_model, folder, read_records(directory), note)
        if gains is not None:
            save_order(folder, gains)
        write_all_checksums(folder)
    return share


def _square(A: Tensor, B: Tensor) -> float:
    """‖B A‖²."""
    A, B = A.double(), B.double()
    return float(((B.T @ B) * (A @ A.T)).sum())


def _lacking(full: nn.Module, stored: Stored, name: str, Q: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """A (r, d_in) and B (d_out, r) with the best fit of W − Q of a layer, and what it misses as a share of ‖W‖."""
    module = full.get_submodule(name)
    with on_device(tensors_of(module), double_device(Q.device), stored):
        W = weight_of(module).double()
        lost = W - Q.to(W)
        A, B = best_fit(lost, min(r, *lost.shape))
        return A, B, float((lost - B @ A).norm() / W.norm())


def compress(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Best rank-r factors of B A (Eckart-Young), with ‖BA − B_r A_r‖² and ‖BA‖². A: (k, n), B: (m, k), k ≥ r; the
    factors have no more than min(m, n) components.

    The SVD is of a (k, k) matrix: see `ordered`.
    """
    new_A, new_B, squares = ordered(A, B)
    return new_A[:r].to(A), new_B[:, :r].to(B), float(squares[r:].sum()), float(squares.sum())


@torch.no_grad()
def export_merged(
    model: nn.Module,
    directory: Path | str,
    output: Path,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
) -> float:
    """The whole model with the adapter merged in, in the dtype it was loaded in. Of a quantized base, the weights are
    what they stand for, in full. A residual is whole then if the adapter is the one that holds what it lacks; else it
    stays marked as a residual.

    Returns:
        ‖round(W + s·BA) − (W + s·BA)‖ / ‖W + s·BA‖ over all adapted layers: what rounding to the model's dtype changes.

    Raises CordaError if the base is quantized by anything but bitsandbytes' 4 bits.
    """
    peft_model = load_adapter(model, directory)
    mark = residual_mark(model)  # before the layer that tells it is in other numbers
    if mark and mark["adapter"] == made_for(read_marks(Path(directory)), peft_model.peft_config["default"]):
        mark = None
    if mark:
        warnings.warn(
            f"the model is a residual, and what it lacks is in another adapter than the one in {directory}: what is "
            "written lacks it, too",
            stacklevel=2,
        )
    if getattr(model, "is_quantized", False):
        if not getattr(model, "is_loaded_in_4bit", False):
            raise CordaError("the base model is quantized, and only bitsandbytes' 4 bits can be merged into")
        dequantize_in_place(peft_model.unload())
        peft_model = PeftModel.from_pretrained(model, str(directory))
    _untie(peft_model)
    error = _rounding(peft_model)
    with whole_folder(output) as folder:
        write_card(peft_model, folder, read_records(Path(directory)), merged=True)
        merged = peft_model.merge_and_unload()
        renew_mark(merged, mark)
        _save_model(merged, tokenizer, folder)
        _write_record(folder, record)
    return error


def _rounding(peft_model: PeftModel) -> float:
    """What merging rounds away: see `export_merged`."""
    error = total = 0.0
    for layer in lora_layers(peft_model).values():
        W = layer.get_base_layer().weight
        exact = W.double() + layer.get_delta_weight("default")
        error += float((exact.to(W.dtype) - exact).square().sum())
        total += float(exact.square().sum())
    return (error / total) ** 0.5 if total else 0.0


@torch.no_grad()
def export_residual(
    model: nn.Module,
    directory: Path | str,
    output: Path,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """The residual model W' = W − s·B₀A₀ in `output`, and in `output/adapter` the rank-r adapter (B, A) for it: half
    the adapter's work at run time, but the adapter is right on this model only. It names the model by its path, and has
    its fingerprint: `load_adapter` refuses any other.

    Raises CordaError if the adapter has no residual (B started from zero, or it is a plain LoRA), or the base is
    quantized.
    """
    marks = read_marks(Path(directory))
    if marks is not None and marks["split"] == "residual":
        raise CordaError(f"the adapter in {directory} is on a residual model already: there is nothing to export")
    if marks is None or marks["split"] not in HALVED:
        raise CordaError(f"the adapter in {directory} is a LoRA on the original model: there is no residual to export")
    if getattr(model, "is_quantized", False):
        raise CordaError("the base model is quantized, and --as residual needs its full weights: load it unquantized")
    peft_model = load_adapter(model, directory)
    _untie(peft_model)
    layers = lora_layers(peft_model)
    whole = {name: layer_digest(layer.get_base_layer()) for name, layer in layers.items()}
    for layer in layers.values():
        A, A0 = layer.lora_A["default"].weight.chunk(2, dim=0)
        B, minus_B0 = layer.lora_B["default"].weight.chunk(2, dim=1)
        W = layer.get_base_layer().weight
        device = double_device(W.device)
        removed = layer.scaling["default"] * minus_B0.to(device).double() @ A0.to(device).double()  # (d_out, d_in)
        W.copy_((W.to(device).double() + (removed.T if layer.fan_in_fan_out else removed)).to(W.dtype))
        layer.lora_A["default"].weight = nn.Parameter(A.contiguous())
        layer.lora_B["default"].weight = nn.Parameter(B.contiguous())
        layer.r["default"] = len(A)
    config = peft_model.peft_config["default"]
    set_ranks(config, {name: layer.r["default"] for name, layer in layers.items()}, marks["scale"])
    config.base_model_name_or_path, config.revision = str(output.absolute()), None
    digests = {n: layer_digest(layer.get_base_layer()) for n, layer in layers.items()}
    config.auto_mapping = {BASE: fingerprint(digests)}
    lost = ((name, digests_of(layer.get_base_layer()), whole[name]) for name, layer in layers.items())
    mark_residual(peft_model.get_base_model().config, fingerprint(digests), lost)
    with whole_folder(output) as folder:
        (folder / "adapter").mkdir()
        note = f"It belongs to the residual model in `{output.name}`, and is wrong on any other."
        save_plain(peft_model, folder / "adapter", read_records(Path(directory)), note)
        write_all_checksums(folder / "adapter")
        _write_record(folder, record)
        _save_model(peft_model.unload(), tokenizer, folder)


def _untie(peft_model: PeftModel) -> None:
    """Give each adapted layer whose weight is another module's, too (the output head of a tied model), its own."""
    base, layers = peft_model.get_base_model(), lora_layers(peft_model)
    for name in tied_layers(base, layers):
        layer = layers[name].get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None and not generation.do_sample:
        # Sampling options beside greedy decoding, as LLaMA-2-chat and Vicuna have them: transformers ignores them when
        # it generates, and refuses to save them.
        defaults = type(generation)()
        ignored = [
            k
            for k in ("temperature", "top_p", "top_k", "min_p", "typical_p")
            if hasattr(generation, k) and getattr(generation, k) != getattr(defaults, k)
        ]
        for key in ignored:
            setattr(generation, key, getattr(defaults, key))
        if ignored:
            warnings.warn(
                f"left out of generation_config.json: {', '.join(ignored)}, which do nothing without do_sample",
                stacklevel=4,
            )
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        (processor_of(tokenizer) or tokenizer).save_pretrained(str(folder))


def _write_record(folder: Path, record: Mapping[str, Any] | None) -> None:
    if record is not None:
        write_json(folder / RECORD, record)
