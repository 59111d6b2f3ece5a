"""Samples → tokens → batches of what a model's forward takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import CordaError
from .chats import render_chat, render_question
from .images import Shown, Span, expanded, image_inputs, image_tokens, processor_of, words_of
from .samples import Sample, as_samples
from .templates import short


class Encoded(NamedTuple):
    """A sample as tokens.

    Args:
        ids: token ids, (s,).
        answer: for each token, whether it belongs to a response, (s,): losses and drift are measured there.
        cut: how many tokens were cut off after these by `max_length`.
        label: of a text to classify; None of other samples.
        types: for each token, which of two texts it belongs to, (s,), where the model tells them apart.
        shown: the sample's images; None if it has none.
    """

    ids: list[int]
    answer: list[bool]
    cut: int = 0
    label: str | None = None
    types: list[int] | None = None
    shown: Shown | None = None

    @property
    def start(self) -> int:
        """Number of tokens before the first of a response."""
        return self.answer.index(True) if any(self.answer) else len(self.ids)

    @property
    def targets(self) -> int:
        """Number of response tokens that have a token before them to be predicted from; 1 of a text with a label."""
        return sum(self.answer[1:]) if self.label is None else 1


class CutImageError(CordaError):
    """`max_length` would cut the tokens of an image. `needed` is the least that does not."""

    def __init__(self, max_length: int, needed: int):
        super().__init__(
            f"max_length {max_length} cuts the tokens of images, without which the model cannot read the others: the "
            f"samples need {needed:,} (--max_length)"
        )
        self.needed = needed


def encode_all(tokenizer: Any, samples: Iterable[Sample], max_length: int, end: bool = False) -> list[Encoded]:
    """`encode` of each sample. If images would be cut, the error names the length that all of them need."""
    encoded, needed = [], 0
    for sample in samples:
        try:
            encoded.append(encode(tokenizer, sample, max_length, end))
        except CutImageError as error:
            needed = max(needed, error.needed)
    if needed:
        raise CutImageError(max_length, needed)
    return encoded


def cut_away(samples: Iterable[Sample], encoded: Iterable[Encoded], max_length: int) -> str:
    """The end of a sentence that says how few answers there are: of how many `max_length` left nothing; "" of none."""
    lost = sum(bool(s.response.strip() and e.cut and not e.targets) for s, e in zip(samples, encoded))
    return f"; {lost:,} responses are cut away at --max_length {max_length}" if lost else ""


def encode(tokenizer: Any, sample: Sample, max_length: int, end: bool = False) -> Encoded:
    """Tokens of the prompt and the response, or of a chat, cut at `max_length`.

    A text to classify is as the tokenizer writes one, or two, with the tokens that it puts around them.

    Prompt and response are tokenized apart, so that the first token of the response is known. The tokenizer's
    begin-of-text token stands once, its end-of-text token only where the text has it; `end` adds it to a response that
    does not end in it.

    Raises:
        CordaError: the sample is a chat, and the tokenizer cannot write it: see `render_chat`; or its images cannot be
            written: see `expanded`; or they have a place, and there is none.
        CutImageError: tokens of an image are beyond `max_length`.
    """
    if sample.label is not None:
        return _encode_labelled(tokenizer, sample, max_length)
    shown = None
    if sample.messages:
        ids, answer, is_open, shown = _encode_chat(tokenizer, sample)
    else:
        prompt, response = _begin(tokenizer, sample.prompt), _ids(tokenizer, sample.response)
        if not sample.prompt and prompt and response[:1] == prompt:
            prompt = []  # the text brings its own
        ids, answer = [*prompt, *response], [False] * len(prompt) + [True] * len(response)
        is_open = bool(response)
    eos = tokenizer.eos_token_id
    if end and is_open and eos is not None and ids[-1] != eos:
        ids, answer = [*ids, eos], [*answer, True]
    _check_images(tokenizer, ids, shown, max_length, sample)
    return Encoded(ids[:max_length], answer[:max_length], max(0, len(ids) - max_length), shown=shown)


def _check_images(tokenizer: Any, ids: Sequence[int], shown: Shown | None, max_length: int, sample: Sample) -> None:
    if (processor := processor_of(tokenizer)) is None:
        return
    tokens = {*image_tokens(processor)}
    last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in tokens), -1)
    if shown is None and last >= 0:
        said = sample.prompt or sample.response or words_of(sample.messages[0])
        raise CordaError(
            f"a sample has the model's token of an image in its text, and there is no image: {short(said)}"
        )
    if last >= max_length:
        raise CutImageError(max_length, last + 1)


def _encode_labelled(tokenizer: Any, sample: Sample, max_length: int) -> Encoded:
    texts = (sample.prompt, sample.pair) if sample.pair else (sample.prompt,)
    whole = tokenizer(*texts)
    cut = max(0, len(whole.input_ids) - max_length)
    if cut:
        around = tokenizer.num_special_tokens_to_add(pair=bool(sample.pair))
        if max_length <= around:
            raise CordaError(f"max_length {max_length} leaves no room for a text between {around} special tokens")
        whole = tokenizer(*texts, truncation=True, max_length=max_length)
    ids, types = list(whole.input_ids), whole.get("token_type_ids")
    return Encoded(ids, [False] * len(ids), cut, sample.label, None if types is None else list(types))


def encode_question(tokenizer: Any, sample: Sample) -> Encoded:
    """Tokens of all that the model sees when it is to give the sample's (last) response."""
    if not sample.messages:
        ids, shown = _begin(tokenizer, sample.prompt), None
    else:
        text = render_question(tokenizer, sample.question(), sample.row.get("tools") or None)
        text, _, shown = _with_images(tokenizer, text, [], sample)
        ids = _ids(tokenizer, text)
    return Encoded(ids, [False] * len(ids), shown=shown)


