"""What a training keeps, for methods whose adapter is a LoRA: terms of the loss that are known from the weights."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import ContextConfig, CordaError, DataConfig, MethodConfig
from ..config.data import named_contexts, prices_of
from ..config.init import PRICED_TASK
from ..data.batches import Encoded, cut_away, encode_all
from ..data.overview import unseen_samples
from ..data.samples import load_samples
from ..evaluation.evaluate import loss_and_drift
from ..evaluation.meter import MEASURED
from ..preprocess.own_text import own_text
from ..preprocess.statistics import NAME, Statistics, collect_statistics
from ..training.keeping import Keeper, Keepers, PredictedDrift
from .registry import Prepared, Setup, corda_config

AFTER = ("keep", "keep_generic")  # options of methods that change the training alone


class KeptAbility(NamedTuple):
    """One of several abilities that are kept.

    Attributes:
        price: the weight of its predicted drift in the loss.
        others: samples of it that the statistics have not seen, encoded.
    """

    name: str
    price: float
    statistics: Statistics
    others: list[Encoded]


class Kept(NamedTuple):
    """What is kept, and at what price.

    Attributes:
        keep, keep_generic: the weights of the drift that is predicted on the ability to keep, and on the model's own
            texts, in nats of loss for a nat per answer token.
        context, generic: the statistics of both; None where nothing needs them.
        abilities: in place of one context.
        steer: whether their prices are steered, so that the largest drift is smallest (see `Keepers`).
    """

    keep: float
    keep_generic: float
    context: Statistics | None
    generic: Statistics | None
    abilities: Sequence[KeptAbility] = ()
    steer: bool = False


def contexts_of(option: Sequence[Mapping[str, Any]], samples: int) -> Sequence[DataConfig]:
    """A method's option `contexts`: mappings of the options of a context.

    Raises CordaError as `named_contexts` does, and for an option that a context does not have."""
    try:
        contexts = [ContextConfig(**each) for each in option]
    except TypeError as error:
        raise CordaError(f"contexts must be a list of mappings of a context's options: {error}") from error
    return named_contexts([replace(each, samples=each.samples or samples) for each in contexts])


def abilities_kept(model: nn.Module, setup: Setup, keep: float, contexts: Sequence[DataConfig]) -> list[KeptAbility]:
    """The abilities of an entry's contexts, each at its price (see `prices`); none if all prices are zero. Their
    statistics are cached in the method's folder, which all prices share."""
    kept, priced = [], prices(contexts, keep)
    for context, price in zip(contexts, priced) if any(priced) else ():
        name = context.ability if isinstance(context, ContextConfig) else Path(context.data).stem
        path, samples = setup.folder / f"{name}.{NAME}", load_samples(context)
        if not path.is_file():
            encoded = encode_all(setup.tokenizer, samples, context.max_length)
            path.parent.mkdir(parents=True, exist_ok=True)
            pad_id = setup.tokenizer.pad_token_id or 0
            cut = cut_away(samples, encoded, context.max_length)
            collect_statistics(model, setup.targets, encoded, pad_id, progress=False, cut=cut).save(path)
        others = unseen_samples(model, setup.tokenizer, context, samples, MEASURED)
        measured = encode_all(setup.tokenizer, others, context.max_length)
        kept.append(KeptAbility(name, price, Statistics.load(path), measured))
    return kept


def prices(contexts: Sequence[DataConfig], keep: float) -> list[float]:
    """The price of each context of an entry: `keep` for one alone, and for several see `prices_of`."""
    named = [context for context in contexts if isinstance(context, ContextConfig)]
    return prices_of(named, keep) if named else [keep] * len(contexts)


def check_contexts(entry: MethodConfig, samples: int) -> None:
    """Warns where an entry puts a price on the task that it is to learn. Raises CordaError if its contexts, their
    prices, `keep` and `steer` do not go together; as `contexts_of` does."""
    given = entry.options.get("contexts")
    contexts = contexts_of(given, samples) if given else []
    own = [context.price for context in contexts if isinstance(context, ContextConfig)]
    if own and None not in own and (entry.swept_option == "keep" or "keep" in entry.options):
        raise CordaError("keep is the price of contexts without their own, and each has one: leave keep out")
    keeps = entry.swept_values if entry.swept_option == "keep" else [entry.options.get("keep") or 0.0]
    priced = any(any(prices(contexts, keep)) for keep in keeps)
    start = corda_config(entry.method, entry.options)
    if priced and start is not None and start.mode == "ipm":
        warnings.warn(f"{entry.method}: {PRICED_TASK}", stacklevel=2)
    steers = entry.options.get("steer") or entry.swept_option == "steer"
    if steers and (len(contexts) < 2 or not priced):
        raise CordaError("steer shares out the prices of several contexts: give two or more, and keep or prices")


def what_is_kept(
    model: nn.Module,
    setup: Setup,
    keep: float,
    samples: int | None = None,
    keep_generic: float = 0.0,
) -> Kept:
    """
    Args:
        samples: how many samples of the ability to keep are looked at. Default: the comparison's number.
    """
    context = context_statistics(model, setup, "keep", samples) if keep else None
    generic = context_statistics(model, setup, "generic") if keep_generic else None
    return Kept(keep, keep_generic, context, generic)


def context_statistics(model: nn.Module, setup: Setup, kind: str, samples: int | None = None) -> Statistics:
    """The statistics of the ability to "keep", or of "generic" text, the model's own, from the model without an
    adapter. They are cached in the method's folder, which all prices share.

    Args:
        samples: how many samples there are of the ability to keep. Default: the comparison's number.
    """
    path = setup.folder / (NAME if kind == "keep" else f"{kind}.{NAME}")
    if not path.is_file():
        if kind == "generic":
            encoded, cut = own_text(model, setup.tokenizer, progress=False), ""
        else:
            length, shown = setup.data(kind).max_length, setup.context(kind, samples)
            encoded = encode_all(setup.tokenizer, shown, length)
            cut = cut_away(shown, encoded, length)
        path.parent.mkdir(parents=True, exist_ok=True)
        pad_id = setup.tokenizer.pad_token_id or 0
        collect_statistics(model, setup.targets, encoded, pad_id, progress=False, cut=cut).save(path)
    return Statistics.load(path)


def with_penalties(prepared: Prepared, setup: Setup, kept: Kept) -> Prepared:
    """Add what is kept to the loss that a prepared model is trained with."""
    callbacks, penalties = list(prepared.callbacks), dict(prepared.penalties)
    if kept.context:
        keeper = Keeper(PredictedDrift(prepared.model, kept.context), kept.keep)
        callbacks.append(keeper)
        penalties["drift"] = keeper.penalty
    keepers = []
    for name, price, statistics, others in kept.abilities:
        measure = partial(_drift, prepared.model, setup, others) if others and kept.steer else None
        keepers.append(Keeper(PredictedDrift(prepared.model, statistics), price, measure=measure, name=name))
        penalties[f"drift {name}"] = keepers[-1].penalty
    callbacks += [Keepers(keepers, kept.steer)] if keepers else []
    if kept.generic:
        generic = PredictedDrift(prepared.model, kept.generic)
        penalties["generic"] = lambda: kept.keep_generic * generic()
    return prepared._replace(callbacks=callbacks, penalties=penalties)


def _drift(model: nn.Module, setup: Setup, encoded: Sequence[Encoded]) -> float:
    with torch.compiler.set_stance("force_eager"):  # compiled blocks are for training
        return loss_and_drift(model.eval(), setup.tokenizer, encoded)["tuned"]["drift"]
