"""Model and context → the adapter's start: covariances, decomposition, ranks, factors, one block at a time."""

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.covariance import float32_products
from ..algebra.mixture import even_weights, mixed
from ..algebra.second_order import Low, compact
from ..algebra.solvers import warn_of_fallbacks
from ..config import CordaConfig, CordaError
from ..config.init import PRICED_TASK, check_together
from ..devices import (
    compute_device,
    device_name,
    double_device,
    has_bfloat16,
    peak_bytes,
    release_cache,
    restart_peak,
    synchronize,
)
from ..models.lockstep import Stored, find_blocks, parking
from ..models.residual import check_whole
from ..models.targets import choose_targets, left_out, require_causal, tied_layers
from ..models.weights import (
    ALREADY,
    Quantized,
    check_quantizer,
    digest_of,
    fingerprint,
    is_4bit,
    layer_digest,
    quantize,
    quantized_names,
    weight_of,
    weight_shape,
)
from ..processes import Processes
from ..progress import progress_bar
from .backward import NO_ANSWER, StepBack, walk_back
from .collect import Group
from .context import Batch, Context, answer_mask, check_context, consecutive_rounds
from .layer import (
    Choice,
    Decomposed,
    LayerRecord,
    LayerStart,
    choose_covariance,
    decompose_layer,
    extremes_of,
    input_factors,
    keep_components,
    quantize_layer,
    seen_from,
    start_layer,
)
from .ranks import Ranks
from .share import Share, SharedCollector, SharedGradients
from .statistics import DIRECTIONS, LEAST_SAMPLES, FewAnswersError, Sides, Statistics, check_samples
from .walk import Place, choose_parking, walk
from .work import LayerStore, saving

READERS = 4  # threads that read finished blocks back: what they wait for is memory, which is new to the process


@dataclass
class Start:
    """The start of an adapter.

    Attributes:
        layers: in the model's order.
        record: what was run and what came out, for corda.json. The same command gives the same record.
        took: seconds by stage, and memory.
        statistics: of the context, where `config.keep` is above 0.
        quantized: gives the quantized weight of a layer, where `config.quantization` asks for it.
    """

    config: CordaConfig
    layers: dict[str, LayerStart]
    record: dict[str, Any]
    took: dict[str, Any]
    statistics: Statistics | None = None
    quantized: Callable[[str], Quantized] | None = None


