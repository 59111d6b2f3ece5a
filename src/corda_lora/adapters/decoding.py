"""Ranks that change while a text is decoded, on any LoRA of PEFT's whose components are in order (see `order`).

    with decoding_ranks(peft_model, read_order("ordered/"), by_entropy()) as ranks:
        peft_model.generate(**inputs, max_new_tokens=64)

A *rule* gives the share of the whole rank that a token is run with. The prompt is token 0. Token t is the t-th that was
generated, when it is run to predict the next one:

    falling          R(t) = R_max · (1 − (1 − least)·t/tokens), no less than R_max·least
    by_entropy       R = R_max · φ(H) of each sample, H the entropy of the prediction that its token was chosen from
    fixed            R = R_max · share, the prompt's too: what `corda export --r R` writes of an adapter in order

R is shared over the layers by the gains of their components. What lies beyond is zeroed between A and B, so no time is
saved: it shows what an engine could leave out. Nothing of the adapter is changed, and hooks are there within the `with`
alone. Keys and values stay as they were computed: each token's with its own rank. Without a cache, all tokens are run
again at each step, at the ranks that they had.

Several tokens at once count as a prompt: the next turn of a chat on an old cache, a part of a long prompt, a draft that
is verified. Of a draft, tokens may be refused and taken out of the cache; a token that is then run by itself was chosen
from the prediction after those that stayed. A token on another cache than the last forward's (of another text that is
generated meanwhile, or a copy of a prefix's) counts as a prompt, too: what it was chosen from has not been seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..algebra.order import entropy
from ..config import CordaError
from ..models.targets import require_causal
from .lora import lora_layers
from .order import SLACK, Order

# Of the number t of a token and the logits (b, vocabulary) it was chosen from (None for the prompt) → the share of the
# whole rank, in [0, 1]: one for all samples, or (b,).
Rule = Callable[[int, Tensor | None], float | Tensor]
LARGEST_ENTROPY = 14.0  # of a million tokens


def fixed(share: float) -> Rule:
    """Each token, the prompt's too, at this share of the rank. Raises CordaError if it is not in [0, 1]."""
    _check_share("the share", share)
    return lambda t, logits: share


def falling(least: float, tokens: int) -> Rule:
    """From the whole rank down to the share `least` at token number `tokens`, by the same amount each.

    Raises CordaError if `least` is not in [0, 1] or `tokens` is below 1.
    """
    _check_share("least", least)
    if tokens < 1:
        raise CordaError(f"tokens is {tokens}, but the rank falls over at least one")
    return lambda t, logits: 1 - (1 - least) * min(1.0, t / tokens)


def by_entropy(phi: Callable[[Tensor], Tensor] = lambda H: H.clamp(1 / 8, 1)) -> Rule:
    """The share φ(H) of the entropy H (b,), in nats, of the prediction that a token was chosen from; the prompt whole.

    Args:
        phi: of entropies to shares, element by element. Default: H itself, from an eighth to one. It should not reach
            zero: a model is sure of the next token because of its adapter, and without any of it would not be.

    Raises CordaError if φ leaves [0, 1] for an H between 0 and `LARGEST_ENTROPY`.
    """
    grid = torch.linspace(0, LARGEST_ENTROPY, 1401)
    shares = phi(grid)
    if not isinstance(shares, Tensor) or shares.shape != grid.shape:
        raise CordaError("φ must give a share for each entropy of a tensor, as a tensor of its shape")
    for H, share in zip(grid.tolist(), shares.tolist()):
        _check_share(f"φ({H:.2f})", share)
    return lambda t, logits: 1.0 if logits is None else phi(entropy(logits))


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise CordaError(f"{name} is {share:g}, but a share of the rank is between 0 and 1")


