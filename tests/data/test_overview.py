"""What is said of samples before long work, and whether a model can read them."""

import copy
import warnings

import pytest
import tiny

from corda_lora import CordaError
from corda_lora.cli import main
from corda_lora.data.batches import encode
from corda_lora.data.overview import check_fit, overview
from corda_lora.data.samples import Sample

SAMPLES = [Sample("a\nb" * n, "cd", {}) for n in (1, 2, 3, 4)]


def shown(name, tokenizer, samples, max_length, learned=True, end=False):
    encoded = [encode(tokenizer, sample, max_length, end) for sample in samples]
    return overview(name, tokenizer, samples, encoded, max_length, learned, end)


def test_numbers_and_a_sample(tokenizer):
    lines = shown("new.jsonl", tokenizer, [*SAMPLES, Sample("e", "", {})], 10, end=True).plain.split("\n")
    assert lines == [
        "new.jsonl: 5 samples of 10 tokens (median), the longest 16; 2 cut at --max_length 10, 2 with no token of the "
        "response left",
        "  1 of them have no response: left out",
        "  sample 1 as the model reads it (7 tokens):",
        r"    prompt         │<s>a\nb│",
        "    response, loss │cd</s>│",
    ]


def test_all_responses_cut_away(tokenizer):
    with pytest.raises(CordaError, match=r"within --max_length 4: the samples have 6 to 15 tokens"):
        shown("new.jsonl", tokenizer, SAMPLES, 4)
    assert "4 with no token of the response left" in shown("new.jsonl", tokenizer, SAMPLES, 4, learned=False).plain


def test_questions_alone(tokenizer):
    questions = [Sample("why?", "", {})]
    assert "questions alone protect" in shown("known.jsonl", tokenizer, questions, 99, learned=False).plain
    assert "questions alone" not in shown("known.jsonl", tokenizer, SAMPLES, 99, learned=False).plain
    with pytest.raises(CordaError, match=r"no sample of known\.jsonl has a response"):
        shown("known.jsonl", tokenizer, questions, 99)


def test_a_tokenizer_without_an_end(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    assert "no end-of-text token" in shown("new.jsonl", tokenizer, SAMPLES, 99, end=True).plain
    tokenizer.pad_token = None
    with pytest.raises(CordaError, match="neither an end-of-text token nor one for padding"):
        shown("new.jsonl", tokenizer, SAMPLES, 99, end=True)


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "bert", "roberta", "t5"])
def test_token_ids_and_positions_that_a_model_has(family, tokenizer):
    model = tiny.build(family)
    check_fit(model, [encode(tokenizer, s, 99).ids for s in SAMPLES])
    check_fit(model, [[95]])
    with pytest.raises(CordaError, match=r"gives token 96, .* has 96 rows \(0 to 95\)"):
        check_fit(model, [[3, 96]])
    longest = {"gpt2_conv1d": 256, "bert": 256, "roberta": 255}.get(family)
    if longest is None:
        check_fit(model, [[3] * 1000])
    else:
        check_fit(model, [[3] * longest])
        with pytest.raises(CordaError, match=f"has {longest + 1} tokens, .* learned {longest} positions"):
            check_fit(model, [[3] * (longest + 1)])


def test_the_verbs_show_a_sample_before_work(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # `main` replaces it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new.csv").write_text("question,answer\n" + "What is 1 plus 1?,2\n" * 4 + "And?,\n")
    data = ["--prompt", r"Q: {question}\nA:", "--response", " {answer}"]
    main(["init", "--model", str(checkpoint), "--context", "new.csv", *data, "--r", "4", "--output", "start"])
    tune = ["--precision", "fp32", "--max_steps", "1", "--batch_size", "2", "--output", "tuned"]
    init = capsys.readouterr().err
    main(["train", "--model", str(checkpoint), "--start", "start", "--data", "new.csv", *data, *tune])
    train = capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(f"learn: {{data: new.csv, prompt: '{data[1]}', response: '{data[3]}'}}\n")
    main(["eval", "--model", str(checkpoint), "--config", "recipe.yaml"])
    for said, loss in ((init, ""), (train, ", loss"), (capsys.readouterr().err, ", loss")):
        lines = [" ".join(line.split()) for line in said.splitlines()]
        assert "sample 1 as the model reads it" in said
        assert r"prompt │<s>Q: What is 1 plus 1?\nA:│" in lines
        assert any(line.startswith(f"response{loss} │ 2") for line in lines)
        assert "1 of 5 rows left out: 1 without" in " ".join(lines)
