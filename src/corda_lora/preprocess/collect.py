"""Collect the covariances of layers' inputs while batches run through a model.

This takes more than a hook for three reasons. Layers that are given the same tensor (q, k and v; gate and up) share one
covariance. Padding is left out of every covariance. Every round of the context has covariances of its own.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.covariance import HALF, Covariance
from ..config import CordaError
from .context import Batch, Context, has_decoder, token_masks


class Group(NamedTuple):
    """Layers that share their input.

    Attributes:
        members: their names.
        covariances: C (d_in, d_in) of that input, one for each round; empty if the layers were not run.
    """

    members: list[str]
    covariances: list[Tensor]


class Collector:
    """Accumulates a `Covariance` for each of `layers` while their modules run.

    Call `start(index)` before batch `index` runs on; `take` hands over the covariances of layers that are done.

    Args:
        context: the batches that will run. `add` adds further ones.
        per_sample: normalize as PEFT does, see `Covariance.add_samples`.

    Attributes:
        counts: for each layer taken, the number of rows (or samples) that its covariance is the mean of.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        context: Context | None = None,
        per_sample: bool = False,
    ):
        context = context or Context()
        self.layers = layers
        self.names = {module: name for name, module in layers.items()}
        self.has_decoder = has_decoder(model)
        self.per_sample = per_sample
        self.skip_tokens = context.skip_tokens
        self.numbers = context.numbers
        self.counts: dict[str, int] = {}
        self.covariances: dict[str, dict[int, Covariance]] = {}  # layer -> round -> sum
        self.leaders: dict[str, str] = {}  # layer -> the layer whose covariance it shares
        self.first_batch: dict[str, int] = {}  # layer -> the batch in which it ran first
        self.finite: dict[str, list[tuple[int, Tensor]]] = {}  # layer -> (batch, (samples,) or () bool)
        encoder: nn.Module | None = model.get_encoder() if self.has_decoder else None  # type: ignore[operator]
        self.encoder = encoder
        self.in_encoder = set(encoder.modules()) if encoder is not None else set()
        self.encoded: dict[int, weakref.ref[Tensor]] = {}  # batch -> the encoder's output
        self.masks: list[tuple[Tensor | None, Tensor | None]] = []  # batch -> its masks, see `token_masks`
        self.rows: dict[int, Tensor] = {}  # identity of a mask -> row numbers of its real tokens, on the device
        self.first_sample: list[int] = []  # batch -> number of its first sample
        self.rounds: list[int] = []  # batch -> its round
        self.samples = 0
        for batch, round in zip(context.batches, context.rounds or [0] * len(context.batches)):
            self.add(batch, round)
        self.start(0)

    def add(self, batch: Batch | None, round: int = 0) -> None:
        """One more batch, which runs next. None stands for calls of which nothing is known: what a layer is given in
        them is one sample without padding, and shared with no other layer."""
        mask, decoder_mask = (None, None) if batch is None else token_masks(batch, self.has_decoder, self.skip_tokens)
        self.masks.append((mask, decoder_mask))
        self.first_sample.append(self.samples)
        self.rounds.append(round)
        self.samples += 0 if mask is None else len(mask)
        self.start(len(self.masks) - 1)

    def start(self, index: int) -> None:
        self.batch = index
        self.inputs: list[tuple[weakref.ref[Tensor], str]] = []  # inputs seen since, and the layer that got each first

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the layers, for as long as the `with` block lasts."""
        hooks = [module.register_forward_pre_hook(self._on_input) for module in self.layers.values()]
        if self.encoder is not None:
            hooks.append(self.encoder.register_forward_hook(self._on_encoded))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self.encoded[self.batch] = weakref.ref(output[0])

    def _on_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach() if args[0].requires_grad else args[0]  # (b, s, d), (b, d) or (b·s, d)
        name, mask = self.names[module], self._mask_of(module, args[0])
        if mask is not None and self._shares(name, args[0]):
            return
        if name in self.leaders:
            raise RuntimeError(f"{name} shared its input with {self.leaders[name]} in an earlier batch, but not now")
        rows = None if mask is None else self._real_tokens(mask, name, x)
        flat = x.reshape(-1, x.shape[-1])  # (t, d)
        self.finite.setdefault(name, []).append((self.batch, self._finite(x, rows)))
        if rows is not None:
            flat = flat.index_select(0, rows)
        covariance = self.covariances.setdefault(name, {}).setdefault(self.rounds[self.batch], Covariance())
        if self.per_sample:
            covariance.add_samples(flat, _sample_lengths(mask, name, x))
        else:
            covariance.add(flat)

    def _shares(self, name: str, x: Tensor) -> bool:
        """Whether another layer was given the same tensor in this batch. That layer accumulates it for both."""
        for ref, leader in self.inputs:
            if ref() is x and leader != name:
                if name not in self.covariances and self.first_batch[leader] == self.batch:
                    self.leaders.setdefault(name, leader)
                if self.leaders.get(name) == leader:
                    return True
        self.first_batch.setdefault(name, self.batch)
        self.inputs.append((weakref.ref(x), name))
        return False

    def _mask_of(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """(b, s): which tokens of a layer's input are real, in the batch that runs; None if that is not known."""
        mask, decoder_mask = self.masks[self.batch]
        if decoder_mask is not None and module not in self.in_encoder:
            encoded = self.encoded.get(self.batch, lambda: None)()
            mask = mask if x is encoded else decoder_mask
        return mask

    def _real_tokens(self, mask: Tensor, name: str, x: Tensor) -> Tensor | None:
        """Numbers of the rows of x.reshape(-1, d) that are not padding, on x's device; None if all are real."""
        if bool(mask.all()) or x.shape[:-1] == mask.shape[:1]:  # no padding; or one pooled vector a sample
            return None
        if x.shape[:-1].numel() != mask.numel():
            raise CordaError(
                f"{name} is given {tuple(x.shape)}, from which padding cannot be told: give batches without padding"
            )
        if id(mask) not in self.rows:  # moved once: so large a copy can make the host wait
            self.rows[id(mask)] = mask.flatten().nonzero().flatten().to(x.device, non_blocking=True)
        return self.rows[id(mask)]

    def _finite(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """(b,) whether each sample's numbers are finite; padding does not count. The host does not synchronize."""
        precise = torch.float32 if x.dtype in HALF else x.dtype
        finite = torch.linalg.vector_norm(x, dim=-1, dtype=precise).isfinite()  # (b, s), (b,) or (b·s,); in one pass
        if rows is not None:
            real = torch.zeros(finite.numel(), dtype=torch.bool, device=x.device)
            real.index_fill_(0, rows, True)
            finite = finite | ~real.reshape(finite.shape)
        return finite.flatten(1).all(-1) if finite.ndim > 1 else finite

    def take(self, names: Sequence[str]) -> list[Group]:
        """The groups of the named layers, with their covariances; the sums are then forgotten. Layers that were never
        run are missing.

        Raises:
            CordaError: an input had NaN or Inf; names the layer and the sample. A layer got tokens in some of the
                rounds only.
        """
        for name in names:
            checks = self.finite.pop(name, [])
            # Synchronizes once for all batches.
            if not checks or bool(torch.stack([finite.all() for _, finite in checks]).all()):
                continue
            for batch, finite in checks:
                if not bool(finite.all()):
                    sample = self._first_not_finite(batch, finite)
                    raise CordaError(f"Invalid value found in input of {name}, {sample}: NaN or Inf")
        members_of: dict[str, list[str]] = {}
        for name in names:
            leader = self.leaders.get(name, name)
            if leader in self.covariances:
                members_of.setdefault(leader, []).append(name)
        groups = []
        for leader, members in members_of.items():
            sums = self.covariances.pop(leader)
            means = [s.mean() for _, s in sorted(sums.items()) if s.count]
            self.counts |= dict.fromkeys(members, sum(s.count for s in sums.values()))
            del sums
            if len(means) == len(set(self.rounds)):
                groups.append(Group(members, means))
            elif means:
                raise CordaError(f"{leader} got no token in some of the rounds: give fewer rounds or more samples")
        return groups

    def _first_not_finite(self, batch: int, finite: Tensor) -> str:
        """Names the first sample of a batch that is not finite, or the batch if its samples cannot be told apart."""
        mask, _ = self.masks[batch]
        if mask is None or finite.numel() != len(mask):
            return f"batch {batch} of the context (counted from 0)"
        sample = self.first_sample[batch] + int((~finite).nonzero()[0])
        return f"sample {self.numbers[sample] if self.numbers else sample} of the context (counted from 0)"


def _sample_lengths(mask: Tensor | None, name: str, x: Tensor) -> list[int]:
    """How many real rows of x.reshape(-1, d) each sample has; samples without any are left out."""
    rows = x.shape[:-1].numel()
    samples = len(mask) if mask is not None else len(x) if x.ndim > 2 else 1
    if samples == 1 and (mask is None or rows != mask.numel()):
        return [rows] if rows else []
    if mask is None:
        raise CordaError(
            f"{name} is given {samples} samples in a call whose padding is not known: call the model itself with "
            "input_ids and attention_mask, or with one sample at a time"
        )
    if x.shape[:-1] == mask.shape[:1]:
        return [1] * samples
    if rows == mask.numel():
        return [n for n in mask.sum(1).tolist() if n]
    if len(x) != samples:
        raise CordaError(f"{name} is given {tuple(x.shape)}, from which samples cannot be told: give one at a time")
    return [rows // samples] * samples