@torch.no_grad()
def preprocess(
    model: nn.Module,
    config: CordaConfig,
    context: Context | Iterable[Batch] = (),
    progress: bool = True,
    stored: Stored | None = None,
    work: Path | None = None,
    park: str = "auto",
    base: nn.Module | None = None,
    processes: Processes | None = None,
) -> Start:
    """Collect the context's covariances and cut the adapter's start out of every target layer. The model's weights
    are read, not changed.

    Args:
        model: any model whose forward runs `ModuleList`s of blocks (or none).
        config: see `CordaConfig`.
        context: a `Context`, or its batches: keyword arguments of the model's forward. Padding is excluded through
            `attention_mask`. Without rounds of its own, batches that follow one another make a round. Where it also
            runs backward, answers are the tokens with a label, or all tokens without `labels`. Not read with
            orientation `identity`, unless `keep` is above 0.
        progress: show a progress bar on the terminal.
        stored: parameters whose values are in a checkpoint and read when needed (see `models.open_model`).
        work: folder for finished blocks, from which a run that was killed goes on. Default: a temporary one.
        park: where the hidden states of waiting batches are: `device`, `cpu`, `disk`, or `auto`: the first of them
            that has room.
        base: the model in 4 bits that the adapter is for, where `model` has the full weights of it.
        processes: those that share the work (see `share`). Each calls this with the same arguments, and returns the
            same; `work` is a folder that all see.

    Raises:
        CordaError: the model is a residual (see `models.residual`), a target that matches nothing, a rank above a
            layer's, a budget that cannot be met, an empty or all-padding context, more rounds than batches, what
            `walk_back` and `check_quantization` refuse, work that is damaged or was done on other weights, NaN or Inf
            in the activations. All but the last two before any long work. More processes than layers or batches;
            ProcessEndedError where another process has ended.
    """
    began, waited = time.perf_counter(), processes.waited if processes else 0.0
    targets = choose_targets(model, config)
    device = compute_device(model, config.device)
    check_quantization(model, targets, config, device, base)
    if base is None or not config.fold:  # folding puts what a residual lacks into the adapter
        check_whole(model if base is None else base, stored)
    record: dict[str, Any] = {"config": asdict(config)}
    if omitted := left_out(model, targets, config):
        record["left_out"] = [name for names in omitted.values() for name in names]
        _warn_of_left_out(omitted)
    for name in tied_layers(model, targets):
        warnings.warn(
            f"{name} shares its weight with the embeddings, which PEFT's merge_and_unload would change, too: merge "
            "this adapter by `corda export --as merged`",
            stacklevel=2,
        )
    if config.mode == "ipm" and config.keep:
        warnings.warn(
            f"{PRICED_TASK}: to keep another ability, leave keep out here, and give `corda train` its samples as "
            "--context, with --keep (in Python see KeepCallback)",
            stacklevel=2,
        )
    context = _completed(context, config)
    if config.reads_context and next(model.parameters()).dtype == torch.bfloat16 and not has_bfloat16(device):
        warnings.warn(
            "this processor has no instructions for bfloat16, and runs the context many times faster in float32: "
            "--dtype float32 (in Python, a model loaded with dtype=torch.float32)",
            stacklevel=2,
        )
    if config.weights != "given" and not context.abilities:
        raise CordaError(f"weights by {config.weights} are of several contexts: give more than one, or leave them out")
    if config.reads_context and context.abilities:
        record["context"] = _check_abilities(model, context, targets, config)
    elif config.reads_context:
        record["context"] = check_context(model, context, targets)
    blocks = 0  # through which the context goes a second time
    if config.runs_back:
        asked = "a price on drift (keep) is" if config.keep else "the orientation two_sided is"
        require_causal(model, f"{asked} for these alone, so leave it out")
        answers = [answer_mask(batch) for batch in context.batches]
        record["context"]["answers"] = sum(int(answer.sum()) for answer in answers)
        if config.keep:
            check_samples(sum(int(answer.any(1).sum()) for answer in answers))
        if not record["context"]["answers"]:
            raise FewAnswersError(NO_ANSWER)
        blocks = len(find_blocks(model, list(targets)))
    restart_peak(device)
    with tempfile.TemporaryDirectory() as temporary, float32_products("highest"):
        store = LayerStore(work or Path(temporary))
        ranks = Ranks(targets, config, model)
        clock = _Clock(device)
        digests = _finished_before(store, ranks, device)
        share = Share(processes, model, targets, config, device, digests) if processes else None
        part = share.part(context) if share else context
        where = choose_parking(park, model, part.batches, device, states=2 + blocks)
        place = Place(device, stored, parking(where, store.folder), processes)
        fallbacks: list[str] = []  # layers that the solver gave up on
        listeners = None
        if share:
            share.order = list(digests)
            collector = SharedCollector(
                model, {n: m for n, m in targets.items() if n not in digests}, part, len(set(context.rounds)), share
            )
            listeners = collector, SharedGradients(collector)
        with (
            progress_bar("decomposing", blocks + len(targets), progress) as advance,
            saving(store, device, processes) as save,
        ):
            if config.runs_back:
                steps = walk_back(model, targets, part, place, digests, on_block=advance, listeners=listeners)
            else:
                walked = walk(model, targets, part, place, digests, listeners[0] if listeners else None)
                steps = (StepBack(*step, {}) for step in walked)
            if share:
                steps = share.own_steps(steps, targets, elsewhere=advance)
            for names, groups, gradients in steps:
                clock.lap("forward")
                if groups is None:
                    _check_weights({name: targets[name] for name in names}, digests, store)
                    advance(len(names))
                    continue
                block: dict[str, Decomposed] = {}
                while groups:  # popped: a group that is done frees its covariances
                    group = groups.pop(0)
                    weights = _mix(group, gradients, config, context, double_device(device))
                    for name, decomposed in _decompose(
                        group, gradients, targets, config, ranks, clock, fallbacks, base
                    ):
                        decomposed.record = replace(decomposed.record, weights=weights)
                        block[name] = decomposed
                        advance()
                save(block)
                del block
                clock.lap("state")
        clock.lap("state")  # where a thread writes, the last block is on the disk only now
        if share:
            fallbacks = [name for names in share.processes.gather(fallbacks) for name in names]
            ranks = _ranks_of_all(store, share.order, Ranks(targets, config, model))
        warn_of_fallbacks(fallbacks)
        layers, sides, record["totals"] = _start(store, targets, ranks, config)
        clock.lap("factors")
        quantized = _quantized(store, layers, in_memory=work is None) if config.quantization else None
    digests = _digests(layers, base, quantized)
    record["fingerprint"] = fingerprint(digests)
    statistics = None
    if config.keep:
        counts = record["context"]
        statistics = Statistics(sides, counts["samples"], counts["answers"], counts["tokens"], digests)
    unseen = [name for name, layer in layers.items() if layer.record.leak is None]
    if config.reads_context and unseen:
        _warn_of_unseen(unseen)
    record["layers"] = {name: layer.record.as_json() for name, layer in layers.items()}
    took: dict[str, Any] = {"device": device_name(device)}
    took["seconds"] = {"all": time.perf_counter() - began} | clock.seconds
    if clock.peaks:
        took["peak_accelerator_bytes"] = clock.peaks
    if processes:
        took["seconds"]["waiting"] = processes.waited - waited
        took["processes"] = processes.gather(took["seconds"])
    return Start(config, layers, record, took, statistics, quantized)


