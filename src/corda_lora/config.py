"""Every option of every stage, once: its default and its meaning. (No heavy import: `corda --help` reads this file.)"""

from dataclasses import dataclass, field
from typing import Any, Literal


class CordaError(ValueError):
    """Something the user can mend. The message is one sentence that names what and where; the CLI exits with 2."""


@dataclass
class CordaConfig:
    """How an adapter is cut out of a model's weights. Orientation, mode and split span one grid: `identity` with `ipm`
    is PiSSA, `identity` with `kpm` is MiLoRA, `diagonal` is ASVD, `covariance` is CorDA.

    Args:
        mode: `kpm` (knowledge-preserved) adapts the components the context uses least, to learn without forgetting
            it; `ipm` (instruction-previewed) those it uses most, to learn faster what the context shows.
        preset: `corda`: rank r everywhere; `corda+`: the same parameters, allocated to the layers by compactness
            (CorDA++, Alg. 2); `corda++`: also 5 rounds, of which each layer takes its most compact covariance (Alg. 1).
        r: rank, the number of components adapted in each layer; with allocation their average, in parameters.
        rounds: independent samplings of the context to choose from. Default: 5 in corda++, else 1.
        min_rank: least rank that allocation gives a layer.
        max_rank: largest rank that allocation gives a layer. Default: all a layer has.
        budget: what allocation shares out, in place of r: parameters Σ (d_in + d_out)·r if above 1, a share of the
            model's parameters if below.
        split: how a component is shared between A and B. `anchored`: A frozen on the components, B from zero; `seeded`:
            the same with A trained, too; `balanced`: each component's row of A as long as its column of B; `paper`:
            B = UΣ^½, A = Σ^-½UᵀW. Default: `anchored` in kpm, `seeded` in ipm.
        orientation: what the weight is multiplied by before the SVD: the context's covariance (CorDA), the root of
            its diagonal (ASVD), or nothing (plain SVD, which needs no context).
        solver: `gram` (float64 eigendecomposition of small Gram matrices), `subspace` (iteration that finds the
            components of the adapter alone; for preset corda), `svd` (float64 SVD, the reference), or `auto`: subspace
            where it can be used and r is small beside the layer, else gram.
        damping: λ of C + λ·mean(diag C)·I.
        skip_tokens: leave the first so many tokens of each sample out of the covariances: in many models the
            activations of the first are far larger than any other's. (Not for what is to be kept: the adapter is then
            free to change what the first token does.)
        target_modules: layers to adapt, as in PEFT: name endings, a regular expression, or `all-linear`.
        lora_alpha: the adapter is scaled by s = lora_alpha / r. Default: r, so s = 1.
        device: where blocks are run and decomposed. Default: where the model is, or the accelerator if it is on the
            CPU and there is one.
    """

    mode: Literal["kpm", "ipm"] = "kpm"
    preset: Literal["corda", "corda+", "corda++"] = "corda"
    r: int = 16
    rounds: int | None = None
    min_rank: int = 1
    max_rank: int | None = None
    budget: float | None = None
    split: Literal["anchored", "seeded", "balanced", "paper"] | None = None
    orientation: Literal["covariance", "diagonal", "identity"] = "covariance"
    solver: Literal["auto", "gram", "subspace", "svd"] = "auto"
    damping: float = 0.01
    skip_tokens: int = 0
    target_modules: str | list[str] = "all-linear"
    lora_alpha: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.split is None:
            self.split = "anchored" if self.mode == "kpm" else "seeded"
        if self.rounds is None:
            self.rounds = 5 if self.preset == "corda++" else 1
        for name, allowed in {
            "mode": ("kpm", "ipm"),
            "preset": ("corda", "corda+", "corda++"),
            "split": ("anchored", "seeded", "balanced", "paper"),
            "orientation": ("covariance", "diagonal", "identity"),
            "solver": ("auto", "gram", "subspace", "svd"),
        }.items():
            if getattr(self, name) not in allowed:
                raise CordaError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")
        if self.r < 1:
            raise CordaError(f"r is {self.r}, but a rank is at least 1")
        if self.rounds < 1:
            raise CordaError(f"rounds is {self.rounds}, but the context is sampled at least once")
        if self.rounds > 1 and self.orientation == "identity":
            raise CordaError("orientation identity needs no context, so there are no rounds of it to choose from")
        if not self.allocates and (self.min_rank != 1 or self.max_rank is not None or self.budget is not None):
            raise CordaError("min_rank, max_rank and budget go with rank allocation: preset corda+ or corda++")
        if self.allocates and self.solver == "subspace":
            raise CordaError(
                "solver subspace finds the components of a fixed rank; to allocate ranks, all are needed: gram"
            )
        if self.min_rank < 1 or (self.max_rank is not None and self.max_rank < self.min_rank):
            raise CordaError(f"min_rank {self.min_rank} and max_rank {self.max_rank} leave no rank to allocate")
        if self.budget is not None and not self.budget > 0:
            raise CordaError(f"budget is {self.budget}, but must be above 0")
        if self.skip_tokens < 0:
            raise CordaError(f"skip_tokens is {self.skip_tokens}, but is at least 0")
        if not self.damping > 0:
            raise CordaError(f"damping is {self.damping}, but must be above 0")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise CordaError(f"lora_alpha is {self.lora_alpha}, but must be above 0")

    @property
    def from_zero(self) -> bool:
        """Whether B starts from zero, so that the adapter is rank r on the weight as it is: nothing is taken out."""
        return self.split in ("anchored", "seeded")

    @property
    def allocates(self) -> bool:
        """Whether ranks differ by layer."""
        return self.preset != "corda"

    @property
    def scale(self) -> float:
        """s of `W + s·BA`."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r


@dataclass
class DataConfig:
    """Which samples, and what of a row is used. (Templates are plain strings: as `str | None` the command line would
    read them as YAML first, and take a `#` for a comment.)

    Args:
        data: name of a data set on the Hugging Face hub, or a file: .json, .jsonl, .csv, .tsv, .parquet, .txt.
        prompt: template of the prompt over the row's columns, such as "Question: {question}\\nAnswer:". Default: the
            column `prompt` if there is one.
        response: template of the response, such as " {answer[0]}". Default: the column `response`, or `text`.
        rows: split of the data set, or a slice of it: "train", "test", "train[2000:]". A file is all "train".
        name: configuration of a hub data set ("main" of openai/gsm8k).
        samples: take this many, drawn with the seed; all if there are fewer or if not given.
        seed: of the draw.
        max_length: in tokens; longer samples are cut.
    """

    data: str
    prompt: str = ""
    response: str = ""
    rows: str = "train"
    name: str | None = None
    samples: int | None = None
    seed: int = 0
    max_length: int = 512


@dataclass
class TrainConfig:
    """The training recipe: AdamW, cosine, 3 % warm-up, no weight decay, one epoch, as CorDA's authors train. The
    learning rate depends on the split: see the README.

    Args:
        learning_rate: peak of the schedule.
        epochs: passes over the data.
        max_steps: stop after this many steps instead, if given.
        batch_size: samples a step.
        micro_batch_size: samples a forward; the rest of the batch is accumulated, to the same gradient. A step's
            samples are dealt out by length, so less memory, and less padding. Default: the batch size.
        warmup: share of the steps with rising learning rate.
        schedule: `cosine`, `linear` or `constant`.
        weight_decay: of AdamW.
        lora_dropout: of the adapter's input.
        precision: `bf16` and `fp16` are mixed precision (autocast), `fp32` is none.
        gradient_checkpointing: less memory, a third more time.
        compile: each block by `torch.compile`, for samples of any length: a minute at the start, then faster steps.
        seed: of order and dropout.
        checkpoints: how many are written over the run; a run started again goes on from the last. 0 for none.
    """

    learning_rate: float = 1e-3
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    warmup: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    lora_dropout: float = 0.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    checkpoints: int = 4

    def __post_init__(self) -> None:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise CordaError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )


@dataclass
class LoraStart:
    """A plain LoRA to start from instead of a `corda init` directory.

    Args:
        r: rank.
        lora_alpha: the adapter is scaled by lora_alpha / r. Default: r.
        target_modules: as in PEFT.
    """

    r: int = 16
    lora_alpha: float | None = None
    target_modules: str | list[str] = "all-linear"


@dataclass
class ModelConfig:
    """Which model, and how it is loaded.

    Args:
        model: name on the hub, directory, or .gguf file (its weights are expanded).
        revision: of a model on the hub.
        dtype: of the weights: `auto` is the checkpoint's own.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


