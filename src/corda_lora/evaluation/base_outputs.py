"""The base model's predictions, stored once: many tuned models are measured against them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.batches import Encoded, batch_by_length
from ..files import whole_file
from ..progress import track
from .answers import padded, with_answers


@torch.no_grad()
def record_base(
    model: nn.Module, tokenizer: Any, encoded: Sequence[Encoded], batch_tokens: int, progress: bool, label: str
) -> dict[str, Tensor]:
    """What `BaseOutputs.save` stores: for each batch the input of the base model's output head at each answer token.

    These (a, d) give the same logits as the (a, vocabulary) logits themselves, in less space. A model that caps or
    scales its logits after the head is the exception: its logits are stored.
    """
    tensors: dict[str, Tensor] = {}
    encoded = with_answers(encoded)
    head = model.get_output_embeddings()  # type: ignore[operator]
    batches = batch_by_length([len(e.ids) for e in encoded], batch_tokens)
    for number, indices in enumerate(track(batches, f"base, {label.split()[0]}", progress)):
        inputs, answers = padded([encoded[i] for i in indices], tokenizer, model)
        columns = answers.any(0).nonzero().flatten()
        given: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args: given.append(args[0]))  # noqa: B023
        try:
            output = model(**inputs, use_cache=False, logits_to_keep=columns)
        finally:
            hook.remove()
        hidden = given[0][answers[:, columns]]  # (a, d)
        logits = output.logits[answers[:, columns]]  # (a, vocabulary)
        exact = torch.allclose(head(hidden).float(), logits.float(), rtol=1e-4, atol=1e-4)
        tensors[f"{label} {'hidden' if exact else 'logits'} {number}"] = (hidden if exact else logits).cpu()
    return tensors


class BaseOutputs:
    """The base model's predictions of the answers, read from a file.

    They are computed with a copy of the base model's output head, made before anything is trained.
    """

    FILE = "base.safetensors"

    @classmethod
    def save(cls, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write what `record_base` gave."""
        with whole_file(folder / cls.FILE) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)

    def __init__(self, folder: Path, model: nn.Module):
        """`model` is the base model."""
        self.file = safe_open(folder / self.FILE, framework="pt")
        self.head = copy.deepcopy(model.get_output_embeddings())  # type: ignore[operator]
        self.names = set(self.file.keys())

    def log_probs(self, label: str, number: int) -> Tensor:
        """log p at the answers of batch `number` of the data named `label`, float32: (a, vocabulary)."""
        logits = f"{label} logits {number}"
        if logits in self.names:
            return F.log_softmax(self.file.get_tensor(logits).float(), dim=-1)
        hidden = self.file.get_tensor(f"{label} hidden {number}").to(self.head.weight.device)
        return F.log_softmax(self.head(hidden).float(), dim=-1)
