"""Both sides of every layer on a context: C of its inputs, D of the gradients at its outputs; in memory and on disk.

They predict what a change of the weights does to the context (see `algebra.second_order`). Here they are collected of a
model that fits on its device, with one backward: for one that does not, see `backward`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..algebra.second_order import Low, compact
from ..config import CordaError
from ..data.batches import Encoded, batch_by_length, pad
from ..files import whole_file
from ..models.targets import require_causal
from ..models.weights import layer_digest
from ..progress import track
from .collect import Collector, Gradients, frozen
from .context import Context

LEAST_SAMPLES = 16  # below this the statistics say nothing of other samples of the same kind
DIRECTIONS = 128  # of C and of D that are kept
NAME = "statistics.safetensors"


class Sides(NamedTuple):
    """C (n, n) of a layer's inputs and D (m, m) of the gradients at its outputs."""

    C: Low
    D: Low


@dataclass(frozen=True)
class Statistics:
    """What a context says of a model's layers.

    Attributes:
        layers: by name. Layers with the same input share the tensors of C. A layer that no token reached (an expert) is
            missing: it does nothing to the context.
        samples, answers, tokens: how many samples, tokens of their answers and tokens in all there were.
        digests: of each layer's weight (see `models.targets.layer_digest`).
    """

    layers: dict[str, Sides]
    samples: int
    answers: int
    tokens: int
    digests: dict[str, str]

    def save(self, path: Path) -> None:
        """Write one safetensors file, in bfloat16. Raises CordaError if the disk is full."""
        tensors: dict[str, Tensor] = {}
        shared: dict[int, str] = {}  # the name under which a C is stored
        sharing: dict[str, str] = {}  # layer → that name
        for name, (C, D) in self.layers.items():
            if sharing.setdefault(name, shared.setdefault(id(C.factor), name)) == name:
                tensors |= _named(f"{name}.C", C)
            tensors |= _named(f"{name}.D", D)
        about: dict[str, Any] = {"samples": self.samples, "answers": self.answers, "tokens": self.tokens}
        about |= {"digests": self.digests, "inputs": sharing}
        with whole_file(path) as partial:
            save_file(tensors, partial, {"corda": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Raises CordaError if the file is missing or damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["corda"])
                stored = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            sides: dict[str, Sides] = {}
            inputs = {name: _low(f"{name}.C", stored) for name in set(about["inputs"].values())}
            for name, leader in about["inputs"].items():
                sides[name] = Sides(inputs[leader], _low(f"{name}.D", stored))
            counts = {name: about[name] for name in ("samples", "answers", "tokens")}
            if any(type(n) is not int or n < 1 for n in counts.values()) or not all(map(_is_sound, _all(sides))):
                raise ValueError("of no context")
            return cls(sides, **counts, digests=dict(about["digests"]))
        except FileNotFoundError as error:
            raise CordaError(f"{path} is missing: it holds the statistics of the context to keep") from error
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CordaError(f"{path} is damaged, or holds no statistics of a context") from error


def _all(sides: Mapping[str, Sides]) -> Iterator[Low]:
    return (M for pair in sides.values() for M in pair)


def _is_sound(M: Low) -> bool:
    """Whether M is a finite positive semidefinite matrix."""
    F, d = M
    fits = F.ndim == 2 and d.shape == F.shape[:1]
    return fits and bool(F.isfinite().all()) and bool(d.isfinite().all()) and bool((d >= 0).all())


def _named(name: str, M: Low) -> dict[str, Tensor]:
    return {f"{name}.{part}": x.to("cpu", torch.bfloat16).contiguous() for part, x in M._asdict().items()}


def _low(name: str, stored: Mapping[str, Tensor]) -> Low:
    return Low(*(stored[f"{name}.{part}"] for part in Low._fields))


def check_samples(answered: int) -> None:
    """Raises CordaError if so few samples with an answer say too little of others."""
    if answered < LEAST_SAMPLES:
        raise CordaError(
            f"the context has {answered} samples with a response, but what it costs to change the model is only known "
            f"from {LEAST_SAMPLES} on, better some hundreds"
        )


class Answered(NamedTuple):
    """A batch of samples on a device.

    Attributes:
        inputs: what the model's forward takes.
        real: (b, s) bool, which tokens are not padding.
        answers: (b, s − 1) bool; position i asks for the prediction of token i + 1.
    """

    inputs: dict[str, Any]
    real: Tensor
    answers: Tensor


def answered_batches(
    encoded: Sequence[Encoded], pad_id: int, device: torch.device, batch_tokens: int = 1024
) -> list[Answered]:
    """The samples that have an answer, in batches.

    Raises CordaError if there are fewer than `LEAST_SAMPLES`."""
    encoded = [e for e in encoded if e.targets]
    check_samples(len(encoded))
    batches = []
    for indices in batch_by_length([len(e.ids) for e in encoded], batch_tokens):
        ids, mask = pad([encoded[i].ids for i in indices], pad_id)
        answers = pad([encoded[i].answer for i in indices], False)[0][:, 1:].bool().to(device)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        batches.append(Answered(inputs, mask.bool().to(device), answers))
    return batches


def uniform(count: int, batch: int, seed: int = 0) -> Tensor:
    """The random numbers (count,) in [0, 1) by which the answers of a batch are drawn: one for each, in order."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed + 7919 * batch))


def drawn_log_likelihood(logits: Tensor, u: Tensor) -> Tensor:
    """Σ log p(y) of one y drawn from each row of logits (a, vocabulary): a scalar, whose gradients at a layer's outputs
    have the mean square D.

    Args:
        u: (a,) in [0, 1). y is the first token up to which the probabilities add up to more than u. So the same u gives
            the same y on any device, whether the rows are drawn together or a part at a time.
    """
    log_probs = logits.float().log_softmax(-1)
    sums = log_probs.detach().exp().cumsum(-1)  # (a, vocabulary)
    y = torch.searchsorted(sums, u[:, None].to(sums) * sums[:, -1:], right=True)  # (a, 1)
    return log_probs.gather(1, y.clamp(max=sums.shape[-1] - 1)).sum()


class WholeSides(NamedTuple):
    """Layers that share their input, as `collect_sides` finds them.

    Attributes:
        members: their names.
        C: (n, n) of that input.
        Ds: (m, m) of the gradients at the outputs of each, by name.
    """

    members: list[str]
    C: Tensor
    Ds: dict[str, Tensor]


def collect_sides(
    model: nn.Module, targets: Mapping[str, nn.Module], batches: Sequence[Answered], progress: bool = True
) -> Iterator[WholeSides]:
    """C and D of a causal language model's target layers, whole, with one backward a batch. Padding counts on neither
    side. Layers that no token reached are missing.

    Args:
        targets: layers by name. Layers that are given the same tensor share C.
    """
    collector = Collector(model, targets, Context([batch.inputs for batch in batches]))
    gradients = Gradients(collector)
    with frozen(model), collector.listening(), gradients.listening():
        for number, batch in enumerate(track(batches, "the context", progress)):
            collector.start(number)
            columns = batch.answers.any(0).nonzero().flatten()  # only these go through the output head
            with torch.enable_grad():
                logits = model(**batch.inputs, logits_to_keep=columns).logits[batch.answers[:, columns]]
                drawn_log_likelihood(logits, uniform(len(logits), number)).backward()
    for members, (C,) in collector.take(list(targets)):
        yield WholeSides(members, C, gradients.take(members))


def collect_statistics(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_tokens: int = 1024,
    directions: int = DIRECTIONS,
    progress: bool = True,
) -> Statistics:
    """C and D of a causal language model's target layers over samples with answers, in small (see `compact`).

    Args:
        targets: as of `collect_sides`.
        directions: how many of C and of D are kept.

    Raises CordaError: the model has no causal head; there are too few samples with an answer.
    """
    require_causal(model)
    batches = answered_batches(encoded, pad_id, next(model.parameters()).device, batch_tokens)
    layers: dict[str, Sides] = {}
    for members, C, Ds in collect_sides(model, targets, batches, progress):
        input_side = compact(C, directions)
        layers |= {name: Sides(input_side, compact(Ds[name], directions)) for name in members}
    tokens, answers = (sum(int(m.sum()) for m in masks) for masks in zip(*((b.real, b.answers) for b in batches)))
    digests = {name: layer_digest(module) for name, module in targets.items()}
    return Statistics(layers, sum(len(b.real) for b in batches), answers, tokens, digests)
