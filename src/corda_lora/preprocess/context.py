"""The context: the samples that stand for an ability, as batches of tokens, and the checks before they are run."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import CordaError
from ..data.batches import context_batches
from ..data.samples import Sample
from ..models.weights import weight_shape

Batch = Mapping[str, Any]


class Ability(NamedTuple):
    """One of several abilities that a context shows together, and its share of the weight."""

    name: str
    weight: float


@dataclass(frozen=True)
class Context:
    """Batches of samples, and what is known of them.

    Attributes:
        batches: keyword arguments of the model's forward. Padding is excluded through `attention_mask`.
        rounds: the round of each batch, counted from 0. Empty: the rounds are not told apart.
        numbers: what messages call each sample, in the batches' order. Empty: they are counted from 0.
        skip_tokens: how many real tokens at the beginning of each sample are left out of the covariances.
        tokens: "text" or "image", to leave the tokens of the other out of them.
        begin: the number of the first batch, where these are a part of a context's.
        abilities: where batches are of several abilities; `rounds` then has the number of each batch's ability.
    """

    batches: Sequence[Batch] = ()
    rounds: Sequence[int] = ()
    numbers: Sequence[Any] = ()
    skip_tokens: int = 0
    tokens: str = "all"
    begin: int = 0
    abilities: Sequence[Ability] = ()

    def of_ability(self, number: int) -> "Context":
        """The batches of one ability alone."""
        batches = [batch for batch, of in zip(self.batches, self.rounds) if of == number]
        return replace(self, batches=batches, rounds=(), numbers=(), abilities=())


def together(contexts: Sequence[Context], abilities: Sequence[Ability]) -> Context:
    """The contexts of several abilities, each of one round, as one."""
    batches = [batch for context in contexts for batch in context.batches]
    of = [k for k, context in enumerate(contexts) for _ in context.batches]
    numbers = [f"{n} of {ability.name}" for ability, context in zip(abilities, contexts) for n in context.numbers]
    return replace(contexts[0], batches=batches, rounds=of, numbers=numbers, abilities=abilities)


def read_context(
    tokenizer: Any, rounds: Sequence[Iterable[Sample]], max_length: int, batch_tokens: int, has_decoder: bool = False
) -> Context:
    """The context of samples that were drawn in one or several rounds (see `load_rounds` and `context_batches`).

    Raises CordaError if a round has no token.
    """
    batches: list[Batch] = []
    round_of: list[int] = []
    numbers: list[Any] = []
    for i, samples in enumerate(rounds):
        more, order = context_batches(tokenizer, samples, max_length, batch_tokens, has_decoder)
        batches += more
        round_of += [i] * len(more)
        numbers += order if len(rounds) == 1 else [f"{number} of round {i}" for number in order]
    return Context(batches, round_of, numbers)


def consecutive_rounds(batches: int, rounds: int) -> list[int]:
    """The round of each batch, where batches that follow one another make a round.

    Raises CordaError if there are fewer batches than rounds.
    """
    if 0 < batches < rounds:
        raise CordaError(f"rounds is {rounds}, but the context has only {batches} batches to make them of")
    return [i * rounds // batches for i in range(batches)]


def token_masks(batch: Batch, has_decoder: bool = False, skip_tokens: int = 0) -> tuple[Tensor, Tensor | None]:
    """Which tokens of a batch are real: (b, s) bool on the CPU, and the same for the decoder's inputs if there is a
    decoder. The first `skip_tokens` real tokens of each sample count as padding.

    Padding is read from `attention_mask` and `decoder_attention_mask`, (b, s) or (b, heads, queries, s). Without the
    latter, the decoder's padding is where `labels` are -100. Without any mask every token is real. A mask may also
    cover tokens in a cache: then its end belongs to the batch.
    """
    ids = next((batch[k] for k in ("input_ids", "inputs_embeds") if batch.get(k) is not None), None)
    if ids is None:
        raise CordaError(f"a batch needs input_ids or inputs_embeds, but has only {', '.join(batch) or 'nothing'}")
    mask = batch.get("attention_mask")
    mask = torch.ones(ids.shape[:2]) if mask is None else _attended(mask)[:, -ids.shape[1] :]
    decoder = None
    if has_decoder:
        decoder = batch.get("decoder_attention_mask")
        if decoder is not None:
            decoder = _attended(decoder)
        if decoder is None and batch.get("labels") is not None:
            decoder = batch["labels"] != -100
        if decoder is None:  # BART makes its decoder's inputs of the encoder's
            decoder_ids = batch.get("decoder_input_ids")
            decoder = mask if decoder_ids is None else torch.ones(decoder_ids.shape[:2])
    masks = [None if m is None else m.bool().cpu() for m in (mask, decoder)]
    mask, decoder = [None if m is None else m & (m.cumsum(1) > skip_tokens) for m in masks]
    assert mask is not None
    return mask, decoder


def _attended(mask: Tensor) -> Tensor:
    """Which tokens a mask does not hide: (b, s), from (b, s) or from what each query attends to, (b, [heads,] queries,
    s): truth values, or 0 where it attends and a large negative number where it does not.

    Raises CordaError if the mask has another shape.
    """
    if mask.ndim == 2:
        return mask
    if mask.ndim not in (3, 4):
        raise CordaError(f"attention_mask has the shape {tuple(mask.shape)}: 2 or 4 dimensions are read")
    attends = mask > -1000 if mask.is_floating_point() and not bool((mask > 0).any()) else mask.bool()
    attends = attends.any(1) if mask.ndim == 4 else attends  # (b, queries, s)
    # The row of a padded query may be full: where softmax gives NaN for a query that attends to nothing, transformers
    # lets it attend to everything. So a full row tells nothing, but for the last one of a causal mask.
    tells = ~attends.all(2)
    tells[:, -1] = True
    return (attends & tells[:, :, None]).any(1)


def padded_samples(batch: Batch, real: Tensor, pad: int, may_end: bool) -> int:
    """How many samples begin or end in padding tokens that are taken for real.

    Args:
        real: (b, s), see `token_masks`.
        pad: the padding token's id.
        may_end: whether a text may begin or end in that token, too: then it takes two of them in a row.
    """
    ids, count = batch.get("input_ids"), 1 + may_end
    if ids is None:
        return 0
    rows = [row[counted] for row, counted in zip(ids.cpu(), real)]
    return sum(bool((row[:count] == pad).all() or (row[-count:] == pad).all()) for row in rows if len(row) > count)


def _warn_of_padding(model: nn.Module, batches: Sequence[Batch], masks: Sequence[Tensor]) -> None:
    settings = getattr(model, "config", None)
    ends = [getattr(settings, f"{name}_token_id", None) for name in ("bos", "eos")]
    ends = [i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None]
    pad = getattr(settings, "pad_token_id", None)
    pad = ends[-1] if pad is None and ends else pad  # of a tokenizer without one, the end of the text pads
    if pad is None:
        return
    padded = sum(padded_samples(batch, mask, pad, pad in ends) for batch, mask in zip(batches, masks))
    if padded:
        warnings.warn(
            f"{padded} of {sum(map(len, masks))} samples of the context begin or end in padding tokens (id {pad}) that "
            "no attention_mask hides, so they count as text: give the attention_mask of each batch",
            stacklevel=4,
        )


def answer_mask(batch: Batch) -> Tensor:
    """(b, s − 1) bool on the CPU: whether token i + 1 belongs to an answer, and is predicted at token i. These are the
    tokens with a label; without `labels`, all real tokens. Raises CordaError if the labels have another shape."""
    real, labels = token_masks(batch)[0], batch.get("labels")
    if labels is not None and labels.shape != real.shape:
        raise CordaError(f"a batch has labels of shape {tuple(labels.shape)} for tokens of shape {tuple(real.shape)}")
    answers = real if labels is None else real & (labels != -100).cpu()
    return real[:, :-1] & answers[:, 1:]


def counted_tokens(model: nn.Module, context: Context) -> Callable[[Batch], tuple[Tensor, Tensor | None]]:
    """`token_masks` of a batch of the context, without the tokens that it leaves out.

    Raises CordaError if it tells tokens of images from others, and the model reads no images."""
    decodes = has_decoder(model)
    if context.tokens == "all":
        return lambda batch: token_masks(batch, decodes, context.skip_tokens)
    image = getattr(getattr(model, "config", None), "image_token_id", None)
    if image is None:
        raise CordaError(f"tokens is {context.tokens}, but {type(model).__name__} reads no images: leave it out")

    def of_kind(batch: Batch) -> tuple[Tensor, Tensor | None]:
        counted, decoder_counted = token_masks(batch, decodes, context.skip_tokens)
        of_image = (batch["input_ids"] == image).cpu()
        return counted & (of_image if context.tokens == "image" else ~of_image), decoder_counted

    return of_kind


def check_context(
    model: nn.Module, context: Context, targets: Mapping[str, nn.Module], name: str = "the context"
) -> dict[str, Any]:
    """Count the samples and the real tokens of a context, for corda.json. Warn where a round has fewer tokens than the
    widest layer has inputs: its covariance has low rank. Warn where padding tokens count as real.

    Args:
        name: of the context, in these sentences.

    Raises CordaError if there is no real token.
    """
    if not context.batches:
        raise CordaError(f"{name} is empty: no batch was given")
    counted = counted_tokens(model, context)
    masks = [counted(batch)[0] for batch in context.batches]
    samples, tokens = sum(map(len, masks)), int(sum(mask.sum() for mask in masks))
    if tokens == 0 and context.skip_tokens:
        raise CordaError(f"no sample of {name} has more than the {context.skip_tokens} tokens that are left out")
    if tokens == 0 and context.tokens != "all":
        raise CordaError(f"no sample of {name} has a token of {'an image' if context.tokens == 'image' else 'text'}")
    if tokens == 0:
        raise CordaError(f"{name} holds only padding: the attention masks of its {samples} samples are all zero")
    _warn_of_padding(model, context.batches, masks)
    width, widest = max((weight_shape(module)[1], layer) for layer, module in targets.items())
    counts = {"samples": samples, "tokens": tokens, "widest": width}
    rounds = context.rounds or [0] * len(masks)
    by_round = [int(sum(m.sum() for m, r in zip(masks, rounds) if r == i)) for i in sorted(set(rounds))]
    if min(by_round) == 0:
        raise CordaError(f"a round of {name} holds only padding, of {len(by_round)} rounds")
    if len(by_round) > 1:
        counts["rounds"] = len(by_round)
    if min(by_round) < width:
        counts["samples_for_full_rank"] = math.ceil(samples / len(by_round) * width / min(by_round))
        each = samples // len(by_round)
        smallest = f"the smallest of {len(by_round)} rounds of {name}" if len(by_round) > 1 else name
        warnings.warn(
            f"{smallest} has {min(by_round)} real tokens in {each} sample{'s' * (each > 1)}, fewer than {widest} is "
            f"wide ({width}), so its covariance has low rank; about {counts['samples_for_full_rank']} such samples "
            "would give it full rank",
            stacklevel=3,
        )
    return counts


def has_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
