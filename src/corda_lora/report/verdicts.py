"""What figures mean: a plain sentence for each, by stated thresholds.

A drift of D nats moved the probabilities of the next token by at most √(D/2) (Pinsker) and √(1 − e^−D) (Bretagnolle and
Huber), in total variation. Both are concave in D, so they hold for means over tokens, too. In the 1,357 drifts of
benchmarks/results, models had the base model's first choice at 92 % of the tokens of what they kept well (the median;
at least 87 %), at 79 % of what they kept in part (at least 71 %), and at 43 % of what they did not keep.
"""

import math
import os
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from ..config.data import OTHERS_LEAK

KEPT_WELL, KEPT_IN_PART = 0.15, 0.30  # shares of probability that moved, at most
UNCHANGED = 1e-6  # nats: below, a drift is rounding
LEARNED = 1.05  # times as likely as before, at least
OF_QUANTIZATION = "a part of this is of the quantization, as the adapter's start shows if it is measured alike; "

Values = Mapping[str, float]  # {measure: value} of one model on one data set


def moved(drift: float) -> float:
    """The largest share of probability that a drift can have moved from some next tokens to others, on average."""
    drift = max(drift, 0.0)
    return min(math.sqrt(drift / 2), math.sqrt(-math.expm1(-drift)))


def kept_how(drift: float) -> str:
    """ "not changed", "kept well", "kept in part" or "not kept"."""
    if abs(drift) < UNCHANGED:
        return "not changed"
    share = moved(drift)
    return "kept well" if share <= KEPT_WELL else "kept in part" if share <= KEPT_IN_PART else "not kept"


def times_as_likely(before: float, after: float) -> float:
    """How many times as likely a token of a right answer is after training, from the losses (geometric mean)."""
    return math.exp(min(before - after, 700.0))


def verdicts(results: Mapping[str, Any], quantized: bool = False) -> list[str]:
    """A sentence for each data set of `evaluate`'s results whose kind has one.

    Args:
        quantized: whether the tuned model is on weights in 4 bits, and the base model is the full one.
    """
    sentences = []
    for kind, by_data in results.items():
        for data, by_side in by_data.items():
            base, tuned = by_side.get("base", {}), by_side.get("tuned", {})
            parts = [part for part in SENTENCES[kind](base, tuned, quantized) if part] if tuned else []
            if parts:
                sentences.append(f"{kind} {os.path.basename(data)}: {'; '.join(parts)}.")
    models = {side for by_data in results.values() for by_side in by_data.values() for side in by_side}
    if models == {"base"}:
        sentences.append("Only the base model was measured: with --adapter, its changes are judged here.")
    return sentences


def _kept(base: Values, tuned: Values, quantized: bool) -> Iterator[str]:
    drift = tuned.get("drift")
    if drift is not None:
        yield kept(drift, quantized)
    if base.get("recall") == 0:
        yield "recall was 0 before, so it cannot show anything here"


def kept(drift: float, quantized: bool = False) -> str:
    """What a drift means. Over a base in 4 bits (`quantized`) a drift from the full model begins at the quantization's
    own, which training cannot undo."""
    if not math.isfinite(drift):
        return f"broken: the drift is {drift}"
    how = kept_how(drift)
    if how == "not changed":
        return f"{how}: the tuned model predicts what the base model does"
    sentence = f"{how}: the probabilities of an answer's tokens moved by at most {percent(moved(drift))} on average"
    if how == "kept well":
        return sentence
    cause = OF_QUANTIZATION if quantized else "and "
    return f"{sentence}, {cause}a lower learning rate or more samples of it as context would keep more"


def _learned(base: Values, tuned: Values, quantized: bool) -> Iterator[str]:
    if "tokens" not in tuned:
        yield from _labelled(base, tuned)
    elif "loss" in base and "loss" in tuned:
        yield learned(base["loss"], tuned["loss"], quantized)
    for name in ("recall", "exact_match"):
        if base.get(name) == tuned.get(name) == 0:
            yield f"{name.replace('_', ' ')} is 0 before and after, so it cannot show anything here"