class DecodingRanks:
    """See `decoding_ranks`.

    Attributes:
        history: the R of each token that was generated since the last prompt, (b,).
    """

    def __init__(self, order: Order, rule: Rule):
        self.order, self.rule = order, rule
        self.history: list[Tensor] = []
        self.masks: dict[str, Tensor] | None = None  # what of z (b, s, r) is used; None where all is
        self.logits: Tensor | None = None  # (b, s, vocabulary), of the last tokens of the last forward
        self.end = 0  # the length of the text after that forward, where there is a cache
        self.budgets: Tensor | None = None  # R of all tokens (b, s), where there is no cache
        self.ids: Tensor | None = None  # of these tokens
        self.cache: Any = None  # the last forward's, whose beams are followed
        self.beams_before: Any = None  # its own `reorder_cache`, where another `with` follows it, too
        self.needs: dict[torch.device, Tensor] = {}

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the model: the ranks of its tokens."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        x = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        if kwargs.get("cache_params") is not None or getattr(cache, "is_compileable", False):
            raise CordaError("ranks while decoding need a cache that grows with the text: cache_implementation dynamic")
        parents = self._continued(ids) if cache is None and ids is not None else None
        length = 0 if cache is None else cache.get_seq_length()
        refused = self.end - length  # tokens of a draft
        chosen = self.logits if cache is self.cache else None  # what the token was chosen from is in these
        if length and x.shape[1] == 1 and chosen is not None and 0 <= refused < chosen.shape[1]:
            self.logits = chosen[:, : chosen.shape[1] - refused]
            self._use(self._next(x), x)
        elif parents is not None:
            assert self.budgets is not None
            assert self.logits is not None
            self.logits = self.logits[parents]
            new = torch.as_tensor(self._next(x), device=x.device).expand(len(x))
            self.budgets = torch.cat([self.budgets[parents], new[:, None].to(self.budgets)], dim=1)
            self._use(self.budgets, x)
        else:
            R = self._budget(0, None)
            self.history, self.logits = [], None
            self.budgets = torch.full(x.shape[:2], float(R), device=x.device)
            self._use(R, x)
            if cache is not self.cache:
                self.leave()
                self.cache = cache
                if hasattr(cache, "reorder_cache"):
                    self._follow(cache)
        self.ids = ids if cache is None else None
        self.end = length + x.shape[1]

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        self.logits = output.logits.detach()

    def cut(self, name: str, lora_A: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        """The forward hook of a layer's `lora_A`: z = A x (b, s, r) without the components that are not used."""
        if self.masks is None:
            return None
        mask = self.masks[name]  # (r,), (b, 1, r) or (b, s, r)
        if mask.ndim == z.ndim == 3:
            mask = mask[:, -z.shape[1] :]  # an output head runs at the last tokens alone
        if mask.ndim == 3 and z.ndim == 2 and len(z) == mask.shape[0] * mask.shape[1]:
            mask = mask.flatten(0, 1)
        elif mask.ndim == 3 and z.shape != mask.shape:
            raise CordaError(f"{name} is not given one input for each token, so samples cannot have ranks of their own")
        return z * mask.to(z.device, z.dtype)

    def _budget(self, t: int, logits: Tensor | None) -> float | Tensor:
        share = self.rule(t, logits)
        if not isinstance(share, Tensor) or not share.ndim:
            share = float(share)
        elif share.shape != (1,) and (logits is None or share.shape != logits.shape[:1]):
            raise CordaError(
                f"the rule's share of token {t} has the shape {tuple(share.shape)}: give one for all samples, or, "
                "after the prompt, one for each"
            )
        for each in [share] if isinstance(share, float) else share.tolist():
            _check_share(f"the rule's share of token {t}", each)
        return self.order.full * share

    def _next(self, x: Tensor) -> float | Tensor:
        """R of the token that follows, one for all samples or (b,)."""
        assert self.logits is not None
        R = self._budget(len(self.history) + 1, self.logits[:, -1])
        self.history.append(torch.as_tensor(R, device=x.device).expand(len(x)))
        return R

    def _use(self, R: float | Tensor, x: Tensor) -> None:
        """Set the masks for an R of all tokens; of each sample (b,); or of each token (b, s)."""
        if isinstance(R, float):
            if self.order.full <= R:
                self.masks = None
                return
            budgets = torch.tensor(R, device=x.device)
        else:
            budgets = R if R.ndim == 2 else R[:, None]  # (b, s)
        names, needs = list(self.order.needs), self.order.needs
        if self.order.nested:
            by_rank = {len(need): need for need in needs.values()}
            used = {r: need.to(budgets) <= budgets[..., None] + SLACK for r, need in by_rank.items()}
            scaled = {r: mask * (r / mask.sum(-1, keepdim=True).clamp(min=1)) for r, mask in used.items()}
            self.masks = {name: scaled[len(needs[name])] for name in names}
        else:
            if x.device not in self.needs:
                self.needs[x.device] = torch.cat(list(needs.values())).to(x.device, torch.float32)
            mask = self.needs[x.device] <= budgets[..., None] + SLACK  # (..., Σr)
            self.masks = dict(zip(names, mask.split([len(need) for need in needs.values()], dim=-1)))

    def _continued(self, ids: Tensor) -> Tensor | None:
        """Where each sample is one of the last forward and one token more: the rows of those. Else None."""
        last = self.ids
        if last is None or self.logits is None or ids.shape[1] != last.shape[1] + 1:
            return None
        same = (ids[:, None, :-1] == last[None]).all(-1)  # (b, rows of the last forward)
        own = torch.arange(len(ids), device=ids.device)
        if len(ids) == len(last) and bool(same[own, own].all()):
            return own
        return same.int().argmax(1) if bool(same.any(1).all()) else None

    def _follow(self, cache: Any) -> None:
        """Beams change places between two forwards, and the cache is told. A copy of the cache has this method as
        its own."""
        reorder = cache.reorder_cache.__func__

        def follow(told: Any, beams: Tensor) -> None:
            reorder(told, beams)
            if told is self.cache and self.logits is not None:
                self.logits = self.logits[beams.to(self.logits.device)]

        self.beams_before = vars(cache).get("reorder_cache")
        cache.reorder_cache = MethodType(follow, cache)

    def leave(self) -> None:
        """Follow the last prompt's cache no longer, nor hold its keys and values in memory."""
        if self.beams_before is not None:
            self.cache.reorder_cache = self.beams_before
        elif hasattr(self.cache, "reorder_cache"):
            del self.cache.reorder_cache
        self.cache = self.beams_before = None


@contextmanager
def decoding_ranks(
    peft_model: PeftModel, order: Order, rule: Rule, adapter: str = "default"
) -> Iterator[DecodingRanks]:
    """Within the `with`, the model generates with ranks by a rule.

    Args:
        order: see `order.read_order`, and `order.nested_order` for a DyLoRA.
        rule: `fixed`, `falling`, `by_entropy`, or a function of your own: see `Rule`.

    Raises CordaError: the model is no causal language model; the adapter is not active, merged into the weights, no
    plain LoRA, or another than the one in order; the model's cache does not grow with the text.
    """
    base: Any = peft_model.get_base_model()
    require_causal(base)
    if adapter not in getattr(peft_model, "active_adapters", ()):
        raise CordaError(f"the model has no active adapter {adapter!r} whose ranks could change")
    layers = {name: layer for name, layer in lora_layers(peft_model).items() if adapter in layer.r}
    if any(layer.merged for layer in layers.values()):
        raise CordaError("the adapter is merged into the weights: unmerge it, and its ranks can change")
    if any(adapter in layer.lora_variant or adapter not in layer.lora_A for layer in layers.values()):
        raise CordaError("the adapter is no plain LoRA of linear layers (DoRA is none): a prefix is no adapter")
    order.check(peft_model, adapter)
    ranks = DecodingRanks(order, rule)
    hooks = [
        base.register_forward_pre_hook(ranks.before, with_kwargs=True),
        base.register_forward_hook(ranks.after),
        *(layer.lora_A[adapter].register_forward_hook(partial(ranks.cut, name)) for name, layer in layers.items()),
    ]
    try:
        yield ranks
    finally:
        for hook in hooks:
            hook.remove()
        ranks.leave()
