"""Which samples: of a context, of a task, of what is measured."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from .values import CordaError, Count, Seed, Weight, check_fields, check_value, split

CONTEXT_SAMPLES = 1000  # the default number of samples of a context
OTHERS_LEAK = 1.1  # times as much as the samples of a context, others may leak before more samples are asked for


@dataclass
class DataConfig:
    """Which samples, and what of a row is used.

    Args:
        data: name of a data set on the Hugging Face hub, a folder that `datasets` saved, or a file: .json, .jsonl,
            .csv, .tsv, .parquet, .txt. Rows are chats if there is a column `messages` or `conversations`. The columns
            `image` and `images` have images: paths relative to the file, URLs or bytes.
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
        max_length: the number of tokens at which a sample is cut. The tokens of an image are never cut.
        bad_images: `refuse` rows with an image that cannot be read, or `skip` them, and say which.
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
    bad_images: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        check_fields(self)
        self.columns = split(self.columns) or None
        if self.pair and not self.label:
            raise CordaError("pair is the second of two texts to classify: name the column of their label, too")
        if self.label and (self.response or self.chat):
            raise CordaError(f"a text to classify has a label and no {'response' if self.response else 'chat'}")


@dataclass
class NamedConfig(DataConfig):
    """The samples of an ability.

    Args:
        ability: what it is called. Default: the name of the data.
    """

    ability: str = ""


@dataclass
class ContextConfig(NamedConfig):
    """The samples of an ability, beside those of others.

    Args:
        weight: how much it counts beside the others. Only the shares of the sum matter.
        price: its price in training: nats of loss for a nat of drift. Default: its share of the whole price, so that
            with equal weights each has the price that it would have alone.
    """

    weight: Weight = 1.0
    price: Weight | None = None


def named_contexts(given: Sequence[str | DataConfig]) -> Sequence[DataConfig]:
    """The contexts of several abilities, each with a name. One alone has neither a name nor a weight.

    Raises CordaError if two have one name or the same samples, the weights sum to zero, or one alone has a price.
    """
    if not given:
        raise CordaError("context is an empty list: give samples of an ability")
    contexts = [each if isinstance(each, ContextConfig) else _with_weight(each) for each in given]
    check_different("context", contexts)
    if len(contexts) == 1:
        if contexts[0].price is not None:
            raise CordaError("price is of one context among several: give the whole price, keep")
        weights_of({contexts[0].data: contexts[0].weight})
        return [DataConfig(**{f.name: getattr(contexts[0], f.name) for f in fields(DataConfig)})]
    named = [replace(c, ability=c.ability or Path(c.data).stem or c.data) for c in contexts]
    check_names([c.ability for c in named])
    weights_of({c.ability: c.weight for c in named})
    return named


def check_different(option: str, datas: Sequence[DataConfig]) -> None:
    """Raises CordaError if two data of an option are the same samples, whatever they are called."""
    samples = [[os.path.normpath(d.data), *(getattr(d, f.name) for f in fields(DataConfig)[1:])] for d in datas]
    if twice := [data.data for data, one in zip(datas, samples) if samples.count(one) > 1]:
        raise CordaError(f"{option} names the same samples of {twice[0]} twice: leave one of them out")


def check_names(names: Sequence[str]) -> None:
    """Raises CordaError if two abilities have one name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise CordaError(f"two contexts are called {twice[0]}: give each an ability of its own")


def weights_of(weights: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of abilities by name.

    Raises CordaError if there is none, one is negative or not finite, or they sum to zero."""
    for name, weight in weights.items():
        check_value(f"the weight of {name}", weight, Weight)
    if not sum(weights.values()):
        raise CordaError(f"the weights of {', '.join(weights) or 'no context'} sum to zero: give at least one a weight")
    return weights


def prices_of(contexts: Sequence[ContextConfig], keep: float) -> list[float]:
    """The price of each of several contexts: its own, or `keep` times its weight over the mean weight."""
    total = sum(context.weight for context in contexts)
    return [keep * len(contexts) * c.weight / total if c.price is None else c.price for c in contexts]


def _with_weight(given: str | DataConfig) -> ContextConfig:
    return ContextConfig(given) if isinstance(given, str) else ContextConfig(**asdict(given))
