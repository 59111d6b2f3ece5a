"""Model and context → the adapter's start: covariances, decomposition, ranks, factors, one block at a time."""

import inspect
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..algebra.compactness import allocate, allocation_scores, log_compactness
from ..algebra.covariance import float32_products
from ..algebra.solvers import warn_of_fallbacks
from ..config import CordaConfig, CordaError
from ..devices import (
    compute_device,
    device_name,
    double_device,
    free_bytes,
    peak_bytes,
    release_cache,
    restart_peak,
    synchronize,
)
from ..models.lockstep import Parking, find_blocks, lockstep, on_device, parking, tensors_of, visits
from ..models.targets import (
    budget_of,
    check_rank,
    find_targets,
    fingerprint,
    layer_digest,
    left_out,
    weight_of,
    weight_shape,
)
from ..progress import progress_bar
from .collect import Collector, token_masks
from .layer import Decomposed, LayerStart, choose_covariance, decompose_layer, extremes_of, keep_components, start_layer
from .work import LayerStore, saving

Stored = Mapping[Tensor, Callable[[], Tensor]]


@dataclass
class Start:
    """What `preprocess` found: the layers, in the model's order; a record of the run (see corda.json), the same for
    the same run; and what it took (seconds by stage, memory), which is not."""

    config: CordaConfig
    layers: dict[str, LayerStart]
    record: dict[str, Any]
    took: dict[str, Any]


