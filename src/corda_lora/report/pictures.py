"""The two charts of a comparison as PNG and SVG, and the style of all pictures."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..compare.frontier import Point, abilities, lower_hull, points, task
from .charts import best_curves, curves_edge, frontier_edge
from .text import label, loss_unit, titles_of

# Method i has color i % 8. The second eight methods have hollow markers, dashed lines and a different marker. So
# sixteen methods can be told apart, and markers and dashes alone still tell eight apart. report.html uses the same
# markers, and has its own colors for a dark page.
COLORS = ("#0072b2", "#d55e00", "#00805c", "#b0508c", "#9a6f00", "#3a9bdc", "#4d4d4d", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def look(i: int) -> dict[str, Any]:
    """The color, marker and line of the i-th method."""
    color, hollow = COLORS[i % 8], i % 16 >= 8
    return {
        "color": color,
        "marker": MARKERS[(i + 4) % 8 if hollow else i % 8],
        "markerfacecolor": "white" if hollow else color,
        "linestyle": "--" if hollow else "-",
        "linewidth": 1.3,
        "markersize": 5,
    }


def draw_frontier(ax: Any, measured: list[Point], edge: float, title: str, style: dict[str, Any]) -> None:
    """Draw a method's lower hull, its points up to a task loss of `edge`, and the ranges of their seeds."""
    if not measured:
        return
    hull, shown = lower_hull(measured), [p for p in measured if p.loss <= edge]
    ax.plot([p.loss for p in hull], [math.exp(p.log_drift) for p in hull], label=title, **style)
    ax.plot([p.loss for p in shown], [math.exp(p.log_drift) for p in shown], **style | {"linestyle": ""})
    for p in shown:
        xs, ys = zip(*p.seeds.values())
        middle, x, y = math.exp(p.log_drift), (min(xs), max(xs)), (math.exp(min(ys)), math.exp(max(ys)))
        ax.plot(x, (middle, middle), color=style["color"], linewidth=0.8)
        ax.plot((p.loss, p.loss), y, color=style["color"], linewidth=0.8)


def draw_curves(ax: Any, comparison: dict[str, Any], method: str, title: str, style: dict[str, Any]) -> None:
    """Draw a method's mean learning curve at its best rate, and the range of its seeds."""
    rate, mean, curves = best_curves(comparison, method)
    if not mean:
        return
    steps = [point.step for point in mean]
    losses = [[point.loss for point in seeds] for seeds in zip(*curves)]
    ax.plot(steps, [point.loss for point in mean], label=f"{title}, {rate}", **style)
    ax.fill_between(
        steps, list(map(min, losses)), list(map(max, losses)), color=style["color"], alpha=0.15, linewidth=0
    )


def draw(folder: Path, comparison: dict[str, Any]) -> None:
    """Write the two charts as PNG and SVG. The same comparison gives the same bytes."""
    from matplotlib.ticker import LogLocator

    methods, names, data = titles_of(comparison), abilities(comparison), task(comparison)
    with style() as plt:
        if names:
            wide = min(3, len(names))
            high = -(-len(names) // wide)
            size = (4.2 * wide + 2.8, 4.4 * high)
            figure, grid = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
            for ax, ability in zip(grid.flat, names):
                measured = {title: points(comparison, method, ability) for method, title in methods.items()}
                edge = frontier_edge(list(measured.values()))
                for i, (title, ps) in enumerate(measured.items()):
                    draw_frontier(ax, ps, edge, title, look(i))
                say_outside(ax, [title for title, ps in measured.items() if any(p.loss > edge for p in ps)])
                ax.set(yscale="log", title=fitting(label(comparison, ability)), xlabel=f"{data} loss (nats per token)")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("")
                ax.set_ylabel("drift (nats per token)" if ax in grid[:, 0] else "")
            for ax in grid.flat[len(names) :]:
                ax.remove()
            save_picture(figure, folder / "frontier")
        figure, ax = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
        for i, (method, title) in enumerate(methods.items()):
            draw_curves(ax, comparison, method, title, look(i))
        means = {title: best_curves(comparison, method)[1] for method, title in methods.items()}
        edge, low = curves_edge(list(means.values())), min((p.loss for mean in means.values() for p in mean), default=0)
        if outside := [title for title, mean in means.items() if any(p.loss > edge for p in mean)]:
            ax.set_ylim(low - 0.05 * (edge - low), edge)
            say_outside(ax, outside)
        ax.set(xlabel="step", ylabel=f"held-out {data} loss ({loss_unit(comparison)})")
        save_picture(figure, folder / "curves")


@contextmanager
def style() -> Iterator[Any]:
    """Yield matplotlib.pyplot, set up for files of the same bytes each time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # text stays text: small, searchable, in the reader's own font; a dollar in a name is no mathematics
    settings = {"svg.hashsalt": "corda", "svg.fonttype": "none", "axes.titlesize": 11, "text.parse_math": False}
    with plt.rc_context(settings):
        yield plt


def fitting(name: str, most: int = 40) -> str:
    """The name, without its middle if it would not fit beside or above a panel."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most // 2 :]}"


def say_outside(ax: Any, titles: list[str]) -> None:
    """Name the methods with points outside the chart."""
    if titles:
        text = "some points lie outside: " + ", ".join(titles)
        ax.text(0.99, 0.99, text, transform=ax.transAxes, ha="right", va="top", fontsize=8, alpha=0.7)


def save_picture(figure: Any, path: Path) -> None:
    """Add the legend, and write PNG and SVG."""
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        entries |= {title: line for line, title in zip(*ax.get_legend_handles_labels())}
    if entries:
        names = [fitting(title, 60) for title in entries]
        figure.legend(entries.values(), names, frameon=False, fontsize=9, loc="outside right center")
    write_picture(figure, path)


def write_picture(figure: Any, path: Path) -> None:
    """Write PNG and SVG."""
    import matplotlib.pyplot as plt

    figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")  # as large as its names need
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