@dataclass
class EvalConfig:
    """What is measured. Data is a hub name or file, or a mapping of the options of DataConfig, or a list of either.

    Args:
        keep: samples of what should be kept: drift, and the loss of the responses.
        learn: samples of what was learned: loss, and exact match if `exact_match` is set.
        text: running text: perplexity, and drift over every token.
        choices: multiple choice: rows with a list `choices` and, as `response`, the right one.
        exact_match: decode greedily and compare with the response: "text" compares the whole, anything else is a
            regular expression whose last match (its first group) is compared, such as "#### (-?[0-9,.]+)".
        max_new_tokens: of a greedy answer.
        batch_tokens: tokens a forward.
    """

    keep: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    learn: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    text: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    choices: str | DataConfig | list[str | DataConfig] = field(default_factory=list)
    exact_match: str = ""
    max_new_tokens: int = 64
    batch_tokens: int = 8192

    def data(self, kind: str) -> list[DataConfig]:
        """The data of "keep", "learn", "text" or "choices", however it was given."""
        given = getattr(self, kind)
        given = given if isinstance(given, list) else [given]
        return [DataConfig(data) if isinstance(data, str) else data for data in given]


@dataclass
class MethodConfig:
    """One entry of a comparison.

    Args:
        method: name of a method (see `corda_lora.methods.METHODS`). Default: the entry's own name.
        learning_rates: to sweep, at least two. Default: the method's own.
        options: hyperparameters of the method in place of its defaults, such as {ratio: 4} for lora+, or any options
            of `corda init` for ours.
        all_seeds: run every rate with every seed, not only those around the best: for an interval of drift at equal
            loss all along the frontier.
    """

    method: str = ""
    learning_rates: list[float] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    all_seeds: bool = False

    def key(self) -> dict[str, Any]:
        """What makes the results of two entries the same, whatever their rates."""
        return {"method": self.method, "options": self.options}