@torch.no_grad()
def preprocess(
    model: nn.Module,
    config: CordaConfig,
    batches: Iterable[Mapping[str, Any]] = (),
    progress: bool = True,
    numbers: Sequence[Any] | None = None,
    rounds: Sequence[int] | None = None,
    stored: Stored | None = None,
    work: Path | None = None,
    park: str = "auto",
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
        rounds: of each batch, the round (0 ... config.rounds − 1) it belongs to. Default: as many runs of
            consecutive batches as there are rounds.
        stored: parameters whose values are in a checkpoint and read when needed (see `models.open_model`).
        work: folder for finished blocks, from which a run that was killed goes on. Default: a temporary one.
        park: where the hidden states of waiting batches are: `device`, `cpu`, `disk`, or `auto`: the first of them
            that has room.

    Raises:
        CordaError: a target that matches nothing, a rank above a layer's, a budget that cannot be met, an empty or
            all-padding context, more rounds than batches, work that is damaged or was done on other weights, NaN or
            Inf in the activations. All but the last two before any long work.
    """
    began = time.perf_counter()
    targets = find_targets(model, config.target_modules)
    check_rank(targets, config, model)
    device = compute_device(model, config.device)
    record: dict[str, Any] = {"config": asdict(config)}
    if omitted := left_out(model, targets):
        record["left_out"] = omitted
        shapes = sorted({name.rpartition(".")[2] for name in omitted})
        warnings.warn(
            f"left out: {len(omitted)} fused parameters that are not linear layers ({', '.join(shapes)}), such as "
            f"{omitted[0]}; attention and the other linear layers are adapted",
            stacklevel=2,
        )
    context: list[Mapping[str, Any]] = []
    if config.orientation != "identity":
        context = list(batches)
        rounds = _rounds_of(context, config) if rounds is None else rounds
        record["context"] = check_context(model, context, targets, rounds, config.skip_tokens)
    restart_peak(device)
    with tempfile.TemporaryDirectory() as temporary, float32_products("highest"):
        store = LayerStore(work or Path(temporary))
        place = parking(_choose_parking(park, model, context, device), store.folder)
        blocks = walk(
            model, targets, context, device, numbers, rounds, stored, store.blocks, place, None, config.skip_tokens
        )
        ranks = _Ranks(targets, config, model)
        with progress_bar("decomposing", len(targets), progress) as advance, saving(store, device) as save:
            took = _decompose(blocks, targets, config, ranks, device, store, save, advance)
        since = time.perf_counter()
        by_name = ranks.of_seen()
        layers, record["totals"] = _start(store, {name: by_name[name] for name in targets}, ranks.budget, config)
        took["seconds"]["factors"] = time.perf_counter() - since
        record["fingerprint"] = fingerprint({name: layer.record.pop("digest") for name, layer in layers.items()})
    unseen = [name for name, layer in layers.items() if "leak" not in layer.record]
    if config.orientation != "identity" and unseen:
        warnings.warn(
            f"{len(unseen)} layers got no token of the context, so the plain SVD of their weights is taken: "
            f"{', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}",
            stacklevel=2,
        )
    record["layers"] = {name: layer.record for name, layer in layers.items()}
    took["seconds"] = {"all": time.perf_counter() - began} | took["seconds"]
    return Start(config, layers, record, {"device": device_name(device), **took})


def _decompose(
    blocks: Iterable[tuple[list[str], list[tuple[list[str], list[Tensor]]] | None]],
    targets: Mapping[str, nn.Module],
    config: CordaConfig,
    ranks: "_Ranks",
    device: torch.device,
    store: LayerStore,
    save: Callable[[Mapping[str, Decomposed]], None],
    advance: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Decompose the layers of each block as it comes, and store them; seconds and peak memory by stage."""
    digests: dict[str, str] = {}
    fallbacks: list[str] = []  # layers that the solver gave up on
    solving = double_device(device)
    for name, layer in store.load(spectra_only=True):
        digests[name] = layer.record["digest"]
        ranks.see(name, layer.record.get("log_pi"), layer.sigma.to(solving))
    seconds = dict.fromkeys(("forward", "selection", "decomposition", "state"), 0.0)
    peaks = dict.fromkeys(seconds, 0)
    since = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal since
        if device.type == "cuda":
            synchronize(device)
            peaks[stage] = max(peaks[stage], peak_bytes(device))
            restart_peak(device)
            if stage in ("forward", "state"):
                release_cache(device)  # pieces of memory that fitted this stage are of little use to the next
        seconds[stage] += time.perf_counter() - since
        since = time.perf_counter()

    for names, groups in blocks:
        lap("forward")
        if groups is None:  # finished before
            for name in names:
                if layer_digest(targets[name]) != digests[name]:
                    raise CordaError(
                        f"{store.folder} was made from other weights ({name} differs): remove it and start again"
                    )
                advance()
            continue
        layers = {}
        while groups:
            members, covariances = groups.pop(0)
            if any(float(C.diagonal().sum()) == 0 for C in covariances):
                covariances = []  # only zeros came in: nothing to orient by
            choose = bool(covariances) and (config.rounds != 1 or config.allocates)
            extremes = extremes_of(covariances, config, solving) if choose else []
            for name in members:
                W = weight_of(targets[name]).to(solving)
                record = choose_covariance(W, covariances, extremes, config) if choose else {}
                lap("selection")
                C = covariances[record.get("round", 0)].to(W.device) if covariances else None
                U, sigma = decompose_layer(W, C, config, partial(fallbacks.append, name))
                ranks.see(name, record.get("log_pi"), sigma)
                record["digest"] = layer_digest(targets[name])
                layers[name] = keep_components(W, C, U, sigma, ranks.of_seen()[name], config, record)
                del W, C, U
                advance()
                lap("decomposition")
            del covariances
        save(layers)
        del layers
        lap("state")
    warn_of_fallbacks(fallbacks)
    return {"seconds": seconds} | ({"peak_accelerator_bytes": peaks} if device.type == "cuda" else {})


class _Ranks:
    """The ranks of the layers seen so far, with what the others will take at least set aside. A layer seen later can
    only make them smaller: so they also say how many components of a layer can still be chosen, and no more are kept.
    """

    def __init__(self, targets: Mapping[str, nn.Module], config: CordaConfig, model: nn.Module):
        self.config = config
        self.shapes = {name: weight_shape(module) for name, module in targets.items()}
        self.budget = budget_of(targets, config, model)
        self.scores: dict[str, Tensor] = {}

    def see(self, name: str, log_pi: float | None, sigma: Tensor) -> None:
        """Add a layer, with the whole spectrum of its oriented weight; log π is None where it got no covariance."""
        log_pi = log_compactness(self.shapes[name][0], 1, 1) if log_pi is None else log_pi
        self.scores[name] = allocation_scores(log_pi, sigma)

    def of_seen(self) -> dict[str, int]:
        if not self.config.allocates:
            return dict.fromkeys(self.scores, self.config.r)
        least = self.config.min_rank
        aside = sum(min(least, m, n) * (m + n) for name, (m, n) in self.shapes.items() if name not in self.scores)
        costs = [sum(self.shapes[name]) for name in self.scores]
        ranks = allocate(
            list(self.scores.values()), costs, self.budget - aside, self.config.mode, least, self.config.max_rank
        )
        return dict(zip(self.scores, ranks))


def _start(
    store: LayerStore, ranks: Mapping[str, int], budget: int, config: CordaConfig
) -> tuple[dict[str, LayerStart], dict[str, Any]]:
    """The factors of every layer, in the model's order; and totals over the layers."""
    found = {name: start_layer(layer, ranks[name], config) for name, layer in store.load()}
    layers = {name: found[name] for name in ranks}
    seen = [layer.record for layer in layers.values() if "leak" in layer.record]
    totals: dict[str, Any] = {
        "parameters": sum(layer.A.numel() + layer.B.numel() for layer in layers.values()),
        "budget": budget,
        "ranks": [min(ranks.values()), max(ranks.values())],
    }
    if seen:
        energy = sum(r["output_energy"] for r in seen)
        totals["energy_share"] = sum(r["energy_share"] * r["output_energy"] for r in seen) / energy if energy else 0.0
    return layers, totals


def walk(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    device: torch.device,
    numbers: Sequence[Any] | None = None,
    rounds: Sequence[int] | None = None,
    stored: Stored | None = None,
    finished: Sequence[Sequence[str]] = (),
    park: Parking | None = None,
    collector: Collector | None = None,
    skip_tokens: int = 0,
) -> Iterator[tuple[list[str], list[tuple[list[str], list[Tensor]]] | None]]:
    """Go through the model block by block, all batches through each, and yield its target layers, with the groups of
    them that share their input and its covariance in each round (see `Collector.take`).

    The weights of the block are on `device` while it is yielded. Target layers outside of the blocks come last, with
    those that were never run: these are groups of one with no covariance. Without batches, so are all. Layers that
    are `finished` are run but not listened to: they are yielded with None. A `collector` of one's own has to be one of
    these batches.
    """
    blocks = find_blocks(model, list(targets))
    done = {name for names in finished for name in names}
    in_blocks = {tensor for block in blocks.values() for tensor in tensors_of(block)}
    inside = {block: [n for n in targets if n.startswith(f"{name}.")] for name, block in blocks.items()}
    outside = dict.fromkeys(targets)
    for names in inside.values():
        for name in names:
            del outside[name]
    to_end = bool(outside) or not blocks
    rest = [tensor for tensor in tensors_of(model) if tensor not in in_blocks]
    if not to_end and (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        unused = set(tensors_of(head)) - set(tensors_of(model.get_input_embeddings()))  # type: ignore[operator]
        rest = [tensor for tensor in rest if tensor not in unused]

    if not batches or done.issuperset(targets):  # nothing to run
        with visits(list(inside), device, stored) as visit:
            for block, names in inside.items():
                with visit(block):
                    if names:
                        yield names, (None if done.issuperset(names) else [([name], []) for name in names])
        if outside:
            with on_device(rest, device, stored):
                yield list(outside), (None if done.issuperset(outside) else [([name], []) for name in outside])
        return

    if collector is None:
        layers = {n: m for n, m in targets.items() if n not in done}
        collector = Collector(model, layers, batches, numbers, rounds, skip_tokens=skip_tokens)
    inputs = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = [{**batch, "use_cache": False} for batch in inputs]  # or every paused batch would hold its keys
    training = model.training
    model.eval()
    try:
        order = list(blocks.values())
        with on_device(rest, device, stored), collector.listening(), visits(order, device, stored) as visit:
            for block, run in lockstep(model, order, inputs, collector.start, to_end, park):
                with visit(block):
                    run()
                    names = inside.pop(block)
                    if names and done.issuperset(names):
                        yield names, None
                        continue
                    groups = collector.take(names)
                    if park is not None:  # one is needed on the device at a time
                        groups = [(members, [park(C) for C in Cs]) for members, Cs in groups]
                        synchronize(device)  # whoever gets them may look at them
                    taken = [name for members, _ in groups for name in members]
                    outside |= dict.fromkeys(n for n in names if n not in taken)
                    yield taken, groups
            for names in inside.values():  # blocks that were never entered
                outside |= dict.fromkeys(names)
            if outside and done.issuperset(outside):
                yield list(outside), None
            elif outside:
                groups = collector.take(list(outside))
                alone = set(outside) - {name for members, _ in groups for name in members}
                with on_device([t for name in alone for t in tensors_of(targets[name])], device, stored):
                    yield list(outside), [*groups, *(([name], []) for name in outside if name in alone)]
    finally:
        model.train(training)


def check_context(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    targets: Mapping[str, nn.Module],
    rounds: Sequence[int],
    skip_tokens: int = 0,
) -> dict[str, Any]:
    """Count samples and real tokens, and say so where a round has fewer than a layer is wide.

    Raises CordaError if there are none.
    """
    if not batches:
        raise CordaError("the context is empty: no batch was given")
    has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    masks = [token_masks(batch, has_decoder, skip_tokens)[0] for batch in batches]
    samples, tokens = sum(map(len, masks)), int(sum(mask.sum() for mask in masks))
    if tokens == 0 and skip_tokens:
        raise CordaError(f"no sample of the context has more than the {skip_tokens} tokens that are left out")
    if tokens == 0:
        raise CordaError(f"the context holds only padding: the attention masks of its {samples} samples are all zero")
    width, widest = max((weight_shape(module)[1], name) for name, module in targets.items())
    context = {"samples": samples, "tokens": tokens, "widest": width}
    by_round = [int(sum(m.sum() for m, r in zip(masks, rounds) if r == i)) for i in sorted(set(rounds))]
    if len(by_round) > 1:
        context["rounds"] = len(by_round)
    if min(by_round) < width:
        context["samples_for_full_rank"] = math.ceil(samples / len(by_round) * width / min(by_round))
        each, many = "the context", samples // len(by_round)
        if len(by_round) > 1:
            each = f"the smallest of {len(by_round)} rounds of the context"
        enough = context["samples_for_full_rank"]
        warnings.warn(
            f"{each} has {min(by_round)} real tokens in {many} samples, fewer than {widest} is wide ({width}), so its "
            f"covariance has low rank; about {enough} such samples would do",
            stacklevel=3,
        )
    return context


def _rounds_of(batches: Sequence[Mapping[str, Any]], config: CordaConfig) -> list[int]:
    """As many runs of consecutive batches as there are rounds."""
    assert config.rounds is not None
    if 0 < len(batches) < config.rounds:
        raise CordaError(f"rounds is {config.rounds}, but the context has only {len(batches)} batches to make them of")
    return [i * config.rounds // len(batches) for i in range(len(batches))]


def waiting_bytes(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> int:
    """Of the hidden states of all batches, and of their embeddings, which most models hold on to."""
    config = getattr(model, "config", None)
    width = getattr(config.get_text_config() if config is not None else None, "hidden_size", 0)
    tokens = sum(len(mask.flatten()) for batch in batches for mask in [token_masks(batch)[0]])
    return 2 * tokens * width * next(model.parameters()).element_size()


def _choose_parking(park: str, model: nn.Module, batches: Sequence[Mapping[str, Any]], device: torch.device) -> str:
    """The place given, or the first of device, CPU and disk that has three times the room; the latter two are said."""
    if park != "auto" or not batches:
        return "device" if park == "auto" or (park == "cpu" and device.type == "cpu") else park
    size = waiting_bytes(model, batches)
    if 3 * size < (free_bytes(device) or 0):
        return "device"
    place = "cpu" if 3 * size < psutil.virtual_memory().available else "disk"
    if place == "cpu" and device.type == "cpu":
        return "device"
    where = {"cpu": "the CPU's memory", "disk": "files beside the output"}[place]
    warnings.warn(f"the hidden states of waiting samples ({size / 1e9:.1f} GB) are parked in {where}", stacklevel=3)
    return place
