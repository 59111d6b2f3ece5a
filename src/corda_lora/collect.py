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

from .config import CordaError
from .covariance import Covariance


class Collector:
    """Accumulates a `Covariance` for each of `layers` while their modules run.

    Call `start(index)` before batch `index` runs on; `take` hands over the covariances of layers that are done.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Mapping[str, Any]],
        numbers: Sequence[Any] | None = None,
        rounds: Sequence[int] | None = None,
    ):
        self.layers = layers
        self.rounds = rounds or [0] * len(batches)  # of each batch
        self.names = {module: name for name, module in layers.items()}
        has_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.masks = [token_masks(batch, has_decoder) for batch in batches]
        self.starts = [sum(len(m[0]) for m in self.masks[:i]) for i in range(len(batches))]  # each batch's first sample
        self.numbers = numbers or range(sum(len(m[0]) for m in self.masks))  # what the samples are called
        self.covariances: dict[str, dict[int, Covariance]] = {}  # layer -> round -> sum
        self.leaders: dict[str, str] = {}  # layer -> the layer whose covariance it shares
        self.first_batch: dict[str, int] = {}
        self.finite: dict[str, list[tuple[int, Tensor]]] = {}  # layer -> (batch, (samples,) or () bool)
        encoder: nn.Module | None = model.get_encoder() if has_decoder else None  # type: ignore[operator]
        self.encoder = encoder
        self.in_encoder = set(encoder.modules()) if encoder is not None else set()
        self.encoded: dict[int, weakref.ref[Tensor]] = {}  # batch -> the encoder's output
        self.start(0)

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
        name = self.names[module]
        for ref, leader in self.inputs:
            if ref() is args[0] and leader != name:
                if name not in self.covariances and self.first_batch[leader] == self.batch:
                    self.leaders.setdefault(name, leader)
                if self.leaders.get(name) == leader:
                    return
        self.first_batch.setdefault(name, self.batch)
        if name in self.leaders:
            raise RuntimeError(f"{name} shared its input with {self.leaders[name]} in an earlier batch, but not now")
        self.inputs.append((weakref.ref(args[0]), name))
        rows = self._real_tokens(module, name, args[0])
        flat = x.reshape(-1, x.shape[-1])  # (t, d)
        self.finite.setdefault(name, []).append((self.batch, self._finite(x, rows)))
        if rows is not None:
            flat = flat.index_select(0, rows.to(x.device, non_blocking=True))
        self.covariances.setdefault(name, {}).setdefault(self.rounds[self.batch], Covariance()).add(flat)

    def _real_tokens(self, module: nn.Module, name: str, x: Tensor) -> Tensor | None:
        """Numbers of the rows of x.reshape(-1, d) that are not padding; None for all."""
        mask, decoder_mask = self.masks[self.batch]
        if decoder_mask is not None and module not in self.in_encoder:
            encoded = self.encoded.get(self.batch, lambda: None)()
            mask = mask if x is encoded else decoder_mask
        if bool(mask.all()) or x.shape[:-1] == mask.shape[:1]:  # no padding; or one pooled vector a sample
            return None
        if x.shape[:-1].numel() != mask.numel():
            raise CordaError(
                f"{name} is given {tuple(x.shape)}, from which padding cannot be told: give batches without padding"
            )
        return mask.flatten().nonzero().flatten()

    def _finite(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """(b,) whether each sample's numbers are finite; what is padding does not count. No wait for the device."""
        finite = torch.isfinite(x).all(-1)  # (b, s), (b,) or (b·s,)
        if rows is not None:
            real = torch.zeros(finite.numel(), dtype=torch.bool, device=x.device)
            real[rows.to(x.device, non_blocking=True)] = True
            finite = finite | ~real.reshape(finite.shape)
        return finite.all(-1) if finite.ndim == 2 else finite

    def take(self, names: Sequence[str]) -> list[tuple[list[str], list[Tensor]]]:
        """The layers that shared their input, and its C (d_in, d_in) in each round, group by group; the sums are then
        forgotten. Layers that were never run are missing.

        Raises:
            CordaError: an input had NaN or Inf; names the layer and the sample. A round with no token for a layer that
                others have.
        """
        for name in names:
            for batch, finite in self.finite.pop(name, []):
                if not bool(finite.all()):
                    bad = int((~finite).nonzero()[0])
                    per_sample = finite.numel() == len(self.masks[batch][0])
                    where = f"sample {self.numbers[self.starts[batch] + bad]}" if per_sample else f"batch {batch}"
                    raise CordaError(f"NaN or Inf in the input of {name}, {where} of the context (counted from 0)")
        groups: dict[str, list[str]] = {}
        for name in names:
            if self.leaders.get(name, name) in self.covariances:
                groups.setdefault(self.leaders.get(name, name), []).append(name)
        taken = []
        for leader, members in groups.items():
            sums = self.covariances.pop(leader)
            means = [s.mean() for _, s in sorted(sums.items()) if s.tokens]
            del sums
            if len(means) == len(set(self.rounds)):
                taken.append((members, means))
            elif means:
                raise CordaError(f"{leader} got no token in some of the rounds: give fewer rounds or more samples")
        return taken


def token_masks(batch: Mapping[str, Any], has_decoder: bool = False) -> tuple[Tensor, Tensor | None]:
    """Which tokens of a batch are real: (b, s) bool on the CPU, and the same for a decoder's inputs if there is one.

    Padding is what `attention_mask` (`decoder_attention_mask`) says; without the latter, a decoder's padding is where
    `labels` are -100. Without any mask every token is real.
    """
    ids = next((batch[k] for k in ("input_ids", "inputs_embeds") if batch.get(k) is not None), None)
    if ids is None:
        raise CordaError(f"a batch needs input_ids or inputs_embeds, but has only {', '.join(batch) or 'nothing'}")
    mask = batch.get("attention_mask")
    mask = torch.ones(ids.shape[:2]) if mask is None or mask.ndim != 2 else mask
    decoder = None
    if has_decoder:
        decoder = batch.get("decoder_attention_mask")
        if decoder is None and batch.get("labels") is not None:
            decoder = batch["labels"] != -100
        if decoder is None:
            decoder = torch.ones(batch["decoder_input_ids"].shape[:2])
    return mask.bool().cpu(), None if decoder is None else decoder.bool().cpu()
