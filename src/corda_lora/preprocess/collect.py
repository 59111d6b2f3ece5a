"""Collect the covariances of layers' inputs while batches run through a model.

Three things make this more than a hook: layers that are given the same tensor (q, k and v; gate and up) share one
covariance, padding is left out of every one, and every round of the context has its own.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.covariance import HALF, Covariance
from ..config import CordaError


class Collector:
    """Accumulates a `Covariance` for each of `layers` while their modules run.

    Call `start(index)` before batch `index` runs on; `take` hands over the covariances of layers that are done.

    Args:
        per_sample: normalize as PEFT does, see `Covariance.add_samples`.
        skip_tokens: of each sample, how many real tokens at its beginning are left out.

    Attributes:
        counts: of the layers taken, the rows (or samples) that the covariance is the mean of.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Mapping[str, Any]] = (),
        numbers: Sequence[Any] | None = None,
        rounds: Sequence[int] | None = None,
        per_sample: bool = False,
        skip_tokens: int = 0,
    ):
        self.layers = layers
        self.names = {module: name for name, module in layers.items()}
        self.has_decoder = has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.per_sample = per_sample
        self.skip_tokens = skip_tokens
        self.numbers = numbers  # what the samples are called
        self.counts: dict[str, int] = {}
        self.covariances: dict[str, dict[int, Covariance]] = {}  # layer -> round -> sum
        self.leaders: dict[str, str] = {}  # layer -> the layer whose covariance it shares
        self.first_batch: dict[str, int] = {}
        self.finite: dict[str, list[tuple[int, Tensor]]] = {}  # layer -> (batch, (samples,) or () bool)
        encoder: nn.Module | None = model.get_encoder() if has_decoder else None  # type: ignore[operator]
        self.encoder = encoder
        self.in_encoder = set(encoder.modules()) if encoder is not None else set()
        self.encoded: dict[int, weakref.ref[Tensor]] = {}  # batch -> the encoder's output
        self.masks: list[tuple[Tensor | None, Tensor | None]] = []  # of each batch, see `token_masks`
        self.rows: dict[int, Tensor] = {}  # identity of a mask -> numbers of its real tokens, on the device
        self.starts: list[int] = []  # each batch's first sample
        self.rounds: list[int] = []
        self.samples = 0
        for batch, round in zip(batches, rounds or [0] * len(batches)):
            self.add(batch, round)
        self.start(0)

    def add(self, batch: Mapping[str, Any] | None, round: int = 0) -> None:
        """One more batch, which runs next. None: calls of which nothing is known. What a layer is given in them is one
        sample, all of it real, and shared with no other layer."""
        mask, decoder_mask = (None, None) if batch is None else token_masks(batch, self.has_decoder, self.skip_tokens)
        self.masks.append((mask, decoder_mask))
        self.starts.append(self.samples)
        self.rounds.append(round)
        self.samples += 0 if mask is None else len(mask)
        self.start(len(self.masks) - 1)

    def start(self, index: int) -> None:
        self.batch = index
        self.inputs: list[tuple[weakref.ref[Tensor], str]] = []  # inputs met since, alive, and who met them first

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the layers, for as long as the context lasts."""
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
        """Whether a layer is given what another was given in this batch, which accumulates it for both."""
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
        """Numbers of the rows of x.reshape(-1, d) that are not padding, on its device; None for all."""
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
        """(b,) whether each sample's numbers are finite; what is padding does not count. No wait for the device."""
        precise = torch.float32 if x.dtype in HALF else x.dtype
        finite = torch.linalg.vector_norm(x, dim=-1, dtype=precise).isfinite()  # (b, s), (b,) or (b·s,); in one pass
        if rows is not None:
            real = torch.zeros(finite.numel(), dtype=torch.bool, device=x.device)
            real.index_fill_(0, rows, True)
            finite = finite | ~real.reshape(finite.shape)
        return finite.flatten(1).all(-1) if finite.ndim > 1 else finite

    def take(self, names: Sequence[str]) -> list[tuple[list[str], list[Tensor]]]:
        """The layers that shared their input, and its C (d_in, d_in) in each round, group by group; the sums are then
        forgotten. Layers that were never run are missing.

        Raises:
            CordaError: an input had NaN or Inf; names the layer and the sample. A round with no token for a layer that
                others have.
        """
        for name in names:
            found = self.finite.pop(name, [])
            if not found or bool(torch.stack([finite.all() for _, finite in found]).all()):  # waits for the device once
                continue
            for batch, finite in found:
                if not bool(finite.all()):
                    where = self._where(batch, finite)
                    raise CordaError(f"Invalid value found in input of {name}, {where}: NaN or Inf")
        groups: dict[str, list[str]] = {}
        for name in names:
            if self.leaders.get(name, name) in self.covariances:
                groups.setdefault(self.leaders.get(name, name), []).append(name)
        taken = []
        for leader, members in groups.items():
            sums = self.covariances.pop(leader)
            means = [s.mean() for _, s in sorted(sums.items()) if s.count]
            self.counts |= dict.fromkeys(members, sum(s.count for s in sums.values()))
            del sums
            if len(means) == len(set(self.rounds)):
                taken.append((members, means))
            elif means:
                raise CordaError(f"{leader} got no token in some of the rounds: give fewer rounds or more samples")
        return taken

    def _where(self, batch: int, finite: Tensor) -> str:
        """Names the first sample of a batch that is not finite; the batch, if that is all that is known."""
        mask, _ = self.masks[batch]
        if mask is None or finite.numel() != len(mask):
            return f"batch {batch} of the context (counted from 0)"
        sample = self.starts[batch] + int((~finite).nonzero()[0])
        return f"sample {self.numbers[sample] if self.numbers else sample} of the context (counted from 0)"


def _sample_lengths(mask: Tensor | None, name: str, x: Tensor) -> list[int]:
    """How many real rows of x.reshape(-1, d) each sample has, without those that have none."""
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


def token_masks(
    batch: Mapping[str, Any], has_decoder: bool = False, skip_tokens: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Which tokens of a batch are real: (b, s) bool on the CPU, and the same for a decoder's inputs if there is one;
    without the first `skip_tokens` of each sample.

    Padding is what `attention_mask` (`decoder_attention_mask`) says; without the latter, a decoder's padding is where
    `labels` are -100. Without any mask every token is real. (Of a mask that also covers what is in a cache, the end.)
    """
    ids = next((batch[k] for k in ("input_ids", "inputs_embeds") if batch.get(k) is not None), None)
    if ids is None:
        raise CordaError(f"a batch needs input_ids or inputs_embeds, but has only {', '.join(batch) or 'nothing'}")
    mask = batch.get("attention_mask")
    mask = torch.ones(ids.shape[:2]) if mask is None or mask.ndim != 2 else mask[:, -ids.shape[1] :]
    decoder = None
    if has_decoder:
        decoder = batch.get("decoder_attention_mask")
        if decoder is None and batch.get("labels") is not None:
            decoder = batch["labels"] != -100
        if decoder is None:  # BART makes its decoder's inputs of the encoder's
            decoder_ids = batch.get("decoder_input_ids")
            decoder = mask if decoder_ids is None else torch.ones(decoder_ids.shape[:2])
    masks = [None if m is None else m.bool().cpu() for m in (mask, decoder)]
    mask, decoder = [None if m is None else m & (m.cumsum(1) > skip_tokens) for m in masks]
    assert mask is not None
    return mask, decoder
