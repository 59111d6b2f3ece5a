"""Why does PEFT's CorDA keep less in kpm? Two possible causes, measured on three starts: PEFT's, the exact answer for
PEFT's covariance (the drop-in), and that of `corda init --split paper`.

    python benchmarks/leak_vs_peft.py --model MODEL --context FILE --unseen FILE [--samples 256] [--r 32]

- *leak*: how much of the ability's energy the directions of A see, on samples that no method was shown. It is the mean
  over the rows a_i of A of (a_i C a_iᵀ / ‖a_i‖²) / (tr C / n): 1 for a random direction, 0 for one that is never used.
- *length* of the rows of A, alone and relative to the columns of B. The longer A is, the less a learning rate turns it.
"""

import statistics
from collections import defaultdict

import peft.tuners.lora.corda as original
import record
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import Tensor, nn

from corda_lora.config import CordaConfig, DataConfig, ModelConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.peft import preprocess_corda
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.walk import Place, walk

METHODS = {
    "PEFT": "PEFT's preprocess_corda",
    "drop-in": "corda_lora.peft.preprocess_corda: the same covariance, decomposed exactly",
    "corda init": "the covariance without PEFT's weights per sample",
}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", required=True)
    parser.add_argument("--unseen", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--r", type=int, default=32)
    options = parser.parse_args()
    source = ModelConfig(options.model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    targets = find_targets(model, "all-linear")

    def batches(path: str, tokens: int) -> list[dict[str, Tensor]]:
        return context_batches(tokenizer, load_samples(DataConfig(path, samples=options.samples)), 512, tokens)[0]

    unseen = {}
    for _, groups in walk(model, targets, Context(batches(options.unseen, 4096)), Place(torch.device("cpu"))):
        for names, (C,) in groups or []:
            unseen |= dict.fromkeys(names, C.clone())
    rows = {}
    for method in METHODS:
        shown = batches(options.context, 1 if method == "PEFT" else 4096)
        factors = factors_of(method, model, targets, shown, options.r)
        rows[method] = {name: numbers(A, B, unseen[name]) for name, (A, B) in factors.items()}
        print(method, flush=True)
    lines = [f"- **{name}**: {meaning}" for name, meaning in METHODS.items()] + tables(rows)
    record.write(options, rows, lines, options.model)


def factors_of(
    method: str, model: nn.Module, targets: dict[str, nn.Module], shown: list[dict[str, Tensor]], r: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, n) and B (m, r) of each layer."""
    if method == "corda init":
        start = preprocess(model, CordaConfig(mode="kpm", split="paper", r=r), shown)
        return {name: (layer.A, layer.B) for name, layer in start.layers.items()}
    run = original.preprocess_corda if method == "PEFT" else preprocess_corda
    config = LoraConfig(
        r=r, target_modules=list(targets), init_lora_weights="corda", corda_config=PeftCordaConfig(corda_method="kpm")
    )

    def run_model() -> None:
        for batch in shown:
            model(**batch, use_cache=False)

    run(model, config, run_model)
    factors = {}
    for name, module in targets.items():
        e, root = module.eigens, module.eigens.S_WC.sqrt()
        factors[name] = ((e.V_WC * root).T.clone(), e.U_WC * root)  # as PEFT's `corda_init`
        del module.eigens
    return factors


def numbers(A: Tensor, B: Tensor, C: Tensor) -> dict[str, float]:
    A, C = A.double(), C.double()  # (r, n), (n, n)
    lengths = A.norm(dim=1)  # (r,)
    leak = ((A @ C) * A).sum(1) / lengths.square().clamp(min=1e-300)
    relative = lengths / B.double().norm(dim=0).clamp(min=1e-300)
    return {
        "leak": float(leak.mean() / C.diagonal().mean()),
        "length": float(lengths.median()),
        "relative length": float(relative.median()),
    }


def tables(rows: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A table for each number: layers of each kind, lowest, median and highest of each method."""
    kinds = defaultdict(list)
    for name in rows["PEFT"]:
        kinds[name.rpartition(".")[2]].append(name)
    kinds["all"] = list(rows["PEFT"])
    lines = []
    for title, key in (
        ("Leak", "leak"),
        ("Length of A's rows", "length"),
        ("The same, relative to B's columns", "relative length"),
    ):
        heads = " | ".join(f"{method}: lowest | median | highest" for method in METHODS)
        lines += [f"\n## {title}\n", f"| layers | {heads} |", "|---" + "|---:" * 3 * len(METHODS) + "|"]
        for kind, names in kinds.items():
            cells = [sorted(rows[method][name][key] for name in names) for method in METHODS]
            text = " | ".join(f"{v[0]:.2g} | {statistics.median(v):.2g} | {v[-1]:.2g}" for v in cells)
            lines.append(f"| {kind} | {text} |")
    return lines


if __name__ == "__main__":
    main()
