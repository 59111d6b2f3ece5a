"""Every method that is compared, by name, each a few lines over the library that does it best.

A method is a function (model, setup, its own hyperparameters) → `Prepared`: the model, ready to train. What it raises
as a `CordaError` means that it does not fit this model. A new method is one function and one line, `@method(...)`.
"""

import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import peft.optimizers
import torch
from peft import LoraConfig
from peft.tuners.adalora import AdaLoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from .. import peft as peft_
from ..adapters.held import HalvedLinear, held_size
from ..adapters.lora import install, load_adapter, lora_layers
from ..adapters.prepare import prepare as start_adapter
from ..config import CordaConfig, CordaError, DataConfig, TrainConfig
from ..data.batches import context_batches, encode, pad
from ..data.samples import Sample, load_rounds
from ..devices import compute_device, double_device
from ..files import whole_file
from ..models.targets import weight_of, weight_shape
from ..preprocess.context import Context
from ..preprocess.layer import LayerStart
from ..preprocess.pipeline import Start
from ..preprocess.walk import Place, walk
from . import adapterdrop as adapterdrop_
from . import dylora as dylora_


class Prepared(NamedTuple):
    """A model to train, the optimizer in place of AdamW over what is trainable, and what else happens at each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    callbacks: Sequence[TrainerCallback] = ()


@dataclass
class Setup:
    """What a method may look at.

    Args:
        learn, keep: data of the task, and of the ability to keep; `samples` of either are looked at.
        targets: the layers to adapt, of the model before it is adapted.
        train: the recipe of this run; `steps` is how many it takes.
        folder: the method's own, shared by its runs, for what need not be computed again.
    """

    tokenizer: Any
    learn: DataConfig
    keep: DataConfig | None
    samples: int
    targets: dict[str, nn.Module]
    r: int
    lora_alpha: float
    train: TrainConfig
    steps: int
    folder: Path

    def data(self, of: str) -> DataConfig:
        """Of the task (`learn`) or the ability to keep (`keep`)."""
        data = self.learn if of == "learn" else self.keep
        if data is None:
            raise CordaError("it looks at the ability to keep, and there are no samples of one: give a context")
        return data

    def context(self, of: str, rounds: int = 1, samples: int | None = None) -> list[list[Sample]]:
        """Independent draws of samples."""
        return load_rounds(replace(self.data(of), samples=samples or self.samples), rounds)

    def lora(self, kind: type[LoraConfig] = LoraConfig, **options: Any) -> LoraConfig:
        """PEFT's configuration with what all methods share; `options` win."""
        common = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.train.lora_dropout,
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
            "fan_in_fan_out": all(isinstance(module, Conv1D) for module in self.targets.values()),
        }
        return kind(**(common | options))

    @property
    def accumulated(self) -> int:
        """Forwards a step: penalties are added in each."""
        return self.train.batch_size // (self.train.micro_batch_size or self.train.batch_size)

    @property
    def budget(self) -> int:
        """Parameters of rank r on every target: Σ (d_in + d_out)·r."""
        return self.r * sum(sum(weight_shape(module)) for module in self.targets.values())


