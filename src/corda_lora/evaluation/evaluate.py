"""What a tuned model learned and what it kept: losses, accuracies, and drift from the base model.

Base and tuned model are one model with its adapter off and on (`disable_adapter`), so every batch runs through both,
one after the other, and nothing of the base model's outputs is stored. Where many tuned models are measured against
one base, or the base's weights were written over, its outputs are stored once (`record_base`) and read (`BaseOutputs`).
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import CordaError, EvalConfig
from ..data.batches import Encoded, batch_by_length, encode, pad
from ..data.samples import Sample, load_samples
from ..files import whole_file
from ..models.targets import require_causal
from ..progress import track

Sides = Mapping[str, Callable[[], Any]]
TUNED: Sides = {"tuned": nullcontext}


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    config: EvalConfig,
    progress: bool = True,
    base: "BaseOutputs | None" = None,
    record: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Measure everything that `config` asks for, on the base model and (if `model` carries an adapter) the tuned one.

    Args:
        base: the base model's outputs; then `model`, whatever it is, is the tuned one, and it alone is run.
        record: where to put what `BaseOutputs` is made of; then `model` has to be the base model.

    Returns:
        {"keep": {data: {"base": {...}, "tuned": {...}}}, "learn": ..., "text": ..., "choices": ...}, where data is the
        name given. `loss` is in nats per token; `recall` the share of responses that greedy decoding gives; `drift`
        mean KL(base‖tuned) in nats per answer token; `agreement` the share of answer tokens where both put the same
        token first; accuracies are shares.

    Raises CordaError for data that cannot be had (all of it is loaded before anything is measured).
    """
    kinds = ("keep", "learn", "text", "choices")
    loaded = {kind: [(data, load_samples(data)) for data in config.data(kind)] for kind in kinds}
    if not any(loaded.values()):
        raise CordaError("nothing to measure: give some of keep, learn, text, choices")
    for data, samples in loaded["choices"]:
        check_choices(data.data, samples)
    require_causal(model)
    model.eval()
    compared = TUNED if base is not None else sides(model)
    results: dict[str, Any] = {}
    for kind, pairs in loaded.items():
        for data, samples in pairs:
            name = data.data if data.data not in results.get(kind, {}) else f"{data.data} ({data.rows})"
            if kind == "choices":
                result = choice_accuracy(model, tokenizer, samples, config.batch_tokens, progress, compared)
            else:
                if kind == "text":
                    samples = text_windows(tokenizer, samples, data.max_length)
                encoded = [encode(tokenizer, s, data.max_length, end=kind == "learn") for s in samples]
                label, drifts = f"{kind} {name}", kind != "learn"
                reference = partial(base.log_probs, label) if base is not None and drifts else None
                if record is not None and drifts:
                    record |= record_base(model, tokenizer, encoded, config.batch_tokens, progress, label)
                result = loss_and_drift(
                    model, tokenizer, encoded, config.batch_tokens, progress, kind, compared, reference
                )
                if kind == "text":
                    for numbers in result.values():
                        numbers["perplexity"] = math.exp(numbers["loss"])
                if kind == "learn" and config.exact_match:
                    shares = exact_match(model, tokenizer, samples, config, progress, compared)
                    for side, share in shares.items():
                        result[side]["exact_match"] = share
            results.setdefault(kind, {})[name] = result
    return results


def sides(model: nn.Module) -> Sides:
    """The models to compare: context managers under which `model` is the base, and the tuned one."""
    if isinstance(model, PeftModel):
        return {"base": model.disable_adapter, "tuned": nullcontext}
    return {"base": nullcontext}


