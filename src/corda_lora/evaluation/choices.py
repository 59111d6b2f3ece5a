"""Multiple choice: the log-likelihood of each choice after the prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CordaError
from ..config.values import short
from ..data.batches import batch_by_length, encode
from ..data.samples import UNCUT, Sample
from ..progress import track
from .answers import Sides, answer_log_probs, padded


@dataclass(frozen=True)
class Choices:
    """Questions, and one model's log-likelihood of each choice.

    Attributes:
        questions: each has its choices in `row["choices"]`, and the right one as its response.
        scores: for each question the log-likelihoods of its choices, in nats.
    """

    questions: Sequence[Sample]
    scores: Sequence[Tensor]
    base = None

    @property
    def samples(self) -> int:
        return len(self.questions)

    def each(self) -> Iterator["Choices"]:
        return (Choices([question], [scores]) for question, scores in zip(self.questions, self.scores))

    def right(self) -> int:
        """How many questions have their right choice as the most likely one."""
        pairs = zip(self.questions, self.scores)
        return sum(question.row["choices"][int(scores.argmax())] == question.response for question, scores in pairs)


@torch.no_grad()
def read_choices(
    model: nn.Module, tokenizer: Any, questions: Sequence[Sample], batch_tokens: int, progress: bool, compared: Sides
) -> Iterator[tuple[str, Choices]]:
    """(side, all questions with its scores) for each side."""
    encoded = [
        encode(tokenizer, question.answered(choice), UNCUT)
        for question in questions
        for choice in question.row["choices"]
    ]
    scores = {side: torch.zeros(len(encoded)) for side in compared}
    for indices in track(batch_by_length([len(e.ids) for e in encoded], batch_tokens), "choices", progress):
        inputs, answers = padded([encoded[i] for i in indices], tokenizer, model)
        rows = answers.nonzero()[:, 0]  # (a,) the row of the batch that each answer token belongs to
        for side, active in compared.items():
            with active():
                log_probs = answer_log_probs(model, inputs, answers)  # (a, vocabulary)
            by_token = log_probs.gather(1, inputs["input_ids"][:, 1:][answers][:, None]).flatten()  # (a,)
            by_row = torch.zeros(len(indices), device=by_token.device).index_add_(0, rows, by_token)
            scores[side][torch.tensor(indices)] = by_row.cpu()
    lengths = [len(question.row["choices"]) for question in questions]
    for side in compared:
        yield side, Choices(questions, scores[side].split(lengths))


def check_choices(name: str, samples: Sequence[Sample]) -> None:
    """Raises CordaError if a row has no list `choices` that holds its response."""
    for i, sample in enumerate(samples, 1):
        choices = sample.row.get("choices")
        if not isinstance(choices, list) or sample.response not in choices:
            raise CordaError(
                f"sample {i} of {name} needs a column `choices`: a list with the response {short(sample.response)}"
            )
