"""What `corda inspect` found, as a page, pictures and numbers."""

import base64
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import CordaError, InspectConfig, ModelConfig
from ..devices import machine_name
from ..files import write_json, write_text
from ..inspection.contexts import CELLS
from .figures import (
    POINTS,
    change_map,
    change_measures,
    compactness_map,
    level_text,
    perplexity,
    spectrum_points,
    truncation_data,
)
from .html import embedded, filled_page, html_pairs, without_nan
from .inspected_pictures import draw_change, draw_contexts
from .text import number, plural

LARGEST_PAGE = 20e6  # bytes of its figures


def check_page(layers: int, contexts: int, ways: int) -> None:
    """Raises CordaError if the page for so many layers, contexts and spectra of a layer would be too large."""
    each = 18 * POINTS * ways + 4 * CELLS**2 // 3 * contexts
    if layers * each > LARGEST_PAGE:
        raise CordaError(
            f"the page would have about {layers * each / 1e6:.0f} MB, for {plural(layers, 'layer')} with {ways} "
            f"spectra and {plural(contexts, 'covariance')} each: leave some --layers out, so that at most "
            f"{max(1, int(LARGEST_PAGE / each))} are shown"
        )


def about_run(
    adapter: Path | None, source: ModelConfig | None, config: InspectConfig, command: str, seconds: float
) -> dict[str, Any]:
    """What was run, for the record."""
    packages = ("corda-lora", "torch", "transformers", "peft")
    model = source and source.model
    return {
        "name": os.path.basename(os.path.normpath(adapter or model or "")),
        "adapter": adapter and str(adapter),
        "model": model,
        "command": command,
        "machine": machine_name(),
        "versions": {package: version(package) for package in packages},
        "config": asdict(config),
        "seconds": seconds,
    }


