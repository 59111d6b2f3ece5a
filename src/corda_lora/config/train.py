"""How an adapter is trained, and what it keeps: `corda train`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from .data import ContextConfig, DataConfig, named_contexts
from .values import CordaError, Count, CountOrZero, Positive, Range, Seed, Share, check_fields

KEEP = 10.0  # the default of λ: see docs/keeping.md


@dataclass
class TrainConfig:
    """The training recipe.

    The defaults are those of CorDA's authors: AdamW, a cosine schedule, 3 % warm-up, no weight decay, one epoch.

    Args:
        learning_rate: the peak of the schedule. The best rate depends on the split of the adapter. Default: the split's
            own (see docs/training.md).
        epochs: the number of passes over the data.
        max_steps: the number of steps, in place of epochs.
        batch_size: the number of samples in a step.
        micro_batch_size: the number of samples in a forward. A step accumulates the gradients of its forwards. Its
            samples are dealt out by length, which saves memory and padding. Default: the batch size.
        warmup: the share of the steps in which the learning rate rises.
        schedule: `cosine`, `linear` or `constant`.
        weight_decay: the weight decay of AdamW.
        lora_dropout: the dropout rate of the adapter's input.
        precision: `bf16` and `fp16` train in mixed precision (autocast), `fp32` does not.
        gradient_checkpointing: recompute activations in the backward: less memory, a third more time.
        compile: compile each block by `torch.compile`, for samples of any length. It takes a minute at the start; the
            steps are faster afterwards.
        seed: the seed of the samples' order and of dropout.
        checkpoints: the number of checkpoints in a run; 0 for none. The same command given again goes on from the last.
            Held-out samples, if there are any, are measured at each.
        early_stopping: stop when the loss of the held-out samples was no better than its best for so many measurements
            in a row, and keep the adapter of the best.
        trainer: options of TRL's SFTConfig by name, such as {optim: adafactor, report_to: tensorboard}, but for those
            that have an option here.
    """

    learning_rate: Positive | None = None
    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 32
    micro_batch_size: Count | None = None
    warmup: Annotated[float, Range(ge=0, le=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Range(ge=0, le=100)] = 0.0
    lora_dropout: Share = 0.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Seed = 0
    checkpoints: CountOrZero = 4
    early_stopping: Count | None = None
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.early_stopping and not self.checkpoints:
            raise CordaError("early stopping goes back to the checkpoint with the lowest loss: checkpoints is 0")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise CordaError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )


@dataclass
class KeepConfig:
    """What a training keeps of the model, and at what price.

    Args:
        keep: the weight λ of the predicted drift in the loss: nats of loss for a nat of drift per answer token of the
            context. Default: that of the start, or of the training that it is from; 10 where something else says what
            to keep (a start of mode kpm, or a context); else 0.
        max_drift: in place of `keep`, and of weights and prices of contexts: steer λ so that the drift on samples of
            the context that were not shown ends at this, in nats per answer token.
        keep_generic: the same weight for texts that the model itself draws, without its adapter. They stand for the
            abilities that nobody named.
        context: DATA that shows the ability to keep. Default: what the start was made from. Give --context several
            times for several abilities; options of one follow it: --context.weight 2, --context.price 30. The penalty
            is then a sum, and the meter has each.
        weights: of several contexts, their shares of the price: as `given` with each, or by `validation`: they are
            steered while training so that the largest of the drifts that the meter shows is as small as can be.
    """

    keep: Annotated[float, Range(ge=0, le=1e30)] | None = None
    max_drift: Positive | None = None
    keep_generic: Annotated[float, Range(ge=0, le=1e30)] = 0.0
    context: str | DataConfig | ContextConfig | list[str | ContextConfig] | None = None
    weights: Literal["given", "validation"] = "given"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is not None and self.max_drift is not None:
            raise CordaError("keep is a fixed price, and max_drift steers the price: leave one of them out")
        if self.keep == 0 and self.context is not None:
            raise CordaError("keep is 0, so nothing of the context would be kept: leave one of them out")
        if self.keep == 0 and self.weights == "validation":
            raise CordaError("keep is 0, so there is no price for weights to share: leave one of them out")
        given: list[Any] = self.context if isinstance(self.context, list) else [self.context]
        self.contexts = [] if given == [None] else list(named_contexts(given))
        if self.contexts:
            named: Any = self.contexts if len(self.contexts) > 1 else self.contexts[0]
            self.context = named
        prices = [c.price for c in self.contexts if isinstance(c, ContextConfig)]
        if self.keep is not None and prices and None not in prices:
            raise CordaError("keep is the price of contexts without their own, and each has one: leave keep out")
        shares = {(c.weight, c.price) for c in self.contexts if isinstance(c, ContextConfig)}
        own = self.weights == "validation" or shares - {(ContextConfig.weight, ContextConfig.price)}
        if self.max_drift is not None and own:
            raise CordaError("max_drift steers the price of each context by itself: leave it or weights and prices out")
