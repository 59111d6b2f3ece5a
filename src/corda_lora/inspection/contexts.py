"""What contexts say of a model, in one walk through it: spectra of layers, covariances of their inputs, compactness,
similarity, and what is lost when the smallest components are discarded.
"""

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.compactness import allocate, allocation_scores, extreme_eigenvalues, log_compactness
from ..algebra.covariance import float32_products, shrunk, similarity
from ..algebra.decomposition import factor, orient, regularize
from ..algebra.second_order import Low, compact, whole
from ..algebra.solvers import components
from ..config import CordaConfig, CordaError, DataConfig, InspectConfig
from ..data.batches import encode, encode_all
from ..data.overview import check_fit, overview, unseen_samples
from ..data.samples import Sample, load_rounds, load_samples
from ..devices import compute_device, double_device, release_cache
from ..evaluation.evaluate import text_windows
from ..models.lockstep import Stored, find_blocks, parking
from ..models.targets import find_targets, require_causal
from ..models.weights import is_4bit, weight_of, weight_shape
from ..preprocess.backward import walk_back
from ..preprocess.collect import Collector
from ..preprocess.context import Batch, Context, answer_mask, check_context, has_decoder, read_context
from ..preprocess.layer import choose_covariance, extremes_of
from ..preprocess.statistics import DIRECTIONS
from ..preprocess.walk import Place, choose_parking, walk
from ..progress import console, progress_bar
from .truncation import Components, Truncation

CELLS = 48  # of a picture of a covariance, each way
PLAIN = "plain SVD"


class Draw(NamedTuple):
    """Samples of a context that have a covariance of their own.

    Attributes:
        round: they are all the samples of this round; None where they are fewer, of the first.
    """

    context: int
    samples: int
    round: int | None
    batches: list[Batch]


