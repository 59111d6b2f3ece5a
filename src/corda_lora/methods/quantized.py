"""Methods over a base in 4 bits: every linear layer but the output head in NF4, the adapter in full precision.

They are given the full model, and quantize it. So drift is from the full model's predictions, what quantization lost
included. The starts differ in which values are quantized, Q, and in B A beside them (A (r, n), B (m, r)):

    QLoRA       Q of W, and B = 0
    QPiSSA      Q of W − B A, the head B A of W
    QCorDA      Q of W − B A, the head B A of W oriented by C
    LoftQ       five times: Q of W − B A, and B A the best fit of W − Q
    QERA        Q of W, and B A the best fit of W − Q in C^½
    CLoQ        the same, with Q rounded column by column by C (OPTQ), not to the nearest levels
    folded      QCorDA, then once or several times: B A the best fit of W − Q in C^½, or two-sided, and Q of W − B A,
                rounded column by column by what A leaves of C

C and D are of the task (see `algebra.folding`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple

import peft
import torch
from torch import Tensor, nn

from ..adapters.lora import lora_layers
from ..algebra.decomposition import orient, regularize, split_components
from ..algebra.folding import best_fit, fold
from ..algebra.solvers import chosen_components
from ..config import CordaError
from ..config.values import Count, NonNegative
from ..data.batches import cut_away, encode_all
from ..devices import compute_device, double_device
from ..models.weights import (
    Quantized,
    check_quantizer,
    quantize,
    quantized_layer,
    quantized_names,
    weight_of,
)
from ..preprocess.statistics import answered_batches, collect_sides
from .baselines import lora
from .corda import corda
from .registry import RATES, SLOW_RATES, Prepared, Setup, method


class Layer(NamedTuple):
    """What a start is made of.

    Attributes:
        W: the full weight (m, n).
        dtype: of the model, in which the layer will compute.
        C: (n, n) of its inputs; None if the start does not look at the task.
        D: (m, m) of the gradients at its outputs; likewise.
    """

    W: Tensor
    dtype: torch.dtype
    C: Tensor | None = None
    D: Tensor | None = None

    def quantize(self, W: Tensor, metric: Tensor | None = None) -> tuple[Quantized, Tensor]:
        return quantize(W, self.dtype, metric=metric)

    def to_nearest(self, W: Tensor, _: Tensor) -> tuple[Quantized, Tensor]:
        """As `quantize`, whatever the metric."""
        return quantize(W, self.dtype)

    def zero(self, r: int) -> tuple[Tensor, Tensor]:
        m, n = self.W.shape
        return self.W.new_zeros(r, n), self.W.new_zeros(m, r)


Start = Callable[[Layer, int], tuple[Quantized, Tensor, Tensor]]  # (layer, r) → what is stored, A (r, n), B (m, r)


def loftq(layer: Layer, r: int) -> tuple[Quantized, Tensor, Tensor]:
    return fold(layer.W, layer.to_nearest, *layer.zero(r))


def qpissa(layer: Layer, r: int) -> tuple[Quantized, Tensor, Tensor]:
    A, B = best_fit(layer.W, r)
    return layer.quantize(layer.W - (B @ A).to(layer.W))[0], A, B


def qera(layer: Layer, r: int) -> tuple[Quantized, Tensor, Tensor]:
    return fold(layer.W, layer.to_nearest, *layer.zero(r), layer.C, rounds=1)


def cloq(layer: Layer, r: int) -> tuple[Quantized, Tensor, Tensor]:
    metric = None if layer.C is None or not layer.C.any() else regularize(layer.C)
    stored, A, B = fold(layer.W, lambda W, _: layer.quantize(W, metric), *layer.zero(r), layer.C, rounds=1)
    lengths = B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny)
    return stored, A * lengths[:, None], B / lengths  # split as in the paper


def qcorda(layer: Layer, r: int) -> tuple[Quantized, Tensor, Tensor]:
    A, B = head(layer, r, "paper")
    return layer.quantize(layer.W - (B @ A).to(layer.W))[0], A, B


def folded(
    layer: Layer, r: int, rounds: int = 5, two_sided: bool = False, by_columns: bool = True, from_head: bool = True
) -> tuple[Quantized, Tensor, Tensor]:
    A, B = head(layer, r, "balanced") if from_head else layer.zero(r)
    quantize = layer.quantize if by_columns else layer.to_nearest
    return fold(layer.W, quantize, A, B, layer.C, layer.D if two_sided else None, rounds)


def head(layer: Layer, r: int, split: str) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r): the first r components of W oriented by C, which CorDA (ipm) takes."""
    U, sigma = chosen_components(layer.W, lambda W: orient(W, layer.C, "covariance"), "ipm", r)
    B, A = split_components(U, sigma, U.T @ layer.W.double(), split)
    return A, B


# --- over the whole model --------------------------------------------------------------------------------------------


def over_nf4(
    model: nn.Module, setup: Setup, start: Start, of_task: bool = False, samples: Count | None = None
) -> Prepared:
    """The start of every layer is cached: what is stored of the weight, A and B.

    Args:
        of_task: whether the start looks at C and D. They are held whole, of all layers at once.
        samples: how many samples of the task they are of. Default: the comparison's number.
    """
    names = _checked_names(model, setup)
    root = (setup.lora_alpha / setup.r) ** 0.5

    def starts() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, layer in _layers(model, setup, of_task, samples):
            stored, A, B = start(layer, setup.r)
            tensors |= {f"{name}.A": (A / root).float().cpu(), f"{name}.B": (B / root).float().cpu()}
            tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in stored.items()}
        return tensors

    made = setup.cached(starts)
    peft_model = peft.get_peft_model(model, setup.lora())
    stored = {}
    for name, layer in lora_layers(peft_model).items():
        for factors, side in ((layer.lora_A, "A"), (layer.lora_B, "B")):
            weight = factors["default"].weight
            weight.data = made[f"{name}.{side}"].to(weight)
        stored[name] = {key.removeprefix(f"{name}."): made[key] for key in made if key.startswith(f"{name}.weight")}
    return Prepared(in_nf4(peft_model, names, stored))


