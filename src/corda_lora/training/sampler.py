"""The order of training samples: the usual random order, with samples of similar length side by side within a step."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class SimilarLengths(Sampler[int]):
    """Indices of the samples in random order, sorted by length within each step.

    A step's micro-batches then hold samples of similar length. The step's gradient stays the same, and its batches
    contain less padding. The random order is that of accelerate's `SeedableRandomSampler` with the same seed.

    Args:
        lengths: tokens of each sample.
        step_size: samples in one optimizer step.
        seed: each epoch's order follows from seed + epoch.
        multiple: the index of no sample, that after the last one, fills an epoch up to a multiple of this.
    """

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int, multiple: int = 1):
        self.lengths, self.step_size, self.seed, self.epoch = lengths, step_size, seed, 0
        self.filling = -len(lengths) % multiple

    def __len__(self) -> int:
        return len(self.lengths) + self.filling

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.step_size):
            yield from sorted(order[start : start + self.step_size], key=lambda i: self.lengths[i])
        yield from [len(self.lengths)] * self.filling
