"""Samples from files of every kind, templates over their columns, and the batches made of them."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from corda_lora import CordaError
from corda_lora.config import DataConfig
from corda_lora.data.batches import Encoded, batch_by_length, context_batches, encode, pad
from corda_lora.data.samples import Sample, load_others, load_samples

ROWS = [{"question": f"What is {i}?", "answer": f"It is {i * i}."} for i in range(20)]


def write(folder, suffix, rows=ROWS):
    path, data = folder / f"data{suffix}", Dataset.from_list(rows)
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_files_of_rows(suffix, tmp_path):
    data = write(tmp_path, suffix)
    samples = load_samples(DataConfig(data, prompt="Q: {question}\nA:", response=" {answer}"))
    assert len(samples) == 20
    assert samples[3][:3] == ("Q: What is 3?\nA:", " It is 9.", ROWS[3])


def test_text_file(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("the first line\n# the second\n")
    samples = load_samples(DataConfig(str(path)))
    assert [s[:2] for s in samples] == [("", "the first line"), ("", "# the second")]


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({"answer": ["first", "second"]}, " {answer[0]}", " first"),
        ({"answer": {"text": "inner"}}, "{answer[text]}", "inner"),
        ({"answer": "a", "b": 2}, "{b}: {answer} #{{}}", "2: a #{}"),
    ],
)
def test_templates(row, template, expected, tmp_path):
    path = write(tmp_path, ".jsonl", [row])
    assert load_samples(DataConfig(path, response=template))[0].response == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "response"], ("a prompt", "a response")),
        (["text"], ("", "a text")),
        (["text", "other"], ("", "a text")),
        (["response"], ("", "a response")),
        (["prompt", "response", "text"], ("a prompt", "a response")),
    ],
)
def test_default_columns(columns, expected, tmp_path):
    path = write(tmp_path, ".jsonl", [{c: f"a {c}" for c in columns}])
    assert load_samples(DataConfig(path))[0][:2] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{qestion}", "response": "{answer}"}, "no column 'qestion' .*: it has question, answer"),
        ({"response": "{solution[0]}"}, "no column 'solution' .*: it has question, answer"),
        ({}, "none of the columns text, prompt, response, .*; it has question, answer"),
        ({"response": "{answer}", "rows": "test"}, r"cannot load data .* \(rows 'test'\)"),
        ({"response": "{answer}", "rows": "train[20:]"}, r"has no rows|cannot load data"),
    ],
)
def test_bad_templates_and_rows(options, message, tmp_path):
    with pytest.raises(CordaError, match=message) as raised:
        load_samples(DataConfig(write(tmp_path, ".jsonl"), **options))
    assert "\n" not in str(raised.value).replace("\\n", "")


def test_no_such_file_and_unknown_kinds(tmp_path):
    with pytest.raises(CordaError, match=r"there is no file .*missing\.jsonl"):
        load_samples(DataConfig(str(tmp_path / "missing.jsonl")))
    (tmp_path / "data.xyz").write_text("1")
    with pytest.raises(CordaError, match=r"its name must end in \.json, \.jsonl"):
        load_samples(DataConfig(str(tmp_path / "data.xyz")))


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'])
def test_empty_data(content, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(CordaError, match=r"data\.jsonl"):
        load_samples(DataConfig(str(path)))


def test_samples_are_drawn_with_the_seed_in_the_files_order(tmp_path):
    path = write(tmp_path, ".jsonl")

    def draw(samples, seed):
        return [s.row["question"] for s in load_samples(DataConfig(path, "{question}", samples=samples, seed=seed))]

    everything = [row["question"] for row in ROWS]
    assert draw(None, 0) == draw(20, 0) == draw(99, 3) == everything
    assert len(draw(8, 0)) == 8
    assert draw(8, 0) == draw(8, 0) != draw(8, 1)
    assert draw(8, 0) == [q for q in everything if q in draw(8, 0)]


def test_slices_of_rows(tmp_path):
    samples = load_samples(DataConfig(write(tmp_path, ".jsonl"), "{question}", rows="train[5:7]"))
    assert [s.prompt for s in samples] == ["What is 5?", "What is 6?"]


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_prompt_and_response_are_told_apart(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    letters = tokenizer.convert_tokens_to_ids(list("abcd"))
    plain = Sample("ab", "cd", {})
    assert encode(tokenizer, plain, 99) == Encoded([bos, *letters], [False] * 3 + [True] * 2, 0)
    assert encode(tokenizer, plain, 99, end=True) == Encoded([bos, *letters, eos], [False] * 3 + [True] * 3, 0)
    assert encode(tokenizer, plain, 4) == Encoded([bos, *letters[:3]], [False] * 3 + [True], 1)
    assert encode(tokenizer, plain, 2) == Encoded([bos, letters[0]], [False] * 2, 3)
    assert encode(tokenizer, Sample("", "cd", {}), 99) == Encoded([bos, *letters[2:]], [False, True, True], 0)
    assert encode(tokenizer, Sample("ab", "", {}), 99, end=True).targets == 0
    assert [encode(tokenizer, plain, length).start for length in (99, 2)] == [3, 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt": "Q: {prompt}"}, ("Q: a prompt", "a response")),
        ({"response": "{response}!"}, ("", "a response!")),
        ({"prompt": "{text}", "response": "{prompt}"}, ("a text", "a prompt")),
    ],
)
def test_a_template_for_one_leaves_the_default_of_the_response(options, expected, tmp_path):
    path = write(tmp_path, ".jsonl", [{c: f"a {c}" for c in ("prompt", "response", "text")}])
    assert load_samples(DataConfig(path, **options))[0][:2] == expected


def test_pad():
    ids, mask = pad([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batches_hold_every_sample_once_and_no_more_tokens_than_allowed():
    lengths = [7, 3, 30, 12, 3, 9, 50, 1]
    batches = batch_by_length(lengths, 30)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 30
    assert len(batches) < 8


def test_a_batch_large_enough_takes_nothing_that_pads_it():
    lengths = [10] * 4 + [11] * 2 + [20, 21]
    assert [[lengths[i] for i in batch] for batch in batch_by_length(lengths, 300)] == [[10] * 4 + [11] * 2, [20, 21]]


def test_context_batches_of_a_decoder(tokenizer):
    samples = [Sample("ab", "cde", {}), Sample("", "x" * 50, {}), Sample("q", "", {})]
    batches, numbers = context_batches(tokenizer, samples, max_length=20, batch_tokens=60)
    assert numbers == [2, 0, 1]  # alike lengths together
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 6), (1, 20)]
    for batch in batches:
        assert torch.equal(batch["input_ids"] == tokenizer.pad_token_id, batch["attention_mask"] == 0)
    assert sum(int(b["attention_mask"].sum()) for b in batches) == 6 + 20 + 2


def test_context_batches_of_an_encoder_decoder(tokenizer):
    samples = [Sample("ab", "cde", {}), Sample("abcdef", "x", {}), Sample("no answer", "", {})]
    (batch,), _ = context_batches(tokenizer, samples, max_length=20, has_decoder=True)
    assert batch["attention_mask"].sum(1).tolist() == [3, 7]
    assert (batch["labels"] != -100).sum(1).tolist() == [3, 1]
    with pytest.raises(CordaError, match="needs samples with a prompt and a response"):
        context_batches(tokenizer, samples[2:], max_length=20, has_decoder=True)


def test_a_context_without_a_token_is_refused(tokenizer):
    tokenizer = type("NoPrefix", (), {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0})()
    tokenizer.__class__.__call__ = lambda self, text, **_: type("Ids", (), {"input_ids": list(text.encode())})()
    with pytest.raises(CordaError, match="no sample has a token"):
        context_batches(tokenizer, [Sample("", "", {})], max_length=20)


def test_others_are_what_a_draw_leaves_out(tmp_path):
    rows = [{"prompt": f"{i % 30}?", "response": "!"} for i in range(40)]  # ten rows stand twice
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(str(tmp_path / "rows.jsonl"), samples=12, seed=1)
    drawn = {s.prompt for s in load_samples(config)}
    others = [s.prompt for s in load_others(config, load_samples(config), 8)]
    assert len(others) == 8
    assert drawn.isdisjoint(others)
    assert others == [s.prompt for s in load_others(config, load_samples(config), 8)]
    assert drawn.isdisjoint(s.prompt for s in load_others(config, load_samples(config), 100))
    assert not load_others(replace(config, samples=None), load_samples(config), 8)


def test_a_row_that_was_not_asked_for_is_no_error(tmp_path):
    """Others are looked for when long work is done."""
    rows = [{"prompt": f"{i}?", "response": "!"} for i in range(40)]
    config = DataConfig(str(tmp_path / "rows.jsonl"), samples=12)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = load_samples(config)
    asked = {s.prompt for s in drawn}
    rows = [row if row["prompt"] in asked else row | {"prompt": {"a": "mapping"}} for row in rows]
    rows[next(i for i, row in enumerate(rows) if isinstance(row["prompt"], dict))]["prompt"] = "new?"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_samples(config) == drawn
    assert [s.prompt for s in load_others(config, drawn, 9)] == ["new?"]