def _labelled(base: Values, tuned: Values) -> Iterator[str]:
    """Of a classifier."""
    if not base:
        yield "the base model has no head for these labels, so there is no before to compare with"
    else:
        yield from _chosen(base, tuned)
    if 0 in (tuned.get(name) for name in ("matthews", "pearson", "spearman")):
        yield "not learned: always the same label would be as good"


def learned(before: float, after: float, quantized: bool = False) -> str:
    """What a loss on the task means beside the base model's, for `quantized` as in `kept`."""
    if not math.isfinite(after):
        return f"broken: the loss is {after}"
    times = times_as_likely(before, after)
    sentence = f"a token of a right answer is {times:.3g} times as likely as before, on average"
    if times >= LEARNED:
        return f"learned: {sentence}"
    if times > 1 / LEARNED:
        return f"hardly learned: {sentence}, and more steps or a higher learning rate may help"
    return f"worse than before: {sentence}, {OF_QUANTIZATION if quantized else 'and '}a lower learning rate may help"


def _chosen(base: Values, tuned: Values) -> Iterator[str]:
    """The difference of two accuracies beside the 95 % of differences that chance alone would give."""
    if "accuracy" in base and "accuracy" in tuned:
        p, n = (base["accuracy"] + tuned["accuracy"]) / 2, base["samples"]
        difference, chance = tuned["accuracy"] - base["accuracy"], 1.96 * math.sqrt(2 * p * (1 - p) / n)
        how = "better than before" if difference > chance else "worse than before" if difference < -chance else "kept"
        points = f"{abs(difference):.1%} more" if difference > 0 else f"{abs(difference):.1%} fewer"
        yield f"{how}: {points} right answers, where {n:.0f} questions leave up to {percent(chance)} to chance"


def percent(share: float) -> str:
    """A share as "3 %", and a small one as "0.03 %"."""
    return f"{100 * share:.0f}\u00a0%" if share >= 0.01 else f"{100 * share:.1g}\u00a0%"


SENTENCES = {
    "keep": _kept,
    "text": lambda base, tuned, quantized: _kept({}, tuned, quantized),
    "learn": _learned,
    "choices": lambda base, tuned, quantized: _chosen(base, tuned),
    "tasks": lambda base, tuned, quantized: iter(()),
}


# --- an adapter's start ----------------------------------------------------------------------------------------------

READS_LITTLE, READS_LESS = 1 / 10, 1 / 3  # of what random directions read of the context, at most
READS_MUCH = 2.0  # times what random directions read of it, at least


def start_verdicts(record: Mapping[str, Any]) -> list[str]:
    """What the figures of an adapter's start mean, in sentences.

    What a layer's A reads of the context is tr(A C Aᵀ) / ‖A‖², beside tr(C) / d_in, what random directions read. Unlike
    the leak, it does not depend on the length of A nor on the weights.

    Args:
        record: corda.json.
    """
    config = record["config"]
    errors = {name: layer["context_error"] for name, layer in record["layers"].items() if "context_error" in layer}
    quantized = [_lost(record, errors)] if errors else []
    if config.get("fold"):
        return quantized  # the adapter holds no components
    layers = {name: layer for name, layer in record["layers"].items() if layer.get("input_energy") and layer["norm_A"]}
    if not layers:
        return [
            *quantized,
            "No context oriented the components: nothing here says what the adapter will do to an ability.",
        ]
    reads = {  # rounding may make a leak of nothing a little less than 0
        name: max(layer["leak"], 0.0) / (layer["norm_A"] ** 2 * layer["input_energy"]) for name, layer in layers.items()
    }
    sentences = [(_reads_in_kpm if config["mode"] == "kpm" else _reads_in_ipm)(reads)]
    if config["mode"] == "kpm":
        sentences += _doubts(record)
        if others := record.get("held_out"):
            sentences.append(_others(record["context"]["samples"], **others))
        if config["split"] == "anchored":
            sentences.append(_certificate(config, layers))
    return quantized + sentences


