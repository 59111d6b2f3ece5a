"""What is said of samples before long work: how many and how long they are, and one of them as the model reads it."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from statistics import median
from typing import Any

from rich.text import Text
from torch import nn

from ..config import CordaError, DataConfig
from ..config.values import short
from .batches import Encoded, encode
from .samples import Sample, load_others

SHOWN = 400  # characters of a prompt or a response
SHOWN_LABELS = 8
REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")


def overview(
    name: str,
    tokenizer: Any,
    samples: Sequence[Sample],
    encoded: Sequence[Encoded],
    max_length: int,
    learned: bool = True,
    end: bool = False,
) -> Text:
    """A few lines on the samples, to print before long work.

    Args:
        name: of the data.
        encoded: the samples as tokens.
        learned: whether the responses are trained or measured. If not, the samples are a context: all of their tokens
            count, and they may do without responses.
        end: as in `encode`.

    Raises:
        CordaError: `learned`, and no sample has a response, or none has a token of it within `max_length`; or `end`,
            and the tokenizer has no token for the end of a text, nor one for padding.
    """
    if samples[0].label is not None:
        return _of_labels(name, tokenizer, samples, encoded, max_length)
    answered = [e for s, e in zip(samples, encoded) if s.response.strip()]
    lost = sum(not e.targets for e in answered)
    if learned and not answered:
        raise CordaError(
            f"no sample of {name} has a response: say with the template --response which columns of a row it is"
        )
    lengths = [len(e.ids) + e.cut for e in encoded]
    if learned and lost == len(answered):
        raise CordaError(
            f"no sample of {name} has a token of its response within --max_length {max_length}: "
            f"the samples have {min(lengths):,} to {max(lengths):,} tokens; give a larger one"
        )
    if end and tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise CordaError("the tokenizer has neither an end-of-text token nor one for padding: give it an eos_token")
    lines = [
        f"{name}: {len(samples):,} samples of {median(lengths):,.0f} tokens (median), the longest {max(lengths):,}"
    ]
    if cut := sum(e.cut > 0 for e in encoded):
        lines[0] += f"; {cut:,} cut at --max_length {max_length}"
        lines[0] += f", {lost:,} with no token of the response left" if lost else ""
    if learned and (without := len(samples) - len(answered)):
        lines.append(f"  {without:,} of them have no response: left out")
    if end and tokenizer.eos_token_id is None:
        lines.append("  the tokenizer has no end-of-text token: the model will not learn where a response ends")
    if not learned and not answered:
        lines.append(
            "  prompts without responses: questions alone protect the answers several times less (docs/measured.md)"
        )
    number = next((i for i, e in enumerate(encoded) if e.targets), 0)
    lines.append(f"  sample {number + 1} as the model reads it ({len(encoded[number].ids):,} tokens):")
    return Text("\n".join([*lines, *rendered(tokenizer, encoded[number], learned)]))


def _of_labels(
    name: str, tokenizer: Any, samples: Sequence[Sample], encoded: Sequence[Encoded], max_length: int
) -> Text:
    """The lines on texts to classify."""
    lengths = [len(e.ids) + e.cut for e in encoded]
    lines = [f"{name}: {len(samples):,} texts of {median(lengths):,.0f} tokens (median), the longest {max(lengths):,}"]
    if cut := sum(e.cut > 0 for e in encoded):
        lines[0] += f"; {cut:,} cut at --max_length {max_length}"
    counts = Counter(str(s.label) for s in samples).most_common()
    shown = [f"{short(label)[1:-1]} ({count:,})" for label, count in counts[:SHOWN_LABELS]]
    more = f" and {len(counts) - SHOWN_LABELS:,} more" if len(counts) > SHOWN_LABELS else ""
    lines += [f"  labels: {', '.join(shown)}{more}", "  text 1 as the model reads it:"]
    return Text("\n".join([*lines, f"    {'text':<14} │{_shown(tokenizer, encoded[0].ids)}│"]))


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids).replace("\n", "\\n")
    text = REPEATED.sub(lambda match: f"{match[1]} × {len(match[0]) // len(match[1])}", text)  # those of an image
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def rendered(tokenizer: Any, encoded: Encoded, learned: bool = True) -> list[str]:
    """A line for each stretch of a sample with or without loss, special tokens included."""
    lines = []
    for answer, tokens in groupby(zip(encoded.ids, encoded.answer), key=lambda pair: pair[1]):
        text = _shown(tokenizer, [token for token, _ in tokens])
        label = ("response, loss" if learned else "response") if answer else "prompt"
        lines.append(f"    {label:<14} │{text}│")
    return lines


def check_fit(model: nn.Module, sequences: Iterable[Sequence[int]]) -> None:
    """Whether the model can read the token ids.

    Raises:
        CordaError: an id has no row in the model's embedding, or there are more tokens than learned positions.
    """
    largest = longest = 0
    for ids in sequences:
        largest, longest = max(largest, *ids), max(longest, len(ids))
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None
    if rows is not None and largest >= rows:
        raise CordaError(
            f"the tokenizer gives token {largest}, and the model's embedding has {rows} rows (0 to {rows - 1}): "
            "the tokenizer is that of another model"
        )
    positions = min(map(_positions, filter(_is_positions, model.named_modules())), default=longest)
    if longest > positions:
        raise CordaError(
            f"the longest sample has {longest:,} tokens, and the model has learned {positions:,} positions: "
            f"give --max_length {positions}"
        )


def unseen_samples(
    model: nn.Module, tokenizer: Any, data: DataConfig, shown: Sequence[Sample], count: int
) -> list[Sample]:
    """What `load_others` gives, without the samples that `encode` or `check_fit` refuses. Nobody asked for these, so
    what is passed over is passed over in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = load_others(data, shown, count)
    found = []
    for sample in others:
        with suppress(CordaError):
            check_fit(model, [encode(tokenizer, sample, data.max_length).ids])
            found.append(sample)
    return found


def _is_positions(named: tuple[str, nn.Module]) -> bool:
    name, module = named
    endings = ("wpe", "position_embeddings", "embed_positions")
    return isinstance(module, nn.Embedding) and name.rpartition(".")[2] in endings


def _positions(named: tuple[str, Any]) -> int:
    """How many positions a table of them holds, without the rows that some models reserve."""
    module = named[1]
    reserved = (
        module.offset if hasattr(module, "offset") else 0 if module.padding_idx is None else module.padding_idx + 1
    )
    return int(module.num_embeddings - reserved)