@dataclass
class CompareConfig:
    """What is compared, and on what: everything but the methods is the same for all runs.

    Args:
        methods: entries to compare: a list of names of methods, or a mapping of names of your choice to
            MethodConfig's options (nothing for the defaults).
        data: samples of the task to learn; methods that look at a task before (ipm, EVA, LoRA-GA) look at these.
        context: samples of the ability to keep, for methods that look at it before (kpm, LoRA-Null).
        context_samples: how many samples of either such a method looks at.
        eval: what is measured of every run, and once of the base model: see EvalConfig. The first `learn` is the task.
        train: the training of every run; `learning_rate`, `seed` and `checkpoints` are set by the comparison.
        r: the adapters' rank; a method without ranks gets as many parameters.
        lora_alpha: adapters are scaled by lora_alpha / r. Default: r.
        target_modules: as in PEFT.
        seeds: every learning rate is run with seed 0, and with this many where it counts: each method's best rate and
            its two neighbours, and the two between which it reaches the best loss of `lora` (of the first, if it is
            not compared).
        curve_points: how often the task's held-out loss is measured in each run, the end included.
        curve_samples: of the first `learn` data, for that.
    """

    methods: list[str] | dict[str, MethodConfig | None]
    data: str | DataConfig
    eval: EvalConfig
    context: str | DataConfig | None = None
    context_samples: int = 256
    train: TrainConfig = field(default_factory=TrainConfig)
    r: int = 16
    lora_alpha: float | None = None
    target_modules: str | list[str] = "all-linear"
    seeds: int = 3
    curve_points: int = 10
    curve_samples: int = 128

    def __post_init__(self) -> None:
        given = dict.fromkeys(self.methods) if isinstance(self.methods, list) else self.methods
        self.entries = {name: entry or MethodConfig() for name, entry in given.items()}
        for name, entry in self.entries.items():
            if "/" in name or name.startswith("."):
                raise CordaError(f"{name!r} cannot be an entry's name: a directory is called so")
            entry.method = entry.method or name
            if len(set(entry.learning_rates)) == 1:
                raise CordaError(
                    f"{name} has one learning rate ({entry.learning_rates[0]:g}): which method wins depends on the "
                    "rate, so each is compared over several; give at least two, better four"
                )
            if any(not rate > 0 for rate in entry.learning_rates):
                raise CordaError(f"a learning rate of {name} is not above 0")
        if not self.entries:
            raise CordaError("there is no method to compare: name some under `methods`")
        if self.seeds < 1 or self.curve_points < 1 or self.r < 1 or self.context_samples < 1:
            raise CordaError("seeds, curve_points, context_samples and r are at least 1")
        if not self.eval.data("learn"):
            raise CordaError(
                "nothing says how well the task was learned: give held-out samples of it under eval: learn"
            )
