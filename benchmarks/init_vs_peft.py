"""Time and peak memory of preparing a CorDA adapter: `corda init` beside PEFT's `preprocess_corda`, on this machine.

    python benchmarks/init_vs_peft.py --model MODEL --data DATA [--samples 256] [--repeats 2]

Each run is a process of its own, from the command to the adapter on disk; the two alternate, and the table has medians
(kpm, rank 32). PEFT gets the same questions, one at a time, as it demands.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

PEFT = """
import sys, torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data.batches import encode
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_model, load_tokenizer
source, data, samples, output, mode = sys.argv[1:]
samples = load_samples(DataConfig(data, samples=int(samples)))
tokenizer, model = load_tokenizer(ModelConfig(source)), load_model(ModelConfig(source))
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = LoraConfig(r=32, lora_alpha=32, target_modules=names, init_lora_weights="corda",
                    corda_config=CordaConfig(corda_method=mode))
@torch.no_grad()
def run_model():
    for sample in samples:
        model(input_ids=torch.tensor([encode(tokenizer, sample, 512).ids]))
preprocess_corda(model, config, run_model=run_model)
get_peft_model(model, config).save_pretrained(output)
"""


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    context = str(options.data / "nq_context.jsonl")
    runs: dict[str, list[tuple[float, float]]] = {"PEFT preprocess_corda": [], "corda init": []}
    for _ in range(options.repeats):
        for name in runs:
            with tempfile.TemporaryDirectory() as folder:
                output = f"{folder}/start"
                if name == "corda init":
                    flags = ["--context", context, "--samples", str(options.samples), "--r", "32", "--split", "paper"]
                    command = ["-m", "corda_lora.cli", "init", "--model", options.model, *flags, "--output", output]
                else:
                    command = ["-c", PEFT, options.model, context, str(options.samples), output, "kpm"]
                runs[name].append(measure([sys.executable, *command]))
            print(f"{name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1]:.2f} GB", flush=True)
    rows = {
        name: {
            "seconds": statistics.median(s for s, _ in values),
            "peak_gb": max(m for _, m in values),
            "runs": values,
        }
        for name, values in runs.items()
    }
    lines = ["| | seconds | peak memory (GB) |", "|---|---:|---:|"]
    lines += [f"| {name} | {row['seconds']:.1f} | {row['peak_gb']:.2f} |" for name, row in rows.items()]
    record.write(options, rows, lines, options.model, repeats=options.repeats)


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory (GB) of a command."""
    since = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {error[-2000:]}")
    return time.perf_counter() - since, usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main()
