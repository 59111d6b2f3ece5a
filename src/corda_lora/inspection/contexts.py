"""What contexts say of a model, in one walk through it: spectra of layers, covariances of their inputs, compactness,
similarity, and what is lost when the smallest components are discarded.
"""

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.compactness import extreme_eigenvalues, log_compactness
from ..algebra.covariance import float32_products, shrunk, similarity
from ..algebra.decomposition import factor, orient, regularize
from ..algebra.second_order import Low, compact, whole
from ..algebra.solvers import components
from ..config import CordaError, DataConfig, InspectConfig
from ..data.batches import encode
from ..data.overview import check_fit, overview
from ..data.samples import Sample, load_others, load_samples
from ..devices import compute_device, double_device, release_cache
from ..evaluation.evaluate import text_windows
from ..models.lockstep import Stored, find_blocks, parking
from ..models.targets import find_targets, require_causal
from ..models.weights import is_4bit, weight_of, weight_shape
from ..preprocess.backward import walk_back
from ..preprocess.collect import Collector
from ..preprocess.context import Batch, Context, check_context, has_decoder, read_context
from ..preprocess.statistics import DIRECTIONS
from ..preprocess.walk import Place, choose_parking, walk
from ..progress import console, progress_bar
from .truncation import Components, Truncation

CELLS = 48  # of a picture of a covariance, each way
PLAIN = "plain SVD"


class Draw(NamedTuple):
    """Samples of a context that have a covariance of their own."""

    context: int
    samples: int
    batches: list[Batch]


class Way(NamedTuple):
    """A way to decompose a layer.

    Attributes:
        label: its name in the figures.
        orientation: see `CordaConfig.orientation`.
        draw: the number of the draw whose covariance it is oriented by; None for the identity.
    """

    label: str
    orientation: str
    draw: int | None


