"""Model and context → the adapter's start: covariances, decomposition, factors, one block at a time."""

import inspect
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .collect import Collector, token_masks
from .config import CordaConfig, CordaError
from .decomposition import components, leak, orient, select, split_components
from .lockstep import find_blocks, lockstep, on_device, tensors_of
from .progress import progress_bar
from .targets import check_rank, find_targets, fingerprint, left_out, weight_of, weight_shape


@dataclass
class LayerStart:
    """What one layer starts from.

    Attributes:
        A: (r, d_in) and
        B: (d_out, r), float32 on the CPU.
        spectrum: all singular values of the oriented weight, descending, (R,) float64 on the CPU.
        record: what corda.json says of the layer.
    """

    A: Tensor
    B: Tensor
    spectrum: Tensor
    record: dict[str, Any]


@dataclass
class Start:
    """What `preprocess` found: the layers, in the model's order, and a record of the run (see corda.json)."""

    config: CordaConfig
    layers: dict[str, LayerStart]
    record: dict[str, Any]


@torch.no_grad()
def preprocess(
    model: nn.Module,
    config: CordaConfig,
    batches: Iterable[Mapping[str, Any]] = (),
    progress: bool = True,
    numbers: Sequence[int] | None = None,
) -> Start:
    """Collect the context's covariances and cut the adapter's start out of every target layer. The model's weights
    are read, not changed.

    Args:
        model: any model whose forward runs `ModuleList`s of blocks (or none).
        config: see `CordaConfig`.
        batches: the context: dicts of what the model's forward takes. Padding is excluded through `attention_mask`.
            Not looked at with orientation `identity`.
        progress: show a progress bar on the terminal.
        numbers: what messages call each sample, in the batches' order; default 0, 1, ...

    Raises:
        CordaError: a target that matches nothing, a rank above a layer's, an empty or all-padding context, NaN or Inf
            in the activations. The first three before any long work.
    """
    since = began = time.perf_counter()
    targets = find_targets(model, config.target_modules)
    check_rank(targets, config)
    home = next(model.parameters()).device
    device = torch.device(config.device) if config.device else home
    if config.device is None and home.type == "cpu" and torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator() or home)
    record: dict[str, Any] = {"config": asdict(config), "fingerprint": fingerprint(targets)}
    if omitted := left_out(model, targets):
        record["left_out"] = omitted
        shapes = sorted({name.rpartition(".")[2] for name in omitted})
        warnings.warn(
            f"left out: {len(omitted)} fused parameters that are not linear layers ({', '.join(shapes)}), such as "
            f"{omitted[0]}; attention and the other linear layers are adapted",
            stacklevel=2,
        )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    layers: dict[str, LayerStart] = {}
    seconds = {"forward": 0.0, "decomposition": 0.0}

    def lap(stage: str) -> None:
        nonlocal since
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[stage] += time.perf_counter() - since
        since = time.perf_counter()

    with progress_bar("decomposing", len(targets), progress) as advance, _exact_float32():
        if config.orientation == "identity":
            found: Iterable[tuple[list[str], dict[str, Tensor]]] = (([name], {}) for name in targets)
        else:
            context = list(batches)
            record["context"] = check_context(model, context, targets)
            found = covariances(model, targets, context, device, numbers)
        since = time.perf_counter()
        for names, C in found:
            lap("forward")
            for name in names:
                layers[name] = start_layer(weight_of(targets[name]), C.get(name), config, device)
                advance()
            lap("decomposition")
    unseen = [name for name, layer in layers.items() if "leak" not in layer.record]
    if config.orientation != "identity" and unseen:
        warnings.warn(
            f"{len(unseen)} layers got no token of the context, so the plain SVD of their weights is taken: "
            f"{', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}",
            stacklevel=2,
        )
    record["seconds"] = {"all": time.perf_counter() - began} | seconds
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cuda":
        record["peak_accelerator_bytes"] = torch.cuda.max_memory_allocated(device)
    layers = {name: layers[name] for name in targets}
    record["layers"] = {name: layer.record for name, layer in layers.items()}
    return Start(config, layers, record)


