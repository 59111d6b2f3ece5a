"""Why does PEFT's covariance cost drift in kpm? It decides how long A is in each layer, and little else (see
`leak_vs_peft.py`). Five starts that are the same function are trained as `corda demo` trains, at two learning rates.

    python benchmarks/scale_of_c.py --model MODEL --data FOLDER [--starts START ...]

- *paper*: that of `corda init`.
- *paper, a third*: the same, with A a third as long in every layer and B three times as long.
- *PEFT's scale*: A and B as long as PEFT's covariance makes them (by the drop-in).
- *PEFT's scale, cut*: the same, but rows of A longer than twice the median of all layers are cut to that length.
- *even*: every row of A as long as that median, in every layer.

FOLDER is written by `write_demo_data.py`. Compare the drifts of rows with about the same task loss. One seed.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from leak_vs_peft import factors_of

from corda_lora.adapters.lora import install
from corda_lora.config import CordaConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.layer import LayerStart
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.training.train import train

RATES = {
    "PEFT's scale": [1e-4, 2e-4],
    "PEFT's scale, cut": [1e-4, 2e-4],
    "paper": [5e-5, 1e-4],
    "paper, a third": [1e-4, 2e-4],
    "even": [1e-4, 2e-4],
}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--starts", nargs="+", choices=list(RATES), default=list(RATES))
    options = parser.parse_args()
    source, data = ModelConfig(options.model), options.data
    model, tokenizer = load_model(source), load_tokenizer(source)
    batches, _ = context_batches(tokenizer, load_samples(DataConfig(str(data / "knowledge_context.jsonl"))), 512)
    start = preprocess(model, CordaConfig(mode="kpm", split="paper", r=16), batches)
    factors = factors_of("drop-in", model, find_targets(model, "all-linear"), batches, 16)
    scaled = {name: replace(start.layers[name], A=A, B=B) for name, (A, B) in factors.items()}
    starts = {"paper": start.layers, "PEFT's scale": scaled}
    lengths = [length(layer) for layer in starts["PEFT's scale"].values()]
    print("length of A at PEFT's scale, a layer:", *(f"{x:.0f}" for x in sorted(lengths)))
    median = statistics.median(lengths)
    starts["paper, a third"] = {name: longer(layer, 1 / 3) for name, layer in start.layers.items()}
    starts["PEFT's scale, cut"] = {
        name: longer(layer, min(1, 2 * median / length(layer))) for name, layer in starts["PEFT's scale"].items()
    }
    starts["even"] = {name: longer(layer, median / layer.A.norm(dim=1)) for name, layer in start.layers.items()}
    learn, keep = "problems_test.jsonl", "knowledge_test.jsonl"
    measured = EvalConfig(
        learn=[DataConfig(str(data / learn), samples=64)], keep=[DataConfig(str(data / keep), samples=256)]
    )
    samples = load_samples(DataConfig(str(data / "problems_train.jsonl")))
    rows = []
    for name in options.starts:
        for rate in RATES[name]:
            torch.manual_seed(0)
            tuned = install(model, replace(start, layers=starts[name]))
            recipe = TrainConfig(learning_rate=rate, max_steps=45, batch_size=8, checkpoints=0)
            train(tuned, tokenizer, samples, recipe)
            results = evaluate(tuned, tokenizer, measured)
            loss = next(iter(results["learn"].values()))["tuned"]["loss"]
            drift = next(iter(results["keep"].values()))["tuned"]["drift"]
            rows.append({"start": name, "learning_rate": rate, "loss": loss, "drift": drift})
            print(rows[-1], flush=True)
            model = tuned.unload()
    lines = ["| start | learning rate | task loss | drift on facts |", "|---|---:|---:|---:|"]
    lines += [f"| {r['start']} | {r['learning_rate']:.0e} | {r['loss']:.4f} | {r['drift']:.4f} |" for r in rows]
    record.write(options, rows, lines, options.model)


def length(layer: LayerStart) -> float:
    """The median length of A's rows."""
    return float(layer.A.norm(dim=1).median())


def longer(layer: LayerStart, factor: Any) -> LayerStart:
    """The same function with A's rows longer by a factor: a number, or (r,)."""
    factor = torch.as_tensor(factor)
    return replace(layer, A=layer.A * factor[..., None], B=layer.B / factor)


if __name__ == "__main__":
    main()
