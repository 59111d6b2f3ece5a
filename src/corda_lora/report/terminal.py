"""The tables that `corda init`, `corda plan`, `corda eval` and `corda export` print."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..evaluation.measures import MEASURES, OF_LABELS, Measure
from ..preprocess.plan import Plan, size_text

if TYPE_CHECKING:
    from ..compare.plan import ComparisonPlan
    from ..config import CordaConfig
    from ..training.plan import SharedPlan


def start_table(start: Any) -> Table:
    """One row for each kind of layer of an adapter's start: shape, ranks, and what the adapter holds of the context;
    or, where it is a fit of what quantization lost, and holds no components, what that leaves.

    Args:
        start: what `preprocess` returns.
    """
    config, totals = start.config, start.record["totals"]
    kinds = defaultdict(list)
    for name, layer in start.layers.items():
        kinds[name.rpartition(".")[2]].append(layer.record.as_json())
    holds: dict[str, str] = {}
    if config.fold:
        holds = {"error": "what quantization lost and the adapter does not hold, relative, in the metric of the fit"}
    elif any(layer.record.output_energy for layer in start.layers.values()):
        energy = "share of the context's output energy tr(W C Wᵀ) in the components"
        holds = {"energy": energy, "leak": "tr(A C Aᵀ) / tr(W C Wᵀ)"}
    rounds = {"rounds": "layers that chose each"} if config.rounds > 1 else {}
    table = Table(
        title=f"{choices_of(config)}, {totals['parameters']:,} parameters",
        caption="; ".join(f"{column}: {meaning}" for column, meaning in (holds | rounds).items()),
    )
    for column in ("layers", "kind", "shape", "rank", *rounds, *holds, "‖A‖", "‖B‖"):
        table.add_column(column, justify="left" if column in ("kind", "shape") else "right", no_wrap=column == "kind")

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return sum(values) / len(values)

    def held(records: list[dict[str, Any]]) -> list[str]:
        if config.fold:
            return [f"{mean(r['context_error'] for r in records):.2e}"]
        seen = [r for r in records if r.get("output_energy")]
        shares = [(r["energy_share"], r["leak"] / r["output_energy"]) for r in seen]
        # Rounding may make an energy of nothing a little less than 0.
        return [f"{max(0.0, mean(each)):.2e}" for each in zip(*shares)] or [""] * len(holds)

    for kind, records in kinds.items():
        ranks = [r["r"] for r in records]
        chosen = Counter(r.get("round") for r in records)
        table.add_row(
            str(len(records)),
            kind,
            " × ".join(map(str, records[0]["shape"])),
            str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)} ({mean(ranks):.0f})",
            *([" ".join(str(chosen[i]) for i in range(config.rounds))] if rounds else []),
            *held(records),
            f"{mean(r['norm_A'] for r in records):.3g}",
            f"{mean(r['norm_B'] for r in records):.3g}",
        )
    return table


def choices_of(config: CordaConfig) -> str:
    """Which start it is, in the words of the options that choose it."""
    return f"{config.preset}, {config.mode}, {config.split}, {config.orientation}"


def order_table(order: Any, gains: Mapping[str, Any]) -> Table:
    """What an adapter in order keeps at its rank, at half of it, and so on.

    Args:
        order: an `adapters.order.Order`.
        gains: of each layer's components, (r,).
    """
    total = sum(float(gain.sum()) for gain in gains.values())
    table = Table(
        title=f"{len(gains)} layers in order",
        caption="gain: predicted, nats per answer token; what is lost of it is KL(whole‖cut)",
    )
    for column in ("mean rank", "ranks", "layers without any", "gain"):
        table.add_column(column, justify="right")
    R = order.full
    while R >= 1:
        ranks = order.ranks(R)
        kept = sum(float(gain[: ranks[name]].sum()) for name, gain in gains.items())
        table.add_row(
            f"{R:.3g}",
            f"{min(ranks.values())}–{max(ranks.values())}",
            str(sum(r == 0 for r in ranks.values())),
            f"{kept:.3g} ({kept / total if total else 1:.1%})",
        )
        R /= 2
    return table


def start_cost(start: Any) -> str:
    """How long an adapter's start took, stage by stage, and the accelerator memory that it needed."""
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in start.took["seconds"].items())
    peak = max(start.took.get("peak_accelerator_bytes", {"": 0}).values())
    return stages + (f"; accelerator at most {peak / 2**30:.2f} GiB" if peak else "")


