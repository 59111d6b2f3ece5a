"""What is measured, against loops over single samples in float64."""

import json
import math

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corda_lora import CordaConfig, CordaError, get_corda_model
from corda_lora.config import DataConfig, EvalConfig
from corda_lora.data.batches import Encoded, encode
from corda_lora.data.samples import Sample
from corda_lora.evaluation import generation
from corda_lora.evaluation.answers import sides
from corda_lora.evaluation.choices import read_choices
from corda_lora.evaluation.evaluate import evaluate, loss_and_drift, measured_samples, text_windows
from corda_lora.evaluation.generation import matches, read_continuations
from corda_lora.evaluation.measures import accuracy, exact_match, means

SAMPLES = [
    Sample("What is 2 + 2?", " 4", {}),
    Sample("Name a colour, please:", " blue, or green", {}),
    Sample("", "only text here", {}),
    Sample("Hm?", " x", {}),
    Sample("a" * 30, "b" * 9, {}),
]


@torch.no_grad()
def log_probs(model, ids, first, on):
    """log p of each token from `first` on, over the vocabulary, of one sample, float64."""
    if on:
        logits = model(input_ids=torch.tensor([ids])).logits
    else:
        with model.disable_adapter():
            logits = model(input_ids=torch.tensor([ids])).logits
    return logits[0, first - 1 : -1].double().log_softmax(-1)


def encoded_samples(tokenizer):
    return [encode(tokenizer, s, 99, end=True) for s in SAMPLES]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10**6])
def test_loss_and_drift_are_those_of_a_plain_loop(adapted, tokenizer, batch_tokens):
    encoded = encoded_samples(tokenizer)
    loss, kl, agree, recalled, tokens = {False: 0.0, True: 0.0}, 0.0, 0, {False: 0, True: 0}, 0
    for ids, n in ((e.ids, e.start) for e in encoded):
        p = {on: log_probs(adapted, ids, n, on) for on in (False, True)}
        answer = torch.tensor(ids[n:])
        for on in p:
            loss[on] -= float(p[on].gather(1, answer[:, None]).sum())
            recalled[on] += bool((p[on].argmax(1) == answer).all())
        kl += float((p[False].exp() * (p[False] - p[True])).sum())
        agree += int((p[False].argmax(1) == p[True].argmax(1)).sum())
        tokens += len(answer)
    results = loss_and_drift(adapted, tokenizer, encoded, batch_tokens)
    for side, on in (("base", False), ("tuned", True)):
        assert results[side]["tokens"] == tokens
        assert results[side]["loss"] == pytest.approx(loss[on] / tokens, rel=1e-5)
        assert results[side]["recall"] == recalled[on] / len(encoded)
    assert results["tuned"]["drift"] == pytest.approx(kl / tokens, rel=1e-4)
    assert results["tuned"]["agreement"] == agree / tokens
    assert results["tuned"]["drift"] > 0.01
    assert results["tuned"]["agreement"] < 1


def test_an_untouched_adapter_has_no_drift(tokenizer):
    for split in ("paper", "balanced", "anchored", "seeded"):
        model = get_corda_model(tiny.build("llama"), CordaConfig(r=4, split=split), tiny.batches(), progress=False)
        results = loss_and_drift(model.eval(), tokenizer, encoded_samples(tokenizer), 60)
        assert results["tuned"]["drift"] == 0
        assert results["tuned"]["agreement"] == 1
        assert results["tuned"]["loss"] == results["base"]["loss"]


def test_a_base_model_alone(tokenizer):
    results = loss_and_drift(tiny.build("llama"), tokenizer, encoded_samples(tokenizer))
    assert results.keys() == {"base"}


def test_nothing_to_measure(tokenizer):
    with pytest.raises(CordaError, match="no sample has a response"):
        loss_and_drift(tiny.build("llama"), tokenizer, [encode(tokenizer, Sample("all prompt", "", {}), 99)])
    with pytest.raises(CordaError, match="nothing to measure"):
        evaluate(tiny.build("llama"), tokenizer, EvalConfig())


