"""Which layers of a model are adapted: the one module that knows PEFT's rules for naming them."""

import copy
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import peft
from peft import LoraConfig, TaskType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import CordaConfig, CordaError
from ..config.values import find_all
from .seeing import base_of, image_side
from .weights import weight_shape

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

NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")  # of a block, in a name
NEW = "drawn"  # an attribute of models: the names of modules whose weights are random, as the checkpoint has none


def task_type(model: nn.Module) -> TaskType | None:
    """PEFT's task type, from the name of the model's class; None if it has none."""
    name = type(model).__name__
    task = next((task for ending, task in TASK_TYPES.items() if name.endswith(ending)), None)
    if task is TaskType.SEQ_2_SEQ_LM and not getattr(model.config, "is_encoder_decoder", False):
        return TaskType.CAUSAL_LM  # vision-language decoders are named ForConditionalGeneration, too
    return task


def is_classifier(model: nn.Module) -> bool:
    """Whether a model (adapted or not) gives a text a label, or a number."""
    return task_type(base_of(model)) is TaskType.SEQ_CLS


def known_labels(model: nn.Module) -> list[str] | None:
    """A classifier's labels in the order of its outputs; None of another model."""
    if not is_classifier(model):
        return None
    names: Any = base_of(model).config.id2label  # type: ignore[union-attr]
    return [str(names[i]) for i in range(len(names))]


def is_of_head(name: str) -> bool:
    """Whether a module, or a weight, of a classifier belongs to the head that PEFT trains whole by itself."""
    return name.partition(".")[0].endswith(HEADS[TaskType.SEQ_CLS])


def new_modules(model: nn.Module) -> list[str]:
    """The modules of a classifier before its head, such as a pooling layer, that the checkpoint has no weights of. They
    are trained whole, too."""
    return [name for name in getattr(model, NEW, ()) if not is_of_head(name)]


def has_new_head(model: nn.Module) -> bool:
    """Whether the base model's head for labels is random: the checkpoint has none."""
    return bool(getattr(base_of(model), NEW, ()))


def trains_head(model: nn.Module) -> bool:
    """Whether an adapted classifier's head is trained."""
    parameters = base_of(model).named_parameters()
    return any(parameter.requires_grad and parameter.ndim > 1 for name, parameter in parameters if is_of_head(name))


def require_causal(model: nn.Module, why: str = "only these can be trained and measured on responses") -> None:
    """Raises CordaError if a model (adapted or not) is not a causal language model, and says why it has to be one."""
    base = base_of(model)
    if task_type(base) is not TaskType.CAUSAL_LM:
        raise CordaError(f"{type(base).__name__} is no causal language model: {why}")


def choose_targets(model: nn.Module, config: CordaConfig) -> dict[str, nn.Module]:
    """The layers that a configuration adapts, by name, in the model's order.

    Raises CordaError as `find_targets`, `check_saved_modules` and `check_rank` do.
    """
    targets = find_targets(
        model, config.target_modules, _least_rank(config), config.exclude_modules, config.layers_to_transform
    )
    check_saved_modules(model, targets, config.modules_to_save)
    check_rank(targets, config, model)
    return targets


def _least_rank(config: CordaConfig) -> int:
    """The least number of components that a layer needs to be adapted."""
    return 1 if config.allocates else config.r


