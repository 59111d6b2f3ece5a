"""Collect the covariances of layers' inputs while batches run through a model.

This takes more than a hook for three reasons. Layers that are given the same tensor (q, k and v; gate and up) share one
covariance. Padding is left out of every covariance. Every round of the context has covariances of its own.

A layer may be called twice in one forward: DeBERTa's key projection is given the hidden states, as the value projection
is, and then the embeddings of the relative positions, as the query projection is. So sums are kept for each call, and a
layer's covariance is the sum over its calls.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.covariance import HALF, Covariance
from ..config import CordaError
from ..models.weights import weight_shape
from .context import Batch, Context, counted_tokens, has_decoder, token_masks


class Group(NamedTuple):
    """Layers that share their input.

    Attributes:
        members: their names.
        covariances: C (d_in, d_in) of that input, one for each round; empty if the layers were not run, or another
            process has them (see `share`).
    """

    members: list[str]
    covariances: list[Tensor]


class Tokens(NamedTuple):
    """The tokens of one batch, on the CPU.

    Attributes:
        real: (b, s) bool, which are not padding.
        counted: (b, s) bool, which of these count (see `counted_tokens`).
    """

    real: Tensor
    counted: Tensor


Call = tuple[str, int]  # a layer, and how often it was called before in the same forward


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
        self.counted = counted_tokens(model, context)
        self.numbers, self.begin = context.numbers, context.begin
        self.abilities = [ability.name for ability in context.abilities]
        self.counts: dict[str, int] = {}
        self.covariances: dict[Call, dict[int, Covariance]] = {}  # call -> round -> sum
        self.leaders: dict[Call, Call] = {}  # call -> the call of another layer whose sum it shares
        self.first_batch: dict[Call, int] = {}  # call -> the batch in which it was made first
        self.finite: dict[str, list[tuple[int, Tensor]]] = {}  # layer -> (batch, (samples,) or () bool)
        encoder: nn.Module | None = model.get_encoder() if self.has_decoder else None  # type: ignore[operator]
        self.encoder = encoder
        self.in_encoder = set(encoder.modules()) if encoder is not None else set()
        self.encoded: dict[int, weakref.ref[Tensor]] = {}  # batch -> the encoder's output
        self.tokens: list[tuple[Tokens | None, Tokens | None]] = []  # batch -> the encoder's tokens, the decoder's
        self.not_flattened: set[int] = set()  # batches of which a layer was given (b, s, d)
        self.rows: dict[tuple[int, bool], Tensor] = {}  # see `_counted_rows`
        self.first_sample: list[int] = []  # batch -> number of its first sample
        self.rounds: list[int] = []  # batch -> its round
        self.samples = 0
        for batch, round in zip(context.batches, context.rounds or [0] * len(context.batches)):
            self.add(batch, round)
        self.start(0)

    def add(self, batch: Batch | None, round: int = 0) -> None:
        """One more batch, which runs next. None stands for calls of which nothing is known: what a layer is given in
        them is one sample without padding, and shared with no other layer."""
        tokens = decoder_tokens = None
        if batch is not None:
            real, decoder_real = token_masks(batch, self.has_decoder)
            counted, decoder_counted = self.counted(batch)
            tokens = Tokens(real, counted)
            if decoder_real is not None and decoder_counted is not None:
                decoder_tokens = Tokens(decoder_real, decoder_counted)
        self.tokens.append((tokens, decoder_tokens))
        self.first_sample.append(self.samples)
        self.rounds.append(round)
        self.samples += 0 if tokens is None else len(tokens.real)
        self.start(len(self.tokens) - 1)

    def start(self, index: int) -> None:
        self.batch = index
        self.inputs: list[tuple[weakref.ref[Tensor], Call]] = []  # inputs seen since, and the call that got each first
        self.calls: Counter[str] = Counter()  # of each layer, since

    def stop(self) -> None:
        """What runs from now until the next `start` is not listened to."""
        self.batch = -1

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
        if self.batch < 0:
            return
        x = args[0].detach() if args[0].requires_grad else args[0]  # (b, s, d), (b, d) or (b·s, d)
        name, tokens = self.names[module], self._tokens_of(module, args[0])
        call = (name, 0)
        if tokens is not None:
            call = (name, self.calls[name])
            self.calls[name] += 1
            if self._shares(call, args[0]):
                return
        if call in self.leaders:
            raise RuntimeError(f"{name} shared its input with {self.leaders[call][0]} in an earlier batch, but not now")
        if tokens is not None and x.ndim == 3 and x.shape[:2] == tokens.real.shape:
            self.not_flattened.add(self.batch)
        is_table = tokens is not None and self._is_table(tokens, x)
        rows = None if tokens is None or is_table else self._counted_rows(tokens, name, x)
        flat = x.reshape(-1, x.shape[-1])  # (t, d)
        self.finite.setdefault(name, []).append((self.batch, self._finite(x, rows)))
        lengths = _sample_lengths(tokens, name, x, is_table) if self.per_sample else []
        if rows is not None:
            flat = flat.index_select(0, rows)
        elif tokens is not None and is_table:  # every sample is given it
            flat = flat.repeat(len(tokens.real), 1)
        covariance = self.covariances.setdefault(call, {}).setdefault(self.rounds[self.batch], Covariance())
        if self.per_sample:
            covariance.add_samples(flat, lengths)
        else:
            covariance.add(flat)

    def _shares(self, call: Call, x: Tensor) -> bool:
        """Whether another layer was given the same tensor in this batch. That layer accumulates it for both."""
        for ref, leader in self.inputs:
            if ref() is x and leader[0] != call[0]:
                if call not in self.covariances and self.first_batch[leader] == self.batch:
                    self.leaders.setdefault(call, leader)
                if self.leaders.get(call) == leader:
                    return True
        self.first_batch.setdefault(call, self.batch)
        self.inputs.append((weakref.ref(x), call))
        return False

    def _tokens_of(self, module: nn.Module, x: Tensor) -> Tokens | None:
        """The tokens that a layer's input is about, in the batch that runs; None if they are not known."""
        tokens, decoder_tokens = self.tokens[self.batch]
        if decoder_tokens is not None and module not in self.in_encoder:
            encoded = self.encoded.get(self.batch, lambda: None)()
            tokens = tokens if x is encoded else decoder_tokens
        return tokens

    def _is_table(self, tokens: Tokens, x: Tensor) -> bool:
        """Whether x is one table (1, k, d) for all samples, such as the embeddings of relative positions.

        As many rows as tokens may be these, flattened. But not where the model has given a layer (b, s, d).
        """
        if x.ndim != 3 or len(x) > 1 or (len(tokens.real) == 1 and not bool(tokens.real.all())):
            return False
        sizes = (tokens.real.numel(), int(tokens.real.sum()))
        return x.shape[1] not in sizes or (len(tokens.real) > 1 and self.batch in self.not_flattened)

    def rows_of(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Numbers of the rows of x.reshape(-1, d) that count in the input x of a layer, on x's device; None if all do.
        Padding and skipped tokens do not count."""
        tokens = self._tokens_of(module, x)
        if tokens is None or self._is_table(tokens, x):
            return None
        return self._counted_rows(tokens, self.names[module], x)

    def _counted_rows(self, tokens: Tokens, name: str, x: Tensor) -> Tensor | None:
        """Numbers of the rows of x.reshape(-1, d) that count, on x's device; None if all do.

        The rows are all tokens of the batch, or the real ones alone (a model that takes padding out), or one pooled
        vector a sample.
        """
        real, counted = tokens
        rows = x.shape[:-1].numel()
        if bool(counted.all()) or x.shape[:-1] == counted.shape[:1]:
            return None
        packed = rows != counted.numel()
        if packed and rows != int(real.sum()):
            raise CordaError(
                f"{name} is given {tuple(x.shape)} in a batch of {tuple(real.shape)} tokens, from which padding cannot "
                "be told: give each sample in a batch of its own, cut to its own tokens"
            )
        key = (id(counted), packed)
        if key not in self.rows:  # moved once: so large a copy can make the host wait
            counts = counted[real] if packed else counted.flatten()
            self.rows[key] = counts.nonzero().flatten().to(x.device, non_blocking=True)
        return self.rows[key]

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
        self._check_finite(names)
        groups, sums = [], self.take_sums(names)
        while sums:  # popped: a sum is turned into a mean in its own memory
            members, of_rounds = sums.pop(0)
            got = {round for round, s in of_rounds.items() if s.count}
            means = [s.mean() for _, s in sorted(of_rounds.items()) if s.count]
            self.counts |= dict.fromkeys(members, sum(s.count for s in of_rounds.values()))
            del of_rounds
            if len(means) == self.round_count:
                groups.append(Group(members, means))
            elif means and self.abilities:
                missing = next(k for k in range(len(self.abilities)) if k not in got)
                raise CordaError(
                    f"{members[0]} got no token of {self.abilities[missing]}: give more samples of it, or leave the "
                    "layer out"
                )
            elif means:
                raise CordaError(f"{members[0]} got no token in some of the rounds: give fewer rounds or more samples")
        return groups

    @property
    def round_count(self) -> int:
        return len(set(self.rounds))

    def _check_finite(self, names: Sequence[str]) -> None:
        for name in names:
            checks = self.finite.pop(name, [])
            # Synchronizes once for all batches.
            if not checks or bool(torch.stack([finite.all() for _, finite in checks]).all()):
                continue
            for batch, finite in checks:
                if not bool(finite.all()):
                    sample = self._first_not_finite(batch, finite)
                    raise CordaError(f"Invalid value found in input of {name}, {sample}: NaN or Inf")

    def take_sums(self, names: Sequence[str]) -> list[tuple[list[str], dict[int, Covariance]]]:
        """The named layers that were run, in groups that share their input, with the sums of each round; these are then
        forgotten."""
        members_of: dict[tuple[Call, ...], list[str]] = {}  # the calls that hold a layer's sums -> such layers
        for name in names:
            calls = [(name, 0)]
            while (following := (name, len(calls))) in self.covariances or following in self.leaders:
                calls.append(following)
            held = tuple(self.leaders.get(call, call) for call in calls)
            if held[0] in self.covariances:
                members_of.setdefault(held, []).append(name)
        sums = {held: [self.covariances[call] for call in held] for held in members_of}
        for parts in sums.values():  # before any sum is turned into a mean in its own memory
            if len(parts) > 1:
                parts[:] = [_added(parts)]
        for held in sums:
            for call in held:
                self.covariances.pop(call, None)
        return [(members, sums.pop(held)[0]) for held, members in members_of.items()]

    def _first_not_finite(self, batch: int, finite: Tensor) -> str:
        """Names the first sample of a batch that is not finite, or the batch if its samples cannot be told apart."""
        tokens, _ = self.tokens[batch]
        if tokens is None or finite.numel() != len(tokens.real):
            return f"batch {self.begin + batch} of the context (counted from 0)"
        sample = self.first_sample[batch] + int((~finite).nonzero()[0])
        return f"sample {self.numbers[sample] if self.numbers else sample} of the context (counted from 0)"


class Gradients:
    """Sums g gᵀ of the gradients g at the layers' outputs, over the rows that a `Collector` counts, of all rounds
    together or of each ability."""

    def __init__(self, collector: Collector):
        self.collector = collector
        numbers = range(max(1, len(collector.abilities)))
        self.sums = {(name, number): Covariance() for name in collector.layers for number in numbers}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the layers, for as long as the `with` block lasts."""
        hooks = [module.register_forward_hook(self._on_output) for module in self.collector.layers.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        collector = self.collector
        number = collector.rounds[collector.batch] if collector.abilities else 0
        rows, total = collector.rows_of(module, args[0]), self.sums[collector.names[module], number]

        def add(gradient: Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1])
            total.add(flat if rows is None else flat.index_select(0, rows))

        output.requires_grad_().register_hook(add)

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        """D (m, m) of the named layers, or (abilities, m, m); the sums are then forgotten. Zero where no answer hangs
        on a layer.

        Raises CordaError if a gradient had NaN or Inf.
        """
        found: dict[str, list[Tensor]] = {}
        for number in range(max(1, len(self.collector.abilities))):
            for name, total in self.take_sums(names, number).items():
                m, _ = weight_shape(self.collector.layers[name])
                found.setdefault(name, []).append(total.mean() if total.count else torch.zeros(m, m))
        Ds = {}
        for name in list(found):
            parts = found.pop(name)  # those of each ability are freed when they are stacked
            like = next((part for part in parts if part.device.type != "cpu"), parts[0])
            D = torch.stack([part.to(like) for part in parts]) if self.collector.abilities else parts[0]
            if not bool(D.diagonal(dim1=-2, dim2=-1).isfinite().all()):
                raise CordaError(f"Invalid value found in the gradient at the output of {name}: NaN or Inf")
            Ds[name] = D
        return Ds

    def take_sums(self, names: Sequence[str], number: int) -> dict[str, Covariance]:
        """The sums of the named layers, of one ability; of all rounds where there are none."""
        return {name: self.sums.pop((name, number)) for name in names}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without gradients of parameters, for a `with` block."""
    trained, training = [p for p in model.parameters() if p.requires_grad], model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)


def _added(parts: Sequence[Mapping[int, Covariance]]) -> dict[int, Covariance]:
    """The sums of several calls, added up round by round."""
    added: dict[int, Covariance] = {}
    for part in parts:
        for round, covariance in part.items():
            total = added.setdefault(round, Covariance())
            if covariance.total is not None:
                total.total = covariance.total.clone() if total.total is None else total.total + covariance.total
            total.count += covariance.count
    return added


def _sample_lengths(tokens: Tokens | None, name: str, x: Tensor, is_table: bool) -> list[int]:
    """How many counted rows of x.reshape(-1, d) each sample has; samples without any are left out."""
    rows = x.shape[:-1].numel()
    samples = len(tokens.real) if tokens is not None else len(x) if x.ndim > 2 else 1
    if samples == 1 and (tokens is None or rows != tokens.real.numel()):
        return [rows] if rows else []
    if tokens is None:
        raise CordaError(
            f"{name} is given {samples} samples in a call whose padding is not known: call the model itself with "
            "input_ids and attention_mask, or with one sample at a time"
        )
    if x.shape[:-1] == tokens.real.shape[:1]:
        return [1] * samples
    if is_table:
        return [rows] * samples
    if rows in (tokens.real.numel(), int(tokens.real.sum())):
        return [n for n in tokens.counted.sum(1).tolist() if n]
    if len(x) != samples:
        raise CordaError(f"{name} is given {tuple(x.shape)}, from which samples cannot be told: give one at a time")
    return [rows // samples] * samples
