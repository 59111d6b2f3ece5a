"""Both sides of every layer on a context: C of its inputs, D of the gradients at its outputs; in memory and on disk.

They predict what a change of the weights does to the context (see `algebra.second_order`). Here they are collected of a
model that is on its device whole.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..algebra.covariance import float32_products
from ..algebra.second_order import Low, compact
from ..config import CordaError
from ..data.batches import Encoded, batch_by_length, padded_batch
from ..devices import free_bytes
from ..files import whole_file
from ..models.lockstep import find_blocks, parking
from ..models.targets import require_causal
from ..models.weights import layer_digest, weight_shape
from ..progress import progress_bar
from .backward import StepBack, run_back, walk_back
from .context import Batch, Context, answer_mask, token_masks
from .walk import Place, choose_parking

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
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
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


class FewAnswersError(CordaError):
    """Too few samples of the context have an answer, as their tokens are."""


def check_samples(answered: int, cut: str = "") -> None:
    """Raises FewAnswersError if so few samples with an answer say too little of others.

    Args:
        cut: see `cut_away`.
    """
    if answered < LEAST_SAMPLES:
        raise FewAnswersError(
            f"the context has {answered} samples with a response, but what it costs to change the model is only known "
            f"from {LEAST_SAMPLES} on, better some hundreds{cut}"
        )


def answered_batches(encoded: Sequence[Encoded], pad_id: int, batch_tokens: int = 1024, cut: str = "") -> list[Batch]:
    """The samples that have an answer, in padded batches whose labels are the answers.

    Raises FewAnswersError if there are fewer than `LEAST_SAMPLES`. For `cut` see `check_samples`."""
    encoded = [e for e in encoded if e.targets]
    check_samples(len(encoded), cut)
    batches: list[Batch] = []
    for indices in batch_by_length([len(e.ids) for e in encoded], batch_tokens):
        batch, answers = padded_batch([encoded[i] for i in indices], pad_id)
        batches.append(batch | {"labels": batch["input_ids"].masked_fill(~answers, -100)})
    return batches


def tokens_and_answers(batches: Sequence[Batch]) -> tuple[int, int]:
    """How many tokens batches have in all, and in the answers."""
    return sum(int(token_masks(b)[0].sum()) for b in batches), sum(int(answer_mask(b).sum()) for b in batches)


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
    model: nn.Module, targets: Mapping[str, nn.Module], batches: Sequence[Batch], progress: bool = True
) -> Iterator[WholeSides]:
    """C and D of a causal language model's target layers, whole, over batches with answers. Padding counts on neither
    side. Layers that no token reached are missing.

    The matrices are as large as the weights, or larger (63 GB of a LLaMA of 7 billion parameters). Where half of the
    device's free memory holds those of all layers, each batch goes back through the whole model at once; else all go
    block by block (see `backward`), and a block's matrices are dropped before the next one's are made.

    Args:
        targets: layers by name. Layers that are given the same tensor share C.

    Raises CordaError: the model has no causal head; where it goes block by block, what `walk_back` refuses.
    """
    require_causal(model)
    context, device = Context(batches), next(model.parameters()).device
    with float32_products("highest"):
        for _, groups, gradients in _steps(model, targets, context, device, progress):
            while groups:  # popped: a group that is done frees its matrices
                members, Cs = groups.pop(0)
                for C in Cs:  # none of a layer that no token reached
                    yield WholeSides(members, C, {name: gradients.pop(name) for name in members})


def _steps(
    model: nn.Module, targets: Mapping[str, nn.Module], context: Context, device: torch.device, progress: bool
) -> Iterator[StepBack]:
    """All layers at once where there is room, else block by block."""
    size = 4 * sum(m * m + n * n for m, n in map(weight_shape, targets.values()))
    if 2 * size < (free_bytes(device) or psutil.virtual_memory().available):
        names, groups, gradients = run_back(model, targets, context, progress)
        with progress_bar("its directions", len(groups or ()), progress) as advance:
            while groups:
                yield StepBack(names, [groups.pop(0)], gradients)
                advance()
        return
    blocks = len(find_blocks(model, list(targets)))
    with tempfile.TemporaryDirectory() as folder, progress_bar("the context", 2 * blocks, progress) as advance:
        where = choose_parking("auto", model, context.batches, device, states=2 + blocks)
        place = Place(device, park=parking(where, Path(folder)))
        for step in walk_back(model, targets, context, place, on_block=advance):
            yield step
            advance()


def collect_statistics(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    encoded: Sequence[Encoded],
    pad_id: int,
    batch_tokens: int = 1024,
    directions: int = DIRECTIONS,
    progress: bool = True,
    cut: str = "",
) -> Statistics:
    """C and D of a causal language model's target layers over samples with answers, in small (see `compact`) and on the
    CPU.

    Args:
        targets: as of `collect_sides`.
        directions: how many of C and of D are kept.
        cut: see `check_samples`.

    Raises CordaError as `collect_sides` does, and if there are too few samples with an answer.
    """
    require_causal(model)
    device, batches = next(model.parameters()).device, answered_batches(encoded, pad_id, batch_tokens, cut)
    layers: dict[str, Sides] = {}

    def small(M: Tensor) -> Low:
        return Low(*(part.cpu() for part in compact(M.to(device), directions)))

    for members, C, Ds in collect_sides(model, targets, batches, progress):
        input_side = small(C)
        layers |= {name: Sides(input_side, small(Ds.pop(name))) for name in members}
    digests = {name: layer_digest(module) for name, module in targets.items()}
    samples = sum(len(batch["labels"]) for batch in batches)
    tokens, answers = tokens_and_answers(batches)
    return Statistics({n: layers[n] for n in targets if n in layers}, samples, answers, tokens, digests)