def _check_abilities(
    model: nn.Module, context: Context, targets: Mapping[str, nn.Module], config: CordaConfig
) -> dict[str, Any]:
    """`check_context` of each ability, and their sums.

    Raises CordaError if an ability has too few samples for its weight, and where only one context will do.
    """
    check_together(config, len(context.abilities))
    total = sum(ability.weight for ability in context.abilities)
    found = []
    for number, ability in enumerate(context.abilities):
        counts = check_context(model, context.of_ability(number), targets, ability.name)
        share = ability.weight / total
        least = math.ceil(LEAST_SAMPLES * share * len(context.abilities))
        if share and counts["samples"] < least:
            raise CordaError(
                f"{ability.name} has {counts['samples']} samples, too few for {share:.0%} of the weight: give at least "
                f"{least}, better some hundreds"
            )
        found.append({"name": ability.name, "weight": share, **counts})
    sums = {name: sum(counts[name] for counts in found) for name in ("samples", "tokens")}
    return sums | {"widest": found[0]["widest"], "abilities": found}


def _mix(
    group: Group, gradients: dict[str, Tensor], config: CordaConfig, context: Context, device: torch.device
) -> list[float] | None:
    """Mix the covariances of a group's abilities, and D of its layers, into one, in place. Returns the weights, in the
    order of the abilities; None without abilities, or where no token came."""
    members, covariances = group
    if not context.abilities:
        return None
    weights = [ability.weight for ability in context.abilities]
    if config.weights == "compactness" and covariances:
        r = min(config.r, len(covariances[0]) - 1)
        weights = even_weights([C.to(device) for C in covariances], r)
    weights = [weight / sum(weights) for weight in weights]
    for name in members:
        if name in gradients:
            gradients[name] = mixed(list(gradients[name]), weights)
    if not covariances:
        return None
    covariances[:] = [mixed(covariances, weights)]
    return weights


def check_quantization(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: CordaConfig,
    device: torch.device,
    base: nn.Module | None,
) -> None:
    """Raises CordaError if the model cannot be quantized as is asked: bitsandbytes is missing or does not know the
    device, it is in 4 bits already, a target is none of the layers that are quantized, or a row of it is no whole
    number of blocks. Also if something is to be folded back, but nothing says what quantization lost; or if a layer of
    the model has another shape in `base`."""
    in_4bit = next((name for name, module in targets.items() if is_4bit(module)), None)
    if config.quantization:
        if in_4bit or base is not None:
            raise CordaError(ALREADY)
        check_quantizer(device)
        quantized_names(model, targets)
    elif config.fold and base is None:
        raise CordaError(
            "fold puts what quantization lost into the adapter, and for that the full weights are needed: "
            + ("--original MODEL" if in_4bit else "--quantization nf4")
        )
    modules = dict(base.named_modules()) if base is not None else {}
    for name, module in targets.items() if base is not None else ():
        if name not in modules or weight_shape(modules[name]) != weight_shape(module):
            raise CordaError(
                f"{name} has another shape in the quantized model, or is not there: it is of another model"
            )


