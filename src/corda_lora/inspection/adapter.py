"""What an adapter changed, layer by layer: any LoRA of PEFT's, by its file alone, or beside its model and samples.

    ΔW = s·B A          by the file: rank, norms, singular values; predicted drift, if its training wrote it down
    ‖ΔW‖ / ‖W‖          by the model, and what merging rounds away
    ‖ΔW X‖ / ‖W X‖      by samples: how far the layer's outputs move; and the predicted drift on these samples
    ‖bᵢ aᵢX‖² / ‖W X‖²  by samples of several abilities: which of them each component, and each layer, serves

The model is gone through block by block and never adapted: its inputs are those without the adapter, and A and B are
multiplied by their covariances.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..adapters.card import TRAINING
from ..adapters.lora import CONFIG, made_for, read_marks
from ..algebra.covariance import float32_products
from ..algebra.decomposition import product
from ..config import CordaError, InspectConfig
from ..data.batches import encode_all
from ..data.overview import check_fit, overview
from ..data.samples import load_samples
from ..devices import compute_device, release_cache
from ..files import read_json
from ..models.lockstep import Stored, find_blocks, on_device, parking, tensors_of
from ..models.targets import task_type, tied_layers
from ..models.weights import fingerprint, layer_digest, or_the_same, weight_of, weight_shape
from ..preprocess.backward import StepBack, walk_back
from ..preprocess.context import Context, answer_mask, check_context, has_decoder, read_context
from ..preprocess.walk import Place, choose_parking, walk
from ..progress import console, progress_bar
from .contexts import context_names, place_of

PREFIX, FACTOR = "base_model.model.", ".lora_A.weight"


class Factors(NamedTuple):
    """A (r, n) and B (m, r), float32, and the scale s of a layer's s·B A."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA as its files have it.

    Attributes:
        layers: by the name in the base model.
        left: what else it trains, by the names of the tensors: modules saved whole, embeddings.
        base: the name of its base model; None if it is not recorded.
        made_for: the fingerprint of the base's weights, if they are recorded.
        made_in: their dtype, if it is recorded.
        kept: the predicted drift of each layer on each ability that was to be kept, in nats per answer token, as far as
            it is known. One ability is called "".
        residual: whether it holds a part of the model that its base lacks.
    """

    layers: dict[str, Factors]
    left: list[str]
    base: str | None
    made_for: str | None
    made_in: str | None
    kept: dict[str, dict[str, float]]
    residual: bool


def read_adapter(directory: Path) -> Adapter:
    """Read any LoRA that PEFT has saved.

    Raises CordaError: no adapter there, or a damaged one; it is no LoRA, or its update is not s·B A (DoRA).
    """
    marks = read_marks(directory)
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(directory))
        weights = load_peft_weights(str(directory), device="cpu")
    except (ValueError, TypeError, KeyError) as error:
        raise CordaError(f"{directory / CONFIG} is damaged: {error}") from error
    if not isinstance(config, peft.LoraConfig):
        raise CordaError(f"{directory} is no LoRA, but {config.peft_type.value}, whose update is no product B A")
    if config.use_dora:
        raise CordaError(
            f"the adapter in {directory} is a DoRA, whose norms change its layers, too: merge it, and compare"
        )
    if damaged := next((name for name, weight in weights.items() if not bool(weight.isfinite().all())), None):
        raise CordaError(f"{damaged} of the adapter in {directory} holds NaN or infinity: its training diverged")
    layers = {}
    others = [name.rpartition(".")[0] for name in config.target_parameters or []]  # experts, with factors of many
    for name in [n.removeprefix(PREFIX).removesuffix(FACTOR) for n in weights if n.endswith(FACTOR)]:
        if any(f".{name}".endswith(f".{other}") for other in others):
            continue
        A = weights.pop(f"{PREFIX}{name}{FACTOR}")
        B = weights.pop(f"{PREFIX}{name}.lora_B.weight", None)
        if B is None or A.ndim != 2 or B.ndim != 2 or B.shape[1] != len(A):
            raise CordaError(
                f"the adapter's factors of {name} do not fit one another, or are not those of a linear layer"
            )
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        layers[name] = Factors(A.float(), B.float(), alpha / (math.sqrt(r) if config.use_rslora else r))
    if not layers:
        raise CordaError(f"the adapter in {directory} changes no linear layer")
    left = sorted(name for name in weights if ".base_layer." not in name)  # PEFT's copies of the base's own
    residual = marks is not None and marks["split"] == "residual"
    made_in = None if marks is None else marks.get("dtype")
    name, kept = config.base_model_name_or_path, _kept(directory)
    return Adapter(layers, left, name, made_for(marks, config), made_in, kept, residual)


def _kept(directory: Path) -> dict[str, dict[str, float]]:
    """What the training of an adapter has written down: see `Adapter`."""
    path = directory / TRAINING
    written = read_json(path).get("predicted_drift") if path.is_file() else None
    if not written:
        return {}
    return written if isinstance(next(iter(written.values())), dict) else {"": written}


@torch.no_grad()
def inspect_adapter(
    adapter: Adapter,
    config: InspectConfig,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    stored: Stored | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Look at an adapter, with its model or without, and on the contexts if there is a model.

    Args:
        stored, work: as of `inspect_model`.

    Returns:
        The numbers, for JSON, and the singular values (r,) of every layer's ΔW.

    Raises:
        CordaError: the model lacks a layer of the adapter, or has another shape or other weights there; what `walk` and
            `walk_back` refuse.
    """
    layers = adapter.layers
    record: dict[str, Any] = {"layers": {}, "left_out": adapter.left, "residual": adapter.residual, "contexts": []}
    values: dict[str, Tensor] = {}
    targets = {} if model is None else _targets(model, adapter)
    blocks = find_blocks(model, list(targets)) if model is not None else {}
    for name in targets or layers:
        of_file, values[name] = _of_file(*layers[name])
        record["layers"][name] = (place_of(name, blocks) if targets else _place_in_name(name)) | of_file
    for ability, drifts in adapter.kept.items():
        for name in layers.keys() & drifts.keys():
            record["layers"][name].setdefault("kept", {})[ability] = drifts[name]
    if model is None:
        return record, values

    datas = config.contexts()
    names, contexts = context_names(datas), []
    for name, data in zip(names, datas):
        samples = load_samples(data)
        if progress:
            encoded = encode_all(tokenizer, samples, data.max_length)
            console.print(overview(name, tokenizer, samples, encoded, data.max_length, learned=False))
        read = read_context(tokenizer, [samples], data.max_length, config.batch_tokens, has_decoder(model))
        check_fit(model, (ids for batch in read.batches for ids in batch["input_ids"].tolist()))
        contexts.append(Context(read.batches, skip_tokens=config.skip_tokens))
        record["contexts"].append({"name": name, **check_context(model, contexts[-1], targets, name)})
    inside = all(any(name.startswith(f"{block}.") for block in blocks) for name in targets)
    backward = task_type(model) is peft.TaskType.CAUSAL_LM and inside
    answers = [sum(int(answer_mask(b).sum()) for b in context.batches) if backward else 0 for context in contexts]
    device = compute_device(model, config.device)
    waiting = max((context.batches for context in contexts), key=len, default=())
    where = choose_parking(config.park, model, waiting, device, 2 + len(blocks))
    place = Place(device, stored, parking(where, work))
    for name in targets:
        record["layers"][name]["moved"] = {}
    total = len(targets) * (1 + len(contexts)) + sum(len(blocks) for count in answers if count)
    with float32_products("highest"), progress_bar("inspecting", total, progress) as advance:
        digests = {}
        for name, module in targets.items():
            with on_device(tensors_of(module), device, stored):
                digests[name] = layer_digest(module)
                record["layers"][name] |= _of_model(module, layers[name])
            advance()
        if adapter.made_for and fingerprint(digests) != adapter.made_for:
            same = or_the_same(next(iter(targets.values())), adapter.made_in)
            raise CordaError(f"the adapter was made for other weights than these (its base was {adapter.base}){same}")
        record["tied"] = tied_layers(model, targets)
        for about, context, count in zip(record["contexts"], contexts, answers):
            share = about["tokens"] / count if count else 0.0
            for step in _steps(model, targets, context, place, count > 0, advance):
                for members, Cs in step.groups or []:
                    for layer in members:
                        if Cs:
                            D = step.gradients.pop(layer, None)
                            W = weight_of(targets[layer]).to(device)
                            moved = _on_context(W, Cs[0].to(device), D, layers[layer], share)
                            record["layers"][layer]["moved"][about["name"]] = moved
                        advance()
                release_cache(device)
    if len(contexts) > 1:
        for about in record["layers"].values():
            about["serves"] = _served(about["moved"])
    return record, values


