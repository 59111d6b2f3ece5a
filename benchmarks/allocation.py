"""Seconds to allocate the ranks of a 70B model: 560 layers of 8192 components, one sort of 4.6 million scores.

python benchmarks/allocation.py
"""

import time

import torch
from machine import machine

from corda_lora.algebra.compactness import allocate, allocation_scores

torch.manual_seed(0)
sigma = [torch.rand(8192, dtype=torch.float64).sort(descending=True).values ** (1 + i % 5) for i in range(560)]
for mode in ("kpm", "ipm"):
    since = time.perf_counter()
    scores = [allocation_scores(10 + i / 560, s) for i, s in enumerate(sigma)]
    ranks = allocate(scores, [16384] * 560, 128 * 560 * 16384, mode)
    print(f"{mode}: {time.perf_counter() - since:.2f} s, ranks {min(ranks)} to {max(ranks)}; {machine()}")