def _quantized(store: LayerStore, names: Iterable[str], in_memory: bool) -> Callable[[str], Quantized]:
    """Gives the quantized weights in a store, where `in_memory` after the store is gone."""

    def read(name: str) -> Quantized:
        quantized = store.quantized(name)
        assert quantized is not None
        return quantized

    return {name: read(name) for name in names}.__getitem__ if in_memory else read


def _digests(
    layers: Mapping[str, LayerStart], base: nn.Module | None, quantized: Callable[[str], Quantized] | None
) -> dict[str, str]:
    """The digest of each layer's weight in the model that the adapter is for."""
    if base is not None:
        return {name: layer_digest(base.get_submodule(name)) for name in layers}
    if quantized is not None:
        shapes = {name: (len(layer.B), layer.A.shape[1]) for name, layer in layers.items()}
        return {name: digest_of(shape, quantized(name)["weight"]) for name, shape in shapes.items()}
    return {name: layer.record.digest or "" for name, layer in layers.items()}


class _Clock:
    """Seconds by stage, and on a CUDA device the peak memory of each stage that decomposes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(("forward", "selection", "decomposition", "state", "factors"), 0.0)
        self.peaks = dict.fromkeys(("forward", "selection", "decomposition", "state"), 0)
        if device.type != "cuda":
            self.peaks = {}
        self.since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What was done since the last lap belongs to this stage."""
        if stage in self.peaks:
            synchronize(self.device)
            self.peaks[stage] = max(self.peaks[stage], peak_bytes(self.device))
            restart_peak(self.device)
            if stage in ("forward", "state"):
                release_cache(self.device)  # pieces of memory that fitted this stage are of little use to the next
        now = time.perf_counter()
        self.seconds[stage] += now - self.since
        self.since = now


def _completed(context: Context | Iterable[Batch], config: CordaConfig) -> Context:
    """A context with its rounds, and without the tokens that are to be skipped; an empty one if none is needed."""
    if not config.reads_context:
        return Context()
    if not isinstance(context, Context):
        context = Context(list(context))
    assert config.rounds is not None
    rounds = context.rounds or consecutive_rounds(len(context.batches), config.rounds)
    return replace(context, rounds=rounds, skip_tokens=config.skip_tokens, tokens=config.tokens)


def _finished_before(store: LayerStore, ranks: Ranks, device: torch.device) -> dict[str, str]:
    """The layers that an earlier run finished, which `ranks` then has seen, with the digests of their weights."""
    digests: dict[str, str] = {}
    for name, layer in store.load(spectra_only=True):
        assert layer.record.digest is not None
        digests[name] = layer.record.digest
        ranks.see(name, layer.record.log_pi, layer.sigma.to(double_device(device)))
    return digests


def _ranks_of_all(store: LayerStore, order: Iterable[str], ranks: Ranks) -> Ranks:
    """Ranks that have seen all layers in the store, in an order."""
    layers = dict(store.load(spectra_only=True))
    for name in order:
        ranks.see(name, layers[name].record.log_pi, layers[name].sigma)
    return ranks


def _check_weights(layers: Mapping[str, nn.Module], digests: Mapping[str, str], store: LayerStore) -> None:
    """Raises CordaError if layers that an earlier run finished have other weights now."""
    for name, module in layers.items():
        if layer_digest(module) != digests[name]:
            raise CordaError(f"{store.folder} was made from other weights ({name} differs): remove it and start again")