def covariances(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    device: torch.device,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Run the batches through the model block by block; after each, yield its target layers and their covariances.

    The weights of the block are on `device` while it is yielded. Target layers outside of the blocks come last, with
    those that were never run: these have no covariance.
    """
    blocks = find_blocks(model, list(targets))
    in_blocks = {tensor for block in blocks.values() for tensor in tensors_of(block)}
    rest = [tensor for tensor in tensors_of(model) if tensor not in in_blocks]
    inside = {block: [n for n in targets if n.startswith(f"{name}.")] for name, block in blocks.items()}
    remaining = dict.fromkeys(targets)
    for names in inside.values():
        for name in names:
            del remaining[name]
    to_end = bool(remaining) or not blocks

    collector = Collector(model, targets, batches, numbers)
    inputs = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = [{**batch, "use_cache": False} for batch in inputs]  # or every paused batch would hold its keys
    training = model.training
    model.eval()
    try:
        with on_device(rest, device), collector.listening():
            for block, run in lockstep(model, list(blocks.values()), inputs, collector.start, to_end):
                with on_device(tensors_of(block), device):
                    run()
                    names = inside.pop(block)
                    taken = collector.take(names)
                    remaining |= dict.fromkeys(n for n in names if n not in taken)
                    yield [n for n in names if n in taken], taken
            for names in inside.values():  # blocks that were never entered
                remaining |= dict.fromkeys(names)
            if remaining:
                yield list(remaining), collector.take(list(remaining))
    finally:
        model.train(training)


def start_layer(W: Tensor, C: Tensor | None, config: CordaConfig, device: torch.device) -> LayerStart:
    """Decompose one weight (m, n), given its covariance (n, n) or none, and split the chosen components."""
    # Apple's GPUs have no float64: there the processor decomposes.
    device = torch.device("cpu") if device.type == "mps" else device
    W = W.to(device).double()
    C = None if C is None else C.to(device)
    if C is not None and float(C.diagonal().sum()) == 0:
        C = None  # only zeros came in: nothing to orient by
    M = orient(W, C, config.orientation if C is not None else "identity", config.damping)  # (m, n)
    U, sigma, spectrum = components(M, select(config.mode, min(W.shape), config.r), config.solver)
    assert config.split is not None
    B, A = split_components(U, sigma, W, config.split, config.scale)
    record: dict[str, Any] = {
        "r": config.r,
        "shape": list(W.shape),
        "sigma_first": float(spectrum[0]),
        "sigma_last": float(spectrum[-1]),
        "sigma_share": float(sigma.sum() / spectrum.sum()),
        "norm_A": float(A.norm()),
        "norm_B": float(B.norm()),
    }
    if C is not None:
        record["leak"] = leak(A, C.double())
        record["output_energy"] = leak(W.to(C.dtype), C)
    return LayerStart(A.float().cpu(), B.float().cpu(), spectrum.cpu(), record)


def check_context(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], targets: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Count samples and real tokens, and say so where they are fewer than a layer is wide.

    Raises CordaError if there are none.
    """
    if not batches:
        raise CordaError("the context is empty: no batch was given")
    has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    masks = [token_masks(batch, has_decoder)[0] for batch in batches]
    samples, tokens = sum(map(len, masks)), int(sum(mask.sum() for mask in masks))
    if tokens == 0:
        raise CordaError(f"the context holds only padding: the attention masks of its {samples} samples are all zero")
    width, widest = max((weight_shape(module)[1], name) for name, module in targets.items())
    context = {"samples": samples, "tokens": tokens, "widest": width}
    if tokens < width:
        context["samples_for_full_rank"] = math.ceil(samples * width / tokens)
        warnings.warn(
            f"the context has {tokens} real tokens in {samples} samples, fewer than {widest} is wide ({width}), so its "
            f"covariance has low rank; about {context['samples_for_full_rank']} such samples would do",
            stacklevel=3,
        )
    return context


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Covariances are summed in real float32, also where the user has allowed TF32 for training."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
