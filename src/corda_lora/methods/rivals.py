"""Rivals at learning without forgetting: each keeps the ability of the context by its own means.

Three add a term to the loss of a LoRA, in nats per answer token of the context, so that one weight is comparable with
another: distillation, replay and EWC. The others choose the directions of the update: by the weights (OSF, MiCA,
OPLoRA), by contexts (SC-LoRA), or in training (DEFT).
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..adapters.lora import lora_layers
from ..config import CordaError
from ..config.values import Count, NonNegative, Range
from ..data.batches import Encoded, context_batches, cut_away, encode_all
from ..devices import compute_device, double_device
from ..evaluation.answers import answer_log_probs, padded, with_answers
from ..models.weights import weight_of, weight_shape
from ..preprocess.context import Context
from ..preprocess.walk import Place, walk
from .baselines import from_start
from .registry import Prepared, Setup, method

# --- terms of the loss -----------------------------------------------------------------------------------------------


@method("distill", "LoRA + distillation", "Li & Hoiem, arXiv 1606.09282; ours")
def distill(
    model: nn.Module, setup: Setup, weight: NonNegative = 1.0, size: Count = 16, samples: Count | None = None
) -> Prepared:
    """The loss has the term weight · KL(base‖tuned), the mean over the answer tokens of the context. (Li & Hoiem
    distil on the new task's inputs, as they keep no others.) The base model is the model without its adapter and
    without dropout, run in every step.

    Args:
        size: how many samples of the context a step draws.
        samples: how many there are to draw from. Default: the comparison's number.
    """
    peft_model = peft.get_peft_model(model, setup.lora())

    def divergence(inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
        peft_model.eval()
        with torch.no_grad(), peft_model.disable_adapter():
            base = answer_log_probs(peft_model, inputs, answers)  # (a, vocabulary)
        peft_model.train()
        return F.kl_div(answer_log_probs(peft_model, inputs, answers), base, reduction="sum", log_target=True)

    term = _on_context(peft_model, setup, weight, size, samples, divergence)
    return Prepared(peft_model, rehearsals={"distillation": term})


@method("replay", "LoRA + replay", "Rolnick et al., arXiv 1811.11682; ours")
def replay(
    model: nn.Module, setup: Setup, weight: NonNegative = 1.0, size: Count = 16, samples: Count | None = None
) -> Prepared:
    """The loss has the term weight · (cross entropy of the context's own answers), the mean over their tokens: the
    context is mixed into the task.

    Args:
        size, samples: as in `distill`.
    """
    model = peft.get_peft_model(model, setup.lora())

    def cross_entropy(inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
        right = inputs["input_ids"][:, 1:][answers]
        return F.nll_loss(answer_log_probs(model, inputs, answers), right, reduction="sum")

    return Prepared(model, rehearsals={"replay": _on_context(model, setup, weight, size, samples, cross_entropy)})


def _on_context(
    model: nn.Module,
    setup: Setup,
    weight: float,
    size: int,
    samples: int | None,
    total: Callable[[dict[str, Tensor], Tensor], Tensor],
) -> Callable[[], Tensor]:
    """A term of the loss over `size` samples of the context, which are drawn for each optimizer step and dealt out to
    its micro-batches.

    Args:
        total: (inputs of b × s tokens, answers (b, s − 1)) → the sum over the answer tokens.
    """
    encoded = _encoded_context(setup, samples, size)
    parts = setup.train.batch_size // (setup.train.micro_batch_size or setup.train.batch_size)
    shares = _shares(encoded, size, parts, setup.train.seed)

    def term() -> Tensor:
        rows, factor = next(shares)
        if not rows:  # more micro-batches than samples
            return torch.zeros((), device=next(model.parameters()).device)
        return weight * factor * total(*padded(rows, setup.tokenizer, model))

    return term


def _encoded_context(setup: Setup, samples: int | None, size: int = 1) -> list[Encoded]:
    """The samples of the ability to keep that have an answer.

    Raises CordaError if there are fewer than `size`."""
    max_length, shown = setup.data("keep").max_length, setup.context("keep", samples)
    encoded = encode_all(setup.tokenizer, shown, max_length)
    cut = cut_away(shown, encoded, max_length)
    encoded = with_answers(encoded, cut)
    if size > len(encoded):
        raise CordaError(f"size is {size}, but there are only {len(encoded)} samples with an answer to draw from{cut}")
    return encoded


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


@method("ewc", "LoRA + EWC", "Kirkpatrick et al., arXiv 1612.00796; ours", prepares_from="keep", after=("weight",))
def ewc(model: nn.Module, setup: Setup, weight: NonNegative = 1.0, samples: Count | None = None) -> Prepared:
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


# --- directions of the update ----------------------------------------------------------------------------------------


@method("osf", "OSF", "Nayak et al., arXiv 2504.07097; PEFT", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3))
def osf(model: nn.Module, setup: Setup) -> Prepared:
    """The last r singular triples of each weight are trained. The gradients of their vectors are projected away from
    the vectors before. (The paper trains more triples; r holds the vectors to the budget.)"""
    if any(isinstance(module, Conv1D) for module in setup.targets.values()):
        raise CordaError("OSF in PEFT adapts nn.Linear alone, and the model has Conv1D")
    _leave_directions("r", setup.r, setup)
    kept = {name: min(weight_shape(module)) - setup.r for name, module in setup.targets.items()}
    config = peft.OSFConfig(
        target_modules=list(setup.targets),
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in kept.items()},
        task_type="CAUSAL_LM",
    )
    return Prepared(peft.get_peft_model(model, config))


@method("deft", "DEFT", "Kumar et al., arXiv 2509.22793; PEFT")
def deft(model: nn.Module, setup: Setup, decomposition: Literal["relu", "qr"] = "relu") -> Prepared:
    """W + Q (R − Pᵀ W), with Q and P of one trained d_out × r matrix, and R trained, r × d_in, from Pᵀ W on.

    Args:
        decomposition: of the trained matrix: `relu` takes it as Q, and its positive part as P; `qr` takes its
            orthonormal basis as both.
    """
    config = peft.DeftConfig(
        r=setup.r,
        target_modules=list(setup.targets),
        decomposition_method=decomposition,
        deft_dropout=setup.train.lora_dropout,
        fan_in_fan_out=setup.lora().fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    return Prepared(peft.get_peft_model(model, config))


@method("mica", "MiCA", "Rüdiger & Raschka, arXiv 2604.01694; PEFT", (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2))
def mica(model: nn.Module, setup: Setup) -> Prepared:
    """B is frozen on the last r left singular vectors of W, and A is trained from zero."""
    return Prepared(peft.get_peft_model(model, setup.lora(init_lora_weights="mica")))


def _leave_directions(name: str, taken: int, setup: Setup) -> None:
    """Raises CordaError if `taken` of a layer's singular directions are all that it has."""
    narrowest = min(min(weight_shape(module)) for module in setup.targets.values())
    if taken >= narrowest:
        raise CordaError(
            f"{name} is {taken}, but must be below {narrowest}, the singular directions of the narrowest layer"
        )


@method("oplora", "OPLoRA", "Xiong & Xie, arXiv 2510.13003; ours", prepares_from="weights")
def oplora(model: nn.Module, setup: Setup, k: Count | None = None) -> Prepared:
    """ΔW = s·(P_L B)(A P_R), with P_L = I − U_k U_kᵀ and P_R = I − V_k V_kᵀ: the first k singular triples of W stay as
    they are. A and B are trained through the projections, and end as an ordinary LoRA. It does not compile: each
    parametrized module is of a class of its own, and blocks would share no graph.

    Args:
        k: default: r.
    """
    k = k or setup.r
    _leave_directions("k", k, setup)

    def leading() -> dict[str, Tensor]:
        tensors, device = {}, double_device(compute_device(model))
        for name, module in setup.targets.items():
            U, _, Vh = torch.linalg.svd(weight_of(module).to(device, torch.float64), full_matrices=False)
            tensors[f"{name}.U"], tensors[f"{name}.V"] = U[:, :k].float().cpu(), Vh[:k].T.float().cpu()
        return tensors

    directions = setup.cached(leading)
    peft_model = peft.get_peft_model(model, setup.lora())
    factors: list[nn.Module] = []
    for name, layer in lora_layers(peft_model).items():
        for factor, Q, side in ((layer.lora_A, directions[f"{name}.V"], 1), (layer.lora_B, directions[f"{name}.U"], 0)):
            away = _Away(Q.to(factor["default"].weight.device), side)
            parametrize.register_parametrization(factor["default"], "weight", away)
            factors.append(factor["default"])
    return Prepared(peft_model, callbacks=[_Finish(factors)], compiles=False)


class _Away(nn.Module):
    """X without its components along the orthonormal columns of Q (d, k), in its columns (side 0) or rows (side 1)."""

    def __init__(self, Q: Tensor, side: int):
        super().__init__()
        self.Q, self.side = nn.Buffer(Q), side

    def forward(self, X: Tensor) -> Tensor:
        with torch.autocast(X.device.type, enabled=False):  # bfloat16 would leave a hundredth of the components
            return X - self.Q @ (self.Q.T @ X) if self.side == 0 else X - (X @ self.Q) @ self.Q.T


class _Finish(TrainerCallback):
    """When training ends, the parametrized weights become plain parameters, as they are."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for module in self.modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


@method(
    "sc-lora",
    "SC-LoRA",
    "Luo et al., arXiv 2505.23724; ours",
    (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    prepares_from="keep",
)
def sc_lora(model: nn.Module, setup: Setup, beta: Annotated[float, Range(ge=0, le=1)] = 0.5) -> Prepared:
    """B A = Q Qᵀ W, beside the frozen residual (Algorithm 1). The columns of Q are the first r eigenvectors of
    (1 − `beta`)·Cov₊ − `beta`·Cov₋, the covariances of the layer's outputs, bias aside, over samples of the task and of
    the ability to keep."""
    s = setup.lora_alpha / setup.r

    def factors() -> dict[str, Tensor]:
        batches, rounds, tensors, device = [], [], {}, compute_device(model)
        for i, kind in enumerate(("learn", "keep")):
            more, _ = context_batches(setup.tokenizer, setup.context(kind), setup.data(kind).max_length)
            batches += more
            rounds += [i] * len(more)
        for _, groups in walk(model, setup.targets, Context(batches, rounds), Place(device)):
            for names, covariances in groups or []:
                plus, minus = (C.to(double_device(device), torch.float64) for C in covariances)  # (d_in, d_in)
                for name in names:
                    W = weight_of(setup.targets[name]).to(plus)  # (d_out, d_in)
                    reward = W @ ((1 - beta) * plus - beta * minus) @ W.T  # (d_out, d_out)
                    Q = torch.linalg.eigh(reward).eigenvectors[:, -setup.r :].flip(1)  # (d_out, r)
                    tensors[f"{name}.A"] = (Q.T @ W / s**0.5).float().cpu()
                    tensors[f"{name}.B"] = (Q / s**0.5).float().cpu()
        return tensors

    return Prepared(from_start(model, setup, setup.cached(factors)))