class Method(NamedTuple):
    """`learning_rates` are swept by default. `looks`: what it takes long to look at before training, the ability to
    "keep", the task to "learn" or the "weights"; what it found is left in `Setup.folder` for its other runs."""

    title: str
    source: str
    prepare: Callable[..., Prepared]
    learning_rates: tuple[float, ...]
    looks: str = ""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Of the adapter, Σ (d_in + d_out)·r with the ranks it has (half of a CorDA adapter is the start that is held
    still, and not counted), or all that is trained where there is no low rank; and those trained."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainable -= held_size(model)
    adapter = 0
    for layer in lora_layers(model).values() if isinstance(model, peft.PeftModel) else ():
        if isinstance(layer.lora_A["default"], HalvedLinear):
            r = layer.r["default"] // 2
        elif isinstance(layer, AdaLoraLayer):
            r = int((layer.lora_E["default"] != 0).sum())
        else:
            r = layer.r["default"]
        adapter += r * (layer.in_features + layer.out_features)
    return {"adapter": adapter or trainable, "trainable": trainable}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises CordaError for an option that a method does not have, or a value that it cannot take."""
    prepare = METHODS[name].prepare
    set_by_name = dict(getattr(prepare, "keywords", {}))  # of a partial: `mode` of peft-corda-kpm, say
    parameters = inspect.signature(prepare).parameters
    own = {key for key, p in parameters.items() if p.default is not p.empty} - set(set_by_name)
    corda = {f.name for f in fields(CordaConfig)} - {"r", "lora_alpha", "target_modules", "device"}
    known = own | (corda if "options" in parameters else set())
    if unknown := [key for key in options if key not in known]:
        raise CordaError(f"method {name} has no option {unknown[0]!r}: it has {', '.join(sorted(known)) or 'none'}")
    if "options" in parameters:
        CordaConfig(**{key: value for key, value in (set_by_name | dict(options)).items() if key not in own})


METHODS: dict[str, Method] = {}
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
SLOW = tuple(rate / 10 for rate in RATES)  # where a factor starts large


def method(
    name: str, title: str, source: str, learning_rates: tuple[float, ...] = RATES, looks: str = ""
) -> Callable[[Callable[..., Prepared]], Callable[..., Prepared]]:
    """Enter a function under a name."""

    def enter(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
        METHODS[name] = Method(title, source, prepare, learning_rates, looks)
        return prepare

    return enter


# --- without a low rank ------------------------------------------------------------------------------------------


@method("full", "full fine-tuning", "transformers", SLOW)
def full(model: nn.Module, setup: Setup) -> Prepared:
    return Prepared(model.float().requires_grad_(True))


@method("bitfit", "BitFit", "Ben Zaken et al., arXiv 2106.10199", (5e-4, 1e-3, 2e-3, 5e-3, 1e-2))
def bitfit(model: nn.Module, setup: Setup) -> Prepared:
    model.float()  # a step is smaller than a bfloat16's last bit
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    if not biases:
        raise CordaError(f"BitFit trains biases, and {type(model).__name__} has none")
    model.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_(True)
    return Prepared(model)


@method("adapterdrop", "AdapterDrop", "Rücklé et al., arXiv 2010.11918; ours", (2e-4, 5e-4, 1e-3, 2e-3, 5e-3))
def adapterdrop(model: nn.Module, setup: Setup, drop: int | None = None) -> Prepared:
    """Robust training: the adapters of the lowest 0 ... `drop` blocks are left out of a step. Default: all but one."""
    width = adapterdrop_.width_for(model, setup.budget)
    model, callback = adapterdrop_.install(model, width, drop)
    return Prepared(model, callbacks=[callback])


# --- LoRA and its relatives, through PEFT ----------------------------------------------------------------------------


@method("lora", "LoRA", "Hu et al., arXiv 2106.09685; PEFT")
def lora(model: nn.Module, setup: Setup) -> Prepared:
    return Prepared(peft.get_peft_model(model, setup.lora()))


@method("dora", "DoRA", "Liu et al., arXiv 2402.09353; PEFT")
def dora(model: nn.Module, setup: Setup) -> Prepared:
    setup.train.compile = False  # PEFT asks for the weights' class in each forward, where a trace breaks off
    return Prepared(peft.get_peft_model(model, setup.lora(use_dora=True)))


@method("lora+", "LoRA+", "Hayou et al., arXiv 2402.12354; PEFT", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3))
def lora_plus(model: nn.Module, setup: Setup, ratio: float = 16.0) -> Prepared:
    """The learning rate is A's; B's is `ratio` times as high."""
    model = peft.get_peft_model(model, setup.lora())
    return Prepared(model, _adam_with_ratio(model, setup, ratio))


def _adam_with_ratio(model: nn.Module, setup: Setup, ratio: float) -> torch.optim.Optimizer:
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
def adalora(model: nn.Module, setup: Setup, start: float = 1.5, warmup: float = 0.1, final: float = 0.3) -> Prepared:
    """From `start`·r to r on average, pruned between the first `warmup` and the last `final` share of the steps. The
    budget is of parameters, as for all methods; PEFT's counts ranks, and ends above it if these go to wide layers."""
    config = setup.lora(
        peft.AdaLoraConfig,
        target_r=setup.r,
        init_r=round(start * setup.r),
        tinit=round(warmup * setup.steps),
        tfinal=round(final * setup.steps),
        deltaT=max(1, setup.steps // 50),
        total_step=setup.steps,
        orth_reg_weight=0.5 / setup.accumulated,
    )
    model = peft.get_peft_model(model, config)
    tuner: Any = model.base_model
    layers = lora_layers(model).values()

    def allocate(step: int) -> None:
        tuner.update_and_allocate(step)
        kept = sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers)
        if 0 < kept < len(layers) * config.init_r:  # pruned just now: the next prunes to ranks as they cost
            tuner.rankallocator.target_bgt = round(setup.budget * kept / count_parameters(model)["adapter"])

    return Prepared(model, callbacks=[_AfterStep(allocate)])


class _AfterStep(TrainerCallback):
    """Calls a function with the step's number while its gradients are still there."""

    def __init__(self, act: Callable[[int], None]):
        self.act = act

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act(state.global_step + 1)


@method("pissa", "PiSSA", "Meng et al., arXiv 2404.02948; PEFT", (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3))
def pissa(model: nn.Module, setup: Setup) -> Prepared:
    return Prepared(peft.get_peft_model(model, setup.lora(init_lora_weights="pissa")))


