"""A classifier's outputs for texts, and what they should be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Encoded, batch_by_length, label_batch
from ..data.labels import label_loss, targets_of
from ..progress import track
from .answers import Sides, sides


@dataclass(frozen=True)
class Labels:
    """One model's outputs for all texts of a data set.

    Attributes:
        outputs: (n, labels) float32: the logits of the labels; (n, 1) where the model predicts a number.
        targets: (n,) int64, the index of each text's label; or float32, its number.
    """

    outputs: Tensor
    targets: Tensor
    base = None

    def each(self) -> Iterator["Labels"]:
        return (Labels(*alone) for alone in zip(self.outputs.split(1), self.targets.split(1)))

    @property
    def samples(self) -> int:
        return len(self.targets)

    @cached_property
    def predicted(self) -> Tensor:
        """(n,) the label with the largest logit, or the number."""
        return self.outputs.argmax(1) if self.targets.dtype == torch.long else self.outputs[:, 0]

    def right(self) -> int:
        return int((self.predicted == self.targets).sum())

    def loss(self) -> float:
        """Summed over the texts: see `label_loss`."""
        return float(label_loss(self.outputs, self.targets, "sum"))


@torch.no_grad()
def read_labels(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    batch_tokens: int = 8192,
    progress: bool = False,
    label: str = "eval",
    compared: Sides | None = None,
) -> Iterator[tuple[str, Labels]]:
    """(side, its outputs for all texts) for each side. The arguments are as in `read_answers`."""
    compared = sides(model) if compared is None else compared
    device = next(model.parameters()).device
    targets = torch.tensor(targets_of(model.config, encoded))
    outputs: dict[str, list[Tensor]] = {side: [] for side in compared}
    batches = batch_by_length([len(e.ids) for e in encoded], batch_tokens)
    for indices in track(batches, label, progress):
        batch = label_batch([encoded[i] for i in indices], tokenizer.pad_token_id or 0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        for side, active in compared.items():
            with active():
                outputs[side].append(model(**batch).logits.float().cpu())
    order = torch.tensor([i for indices in batches for i in indices]).argsort()
    for side in compared:
        yield side, Labels(torch.cat(outputs[side])[order], targets)
