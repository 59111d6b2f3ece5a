"""The options that are PEFT's, and those of PEFT's that are not ours."""

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .values import CordaError, Count, CountOrZero, Positive, check_fields, check_patterns

if TYPE_CHECKING:
    from .init import CordaConfig

T = TypeVar("T")

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


def without_pefts_others(kind: type[T]) -> type[T]:
    """A dataclass that raises a CordaError if it is given an option that only PEFT has."""
    make = kind.__init__

    @wraps(make)
    def checked(self: T, *args: Any, **options: Any) -> None:
        if others := [name for name in options if name in NOT_OURS]:
            raise CordaError(why_not(others[0]))
        make(self, *args, **options)

    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


def check_lora(config: "CordaConfig | LoraStart") -> None:
    """Raises CordaError if the options that are PEFT's do not go together."""
    check_patterns(config, "target_modules", "exclude_modules")
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


@without_pefts_others
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
        check_lora(self)
