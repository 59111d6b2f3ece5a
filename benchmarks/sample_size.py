"""How much more do samples that were not shown leak than those shown, by how many were shown? In mode kpm, rank 32.

    python benchmarks/sample_size.py --model MODEL --context nq_context.jsonl --others nq_test.jsonl

The components are chosen from the first n of the shuffled context. Their leak is measured on these n, on 64 others (as
`corda init` does) and on 500 more. `enough` is what `enough_samples` makes of that. Medians over the layers of three
blocks.
"""

import random
from statistics import median

import record
import torch

from corda_lora.algebra.decomposition import energies
from corda_lora.config import CordaConfig, DataConfig, ModelConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_of
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.held_out import enough_samples
from corda_lora.preprocess.layer import decompose_layer
from corda_lora.preprocess.walk import Place, walk

COUNTS = (64, 128, 256, 512, 1000, 2000)
BLOCKS = (1, 7, 14)


@torch.no_grad()
def main() -> None:
    parser = record.parser(__doc__)
    for name in ("model", "context", "others"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    source = ModelConfig(options.model, dtype="float32")
    model, tokenizer = load_model(source), load_tokenizer(source)
    targets = {n: m for n, m in find_targets(model, "all-linear").items() if int(n.split(".")[2]) in BLOCKS}
    samples, others = (load_samples(DataConfig(file)) for file in (options.context, options.others))
    random.Random(0).shuffle(samples)
    random.Random(1).shuffle(others)
    parts = [samples[a:b] for a, b in zip((0, *COUNTS), COUNTS)] + [others[:64], others[64:564]]
    batches, rounds, tokens = [], [], []
    for i, part in enumerate(parts):
        more, _ = context_batches(tokenizer, part, 512)
        batches += more
        rounds += [i] * len(more)
        tokens.append(sum(int(batch["attention_mask"].sum()) for batch in more))
    config, leaks = CordaConfig(mode="kpm", r=32), {n: [] for n in COUNTS}
    unmeasured = set(targets)
    for _, groups in walk(model, targets, Context(batches, rounds), Place(torch.device("cpu"))):
        for members, Cs in groups or []:
            total, seen = torch.zeros_like(Cs[0]), 0
            for n, C, count in zip(COUNTS, Cs, tokens):
                total, seen = total + count * C, seen + count
                for name in members:
                    W = weight_of(targets[name])
                    rows = decompose_layer(W, total / seen, config)[0].T @ W.double()
                    A = rows / rows.norm(dim=1, keepdim=True)
                    leaks[n].append([float(energies(A, M).sum()) for M in (total / seen, *Cs[-2:])])
            unmeasured -= set(members)
        if not unmeasured:
            break
    table = []
    for n in COUNTS:
        few, many = (median(leak[i] / leak[0] for leak in leaks[n]) for i in (1, 2))
        best = median(leak[2] / least[2] for leak, least in zip(leaks[n], leaks[COUNTS[-1]]))
        table.append(
            [n, round(few, 3), round(many, 3), enough_samples(n, few), enough_samples(n, many), round(best, 3)]
        )
    head = [
        "samples shown",
        "64 others leak times",
        "500 others",
        "enough, by the 64",
        "by the 500",
        "leak on the 500, to best",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    lines += [f"| {' | '.join(f'{x:,}' for x in row)} |" for row in table]
    record.write(options, [dict(zip(head, row)) for row in table], lines, options.model)


if __name__ == "__main__":
    main()