def plan_lines(plan: Plan, config: CordaConfig) -> list[Table | str]:
    """The plan of a start as lines and a table to print."""
    on_cpu = plan.machine.accelerator is None
    table = Table()
    for column in ("stage", "time", *(() if on_cpu else ("accelerator",)), "CPU"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, seconds, accelerator, cpu in plan.stages:
        table.add_row(
            name, time_text(seconds), *(size_text(x) if x else "" for x in ((cpu,) if on_cpu else (accelerator, cpu)))
        )
    share = plan.adapter_parameters / plan.parameters
    waiting = "hidden states" if plan.park == "device" else "hidden states and covariances"
    finished = plan.adapter_bytes + plan.statistics_bytes + plan.base_bytes
    return [
        f"on {plan.machine.name}",
        table,
        f"start: {choices_of(config)}",
        f"model: {plan.parameters:,} parameters",
        f"adapter: {plan.adapter_parameters:,} parameters ({share:.2%}), a file of {size_text(plan.adapter_bytes)}",
        f"context: {plan.tokens.total:,} tokens; {size_text(plan.parked_bytes)} of {waiting} wait (park {plan.park})",
        *([f"quantized base: {size_text(plan.base_bytes)}"] if plan.base_bytes else []),
        f"output: {size_text(finished)}; on the disk at once, with OUTPUT.work: {size_text(plan.disk_bytes)}",
        f"time: about {time_text(plan.seconds)}, for {plan.flops:.2e} floating-point operations",
    ]


def shared_plan_lines(plan: SharedPlan, config: CordaConfig) -> list[Table | str]:
    """The plan of several GPUs as lines and a table to print."""
    table = Table()
    for column in ("stage", "time", "a GPU", "a host", "sent by a GPU"):
        table.add_column(column, justify="left" if column == "stage" else "right", overflow="fold")
    for stage in [*plan.preparation, *(step._replace(name=f"a step, {step.name}") for step in plan.steps)]:
        gpu, host, sent = (size_text(x) if x and x == x else "" for x in stage[2:])
        table.add_row(
            stage.name, time_text(stage.seconds), gpu if plan.fits(stage) else f"{gpu} (too much)", host, sent
        )
    gpus = f"{plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"
    a_host = gpus if plan.hosts == 1 else f"{gpus} in {plan.hosts} hosts"
    return [
        f"on {a_host}, each as of {plan.machine.name}",
        table,
        f"start: {choices_of(config)}",
        f"context: {plan.tokens.total:,} tokens; preparation: about {time_text(plan.seconds)}",
        f"a step: {plan.step_tokens:,} tokens on each GPU (--batch_tokens), with gradient checkpointing",
        *(["not counted: what the price on drift adds to a step"] if config.keep else []),
        f"assumed: a GPU sends {size_text(plan.link)} a second, and every host reads its part of the checkpoint",
    ]


def comparison_plan_lines(plan: ComparisonPlan) -> list[Table | str]:
    """The plan of a comparison as lines and a table to print."""
    table = Table()
    for column in ("entry", "runs", "start: time", "memory", "disk", "training: memory, at least", "time of a run"):
        table.add_column(column, justify="left" if column == "entry" else "right", overflow="fold")
    for name, runs, seconds, memory, disk, trained, run_seconds in plan.entries:
        start = ("", "", "") if seconds is None else (time_text(seconds), size_text(memory or 0), size_text(disk or 0))
        table.add_row(
            name, str(runs), *start, size_text(trained), "" if run_seconds is None else time_text(run_seconds)
        )
    lines: list[Table | str] = [
        f"on {plan.machine.name}",
        table,
        f"model: {plan.parameters:,} parameters, {size_text(plan.weights)}, which the memory of a start is beside",
        f"disk: {size_text(sum(entry.disk_bytes or 0 for entry in plan.entries))} for the starts",
    ]
    if plan.steps is None:
        lines.append("time: unknown, as nothing says how many samples the data has: give train.max_steps, or a file")
    else:
        lines.append(
            f"time: at least {time_text(plan.seconds or 0)}, one run after the other, {plan.steps:,} steps each"
        )
    lines.append(
        "not counted: activations, measuring, and the starts without a figure. Samples on the hub count as max_length "
        "tokens; shorter ones take less"
    )
    if plan.too_large:
        lines.append(f"do not fit: {', '.join(plan.too_large)}")
    return lines


def time_text(seconds: float) -> str:
    if not seconds >= 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def results_table(results: dict[str, Any]) -> Table:
    """One row for each measure and data set of `evaluate`'s results; base and tuned model side by side."""
    rows: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    of_labels = {measure.name: measure for measure in OF_LABELS}
    shown: dict[str, Measure] = {}
    for kind, by_data in results.items():
        for data, by_side in by_data.items():
            for side, values in by_side.items():
                for name, value in values.items():
                    if MEASURES[name].per:  # a count says nothing about the model
                        rows[kind, name, data][side] = value
                        labelled = kind == "learn" and "tokens" not in values
                        shown[name] = of_labels[name] if labelled else MEASURES[name]
    table = Table(caption=caption([shown[name] for name in MEASURES if name in shown]))
    for column in ("measure", "data", "base", "tuned"):
        table.add_column(column, justify="right" if column in ("base", "tuned") else "left")
    for (kind, name, data), values in rows.items():
        measure = MEASURES[name]
        cells = [format(values[side], measure.form) if side in values else "" for side in ("base", "tuned")]
        table.add_row(f"{kind}: {measure.label}", os.path.basename(data), *cells)
    return table


def caption(measures: Iterable[Measure]) -> str:
    """The measures' units, and their meanings where the names do not say enough."""
    units = defaultdict(list)
    for measure in measures:
        units[measure.unit].append(measure.label)
    parts = [f"{' and '.join(names)} in {unit}" for unit, names in units.items() if unit]
    parts += [f"{measure.label} = {measure.meaning}" for measure in measures if measure.meaning]
    return "; ".join(parts)