@dataclass
class Inspection:
    """What was found.

    Attributes:
        record: the numbers, for JSON.
        spectra: {layer: {label: σ (R,), descending}} of the layers that are shown.
        maps: {layer: {context: (cells, cells)}}, see `covariance.shrunk`.
    """

    record: dict[str, Any]
    spectra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    maps: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def inspect_model(
    model: nn.Module,
    tokenizer: Any,
    config: InspectConfig,
    stored: Stored | None = None,
    work: Path | None = None,
    progress: bool = True,
    check: Callable[[int, int], None] = lambda layers, contexts: None,
) -> Inspection:
    """Look at a model through its contexts, block by block. The model is left as it was.

    Args:
        stored: parameters whose values are in a checkpoint and read when needed (see `models.open_model`).
        work: folder for hidden states that are parked on the disk.
        check: called before long work with the number of layers that are shown and of contexts.

    Raises:
        CordaError: a layer that is not there; a level above a layer's components; data that cannot be read, or has no
            sample left to measure on; what `walk` and `walk_back` refuse. All but the last before any long work.
    """
    targets = find_targets(model, "all-linear")
    blocks = find_blocks(model, list(targets))
    places = {name: place_of(name, blocks) for name in targets}
    shown = chosen_layers(targets, config.layers) if config.layers else _middle(places, list(blocks))
    counts = discarded(targets, config.levels)  # type: ignore[arg-type]
    _check_levels(model, targets, blocks, config)
    datas = config.contexts()
    names = context_names(datas)
    check(len(shown), len(names))
    samples = [load_samples(data) for data in datas]
    if progress:
        for name, data, loaded in zip(names, datas, samples):
            encoded = [encode(tokenizer, sample, data.max_length) for sample in loaded]
            console.print(overview(name, tokenizer, loaded, encoded, data.max_length, learned=False))
    draws = [
        Draw(i, n, _batches(model, tokenizer, part, data.max_length, config))
        for i, (data, loaded) in enumerate(zip(datas, samples))
        for n, part in _parts(loaded, config, data.seed)
    ]
    full = [next(d for d, draw in enumerate(draws) if draw.context == i) for i in range(len(names))]  # of all samples
    abouts = [check_context(model, Context(draws[d].batches, skip_tokens=config.skip_tokens), targets) for d in full]
    texts = _texts(model, tokenizer, config, datas, names) if config.levels else {}
    ways = _ways(names, draws, config)

    device = compute_device(model, config.device)
    batches = [batch for draw in draws for batch in draw.batches]
    rounds = [d for d, draw in enumerate(draws) for _ in draw.batches]
    context = Context(batches, rounds, skip_tokens=config.skip_tokens)
    waiting = [*batches, *([b for text in texts.values() for b in text] * (1 + len(ways) * len(config.levels)))]  # type: ignore[arg-type]
    states = 2 + (len(blocks) if config.two_sided else 0)
    place = Place(device, stored, parking(choose_parking(config.park, model, waiting, device, states), work))
    solving = double_device(device)

    found = Inspection({"contexts": [{"name": n, **about} for n, about in zip(names, abouts)], "layers": {}})
    decomposed = len(targets) if config.levels else len(shown)
    total = len(blocks) * (1 + len(names) * config.two_sided) + decomposed * len(ways)
    with float32_products("highest"), progress_bar("inspecting", total, progress) as advance:
        sides = (
            [_output_sides(model, targets, draws[d].batches, place, advance) for d in full] if config.two_sided else []
        )

        def decompose(name: str, way: Way, covariances: Sequence[Tensor]) -> Components:
            side = (
                sides[draws[way.draw].context][name]
                if way.orientation == "two_sided" and way.draw is not None
                else None
            )
            C = None if way.draw is None or not covariances else covariances[way.draw].to(solving)
            parts = _decompose(name, weight_of(targets[name]).to(solving), C, side, way.orientation, config.damping)
            if name in shown:
                found.spectra.setdefault(name, {})[way.label] = parts.sigma.float().cpu()
            advance()
            return parts

        collector = Collector(model, targets, context)
        truncation = Truncation(model, targets, blocks, texts, len(ways), counts, place) if config.levels else None
        with closing(truncation) if truncation else nullcontext():
            cosines: list[Tensor] = []
            for _, groups in walk(model, targets, context, place, collector=collector):
                covariances = {name: Cs for members, Cs in groups or [] for name in members}
                for members, Cs in groups or []:
                    about, shrunken, cosine = _describe(
                        members, [Cs[d] for d in full] if Cs else [], targets, config, solving
                    )
                    cosines += [cosine] if Cs else []
                    for name, layer in about.items():
                        found.record["layers"][name] = places[name] | {
                            key: dict(zip(names, value)) if key == "log10_pi" else value for key, value in layer.items()
                        }
                        if name in shown and Cs:
                            found.maps[name] = dict(zip(names, shrunken))
                if truncation and truncation.left:
                    collector.stop()
                    truncation.through(list(covariances), lambda name, w: decompose(name, ways[w], covariances[name]))  # noqa: B023
                else:
                    for name in (name for name in covariances if name in shown):
                        for way in ways:
                            decompose(name, way, covariances[name])
                del groups
                release_cache(device)
                advance()
    found.record["layers"] = {name: found.record["layers"][name] for name in targets}
    found.spectra = {name: found.spectra[name] for name in shown}
    found.record["similarity"] = _mean_similarity(cosines, names)
    if truncation:
        found.record["truncation"] = _truncated(truncation, ways, names, draws, config)
    return found


# --- what is asked for -----------------------------------------------------------------------------------------------


def chosen_layers(targets: Mapping[str, nn.Module], wanted: Sequence[str]) -> list[str]:
    """The layers with these names, or whose names end in them, in the model's order.

    Raises CordaError if one matches nothing; it gives the nearest names.
    """
    chosen: set[str] = set()
    for ending in wanted:
        matched = [name for name in targets if f".{name}".endswith(f".{ending}")]
        if not matched:
            endings = {".".join(name.split(".")[i:]) for name in targets for i in range(name.count(".") + 1)}
            near = difflib.get_close_matches(ending, sorted(endings, key=lambda e: (e.count("."), e)), n=3, cutoff=0.3)
            last = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
            raise CordaError(f"there is no layer {ending!r}; nearest names: {', '.join(near or last)}")
        chosen.update(matched)
    return [name for name in targets if name in chosen]