def test_recall_of_what_the_model_says_itself(tokenizer):
    model = tiny.build("llama")
    ids = [1, 5, 9]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-1], ids[-1] % 90 + 3]
    assert (
        loss_and_drift(model, tokenizer, [Encoded(i, [False] * 3 + [True] * 4) for i in (ids, wrong)])["base"]["recall"]
        == 0.5
    )


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_choices_are_scored_by_their_summed_log_likelihood(adapted, tokenizer, batch_tokens):
    questions = {"One?": [" a", " bcd", " e"], "And two, longer?": [" no", " yes"], "Three": [" x", " yy", " zzz"]}
    best = {False: [], True: []}
    for prompt, choices in questions.items():
        for on in best:
            scores = []
            for choice in choices:
                encoded = encode(tokenizer, Sample(prompt, choice, {}), 99)
                p = log_probs(adapted, encoded.ids, encoded.start, on)
                scores.append(float(p.gather(1, torch.tensor(encoded.ids[encoded.start :])[:, None]).sum()))
            best[on].append(choices[scores.index(max(scores))])
    # The response is the base model's choice, except for the last question.
    answers = [*best[False][:2], next(c for c in questions["Three"] if c not in (best[False][2], best[True][2]))]
    samples = [Sample(q, a, {"choices": c}) for (q, c), a in zip(questions.items(), answers, strict=True)]
    results = means([accuracy], read_choices(adapted, tokenizer, samples, batch_tokens, False, sides(adapted)))
    assert results["base"] == {"accuracy": 2 / 3}
    expected = sum(a == b for a, b in zip(best[True], answers, strict=True)) / 3
    assert results["tuned"]["accuracy"] == pytest.approx(expected)


@torch.no_grad()
def greedy(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) < start + tokens and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_exact_match_by_greedy_decoding(adapted, tokenizer, batch_tokens):
    prompts = ["One?", "And a longer one?", "x", "Four is long, too?"]
    with adapted.disable_adapter():
        said = [greedy(adapted, tokenizer, p, 5) for p in prompts]
    tuned = [greedy(adapted, tokenizer, p, 5) for p in prompts]
    assert said != tuned
    samples = [Sample(p, s, {}) for p, s in zip(prompts, [*said[:3], "other"], strict=True)]
    config = EvalConfig(exact_match="text", max_new_tokens=5, batch_tokens=batch_tokens)
    results = means([exact_match], read_continuations(adapted, tokenizer, samples, config, False, sides(adapted)))
    right = sum(t.strip() == s.response.strip() for t, s in zip(tuned, samples, strict=True))
    assert results == {"base": {"exact_match": 0.75}, "tuned": {"exact_match": right / 4}}


@pytest.mark.parametrize(
    ("answer", "response", "how", "expected"),
    [
        (" Paris\n", "Paris", "text", True),
        ("Paris.", "Paris", "text", False),
        ("so 3 + 4 = 7\n#### 7", "#### 7", r"#### (-?[0-9.,]+)", True),
        ("#### 7 no, #### 8", "it is\n#### 8", r"#### (-?[0-9.,]+)", True),
        ("#### 8, #### 7", "#### 8", r"#### (-?[0-9.,]+)", False),
        ("seven", "#### 7", r"#### (-?[0-9.,]+)", False),
        ("seven", "seven", r"#### (-?[0-9.,]+)", False),
        ("a 1 b 2", "2", r"[0-9]+", True),
    ],
)
def test_matches(answer, response, how, expected):
    assert matches(answer, response, how) is expected


