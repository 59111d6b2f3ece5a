"""How an adapter's start is cut out of a model: `corda init`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .lora import check_lora, without_pefts_others
from .values import CordaError, Count, CountOrZero, Positive, Range, Share, check_fields

PRICED_TASK = "in mode ipm the context is the task to learn, so its price (keep) is on drift on the task itself"


@without_pefts_others
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
            the context also runs backward, so only a causal language model will do. Default: `two_sided` in kpm with
            `keep` above 0, where nothing asks for a published method (preset corda+ or corda++, rounds, split paper or
            balanced); else `covariance`.
        solver: `gram` decomposes small Gram matrices in float64. `subspace` iterates to find the adapter's components
            alone, for preset corda. `svd` is the float64 SVD, the reference. `auto` takes subspace where it can be used
            and r is small beside the layer, else gram.
        damping: λ of the regularized covariance C + λ·mean(diag C)·I.
        weights: of several contexts, how much each counts: as `given` with each (or equally), or by `compactness`: each
            layer takes those under which the r directions that the mixture uses least leak as little as can be for the
            context that they leak most for.
        skip_tokens: the number of first tokens of each sample to leave out of the covariances. In many models the
            activations of the first token are far larger than any other's. Leave it at 0 for a context to keep: the
            adapter may otherwise change what the first token does.
        tokens: which tokens of samples with images count in the covariances: `all`, or those of `text` or `image`
            alone, for study.
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
    rounds: Count | None = None
    min_rank: Count = 1
    max_rank: Count | None = None
    budget: Positive | None = None
    split: Literal["anchored", "seeded", "balanced", "paper"] | None = None
    orientation: Literal["covariance", "diagonal", "identity", "two_sided"] | None = None
    solver: Literal["auto", "gram", "subspace", "svd"] = "auto"
    damping: Positive = 0.01
    weights: Literal["given", "compactness"] = "given"
    skip_tokens: CountOrZero = 0
    tokens: Literal["all", "text", "image"] = "all"
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
        if self.orientation is None:
            self.orientation = "two_sided" if self._keeps_by_default else "covariance"
        check_fields(self)
        check_lora(self)
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
        if self.allocates and self.solver == "subspace":
            raise CordaError(
                "solver subspace finds the components of a fixed rank; to allocate ranks, all are needed: gram"
            )
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise CordaError(f"min_rank {self.min_rank} and max_rank {self.max_rank} leave no rank to allocate")

    @property
    def _keeps_by_default(self) -> bool:
        """Whether the start is ours for keeping, whose context runs backward in any case. CorDA as published, and the
        choices of CorDA++, which are defined by C alone, stay what they are."""
        ours = self.from_zero and not self.allocates and self.rounds == 1
        # A price that is no number is refused with the other fields.
        return self.mode == "kpm" and ours and isinstance(self.keep, (int, float)) and self.keep > 0

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
        return self.orientation == "two_sided" or self.keep > 0

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


def check_together(config: CordaConfig, contexts: int) -> None:
    """Raises CordaError if there are several contexts, where only one will do, or one where it takes several."""
    if contexts < 2:
        if config.weights != "given":
            raise CordaError(f"weights by {config.weights} are of several contexts: give two or more")
        return
    if config.keep:
        raise CordaError(
            "keep is the price of one context, and with several each has its own, in training: leave keep out here"
        )
    if config.rounds != 1:
        raise CordaError(f"{config.rounds} rounds are of one context, but there are {contexts}")