def find_targets(
    model: nn.Module,
    target_modules: str | list[str],
    r: int = 1,
    exclude_modules: str | list[str] | None = None,
    layers_to_transform: int | list[int] | None = None,
) -> dict[str, nn.Module]:
    """The layers that PEFT's options `target_modules`, `exclude_modules` and `layers_to_transform` mean, by name, in
    the model's order.

    `all-linear` leaves out the output head, the head of a classifier, what sees images (see `image_side`), layers that
    no LoRA of PEFT's can adapt, and layers with fewer than r components (see `left_out`, which names them).

    Raises:
        CordaError: an option matches nothing (the nearest names are given); a named layer is not linear, or takes no
            LoRA of PEFT's; the model carries an adapter already, is compiled, or is not in memory.
    """
    _check_model(model)
    matched = _matched_layers(model, target_modules, exclude_modules, layers_to_transform)
    reasons = _refused_by_peft(model, list(matched))
    refused = next(iter(reasons), None)
    if refused and (not _is_all_linear(target_modules) or len(reasons) == len(matched)):
        raise CordaError(f"{refused} of {type(model).__name__} cannot be adapted: {reasons[refused]}")
    targets = {name: module for name, module in matched.items() if name not in reasons}
    if not _is_all_linear(target_modules):
        return targets
    return {name: module for name, module in targets.items() if min(weight_shape(module)) >= r} or targets


def _is_all_linear(target_modules: str | list[str]) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def _check_model(model: nn.Module) -> None:
    """Raises CordaError if the model is wrapped, adapted already, compiled, not in memory, or on several devices."""
    check_bare(model)
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise CordaError("the model carries a PEFT adapter already: give the base model, or unload() it first")
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        raise CordaError(
            "the model was compiled by torch.compile, so its layers cannot be listened to: give the model as it was "
            "before, and compile the adapted one"
        )
    if offloaded := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise CordaError(
            f"{offloaded} is not in memory, as where a device_map puts a block on the disk: load the model without "
            "device_map, or use `corda init`, which reads a checkpoint block by block"
        )
    if len(devices := {str(parameter.device): None for parameter in model.parameters()}) > 1:
        raise CordaError(
            f"the model is spread over {', '.join(devices)}, as by a device_map, but its blocks are run on one device: "
            "load it without device_map (a model on the CPU may be larger than the accelerator's memory)"
        )


def check_bare(model: nn.Module) -> None:
    """Raises CordaError if the model is inside a wrapper that runs copies of it."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CordaError(
            f"the model is inside a {type(model).__name__}, which runs copies of it: give the model itself, "
            "`model.module`, and wrap the adapted one"
        )


def _matched_layers(
    model: nn.Module,
    target_modules: str | list[str],
    exclude_modules: str | list[str] | None,
    layers_to_transform: int | list[int] | None,
) -> dict[str, nn.Module]:
    """The linear layers outside of a classifier's head that the options mean by PEFT's rules."""
    config = LoraConfig(target_modules=target_modules, task_type=task_type(model))
    config = _maybe_include_all_linear_layers(config, model)
    heads = HEADS.get(config.task_type, ())  # PEFT, too, compares endings: DistilBERT's pre_classifier is one
    modules = {n: m for n, m in model.named_modules() if n and not n.partition(".")[0].endswith(heads)}
    modules = {n: m for n, m in modules.items() if n not in new_modules(model)}
    if isinstance(config.target_modules, str):  # as PEFT matches it, but with a time limit
        pattern = config.target_modules
        matched = {n: m for n, m in modules.items() if find_all("target_modules", pattern, n, whole=True)}
    else:
        matched = {n: m for n, m in modules.items() if LoraModel._check_target_module_exists(config, n)}
    if not matched:
        raise _no_match(model, "target_modules", target_modules)
    matched = _of_language(model, matched, target_modules)
    if exclude_modules:
        excluded = {n for n, m in model.named_modules() if is_linear(m) and _is_excluded(n, exclude_modules)}
        if not excluded:
            raise _no_match(model, "exclude_modules", exclude_modules)
        matched = {n: m for n, m in matched.items() if n not in excluded}
    if layers_to_transform is not None:
        matched = _in_layers(matched, layers_to_transform)
    if not matched:
        raise CordaError(f"exclude_modules {exclude_modules!r} leaves no layer of {type(model).__name__} to adapt")
    for name, module in matched.items():
        if not is_linear(module):
            raise CordaError(f"target {name} is a {type(module).__name__}; CorDA adapts linear layers only")
    return matched


def _of_language(
    model: nn.Module, matched: dict[str, nn.Module], target_modules: str | list[str]
) -> dict[str, nn.Module]:
    """The layers without those that see images, which endings of names and all-linear mean on language models alone.

    Raises CordaError if a regular expression or a whole name means one, or nothing is left."""
    sees = image_side(model)
    left = {name: module for name, module in matched.items() if not sees(name)}
    patterns = isinstance(target_modules, str) and not _is_all_linear(target_modules)
    seeing = [n for n in matched if n not in left and (patterns or not left or n in target_modules)]
    if seeing:
        raise CordaError(
            f"target {seeing[0]} is of the vision tower or the connector, which are given patches and not tokens: "
            "these are not adapted; modules_to_save trains the connector whole"
        )
    return left


def _is_excluded(name: str, exclude_modules: str | list[str]) -> bool:
    """PEFT's rule, with a time limit: a regular expression for the whole name, or endings."""
    if isinstance(exclude_modules, str):
        return bool(find_all("exclude_modules", exclude_modules, name, whole=True))
    return any(name == ending or name.endswith(f".{ending}") for ending in exclude_modules)