def _targets(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The model's layers that the adapter changes, in the model's order."""
    modules = dict(model.named_modules())
    for name, (A, B, _) in adapter.layers.items():
        if name not in modules or not hasattr(modules[name], "weight"):
            raise CordaError(f"the model has no layer {name}, which the adapter changes: its base was {adapter.base}")
        if weight_shape(modules[name]) != (len(B), A.shape[1]):
            raise CordaError(
                f"{name} has the shape {weight_shape(modules[name])}, but the adapter is for {(len(B), A.shape[1])}: "
                f"its base was {adapter.base}"
            )
    return {name: module for name, module in modules.items() if name in adapter.layers}


def _place_in_name(name: str) -> dict[str, str]:
    """The block of a layer and its name there, by the first number in its name."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return {"block": ".".join(parts[: number + 1]), "kind": ".".join(parts[number + 1 :])}


def _of_file(A: Tensor, B: Tensor, scale: float) -> tuple[dict[str, Any], Tensor]:
    """What the factors alone say of ΔW, and its singular values (r,), descending."""
    R_B, R_A = (torch.linalg.qr(X.double(), mode="r").R for X in (B, A.T))
    sigma = scale * torch.linalg.svdvals(R_B @ R_A.T)
    squares = sigma.square()
    return {
        "shape": [len(B), A.shape[1]],
        "r": len(A),
        "scale": scale,
        "norm_A": float(A.norm()),
        "norm_B": float(B.norm()),
        "norm": float(squares.sum().sqrt()),
        "largest": float(sigma[0]),
        # as many singular values of one size would have these sums
        "effective_rank": float(squares.sum() ** 2 / squares.square().sum()) if squares.any() else 0.0,
    }, sigma.float()


def _of_model(module: nn.Module, factors: Factors) -> dict[str, float | None]:
    """‖ΔW‖ / ‖W‖, and how much of ‖ΔW‖ merging rounds away in the weights' dtype."""
    W = weight_of(module)
    A, B = factors.A.to(W.device), factors.B.to(W.device)
    change = factors.scale * (B @ A)
    merged = (W.float() + change).to(W.dtype).float()
    norm = float(change.norm())
    return {
        "relative": norm / max(float(W.float().norm()), 1e-30),
        "rounded_away": float((merged - W.float() - change).norm()) / norm if norm else None,
    }


def _served(moved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Which ability a layer and each of its components serves: of which it moves the outputs most, each measured by the
    layer's own outputs on that ability. {"shares": {ability: its share of what the layer moves, of all abilities},
    "components": the ability of each, or "" where it moves none}."""
    squares = {name: found["outputs"] ** 2 for name, found in moved.items()}
    total = sum(squares.values())
    each = zip(*(found["components"] for found in moved.values()))
    served = [list(moved)[energies.index(max(energies))] if max(energies) > 0 else "" for energies in each]
    return {"shares": {n: square / total if total else 0.0 for n, square in squares.items()}, "components": served}


def _on_context(W: Tensor, C: Tensor, D: Tensor | None, factors: Factors, share: float) -> dict[str, Any]:
    """How far a layer moves on a context, and by which components.

    Args:
        C, D: of its inputs (n, n), and of the gradients at its outputs (m, m) if they are known.
        share: tokens / answers.
    """
    A, B = factors.A.to(C.device).double(), factors.B.to(C.device).double()
    inner = product(A, C) @ A.T  # A C Aᵀ (r, r)
    base = float(((W.to(C.dtype) @ C) * W).sum())
    energy = factors.scale**2 * float((inner * (B.T @ B)).sum())
    moved: dict[str, Any] = {"leak": float(inner.diagonal().sum())}
    moved["outputs"] = math.sqrt(max(energy, 0.0) / base) if base > 0 else 0.0
    alone = factors.scale**2 * inner.diagonal() * B.square().sum(0)  # (r,)
    moved["components"] = (alone / base).tolist() if base > 0 else [0.0] * len(A)
    if D is not None:
        drift = float((inner * (product(B.T, D.to(C.device)) @ B)).sum())
        moved["predicted_drift"] = 0.5 * share * factors.scale**2 * drift
    return moved


def _steps(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    context: Context,
    place: Place,
    backward: bool,
    advance: Any,
) -> Iterator[StepBack]:
    """Both sides of the layers where gradients can be taken, else the inputs' alone."""
    if backward:
        yield from walk_back(model, targets, context, place, on_block=advance)
        return
    for step in walk(model, targets, context, place):
        yield StepBack(*step, {})