def test_a_regular_expression_that_takes_too_long():
    with pytest.raises(CordaError, match=r"^exact_match .* takes more than a second on the text"):
        matches("x y q " * 40, "x", r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3q")


def test_text_windows_hold_all_of_the_text(tokenizer):
    samples = [Sample("", "the first line", {}), Sample("", "and the second", {})]
    windows = text_windows(tokenizer, samples, 10)
    assert "".join(w.response for w in windows) == "the first line\nand the second"
    assert {len(w.response) for w in windows} == {10, 9}


def test_windows_of_text_are_not_cut(tokenizer):
    """The begin-of-text token has its room in each."""
    windows, encoded = measured_samples("text", tokenizer, [Sample("", "some running text", {})], 8)
    assert [len(e.ids) for e in encoded] == [8, 8, 4]
    assert not any(e.cut for e in encoded)
    assert "".join(window.response for window in windows) == "some running text"


@pytest.mark.parametrize("kind", ["keep", "learn", "text", "choices"])
def test_the_same_samples_twice_are_refused(kind):
    config = EvalConfig(prompt="{q}", **{kind: ["a.jsonl", DataConfig("b.jsonl"), DataConfig("a.jsonl")]})
    with pytest.raises(CordaError, match=f"{kind} names the same samples of a.jsonl twice"):
        config.data(kind)


def test_the_same_file_several_times(adapted, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    name = str(tmp_path / "rows.jsonl")
    config = EvalConfig(keep=[DataConfig(name, prompt=prompt) for prompt in ("{prompt}", "Q: {prompt}", "", "x")])
    results = evaluate(adapted, tokenizer, config, progress=False)["keep"]
    assert list(results) == [name, f"{name} (train)", f"{name} (3)", f"{name} (4)"]
    assert len({sides["base"]["loss"] for sides in results.values()}) == 3  # the third is the first


def test_evaluate_puts_it_all_together(adapted, tokenizer, tmp_path):
    samples = [s for s in SAMPLES if s.prompt]
    rows = [{"prompt": s.prompt, "response": s.response, "choices": [s.response, " no", " neither"]} for s in samples]
    path, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("some running text\nin two lines\n")
    rows_of = str(path)
    config = EvalConfig(
        keep=[rows_of, DataConfig(rows_of, rows="train[:2]")],
        learn=DataConfig(rows_of),
        text=str(text),
        choices=rows_of,
        exact_match="text",
        max_new_tokens=3,
    )
    results = evaluate(adapted, tokenizer, config, progress=False)
    assert list(results) == ["keep", "learn", "text", "choices"]
    assert list(results["keep"]) == [rows_of, f"{rows_of} (train[:2])"]
    without_end = [encode(tokenizer, s, 512) for s in samples]
    assert results["keep"][rows_of] == loss_and_drift(adapted, tokenizer, without_end)
    with_end = loss_and_drift(adapted, tokenizer, [encode(tokenizer, s, 99, end=True) for s in samples])["tuned"]
    learned = results["learn"][rows_of]["tuned"]
    assert learned["loss"] == pytest.approx(with_end["loss"])
    assert learned["exact_match"] == 0
    perplexity = results["text"][str(text)]["base"]
    assert perplexity["perplexity"] == pytest.approx(math.exp(perplexity["loss"]))
    assert results["choices"][rows_of]["base"]["samples"] == 4
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize("row", [{}, {"choices": "4"}, {"choices": ["5", "6"]}])
def test_choices_without_the_response_are_refused(row, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2 =", "response": "4", **row}) + "\n")
    with pytest.raises(CordaError, match=r"sample 1 of .*rows\.jsonl needs a column `choices`"):
        evaluate(tiny.build("llama"), tokenizer, EvalConfig(choices=str(path)), progress=False)


def test_a_batch_of_answers_is_as_large_as_the_memory(monkeypatch):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):  # stands for an accelerator
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    cache = 2 * 2 * 3 * 2 * 8  # bytes of a token's keys and values: two, in bfloat16, of 3 layers with 2 heads of 8
    monkeypatch.setattr(generation, "free_bytes", lambda device: 1000 * cache)
    assert generation.largest_batch(model, 100) == 500
    assert generation.largest_batch(model, 600) == 600
    monkeypatch.setattr(generation, "free_bytes", lambda device: None)
    assert generation.largest_batch(model, 600) == generation.LARGE_BATCH
    assert generation.largest_batch(LlamaForCausalLM(config), 600) == 600
