"""The figures of `corda inspect` as PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .figures import change_map, compactness_map, spectrum_points, truncation_data
from .pictures import fitting, look, save_picture, style, write_picture

PANELS = 12  # at most so many layers in one picture


def draw_contexts(
    folder: Path,
    record: Mapping[str, Any],
    spectra: Mapping[str, Mapping[str, Tensor]],
    maps: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write spectra, covariances, compactness, and, if they are known, similarity and truncation."""
    with style() as plt:
        layers = list(spectra)[:PANELS]
        figure, axes = _panels(plt, len(layers))
        for ax, layer in zip(axes, layers):
            for i, (way, sigma) in enumerate(spectra[layer].items()):
                points = spectrum_points(sigma)
                ax.plot([x for x, _ in points], [y for _, y in points], label=way, **look(i) | {"marker": ""})
            ax.set(title=fitting(layer, 48), xlabel="component", ylabel="σ / σ₁")
            _logarithmic(ax)
        save_picture(figure, folder / "spectra")

        names, layers = record["similarity"]["contexts"], list(maps)[:PANELS]
        if layers:
            size = (2.6 * len(names) + 1.4, 2.6 * len(layers))
            figure, grid = plt.subplots(len(layers), len(names), figsize=size, squeeze=False, layout="constrained")
            for row, layer in zip(grid, layers):
                low, high = _limits([cells.log10() for cells in maps[layer].values()])
                for ax, name in zip(row, names):
                    image = ax.imshow(maps[layer][name].clamp(min=1e-30).log10(), vmin=low, vmax=high, cmap="viridis")
                    ax.set(title=f"{fitting(layer, 48)}\n{fitting(name)}", xticks=[], yticks=[])
                    ax.title.set_fontsize(8)
                figure.colorbar(image, ax=list(row), label="log10 mean |C|", shrink=0.8)
            write_picture(figure, folder / "covariances")

        draw_maps(plt, folder / "compactness", compactness_map(record), "log10 π")

        values = record["similarity"]["channels_at_one_scale"]
        if len(names) > 1 and values:
            fitted = list(map(fitting, names))
            longest = max(map(len, fitted))
            size = (1.3 * len(names) + 0.08 * longest + 1.4, 1.1 * len(names) + 0.04 * longest + 1)
            figure, ax = plt.subplots(figsize=size, layout="constrained")
            image = ax.imshow(values, vmin=0, vmax=1, cmap="viridis")
            ax.set_xticks(range(len(names)), fitted, rotation=30, ha="right")
            ax.set_yticks(range(len(names)), fitted)
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
            figure.colorbar(image, label="similarity, channels at one scale")
            write_picture(figure, folder / "similarity")

        if "truncation" in record:
            texts = truncation_data(record["truncation"])
            figure, axes = _panels(plt, len(texts))
            for ax, (text, curves) in zip(axes, texts.items()):
                for i, (way, points) in enumerate(curves.items()):
                    ax.plot([x for x, *_ in points], [y for _, y, _ in points], label=way, **look(i))
                shares = record["truncation"]["levels"][-1] < 1
                ax.set(
                    title=fitting(text),
                    xlabel="discarded " + ("share" if shares else "components"),
                    ylabel="perplexity",
                )
                _logarithmic(ax)
            save_picture(figure, folder / "truncation")


def draw_change(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the maps of what an adapter changed."""
    with style() as plt:
        draw_maps(plt, folder / "change", change_map(record))


def draw_maps(plt: Any, path: Path, found: Mapping[str, Any], label: str = "") -> None:
    """A map of the model for each name: blocks from left to right, kinds of layers from top to bottom.

    Args:
        label: of the one scale of all maps; without it each has its own.
    """
    import numpy as np

    arrays = {name: np.array(rows, dtype=float) for name, rows in found["values"].items()}
    arrays = {name: array for name, array in arrays.items() if np.isfinite(array).any()}
    if not arrays:
        return
    low, high = (
        pick([float(pick_nan(a)) for a in arrays.values()]) for pick, pick_nan in ((min, np.nanmin), (max, np.nanmax))
    )
    size = (0.22 * len(found["blocks"]) + 4.4, (0.26 * len(found["kinds"]) + 0.9) * len(arrays) + 0.4)
    figure, grid = plt.subplots(len(arrays), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (name, array) in zip(grid[:, 0], arrays.items()):
        limits = {"vmin": low, "vmax": high} if label else {}
        image = ax.imshow(array, cmap="viridis", aspect="auto", **limits)
        ax.set(title=fitting(name), xlabel="block")
        every = -(-len(found["blocks"]) // 16)
        blocks = range(0, len(found["blocks"]), every)
        ax.set_xticks(blocks, [found["blocks"][i].rpartition(".")[2] for i in blocks])
        ax.set_yticks(range(len(found["kinds"])), found["kinds"], fontsize=8)
        if not label:
            figure.colorbar(image, ax=ax)
    if label:
        figure.colorbar(image, ax=list(grid[:, 0]), label=label)
    write_picture(figure, path)


def _logarithmic(ax: Any) -> None:
    """A logarithmic axis with plain numbers, as pictures have no mathematical text; also where it is no decade long."""
    from matplotlib.ticker import LogLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def _limits(logs: Sequence[Tensor]) -> tuple[float, float]:
    high = max(float(x.max()) for x in logs)
    return max(min(float(x.min()) for x in logs), high - 8), high


def _panels(plt: Any, count: int) -> tuple[Any, list[Any]]:
    wide = min(3, count)
    high = -(-count // wide)
    figure, grid = plt.subplots(high, wide, figsize=(4.2 * wide + 2.8, 3.4 * high), squeeze=False, layout="constrained")
    for ax in grid.flat[count:]:
        ax.remove()
    return figure, list(grid.flat[:count])