def _in_layers(matched: Mapping[str, nn.Module], layers_to_transform: int | list[int]) -> dict[str, nn.Module]:
    """The layers in the blocks of these numbers. Raises CordaError if there is none in one of them."""
    found: set[str] = set()
    for index in [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform:
        config = LoraConfig(target_modules=[n.rpartition(".")[2] for n in matched], layers_to_transform=index)
        names = {n for n in matched if LoraModel._check_target_module_exists(config, n)}
        if not names:
            raise CordaError(f"layers_to_transform names block {index}, which has none of the layers to adapt")
        found |= names
    return {n: m for n, m in matched.items() if n in found}


def _no_match(model: nn.Module, option: str, wanted: str | list[str]) -> CordaError:
    """The error for an option that matches no layer: it gives the nearest names."""
    names = list(dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)))
    last = [w.rpartition(".")[2] for w in ([wanted] if isinstance(wanted, str) else wanted)]
    near = [n for w in last for n in difflib.get_close_matches(w, names, n=3, cutoff=0.3)]
    hint = f" (a bare name is a pattern for whole names: write [{wanted}])" if wanted in names else ""
    return CordaError(
        f"{option} {wanted!r} matches no layer of {type(model).__name__}{hint}; "
        f"nearest names: {', '.join(dict.fromkeys(near or names)) or 'none'}"
    )


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _refused_by_peft(model: nn.Module, names: list[str]) -> dict[str, str]:
    """The layers on which a LoRA cannot be put, or would do nothing, with the reason.

    PEFT decides by a layer's own name and class. So where it refuses the whole, layers of one name are tried together.
    """
    reasons = dict.fromkeys(
        [name for name in names if _is_bypassed(model, name)], "the model reads its weight directly"
    )
    rest = [name for name in names if name not in reasons]
    if not rest or _try_peft(model, rest) is None:
        return reasons
    by_last_name: dict[str, list[str]] = {}
    for name in rest:
        by_last_name.setdefault(name.rpartition(".")[2], []).append(name)
    for group in by_last_name.values():
        if (reason := _try_peft(model, group)) is not None:
            reasons |= dict.fromkeys(group, reason)
    return reasons