@method("kasa", "KaSA", "Wang et al., arXiv 2412.06071; PEFT")
def kasa(model: nn.Module, setup: Setup, beta: float = 1e-4, gamma: float = 1e-3) -> Prepared:
    """`beta`, `gamma`: weights of the paper's two penalties (its Eq. 9 to 11)."""
    model = peft.get_peft_model(model, setup.lora(kasa_config=peft.KasaConfig(beta=beta, gamma=gamma)))
    tuner: Any = model.base_model

    def add_penalty(module: nn.Module, inputs: Any, output: Any) -> Any:
        if module.training and getattr(output, "loss", None) is not None:
            output.loss = output.loss + tuner._get_kasa_loss() / setup.accumulated
        return output

    model.register_forward_hook(add_penalty)
    return Prepared(model)


@method("lora-ga", "LoRA-GA", "Wang et al., arXiv 2407.05000; PEFT")
def lora_ga(model: nn.Module, setup: Setup, samples: int = 64) -> Prepared:
    """The gradient is of `samples` of the task."""
    if getattr(model, "is_quantized", False):
        raise CordaError("LoRA-GA needs the gradient of full weights, and the model is quantized")
    config = setup.lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def step() -> None:
        for batch in _labelled(setup, setup.context("learn", samples=samples)[0], model):
            model(**batch).loss.backward()

    peft.tuners.lora.preprocess_loraga(model, config, step)
    return Prepared(peft.get_peft_model(model, config))


@method("eva", "EVA", "Paischer et al., arXiv 2410.07170; PEFT", looks="learn")
def eva(model: nn.Module, setup: Setup, rho: float = 2.0) -> Prepared:
    """`rho`: a layer's rank is at most `rho`·r. The budget is of parameters, as for all methods; PEFT's counts ranks:
    they are shared out once more, as many as the budget pays for at what a rank cost the first time."""
    config = setup.lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho))
    model = peft.get_peft_model(model, config)

    def find() -> dict[str, torch.Tensor]:
        batches = _labelled(setup, setup.context("learn")[0], model)
        found = peft.get_eva_state_dict(model, batches, show_progress_bar=False)
        ranks = {name: len(rows) for name, rows in found.items()}
        layers = {name: setup.targets[name.removeprefix("base_model.model.")] for name in ranks}
        cost = sum(r * sum(weight_shape(layers[name])) for name, r in ranks.items())
        each, more = divmod(round(sum(ranks.values()) * setup.budget / cost), len(ranks))
        to_share = replace(config, rank_pattern={name: max(1, each + (i < more)) for i, name in enumerate(ranks)})
        return peft.get_eva_state_dict(model, batches, to_share, show_progress_bar=False)

    peft.initialize_lora_eva_weights(model, eva_state_dict=_found_once(setup, find))
    return Prepared(model)


@method("dylora", "DyLoRA", "Valipour et al., arXiv 2210.07558; ours", (2e-4, 5e-4, 1e-3, 2e-3, 5e-3))
def dylora(model: nn.Module, setup: Setup) -> Prepared:
    model, callback = dylora_.install(model, setup.lora())
    return Prepared(model, callbacks=[callback])


def _found_once(setup: Setup, find: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a method found before training, from its folder if it is there."""
    path = setup.folder / "found.safetensors"
    if not path.is_file():
        # Clones, as EVA gives layers with the same input views of one tensor.
        with whole_file(path) as partial:
            save_file({name: tensor.contiguous().clone() for name, tensor in find().items()}, partial)
    return load_file(path)


def _labelled(setup: Setup, samples: Sequence[Sample], model: nn.Module, size: int = 8) -> list[dict[str, Any]]:
    """Batches with labels, the prompt masked as in training."""
    encoded = [encode(setup.tokenizer, s, setup.learn.max_length, end=True) for s in samples]
    encoded = [e for e in encoded if e.targets]
    device, batches = next(model.parameters()).device, []
    for i in range(0, len(encoded), size):
        rows = encoded[i : i + size]
        ids, mask = pad([e.ids for e in rows], setup.tokenizer.pad_token_id or 0)
        answers, _ = pad([e.answer for e in rows], False)
        labels = ids.masked_fill(~answers, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


# --- CorDA as PEFT ships it, and LoRA-Null ---------------------------------------------------------------------------


def peft_corda(model: nn.Module, setup: Setup, mode: str, drop_in: bool = False) -> Prepared:
    """One sample a batch, as PEFT's implementation needs it. What it decomposed is kept for the method's other runs.
    `drop_in`: with `corda_lora.peft.preprocess_corda` in the place of PEFT's."""
    from peft.tuners.lora.corda import preprocess_corda

    decompose = peft_.preprocess_corda if drop_in else preprocess_corda
    of = "keep" if mode == "kpm" else "learn"
    cache = setup.folder / "corda.pt"
    corda = peft.tuners.lora.config.CordaConfig(corda_method=mode, cache_file=str(cache))
    config = setup.lora(init_lora_weights="corda", corda_config=corda)
    device = next(model.parameters()).device

    @torch.no_grad()
    def run() -> None:
        for sample in setup.context(of)[0]:
            ids = encode(setup.tokenizer, sample, setup.data(of).max_length).ids
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)

    decompose(model, config, run_model=run)
    return Prepared(peft.get_peft_model(model, config))


