"""The contents of the figures of `corda inspect`, which inspected.py and inspected_pictures.py draw."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

POINTS = 200  # of a spectrum on the page; all are in inspect.safetensors
DARKEST = 1e-12  # σ/σ₁ below this is rounding


def level_text(level: float) -> str:
    """A share or a count of components."""
    return f"{100 * level:.3g} %" if level < 1 else f"{level:g}"


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if loss == loss else math.nan


def spectrum_points(sigma: Tensor, points: int = POINTS) -> list[list[float]]:
    """[number of the component, σ/σ₁] of evenly spaced components, the first and the last among them, as far as σ is
    more than rounding."""
    share = (sigma.double() / sigma[0].double().clamp(min=1e-300)).tolist()
    picked = sorted({round(i * (len(share) - 1) / (points - 1)) for i in range(points)})
    return [[i + 1, float(f"{share[i]:.4g}")] for i in picked if share[i] > DARKEST]


def model_map(
    layers: Mapping[str, Mapping[str, Any]],
    values: Callable[[Mapping[str, Any]], Mapping[str, float]],
    names: Sequence[str],
) -> dict[str, Any]:
    """A model as maps of blocks × kinds of layers: {"blocks", "kinds", "values": {name: kinds × blocks}}.

    Args:
        layers: each with its block, and its kind there.
        values: of a layer, by name.
    """
    blocks = list(dict.fromkeys(about["block"] for about in layers.values()))
    kinds = list(dict.fromkeys(about["kind"] for about in layers.values()))
    found: dict[str, list[list[float | None]]] = {n: [[None] * len(blocks) for _ in kinds] for n in names}
    for about in layers.values():
        for name, value in values(about).items():
            found[name][kinds.index(about["kind"])][blocks.index(about["block"])] = value
    return {"blocks": blocks, "kinds": kinds, "values": found}


def compactness_map(record: Mapping[str, Any]) -> dict[str, Any]:
    """log10 π of each layer, for each context."""
    names = record["similarity"]["contexts"]
    return {**model_map(record["layers"], lambda about: about["log10_pi"], names), "unit": "log10 π"}


def truncation_data(cut: Mapping[str, Any]) -> dict[str, Any]:
    """For each text the perplexity of each way: [[level, perplexity, its text], ...], the whole model at level 0."""
    return {
        text: {
            curve["label"]: [
                [level, perplexity(loss), "none" if not level else level_text(level)]
                for level, loss in zip([0, *cut["levels"]], [base, *curve["loss"][text]])
            ]
            for curve in cut["curves"]
        }
        for text, base in cut["base"].items()
    }


def change_map(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter changed, by measure: each has a scale of its own."""
    measures = {label: value for label, (value, _) in change_measures(record).items()}
    found = model_map(
        record["layers"],
        lambda about: {label: x for label, value in measures.items() if (x := value(about)) is not None},
        list(measures),
    )
    return {**found, "own": True}


def change_measures(
    record: Mapping[str, Any],
) -> dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str]]:
    """The measures of an adapter's layers that are known: how each is read of a layer, and its meaning."""
    measures: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], str]] = {}
    for about in record["contexts"]:
        name = about["name"]
        of = f", {name}"

        def moved(layer: Mapping[str, Any], key: str, name: str = name) -> float | None:
            return layer["moved"].get(name, {}).get(key)

        measures |= {
            f"‖ΔW X‖ / ‖W X‖{of}": (partial(moved, key="outputs"), "how far the outputs move, over their size"),
            f"predicted drift{of}": (
                partial(moved, key="predicted_drift"),
                "nats per answer token, of this layer alone; layers can pull together",
            ),
            f"leak{of}": (partial(moved, key="leak"), "tr(A C Aᵀ): the mean square of what A reads of the inputs"),
        }
    for ability in dict.fromkeys(name for layer in record["layers"].values() for name in layer.get("kept", ())):

        def kept(layer: Mapping[str, Any], ability: str = ability) -> float | None:
            return layer.get("kept", {}).get(ability)

        label = f"predicted drift, kept {ability}" if ability else "predicted drift"
        measures[label] = (kept, "as its training predicted it at its end, nats per answer token")
    measures |= {
        "‖ΔW‖ / ‖W‖": (lambda layer: layer.get("relative"), "size of the change over that of the weight"),
        "‖ΔW‖": (lambda layer: layer["norm"], "size of the change: its Frobenius norm"),
        "rank": (lambda layer: layer["r"], ""),
        "effective rank": (
            lambda layer: layer["effective_rank"],
            "(Σσ²)² / Σσ⁴ of ΔW: about how many directions it has",
        ),
        "rounded away": (lambda layer: layer.get("rounded_away"), "share of ‖ΔW‖ that merging loses"),
        "‖A‖": (lambda layer: layer["norm_A"], ""),
        "‖B‖": (lambda layer: layer["norm_B"], ""),
    }
    layers = record["layers"].values()
    return {label: m for label, m in measures.items() if any(m[0](layer) is not None for layer in layers)}
