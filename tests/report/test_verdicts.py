"""What figures mean, in sentences: the thresholds, and where the sentences stand."""

import math

import pytest

from corda_lora.demo.run import verdicts as demo_verdicts
from corda_lora.report.verdicts import kept, kept_how, learned, moved, percent, verdicts


def drift_of(share):
    """The drift that moves at most this share, by Pinsker."""
    return 2 * share**2


@pytest.mark.parametrize("drift", [1e-9, 1e-4, 0.045, 0.18, 0.6, 1.0, 2.0, 5.0, 40.0])
def test_no_two_distributions_of_that_divergence_are_further_apart(drift):
    """The bound against pairs of distributions over two tokens: those with just that divergence."""
    for p in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        low, high = p, 1.0  # q between them with KL(p‖q) = drift
        for _ in range(200):
            q = (low + high) / 2
            kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) if 0 < q < 1 else math.inf
            low, high = (q, high) if kl < drift else (low, q)
        assert low - p <= moved(drift) + 1e-6
    assert 0 <= moved(drift) <= 1


@pytest.mark.parametrize(
    ("drift", "how"),
    [
        (0.0, "not changed"),
        (-9e-7, "not changed"),
        (9e-7, "not changed"),
        (1.1e-6, "kept well"),
        (drift_of(0.1499), "kept well"),
        (drift_of(0.1501), "kept in part"),
        (drift_of(0.2999), "kept in part"),
        (drift_of(0.3001), "not kept"),
        (50.0, "not kept"),
    ],
)
def test_how_an_ability_was_kept(drift, how):
    assert kept_how(drift) == how
    assert kept(drift).startswith(f"{how}: ")
    assert ("a lower learning rate" in kept(drift)) == (how in ("kept in part", "not kept"))


def test_figures_in_sentences():
    sentence = "kept well: the probabilities of an answer's tokens moved by at most 3\u00a0% on average"
    assert kept(drift_of(0.03)) == sentence
    assert percent(0.0004) == "0.04\u00a0%"
    assert kept(math.nan) == "broken: the drift is nan"
    assert "at most 100\u00a0% on" in kept(1e6)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (1.0, 1.0 - math.log(1.051), "learned: a token of a right answer is 1.05 times as likely as before"),
        (1.0, 1.0 - math.log(1.049), "hardly learned: "),
        (1.0, 1.0, "hardly learned: a token of a right answer is 1 times"),
        (1.0, 1.0 + math.log(1.049), "hardly learned: "),
        (1.0, 1.0 + math.log(1.051), "worse than before: "),
        (2.0, 1.0, "learned: a token of a right answer is 2.72 times"),
        (1e6, 0.0, "learned: "),
        (1.0, math.nan, "broken: the loss is nan"),
        (1.0, math.inf, "broken: the loss is inf"),
    ],
)
def test_whether_a_task_was_learned(before, after, said):
    assert learned(before, after).startswith(said)


def test_what_quantization_lost_is_not_blamed_on_training():
    sides = {"base": {"loss": 2.0, "tokens": 40}, "tuned": {"loss": 2.5, "drift": 0.9, "tokens": 40}}
    results = {kind: {"data": sides} for kind in ("keep", "text", "learn")}
    blamed = "a part of this is of the quantization, as the adapter's start shows if it is measured alike; a lower"
    assert all(f"on average, {blamed} learning rate" in said for said in verdicts(results, quantized=True))
    assert all("on average, and a lower learning rate" in said for said in verdicts(results))


def test_a_sentence_for_each_data_set():
    base = {"loss": 2.0, "recall": 0.0, "exact_match": 0.0, "tokens": 40}
    tuned = base | {"loss": 1.0, "drift": 0.0018}
    moved_by_three = "kept well: the probabilities of an answer's tokens moved by at most 3\u00a0% on average"
    assert verdicts(
        {
            "keep": {"data/nq.jsonl": {"base": base, "tuned": tuned}},
            "text": {"wiki.txt": {"base": base, "tuned": tuned}},
            "learn": {"sums.csv": {"base": base, "tuned": tuned | {"exact_match": 0.5}}},
        }
    ) == [
        f"keep nq.jsonl: {moved_by_three}; recall was 0 before, so it cannot show anything here.",
        f"text wiki.txt: {moved_by_three}.",
        "learn sums.csv: learned: a token of a right answer is 2.72 times as likely as before, on average; "
        "recall is 0 before and after, so it cannot show anything here.",
    ]
    (alone,) = verdicts({"keep": {"nq": {"base": base}}})
    assert alone.startswith("Only the base model was measured: with --adapter")


def test_the_demo_says_what_its_table_shows():
    def of(loss, drift):
        return {
            "problems": {"base": {"loss": 1.7}, "tuned": {"loss": loss}},
            "facts": {"base": {}, "tuned": {"drift": drift}},
        }

    sentences = demo_verdicts({"CorDA": of(0.031, 0.0232), "LoRA": of(0.027, 0.75)})
    assert [" ".join(sentence.split()[:5]) for sentence in sentences] == [
        "CorDA, word problems: learned: a",
        "CorDA, facts: kept well: the",
        "LoRA, word problems: learned: a",
        "LoRA, facts: not kept: the",
    ]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.45, 0.40, "kept: 5.0% fewer right answers, where 100 questions leave up to 14\u00a0% to chance"),
        (0.45, 0.30, "worse than before: 15.0% fewer right answers"),
        (0.45, 0.60, "better than before: 15.0% more right answers"),
    ],
)
def test_accuracies_beside_chance(before, after, said):
    sides = {"base": {"accuracy": before, "samples": 100}, "tuned": {"accuracy": after, "samples": 100}}
    (sentence,) = verdicts({"choices": {"arc": sides}})
    assert sentence.startswith(f"choices arc: {said}")
