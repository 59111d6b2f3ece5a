"""The methods of others, each a few lines over the library that does it best."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import peft.optimizers
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .. import peft as peft_
from ..adapters.lora import install, lora_layers
from ..config import CordaConfig, CordaError
from ..config.values import NonNegative
from ..data.batches import context_batches, cut_away, encode, encode_all, padded_batch
from ..data.samples import Sample
from ..devices import compute_device, double_device
from ..models.seeing import freeze_tower, image_side
from ..models.targets import is_classifier, is_of_head
from ..models.weights import weight_of, weight_shape
from ..preprocess.context import Context
from ..preprocess.layer import LayerStart
from ..preprocess.pipeline import Start
from ..preprocess.walk import Place, walk
from . import adapterdrop as adapterdrop_
from . import dylora as dylora_
from .keeping import AFTER, what_is_kept, with_penalties
from .registry import SLOW_RATES, Prepared, Setup, count_parameters, method

# --- without low-rank factors ----------------------------------------------------------------------------------------


@method("full", "full fine-tuning", "transformers", SLOW_RATES)
def full(model: nn.Module, setup: Setup) -> Prepared:
    freeze_tower(model.float().requires_grad_(True))
    return Prepared(model)


@method("bitfit", "BitFit", "Ben Zaken et al., arXiv 2106.10199", (5e-4, 1e-3, 2e-3, 5e-3, 1e-2))
def bitfit(model: nn.Module, setup: Setup) -> Prepared:
    model.float()  # bfloat16 would round most steps away
    sees = image_side(model)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias") and not sees(name)]
    heads = [p for name, p in model.named_parameters() if is_classifier(model) and is_of_head(name)]
    if not biases:
        raise CordaError(f"BitFit trains biases, and {type(model).__name__} has none")
    model.requires_grad_(False)
    for parameter in (*biases, *heads):
        parameter.requires_grad_(True)
    return Prepared(model)


@method("adapterdrop", "AdapterDrop", "Rücklé et al., arXiv 2010.11918; ours", (2e-4, 5e-4, 1e-3, 2e-3, 5e-3))
def adapterdrop(model: nn.Module, setup: Setup, drop: int | None = None) -> Prepared:
    """Robust training: each step leaves out the adapters of the lowest n blocks, n uniform in 0 ... `drop`. Default:
    all blocks but one."""
    width = adapterdrop_.width_for(model, setup.budget)
    model, callback = adapterdrop_.install(model, width, drop)
    return Prepared(model, callbacks=[callback])


# --- LoRA and its relatives, through PEFT ----------------------------------------------------------------------------


@method("lora", "LoRA", "Hu et al., arXiv 2106.09685; PEFT", after=AFTER)
def lora(
    model: nn.Module,
    setup: Setup,
    keep: NonNegative = 0.0,
    samples: int | None = None,
    keep_generic: NonNegative = 0.0,
) -> Prepared:
    """
    Args:
        keep: weight λ of the predicted drift in the loss (see `training.keeping`).
        samples: how many samples of the ability to keep it is predicted from. Default: the comparison's number.
        keep_generic: as in `corda`.
    """
    kept = what_is_kept(model, setup, keep, samples, keep_generic)
    return with_penalties(Prepared(peft.get_peft_model(model, setup.lora())), setup, kept)


@method("dora", "DoRA", "Liu et al., arXiv 2402.09353; PEFT")
def dora(model: nn.Module, setup: Setup) -> Prepared:
    """It does not compile: PEFT asks for the class of the weights in each forward, which breaks a trace."""
    return Prepared(peft.get_peft_model(model, setup.lora(use_dora=True)), compiles=False)


@method("lora+", "LoRA+", "Hayou et al., arXiv 2402.12354; PEFT", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3))
def lora_plus(model: nn.Module, setup: Setup, ratio: float = 16.0) -> Prepared:
    """The learning rate is that of A; the learning rate of B is `ratio` times as high."""
    model = peft.get_peft_model(model, setup.lora())
    return Prepared(model, adamw_with_ratio(model, setup, ratio))


def adamw_with_ratio(model: nn.Module, setup: Setup, ratio: float) -> torch.optim.Optimizer:
    """AdamW whose learning rate of every B is `ratio` times that of A."""
    return peft.optimizers.create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=setup.train.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=setup.train.weight_decay,
    )


@method("lora-fa", "LoRA-FA", "Zhang et al., arXiv 2308.03303; PEFT", (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2))
def lora_fa(model: nn.Module, setup: Setup) -> Prepared:
    model, train = peft.get_peft_model(model, setup.lora()), setup.train
    optimizer = peft.optimizers.create_lorafa_optimizer(
        model, setup.r, setup.lora_alpha, train.learning_rate, train.weight_decay
    )
    return Prepared(model, optimizer)


@method("adalora", "AdaLoRA", "Zhang et al., arXiv 2303.10512; PEFT", (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2))
def adalora(
    model: nn.Module,
    setup: Setup,
    start: float = 1.5,
    warmup: float = 0.1,
    final: float = 0.3,
    orthogonality: float = 0.5,
) -> Prepared:
    """Ranks begin at `start`·r and are pruned to r on average. As for all methods, the budget is of parameters. PEFT's
    budget is of ranks, and exceeds ours if the ranks go to wide layers, so it is corrected after each pruning.

    Args:
        warmup: share of the steps before the first pruning.
        final: share of the steps after the last pruning.
        orthogonality: weight of the paper's regularization (Eq. 4), as the authors' code and PEFT compute it: the mean
            of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius) over all layers.
    """
    config = setup.lora(
        peft.AdaLoraConfig,
        target_r=setup.r,
        init_r=round(start * setup.r),
        tinit=round(warmup * setup.steps),
        tfinal=round(final * setup.steps),
        deltaT=max(1, setup.steps // 50),
        total_step=setup.steps,
        orth_reg_weight=0.0,  # PEFT adds it to the model's own loss, which the trainer does not use
    )
    model = peft.get_peft_model(model, config)
    tuner: Any = model.base_model
    layers = lora_layers(model).values()

    def allocate(step: int) -> None:
        tuner.update_and_allocate(step)
        kept = sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers)
        if (
            0 < kept < len(layers) * config.init_r
        ):  # pruned: the next pruning goes by the cost of the ranks that are left
            tuner.rankallocator.target_bgt = round(setup.budget * kept / count_parameters(model)["adapter"])

    def regularization() -> Tensor:
        factors = [x for layer in layers for x in (layer.lora_A["default"], layer.lora_B["default"].T)]
        identity = torch.eye(config.init_r, device=factors[0].device)
        distances = [torch.linalg.norm(x @ x.T - identity) for x in factors]
        return orthogonality * torch.stack(distances).mean()

    return Prepared(model, callbacks=[_AfterStep(allocate)], penalties={"orthogonality": regularization})


class _AfterStep(TrainerCallback):
    """Calls a function with the number of the step while the gradients of the step still exist."""

    def __init__(self, act: Callable[[int], None]):
        self.act = act

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step + 1)


@method("pissa", "PiSSA", "Meng et al., arXiv 2404.02948; PEFT", (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3))
def pissa(model: nn.Module, setup: Setup) -> Prepared:
    return Prepared(peft.get_peft_model(model, setup.lora(init_lora_weights="pissa")))


@method("kasa", "KaSA", "Wang et al., arXiv 2412.06071; PEFT")
def kasa(model: nn.Module, setup: Setup, beta: float = 1e-4, gamma: float = 1e-3) -> Prepared:
    """`beta` and `gamma` are the weights of the paper's two regularizations (Eq. 9 to 11), which PEFT sums up."""
    model = peft.get_peft_model(model, setup.lora(kasa_config=peft.KasaConfig(beta=beta, gamma=gamma)))
    tuner: Any = model.base_model
    return Prepared(model, penalties={"kasa": tuner._get_kasa_loss})