def write_contexts(
    folder: Path,
    record: dict[str, Any],
    spectra: Mapping[str, Mapping[str, Tensor]],
    maps: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write report.html, inspect.json, inspect.safetensors, and each figure as PNG and SVG.

    Args:
        record, spectra, maps: of an `Inspection`, the record with name, command, machine and versions.
    """
    write_json(folder / "inspect.json", without_nan(record))
    tensors = {f"spectrum|{layer}|{way}": sigma for layer, by in spectra.items() for way, sigma in by.items()}
    tensors |= {f"covariance|{layer}|{name}": cells for layer, by in maps.items() for name, cells in by.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "inspect.safetensors")
    write_text(folder / "report.html", _page(record, spectra, maps))
    draw_contexts(folder, record, spectra, maps)


def write_adapter(folder: Path, record: dict[str, Any], values: Mapping[str, Tensor]) -> None:
    """Write report.html, inspect.json, inspect.safetensors, and the map of the change as PNG and SVG.

    Args:
        record, values: what `inspect_adapter` gives, the record with what `about_run` says.
    """
    write_json(folder / "inspect.json", without_nan(record))
    save_file({f"singular values|{name}": sigma for name, sigma in values.items()}, folder / "inspect.safetensors")
    first, *more = adapter_sentences(record)
    measures = change_measures(record)
    rows = {layer: [value(about) for value, _ in measures.values()] for layer, about in record["layers"].items()}
    shown = "".join(f" · {c['name']} ({c['samples']:,} samples, {c['tokens']:,} tokens)" for c in record["contexts"])
    parts = {
        **_parts(record, [first, *more], f"{plural(len(record['layers']), 'layer')}{shown} · {record['machine']}"),
        "meanings": "".join(f"<li>{escape(f'{label}: {what}')}</li>" for label, (_, what) in measures.items() if what),
        "similarity": "",
        "inputs": "",
        "tables": _table("Layers", "layer", list(measures), rows, number) + _served_table(record),
        "data": embedded({"titles": {}, "maps": {"change": change_map(record)}}),
    }
    write_text(folder / "report.html", filled_page("inspect.html", parts))
    draw_change(folder, record)


def _served_table(record: Mapping[str, Any]) -> str:
    """Which ability each layer serves, and how many of its components. "" without several abilities."""
    served = {layer: about["serves"] for layer, about in record["layers"].items() if "serves" in about}
    names = [context["name"] for context in record["contexts"]]
    if not served:
        return ""
    rows = {
        layer: [
            *(found["shares"].get(name, math.nan) for name in names),
            *(found["components"].count(name) for name in names),
        ]
        for layer, found in served.items()
    }
    heads = [f"share of what it moves, {name}" for name in names] + [f"components, {name}" for name in names]
    return _table("Abilities", "layer", heads, rows, number)


# --- sentences -------------------------------------------------------------------------------------------------------


def context_sentences(record: Mapping[str, Any]) -> list[str]:
    """What the numbers say, the most telling first."""
    said = []
    for text in (record.get("truncation") or {"base": {}})["base"]:
        cut = record["truncation"]
        best: dict[str, tuple[float, str]] = {}  # of each kind of way
        for curve in cut["curves"]:
            way, _, rest = curve["label"].partition(", ")
            found = perplexity(curve["loss"][text][-1]), f"{way} ({rest})" if rest else way
            best[way] = min(best.get(way, found), found)
        each = ", ".join(f"{number(value)} by {label}" for value, label in sorted(best.values()))
        said.append(
            f"Without the smallest {level_text(cut['levels'][-1])} of each layer’s components the perplexity on {text} "
            f"is {each}; whole, it is {number(perplexity(cut['base'][text]))}."
        )
    names, values = record["similarity"]["contexts"], record["similarity"]["channels_at_one_scale"]
    pairs = sorted((values[i][j], names[i], names[j]) for i, j in combinations(range(len(names)), 2)) if values else []
    if len(pairs) == 1:
        value, a, b = pairs[0]
        said.append(f"The similarity of {a} and {b} is {value:.2f}; at 1 they light up the same channels alike.")
    elif pairs:
        (low, a, b), (high, c, d) = pairs[0], pairs[-1]
        said.append(f"{c} and {d} use the channels most alike ({high:.2f} of 1), {a} and {b} least ({low:.2f}).")
    for name in names:
        pis = {layer: about["log10_pi"][name] for layer, about in record["layers"].items() if about["log10_pi"]}
        if pis:
            low, high = min(pis, key=pis.__getitem__), max(pis, key=pis.__getitem__)
            said.append(
                f"On {name}, log10 π runs from {pis[low]:.2f} ({low}) to {pis[high]:.2f} ({high}); "
                "smaller is more compact."
            )
    return said


def adapter_sentences(record: Mapping[str, Any]) -> list[str]:
    """What the numbers say of an adapter, the most telling first."""
    layers = record["layers"]
    ranks, squares = [about["r"] for about in layers.values()], {n: about["norm"] ** 2 for n, about in layers.items()}
    parameters = sum(about["r"] * sum(about["shape"]) for about in layers.values())
    of_ranks = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    kinds: dict[str, float] = defaultdict(float)
    for name, square in squares.items():
        kinds[layers[name]["kind"]] += square
    kind, whole = max(kinds, key=kinds.__getitem__), sum(squares.values())
    size = f"{plural(len(layers), 'layer')} at {of_ranks}, with {parameters:,} parameters"
    # In a start the factors are zero, or their halves make up for each other, but for rounding.
    trained = any(x["norm"] > 1e-9 * x["scale"] * x["norm_A"] * x["norm_B"] for x in layers.values())
    said = [f"The adapter is of {size}. It is a start, which nothing has trained: it changes nothing yet."]
    if trained:
        share = f"{100 * kinds[kind] / whole:.0f} % of the change, by squares, is in {kind}"
        said = [f"The adapter changes {size}. {share}."]
    if record["residual"]:
        said.append(
            "It holds a part of the model that its quantized base lacks: what is said of its change counts that part, "
            "beside what training has changed."
        )
    for label, (value, _) in change_measures(record).items() if trained else ():
        found = {name: x for name, about in layers.items() if (x := value(about)) is not None}
        most = max(found, key=found.__getitem__)
        if label.startswith("‖ΔW X‖"):
            where = label.rpartition(", ")[2]
            said.append(
                f"On {where} a layer’s outputs move by {number(100 * median(found.values()))} % of their size in the "
                f"median layer, most in {most} ({number(100 * found[most])} %)."
            )
        elif label.startswith("predicted drift"):
            total = sum(found.values())
            where = f" on {label.rpartition(', ')[2]}" if "," in label else " on the context that was to be kept"
            share = f", {100 * found[most] / total:.0f} % of it in {most}" if total else ""
            said.append(f"Predicted drift{where}: {number(total)} nats per answer token{share}.")
        elif label == "‖ΔW‖ / ‖W‖":
            lost = median([about["rounded_away"] or 0.0 for about in layers.values()])
            rounded = (
                f"; {number(100 * lost)} % of that change is rounded away in the model’s dtype" if lost > 1e-3 else ""
            )
            said.append(
                f"Merging changes a weight by {number(100 * median(found.values()))} % of its length in the median "
                f"layer, most in {most} ({number(100 * found[most])} %){rounded}."
            )
    said += _served_sentences(layers) if trained else []
    if record.get("tied"):
        said.append(f"{record['tied'][0]} shares its weight with the embeddings, which a merge would change, too.")
    if record["left_out"]:
        count = len(record["left_out"])
        said.append(
            f"Not looked at: {plural(count, 'tensor')} beside the layers’ factors, such as {record['left_out'][0]}."
        )
    return said


def _served_sentences(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which abilities the components serve, and the layers that serve each most."""
    served = {layer: about["serves"] for layer, about in layers.items() if "serves" in about}
    if not served:
        return []
    of_each = Counter(name for found in served.values() for name in found["components"] if name)
    total, said = sum(of_each.values()), []
    if total:
        parts = ", ".join(
            f"{100 * count / total:.0f} % of the components move {n}" for n, count in of_each.most_common()
        )
        said.append(f"Beside the layers’ own outputs, {parts} most.")
    for name in dict.fromkeys(name for found in served.values() for name in found["shares"]):
        shares = {layer: found["shares"].get(name, 0.0) for layer, found in served.items()}
        most = max(shares, key=shares.__getitem__)
        said.append(f"{most} serves {name} most of all layers: {100 * shares[most]:.0f} % of what it moves.")
    return said


# --- the page --------------------------------------------------------------------------------------------------------


def _page(
    record: Mapping[str, Any],
    spectra: Mapping[str, Mapping[str, Tensor]],
    maps: Mapping[str, Mapping[str, Tensor]],
) -> str:
    contexts = record["contexts"]
    shown = ", ".join(f"{c['name']} ({c['samples']:,} samples, {c['tokens']:,} tokens)" for c in contexts)
    about = f"{plural(len(record['layers']), 'layer')} · {shown} · {record['machine']}"
    parts = {
        **_parts(record, context_sentences(record), about),
        "meanings": "",
        "similarity": _similarity_table(record),
        "inputs": str(record["similarity"]["inputs"]),
        "tables": _tables(record),
        "data": embedded(_context_data(record, spectra, maps)),
    }
    return filled_page("inspect.html", parts)


def _parts(record: Mapping[str, Any], sentences: Sequence[str], about: str) -> dict[str, str]:
    """What both pages have."""
    first, *more = sentences
    return {
        "name": escape(record["name"]),
        "first": escape(first),
        "more": "".join(f"<li>{escape(sentence)}</li>" for sentence in more),
        "about": escape(about),
        "command": escape(record["command"]),
        "circumstances": html_pairs(circumstances(record)),
    }


def circumstances(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, machine, versions and settings, as pairs."""
    pairs = [(name, record[name]) for name in ("adapter", "model", "machine") if record[name]]
    pairs += [(package, version) for package, version in record["versions"].items()]
    for name, value in record["config"].items():
        items = value if isinstance(value, list) else [value]
        given = [
            {k: v for k, v in x.items() if v not in (None, "", False)} if isinstance(x, dict) else x for x in items
        ]
        pairs += [(name, str(item)) for item in given if item not in (None, "", {})]
    return [*pairs, ("seconds", f"{record['seconds']:.1f}")]


def _similarity_table(record: Mapping[str, Any]) -> str:
    """Contexts by contexts: with all channels at one scale, and in small print as they are. "" for one context."""
    names, found = record["similarity"]["contexts"], record["similarity"]
    if len(names) < 2 or not found["as_it_is"]:
        return ""
    rows = []
    for i, name in enumerate(names):
        cells = "".join(
            f'<td data-key="{value:.6f}" style="--heat:{max(0.0, value) * 100:.0f}%">{value:.3f}'
            f"<small>{found['as_it_is'][i][j]:.3f}</small></td>"
            for j, value in enumerate(found["channels_at_one_scale"][i])
        )
        rows.append(f'<tr><th scope="row" data-key="{escape(name)}">{escape(name)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in ("context", *names))
    return (
        f'<table class="heat"><caption>Similarity of contexts</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _tables(record: Mapping[str, Any]) -> str:
    tables = []
    if "truncation" in record:
        cut = record["truncation"]
        for text, base in cut["base"].items():
            heads = ["discarded: none", *map(level_text, cut["levels"])]
            rows = {c["label"]: [base, *c["loss"][text]] for c in cut["curves"]}
            tables.append(_table(f"Perplexity on {text}", "way", heads, rows, lambda x: number(perplexity(x))))
    names = record["similarity"]["contexts"]
    rows = {
        layer: [*about["shape"], *(about["log10_pi"].get(name, math.nan) for name in names)]
        for layer, about in record["layers"].items()
    }
    heads = ["outputs", "inputs", *(f"log10 π, {name}" for name in names)]
    tables.append(_table("Layers", "layer", heads, rows, lambda x: f"{x:,}" if isinstance(x, int) else number(x)))
    return "".join(tables)


def _table(
    caption: str, first: str, heads: Sequence[str], rows: Mapping[str, Sequence[Any]], text: Callable[[Any], str]
) -> str:
    """A table in a section that opens at a click; its columns can be sorted."""
    head = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in (first, *heads))
    lines = []
    for name, values in rows.items():
        keys = ["" if value is None else f' data-key="{value:.6g}"' for value in values]
        cells = "".join(f"<td{key}>{escape(text(value))}</td>" for key, value in zip(keys, values))
        lines.append(f'<tr><th scope="row" data-key="{escape(name)}">{escape(name)}</th>{cells}</tr>')
    return (
        f'<details class="card"><summary>{escape(caption)}</summary><div class="scroll tall" tabindex="0" '
        f'role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _context_data(
    record: Mapping[str, Any],
    spectra: Mapping[str, Mapping[str, Tensor]],
    maps: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """What the page's script draws."""
    ways = list(next(iter(spectra.values()), {}))
    ways += [c["label"] for c in record.get("truncation", {"curves": []})["curves"] if c["label"] not in ways]
    names = record["similarity"]["contexts"]
    data: dict[str, Any] = {
        "titles": {way: way for way in ways},
        "contexts": names,
        "spectra": {layer: {way: spectrum_points(sigma) for way, sigma in by.items()} for layer, by in spectra.items()},
        "covariances": {layer: _images(by) for layer, by in maps.items()},
        "maps": {"compactness": compactness_map(record)},
    }
    if "truncation" in record:
        data["truncation"] = truncation_data(record["truncation"])
        data["shares"] = record["truncation"]["levels"][-1] < 1
    return data


def _images(by_context: Mapping[str, Tensor]) -> dict[str, Any]:
    """Pictures of a layer's covariances on one logarithmic scale, from 0 to 255, in base64."""
    cells = {name: cell.double().clamp(min=1e-300).log10() for name, cell in by_context.items()}
    high = max(float(cell.max()) for cell in cells.values())
    low = max(min(float(cell.min()) for cell in cells.values()), high - 8)
    images = {
        name: base64.b64encode(_bytes((cell - low) / ((high - low) or 1.0))).decode() for name, cell in cells.items()
    }
    return {"low": low, "high": high, "size": len(next(iter(cells.values()))), "images": images}


def _bytes(shares: Tensor) -> bytes:
    return bytes((255 * shares.clamp(0, 1)).round().to(torch.uint8).flatten().tolist())
