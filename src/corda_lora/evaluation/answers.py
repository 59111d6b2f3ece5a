"""Log-probabilities of the answers' tokens, under the base model and the tuned one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from ..config import CordaError
from ..data.batches import Encoded, batch_by_length, padded_batch
from ..models.targets import has_new_head
from ..progress import track

Sides = Mapping[str, Callable[[], Any]]  # "base" and "tuned": contexts under which a model is the one or the other
TUNED: Sides = {"tuned": nullcontext}


def sides(model: nn.Module) -> Sides:
    """Contexts under which `model` is the base model and, if it carries an adapter, the tuned one. A classifier whose
    base model has no head for its labels is the tuned one alone.

    Raises CordaError if the adapter cannot be taken off.
    """
    if isinstance(model, PeftModel):
        if (bias := getattr(model.active_peft_config, "bias", "none")) != "none":
            raise CordaError(
                f"the adapter trained biases of the base model (bias {bias}), which stay when it is taken off, so it "
                "cannot be compared with the base model: measure its merged model"
            )
        return TUNED if has_new_head(model) else {"base": partial(_without_adapter, model), "tuned": nullcontext}
    return {"base": nullcontext}


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    """PEFT's `disable_adapter`, in which what trains is still marked so.

    FSDP 2 reads off these marks, at the model's first forward, which dtype the gradients are to have. A measurement
    before the first step is that forward: without marks the gradients of float32 factors would come in bfloat16."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.disable_adapter():
        for parameter in trained:
            parameter.requires_grad_(True)
        yield


@dataclass(frozen=True)
class Answers:
    """The predictions of one batch's answer tokens by one model.

    Attributes:
        log_probs: (a, vocabulary) float32, log p of the token at each of the a answer positions.
        targets: (a,) the tokens that stand there.
        rows: (a,) the sample of the batch that each token belongs to.
        samples: the number of samples in the batch.
        base: (a, vocabulary) the base model's log p, where this is the tuned model and the base model's is known.
    """

    log_probs: Tensor
    targets: Tensor
    rows: Tensor
    samples: int
    base: Tensor | None = None

    @property
    def tokens(self) -> int:
        return len(self.targets)

    @cached_property
    def first_choices(self) -> Tensor:
        """(a,) the most likely token at each position."""
        return self.log_probs.argmax(1)

    def each(self) -> Iterator["Answers"]:
        """The answers of each sample alone."""
        lengths = self.rows.bincount(minlength=self.samples).tolist()
        parts = [part.split(lengths) for part in (self.log_probs, self.targets, self.rows)]
        bases = [None] * self.samples if self.base is None else self.base.split(lengths)
        for log_probs, targets, rows, base in zip(*parts, bases):
            yield Answers(log_probs, targets, rows, 1, base)

    def divergence(self) -> float:
        """KL(base‖tuned) in nats, summed over the tokens."""
        assert self.base is not None
        return float(F.kl_div(self.log_probs, self.base, reduction="sum", log_target=True))


@torch.no_grad()
def read_answers(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    batch_tokens: int = 8192,
    progress: bool = False,
    label: str = "eval",
    compared: Sides | None = None,
    reference: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[str, Answers]]:
    """(side, its predictions) for each batch of samples.

    Args:
        compared: the sides to run. Default: those that the model has.
        reference: the base model's log p for a batch, by the batch's number. Default: the base model is run as a side.
    """
    encoded = with_answers(encoded)
    compared = sides(model) if compared is None else compared
    batches = batch_by_length([len(e.ids) for e in encoded], batch_tokens)
    for number, indices in enumerate(track(batches, label, progress)):
        inputs, answers = padded([encoded[i] for i in indices], tokenizer, model)
        targets = inputs["input_ids"][:, 1:][answers]  # (a,)
        rows = answers.nonzero()[:, 0]  # (a,)
        base = None if reference is None else reference(number).to(answers.device)
        for side, active in compared.items():
            with active():
                log_probs = answer_log_probs(model, inputs, answers)  # (a, vocabulary)
            yield side, Answers(log_probs, targets, rows, len(indices), base)
            if side == "base":
                base = log_probs


def with_answers(encoded: Sequence[Encoded], cut: str = "") -> list[Encoded]:
    """The samples that have a response token with a token before it.

    Raises CordaError if no sample has. For `cut` see `cut_away`."""
    answered = [e for e in encoded if e.targets]
    if not answered:
        raise CordaError(f"no sample has a response to measure{cut}")
    return answered


def answer_log_probs(model: nn.Module, inputs: Mapping[str, Tensor], answers: Tensor) -> Tensor:
    """log p of the next token wherever `answers` is true, float32: (a, vocabulary).

    Args:
        inputs: of the model's forward, of (b, s) tokens.
        answers: (b, s − 1) bool; position i asks for the prediction of token i + 1.
    """
    columns = answers.any(0).nonzero().flatten()  # only these columns go through the output head
    output = model(**inputs, use_cache=False, logits_to_keep=columns)
    return F.log_softmax(output.logits[answers[:, columns]].float(), dim=-1)


def padded(rows: Sequence[Encoded], tokenizer: Any, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """What the model's forward takes, ids and mask (b, s) with the samples' images; and which next-token predictions
    are the answers' (b, s − 1). All on the model's device."""
    inputs, answers = padded_batch(rows, tokenizer.pad_token_id or 0)
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}, answers[:, 1:].to(device)
