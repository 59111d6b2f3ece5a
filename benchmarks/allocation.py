"""Seconds to allocate the ranks of a 70B model: 560 layers of 8192 components, one sort of 4.6 million scores.

python benchmarks/allocation.py
"""

import time

import record
import torch

from corda_lora.algebra.compactness import allocate, allocation_scores

LAYERS, COMPONENTS = 560, 8192


def main() -> None:
    options = record.parser(__doc__).parse_args()
    torch.manual_seed(0)
    spectra = [
        torch.rand(COMPONENTS, dtype=torch.float64).sort(descending=True).values ** (1 + i % 5) for i in range(LAYERS)
    ]
    costs = [2 * COMPONENTS] * LAYERS  # parameters of one component of each layer
    rows = {}
    for mode in ("kpm", "ipm"):
        since = time.perf_counter()
        scores = [allocation_scores(10 + i / LAYERS, sigma) for i, sigma in enumerate(spectra)]
        ranks = allocate(scores, costs, 128 * sum(costs), mode)
        rows[mode] = {"seconds": time.perf_counter() - since, "ranks": [min(ranks), max(ranks)]}
    lines = ["| mode | seconds | lowest rank | highest rank |", "|---|---:|---:|---:|"]
    lines += [
        f"| {mode} | {row['seconds']:.2f} | {row['ranks'][0]} | {row['ranks'][1]} |" for mode, row in rows.items()
    ]
    record.write(options, rows, lines)


if __name__ == "__main__":
    main()
