"""Is it the length of A that preserves? `paper` in kpm with its A a factor as long, and its B as much shorter: the same
components, the same function at the start. Trained as `corda demo` trains, at several learning rates.

    python benchmarks/length_of_a.py --model MODEL --data FOLDER --output NAME

FOLDER: of `write_demo_data.py`. Compare the drifts of rows with about the same task loss.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from machine import commit, machine

from corda_lora.adapter import install
from corda_lora.config import CordaConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig
from corda_lora.context import context_batches, load_samples
from corda_lora.evaluation import evaluate
from corda_lora.models import load_model, load_tokenizer
from corda_lora.preprocess import preprocess
from corda_lora.training import train

RATES = {1 / 3: [1e-4, 2e-4, 4e-4], 1.0: [5e-5, 1e-4], 3.0: [2e-5, 4e-5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    source, data = ModelConfig(options.model), options.data
    model, tokenizer = load_model(source), load_tokenizer(source)
    batches, _ = context_batches(tokenizer, load_samples(DataConfig(str(data / "knowledge_context.jsonl"))), 512)
    start = preprocess(model, CordaConfig(mode="kpm", split="paper", r=16), batches)
    learn, keep = "problems_test.jsonl", "knowledge_test.jsonl"
    measured = EvalConfig(
        learn=[DataConfig(str(data / learn), samples=64)], keep=[DataConfig(str(data / keep), samples=256)]
    )
    samples = load_samples(DataConfig(str(data / "problems_train.jsonl")))
    rows = []
    for factor, rates in RATES.items():
        layers = {n: replace(layer, A=layer.A * factor, B=layer.B / factor) for n, layer in start.layers.items()}
        for rate in rates:
            torch.manual_seed(0)
            tuned = install(model, replace(start, layers={n: replace(x) for n, x in layers.items()}))
            recipe = TrainConfig(learning_rate=rate, max_steps=45, batch_size=8, checkpoints=0)
            train(tuned, tokenizer, samples, recipe)
            results = evaluate(tuned, tokenizer, measured)
            loss = next(iter(results["learn"].values()))["tuned"]["loss"]
            drift = next(iter(results["keep"].values()))["tuned"]["drift"]
            rows.append({"factor": factor, "learning_rate": rate, "loss": loss, "drift": drift})
            print(rows[-1], flush=True)
            model = tuned.unload()
    lines = [f"| {r['factor']:.2g} | {r['learning_rate']:.0e} | {r['loss']:.4f} | {r['drift']:.4f} |" for r in rows]
    text = (
        f"# {options.output.stem}\n\n`python benchmarks/length_of_a.py --model MODEL --data FOLDER --output NAME`\n\n"
    )
    text += (
        f"{machine()}; commit {commit()}; one seed\n\n| length of A, beside `paper`'s | learning rate | task loss | "
    )
    text += "drift on facts |\n|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n"
    options.output.with_suffix(".md").write_text(text)
    options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