for _mode, _looks in (("kpm", "keep"), ("ipm", "learn")):
    method(
        f"peft-corda-{_mode}",
        f"CorDA in PEFT, {_mode}",
        "Yang et al., arXiv 2406.05223; PEFT",
        SLOW,
        _looks,
    )(partial(peft_corda, mode=_mode))


@method("lora-null", "LoRA-Null", "Tang et al., arXiv 2503.02659; ours", looks="keep")
def lora_null(model: nn.Module, setup: Setup, freeze: bool = False) -> Prepared:
    """BA = W P Pᵀ, P the r directions of a layer's inputs in which the ability to keep has the least energy (the last
    eigenvectors of C), split as in PiSSA; the residual is frozen, with `freeze` also A (the paper's second version)."""
    s = setup.lora_alpha / setup.r

    def find() -> dict[str, torch.Tensor]:
        found, device = {}, compute_device(model)
        batches, _ = context_batches(setup.tokenizer, setup.context("keep")[0], setup.data("keep").max_length)
        for _, groups in walk(model, setup.targets, Context(batches), Place(device)):
            for names, covariances in groups or []:
                C = covariances[0].to(double_device(device), torch.float64)  # (d_in, d_in)
                P = torch.linalg.eigh(C).eigenvectors[:, : setup.r]  # (d_in, r)
                for name in names:
                    W = weight_of(setup.targets[name]).to(P)  # (d_out, d_in)
                    U, sigma, Vh = torch.linalg.svd(W @ P, full_matrices=False)  # (d_out, r), (r,), (r, r)
                    root = (sigma / s).sqrt()
                    found[f"{name}.A"] = (root[:, None] * (Vh @ P.T)).float().cpu()
                    found[f"{name}.B"] = (U * root).float().cpu()
        return found

    found = _found_once(setup, find)
    layers = {n: LayerStart(found[f"{n}.A"], found[f"{n}.B"], torch.empty(0)) for n in setup.targets}
    config = CordaConfig(r=setup.r, split="paper", lora_alpha=setup.lora_alpha)
    peft_model = install(model, Start(config, layers, {}, {}))
    if freeze:
        for layer in lora_layers(peft_model).values():
            layer.lora_A["default"].requires_grad_(False)
    return Prepared(peft_model)


# --- ours: one grid --------------------------------------------------------------------------------------------------


def corda(
    model: nn.Module,
    setup: Setup,
    ratio: float = 1.0,
    samples: int | None = None,
    context: str = "",
    **options: Any,
) -> Prepared:
    """Any options of `CordaConfig`; `samples` of the context, or another one than the comparison's; a learning rate of
    B `ratio` times A's, as in LoRA+. The start is kept for the method's other runs."""
    folder = setup.folder / "start"
    if not folder.exists():
        config = CordaConfig(r=setup.r, lora_alpha=setup.lora_alpha, target_modules=list(setup.targets), **options)
        data = None
        if config.orientation != "identity":
            data = DataConfig(context) if context else setup.data("keep" if config.mode == "kpm" else "learn")
            data = replace(data, samples=samples or setup.samples)
        shutil.rmtree(setup.folder / "start.work", ignore_errors=True)  # of a run that was broken off
        start_adapter(model, config, data, folder, setup.tokenizer)
    peft_model = load_adapter(model, folder, trainable=True, lora_dropout=setup.train.lora_dropout)
    return Prepared(peft_model, None if ratio == 1 else _adam_with_ratio(peft_model, setup, ratio))


method("milora", "MiLoRA", "Wang et al., arXiv 2406.09044; ours", looks="weights")(
    partial(corda, orientation="identity", mode="kpm", split="paper")
)
CORDA_RATES = {
    "paper": SLOW,
    "balanced": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "anchored": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    "seeded": RATES,
}
for _preset, _title in (("corda", "CorDA"), ("corda+", "CorDA+"), ("corda++", "CorDA++")):
    for _mode, _looks in (("kpm", "keep"), ("ipm", "learn")):
        for _split, _rates in CORDA_RATES.items():
            method(
                f"{_preset}-{_mode}-{_split}",
                f"{_title} {_mode}, {_split}",
                "Yang et al., arXiv 2406.05223, 2506.13187; ours",
                _rates,
                _looks,
            )(partial(corda, preset=_preset, mode=_mode, split=_split))
