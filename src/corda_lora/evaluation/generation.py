"""Greedy answers, and whether they match the responses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import StopStringCriteria

from ..config import CordaError, EvalConfig
from ..config.values import find_all
from ..data.batches import Encoded, batch_by_length, encode_question, pad
from ..data.images import image_inputs
from ..data.samples import Sample
from ..devices import free_bytes
from ..models.targets import require_causal
from ..progress import progress_bar
from .answers import Sides

LARGE_BATCH = 2**18  # tokens of a batch on an accelerator where its room is not known


@dataclass(frozen=True)
class Continuations:
    """One model's greedy answers to a batch of samples, and the responses that they should match.

    `match` says how they are compared: see `matches`.
    """

    answers: Sequence[str]
    responses: Sequence[str]
    match: str
    base = None

    @property
    def samples(self) -> int:
        return len(self.answers)

    def each(self) -> Iterator["Continuations"]:
        pairs = zip(self.answers, self.responses)
        return (Continuations([answer], [response], self.match) for answer, response in pairs)

    def matching(self) -> int:
        return sum(matches(answer, response, self.match) for answer, response in zip(self.answers, self.responses))


@torch.no_grad()
def read_continuations(
    model: nn.Module, tokenizer: Any, samples: Sequence[Sample], config: EvalConfig, progress: bool, compared: Sides
) -> Iterator[tuple[str, Continuations]]:
    """(side, its greedy answers) for each batch of samples."""
    prompts = [encode_question(tokenizer, s) for s in samples]
    batches = batch_by_length([len(p.ids) + config.max_new_tokens for p in prompts], config.batch_tokens)
    with progress_bar("exact match", len(samples), progress) as advance:
        for indices in batches:
            responses = [samples[i].response for i in indices]
            for side, active in compared.items():
                shown = [prompts[i] for i in indices]
                with active():
                    answers = generate(model, tokenizer, shown, config.max_new_tokens, advance=advance)
                yield side, Continuations(answers, responses, config.exact_match)
            advance(len(indices))


def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Sequence[str],
    batch_tokens: int,
    label: str,
) -> list[str]:
    """Greedy continuations of texts, each up to the first of the strings `stop`, or to the end of the model's context.

    Args:
        batch_tokens: the number of tokens in a batch, prompts and continuations. On an accelerator it is as large as
            memory allows.

    Raises CordaError if the model is no causal language model, or a prompt fills its context.
    """
    require_causal(model)
    encoded = [encode_question(tokenizer, Sample(prompt, "", {})) for prompt in prompts]
    longest = max(len(e.ids) for e in encoded)
    shape: Any = model.config
    context = getattr(shape.get_text_config(), "max_position_embeddings", None) or longest + max_new_tokens
    if longest >= context:
        raise CordaError(f"the longest prompt of {label} has {longest:,} tokens, and the model reads {context:,}")
    batch_tokens = largest_batch(model, batch_tokens)
    answers: dict[int, str] = {}
    with progress_bar(label, len(prompts)) as advance:
        while left := [i for i in range(len(prompts)) if i not in answers]:
            lengths = [len(encoded[i].ids) + max_new_tokens for i in left]
            rows = [left[i] for i in batch_by_length(lengths, batch_tokens)[-1]]  # the longest first
            most = min(max_new_tokens, context - max(len(encoded[i].ids) for i in rows))
            shown = [encoded[i] for i in rows]
            try:
                answers.update(zip(rows, generate(model, tokenizer, shown, most, stop=stop, advance=advance)))
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                batch_tokens = len(rows) * max(lengths) // 2
            else:
                advance(len(rows))
    return [answers[i] for i in range(len(prompts))]


def largest_batch(model: nn.Module, tokens: int) -> int:
    """How many tokens, prompts and continuations, a batch of greedy answers has at first: `tokens` on a CPU; on an
    accelerator as many as its free memory has room for twice over, counting their keys and values. A step takes hardly
    longer with more rows. Callers halve it where it does not fit after all."""
    parameter = next(model.parameters())
    if parameter.device.type == "cpu":
        return tokens
    free, source = free_bytes(parameter.device), cast(Any, model)
    shape = source.config.get_text_config()
    queries = getattr(shape, "num_attention_heads", None)
    if free is None or not queries:
        return max(tokens, LARGE_BATCH)
    heads = getattr(shape, "num_key_value_heads", None) or queries
    width = getattr(shape, "head_dim", None) or shape.hidden_size // queries
    values = 2 * shape.num_hidden_layers * heads * width  # of a token's keys and values
    return max(tokens, free // (2 * values * source.dtype.itemsize))


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    advance: Callable[..., None] = lambda *_, **__: None,
) -> list[str]:
    """Continuations up to the end-of-text token or one of the strings `stop`: greedy, or drawn at a temperature.

    Args:
        advance: of a progress bar (see `progress_bar`): its note says at which token the answers are.
    """
    flipped, mask = pad([p.ids[::-1] for p in prompts], tokenizer.pad_token_id or 0)
    ids, mask = flipped.flip(1), mask.flip(1)  # padded on the left, so that all prompts end in the last column
    device = next(model.parameters()).device
    images = {name: tensor.to(device) for name, tensor in image_inputs([p.shown for p in prompts], ids).items()}

    def note(ids_so_far: Tensor, _: Any, **__: Any) -> Tensor:
        """A criterion that stops no row, (rows, tokens) -> (rows,)."""
        advance(0, note=f"token {ids_so_far.shape[1] - ids.shape[1]} of at most {max_new_tokens}")
        return torch.zeros(len(ids_so_far), dtype=torch.bool, device=ids_so_far.device)

    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        **images,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature} if temperature else {}),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[note, *stops_at(tokenizer, stop)],
        tokenizer=tokenizer,  # which a model with stop strings of its own asks for
    )
    advance(0, note="")
    answers = list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))
    for end in stop:
        answers = [answer.split(end)[0] for answer in answers]
    return answers


def stops_at(tokenizer: Any, strings: Sequence[str]) -> list[StopStringCriteria]:
    """What stops a row that has come to one of the strings; nothing if the vocabulary can spell none of them, as then
    none is ever generated."""
    try:
        return [StopStringCriteria(tokenizer, list(strings))] if strings else []
    except ValueError:  # no token ends one of them
        return []


def matches(answer: str, response: str, match: str) -> bool:
    """Whether an answer matches a response. `match` is "text" to compare the whole texts, or a regular expression whose
    last match (its first group, if it has one) is compared."""
    if match == "text":
        return answer.strip() == response.strip()
    ours, right = (
        [m.group(1) if m.re.groups else m.group() for m in find_all("exact_match", match, text)]
        for text in (answer, response)
    )
    return bool(ours and right) and (ours[-1] or "").strip() == (right[-1] or "").strip()