@torch.no_grad()
def loss_and_drift(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    batch_tokens: int = 8192,
    progress: bool = False,
    label: str = "eval",
    compared: Sides | None = None,
    reference: Callable[[int], Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """Mean loss of the response tokens, and `recall`, the share of samples whose every response token is the model's
    first choice, on each side; for the tuned side also drift and agreement, if the base is known.

    Args:
        encoded: the samples' tokens, and which of them are a response's: see `data.batches.encode`.
        compared: the sides to run. Default: those the model has.
        reference: the base model's log p of a batch's answers, by the batch's number. Default: the base is a side.
    """
    encoded = _with_answers(encoded)
    compared = sides(model) if compared is None else compared
    sums = {side: {"loss": 0.0, "recall": 0.0} for side in compared}
    if reference is not None or len(compared) == 2:
        sums["tuned"] |= {"drift": 0.0, "agreement": 0.0}
    tokens = 0
    batches = batch_by_length([len(e.ids) for e in encoded], batch_tokens)
    for number, indices in enumerate(track(batches, label, progress)):
        ids, mask, answers = _padded([encoded[i] for i in indices], tokenizer, model)
        targets = ids[:, 1:][answers]  # (a,) the answers' tokens
        lines = answers.nonzero()[:, 0]  # (a,) the row of the batch that each belongs to
        base = None if reference is None else reference(number).to(ids.device)
        for side, active in compared.items():
            with active():
                logp = answer_log_probs(model, ids, mask, answers)  # (a, vocabulary)
            first = logp.argmax(1)  # (a,)
            sums[side]["loss"] -= float(logp.gather(1, targets[:, None]).sum())
            wrong = torch.zeros(len(indices), device=ids.device).index_add_(0, lines, (first != targets).float())
            sums[side]["recall"] += float((wrong == 0).sum())
            if base is None:
                base = logp  # the first side is the base, or the only one
            else:
                sums[side]["drift"] += float(F.kl_div(logp, base, reduction="sum", log_target=True))
                sums[side]["agreement"] += float((first == base.argmax(1)).sum())
        tokens += len(targets)
    for values in sums.values():
        for key in values:
            values[key] /= len(encoded) if key == "recall" else tokens
    return {side: {**values, "tokens": tokens} for side, values in sums.items()}


def _with_answers(encoded: Sequence[Encoded]) -> list[Encoded]:
    """The samples that have a token to predict, with at least one to predict it from."""
    found = [e for e in encoded if e.targets]
    if not found:
        raise CordaError("no sample has a response to measure")
    return found


def answer_log_probs(model: nn.Module, ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
    """log p of the next token where `answers` is true, float32: (a, vocabulary).

    Args:
        ids, mask: (b, s).
        answers: (b, s − 1) bool; position i asks for the prediction of token i + 1.
    """
    columns = answers.any(0).nonzero().flatten()  # only these columns go through the output head
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns)
    return F.log_softmax(output.logits[answers[:, columns]].float(), dim=-1)


@torch.no_grad()
def record_base(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    progress: bool,
    label: str,
) -> dict[str, Tensor]:
    """What the output head of the base model gets for each answer token, (a, d) a batch: as good as its logits, and a
    vocabulary's width smaller. Where the head does not give the logits by itself (they are capped or scaled after it),
    the logits."""
    found: dict[str, Tensor] = {}
    encoded = _with_answers(encoded)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for number, indices in enumerate(
        track(batch_by_length([len(e.ids) for e in encoded], batch_tokens), f"base, {label.split()[0]}", progress)
    ):
        ids, mask, answers = _padded([encoded[i] for i in indices], tokenizer, model)
        columns = answers.any(0).nonzero().flatten()
        inputs: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))  # noqa: B023
        try:
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns)
        finally:
            hook.remove()
        hidden = inputs[0][answers[:, columns]]  # (a, d)
        logits = output.logits[answers[:, columns]]  # (a, vocabulary)
        exact = torch.allclose(head(hidden).float(), logits.float(), rtol=1e-4, atol=1e-4)
        found[f"{label} {'hidden' if exact else 'logits'} {number}"] = (hidden if exact else logits).cpu()
    return found


class BaseOutputs:
    """The base model's predictions of the answers, from a file: see `save`. The output head is the base model's, from
    before anything was trained."""

    FILE = "base.safetensors"

    @classmethod
    def save(cls, folder: Path, record: dict[str, Tensor]) -> None:
        with whole_file(folder / cls.FILE) as partial:
            save_file({name: tensor.contiguous() for name, tensor in record.items()}, partial)

    def __init__(self, folder: Path, model: nn.Module):
        """`model` is the base model; its output head is copied."""
        self.file = safe_open(folder / self.FILE, framework="pt")
        self.head = copy.deepcopy(model.get_output_embeddings())  # type: ignore[operator]
        self.names = set(self.file.keys())

    def log_probs(self, label: str, number: int) -> Tensor:
        """log p of all tokens at the answers of batch `number` of the data `label`, float32: (a, vocabulary)."""
        logits = f"{label} logits {number}"
        if logits in self.names:
            return F.log_softmax(self.file.get_tensor(logits).float(), dim=-1)
        hidden = self.file.get_tensor(f"{label} hidden {number}").to(self.head.weight.device)
        return F.log_softmax(self.head(hidden).float(), dim=-1)


