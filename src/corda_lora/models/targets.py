"""Which layers of a model are adapted: the one module that knows PEFT's rules for naming them."""

import difflib
import hashlib
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import CordaConfig, CordaError

TASK_TYPES = {
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}

# The heads of classifiers, which PEFT trains whole (`modules_to_save`) and its `all-linear` excludes in part.
HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type, from the name of the model's class; None if it has none."""
    name = type(model).__name__
    found = next((task for ending, task in TASK_TYPES.items() if name.endswith(ending)), None)
    if found is TaskType.SEQ_2_SEQ_LM and not getattr(model.config, "is_encoder_decoder", False):
        return TaskType.CAUSAL_LM  # vision-language decoders are named ForConditionalGeneration, too
    return found


def require_causal(model: nn.Module) -> None:
    """Raises CordaError if a model (adapted or not) is not a causal language model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if task_type(base) is not TaskType.CAUSAL_LM:
        raise CordaError(
            f"{type(base).__name__} is no causal language model, the only kind that is trained and measured"
        )


def find_targets(model: nn.Module, target_modules: str | list[str]) -> dict[str, nn.Module]:
    """The layers that `target_modules` means, as in PEFT, by name, in the model's order.

    `all-linear` leaves the output head, and the head of a classifier, out.

    Raises:
        CordaError: nothing matches (the nearest names are given), something matches that is not a linear layer, or
            the model carries an adapter already.
    """
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise CordaError("the model carries a PEFT adapter already: give the base model, or unload() it first")
    config = LoraConfig(target_modules=target_modules, task_type=task_type(model))
    config = _maybe_include_all_linear_layers(config, model)
    heads = HEADS.get(config.task_type, ())
    modules = {n: m for n, m in model.named_modules() if n and n.partition(".")[0] not in heads}
    found = {n: m for n, m in modules.items() if LoraModel._check_target_module_exists(config, n)}
    if not found:
        wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        names = list(dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)))
        near = [n for w in wanted for n in difflib.get_close_matches(w.rpartition(".")[2], names, n=3, cutoff=0.3)]
        hint = (
            f" (a bare name is a pattern for whole names: write [{target_modules}])" if target_modules in names else ""
        )
        raise CordaError(
            f"target_modules {target_modules!r} matches no layer of {type(model).__name__}{hint}; "
            f"nearest names: {', '.join(dict.fromkeys(near or names)) or 'none'}"
        )
    for name, module in found.items():
        if not is_linear(module):
            raise CordaError(f"target {name} is a {type(module).__name__}; CorDA adapts linear layers only")
    return found


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def left_out(model: nn.Module, targets: Mapping[str, nn.Module]) -> list[str]:
    """Weights that act like linear layers but are one fused parameter (a mixture's experts): PEFT's `all-linear`, and
    so ours, does not reach them."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if name not in targets and not isinstance(module, nn.modules.conv._ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1
    ]


def budget_of(targets: Mapping[str, nn.Module], config: CordaConfig, model: nn.Module) -> int:
    """Parameters Σ (d_in + d_out)·r of the adapter: those of rank r everywhere, or config.budget."""
    if config.budget is None:
        return config.r * sum(sum(weight_shape(module)) for module in targets.values())
    return int(config.budget if config.budget > 1 else config.budget * sum(p.numel() for p in model.parameters()))


def check_rank(targets: Mapping[str, nn.Module], config: CordaConfig, model: nn.Module) -> None:
    """Raises CordaError if a layer has fewer components than are asked for, or the budget cannot be met."""
    shapes = {name: weight_shape(module) for name, module in targets.items()}
    if not config.allocates:
        for name, (m, n) in shapes.items():
            if config.r > min(m, n):
                raise CordaError(f"r is {config.r}, but {name} ({m} × {n}) has only {min(m, n)} components")
        return
    budget = budget_of(targets, config, model)
    least = sum(min(config.min_rank, m, n) * (m + n) for m, n in shapes.values())
    most = sum(min(config.max_rank or m, m, n) * (m + n) for m, n in shapes.values())
    if budget < least:
        raise CordaError(
            f"the budget is {budget:,} parameters, but min_rank {config.min_rank} in each of {len(shapes)} layers "
            f"takes {least:,}"
        )
    if budget > most:
        raise CordaError(f"the budget is {budget:,} parameters, but all components that may be chosen have {most:,}")


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer or Conv1D, quantized or not."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Tensor:
    """W (d_out, d_in) of a linear layer; of a quantized one, what its numbers stand for."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.dtype.is_floating_point or weight.numel() != weight_shape(module)[0] * weight_shape(module)[1]:
        weight = dequantize_module_weight(module)
    elif weight.dtype.itemsize == 1:
        raise CordaError("the base weights are float8, from which components cannot be cut: load the model in bfloat16")
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def layer_digest(module: nn.Module) -> str:
    """sha256 over up to 4096 evenly spaced numbers of a layer's weight, as bfloat16: the same whatever dtype it was
    loaded in."""
    flat = weight_of(module).reshape(-1)
    step = max(1, flat.numel() // 4096)
    sample = flat[::step][:4096].to("cpu", torch.float32).to(torch.bfloat16)
    digest = hashlib.sha256(str(weight_shape(module)).encode())
    digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Of all layers, by name: tells whether an adapter was made for these weights."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()