class Way(NamedTuple):
    """A way to decompose a layer.

    Attributes:
        label: its name in the figures.
        orientation: see `CordaConfig.orientation`.
        draws: numbers of the draws whose covariances it may be oriented by: none for the identity. Of several each
            layer takes the most compact (CorDA++, Alg. 1).
        allocated: whether levels discard components by CorDA++'s rule (Alg. 2), in all as many parameters.
    """

    label: str
    orientation: str
    draws: tuple[int, ...]
    allocated: bool = False


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
    check: Callable[[int, int, int], None] = lambda layers, contexts, ways: None,
) -> Inspection:
    """Look at a model through its contexts, block by block. The model is left as it was.

    Args:
        stored: parameters whose values are in a checkpoint and read when needed (see `models.open_model`).
        work: folder for hidden states that are parked on the disk.
        check: called before long work with the number of layers that are shown, of contexts, and of spectra of a layer.

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
    rounds = [load_rounds(data, config.rounds) for data in datas]
    if progress:
        for name, data, (loaded, *_) in zip(names, datas, rounds):
            encoded = encode_all(tokenizer, loaded, data.max_length)
            console.print(overview(name, tokenizer, loaded, encoded, data.max_length, learned=False))
    draws = [
        Draw(i, len(part), round, _batches(model, tokenizer, part, data.max_length, config))
        for i, (data, drawn) in enumerate(zip(datas, rounds))
        for round, part in _parts(drawn, config, data.seed)
    ]
    full = [d for d, draw in enumerate(draws) if draw.round == 0]  # of each context
    abouts = [
        check_context(model, Context(draws[d].batches, skip_tokens=config.skip_tokens), targets, name)
        for d, name in zip(full, names)
    ]
    texts = _texts(model, tokenizer, config, datas, names, rounds) if config.levels else {}
    ways = _ways(names, draws, config)
    check(len(shown), len(names), sum(not way.allocated for way in ways))

    device = compute_device(model, config.device)
    batches = [batch for draw in draws for batch in draw.batches]
    variants = 1 + len(ways) * len(config.levels)  # type: ignore[arg-type]
    waiting = [*batches, *([batch for text in texts.values() for batch in text] * variants)]
    park = choose_parking(config.park, model, waiting, device, 2 + (len(blocks) if config.two_sided else 0))
    draw_of = [d for d, draw in enumerate(draws) for _ in draw.batches]
    context = Context(batches, draw_of, skip_tokens=config.skip_tokens)
    seen = _Walks(model, targets, blocks, context, Place(device, stored, parking(park, work)), config.damping, texts)
    found = Inspection({"contexts": [{"name": n, **about} for n, about in zip(names, abouts)], "layers": {}})
    later = [way for way in ways if way.allocated]  # when all spectra are known
    steps = len(blocks) + any(not place["block"] for place in places.values())  # of a walk
    total = steps * (1 + bool(later)) + len(blocks) * len(names) * config.two_sided
    total += (len(targets) if config.levels else len(shown)) * len(ways)
    with float32_products("highest"), progress_bar("inspecting", total, progress) as advance:
        if config.two_sided:
            for d in full:
                seen.sides[d] = _output_sides(model, targets, draws[d].batches, seen.place, advance)
        first = [way for way in ways if not way.allocated]
        cosines: list[Tensor] = []

        def describe(members: Sequence[str], Cs: Sequence[Tensor]) -> None:
            of_all = [Cs[d] for d in full] if Cs else []
            about, shrunken, cosine = _describe(members, of_all, targets, config, seen.solving)
            cosines.extend([cosine] if Cs else [])
            for name, layer in about.items():
                pis = dict(zip(names, layer["log10_pi"]))
                found.record["layers"][name] = places[name] | layer | {"log10_pi": pis}
                if name in shown and Cs:
                    found.maps[name] = dict(zip(names, shrunken))

        cut = seen.walk(first, [counts] * len(first), shown, describe, advance)
        if later:
            allocated = [seen.allocated(way, counts) for way in later]
            cut |= seen.walk(later, allocated, shown, lambda *_: None, advance)
    found.record["layers"] = {name: found.record["layers"][name] for name in targets}
    labels = {way.label for way in ways if not way.allocated}  # an allocated way has the spectrum of the selected one
    found.spectra = {
        name: {label: sigma.float() for label, sigma in seen.spectra[name].items() if label in labels} for name in shown
    }
    found.record["similarity"] = _mean_similarity(cosines, names)
    if config.levels:
        found.record["truncation"] = _truncated(cut, ways, names, draws, texts, config)
    return found


class _Walks:
    """Walks of the contexts through a model, and of the texts behind them with cut weights.

    Attributes:
        sides: by draw, D of each layer, where it is known.
        spectra: {layer: {label: σ (R,)}}, float64 on the CPU.
        choices: {(layer, draws): which of the draws it takes, and log π}.
        selected: {(layer, draws): σ (R,) by that draw}, float64 on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        blocks: Mapping[str, nn.Module],
        context: Context,
        place: Place,
        damping: float,
        texts: Mapping[str, Sequence[Batch]],
    ):
        self.model, self.targets, self.blocks, self.context = model, targets, blocks, context
        self.place, self.damping, self.texts = place, damping, texts
        self.solving = double_device(place.device)
        self.sides: dict[int, dict[str, Low]] = {}
        self.spectra: dict[str, dict[str, Tensor]] = {}
        self.choices: dict[tuple[str, tuple[int, ...]], tuple[int, float]] = {}
        self.selected: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def walk(
        self,
        ways: Sequence[Way],
        counts: Sequence[Mapping[str, list[int]]],
        shown: Sequence[str],
        describe: Callable[[Sequence[str], Sequence[Tensor]], None],
        advance: Callable[[], None],
    ) -> dict[str, list[dict[str, float]]]:
        """Run the contexts through the model, and the texts with cut weights.

        Args:
            counts: for each way how many components of each layer every level discards.
            shown: the layers that are decomposed where there is no text.
            describe: called with layers that share their input, and its covariances.

        Returns:
            {label of the way, or "" for the whole weights: [{text: loss} for each level]}.
        """
        model, targets, place = self.model, self.targets, self.place
        collector = Collector(model, targets, self.context)
        truncation = Truncation(model, targets, self.blocks, self.texts, counts, place) if self.texts else None
        with closing(truncation) if truncation else nullcontext():
            for _, groups in walk(model, targets, self.context, place, collector=collector):
                covariances = {name: Cs for members, Cs in groups or [] for name in members}

                def decompose(name: str, w: int, Cs: Mapping[str, list[Tensor]] = covariances) -> Components:
                    parts = self._components(name, ways[w], Cs[name])
                    self.spectra.setdefault(name, {})[ways[w].label] = parts.sigma.cpu()
                    advance()
                    return parts

                for members, Cs in groups or []:
                    describe(members, Cs)
                if truncation and truncation.left:
                    collector.stop()
                    truncation.through(list(covariances), decompose)
                else:
                    for name in (name for name in covariances if name in shown):
                        for w in range(len(ways)):
                            decompose(name, w)
                del groups, covariances, decompose
                release_cache(place.device)
                advance()
        return truncation.losses([way.label for way in ways]) if truncation else {}

    def allocated(self, way: Way, counts: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """How many components of each layer every level discards where CorDA++ shares them out (Alg. 2), with no more
        parameters in all than `counts` has. The spectra are those of the first walk.

        Args:
            way: whose covariances were chosen there, without the allocation.
        """
        names = [name for name in counts if (name, way.draws) in self.selected]
        scores = [allocation_scores(self.choices[n, way.draws][1], self.selected[n, way.draws]) for n in names]
        costs = [sum(weight_shape(self.targets[name])) for name in names]
        shared: dict[str, list[int]] = {name: list(of_layer) for name, of_layer in counts.items()}
        for level in range(len(next(iter(counts.values())))):
            even = [counts[name][level] for name in names]
            budget = sum(k * cost for k, cost in zip(even, costs))
            for name, k in zip(names, allocate(scores, costs, budget, "kpm", min_rank=min(1, *even))):
                shared[name][level] = k
        return shared

    def _components(self, name: str, way: Way, covariances: Sequence[Tensor]) -> Components:
        """All components of a layer."""
        W = weight_of(self.targets[name]).to(self.solving)
        if not bool(W.isfinite().all()):
            raise CordaError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")
        C = L = None
        try:
            if way.draws and covariances:
                C = covariances[self._chosen(name, W, way, covariances)].to(self.solving)
            if way.orientation == "two_sided":
                D = whole(Low(*(part.to(W.device) for part in self.sides[way.draws[0]][name]))).double()
                L = factor(D / D.diagonal().mean(), self.damping) if float(D.diagonal().sum()) else None
            W = W.double() if L is None else L.T @ W.double()
            U, sigma = components(W, partial(orient, C=C, orientation=way.orientation, damping=self.damping))
        except torch.linalg.LinAlgError as error:
            raise CordaError(f"a covariance of {name} is singular to float64: raise --damping") from error
        if len(way.draws) > 1:
            self.selected[name, way.draws] = sigma.cpu()
        return Components(U, sigma, L)

    def _chosen(self, name: str, W: Tensor, way: Way, covariances: Sequence[Tensor]) -> int:
        """The draw whose covariance orients a layer: of several, the most compact."""
        if len(way.draws) == 1:
            return way.draws[0]
        if (name, way.draws) not in self.choices:
            config = CordaConfig(damping=self.damping)
            of_draws = [covariances[d] for d in way.draws]
            choice = choose_covariance(W, of_draws, extremes_of(of_draws, config, self.solving), config)
            assert choice.round is not None
            assert choice.log_pi is not None
            self.choices[name, way.draws] = way.draws[choice.round], choice.log_pi
        return self.choices[name, way.draws][0]


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

    Raises CordaError if these are more than a layer has, or none of any layer.
    """
    ranks = {name: min(weight_shape(module)) for name, module in targets.items()}
    if levels and levels[-1] > min(ranks.values()):
        name = min(ranks, key=ranks.__getitem__)
        raise CordaError(
            f"level {levels[-1]:g} discards more components than {name} has, {ranks[name]}: give shares, such as 0.25"
        )
    if levels and round(levels[0] * max(ranks.values())) == 0:
        raise CordaError(f"level {levels[0]:g} discards no component: the widest layer has {max(ranks.values())}")
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
    """A name for each context: its own; or of a file, with its folder, or of a data set on the hub; more where two are
    alike."""
    short = [getattr(data, "ability", "") or _name_of(Path(data.data)) for data in datas]
    longer = [f"{name} ({data.rows})" if short.count(name) > 1 else name for name, data in zip(short, datas)]
    return [f"{name} {i + 1}" if longer.count(name) > 1 else name for i, name in enumerate(longer)]


def _name_of(path: Path) -> str:
    return "/".join(path.with_suffix("").parts[-2:]) if path.suffix else path.name


def _parts(rounds: list[list[Sample]], config: InspectConfig, seed: int) -> list[tuple[int | None, list[Sample]]]:
    """The rounds of a context; and draws of fewer from the first, where truncation is measured with these, too."""
    fewer = [n for n in config.samples if n < len(rounds[0])] if config.levels else []  # type: ignore[union-attr]
    smaller = [(None, random.Random(seed).sample(rounds[0], n)) for n in reversed(fewer)]
    return [(0, rounds[0]), *smaller, *((i, rounds[i]) for i in range(1, len(rounds)))]


def _batches(
    model: nn.Module, tokenizer: Any, samples: Sequence[Sample], max_length: int, config: InspectConfig
) -> list[Batch]:
    batches = read_context(tokenizer, [samples], max_length, config.batch_tokens, has_decoder(model)).batches
    check_fit(model, (ids for batch in batches for ids in batch["input_ids"].tolist()))
    return list(batches)


def _texts(
    model: nn.Module,
    tokenizer: Any,
    config: InspectConfig,
    datas: Sequence[DataConfig],
    names: Sequence[str],
    rounds: Sequence[Sequence[list[Sample]]],
) -> dict[str, list[Batch]]:
    """What truncation is measured on: windows of the text, or samples of each context that were not shown.

    Raises CordaError if there are none.
    """
    if text := config.running_text():
        before = len(encode(tokenizer, Sample("", "", {}), 1).ids)  # a begin-of-text token
        windows = text_windows(tokenizer, load_samples(text), max(1, text.max_length - before))[: config.held_out]
        return {context_names([text])[0]: _batches(model, tokenizer, windows, text.max_length, config)}
    texts = {}
    for data, name, shown in zip(datas, names, rounds):
        others = unseen_samples(model, tokenizer, data, list(chain(*shown)), config.held_out)
        if not others:
            raise CordaError(
                f"all samples of {data.data} are shown, and none is left to measure on: fewer --samples, or a --text"
            )
        texts[name] = _batches(model, tokenizer, others, data.max_length, config)
    return texts


def _ways(names: Sequence[str], draws: Sequence[Draw], config: InspectConfig) -> list[Way]:
    """Plain SVD, then ASVD and CO-SVD with each context, CO-SVD also with fewer samples; two-sided if asked for; with
    several rounds CO-SVD+ and CO-SVD++."""
    ways = [Way(PLAIN, "identity", ())]
    for label, orientation in (("ASVD", "diagonal"), ("CO-SVD", "covariance"), ("two-sided", "two_sided")):
        if orientation == "two_sided" and not config.two_sided:
            continue
        for d, draw in enumerate(draws):
            if draw.round == 0 or (draw.round is None and orientation == "covariance"):
                fewer = f", {draw.samples} samples" if draw.round is None else ""
                ways.append(Way(f"{label}, {names[draw.context]}{fewer}", orientation, (d,)))
    for label, allocated in (("CO-SVD+", False), ("CO-SVD++", True)) if config.rounds > 1 else ():
        for i, name in enumerate(names):
            of_rounds = tuple(d for d, draw in enumerate(draws) if draw.context == i and draw.round is not None)
            ways.append(Way(f"{label}, {name}", "covariance", of_rounds, allocated))
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
    cut: Mapping[str, list[dict[str, float]]],
    ways: Sequence[Way],
    names: Sequence[str],
    draws: Sequence[Draw],
    texts: Mapping[str, Sequence[Batch]],
    config: InspectConfig,
) -> dict[str, Any]:
    """Losses, {text: [value of each level]}, of the whole model and of every way."""
    [base], curves = cut[""], []
    for way in ways:
        draw = draws[way.draws[0]] if way.draws else None
        curves.append(
            {
                "label": way.label,
                "orientation": way.orientation,
                "context": draw and names[draw.context],
                "samples": draw and draw.samples,
                "loss": {text: [level[text] for level in cut[way.label]] for text in base},
            }
        )
    tokens = {text: sum(int(answer_mask(batch).sum()) for batch in batches) for text, batches in texts.items()}
    return {"levels": config.levels, "tokens": tokens, "base": base, "curves": curves}