def _layers(model: nn.Module, setup: Setup, of_task: bool, samples: int | None) -> Iterator[tuple[str, Layer]]:
    device, dtype = compute_device(model), _dtype(model)
    left, where = dict(setup.targets), double_device(device)
    if of_task:
        max_length, shown = setup.data("learn").max_length, setup.context("learn", samples)
        encoded = encode_all(setup.tokenizer, shown, max_length)
        cut = cut_away(shown, encoded, max_length)
        batches = answered_batches(encoded, setup.tokenizer.pad_token_id or 0, cut=cut)
        for members, C, Ds in collect_sides(model, setup.targets, batches, progress=False):
            for name in members:
                W = weight_of(left.pop(name)).to(where, torch.float32)
                yield name, Layer(W, dtype, C.to(where), Ds[name].to(where))
    for name, module in left.items():  # an expert that no token came to, too
        yield name, Layer(weight_of(module).to(where, torch.float32), dtype)


def _checked_names(model: nn.Module, setup: Setup) -> list[str]:
    """The layers to quantize. Raises CordaError if the model cannot be quantized, or is already."""
    if getattr(model, "is_quantized", False):
        raise CordaError("it quantizes the model, which is quantized already: give the full model, or compare `lora`")
    check_quantizer(compute_device(model))
    return quantized_names(model, setup.targets)[0]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@torch.no_grad()
def in_nf4(
    peft_model: peft.PeftModel, names: Iterable[str], stored: Mapping[str, Quantized] | None = None
) -> peft.PeftModel:
    """The adapted model with the layers of these names in NF4, in place.

    Args:
        stored: of the layers whose weight is not to be quantized as it is.
    """
    model, dtype, made = peft_model.get_base_model(), _dtype(peft_model), stored or {}
    adapted = lora_layers(peft_model)
    for name in names:
        layer = adapted[name].get_base_layer() if name in adapted else model.get_submodule(name)
        quantized = quantized_layer(layer, made.get(name) or quantize(weight_of(layer), dtype)[0], dtype)
        model.set_submodule(f"{name}.base_layer" if name in adapted else name, quantized)
    return peft_model


@method("qlora", "QLoRA", "Dettmers et al., arXiv 2305.14314; PEFT, bitsandbytes", after=("keep",))
def qlora(model: nn.Module, setup: Setup, keep: NonNegative = 0.0, samples: Count | None = None) -> Prepared:
    """
    Args:
        keep, samples: as of `lora`.
    """
    names = _checked_names(model, setup)
    prepared = lora(model, setup, keep, samples)
    return prepared._replace(model=in_nf4(prepared.model, names))


method("loftq", "LoftQ", "Li et al., arXiv 2310.08659; ours", prepares_from="weights")(
    partial(over_nf4, start=loftq, of_task=False, samples=None)
)
method("qpissa", "QPiSSA", "Meng et al., arXiv 2404.02948; ours", (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3), "weights")(
    partial(over_nf4, start=qpissa, of_task=False, samples=None)
)
method("qera", "QERA", "Zhang et al., arXiv 2410.06040; ours", prepares_from="learn")(
    partial(over_nf4, start=qera, of_task=True)
)
method("cloq", "CLoQ", "Deng et al., arXiv 2501.18475; ours", prepares_from="learn")(
    partial(over_nf4, start=cloq, of_task=True)
)
method("qcorda", "QCorDA", "Yang et al., arXiv 2506.13187; ours", SLOW_RATES, "learn")(
    partial(over_nf4, start=qcorda, of_task=True)
)


@method("qcorda-folded", "QCorDA, folded", "Yang et al., arXiv 2506.13187; ours", RATES, "learn")
def qcorda_folded(
    model: nn.Module,
    setup: Setup,
    rounds: Count = 5,
    two_sided: bool = True,
    by_columns: bool = True,
    from_head: bool = True,
    samples: Count | None = None,
) -> Prepared:
    """
    Args:
        rounds: how often the weight is quantized and the adapter fitted.
        two_sided: fit in D^½ · C^½. Otherwise in C^½.
        by_columns: round by what the adapter leaves of C (OPTQ). Otherwise to the nearest levels.
        from_head: begin with QCorDA's head of W in the adapter. Otherwise W itself is quantized first.
        samples: how many samples of the task C and D are of. Default: the comparison's number.
    """
    start = partial(folded, rounds=rounds, two_sided=two_sided, by_columns=by_columns, from_head=from_head)
    return over_nf4(model, setup, start, True, samples)


@method(
    "qcorda-kpm-anchored",
    "QCorDA kpm, anchored",
    "Yang et al., arXiv 2506.13187; ours",
    (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    "keep",
    after=("keep",),
)
def qcorda_kpm(
    model: nn.Module,
    setup: Setup,
    keep: NonNegative = 0.0,
    samples: Count | None = None,
    orientation: Literal["covariance", "two_sided"] | None = None,
) -> Prepared:
    """As corda-kpm-anchored, whose start and penalty are of the full model, over NF4.

    Args:
        keep, samples, orientation: as of `corda`.
    """
    names = _checked_names(model, setup)
    prepared = corda(model, setup, samples=samples, keep=keep, mode="kpm", split="anchored", orientation=orientation)
    return prepared._replace(model=in_nf4(prepared.model, names))