def _padded(rows: Sequence[Encoded], tokenizer: Any, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask (b, s), and which next-token predictions are the answer's (b, s − 1), where the model is."""
    ids, mask = pad([e.ids for e in rows], tokenizer.pad_token_id or 0)
    answers = pad([e.answer for e in rows], False)[0][:, 1:]
    device = next(model.parameters()).device
    return ids.to(device), mask.to(device), answers.to(device)


def text_windows(tokenizer: Any, samples: Sequence[Sample], length: int) -> list[Sample]:
    """Running text, cut into windows of about `length` tokens; lines are joined as they stood."""
    text = "\n".join(s.prompt + s.response for s in samples)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [Sample("", tokenizer.decode(ids[i : i + length]), {}) for i in range(0, len(ids), length)]


def check_choices(name: str, samples: Sequence[Sample]) -> None:
    """Raises CordaError if a row has no list `choices` with its response in it."""
    for i, sample in enumerate(samples):
        choices = sample.row.get("choices")
        if not isinstance(choices, list) or sample.response not in choices:
            raise CordaError(
                f"row {i} of {name} needs a column `choices`: a list that holds the response {sample.response!r}"
            )


@torch.no_grad()
def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    batch_tokens: int = 8192,
    progress: bool = False,
    compared: Sides | None = None,
) -> dict[str, dict[str, float]]:
    """Share of the samples whose right choice has the highest log-likelihood after the prompt (summed over its tokens,
    as in lm-evaluation-harness's `acc`)."""
    rows, owners = [], []
    for i, sample in enumerate(samples):
        for choice in sample.row["choices"]:
            rows.append(encode(tokenizer, Sample(sample.prompt, choice, {}), 10**9))
            owners.append(i)
    compared = sides(model) if compared is None else compared
    scores = {side: torch.zeros(len(rows)) for side in compared}
    for indices in track(batch_by_length([len(e.ids) for e in rows], batch_tokens), "choices", progress):
        ids, mask, answers = _padded([rows[i] for i in indices], tokenizer, model)
        for side, active in compared.items():
            with active():
                logp = answer_log_probs(model, ids, mask, answers)
            token = logp.gather(1, ids[:, 1:][answers][:, None]).flatten()  # (a,)
            lines = answers.nonzero()[:, 0]  # (a,) the row of the batch that each belongs to
            total = torch.zeros(len(indices), device=token.device).index_add_(0, lines, token)
            scores[side][torch.tensor(indices)] = total.cpu()
    results = {}
    for side, score in scores.items():
        right, start = 0, 0
        for sample in samples:
            choices = sample.row["choices"]
            best = int(score[start : start + len(choices)].argmax())
            right += choices[best] == sample.response
            start += len(choices)
        results[side] = {"accuracy": right / len(samples), "samples": len(samples)}
    return results


@torch.no_grad()
def exact_match(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    config: EvalConfig,
    progress: bool = False,
    compared: Sides | None = None,
) -> dict[str, float]:
    """Share of the samples whose greedy answer matches the response: see `EvalConfig.exact_match`."""
    compared = sides(model) if compared is None else compared
    right = dict.fromkeys(compared, 0)
    prompts = [encode(tokenizer, Sample(s.prompt, "", {}), 10**9).ids for s in samples]
    batches = batch_by_length([len(p) + config.max_new_tokens for p in prompts], config.batch_tokens)
    for indices in track(batches, "exact match", progress):
        for side, active in compared.items():
            with active():
                answers = generate(model, tokenizer, [prompts[i] for i in indices], config.max_new_tokens)
            for i, answer in zip(indices, answers):
                right[side] += matches(answer, samples[i].response, config.exact_match)
    return {side: n / len(samples) for side, n in right.items()}


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations, up to the end-of-text token."""
    flipped, mask = pad([p[::-1] for p in prompts], tokenizer.pad_token_id or 0)
    ids, mask = flipped.flip(1), mask.flip(1)  # prompts end together: padded on the left
    device = next(model.parameters()).device
    output = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))


def matches(answer: str, response: str, how: str) -> bool:
    """Whether two answers agree: as texts, or in the last match of the regular expression `how`."""
    if how == "text":
        return answer.strip() == response.strip()
    found = [[m.group(1) if m.re.groups else m.group() for m in re.finditer(how, t)] for t in (answer, response)]
    return bool(found[0] and found[1]) and found[0][-1].strip() == found[1][-1].strip()


def iterate(results: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """(kind, data, side, numbers) of `evaluate`'s result, flat."""
    for kind, datas in results.items():
        for data, by_side in datas.items():
            for side, numbers in by_side.items():
                yield kind, data, side, numbers
