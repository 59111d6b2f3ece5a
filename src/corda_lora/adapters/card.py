"""The model card (README.md) of what is written: made of what is recorded, and of nothing else.

PEFT's `save_pretrained` finds the card and adds its own metadata (library, base model, tags, its version), there and at
every later save.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..models.targets import known_labels
from ..version import __version__

CARD = "README.md"
TRAINING = "training.json"
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
PAPERS = "[CorDA](https://arxiv.org/abs/2406.05223), [CorDA++](https://arxiv.org/abs/2506.13187)"

Records = Mapping[str, Mapping[str, Any]]


def write_card(peft_model: PeftModel, folder: Path, records: Records, note: str = "", merged: bool = False) -> None:
    """Write the card of an adapter, or of the model that it is `merged` into.

    Args:
        records: by file name, what corda.json (how the start was made) and training.json hold, as far as they exist.
        note: a sentence on this form of the adapter.
    """
    start, training = records.get("corda.json", {}), records.get(TRAINING, {})
    name = base_name(peft_model)
    ours = "config" in start or bool(_marks(peft_model))
    kind = "CorDA adapter" if ours else "LoRA adapter"
    title = f"{shown(name)} with a {kind} merged in" if merged else f"{kind} for {shown(name)}"
    state = "trained" if training else "a start, to be trained" if "timing.json" in records else ""
    made = f"Made with corda-lora {__version__}" + (f" ({PAPERS})" if ours else "")
    made += f": {state}." if state else "."
    parts = [f"# {title}", made]
    parts += [note] if note else []
    parts.append(_table("", dict(_what_it_is(peft_model, start, training))))
    if measured := dict(_measured(start, training)):
        parts.append(_table("## Measured", measured))
    parts.append(_how_to_load(peft_model, name, merged))
    parts.append(f"### Framework versions\n\n- PEFT {version('peft')}")  # as PEFT writes it, where it is missing
    head = "library_name: transformers\n" if merged else "library_name: peft\n"
    ModelCard(f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n").save(folder / CARD)
    if merged:
        finish_card(folder, name)


def finish_card(folder: Path, name: str) -> None:
    """The metadata that PEFT does not add, or adds of a path: the hub refuses a base model that is none of its own."""
    card = ModelCard.load(folder / CARD)
    tags = {tag for tag in card.data.tags or [] if not tag.startswith("base_model:")} | {"corda"}
    if is_hub_name(name):
        card.data.base_model = name
        tags |= {tag for tag in card.data.tags or [] if tag.startswith("base_model:")}
    else:
        card.data.pop("base_model", None)
    card.data.tags = sorted(tags)
    card.save(folder / CARD)


def _marks(peft_model: PeftModel) -> Mapping[str, Any]:
    """What makes an adapter CorDA's in PEFT's configuration; empty for another's."""
    return (peft_model.peft_config["default"].auto_mapping or {}).get("corda") or {}


def base_name(peft_model: PeftModel) -> str:
    """The name or path that the base model was loaded from; "" if it has none."""
    config = peft_model.peft_config["default"]
    return str(config.base_model_name_or_path or getattr(peft_model.get_base_model(), "name_or_path", "") or "")


def is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def shown(name: str) -> str:
    """A name on the hub as it is; of a path the last part. What would end the code span or the table's cell is left
    out."""
    text = name if is_hub_name(name) else Path(name).name or "a model without a name"
    return f"`{re.sub(r'[`|<>]|[^ -~À-￿]', '', text) or 'a name of signs'}`"


