"""What a model loses when the smallest components of every layer are discarded, at many levels in one walk.

Every text goes through the model once for each level of each way to decompose, all of them one block at a time: hidden
states wait at a block (parked, see `lockstep`) until all have passed the one before. While a block is on the device its
layers are decomposed once for each way. Then its weights are W − U_k U_kᵀW, for the k smallest components of one level
after the other, and the texts that belong to this level pass. So all levels share one decomposition of each layer, no
cut weight is kept, and the model's weights are read once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from ..algebra.decomposition import discard
from ..models.lockstep import lockstep, on_device
from ..models.weights import weight_of
from ..preprocess.backward import LOGITS
from ..preprocess.context import Batch, answer_mask
from ..preprocess.walk import Place, inputs_of, tensors_beside, tensors_that_see


class Components(NamedTuple):
    """U (m, R) and σ (R,), descending, float64, of one layer; two-sided, with L (m, m), of LᵀW."""

    U: Tensor
    sigma: Tensor
    L: Tensor | None = None


class Truncation:
    """Runs texts through a model's blocks with cut weights. To be closed.

    Args:
        blocks: by name, in the order in which they are run.
        texts: batches by name. The loss is measured where they have labels.
        counts: for each way to decompose layers, how many components of each layer every level discards.

    Attributes:
        left: how many blocks have not been passed.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        blocks: Mapping[str, nn.Module],
        texts: Mapping[str, Sequence[Batch]],
        counts: Sequence[Mapping[str, list[int]]],
        place: Place,
    ):
        self.targets, self.counts, self.left = targets, counts, len(blocks)
        self.texts = [name for name, batches in texts.items() for _ in batches]  # of each batch
        self.batches = [batch for batches in texts.values() for batch in batches]
        self.levels = len(next(iter(counts[0].values())))
        variants = 1 + len(counts) * self.levels  # the whole weights come first
        self.sums = torch.zeros(variants, len(self.batches), dtype=torch.float64)
        self.running: int | None = None  # the text that runs, of all variants
        self.homes: dict[str, Tensor] = {}  # whole weights of the layers in the block
        self.cut: dict[str, Components] = {}
        # Without padding no mask is needed: else each text that waits would hold one.
        bare = [{k: v for k, v in b.items() if k != "attention_mask" or not bool(v.all())} for b in self.batches]
        inputs = inputs_of(model, bare, place.device)
        # The walk of the contexts has the embeddings on the device, and not the head.
        walked = set(tensors_beside(model, blocks.values(), to_end=False))
        head = [x for x in tensors_beside(model, blocks.values(), to_end=True) if x not in walked]
        self.seeing, self.place = tensors_that_see(model), place  # that walk has sent them away at its first block
        with ExitStack() as stack:
            stack.enter_context(on_device(head, place.device, place.stored))
            stack.callback(model.register_forward_hook(self._measure).remove)
            self.walk = lockstep(
                model, list(blocks.values()), inputs * variants, self._enter, to_end=True, park=place.park
            )
            stack.callback(self.walk.close)  # type: ignore[attr-defined]
            self.close = stack.pop_all().close

    def through(self, names: Sequence[str], decompose: Callable[[str, int], Components]) -> None:
        """Run all texts through the next block, which is on the device. Its weights are whole again afterwards.

        Args:
            names: the target layers in the block.
            decompose: gives the components of a layer in one of the ways.
        """
        self.decompose = decompose
        with on_device(self.seeing, self.place.device, self.place.stored):
            _, run = next(self.walk)  # the first time, all texts begin
        self.seeing = set()
        self.homes = {name: self.targets[name].weight.data for name in names}  # type: ignore[misc]
        try:
            run()
        finally:
            self._restore()
            self.homes, self.cut, self.running = {}, {}, None
        self.left -= 1

    def _restore(self) -> None:
        for name, home in self.homes.items():
            self.targets[name].weight.data = home

    def _enter(self, index: int) -> None:
        """Before a text runs on: the first of each variant sets the weights of its level."""
        self.running = index
        variant, text = divmod(index, len(self.batches))
        if text or not variant:
            return
        self._restore()
        way, level = divmod(variant - 1, self.levels)
        for name in self.homes:
            layer, counts = self.targets[name], self.counts[way][name]
            if level == 0:
                U, sigma, L = self.decompose(name, way)
                self.cut[name] = Components(U[:, U.shape[1] - max(counts) :].clone(), sigma, L)
            U, _, L = self.cut[name]
            W = discard(weight_of(layer).to(U.device), U[:, U.shape[1] - counts[level] :], L)
            layer.weight.data = (W.T if isinstance(layer, Conv1D) else W).to(self.homes[name])

    def _measure(self, model: nn.Module, args: Any, output: Any) -> None:
        """Add up the losses of the text whose forward ends."""
        if self.running is None:  # another forward than ours
            return
        variant, text = divmod(self.running, len(self.batches))
        labels, answers = self.batches[text]["labels"], answer_mask(self.batches[text])
        where = answers.to(output.logits.device)
        logits, targets = output.logits[:, :-1][where], labels[:, 1:][answers].to(output.logits.device)
        part = max(1, LOGITS // logits.shape[-1])
        for rows, ids in zip(logits.split(part), targets.split(part)):
            self.sums[variant, text] += float(cross_entropy(rows.float(), ids, reduction="sum"))

    def losses(self, labels: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """The mean loss on each text, in nats per token: {label of a way: [{text: loss} for each level]}, and under ""
        that of the whole weights."""
        answers = [int(answer_mask(batch).sum()) for batch in self.batches]
        means: list[dict[str, float]] = [{} for _ in self.sums]
        for text in dict.fromkeys(self.texts):
            mine = [i for i, name in enumerate(self.texts) if name == text]
            for mean, loss in zip(means, self.sums[:, mine].sum(1).tolist()):
                mean[text] = loss / sum(answers[i] for i in mine)
        whole, *cut = means
        return {"": [whole]} | {label: cut[w * self.levels : (w + 1) * self.levels] for w, label in enumerate(labels)}
