"""Why rank allocation can lose in kpm: what an adapter leaks on all tokens of a context, and on all but the first of
each sample, where some layers have outputs thousands of times larger than anywhere else (massive activations).

    python benchmarks/first_token.py --model MODEL --context FILE START ...

Each START is a directory from `corda init --split anchored`. The result has, for each kind of layer, the mean of
tr(A C Aᵀ) / tr(W C Wᵀ), and the layers where it is worst. C is of other samples of the context than the start was made
from (another seed).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("starts", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", required=True)
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    source = ModelConfig(options.model)
    samples = load_samples(DataConfig(options.context, samples=options.samples, seed=5))
    batches, _ = context_batches(load_tokenizer(source), samples, 512)
    lines, rows = [], {}
    model = load_model(source)
    for start in options.starts:
        outputs, leaks, ranks = energies(model, load_file(start / "adapter_model.safetensors"), batches)
        lines += table(start.name, outputs, leaks, ranks)
        rows[start.name] = {
            name: {"rank": ranks[name], "output_energy": outputs[name].tolist(), "leak": leaks[name].tolist()}
            for name in ranks
        }
    record.write(options, rows, lines, options.model)


@torch.no_grad()
def energies(
    model: nn.Module, adapter: dict[str, Tensor], batches: list[dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """For each layer the sums of ‖W x‖² and of ‖A x‖², each (2,): over all tokens, and over all but the first of each
    sample. And the ranks."""
    targets = find_targets(model, "all-linear")
    A = {name: adapter[f"base_model.model.{name}.lora_A.weight"] for name in targets}
    outputs, leaks = (dict.fromkeys(targets, torch.zeros(2, dtype=torch.float64)) for _ in range(2))

    def listen(name: str) -> Any:
        def on_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]  # (b, s, d)
            for sums, factor in ((outputs, module.weight), (leaks, A[name])):
                energy = (x @ factor.T).double().square().sum(-1) * mask  # (b, s)
                sums[name] = sums[name] + torch.stack([energy.sum(), energy[:, 1:].sum()])

        return on_input

    hooks = [module.register_forward_pre_hook(listen(name)) for name, module in targets.items()]
    for batch in batches:
        mask = batch["attention_mask"]
        model(**batch)
    for hook in hooks:
        hook.remove()
    return outputs, leaks, {name: len(rows) for name, rows in A.items()}


def table(name: str, outputs: dict[str, Tensor], leaks: dict[str, Tensor], ranks: dict[str, int]) -> list[str]:
    share = {n: (leaks[n] / outputs[n]).tolist() for n in outputs}
    kinds = defaultdict(list)
    for n in share:
        kinds[n.rpartition(".")[2]].append(n)
    lines = [f"## {name}", "", "| kind | ranks | leak, all tokens | leak, all but the first |", "|---|---:|---:|---:|"]
    for kind, names in kinds.items():
        means = [sum(share[n][i] for n in names) / len(names) for i in (0, 1)]
        span = f"{min(ranks[n] for n in names)}–{max(ranks[n] for n in names)}"
        lines.append(f"| {kind} | {span} | {means[0]:.1e} | {means[1]:.1e} |")
    head = (
        "| worst layers | rank | leak, all tokens | leak, all but the first | output energy, all / all but the first |"
    )
    lines += ["", head, "|---|---:|---:|---:|---:|"]
    for n in sorted(share, key=lambda n: -share[n][1])[:4]:
        ratio = float(outputs[n][0] / outputs[n][1])
        lines.append(f"| {n} | {ranks[n]} | {share[n][0]:.1e} | {share[n][1]:.1e} | {ratio:.3g} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
