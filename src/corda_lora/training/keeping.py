"""Keep an ability while another is learned: the predicted drift of the adapter, as a penalty and as a meter.

The *prediction* is ½ · tokens/answers · Σ over layers of tr(D ΔW C ΔWᵀ), from the statistics of the context alone (see
`algebra.second_order`): nats per answer token, a function of the adapter's weights, cheap enough for every step.
Multiplied by λ it is a penalty. It is not a measurement: layers pull together, and samples that were shown are kept
better than others. So the *meter* also measures the drift on samples that the statistics have not seen, at a few steps,
and shows the prediction multiplied by what the last measurement said.
"""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..adapters.held import HalvedLinear, unwrapped
from ..adapters.lora import BASE, lora_layers
from ..algebra.second_order import Low, predicted_drift, quadratic
from ..config import CordaError
from ..config.train import KEEP
from ..config.values import Count, Positive, Weight, check_value
from ..models.residual import check_whole
from ..models.weights import layer_digest, or_the_same, weight_shape
from ..preprocess.statistics import Statistics

STATE = "Keeper"
NOT_HERE = "between two steps, so the drift cannot be predicted: use DDP or FSDP 2, or leave keep out"
HOLDS_A_PART = "a part of the model is in the adapter, so its drift cannot be predicted: leave keep out"


class _Layers(NamedTuple):
    """Layers of one shape and rank, whose products are computed together.

    Attributes:
        names: of the b layers.
        inner: A C Aᵀ (b, r, r) where A does not train, else C.
        D: of all layers.
        weight: ½ · s² · tokens/answers (b,).
    """

    names: list[str]
    layers: list[LoraLayer]
    inner: Tensor | Low
    D: Low
    weight: Tensor


def check_predictable(peft_model: PeftModel, adapter: str = "default") -> None:
    """Raises CordaError as `check_alone` does, and if no drift can be predicted of an adapter: the base is none without
    it, or its update is no s·B A."""
    check_alone(peft_model, adapter)
    marks = peft_model.peft_config[adapter].auto_mapping or {}
    if BASE in marks or marks.get("corda", {}).get("split") == "residual":
        raise CordaError(HOLDS_A_PART)
    check_whole(peft_model.get_base_model(), remedy="no drift from it can be predicted, so leave keep out")
    layers = {name: layer for name, layer in lora_layers(peft_model).items() if adapter in layer.r}
    if not layers:
        kind = type(peft_model.peft_config[adapter]).__name__.removesuffix("Config")
        raise CordaError(f"the adapter is of the kind {kind}, and drift is predicted of LoRA alone: leave keep out")
    for name, layer in layers.items():  # of DoRA and its like PEFT keeps what they do beside B A
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise CordaError(
                f"the adapter changes {name} by more than B A, so its drift cannot be predicted: leave keep out"
            )


def check_alone(peft_model: PeftModel, adapter: str) -> None:
    """Raises CordaError if an adapter is not active, or another one is, too."""
    active = getattr(peft_model, "active_adapters", ())
    if adapter not in active:
        raise CordaError(f"the model has no active adapter {adapter!r} whose drift could be predicted")
    if others := [name for name in active if name != adapter]:
        raise CordaError(
            f"the adapter {others[0]!r} is active beside {adapter!r}, and drift is predicted of one alone: make the "
            "other inactive, or merge it into the model before the statistics are collected"
        )


def trained_beside(peft_model: nn.Module) -> list[str]:
    """The parameters that train beside the factors of LoRA layers: what they do is not predicted."""
    return [n for n, p in peft_model.named_parameters() if p.requires_grad and not re.search(r"\.lora_[AB]\.", n)]


