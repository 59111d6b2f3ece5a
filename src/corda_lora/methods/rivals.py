"""Rivals at learning without forgetting: each keeps the ability of the context by its own means.

Three add a term to the loss of a LoRA, in nats per answer token of the context, so that one weight is comparable with
another: distillation, replay and EWC.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.lora import lora_layers
from ..config import CordaError, Count, Range
from ..data.batches import Encoded, encode
from ..evaluation.answers import answer_log_probs, padded, with_answers
from .registry import Prepared, Setup, method

Weight = Annotated[float, Range(ge=0)]

# --- terms of the loss -----------------------------------------------------------------------------------------------


@method("distill", "LoRA + distillation", "Li & Hoiem, arXiv 1606.09282; ours")
def distill(
    model: nn.Module, setup: Setup, weight: Weight = 1.0, size: Count = 16, samples: Count | None = None
) -> Prepared:
    """The loss has the term weight · KL(base‖tuned), the mean over the answer tokens of the context. (Li & Hoiem
    distil on the new task's inputs, as they keep no others.) The base model is the model without its adapter and
    without dropout, run in every step.

    Args:
        size: how many samples of the context a step draws.
        samples: how many there are to draw from. Default: the comparison's number.
    """
    peft_model = peft.get_peft_model(model, setup.lora())

    def divergence(ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        peft_model.eval()
        with torch.no_grad(), peft_model.disable_adapter():
            base = answer_log_probs(peft_model, ids, mask, answers)  # (a, vocabulary)
        peft_model.train()
        return F.kl_div(answer_log_probs(peft_model, ids, mask, answers), base, reduction="sum", log_target=True)

    return Prepared(
        peft_model, penalties={"distillation": _on_context(peft_model, setup, weight, size, samples, divergence)}
    )


@method("replay", "LoRA + replay", "Rolnick et al., arXiv 1811.11682; ours")
def replay(
    model: nn.Module, setup: Setup, weight: Weight = 1.0, size: Count = 16, samples: Count | None = None
) -> Prepared:
    """The loss has the term weight · (cross entropy of the context's own answers), the mean over their tokens: the
    context is mixed into the task.

    Args:
        size, samples: as in `distill`.
    """
    model = peft.get_peft_model(model, setup.lora())

    def cross_entropy(ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        return F.nll_loss(answer_log_probs(model, ids, mask, answers), ids[:, 1:][answers], reduction="sum")

    return Prepared(model, penalties={"replay": _on_context(model, setup, weight, size, samples, cross_entropy)})


def _on_context(
    model: nn.Module,
    setup: Setup,
    weight: float,
    size: int,
    samples: int | None,
    total: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[], Tensor]:
    """A term of the loss over `size` samples of the context, which are drawn for each optimizer step and dealt out to
    its micro-batches.

    Args:
        total: (ids (b, s), attention mask (b, s), answers (b, s − 1)) → the sum over the answer tokens.
    """
    encoded = _encoded_context(setup, samples)
    if size > len(encoded):
        raise CordaError(f"size is {size}, but there are only {len(encoded)} samples with an answer to draw from")
    parts = setup.train.batch_size // (setup.train.micro_batch_size or setup.train.batch_size)
    shares = _shares(encoded, size, parts, setup.train.seed)

    def term() -> Tensor:
        rows, factor = next(shares)
        if not rows:  # more micro-batches than samples
            return torch.zeros((), device=next(model.parameters()).device)
        return weight * factor * total(*padded(rows, setup.tokenizer, model))

    return term


def _encoded_context(setup: Setup, samples: int | None) -> list[Encoded]:
    max_length = setup.data("keep").max_length
    return with_answers([encode(setup.tokenizer, s, max_length) for s in setup.context("keep", samples)])


def _shares(encoded: Sequence[Encoded], size: int, parts: int, seed: int) -> Iterator[tuple[list[Encoded], float]]:
    """For each micro-batch, its share of the samples that the step draws, and the factor by which a sum over its answer
    tokens is multiplied, so that the mean over the step's micro-batches is the mean over the step's answer tokens.

    Samples are drawn without replacement until all were drawn. Alike lengths go together."""
    rng = random.Random(seed)
    order: list[Encoded] = []
    while True:
        while len(order) < size:
            order += rng.sample(encoded, len(encoded))
        drawn, order = sorted(order[:size], key=lambda e: len(e.ids)), order[size:]
        factor = parts / sum(e.targets for e in drawn)
        for i in range(parts):
            yield drawn[i * size // parts : (i + 1) * size // parts], factor


@method("ewc", "LoRA + EWC", "Kirkpatrick et al., arXiv 1612.00796; ours", prepares_from="keep")
def ewc(model: nn.Module, setup: Setup, weight: Weight = 1.0, samples: Count | None = None) -> Prepared:
    """The loss has the term weight · ½ Σ F_ij ΔW_ij² over the adapted weights (Eq. 3), with ΔW = s·B A and F the
    diagonal of the base model's Fisher information on the context: at weight 1, the drift per answer token that the
    diagonal predicts to second order.

    Args:
        samples: how many samples of the context F is computed of. Default: the comparison's number.
    """
    information = setup.cached(lambda: _fisher(model, setup, samples))
    model = peft.get_peft_model(model, setup.lora())
    device = next(model.parameters()).device
    pairs = [(information[name].to(device), layer) for name, layer in lora_layers(model).items()]

    def drift() -> Tensor:
        totals = [(F_ * layer.get_delta_weight("default").square()).sum() for F_, layer in pairs]
        return weight / 2 * torch.stack(totals).sum()

    return Prepared(model, penalties={"ewc": drift})


def _fisher(model: nn.Module, setup: Setup, samples: int | None) -> dict[str, Tensor]:
    """F of each target's weight, in its layout: the mean over answer tokens of (∂ log p(y) / ∂W)², y drawn from the
    model (so the true Fisher information, not the empirical one).

    The answers' tokens are drawn independently, each after the context's own text, so the gradients of a sample's
    tokens are uncorrelated: the square of their sum is, in expectation, the sum of their squares. Hence one backward
    pass for each sample."""
    if getattr(model, "is_quantized", False):
        raise CordaError("EWC needs the gradient of full weights, and the model is quantized")
    encoded = _encoded_context(setup, samples)
    weights: list[Tensor] = [module.weight for module in setup.targets.values()]  # type: ignore[misc]
    model.requires_grad_(False).eval()
    for weight in weights:
        weight.requires_grad_(True)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    generator = torch.Generator(weights[0].device).manual_seed(0)
    for row in encoded:
        log_probs = answer_log_probs(model, *padded([row], setup.tokenizer, model))  # (a, vocabulary)
        y = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)  # (a, 1)
        gradients = torch.autograd.grad(log_probs.gather(1, y).sum(), weights, allow_unused=True)
        for total, gradient in zip(sums, gradients):
            if gradient is not None:  # of an expert that no token came to
                total += gradient.float().square()
    tokens = sum(row.targets for row in encoded)
    return {name: total / tokens for name, total in zip(setup.targets, sums)}