@method("lora-ga", "LoRA-GA", "Wang et al., arXiv 2407.05000; PEFT")
def lora_ga(model: nn.Module, setup: Setup, samples: int = 64) -> Prepared:
    """The gradient is that of `samples` samples of the task."""
    if getattr(model, "is_quantized", False):
        raise CordaError("LoRA-GA needs the gradient of full weights, and the model is quantized")
    config = setup.lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def step() -> None:
        for batch in labelled_batches(setup, setup.context("learn", samples), model):
            model(**batch).loss.backward()

    peft.tuners.lora.preprocess_loraga(model, config, step)
    return Prepared(peft.get_peft_model(model, config))


@method("eva", "EVA", "Paischer et al., arXiv 2410.07170; PEFT", prepares_from="learn")
def eva(model: nn.Module, setup: Setup, rho: float = 2.0) -> Prepared:
    """The rank of a layer is at most `rho`·r. As for all methods, the budget is of parameters. PEFT's budget is of
    ranks, so the ranks are allocated twice: the second time as many as the budget pays for at the first time's mean
    cost of a rank."""
    config = setup.lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho))
    model = peft.get_peft_model(model, config)

    def directions() -> dict[str, Tensor]:
        batches = labelled_batches(setup, setup.context("learn"), model)
        first = peft.get_eva_state_dict(model, batches, show_progress_bar=False)
        ranks = {name: len(rows) for name, rows in first.items()}
        layers = {name: setup.targets[name.removeprefix("base_model.model.")] for name in ranks}
        cost = sum(r * sum(weight_shape(layers[name])) for name, r in ranks.items())
        each, more = divmod(round(sum(ranks.values()) * setup.budget / cost), len(ranks))
        affordable = replace(config, rank_pattern={name: max(1, each + (i < more)) for i, name in enumerate(ranks)})
        return peft.get_eva_state_dict(model, batches, affordable, show_progress_bar=False)

    peft.initialize_lora_eva_weights(model, eva_state_dict=setup.cached(directions))
    return Prepared(model)