def _with_images(tokenizer: Any, text: str, spans: list[Span], sample: Sample) -> tuple[str, list[Span], Shown | None]:
    """A rendered chat as a model reads it that reads images, too: with all tokens of the sample's, and beginning as its
    processor would have it begin."""
    shown = None
    if sample.images:
        text, spans, shown = expanded(tokenizer, text, spans, sample.images)
    begin = tokenizer.bos_token if processor_of(tokenizer) is not None else None
    if begin and not text.startswith(begin) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        # LLaVA-1.5's template leaves the begin-of-text token to its tokenizer.
        text, spans = begin + text, [(a + len(begin), b + len(begin)) for a, b in spans]
    return text, spans, shown


def text_of(tokenizer: Any, sample: Sample) -> str:
    """The whole text of a sample, without tokens that the tokenizer puts around it."""
    if sample.messages:
        return render_chat(tokenizer, sample.messages, len(sample.messages), sample.row.get("tools") or None)[0]
    return sample.prompt + sample.response


def _encode_chat(tokenizer: Any, sample: Sample) -> tuple[list[int], list[bool], bool, Shown | None]:
    """Token ids; for each whether the loss is there; whether the chat ends in an assistant's words, with no mark of
    the template's own that ends its turn, such as <|im_end|>; and its images."""
    text, spans = render_chat(tokenizer, sample.messages, sample.first, sample.row.get("tools") or None)
    text, spans, shown = _with_images(tokenizer, text, spans, sample)
    is_open = bool(spans) and text[spans[-1][0] :].rstrip().endswith(sample.response.strip())
    if tokenizer.is_fast:
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token belongs to a turn when its last character does.
        answer = [any(a < end <= b for a, b in spans) for _, end in tokens.offset_mapping]
        return list(tokens.input_ids), answer, is_open, shown
    # A slow tokenizer does not say which characters a token stands for: the turns are tokenized apart.
    cuts = [0, *(position for span in spans for position in span), len(text)]
    pieces = [_ids(tokenizer, text[a:b]) for a, b in pairwise(cuts)]
    answer = [bool(n % 2) for n, piece in enumerate(pieces) for _ in piece]
    return [i for piece in pieces for i in piece], answer, is_open, shown


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without those that the tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _begin(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that others follow: with what the tokenizer puts before it, once, and not what it puts after."""
    whole, bos = list(tokenizer(text).input_ids), tokenizer.bos_token_id
    if not text:
        return whole[:1] if bos is not None and whole[:1] == [bos] else []
    plain = _ids(tokenizer, text)
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return plain if plain[:1] == [bos] else [*whole[:before], *plain]


def _after(tokenizer: Any) -> list[int]:
    """What the tokenizer of an encoder-decoder puts after a text: </s> in T5's."""
    around, eos = list(tokenizer("").input_ids), tokenizer.eos_token_id
    return [eos] if eos is not None and around[-1:] == [eos] else []


def pad(sequences: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their attention mask, both (b, longest) int64."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids, mask


def padded_batch(rows: Sequence[Encoded], pad_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """What a model's forward takes of some samples, ids and mask (b, s) with their images; and which tokens are of
    responses, (b, s) bool."""
    ids, mask = pad([e.ids for e in rows], pad_id)
    answers, _ = pad([e.answer for e in rows], False)
    inputs = {"input_ids": ids, "attention_mask": mask, **image_inputs([e.shown for e in rows], ids)}
    return inputs, answers.bool()


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

    A decoder-only model or an encoder gets prompt and response as one text, with labels at the tokens of responses; an
    encoder-decoder (`has_decoder`) gets the prompt, and the response as labels. Of texts to classify, the labels are
    left out.

    Raises:
        CordaError: no token in any sample.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    filled = [(i, s) for i, s in enumerate(samples) if s.messages or (s.prompt + s.response).strip()]
    encoded = list(zip((i for i, _ in filled), encode_all(tokenizer, (s for _, s in filled), max_length)))
    if has_decoder:
        after = _after(tokenizer)
        inputs = [(i, [*e.ids[: e.start], *after], e.ids[e.start :]) for i, e in encoded if 0 < e.start < len(e.ids)]
        if not inputs:
            raise CordaError("an encoder-decoder model needs samples with a prompt and a response; none has both")
    else:
        if encoded and encoded[0][1].label is not None:
            return _labelled_batches(encoded, batch_tokens, pad_id)
        inputs = [(i, e.ids, [t if a else -100 for t, a in zip(e.ids, e.answer)]) for i, e in encoded if e.ids]
        if not inputs:
            raise CordaError("the context is empty: no sample has a token")
    shown = {i: e.shown for i, e in encoded}
    batches, numbers = [], []
    for indices in batch_by_length([len(ids) for _, ids, _ in inputs], batch_tokens):
        ids, mask = pad([inputs[i][1] for i in indices], pad_id)
        labels, _ = pad([inputs[i][2] for i in indices], -100)
        images = image_inputs([shown[inputs[i][0]] for i in indices], ids)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels, **images})
        numbers += [inputs[i][0] for i in indices]
    return batches, numbers


def _labelled_batches(
    encoded: Sequence[tuple[int, Encoded]], batch_tokens: int, pad_id: int
) -> tuple[list[dict[str, Tensor]], list[int]]:
    groups = batch_by_length([len(e.ids) for _, e in encoded], batch_tokens)
    batches = [label_batch([encoded[i][1] for i in group], pad_id) for group in groups]
    return batches, [encoded[i][0] for group in groups for i in group]


def label_batch(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """What a classifier's forward takes of some texts, each (b, s)."""
    ids, mask = pad([e.ids for e in encoded], pad_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if all(e.types is not None for e in encoded):
        batch["token_type_ids"], _ = pad([e.types or [] for e in encoded], 0)
    return batch


def as_batches(
    items: Iterable[Any],
    tokenizer: Callable[[], Any],
    rounds: int = 1,
    max_length: int = 512,
    batch_tokens: int = 4096,
    has_decoder: bool = False,
) -> tuple[Iterable[Any], list[int]]:
    """A context from Python as batches, and the round of each: samples that follow one another make a round.

    Args:
        items: batches of tensors, which are given back as they are, with no rounds; or texts, chats, rows of a
            `datasets.Dataset` (see `as_samples`), or rows with the lists of token ids `input_ids`, without those that
            their `attention_mask` hides, and with `labels` or without.
        tokenizer: returns the tokenizer; called only where there is text.

    Raises:
        CordaError: an item is none of these; or as `context_batches` does.
    """
    iterator = iter(items)
    first = next(iterator, None)
    whole = chain([] if first is None else [first], iterator) if iterator is items else items
    ids = first.get("input_ids") if isinstance(first, Mapping) else None
    if first is None or (isinstance(ids, Tensor) and ids.ndim > 1) or (ids is None and _has_tensors(first)):
        return whole, []
    batches: list[dict[str, Tensor]] = []
    round_of: list[int] = []
    tokenized = ids is not None
    samples: list[Any] = [_tokens_of(row, i) for i, row in enumerate(whole)] if tokenized else as_samples(whole)
    for i, part in enumerate(_split(samples, rounds)):
        if tokenized:
            more = []
            for group in batch_by_length([min(len(ids), max_length) for ids, _ in part], batch_tokens):
                padded, mask = pad([part[j][0][:max_length] for j in group], 0)
                more.append({"input_ids": padded, "attention_mask": mask})
                if all(labels for _, labels in part):
                    more[-1]["labels"], _ = pad([part[j][1][:max_length] for j in group], -100)
        else:
            more, _ = context_batches(tokenizer(), part, max_length, batch_tokens, has_decoder)
        batches += more
        round_of += [i] * len(more)
    return batches, round_of


def _tokens_of(row: Any, i: int) -> tuple[list[int], list[int]]:
    """The token ids of row `i` that its attention mask, if it has one, does not hide, and their labels, if it has any.
    Raises CordaError if there are no token ids."""
    try:
        ids = torch.as_tensor(row["input_ids"])
        mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids)))
        labels = torch.as_tensor(row.get("labels", ids))
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or labels.shape != ids.shape:
            raise ValueError
        return ids[mask.bool()].tolist(), labels[mask.bool()].tolist() if "labels" in row else []
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CordaError(
            f"item {i} of the context needs input_ids, a list of token ids, and an attention_mask and labels as long, "
            "or none"
        ) from error


def _has_tensors(item: Any) -> bool:
    return isinstance(item, Mapping) and any(isinstance(value, Tensor) for value in item.values())


def _split(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Consecutive parts of like size. Raises CordaError if there are fewer items than parts."""
    if len(items) < parts:
        raise CordaError(f"rounds is {parts}, but the context has only {len(items)} samples to make them of")
    return [items[i * len(items) // parts : (i + 1) * len(items) // parts] for i in range(parts)]