def _table(heading: str, rows: Mapping[str, str]) -> str:
    lines = [heading, ""] if heading else []
    return "\n".join([*lines, "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _what_it_is(
    peft_model: PeftModel, start: Mapping[str, Any], training: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    yield "base model", shown(base_name(peft_model))
    if config := start.get("config") or _marks(peft_model):  # a start that Python made and PEFT saved has no corda.json
        chosen = [f"{key} {config[key]}" for key in ("mode", "split", "orientation") if key in config]
        yield "method", ", ".join([config["preset"], *chosen] if "preset" in config else chosen)
    if (data := start.get("data")) and (context := start.get("context")):
        what = "kept" if start["config"]["mode"] == "kpm" else "learned"
        yield f"context (what is to be {what})", f"{shown(data['data'])}, {_counted(context)}"
    elif abilities := (context := start.get("context") or {}).get("abilities"):
        shares = ", ".join(f"{shown(each['name'])} ({each['weight']:.0%}, {_counted(each)})" for each in abilities)
        yield f"contexts (what is to be {'kept' if start['config']['mode'] == 'kpm' else 'learned'})", shares
    elif context:
        yield "context", _counted(context)
    layers = {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    kinds = Counter(name.rpartition(".")[2] for name in layers)
    ranks, scales = ({getattr(m, key)["default"] for m in layers.values()} for key in ("r", "scaling"))
    if layers:
        yield "adapted", f"{len(layers)} layers ({', '.join(sorted(kinds))})"
        yield "rank of the adapter", f"{min(ranks)} to {max(ranks)}, by layer" if len(ranks) > 1 else f"{min(ranks)}"
        yield "scale", f"{min(scales):.4g}" if len(scales) == 1 else f"{min(scales):.4g} to {max(scales):.4g}"
    if whole := peft_model.peft_config["default"].modules_to_save:
        yield "trained whole", ", ".join(whole)
    if recipe := training.get("recipe"):
        yield "trained on", f"{shown(recipe['data']['data'])}, {training['samples']:,} samples"
        rate = training.get("learning_rate") or recipe["train"].get("learning_rate")
        at = f", learning rate {rate:g}" if rate else ""
        yield "training", f"{training['steps']:,} steps of {recipe['train']['batch_size']} samples{at}"


def _counted(context: Mapping[str, Any]) -> str:
    return f"{context['samples']:,} samples, {context['tokens']:,} tokens"


def _measured(start: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    layers = [layer for layer in start.get("layers", {}).values() if layer.get("leak") and layer.get("output_energy")]
    if layers and not start["config"].get("fold"):  # which leaves no components in the adapter
        leak = sum(layer["leak"] / layer["output_energy"] for layer in layers) / len(layers)
        yield "leak of the start: tr(A C Aᵀ) / tr(W C Wᵀ), mean of the layers", f"{leak:.2e}"
        if "energy_share" in start["totals"]:
            yield "share of the context's output energy in its components", f"{start['totals']['energy_share']:.2e}"
    if errors := [layer["context_error"] for layer in start.get("layers", {}).values() if "context_error" in layer]:
        error = sum(errors) / len(errors)
        yield "what quantization lost and the start does not hold, relative, in the context's metric", f"{error:.2e}"
    unit = "" if training.get("recipe", {}).get("data", {}).get("label") else " (nats per token)"
    if "train_loss" in training:
        yield f"training loss, mean of all steps{unit}", f"{training['train_loss']:.4f}"
    for step, loss in training.get("held_out_loss", ()):
        if step == training.get("kept_step"):
            yield f"held-out loss at step {step}{unit}", f"{loss:.4f}"


def _how_to_load(peft_model: PeftModel, name: str, merged: bool) -> str:
    task = peft_model.peft_config["default"].task_type  # of an enumeration, or its name where it was loaded
    kind = CLASSES.get(str(getattr(task, "value", task)), "AutoModel")
    here = "NAME"  # the card is written before anybody knows where it will be
    if merged:
        lines = [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("{here}")']
        return (
            "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n\nNAME is this repository, or a folder with its files."
        )
    base = name if is_hub_name(name) else "BASE"
    labels = known_labels(peft_model)
    names = f", id2label={dict(enumerate(labels))}" if labels else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("{base}"{names})',
        f'model = PeftModel.from_pretrained(model, "{here}")',
    ]
    where = "NAME is this repository, or a folder with its files" + (
        "." if base == name else "; BASE is the base model."
    )
    return (
        "## Use\n\n```python\n" + "\n".join(lines) + f"\n```\n\n{where} To train it on, load it with "
        '`corda_lora.load_adapter(model, "NAME", trainable=True)`, and give the result to a trainer, such as '
        "[TRL's](https://huggingface.co/docs/trl/peft_integration)."
    )
