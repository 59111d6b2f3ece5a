"""AdapterDrop (Rücklé et al., arXiv 2010.11918): bottleneck adapters of which the lower ones can be left out.

After the feed-forward part of each block, where Pfeiffer et al. (arXiv 2005.00247) place it, one adapter

    h ← h + W_up · relu(W_down · h + c_down) + c_up        h: the block's output, W_down: width × d, W_up: d × width

with no normalization of its own. (As in AdapterHub's `adapters`, whose pinned transformers is too old for us, for
models that normalize before each part, such as LLaMA. In BERT, which normalizes after it, theirs is added before that
normalization, ours after.) W_up starts at zero, so the model starts as it was, to the last bit.

Robust AdapterDrop (section 3): for each training batch the adapters of the first n blocks are left out, n uniform over
0..L − 1 for L blocks, so that one training serves every n. What is left out is not computed, and below the lowest
adapter that is not, there is no backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from ..config import CordaError
from ..models.lockstep import find_blocks
from ..models.targets import find_targets


class Bottleneck(nn.Module):
    """The adapter of one block, kept in it as `bottleneck`. In at least float32, as PEFT keeps its adapters."""

    def __init__(self, d: int, width: int, like: Tensor):
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.down = nn.Linear(d, width, device=like.device, dtype=dtype)
        self.up = nn.Linear(width, d, device=like.device, dtype=dtype)
        nn.init.normal_(self.down.weight, std=0.02)  # the one of BERT, and of `adapters`
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.dropped = False  # by `drop`
        self.skipped = False  # in this training step

    def forward(self, h: Tensor) -> Tensor:  # (..., d)
        if self.dropped or (self.training and self.skipped):
            return h
        return h + self.up(F.relu(self.down(h.to(self.down.weight.dtype)))).to(h.dtype)


class RobustDrop(TrainerCallback):
    """Draws n for each optimizer step, from torch's CPU generator (which the trainer seeds, and keeps in its
    checkpoints). In evaluation nothing is left out but by `drop`."""

    def __init__(self, adapters: list[Bottleneck], most: int):
        self.adapters = adapters
        self.most = most

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._skip(int(torch.randint(0, self.most + 1, ())))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._skip(0)

    def _skip(self, n: int) -> None:
        for i, adapter in enumerate(self.adapters):
            adapter.skipped = i < n


def install(model: nn.Module, width: int, drop: int | None = None) -> tuple[nn.Module, TrainerCallback]:
    """Put an adapter into each block of the model, in place, and freeze all else.

    Args:
        width: of the bottleneck (see `width_for`).
        drop: the largest n of the first blocks whose adapters are left out in a training step; 0: all are trained in
            every step. Default: the paper's, all blocks but one.

    Returns:
        The model, and the callback that the trainer must be given (robust AdapterDrop).

    Raises:
        CordaError: the model has adapters already, or no list of blocks; a step would have nothing to train.
    """
    if any(isinstance(module, Bottleneck) for module in model.modules()):
        raise CordaError("the model carries adapters already")
    blocks, d = _blocks(model)
    drop = len(blocks) - 1 if drop is None else drop
    if not 0 <= drop < len(blocks):
        raise CordaError(f"of the adapters of {len(blocks)} blocks, 0 to {len(blocks) - 1} can be left out, not {drop}")
    model.requires_grad_(False)
    for block in blocks:
        block.bottleneck = Bottleneck(d, width, like=next(block.parameters())).train(block.training)
        block.register_forward_hook(_adapt)
    return model, RobustDrop(_adapters(model), drop)


def _adapt(block: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a block, which gives hidden states, or a tuple that begins with them."""
    if isinstance(output, tuple):
        return (block.bottleneck(output[0]), *output[1:])  # type: ignore[operator]
    return block.bottleneck(output)  # type: ignore[operator]


def width_for(model: nn.Module, parameters: int) -> int:
    """The bottleneck's width whose adapters, of (2 d + 1)·width + d parameters in each block, come nearest to
    `parameters` in all.

    Raises CordaError if that is none.
    """
    blocks, d = _blocks(model)
    width = round((parameters / len(blocks) - d) / (2 * d + 1))
    if width < 1:
        raise CordaError(
            f"{parameters:,} parameters are too few for adapters: in {len(blocks)} blocks, width 1 takes "
            f"{len(blocks) * (3 * d + 1):,}"
        )
    return width


def _blocks(model: nn.Module) -> tuple[list[nn.Module], int]:
    """The blocks, in the order they are run, and the size d of their hidden states."""
    blocks = list(find_blocks(model, list(find_targets(model, "all-linear"))).values())
    if not blocks:
        raise CordaError(f"{type(model).__name__} has no list of blocks to put adapters into")
    return blocks, model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]


def _adapters(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def drop(model: nn.Module, n: int) -> None:
    """Leave out the adapters of the first n blocks, in evaluation and in training (specialized AdapterDrop, if before
    it); those above are back.

    Raises CordaError if there are fewer.
    """
    adapters = _adapters(model)
    if not 0 <= n <= len(adapters):
        raise CordaError(f"the model has {len(adapters)} adapters: {n} of them cannot be dropped")
    for i, adapter in enumerate(adapters):
        adapter.dropped = i < n


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """The model as it was, without its adapters."""
    before = [(adapter, adapter.dropped) for adapter in _adapters(model)]
    for adapter, _ in before:
        adapter.dropped = True
    try:
        yield
    finally:
        for adapter, dropped in before:
            adapter.dropped = dropped