def _decompose(
    group: Group,
    gradients: dict[str, Tensor],
    targets: Mapping[str, nn.Module],
    config: CordaConfig,
    ranks: Ranks,
    clock: _Clock,
    fallbacks: list[str],
    base: nn.Module | None,
) -> Iterator[tuple[str, Decomposed]]:
    """Decompose the layers of a group: choose a covariance, decompose, keep the components that may be chosen.

    Args:
        gradients: D (d_out, d_out) of layers, which are popped.
    """
    solving = double_device(clock.device)
    members, covariances = group
    dtype: Any = targets[members[0]].weight.dtype

    def store(X: Tensor, metric: Tensor | None) -> tuple[Quantized, Tensor]:
        stored, values = quantize(X.to(clock.device), dtype, config.double_quantization, metric)
        return stored, values.to(X.device)

    input_side = None
    if config.keep:
        n = weight_shape(targets[members[0]])[1]
        input_side = _small(covariances or [torch.zeros(n, n)], clock.device)
    if any(float(C.diagonal().sum()) == 0 for C in covariances):
        covariances = []  # only zeros came in: nothing to orient by
    choose = bool(covariances) and (config.rounds != 1 or config.allocates)
    extremes = extremes_of(covariances, config, solving) if choose else []
    factors = input_factors(covariances, config, solving)
    for name in members:
        W = weight_of(targets[name])
        if not bool(W.isfinite().all()):
            raise CordaError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")
        W, D = W.to(solving), gradients.pop(name, None)
        seen = seen_from(W, None if D is None else D.to(solving), config)
        choice = choose_covariance(W, covariances, extremes, config, seen) if choose else Choice()
        clock.lap("selection")
        C, T = (covariances[choice.round or 0].to(W.device) if covariances else None), factors(choice.round or 0)
        U, sigma = decompose_layer(seen.Z if seen else W, C, config, partial(fallbacks.append, name), T)
        ranks.see(name, choice.log_pi, sigma)
        record = LayerRecord(**choice._asdict(), digest=layer_digest(targets[name]), input=members[0])
        r = ranks.of_seen()[name]
        decomposed = keep_components(W, C, U, sigma, r, config, record, seen)
        del U, T
        if config.quantization or base is not None:
            values = None if base is None else weight_of(base.get_submodule(name)).to(solving).float()
            outputs = None if seen is None or D is None else D.to(solving)
            decomposed = quantize_layer(W, decomposed, r, config, store, C, outputs, values)
            del values, outputs
        if input_side is not None:
            D = torch.zeros(len(W), len(W)) if D is None else D
            decomposed.sides = Sides(input_side, _small([D], clock.device))
        del W, C, seen, D
        clock.lap("decomposition")
        yield name, decomposed


def _small(matrices: Sequence[Tensor], device: torch.device) -> Low:
    """The mean of C (n, n) over the rounds, or D, as it is kept, on the CPU."""
    mean = matrices[0].to(device) / len(matrices)
    for M in matrices[1:]:
        mean += M.to(device) / len(matrices)
    return Low(*(part.cpu() for part in compact(mean, DIRECTIONS)))


def _start(
    store: LayerStore, targets: Iterable[str], ranks: Ranks, config: CordaConfig
) -> tuple[dict[str, LayerStart], dict[str, Sides], dict[str, Any]]:
    """The factors of every layer and, where they are known, its sides, in the model's order; and totals."""
    by_name, made, both = ranks.of_seen(), dict[str, LayerStart](), dict[str, Sides]()

    def started(file: str) -> list[tuple[str, LayerStart, Sides | None]]:
        layers = store.load_block(file)
        return [(name, start_layer(layer, by_name[name], config), layer.sides) for name, layer in layers]

    with ThreadPoolExecutor(READERS) as pool:
        for name, start, sides_of_layer in chain.from_iterable(pool.map(started, store.files)):
            made[name] = start
            if sides_of_layer is not None:
                both[name] = sides_of_layer
    layers = {name: made[name] for name in targets}
    sides = {name: both[name] for name in targets if name in both}
    totals: dict[str, Any] = {
        "parameters": sum(layer.A.numel() + layer.B.numel() for layer in layers.values()),
        "budget": ranks.budget,
        "ranks": [min(by_name.values()), max(by_name.values())],
    }
    records = [layer.record for layer in layers.values() if layer.record.leak is not None]
    if records and not config.fold:
        energy = sum(r.output_energy or 0.0 for r in records)
        adapted = sum((r.energy_share or 0.0) * (r.output_energy or 0.0) for r in records)
        totals["energy_share"] = adapted / energy if energy else 0.0
    return layers, sides, totals


def _warn_of_left_out(omitted: Mapping[str, Sequence[str]]) -> None:
    """Say in one line what is left out, by the reason."""
    parts = []
    for reason, names in omitted.items():
        kinds = sorted({name.rpartition(".")[2] for name in names})
        parts.append(f"{len(names)} {reason} ({', '.join(kinds)}), such as {names[0]}")
    warnings.warn(f"left out: {'; '.join(parts)}; the other linear layers are adapted", stacklevel=3)


def _warn_of_unseen(unseen: Sequence[str]) -> None:
    warnings.warn(
        f"{len(unseen)} layers got no token of the context, so the plain SVD of their weights is taken: "
        f"{', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}",
        stacklevel=3,
    )
