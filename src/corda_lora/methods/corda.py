"""CorDA, CorDA+ and CorDA++ in every mode and split, and MiLoRA, which is a case of the same code."""

import shutil
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..adapters.lora import BASE_FOLDER, load_adapter, renew_heads
from ..adapters.prepare import prepare
from ..config import DataConfig, ModelConfig
from ..config.values import NonNegative
from ..models.loading import load_model
from .baselines import adamw_with_ratio
from .keeping import AFTER, abilities_kept, contexts_of, what_is_kept, with_penalties
from .registry import RATES, SLOW_RATES, Prepared, Setup, method, start_config


def corda(
    model: nn.Module,
    setup: Setup,
    ratio: float = 1.0,
    samples: int | None = None,
    context: str = "",
    contexts: list[dict[str, Any]] | None = None,
    steer: bool = False,
    keep: NonNegative = 0.0,
    keep_generic: NonNegative = 0.0,
    **options: Any,
) -> Prepared:
    """The adapter's start is cached as an adapter directory.

    Args:
        ratio: the learning rate of B divided by that of A, as in LoRA+.
        samples: how many samples of the context are analysed. Default: the comparison's number.
        context: DATA that is analysed (in kpm also kept) instead of the comparison's.
        contexts: several abilities in place of it: mappings of a context's options (see `ContextConfig`), such as
            {data: facts.jsonl, weight: 2}. Each has `samples` samples, and in the loss a price: its own, or its share
            of `keep`.
        steer: steer their prices, at the same sum, so that the largest drift is smallest.
        keep: weight λ of the predicted drift in the loss (see `training.keeping`). Contexts with a price of their own
            do without. Of one context in kpm it also decides which orientation is the default, as in `CordaConfig`.
        keep_generic: the same on texts that the model itself draws.
        options: any options of `CordaConfig`.
    """
    folder = setup.folder / "start"
    if not folder.exists():
        common: dict[str, Any] = {"r": setup.r, "lora_alpha": setup.lora_alpha, "target_modules": list(setup.targets)}
        common["modules_to_save"] = list(setup.modules_to_save) or None
        config = start_config(len(contexts or ()), keep, **(common | options))
        data: Any = None
        if contexts:
            data = contexts_of(contexts, samples or setup.samples)
        elif config.orientation != "identity":
            shown = DataConfig(context) if context else setup.data("keep" if config.mode == "kpm" else "learn")
            data = replace(shown, samples=samples or setup.samples)
        shutil.rmtree(setup.folder / "start.work", ignore_errors=True)  # left by a run that was broken off
        prepare(model, config, data, folder, setup.tokenizer)
    if (folder / BASE_FOLDER).is_dir():
        model = load_model(ModelConfig(str(folder / BASE_FOLDER))).to(next(model.parameters()).device)
        setup = replace(setup, targets={name: model.get_submodule(name) for name in setup.targets})
    if context and options.get("mode") == "kpm":
        setup = replace(setup, keep=DataConfig(context))
    kept = what_is_kept(model, setup, 0.0 if contexts else keep, samples, keep_generic)
    if contexts:
        abilities = abilities_kept(model, setup, keep, contexts_of(contexts, samples or setup.samples))
        kept = kept._replace(abilities=abilities, steer=steer)
    peft_model = load_adapter(model, folder, trainable=True, lora_dropout=setup.train.lora_dropout)
    renew_heads(peft_model)
    prepared = Prepared(peft_model, None if ratio == 1 else adamw_with_ratio(peft_model, setup, ratio))
    return with_penalties(prepared, setup, kept)


method("milora", "MiLoRA", "Wang et al., arXiv 2406.09044; ours", prepares_from="weights")(
    partial(corda, orientation="identity", mode="kpm", split="paper")
)
LEARNING_RATES = {
    "paper": SLOW_RATES,
    "balanced": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "anchored": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    "seeded": RATES,
}
for _preset, _title in (("corda", "CorDA"), ("corda+", "CorDA+"), ("corda++", "CorDA++")):
    for _mode, _data in (("kpm", "keep"), ("ipm", "learn")):
        for _split, _rates in LEARNING_RATES.items():
            method(
                f"{_preset}-{_mode}-{_split}",
                f"{_title} {_mode}, {_split}",
                "Yang et al., arXiv 2406.05223, 2506.13187; ours",
                _rates,
                _data,
                after=("ratio", *AFTER),
            )(partial(corda, preset=_preset, mode=_mode, split=_split))
