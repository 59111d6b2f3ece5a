"""What a model says of its own accord: text that stands for the abilities that nobody named."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CordaError
from ..data.batches import Encoded
from ..progress import progress_bar

TEXTS, LENGTH, BATCH = 256, 128, 64


@torch.no_grad()
def own_text(
    model: nn.Module, tokenizer: Any, texts: int = TEXTS, length: int = LENGTH, seed: int = 0, progress: bool = True
) -> list[Encoded]:
    """Texts that a causal language model draws from its own distribution, after the token that begins a text and up to
    the one that ends it, or `length` tokens. All tokens but the first count as an answer. The adapter of a PeftModel is
    left out. The same seed gives the same texts on the same device.

    Raises CordaError if the tokenizer has no token that a text could begin with.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise CordaError("the tokenizer has no token that begins or ends a text, so the model cannot be let speak")
    device, end, training = next(model.parameters()).device, tokenizer.eos_token_id, model.training
    rows: list[list[int]] = []
    model.eval()
    with (
        getattr(model, "disable_adapter", nullcontext)(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        progress_bar("own texts", texts, progress) as advance,
    ):
        torch.manual_seed(seed)
        while (done := len(rows)) < texts:
            ids = torch.full((min(BATCH, texts - done), 1), first, device=device)

            def show(so_far: Tensor, _: Any, done: int = done, **__: Any) -> Tensor:
                """A criterion that stops no row, (rows, tokens) -> (rows,)."""
                advance(0, completed=done + len(so_far) * so_far.shape[1] / length)
                return torch.zeros(len(so_far), dtype=torch.bool, device=so_far.device)

            rows += model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_length=length,
                max_new_tokens=None,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                eos_token_id=end,
                pad_token_id=end if end is not None else first,
                stopping_criteria=[show],
            ).tolist()
            advance(0, completed=len(rows))
    model.train(training)
    return [Encoded(ids, [False] + [True] * (len(ids) - 1)) for ids in (_up_to(row, end) for row in rows)]


def _up_to(ids: list[int], end: int | None) -> list[int]:
    """The tokens up to the first that ends the text, after the one that begins it."""
    return ids[: ids.index(end, 1) + 1] if end in ids[1:] else ids