class PredictedDrift:
    """The predicted drift of an adapter, in nats per answer token of a context, as a function of its weights.

        predicted = PredictedDrift(peft_model, statistics)
        loss = loss + 30 * predicted()          # once per optimizer step

    Args:
        statistics: of the context, from the model without the adapter.

    Raises CordaError as `check_statistics` and `check_predictable` do.
    """

    def __init__(self, peft_model: PeftModel, statistics: Statistics, adapter: str = "default"):
        check_predictable(peft_model, adapter)
        self.model, self.statistics, self.adapter = peft_model, statistics, adapter
        check_statistics(statistics, {n: layer.get_base_layer() for n, layer in lora_layers(peft_model).items()})
        self.prepare()

    def prepare(self) -> None:
        """Compute what stays as it is, on the device of the adapter: to be called again if the adapter has moved, or
        other factors train. Raises CordaError as `check_alone` does."""
        check_alone(self.model, self.adapter)
        layers, statistics = lora_layers(self.model), self.statistics
        groups: dict[Any, list[str]] = defaultdict(list)
        for name in (name for name in layers if name in statistics.layers):
            A, B = self._factors(layers[name])
            C, D = statistics.layers[name]
            groups[A.shape, B.shape, C.factor.shape, D.factor.shape, A.requires_grad].append(name)
        share = 0.5 * statistics.tokens / statistics.answers
        self.groups = [self._stacked(names, layers, statistics, share) for names in groups.values()]

    def _factors(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        return whole_factor(layer.lora_A[self.adapter]), whole_factor(layer.lora_B[self.adapter])

    def _stacked(
        self, names: list[str], layers: Mapping[str, LoraLayer], statistics: Statistics, share: float
    ) -> _Layers:
        members = [layers[name] for name in names]
        A, _ = self._factors(members[0])
        C, D = (
            Low(*(torch.stack(parts).to(A.device, torch.float32) for parts in zip(*sides)))
            for sides in zip(*(statistics.layers[name] for name in names))
        )
        inner: Tensor | Low = C
        if not A.requires_grad:
            fixed = torch.stack([self._factors(layer)[0].detach() for layer in members]).float()
            inner = quadratic(fixed, C)
        scales = [share * layer.scaling[self.adapter] ** 2 for layer in members]
        return _Layers(names, members, inner, D, torch.tensor(scales, device=A.device))

    def by_layer(self) -> dict[str, Tensor]:
        """The predicted drift of each layer, a scalar."""
        drifts: dict[str, Tensor] = {}
        for names, values in self._of_groups():
            drifts |= dict(zip(names, values))
        return drifts

    def __call__(self) -> Tensor:
        """The predicted drift of all layers together, a scalar with a gradient."""
        return sum((values.sum() for _, values in self._of_groups()), torch.zeros(()))

    def _of_groups(self) -> list[tuple[list[str], Tensor]]:
        result = []
        for names, layers, inner, D, weight in self.groups:
            with torch.autocast(weight.device.type, enabled=False):
                As, Bs = zip(*(self._factors(layer) for layer in layers))
                B = torch.stack(Bs).float()  # (b, m, r)
                A = torch.stack(As).float() if isinstance(inner, Low) else None  # (b, r, n)
                values = predicted_drift(A, B, inner, D, weight)
            result.append((names, values))
        return result


def whole_factor(module: nn.Module) -> Tensor:
    """The weight of a factor, gathered where FSDP shards it: then its gradient goes to the shards of what trains. (The
    optimizer drops the gradient of a held half, but not that of a shard.)

    Raises CordaError if it cannot be gathered."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.ndim != 2 or not weight.numel():
        raise CordaError(f"FSDP 1 and DeepSpeed's ZeRO-3 show no whole factor {NOT_HERE}")
    if not isinstance(weight, DTensor):
        return weight
    weight = weight.full_tensor()
    if isinstance(module, HalvedLinear):
        trained, held = weight.chunk(2, dim=module.axis)
        weight = torch.cat([trained, held.detach()], dim=module.axis)
    return weight


def check_statistics(statistics: Statistics, layers: Mapping[str, nn.Module]) -> None:
    """Raises CordaError if the statistics were not collected of `layers`, by name, with these very weights, or do not
    fit them."""
    for name, module in layers.items():
        if name not in statistics.digests:
            raise CordaError(f"the statistics of the context lack the layer {name}, which the adapter changes")
        if layer_digest(module) != statistics.digests[name]:
            same = or_the_same(module, None)
            raise CordaError(f"the statistics of the context are of another model: {name} has other weights{same}")
        if name in statistics.layers:
            C, D = (len(M.diagonal) for M in statistics.layers[name])
            if weight_shape(module) != (D, C):
                raise CordaError(
                    f"the statistics of the context are damaged: {name} is no layer of {C} inputs and {D} outputs"
                )


class Keeper(TrainerCallback):
    """The penalty λ · predicted drift, and the meter. Its state is saved with each checkpoint, and read when training
    resumes.

    Attributes:
        keep: λ, the price of a nat of predicted drift per answer token, in nats of the training loss per answer token.
        steered: whether λ changes while training. Only then does a resumed training take it from the checkpoint.
        history: [step, predicted drift, measured drift, λ] at the beginning, at `points` steps and at the end. Without
            `measure` the measured drift is None.

    Args:
        predicted: see `PredictedDrift`.
        keep: λ at the beginning.
        max_drift: steer λ so that the run ends at this drift, in nats per answer token.
        measure: measures the drift on samples that the statistics have not seen. It may leave the model in evaluation
            mode.
        points: how many measurements are made.
        name: of the ability, where there are several keepers.

    Raises CordaError if `keep` is negative or not finite, or the adapter to start from is beyond `max_drift` already.
    """

    def __init__(
        self,
        predicted: PredictedDrift,
        keep: float = 0.0,
        max_drift: float | None = None,
        measure: Callable[[], float] | None = None,
        points: int = 5,
        name: str = "",
    ):
        check_value("keep", keep, Weight)
        check_value("max_drift", max_drift, Positive | None)
        check_value("points", points, Count)
        self.predicted, self.keep, self.max_drift = predicted, keep, max_drift
        self.measure, self.points, self.name = measure, points, name
        self.steered = max_drift is not None
        self.ratio = 1.0  # measured / predicted, at the last measurement
        self.history: list[list[float | None]] = []
        self.last = 0.0

    def penalty(self) -> Tensor:
        """λ · predicted drift, to be added to the loss once per optimizer step."""
        return self.keep * self.predicted()

    @property
    def estimate(self) -> float:
        """The drift as the meter shows it: predicted now, times what was measured for predicted last."""
        return self.last * self.ratio

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.predicted.prepare()  # the trainer may have moved the model since
        if saved := state.stateful_callbacks.get(f"{STATE} {self.name}".strip()):
            price = self.keep
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
            if not self.steered:  # a fixed price is the one that is asked for now
                self.keep = price
            return
        self.look(state.global_step, measures=True)
        if self.max_drift is not None and self.estimate > self.max_drift:
            raise CordaError(
                f"max_drift is {self.max_drift:g}, but the adapter to start from has a drift of {self.estimate:.3g}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, end = state.global_step, state.max_steps
        first = math.ceil(end / self.points / 2)  # the first one early: λ is steered by it
        due = {first, *(round(end * i / self.points) for i in range(1, self.points + 1))}
        self.look(step, measures=step in due)
        if self.max_drift is not None:
            self._steer()
        self.keep_state(state)

    def keep_state(self, state: Any) -> None:
        """Have it saved with the next checkpoint."""
        kept = {name: getattr(self, name) for name in ("keep", "ratio", "last", "history")}
        state.stateful_callbacks[f"{STATE} {self.name}".strip()] = {"args": {}, "attributes": kept}

    @torch.no_grad()
    def look(self, step: int, measures: bool = True) -> None:
        """Predict the drift of the adapter as it is at a step, and measure it."""
        self.last = float(self.predicted())
        if not measures:
            return
        training = self.predicted.model.training
        measured = self.measure() if self.measure else None
        self.predicted.model.train(training)
        if measured is not None and self.last > 0:
            self.ratio = measured / self.last
        self.history.append([step, self.last, measured, self.keep])

    def _steer(self) -> None:
        """Raise λ while the drift is above what is allowed, lower it while below: by a factor of e^0.2 a step at most,
        and by less the nearer the drift is. So a run of few steps may not come to its bound."""
        assert self.max_drift is not None
        distance = math.log(max(self.estimate, 1e-12) / self.max_drift)
        self.keep = min(1e6, max(1e-3, self.keep * math.exp(0.2 * max(-1.0, min(1.0, distance)))))


class Keepers(TrainerCallback):
    """The keepers of several abilities as one callback.

    With `even` it steers their prices, whose sum stays: up for what drifts more than the others, down for what drifts
    less, by multiplicative weights on what their meters show. So the largest drift becomes as small as this sum allows,
    where no price comes to its least share.
    """

    LEAST = 0.02  # share of the mean price
    RATE = 0.1  # by which a price grows in a step where its drift is e times the geometric mean

    def __init__(self, keepers: Sequence[Keeper], even: bool = False):
        self.keepers, self.even = keepers, even
        for keeper in keepers:
            keeper.steered |= even

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for keeper in self.keepers:
            keeper.on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for keeper in self.keepers:
            keeper.on_step_end(args, state, control, **kwargs)
        if self.even:
            prices, drifts = zip(*((keeper.keep, keeper.estimate) for keeper in self.keepers))
            for keeper, price in zip(self.keepers, even_prices(prices, drifts, self.RATE, self.LEAST)):
                keeper.keep = price
                keeper.keep_state(state)


def keepers_of(callbacks: Iterable[Any]) -> list[Keeper]:
    """The keepers among callbacks."""
    found: list[Any] = []
    for callback in callbacks:
        found += callback.keepers if isinstance(callback, Keepers) else [callback]
    return [keeper for keeper in found if isinstance(keeper, Keeper)]


def even_prices(prices: Sequence[float], drifts: Sequence[float], rate: float, least: float) -> list[float]:
    """One step of `Keepers`: prices of the same sum, nearer to those of equal drifts."""
    logs = [math.log(max(drift, 1e-12)) for drift in drifts]
    mean, total = sum(logs) / len(logs), sum(prices)
    floor = least * total / len(prices)
    raised = [max(floor, price * math.exp(rate * max(-1.0, min(1.0, log - mean)))) for price, log in zip(prices, logs)]
    return [price * total / sum(raised) for price in raised]


class KeepCallback(Keeper):
    """A `Keeper` for anybody's trainer, transformers' and TRL's, which compute their losses in ways of their own: it
    adds the penalty's gradient to the gradients of each optimizer step, after they are clipped.

        peft_model = get_corda_model(model, CordaConfig(mode="kpm", keep=10), batches)
        trainer = DPOTrainer(peft_model, ..., callbacks=[KeepCallback(peft_model)])

    Args:
        statistics: Default: those that `get_corda_model` put on the model, if its configuration has `keep`.
        keep: λ. Default: that of the configuration which `get_corda_model` was given, else 10.
        options: as of `Keeper`. Without `measure` the drift that is shown, and that `max_drift` bounds, is the
            predicted one.

    `trainer.state.log_history` has `drift` beside each loss (see `Keeper.estimate`). Of several callbacks each needs a
    `name`, which follows that word.

    Raises CordaError as `Keeper` and `PredictedDrift` do; without statistics; and before the first step where gradients
    are scaled (float16) and not clipped, as the trainer then hands them over scaled, or where DeepSpeed trains.
    """

    def __init__(
        self, peft_model: PeftModel, statistics: Statistics | None = None, keep: float | None = None, **options: Any
    ):
        peft_model = unwrapped(peft_model)
        statistics = statistics or getattr(peft_model, "statistics", None)
        if statistics is None:
            raise CordaError(
                "nothing says what to keep: give get_corda_model a configuration with keep, or give the statistics of "
                "the start: Statistics.load(Path('start/statistics.safetensors')), which corda init --keep writes"
            )
        if keep is None:
            keep = getattr(peft_model, "keep", KEEP)
        super().__init__(PredictedDrift(peft_model, statistics), keep, **options)
        if others := trained_beside(peft_model):
            warnings.warn(
                f"the price does not see {others[0]}, which is trained, too (one of {len(others)} such parameters)",
                stacklevel=2,
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise CordaError("in float16 the penalty needs clipped gradients: set max_grad_norm, such as to 1.0")
        if getattr(args, "deepspeed_plugin", None) is not None:  # its backward also makes the step
            raise CordaError(f"DeepSpeed shows no gradients {NOT_HERE}")
        super().on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep:
            with torch.enable_grad():
                self.penalty().backward()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1][f"drift {self.name}".strip()] = self.estimate
