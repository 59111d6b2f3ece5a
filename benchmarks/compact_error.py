"""How far the drift that compact C and D predict is from what the whole ones do, on a real model and trained updates.

    python benchmarks/compact_error.py --data DATA [--model DIR] [--samples 256] [--steps 8] [--r 32]

DATA is what `prepare_data.py` makes. C and D are of questions of NQ-open. A few steps on GSM8K train a LoRA, an
anchored adapter, and an anchored one with the penalty (λ = 10, 128 directions). For each update ΔW the table has the
drift that whole C and D predict, ½ · tokens/answers · Σ tr(D ΔW C ΔWᵀ), and how many times that the compact ones do,
with k directions of each and their diagonals; and with k = 128 of one side alone, the other whole.
"""

import random
import tempfile
from pathlib import Path
from typing import Any

import peft
import record
import torch
from torch import Tensor

from corda_lora.adapters.lora import install, lora_layers
from corda_lora.algebra.second_order import Low, compact
from corda_lora.config import CordaConfig, DataConfig, LoraStart, ModelConfig, TrainConfig
from corda_lora.data.batches import context_batches, encode
from corda_lora.data.samples import load_samples
from corda_lora.demo.run import packaged_model
from corda_lora.devices import accelerator
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import layer_digest
from corda_lora.preprocess.context import answer_mask, token_masks
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.statistics import NAME, Sides, Statistics, answered_batches, collect_sides
from corda_lora.training.keeping import Keeper, PredictedDrift
from corda_lora.training.train import plain_lora, train

DIRECTIONS = (32, 64, 128, 256)
UPDATES = {"LoRA, 5e-3": (5e-3, 0.0), "anchored, 2e-2": (2e-2, 0.0), "anchored, 2e-2, λ 10": (2e-2, 10.0)}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", help="default: that of the demo")
    parser.add_argument("--samples", type=int, default=256, help="questions that C and D are of")
    parser.add_argument("--steps", type=int, default=8, help="of 4 samples")
    parser.add_argument("--r", type=int, default=32)
    options = parser.parse_args()
    source = ModelConfig(options.model or str(packaged_model()), dtype="float32")
    tokenizer, model = load_tokenizer(source), load_model(source).to(accelerator())
    targets = find_targets(model, "all-linear")
    questions = load_samples(DataConfig(str(options.data / "nq_context.jsonl")))
    drawn = random.Random(0).sample(questions, options.samples)
    batches = answered_batches([encode(tokenizer, sample, 512) for sample in drawn], 0)
    whole = {n: (C, Ds[n]) for names, C, Ds in collect_sides(model, targets, batches, progress=False) for n in names}
    tokens, answers = (sum(int(mask(b).sum()) for b in batches) for mask in (lambda b: token_masks(b)[0], answer_mask))
    low: dict[int, dict[str, Sides]] = {}
    for k in DIRECTIONS:
        inputs: dict[int, Low] = {}  # layers with the same input share C
        for C, _ in whole.values():
            inputs.setdefault(id(C), compact(C, k))
        low[k] = {name: Sides(inputs[id(C)], compact(D, k)) for name, (C, D) in whole.items()}
        print(f"{k} directions of {len(whole)} layers", flush=True)
    digests = {name: layer_digest(module) for name, module in targets.items()}
    statistics = Statistics(low[128], options.samples, answers, tokens, digests)
    with tempfile.TemporaryDirectory() as folder:
        statistics.save(path := Path(folder) / NAME)
        size = path.stat().st_size

    def predicted(change: dict[str, Tensor], sides: Any) -> dict[str, float]:
        """The drift of each layer. C and D are whole (n, n), (m, m), or low."""

        def times(X: Tensor, M: Any) -> Tensor:
            return (X @ M.factor) @ M.factor.T + X * M.diagonal if isinstance(M, Low) else X @ M

        share = 0.5 * tokens / answers
        return {n: share * float((times(d.T, sides[n][1]).T * times(d, sides[n][0])).sum()) for n, d in change.items()}

    head = [*map(str, DIRECTIONS), "128 of C", "128 of D", "128: layers' 5th to 95th percentile"]
    lines = [f"| update | whole, nats | {' | '.join(head)} |", f"|---|{'---:|' * (1 + len(head))}"]
    print("\n".join(lines), flush=True)
    of_C = {name: (low[128][name].C, D) for name, (_, D) in whole.items()}
    of_D = {name: (C, low[128][name].D) for name, (C, _) in whole.items()}
    rows = []
    for name, (rate, keep) in UPDATES.items():
        change = trained(model, tokenizer, drawn, options, rate, keep, statistics, "LoRA" in name)
        exact = predicted(change, whole)
        total = sum(exact.values())
        by_k = {k: predicted(change, sides) for k, sides in low.items()}
        times = [sum(of.values()) / total for of in (*by_k.values(), predicted(change, of_C), predicted(change, of_D))]
        by_layer = torch.tensor([by_k[128][n] / exact[n] for n in exact if exact[n] > 0])
        between = by_layer.quantile(torch.tensor([0.05, 0.95])).tolist()
        rows.append({"update": name, "whole": total, "times": times, "by_layer": between})
        cells = [f"{value:.3f}" for value in times] + [f"{between[0]:.2f} to {between[1]:.2f}"]
        lines.append(f"| {name} | {total:.4g} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    parameters = sum(module.weight.numel() for module in targets.values())
    lines.append(f"\n128 directions: {size / 1e6:.1f} MB on the disk, for layers of {parameters / 1e6:.0f} M weights.")
    record.write(options, {"updates": rows, "directions": DIRECTIONS, "bytes": size}, lines)


def trained(
    model: Any,
    tokenizer: Any,
    context: Any,
    options: Any,
    rate: float,
    keep: float,
    statistics: Statistics,
    plain: bool,
) -> dict[str, Tensor]:
    """ΔW (m, n) of each layer, after a few steps on GSM8K. The model is left as it was."""
    config = TrainConfig(rate, max_steps=options.steps, batch_size=4, precision="fp32", warmup=0.0)
    adapted: peft.PeftModel
    if plain:
        adapted = plain_lora(model, LoraStart(r=options.r), config)
    else:
        corda = CordaConfig(mode="kpm", r=options.r, split="anchored", lora_alpha=options.r)
        adapted = install(model, preprocess(model, corda, context_batches(tokenizer, context, 512)[0], progress=False))
    keeper = Keeper(PredictedDrift(adapted, statistics), keep)
    penalties = {"drift": keeper.penalty} if keep else {}
    learn = load_samples(DataConfig(str(options.data / "gsm8k_train.jsonl")))
    train(adapted, tokenizer, learn, config, progress=False, callbacks=[keeper], penalties=penalties)
    change = {n: layer.get_delta_weight("default").detach().float() for n, layer in lora_layers(adapted).items()}
    adapted.unload()
    return change


if __name__ == "__main__":
    main()