def _is_bypassed(model: nn.Module, name: str) -> bool:
    """Whether the module around a layer uses the layer's weight without calling the layer, so that an adapter on it
    does nothing: Mamba's x_proj (in its kernels) and dt_proj, torch's attention."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    return isinstance(parent, nn.MultiheadAttention) or (hasattr(parent, "A_log") and last in ("x_proj", "dt_proj"))


def _try_peft(model: nn.Module, names: list[str]) -> str | None:
    """Install PEFT's configuration on a copy of the model's structure. Returns what went wrong, or None if each of the
    layers, and no other, carries a LoRA.

    Layers of one class, whose names differ in the numbers of their blocks alone, are tried by the first of them: PEFT
    would take half a second for all of a 7B model's."""
    names = list({(NUMBER.sub("", name), type(model.get_submodule(name))): name for name in reversed(names)}.values())
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(_structure_of(model), lora_config(model, names), low_cpu_mem_usage=True)
    except Exception as error:  # PEFT and its backends raise all kinds
        return f"PEFT says: {str(error).strip().split(chr(10))[0]}"
    finally:
        for parameter, value in trained.items():
            parameter.requires_grad_(value)
    if {name for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)} != set(names):
        return "PEFT takes its name for that of a mixture's fused experts"
    return None


def _structure_of(model: nn.Module) -> nn.Module:
    """A copy of the model's modules, which have the very same parameters, buffers, hooks and attributes."""
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for key, value in vars(module).items():
            if key not in ("_modules", "_parameters", "_buffers") and not isinstance(value, nn.Module):
                same[id(value)] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    return copy.deepcopy(model, same)


def lora_config(model: nn.Module, names: Iterable[str]) -> LoraConfig:
    """PEFT's configuration of a LoRA on these layers; its ranks are PEFT's default."""
    names = list(names)
    return LoraConfig(
        target_modules=names,
        task_type=task_type(model),
        modules_to_save=new_modules(model) or None,
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )


def left_out(model: nn.Module, targets: Mapping[str, nn.Module], config: CordaConfig) -> dict[str, list[str]]:
    """What `all-linear` does not reach, though it acts like a linear layer: names by the reason.

    These are parameters with the weights of several layers in one (a mixture's experts), layers that no LoRA of PEFT's
    can adapt, and layers with fewer than r components.
    """
    sees = image_side(model)
    fused = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if name not in targets and not sees(name) and not isinstance(module, nn.modules.conv._ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1
    ]
    names: dict[str, list[str]] = {"fused parameters that are not linear layers": fused}
    for name, module in _matched_layers(
        model, config.target_modules, config.exclude_modules, config.layers_to_transform
    ).items():
        if name not in targets:
            small = min(weight_shape(module)) < _least_rank(config)
            reason = (
                f"layers with fewer than r = {config.r} components"
                if small
                else "linear layers that no LoRA of PEFT's can adapt"
            )
            names.setdefault(reason, []).append(name)
    return {reason: members for reason, members in names.items() if members}


def tied_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named layers whose weight is another module's, too: the output head of a tied model."""
    owners = Counter(p for m in model.modules() for p in m._parameters.values() if p is not None)
    return [name for name in names if owners[model.get_submodule(name).weight] > 1]  # type: ignore[index]


def budget_of(targets: Mapping[str, nn.Module], config: CordaConfig, model: nn.Module) -> int:
    """Parameters Σ (d_in + d_out)·r of the adapter: those of rank r everywhere, or config.budget."""
    if config.budget is None:
        return config.r * sum(sum(weight_shape(module)) for module in targets.values())
    return int(config.budget if config.budget > 1 else config.budget * sum(p.numel() for p in model.parameters()))


def check_saved_modules(
    model: nn.Module, targets: Mapping[str, nn.Module], modules_to_save: Sequence[str] | None
) -> None:
    """Raises CordaError if `modules_to_save` names a module that does not exist or is a target."""
    for wanted in modules_to_save or ():
        modules = modules_named(model, wanted)
        exists = any(f".{name}".endswith(f".{wanted}") for name in modules)
        if not exists or not targets.keys().isdisjoint(modules):
            what = "is a target, too" if exists else f"{type(model).__name__} does not have"
            raise CordaError(f"modules_to_save names {wanted!r}, which {what}")


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


def modules_named(model: nn.Module, ending: str) -> dict[str, nn.Module]:
    """The modules whose name has this ending, as PEFT finds `modules_to_save`: `norm` is also `input_layernorm`."""
    return {name: module for name, module in model.named_modules() if name.endswith(ending)}