@method("dylora", "DyLoRA", "Valipour et al., arXiv 2210.07558; ours", (2e-4, 5e-4, 1e-3, 2e-3, 5e-3))
def dylora(model: nn.Module, setup: Setup) -> Prepared:
    model, callback = dylora_.install(model, setup.lora())
    return Prepared(model, callbacks=[callback])


def labelled_batches(
    setup: Setup, samples: Sequence[Sample], model: nn.Module, size: int = 8
) -> list[dict[str, Tensor]]:
    """Batches of `size` samples with labels. The prompt is masked as in training.

    Raises CordaError if no sample has a response."""
    whole = encode_all(setup.tokenizer, samples, setup.learn.max_length, end=True)
    encoded = [e for e in whole if e.targets]
    if not encoded:
        lost = cut_away(samples, whole, setup.learn.max_length)
        raise CordaError(f"none of {len(samples)} samples that are learned has a response to take gradients of{lost}")
    device, batches = next(model.parameters()).device, []
    for i in range(0, len(encoded), size):
        rows = encoded[i : i + size]
        batch, answers = padded_batch(rows, setup.tokenizer.pad_token_id or 0)
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


# --- CorDA as PEFT ships it, and LoRA-Null ---------------------------------------------------------------------------


def peft_corda(model: nn.Module, setup: Setup, mode: str, drop_in: bool = False) -> Prepared:
    """PEFT's implementation needs batches of one sample. It caches its decompositions in the method's folder.

    Args:
        drop_in: use `corda_lora.peft.preprocess_corda` instead of PEFT's function.
    """
    from peft.tuners.lora.corda import preprocess_corda

    decompose = peft_.preprocess_corda if drop_in else preprocess_corda
    kind = "keep" if mode == "kpm" else "learn"
    cache = setup.folder / "corda.pt"
    corda = peft.tuners.lora.config.CordaConfig(corda_method=mode, cache_file=str(cache))
    config = setup.lora(init_lora_weights="corda", corda_config=corda)
    device = next(model.parameters()).device

    @torch.no_grad()
    def run() -> None:
        for sample in setup.context(kind):
            batch, _ = padded_batch([encode(setup.tokenizer, sample, setup.data(kind).max_length)], 0)
            model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)

    decompose(model, config, run_model=run)
    return Prepared(peft.get_peft_model(model, config))


for _mode, _data in (("kpm", "keep"), ("ipm", "learn")):
    method(
        f"peft-corda-{_mode}",
        f"CorDA in PEFT, {_mode}",
        "Yang et al., arXiv 2406.05223; PEFT",
        SLOW_RATES,
        _data,
    )(partial(peft_corda, mode=_mode))


def from_start(model: nn.Module, setup: Setup, factors: dict[str, Tensor]) -> peft.PeftModel:
    """The model with A and B of each layer ("LAYER.A", "LAYER.B") trained beside the frozen residual W − s·B A."""
    layers = {n: LayerStart(factors[f"{n}.A"], factors[f"{n}.B"], torch.empty(0)) for n in setup.targets}
    dropout = setup.train.lora_dropout
    config = CordaConfig(r=setup.r, split="paper", lora_alpha=setup.lora_alpha, lora_dropout=dropout)
    return install(model, Start(config, layers, {}, {}))


@method("lora-null", "LoRA-Null", "Tang et al., arXiv 2503.02659; ours", prepares_from="keep")
def lora_null(model: nn.Module, setup: Setup, freeze: bool = False) -> Prepared:
    """B A = W P Pᵀ. The columns of P are the r directions of a layer's inputs in which the ability to keep has the
    least energy: the last eigenvectors of C. The product is split as in PiSSA, and the residual is frozen.

    Args:
        freeze: freeze A, too (the paper's second version).
    """
    s = setup.lora_alpha / setup.r

    def factors() -> dict[str, Tensor]:
        tensors, device = {}, compute_device(model)
        batches, _ = context_batches(setup.tokenizer, setup.context("keep"), setup.data("keep").max_length)
        for _, groups in walk(model, setup.targets, Context(batches), Place(device)):
            for names, covariances in groups or []:
                C = covariances[0].to(double_device(device), torch.float64)  # (d_in, d_in)
                P = torch.linalg.eigh(C).eigenvectors[:, : setup.r]  # (d_in, r)
                for name in names:
                    W = weight_of(setup.targets[name]).to(P)  # (d_out, d_in)
                    U, sigma, Vh = torch.linalg.svd(W @ P, full_matrices=False)  # (d_out, r), (r,), (r, r)
                    root = (sigma / s).sqrt()
                    tensors[f"{name}.A"] = (root[:, None] * (Vh @ P.T)).float().cpu()
                    tensors[f"{name}.B"] = (U * root).float().cpu()
        return tensors

    peft_model = from_start(model, setup, setup.cached(factors))
    if freeze:
        for layer in lora_layers(peft_model).values():
            layer.lora_A["default"].requires_grad_(False)
    return Prepared(peft_model)