def place_of(name: str, blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """The block that a layer is in, "" if in none, and its name there."""
    block = next((block for block in blocks if name.startswith(f"{block}.")), "")
    return {"block": block, "kind": name.removeprefix(f"{block}.")}


def _middle(places: Mapping[str, Mapping[str, str]], blocks: Sequence[str]) -> list[str]:
    """The layers of the middle block; all layers of a model without blocks."""
    middle = blocks[len(blocks) // 2] if blocks else ""
    return [name for name, place in places.items() if place["block"] == middle]


def discarded(targets: Mapping[str, nn.Module], levels: Sequence[float]) -> dict[str, list[int]]:
    """How many components of each layer every level discards.

    Raises CordaError if these are more than a layer has.
    """
    ranks = {name: min(weight_shape(module)) for name, module in targets.items()}
    if levels and levels[-1] > min(ranks.values()):
        name = min(ranks, key=ranks.__getitem__)
        raise CordaError(
            f"level {levels[-1]:g} discards more components than {name} has, {ranks[name]}: give shares, such as 0.25"
        )
    return {name: [round(level * R) if level < 1 else int(level) for level in levels] for name, R in ranks.items()}


def _check_levels(
    model: nn.Module, targets: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module], config: InspectConfig
) -> None:
    if not config.levels:
        return
    require_causal(model)
    if any(is_4bit(module) for module in targets.values()) or getattr(model, "is_quantized", False):
        raise CordaError("components are discarded from full weights, but the model is quantized: leave levels out")
    if not blocks:
        raise CordaError(f"{type(model).__name__} has no blocks to go through one by one: leave levels out")


def context_names(datas: Sequence[DataConfig]) -> list[str]:
    """A name for each context: of a file, with its folder, or of a data set on the hub; more where two are alike."""
    paths = [Path(data.data) for data in datas]
    short = ["/".join(path.with_suffix("").parts[-2:]) if path.suffix else path.name for path in paths]
    longer = [f"{name} ({data.rows})" if short.count(name) > 1 else name for name, data in zip(short, datas)]
    return [f"{name} {i + 1}" if longer.count(name) > 1 else name for i, name in enumerate(longer)]


def _parts(samples: list[Sample], config: InspectConfig, seed: int) -> list[tuple[int, list[Sample]]]:
    """All samples of a context, and draws of fewer from them where truncation is measured with these, too."""
    fewer = [n for n in config.samples if n < len(samples)] if config.levels else []  # type: ignore[union-attr]
    return [(len(samples), samples), *((n, random.Random(seed).sample(samples, n)) for n in reversed(fewer))]


def _batches(
    model: nn.Module, tokenizer: Any, samples: Sequence[Sample], max_length: int, config: InspectConfig
) -> list[Batch]:
    batches = read_context(tokenizer, [samples], max_length, config.batch_tokens, has_decoder(model)).batches
    check_fit(model, (ids for batch in batches for ids in batch["input_ids"].tolist()))
    return list(batches)


def _texts(
    model: nn.Module, tokenizer: Any, config: InspectConfig, datas: Sequence[DataConfig], names: Sequence[str]
) -> dict[str, list[Batch]]:
    """What truncation is measured on: windows of the text, or samples of each context that were not shown.

    Raises CordaError if there are none.
    """
    if config.text is not None:
        text = DataConfig(config.text, max_length=config.max_length) if isinstance(config.text, str) else config.text
        before = len(encode(tokenizer, Sample("", "", {}), 1).ids)  # a begin-of-text token
        windows = text_windows(tokenizer, load_samples(text), max(1, text.max_length - before))[: config.held_out]
        return {context_names([text])[0]: _batches(model, tokenizer, windows, text.max_length, config)}
    texts = {}
    for data, name in zip(datas, names):
        others = load_others(data, config.held_out)
        if not others:
            raise CordaError(
                f"all samples of {data.data} are shown, and none is left to measure on: fewer --samples, or a --text"
            )
        texts[name] = _batches(model, tokenizer, others, data.max_length, config)
    return texts


def _ways(names: Sequence[str], draws: Sequence[Draw], config: InspectConfig) -> list[Way]:
    """Plain SVD, then ASVD and CO-SVD with each context, CO-SVD also with fewer samples; two-sided if asked for."""
    full = [next(d for d, draw in enumerate(draws) if draw.context == i) for i in range(len(names))]
    ways = [Way(PLAIN, "identity", None)]
    ways += [Way(f"ASVD, {name}", "diagonal", d) for name, d in zip(names, full)]
    for d, draw in enumerate(draws):
        fewer = "" if d in full else f", {draw.samples} samples"
        ways.append(Way(f"CO-SVD, {names[draw.context]}{fewer}", "covariance", d))
    if config.two_sided:
        ways += [Way(f"two-sided, {name}", "two_sided", d) for name, d in zip(names, full)]
    return ways


# --- what is found ---------------------------------------------------------------------------------------------------


def _output_sides(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    place: Place,
    advance: Callable[[], None],
) -> dict[str, Low]:
    """D of each layer on a context, in small (see `second_order.compact`), on the CPU. Zero where no token came."""
    sides = {
        name: Low(torch.zeros(weight_shape(m)[0], 0), torch.zeros(weight_shape(m)[0])) for name, m in targets.items()
    }
    for step in walk_back(model, targets, Context(batches), place, on_block=advance):
        for name in list(step.gradients):
            D = step.gradients.pop(name).to(place.device)
            sides[name] = Low(*(part.cpu() for part in compact(D, DIRECTIONS)))
    return sides


def _decompose(
    name: str, W: Tensor, C: Tensor | None, side: Low | None, orientation: str, damping: float
) -> Components:
    if not bool(W.isfinite().all()):
        raise CordaError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")
    try:
        L = None
        if side is not None:
            D = whole(Low(*(part.to(W.device) for part in side)))
            L = factor(D / D.diagonal().mean(), damping) if float(D.diagonal().sum()) else None
        W = W.double() if L is None else L.T @ W.double()
        return Components(*components(W, partial(orient, C=C, orientation=orientation, damping=damping)), L)
    except torch.linalg.LinAlgError as error:
        raise CordaError(f"a covariance of {name} is singular to float64: raise --damping") from error


def _describe(
    members: Sequence[str],
    Cs: list[Tensor],
    targets: Mapping[str, nn.Module],
    config: InspectConfig,
    device: torch.device,
) -> tuple[dict[str, dict[str, Any]], list[Tensor], Tensor]:
    """Layers that share their input: shapes and log10 π of each, the covariances shrunk, and the cosines of pairs of
    contexts, (2, contexts, contexts): of C as it is, and with all channels at one scale.

    Args:
        Cs: of each context; empty if no token came.
    """
    shrunken, extremes = [], []
    diagonals = torch.stack([C.diagonal().double().to(device) for C in Cs]) if Cs else None
    for C in Cs:
        C = C.to(device)
        shrunken.append(shrunk(C, CELLS).cpu())
        try:
            extremes.append(extreme_eigenvalues(regularize(C, config.damping)))
        except torch.linalg.LinAlgError as error:
            raise CordaError(f"a covariance of {members[0]} is singular to float64: raise --damping") from error
    cosine = torch.eye(len(Cs), dtype=torch.float64).repeat(2, 1, 1)
    if diagonals is not None:
        # Each context counts the same in the common scale, however large its activations are.
        scales = (diagonals / diagonals.mean(1, keepdim=True).clamp(min=1e-300)).mean(0).sqrt()  # (n,)
        for i, j in combinations(range(len(Cs)), 2):
            pair = Cs[i].to(device), Cs[j].to(device)
            for kind, value in enumerate((similarity(*pair), similarity(*pair, scales))):
                cosine[kind, i, j] = cosine[kind, j, i] = value
    about = {}
    for name in members:
        m, n = weight_shape(targets[name])
        about[name] = {
            "shape": [m, n],
            "log10_pi": [log_compactness(m, *pair) / 2.302585092994046 for pair in extremes],
            "similarity": cosine.tolist() if Cs else None,
        }
    return about, shrunken, cosine


def _mean_similarity(cosines: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    mean = torch.stack(list(cosines)).mean(0).tolist() if cosines else [[], []]
    return {"contexts": list(names), "inputs": len(cosines), "as_it_is": mean[0], "channels_at_one_scale": mean[1]}


def _truncated(
    truncation: Truncation, ways: Sequence[Way], names: Sequence[str], draws: Sequence[Draw], config: InspectConfig
) -> dict[str, Any]:
    """Losses, {text: [value of each level]}, of the whole model and of every way."""
    base, *cut = truncation.losses()
    curves = []
    for w, way in enumerate(ways):
        draw = None if way.draw is None else draws[way.draw]
        levels = cut[w * len(config.levels) : (w + 1) * len(config.levels)]  # type: ignore[arg-type]
        curves.append(
            {
                "label": way.label,
                "orientation": way.orientation,
                "context": draw and names[draw.context],
                "samples": draw and draw.samples,
                "loss": {text: [level[text] for level in levels] for text in base},
            }
        )
    return {"levels": config.levels, "tokens": truncation.tokens(), "base": base, "curves": curves}