def _lost(record: Mapping[str, Any], errors: Mapping[str, float]) -> str:
    """What quantization lost and the adapter does not make up for.

    Args:
        errors: of each layer, relative, in the metric of the context.
    """
    middle, worst = median(errors.values()), max(errors, key=lambda name: errors[name])
    plain = median(record["layers"][name]["error"] for name in errors)
    return (
        f"quantized: with its adapter a layer is off by {_precise(middle)} of its size on the context (median layer; "
        f"the worst, {worst}: {_precise(errors[worst])}), and by {_precise(plain)} of its weights' length."
    )


def another_function(differs: Mapping[str, float]) -> str:
    """What it means to take an adapter off its quantized base, onto the full model."""
    middle, worst = median(differs.values()), max(differs, key=lambda name: differs[name])
    return (
        f"on the full model this is another function than on the quantized one: with its adapter a layer differs by "
        f"{_precise(middle)} of the weights' length (median; the most, {worst}: {_precise(differs[worst])})."
    )


def _precise(share: float) -> str:
    return f"{100 * share:.2g}\u00a0%"


def _reads_in_kpm(reads: Mapping[str, float]) -> str:
    middle, worst = median(reads.values()), max(reads, key=lambda name: reads[name])
    figures = f"A reads the context {_less(middle)} than random directions would (median layer; the least protected, "
    figures += f"{worst}: {_less(reads[worst])})"
    if middle <= READS_LITTLE:
        return f"good: {figures}."
    how = "fair" if middle <= READS_LESS else "bad"
    return f"{how}: {figures}; a smaller --r leaves only directions that are used less."


def _reads_in_ipm(reads: Mapping[str, float]) -> str:
    middle = median(reads.values())
    figures = f"A reads the task {_times(middle)} as much as random directions would (median layer)"
    return f"good: {figures}." if middle >= READS_MUCH else f"bad: {figures}: a start that says little of the task."


def _doubts(record: Mapping[str, Any]) -> Iterator[str]:
    """Reasons why a start in kpm may keep less than A's reading of the context says."""
    config, context = record["config"], record.get("context", {})
    if (enough := context.get("samples_for_full_rank")) and "held_out" not in record:  # where others say how many
        yield (
            f"but of other samples that says little: the context has {context['tokens']:,} tokens for layers of up to "
            f"{context['widest']:,} inputs; {enough:,} samples would do."
        )
    if record["totals"]["ranks"][1] > 2 * config["r"] and config["preset"] != "corda":
        yield (
            f"but ranks go up to {record['totals']['ranks'][1]}, and such starts drifted ten times more than with "
            f"--min_rank {max(1, config['r'] // 2)} --max_rank {2 * config['r']} (docs/measured.md)."
        )
    if config["split"] == "balanced":
        yield "but in balanced A moves as fast as B, and kept hardly more than LoRA: take anchored (docs/measured.md)."


def _others(shown: int, samples: int, times: float, enough: int) -> str:
    sentence = f"sample: {samples} others leak {_times(times)} as much as the {shown:,} shown (median layer)"
    if enough <= shown:
        return f"{sentence}; for the directions of A that is enough, while a price (--keep) goes on gaining by more."
    return f"{sentence}; with about {float(f'{enough:.2g}'):,.0f} it would be {OTHERS_LEAK:g} times."


def _certificate(config: Mapping[str, Any], layers: Mapping[str, Any]) -> str:
    r, alpha = config["r"], config["lora_alpha"]
    scale = 1.0 if alpha is None else alpha / (math.sqrt(r) if config["use_rslora"] else r)
    moves = [scale * math.sqrt(max(layer["leak"], 0.0) / (layer["output_energy"] or 1.0)) for layer in layers.values()]
    return (
        "certificate: whatever is trained, a layer's output on these samples moves by at most ‖B‖₂ times "
        f"{percent(median(moves))} of its size (median layer; {percent(max(moves))} at most)."
    )


def _less(share: float) -> str:
    return f"{_times(1 / share)} less" if share > 1e-6 else "over a million times less"


def _times(x: float) -> str:
    return f"{x:,.0f} times" if x >= 10 else f"{x:.2g} times"
