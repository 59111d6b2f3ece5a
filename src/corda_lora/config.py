"""The options of every stage: defaults, ranges and meanings. (`corda --help` reads this file: no heavy imports.)"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import regex

T = TypeVar("T")


class CordaError(ValueError):
    """An error that the user can mend. The message is one sentence that names the input and what is wrong with it; the
    command line prints it and exits with 2."""


@dataclass(frozen=True)
class Range:
    """The range of a number, written beside a field as `Annotated[int, Range(ge=1)]`. Infinity and NaN are outside."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf  # false for NaN; true for an int that no float can hold
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __repr__(self) -> str:
        """The range in words, for messages and for --help."""
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {bound:,}" for word, bound in words.items() if bound is not None)


LARGEST = 2**31 - 1  # the largest whole number that all libraries take
Count = Annotated[int, Range(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Range(ge=0, le=LARGEST)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]  # NumPy's range
KEEP = 10.0  # the default of λ: see docs/keeping.md
OTHERS_LEAK = 1.1  # times as much as the samples of a context, others may leak before more samples are asked for
CONTEXT_SAMPLES = 1000  # the default number of samples of a context
Positive = Annotated[float, Range(ge=1e-9, le=1e30)]  # models compute in float32, which ends at 3e38
NonNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, lt=1)]


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def check_fields(config: Any) -> None:
    """Raises CordaError if a field of a dataclass is outside its `Range` or is none of its `Literal`'s values."""
    hints = get_type_hints(type(config), include_extras=True)
    for f in fields(config):
        check_value(f.name, getattr(config, f.name), hints[f.name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises CordaError if `value` does not fit `hint`. `name` is the option's name in the message."""
    if not _fits(value, hint):
        raise CordaError(misfit(name, repr(value), hint))


def misfit(name: str, value: str, hint: Any) -> str:
    """The sentence on a value that does not fit its option's type hint."""
    return f"{name} is {_middle_left_out(value) or 'empty'}, but must be {', or '.join(_said(hint))}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type hint, as far as the hint has ranges and literals; other types are not checked."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return isinstance(value, bool)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is Annotated:
        kinds = (int,) if arguments[0] is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and value in arguments[1]
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if arguments and origin is not dict:  # a union
        return any(_fits(value, argument) for argument in arguments)
    return value is None if hint is type(None) else True


def _said(hint: Any) -> Iterator[str]:
    """The alternatives of a type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in WORDS:
        yield WORDS[hint]
    elif is_dataclass(hint) or origin is dict:
        yield "a mapping"
    elif origin is Literal:
        yield f"one of {', '.join(map(str, arguments))}"
    elif origin is Annotated:
        yield f"a {'whole ' if arguments[0] is int else ''}number {arguments[1]!r}"
    elif origin is list:
        yield f"a list, each item {', or '.join(_said(arguments[0]))}"
    else:
        for argument in arguments:
            yield from _said(argument)


def check_pattern(name: str, pattern: str) -> None:
    """Raises CordaError if `pattern` is no regular expression."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise CordaError(f"{name} {short(pattern)} is no regular expression: {error}") from error


def find_all(name: str, pattern: str, text: str, whole: bool = False) -> list[Any]:
    """The matches of a regular expression in a text.

    Args:
        name: the option's name in a message.
        whole: only a match of the whole text.

    Raises CordaError if they take longer than a second: some expressions take time exponential in the text's length.
    """
    try:
        if whole:
            match = regex.fullmatch(pattern, text, timeout=1)
            return [match] if match else []
        return list(regex.finditer(pattern, text, timeout=1))
    except TimeoutError as error:
        raise CordaError(f"{name} {short(pattern)} takes more than a second on the text {short(text)}") from error


def split(names: str | list[str] | None) -> list[str]:
    """Names as a list, also where they are one text with commas between."""
    return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names or ())


def short(value: Any, length: int = 80) -> str:
    """The repr of a value, with its middle left out if it is long."""
    return _middle_left_out(repr(value), length)


def _middle_left_out(text: str, length: int = 80) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def _check_lora(config: "CordaConfig | LoraStart") -> None:
    """Raises CordaError if the options that are PEFT's do not go together."""
    _check_patterns(config, "target_modules", "exclude_modules")
    pattern = isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear"
    if pattern and config.layers_to_transform is not None:
        raise CordaError(
            "layers_to_transform goes with all-linear or a list of names, not with a regular expression: write the "
            "numbers into target_modules"
        )
    if config.bias != "none":
        raise CordaError(
            f"bias {config.bias} trains biases of the base model itself, which nothing could then be compared with: "
            "leave it at none, or name whole modules in modules_to_save, which the base keeps a copy of"
        )


def _check_patterns(config: Any, *names: str) -> None:
    for name in names:
        if isinstance(pattern := getattr(config, name), str):
            check_pattern(name, pattern)


# Options of PEFT's LoraConfig that users may expect here, by the reason why they are not.
NOT_OURS = {
    name: reason
    for reason, names in {
        "where the adapter starts is what CorDA is for: see mode, split and orientation": "init_lora_weights "
        "corda_config eva_config loftq_config lora_ga_config",
        "presets corda+ and corda++ give the layers ranks of their own, and all have one scale": "rank_pattern "
        "alpha_pattern",
        "with it, the adapter would be no ordinary LoRA": "use_dora velora_config kasa_config monteclora_config "
        "arrow_config use_bdlora use_qalora qalora_group_size alora_invocation_tokens lora_bias",
        "linear layers are adapted, and nothing else: see target_modules": "target_parameters layer_replication "
        "megatron_config megatron_core",
        "modules_to_save trains the embeddings whole": "trainable_token_indices ensure_weight_tying",
        "layers_to_transform counts in the first list of blocks; others go into target_modules": "layers_pattern",
        "it follows from the model": "task_type fan_in_fan_out base_model_name_or_path revision inference_mode "
        "auto_mapping peft_type peft_version runtime_config",
    }.items()
    for name in names.split()
}


def why_not(option: str) -> str:
    """The sentence for an option of PEFT's that is not ours."""
    return f"{option} is an option of PEFT's that corda-lora does not have: {NOT_OURS[option]}"


def _without_pefts_others(kind: type[T]) -> type[T]:
    """A dataclass that raises a CordaError if it is given an option that only PEFT has."""
    make = kind.__init__

    @wraps(make)
    def checked(self: T, *args: Any, **options: Any) -> None:
        if others := [name for name in options if name in NOT_OURS]:
            raise CordaError(why_not(others[0]))
        make(self, *args, **options)

    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


@_without_pefts_others
@dataclass
class CordaConfig:
    """How an adapter is cut out of a model's weights.

    Orientation, mode and split span one grid of methods: `identity` with `ipm` is PiSSA, `identity` with `kpm` is
    MiLoRA, `diagonal` is ASVD, `covariance` is CorDA.

    Args:
        mode: `kpm` (knowledge-preserved) adapts the components that the context uses least, to learn without forgetting
            the context. `ipm` (instruction-previewed) adapts the components that the context uses most, to learn faster
            what the context shows.
        preset: `corda` gives every layer rank r. `corda+` allocates the same number of parameters to the layers by
            compactness (CorDA++, Alg. 2). `corda++` also draws 5 rounds, and each layer takes its most compact
            covariance (Alg. 1).
        r: the rank, that is, the number of components adapted in each layer. With allocation, the rank that would cost
            as many parameters if every layer had it.
        allocation: by what presets corda+ and corda++ give ranks. `compactness` is the published rule. `drift` goes by
            the drift that a component's parameters are predicted to cause on the context, which also runs backward for
            it: kpm adapts the components that cost least, ipm those on which the task hangs most.
        rounds: the number of independent samplings of the context to choose from. Default: 5 in corda++, else 1.
        min_rank: the least rank that allocation gives a layer.
        max_rank: the largest rank that allocation gives a layer. Default: all components of the layer.
        budget: the number of parameters to allocate, Σ (d_in + d_out)·r, in place of r. A budget up to 1 is a share of
            the model's parameters.
        split: how a component is divided between A and B. `anchored`: A is frozen on the components, B starts from
            zero. `seeded`: the same, but A is trained, too. `balanced`: each component's row of A is as long as its
            column of B. `paper`: B = UΣ^½, A = Σ^-½UᵀW. Default: `anchored` in kpm, `seeded` in ipm.
        orientation: the matrix that the weight is multiplied by before the SVD: the context's `covariance` (CorDA), the
            root of its `diagonal` (ASVD), or the `identity` (plain SVD, which needs no context). `two_sided`: from the
            right by the root of the covariance, and from the left by that of the gradients at the layer's outputs. Then
            the context also runs backward, so only a causal language model will do.
        solver: `gram` decomposes small Gram matrices in float64. `subspace` iterates to find the adapter's components
            alone, for preset corda. `svd` is the float64 SVD, the reference. `auto` takes subspace where it can be used
            and r is small beside the layer, else gram.
        damping: λ of the regularized covariance C + λ·mean(diag C)·I.
        skip_tokens: the number of first tokens of each sample to leave out of the covariances. In many models the
            activations of the first token are far larger than any other's. Leave it at 0 for a context to keep: the
            adapter may otherwise change what the first token does.
        target_modules: the layers to adapt, as in PEFT: endings of names, a regular expression, or `all-linear`.
        quantization: `nf4` quantizes the model's linear layers to 4 bits (QLoRA's NF4, through bitsandbytes). With the
            splits paper and balanced, what is quantized is the residual W - s·BA of an adapter of rank r (QCorDA), and
            balanced is the default in ipm; else the weight itself.
        double_quantization: quantize the scales of the blocks, too: 4.13 instead of 4.5 bits a number.
        fold: how many times the adapter becomes the best fit, in the metric of the context, of what quantization lost,
            and the weight without it is quantized again. With orientation two_sided the metric is two-sided. 0 leaves
            the components of W in the adapter, as published. Default: 5 where a residual is quantized.
        keep: the weight λ, in the loss of the training to come, of the drift that the adapter is predicted to cause on
            the context: nats of loss for a nat of drift per answer token. Above 0 the start also holds what predicts
            it, in statistics.safetensors. For that the context also runs backward, one block at a time. With 0 the
            training collects it, if it needs it, from the whole model.
        lora_alpha: the adapter is scaled by s = lora_alpha / r. Default: the value for which s = 1.
        use_rslora: scale the adapter by s = lora_alpha / √r instead, as in PEFT.
        lora_dropout: the dropout rate of the adapter's input while training.
        exclude_modules: layers not to adapt, as in PEFT: endings of names or a regular expression.
        layers_to_transform: the numbers of the blocks to adapt, counted from 0, as in PEFT. Default: all.
        modules_to_save: further modules that are trained whole and saved with the adapter, as in PEFT, such as
            `lm_head`. The context does not bound the drift that they cause.
        bias: `none`. PEFT's other values train biases of the base model itself, and are refused.
        device: the device that runs and decomposes the blocks. Default: the model's device; the accelerator if the
            model is on the CPU and there is an accelerator.
    """

    mode: Literal["kpm", "ipm"] = "kpm"
    preset: Literal["corda", "corda+", "corda++"] = "corda"
    r: Count = 16
    allocation: Literal["compactness", "drift"] = "compactness"
    rounds: Count | None = None
    min_rank: Count = 1
    max_rank: Count | None = None
    budget: Positive | None = None
    split: Literal["anchored", "seeded", "balanced", "paper"] | None = None
    orientation: Literal["covariance", "diagonal", "identity", "two_sided"] = "covariance"
    solver: Literal["auto", "gram", "subspace", "svd"] = "auto"
    damping: Positive = 0.01
    skip_tokens: CountOrZero = 0
    target_modules: str | list[str] = "all-linear"
    quantization: Literal["nf4"] | None = None
    double_quantization: bool = False
    fold: Annotated[int, Range(ge=0, le=100)] | None = None
    keep: Annotated[float, Range(ge=0, le=1e30)] = 0.0
    lora_alpha: Positive | None = None
    use_rslora: bool = False
    lora_dropout: Share = 0.0
    exclude_modules: str | list[str] | None = None
    layers_to_transform: CountOrZero | list[CountOrZero] | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.split is None:
            takes_out = self.quantization or self.fold
            self.split = "anchored" if self.mode == "kpm" else "balanced" if takes_out else "seeded"
        if self.rounds is None:
            self.rounds = 5 if self.preset == "corda++" else 1
        if self.fold is None:
            self.fold = 5 if self.quantization and not self.from_zero else 0
        check_fields(self)
        _check_lora(self)
        assert self.rounds is not None
        if self.double_quantization and not self.quantization:
            raise CordaError("double_quantization goes with a quantization: nf4")
        if self.fold and self.from_zero:
            raise CordaError(
                f"fold puts what quantization lost into B A, but split {self.split} starts with B = 0: --split balanced"
            )
        if self.has_residual and self.allocates:
            raise CordaError(
                f"a layer is quantized without what its adapter holds, but preset {self.preset} gives it its rank when "
                "all are done: preset corda, or split anchored or seeded"
            )
        if self.has_residual and self.keep:
            raise CordaError(
                "keep predicts the drift from W, but the base is quantized without a part of W: split anchored or "
                "seeded, or keep 0"
            )
        if self.rounds > 1 and self.orientation == "identity":
            raise CordaError("orientation identity needs no context, so there are no rounds of it to choose from")
        if not self.allocates and (self.min_rank != 1 or self.max_rank is not None or self.budget is not None):
            raise CordaError("min_rank, max_rank and budget go with rank allocation: preset corda+ or corda++")
        if not self.allocates and self.allocation != "compactness":
            raise CordaError("allocation goes with ranks that differ: preset corda+ or corda++")
        if self.allocates and self.solver == "subspace":
            raise CordaError(
                "solver subspace finds the components of a fixed rank; to allocate ranks, all are needed: gram"
            )
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise CordaError(f"min_rank {self.min_rank} and max_rank {self.max_rank} leave no rank to allocate")

    @property
    def from_zero(self) -> bool:
        """Whether B starts from zero, so that the adapter is rank r on the weight as it is: nothing is taken out."""
        return self.split in ("anchored", "seeded")

    @property
    def has_residual(self) -> bool:
        """Whether the adapter is right only on a base without what it holds at the start: rank r, all of it trained."""
        return not self.from_zero and bool(self.quantization or self.fold)

    @property
    def reads_context(self) -> bool:
        return self.orientation != "identity" or self.runs_back

    @property
    def runs_back(self) -> bool:
        """Whether the context also runs backward through the model, for the gradients at the layers' outputs."""
        return self.orientation == "two_sided" or self.keep > 0 or self.allocation == "drift"

    @property
    def allocates(self) -> bool:
        """Whether ranks differ by layer."""
        return self.preset != "corda"

    @property
    def scale(self) -> float:
        """s of `W + s·BA`."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass
class DataConfig:
    """Which samples, and what of a row is used.

    Args:
        data: name of a data set on the Hugging Face hub, a folder that `datasets` saved, or a file: .json, .jsonl,
            .csv, .tsv, .parquet, .txt. Rows are chats if there is a column `messages` or `conversations`.
        prompt: template of the prompt over the row's columns, such as "Question: {question}\\nAnswer:". Default: the
            column `prompt` if there is one.
        response: template of the response, such as " {answer[0]}". Default: the column `response`, `completion` or
            `text`.
        label: the column with the label of a text to classify; the prompt is the text, by default of the column
            `prompt`, `text` or `sentence`. The model gets a head for these labels. Where they are numbers with a
            fraction, the head has one output, and predicts the number.
        pair: template of a second text, to classify two texts that stand side by side, such as "{hypothesis}".
        columns: names of the columns of a .csv or .tsv file whose first line does not name them, with commas between or
            as a list.
        chat: render prompt and response as turns of the user and the assistant, by the model's chat template. An
            instruct model is used in that form, so ask the context in it: the form alone has moved a plain LoRA's drift
            from 1.1 to 0.4.
        turns: in chats, which turns of the assistant carry the loss: `all`, or the `last` alone.
        rows: split of the data set, or a slice of it: "train", "test", "train[2000:]". A file is all "train".
        name: configuration of a hub data set ("main" of openai/gsm8k).
        samples: take this many, drawn with the seed; all if there are fewer or if not given.
        seed: the seed of the draw.
        max_length: the number of tokens at which a sample is cut.
    """

    data: str
    # Templates are `str`: as `str | None` the command line would read them as YAML, and take a `#` for a comment.
    prompt: str = ""
    response: str = ""
    label: str = ""
    pair: str = ""
    columns: str | list[str] | None = None
    chat: bool = False
    turns: Literal["all", "last"] = "all"
    rows: str = "train"
    name: str | None = None
    samples: Count | None = None
    seed: Seed = 0
    max_length: Count = 512

    def __post_init__(self) -> None:
        check_fields(self)
        self.columns = split(self.columns) or None
        if self.pair and not self.label:
            raise CordaError("pair is the second of two texts to classify: name the column of their label, too")
        if self.label and (self.response or self.chat):
            raise CordaError(f"a text to classify has a label and no {'response' if self.response else 'chat'}")


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
        max_drift: in place of a fixed price: steer λ so that the drift on samples of the context that were not shown
            ends at this, in nats per answer token.
        keep_generic: the same weight for texts that the model itself draws, without its adapter. They stand for the
            abilities that nobody named.
        context: DATA that shows the ability to keep. Default: what the start was made from.
    """

    keep: Annotated[float, Range(ge=0, le=1e30)] | None = None
    max_drift: Positive | None = None
    keep_generic: Annotated[float, Range(ge=0, le=1e30)] = 0.0
    context: str | DataConfig | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep == 0 and self.max_drift is not None:
            raise CordaError("keep is 0, so nothing can hold max_drift: leave one of them out")
        if self.keep == 0 and self.context is not None:
            raise CordaError("keep is 0, so nothing of the context would be kept: leave one of them out")
        if isinstance(self.context, str):
            self.context = DataConfig(self.context)


@_without_pefts_others
@dataclass
class LoraStart:
    """A plain LoRA to start from, in place of a directory from `corda init`.

    Args:
        r: the rank.
        lora_alpha: the adapter is scaled by lora_alpha / r. Default: the value for which the scale is 1.
        use_rslora: scale the adapter by lora_alpha / √r instead.
        target_modules: the layers to adapt, as in PEFT; so are the options below.
        exclude_modules: layers not to adapt: endings of names or a regular expression.
        layers_to_transform: the numbers of the blocks to adapt, counted from 0. Default: all.
        modules_to_save: further modules that are trained whole and saved with the adapter.
        bias: `none`. PEFT's other values train biases of the base model itself, and are refused.
    """

    r: Count = 16
    lora_alpha: Positive | None = None
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: CountOrZero | list[CountOrZero] | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_lora(self)


@dataclass
class ModelConfig:
    """The model, and how it is loaded.

    Args:
        model: a name on the hub, a directory, or a .gguf file (whose weights are expanded).
        revision: the branch, tag or commit of a model on the hub.
        dtype: the type of the weights. `auto` is the type in the checkpoint.
        trust_remote_code: run code that the model brings, or that its config.json names on the hub.
        labels: of a classifier, in the order of its outputs, with commas between or as a list; one alone names a number
            that is predicted. Default: what the adapter or the data says.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    labels: str | list[str] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.labels = split(self.labels) or None
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise CordaError(f"labels is {short(self.labels)}, but must be names that differ")


@dataclass
class JudgeConfig:
    """Who judges the answers of the task mt_bench: a model at an endpoint that speaks OpenAI's protocol. If it asks for
    a key, put it into the environment variable OPENAI_API_KEY.

    Args:
        url: the endpoint, such as https://api.openai.com/v1, to which /chat/completions is added. Without it, answers
            are written, and not judged.
        model: the judge's name at the endpoint.
        price: of a million tokens, shown and said alike: what the judging costs at most is said before it begins.
        folder: the directory of answers and judgments, in FastChat's form. What is there is not done again.
    """

    url: str = ""
    model: str = ""
    price: NonNegative | None = None
    folder: Path = Path("mt_bench")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.url and not re.match(r"https?://[^/\s]", self.url):
            raise CordaError(f"judge.url is {short(self.url)}, but must begin with http:// or https://")
        try:
            _ = urlsplit(self.url).port
        except ValueError as error:
            raise CordaError(f"judge.url is {short(self.url)}, which is no address: {error}") from error
        if bool(self.url) != bool(self.model):
            raise CordaError("a judge is an endpoint and a model there: give both judge.url and judge.model")


@dataclass
class EvalConfig:
    """What is measured. Data is a name on the hub or a file, a mapping of DataConfig's options, or a list of these.

    Args:
        keep: samples of the ability to keep. Measured: drift, and the loss of the responses.
        learn: samples of the task. Measured: the loss, and exact match if `exact_match` is set.
        text: running text. Measured: perplexity, and drift over every token.
        choices: multiple-choice questions: rows with a list `choices` and the right choice as `response`.
        prompt: template of the prompt for all of this data but running text, unless the data has its own: keep.prompt,
            learn.prompt, choices.prompt.
        response: template of the response, likewise.
        exact_match: how a greedy answer is compared with the response. `text` compares the whole texts. A regular
            expression, such as "#### (-?[0-9,.]+)", compares the first group of its last match.
        max_new_tokens: the number of tokens at which a greedy answer is cut.
        batch_tokens: the number of tokens in a forward.
        tasks: names of benchmarks, as a list or with commas between: see docs/benchmarks.md.
        data_dir: a directory with the benchmarks' data, which is else taken from the hub.
        limit: the number of samples of each benchmark, the first ones. Default: all.
        judge: who judges the answers of mt_bench: see JudgeConfig.
    """

    keep: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    learn: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    text: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    choices: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    prompt: str = ""
    response: str = ""
    exact_match: str = ""
    max_new_tokens: Count = 64
    batch_tokens: Count = 8192
    tasks: str | list[str] = field(default_factory=list)
    data_dir: Path | None = None
    limit: Count | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        self.tasks = split(self.tasks)
        if self.exact_match != "text":
            check_pattern("exact_match", self.exact_match)

    def data(self, kind: str) -> list[DataConfig]:
        """The data of "keep", "learn", "text" or "choices", however it was given."""
        value = getattr(self, kind)
        datas = value if isinstance(value, list) else [] if value is None else [value]
        configs = [DataConfig(data) if isinstance(data, str) else data for data in datas]
        if kind == "text":
            return configs
        return [replace(c, prompt=c.prompt or self.prompt, response=c.response or self.response) for c in configs]


@dataclass
class InspectConfig:
    """What is looked at in a model. Data is a name on the hub or a file, or a mapping of DataConfig's options.

    Args:
        context: samples that show an ability. Give --context several times to compare several. Options of one follow
            it: --context.prompt TEMPLATE.
        prompt: template of the prompt for all contexts without one of their own.
        response: template of the response, likewise.
        samples: the number of samples of each context, drawn with the seed. Of several numbers, such as [32,256], the
            largest is taken, and truncation is also measured with covariances of fewer.
        max_length: the number of tokens at which a sample is cut, where its data has no other number.
        layers: the layers whose spectra and covariances are shown: names or endings of names. Default: those of the
            middle block.
        levels: how many of the smallest components of every layer are discarded; a number below 1 is a share of them.
            The loss is measured at each, by plain SVD, ASVD and CO-SVD with each context. Default: none.
        text: running text on which that is measured. Default: samples of each context that were not shown.
        held_out: the number of such samples, or of windows of the text.
        rounds: the number of independent draws of each context. With several, components are also discarded by CO-SVD+,
            where each layer takes its most compact covariance, and by CO-SVD++, which also shares them out among the
            layers by compactness, with as many parameters in all.
        two_sided: also discard components in the two-sided metric. For it the contexts run backward, too.
        damping: λ of the regularized covariance C + λ·mean(diag C)·I.
        skip_tokens: the number of first tokens of each sample to leave out of the covariances.
        batch_tokens: the number of tokens in a forward.
        park: where hidden states of samples wait for the next block. `auto` is the first of the others with room.
        device: the device that runs and decomposes the blocks. Default: the accelerator, if there is one.
    """

    context: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    prompt: str = ""
    response: str = ""
    samples: Count | list[Count] = 256
    max_length: Count = 512
    layers: str | list[str] = field(default_factory=list)
    levels: Positive | list[Positive] = field(default_factory=list)
    text: str | DataConfig | None = None
    held_out: Count = 32
    rounds: Count = 1
    two_sided: bool = False
    damping: Positive = 0.01
    skip_tokens: CountOrZero = 0
    batch_tokens: Count = 4096
    park: Literal["auto", "device", "cpu", "disk"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.samples = sorted(set(self.samples if isinstance(self.samples, list) else [self.samples]))
        self.layers = self.layers if isinstance(self.layers, list) else [self.layers]
        self.levels = sorted(set(self.levels if isinstance(self.levels, list) else [self.levels]))
        if not self.samples:
            raise CordaError("samples is an empty list: give how many samples of a context are shown")
        if broken := [level for level in self.levels if level > 1 and level != int(level)]:
            raise CordaError(f"a level is {broken[0]:g}, but must be a share below 1, or a whole number of components")
        if self.levels and self.levels[0] < 1 <= self.levels[-1]:
            raise CordaError(
                f"levels are shares below 1 or counts of components, not both: {self.levels[0]:g} is a share, "
                f"{self.levels[-1]:g} a count"
            )
        asked = {"two_sided": self.two_sided, "rounds": self.rounds > 1, "text": self.text is not None}
        for name in (name for name, given in asked.items() if given and not self.levels):
            raise CordaError(f"{name} is of the components that levels discard: give levels, or leave it out")

    def contexts(self) -> list[DataConfig]:
        """The contexts, however they were given, with the templates and the number of samples that they do not set."""
        given = self.context if isinstance(self.context, list) else [self.context]
        configs = [self._cut(data) for data in given]
        assert isinstance(self.samples, list)
        return [
            replace(
                c,
                prompt=c.prompt or self.prompt,
                response=c.response or self.response,
                samples=c.samples or self.samples[-1],
            )
            for c in configs
        ]

    def running_text(self) -> DataConfig | None:
        """The text, however it was given."""
        return None if self.text is None else self._cut(self.text)

    def _cut(self, given: str | DataConfig) -> DataConfig:
        data = DataConfig(given) if isinstance(given, str) else given
        return replace(data, max_length=self.max_length) if data.max_length == DataConfig.max_length else data


@dataclass
class MethodConfig:
    """One entry of a comparison.

    Args:
        method: the name of a method (see `corda_lora.methods.METHODS`). Default: the name of the entry.
        learning_rates: the learning rates to sweep, at least two (one is enough with a `sweep`). Default: the method's
            own.
        options: hyperparameters of the method that differ from its defaults, such as {ratio: 4} for lora+. Our methods
            take any options of `corda init`.
        sweep: one of the method's options with the values to run, such as {keep: [3, 10, 30]}. Every value is run at
            every learning rate, and the frontier is over both.
        all_seeds: run every rate (and value) with every seed, not only those around the best. This gives an interval of
            drift at equal loss all along the frontier.
    """

    method: str = ""
    learning_rates: list[Positive] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    all_seeds: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def swept_option(self) -> str:
        """The option that `sweep` names; "" without one."""
        return next(iter(self.sweep), "")

    @property
    def swept_values(self) -> list[Any]:
        """Its values in ascending order, each once."""
        return sorted({value for values in self.sweep.values() for value in values})

    def key(self) -> dict[str, Any]:
        """What makes the results of two entries the same, whatever their rates and swept values."""
        return {"method": self.method, "options": self.options}


def _check_sweep(name: str, entry: MethodConfig) -> None:
    """Raises CordaError if an entry's sweep is none of one option over several values."""
    if len(entry.sweep) > 1:
        raise CordaError(f"{name} sweeps {', '.join(entry.sweep)}: beside the learning rate, one option can be swept")
    for option, values in entry.sweep.items():
        if option in entry.options:
            raise CordaError(f"{name} gives {option} under options and under sweep: leave one of them out")
        numbers = all(isinstance(value, (int, float)) and value in Range(ge=-1e30, le=1e30) for value in values)
        if not numbers and not all(isinstance(value, str) and "/" not in value for value in values):
            raise CordaError(f"{name} sweeps {option} over {short(values)}, but must over numbers, or over words")
        if len(set(values)) < 2:
            raise CordaError(f"{name} sweeps {option} over one value: give at least two, or set it under options")


@dataclass
class CompareConfig:
    """What is compared, and on what. Everything but the methods is the same for all runs.

    Args:
        methods: the entries to compare: a list of names of methods, or a mapping of names of your choice to options of
            MethodConfig (nothing for the defaults).
        data: samples of the task to learn. Methods that analyse a task before they train (ipm, EVA, LoRA-GA) analyse
            these.
        context: samples of the ability to keep, for methods that analyse it before they train (kpm, LoRA-Null).
        context_samples: the number of samples that such a method analyses.
        eval: what is measured of every run, and once of the base model: see EvalConfig. The first `learn` is the task.
        train: the training of every run. The comparison sets `learning_rate`, `seed` and `checkpoints`.
        r: the rank of the adapters. A method without ranks gets as many parameters.
        lora_alpha: adapters are scaled by lora_alpha / r. Default: r.
        target_modules: the layers to adapt, as in PEFT.
        seeds: the number of seeds. Every learning rate is run with the first seed. The others are run where they count:
            for each method's best rate and its two neighbours, and for the two rates between which the method reaches
            the best loss of `lora` (of the first entry, if `lora` is not compared).
        curve_points: how often a run measures the task's held-out loss, the end included.
        curve_samples: the number of samples of the first `learn` data that this takes.
    """

    methods: list[str] | dict[str, MethodConfig | None]
    data: str | DataConfig
    eval: EvalConfig
    context: str | DataConfig | None = None
    context_samples: Count = 256
    train: TrainConfig = field(default_factory=TrainConfig)
    r: Count = 16
    lora_alpha: Positive | None = None
    target_modules: str | list[str] = "all-linear"
    seeds: Count = 3
    curve_points: Count = 10
    curve_samples: Count = 128

    def __post_init__(self) -> None:
        check_fields(self)
        _check_patterns(self, "target_modules")
        entries = dict.fromkeys(self.methods) if isinstance(self.methods, list) else self.methods
        self.entries = {name: entry or MethodConfig() for name, entry in entries.items()}
        for name, entry in self.entries.items():
            if not name or re.search(r"^\.|[/\0]", name) or len(name.encode()) > 200:
                raise CordaError(f"{short(name)} cannot be an entry's name: a directory is called so")
            entry.method = entry.method or name
            _check_sweep(name, entry)
            for what, values in (("learning rates", entry.learning_rates), *entry.sweep.items()):
                if len({value if isinstance(value, str) else f"{value:g}" for value in values}) < len(set(values)):
                    raise CordaError(f"two {what} of {name} have the same first six digits: runs are called by these")
            if len(set(entry.learning_rates)) == 1 and not entry.sweep:
                raise CordaError(
                    f"{name} has one learning rate ({entry.learning_rates[0]:g}): which method wins depends on the "
                    "rate, so each is compared over several; give at least two, better four"
                )
        if not self.entries:
            raise CordaError("there is no method to compare: name some under `methods`")
        if self.train.early_stopping:
            raise CordaError("all runs of a comparison take the same number of steps: leave early_stopping out")
        if not self.eval.data("learn"):
            raise CordaError(
                "nothing says how well the task was learned: give held-out samples of it under eval: learn"
            )
