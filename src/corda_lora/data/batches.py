"""Samples → tokens → batches of what a model's forward takes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import CordaError
from .samples import Sample


class Encoded(NamedTuple):
    """A sample as tokens.

    Args:
        ids: token ids, (s,).
        answer: for each token, whether it belongs to a response, (s,): losses and drift are measured there.
        cut: how many tokens were cut off after these by `max_length`.
    """

    ids: list[int]
    answer: list[bool]
    cut: int = 0

    @property
    def start(self) -> int:
        """Number of tokens before the first of a response."""
        return self.answer.index(True) if any(self.answer) else len(self.ids)

    @property
    def targets(self) -> int:
        """Number of response tokens that have a token before them to be predicted from."""
        return sum(self.answer[1:])


def encode(tokenizer: Any, sample: Sample, max_length: int, end: bool = False) -> Encoded:
    """Tokens of the prompt and the response, cut at `max_length`.

    The two are tokenized apart, so that the first token of the response is known. `end` adds the end-of-text token to
    a response.
    """
    prompt = tokenizer(sample.prompt).input_ids if sample.prompt else _prefix(tokenizer)
    if tokenizer.sep_token_id is not None and prompt[-1:] == [tokenizer.sep_token_id]:
        prompt = prompt[:-1]  # an encoder's tokenizer closes what it is given
    response = tokenizer(sample.response, add_special_tokens=False).input_ids if sample.response else []
    if end and response and tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    ids, answer = [*prompt, *response], [False] * len(prompt) + [True] * len(response)
    return Encoded(ids[:max_length], answer[:max_length], max(0, len(ids) - max_length))


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text (a begin-of-text token, or nothing)."""
    ids = list(tokenizer("").input_ids)
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def pad(sequences: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their attention mask, both (b, longest) int64."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids, mask


def batch_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that a padded batch has at most `batch_tokens` tokens; alike lengths go together. A batch of
    an eighth of that is large enough to work at full speed, and takes none that would make the others pad much."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = batches[-1] if batches else []
        full = (len(batch) + 1) * lengths[i] > batch_tokens
        pads = batch and lengths[i] > 1.1 * lengths[batch[0]] and 8 * len(batch) * lengths[i] > batch_tokens
        if full or pads or not batches:
            batches.append([])
        batches[-1].append(i)
    return batches


def context_batches(
    tokenizer: Any, samples: Iterable[Sample], max_length: int, batch_tokens: int = 4096, has_decoder: bool = False
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Batches of what the model's forward takes, of samples of like length, and the samples' numbers in that order.

    A decoder-only model or an encoder gets prompt and response as one text; an encoder-decoder (`has_decoder`) gets
    the prompt, and the response as labels.

    Raises:
        CordaError: no token in any sample.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    encoded = list(enumerate(encode(tokenizer, s, max_length) for s in samples))
    if has_decoder:
        inputs = [(i, e.ids[: e.start], e.ids[e.start :]) for i, e in encoded if 0 < e.start < len(e.ids)]
        if not inputs:
            raise CordaError("an encoder-decoder model needs samples with a prompt and a response; none has both")
    else:
        inputs = [(i, e.ids, []) for i, e in encoded if e.ids]
        if not inputs:
            raise CordaError("the context is empty: no sample has a token")
    batches, numbers = [], []
    for indices in batch_by_length([len(ids) for _, ids, _ in inputs], batch_tokens):
        ids, mask = pad([inputs[i][1] for i in indices], pad_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if has_decoder:
            labels, label_mask = pad([inputs[i][2] for i in indices], pad_id)
            batch["labels"] = labels.masked_fill(label_mask == 0, -100)
        batches.append(batch)
        numbers += [inputs[i][0] for i in indices]
    return batches, numbers
