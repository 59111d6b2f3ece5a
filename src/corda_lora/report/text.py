"""Numbers and names as text."""

import math
from collections.abc import Callable
from typing import Any

from ..compare.frontier import Ability, Estimate, Setting, abilities, is_finite, swept_text


def labels_of(comparison: dict[str, Any]) -> list[str]:
    """The labels of the compared classifiers; none of language models."""
    model = comparison["recipe"].get("model")
    return (model.get("labels") or []) if isinstance(model, dict) else []


def loss_unit(comparison: dict[str, Any]) -> str:
    """What the task loss is counted in."""
    labels = labels_of(comparison)
    return "nats per text" if len(labels) > 1 else "squared error" if labels else "nats per token"


def number(value: Any, digits: int = 3) -> str:
    """The value with `digits` significant digits; with an exponent only if it is below 1e-4 or from 1e6 on."""
    if not is_finite(value):
        return "—"
    if value and not 1e-4 <= abs(value) < 1e6:
        return rate_text(float(f"{value:.{digits - 1}e}"))
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(decimals, 0)}f}"


def rate_text(rate: float) -> str:
    """For example 5e-4 for 0.0005."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def setting_text(setting: Setting) -> str:
    """For example 5e-4, or "5e-4, keep 10" with a swept option."""
    return ", ".join(filter(None, [rate_text(setting.rate), swept_text(setting.swept)]))


def times_text(ratio: float) -> str:
    """A ratio of drifts with two significant digits, or three from 100 on."""
    return number(ratio, 2 if ratio < 100 else 3)


def spread(e: Estimate, text: Callable[[float], str]) -> str:
    """The interval of a drift or of a ratio of drifts, as text.

    An interval over a factor of more than 100 is left out: two rates with nearly the same loss can lead to one."""
    if e.low is None or e.high is None:
        return ""
    return "not settled by its seeds" if e.high > 100 * e.low else f"{text(e.low)} to {text(e.high)}"


def plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def counts(not_done: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in not_done.items())


def label(comparison: dict[str, Any], ability: Ability) -> str:
    """An ability's name, with its kind if another ability has the same name."""
    kind, name = ability
    return f"{name} ({kind})" if [other for _, other in abilities(comparison)].count(name) > 1 else name


def titles_of(comparison: dict[str, Any]) -> dict[str, str]:
    return {method: about["title"] for method, about in comparison["methods"].items()}
