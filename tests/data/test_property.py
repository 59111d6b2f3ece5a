"""Whatever the rows, templates and options: samples that say what the rows say, or one CordaError of one line."""

import json
import warnings

import pytest
from helpers import CHATML, with_template
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corda_lora import CordaError
from corda_lora.config import DataConfig
from corda_lora.data.batches import context_batches, encode, encode_question
from corda_lora.data.overview import overview
from corda_lora.data.samples import load_samples

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["NA", "007", "1.50", "a b"])
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = CELLS | st.lists(CELLS, max_size=2) | st.dictionaries(st.sampled_from(["k", "text"]), CELLS, max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS | st.none()}),
    max_size=4,
)
NAMES = ["prompt", "response", "text", "messages", "q"]
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={name: MESSAGES if name == "messages" else VALUES for name in NAMES}),
    max_size=4,
)
TEMPLATES = st.just("") | st.lists(
    st.sampled_from([*(f"{{{name}}}" for name in NAMES), "{q[0]}", "{q[k]}", "\\n", "{{", "{", "{q.x}", "{q!r}"])
    | TEXTS,
    max_size=4,
).map("".join)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    prompt=TEMPLATES,
    response=TEMPLATES,
    chat=st.booleans(),
    turns=st.sampled_from(["all", "last"]),
    samples=st.none() | st.integers(1, 5),
    max_length=st.integers(1, 60),
    has_template=st.booleans(),
    end=st.booleans(),
)
def test_right_or_one_sentence(tmp_path, tokenizer, rows, has_template, end, max_length, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = with_template(tokenizer, CHATML if has_template else None)
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_samples(DataConfig(str(path), max_length=max_length, **options))
        check_samples(tokenizer, loaded, max_length, end)
        assert len(loaded) <= (options["samples"] or len(rows))
    except CordaError as error:
        message = str(error).replace(str(path), "data.jsonl")
    assert "\n" not in message
    assert len(message) < 480


def check_samples(tokenizer, samples, max_length, end):
    for sample in samples:
        whole, encoded = encode(tokenizer, sample, 10**9, end), encode(tokenizer, sample, max_length, end)
        assert encoded.ids == whole.ids[:max_length]
        assert len(encoded.ids) == len(encoded.answer) == len(whole.ids) - encoded.cut
        assert whole.ids.count(tokenizer.bos_token_id) <= 1
        assert tokenizer.eos_token_id not in whole.ids[:-1]
        if sample.messages:
            content = tokenizer.decode([i for i, answer in zip(whole.ids, whole.answer, strict=True) if answer])
            learned = sum(m["role"] == "assistant" for m in sample.messages[sample.first :])
            assert content.count("$") >= learned
        encode_question(tokenizer, sample)
    encoded = [encode(tokenizer, sample, max_length, end) for sample in samples]
    overview("data.jsonl", tokenizer, samples, encoded, max_length, end=end)
    context_batches(tokenizer, samples, max_length)


@pytest.mark.parametrize(
    "cell", ["None", "NA", "007", "1.50", " padded ", "a,b", 'say "hi"', "two\nlines", "\\n", "{q}"]
)
def test_a_cell_comes_out_as_it_stands(cell, tmp_path):
    import csv

    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "response"], [cell, cell]])
    assert load_samples(DataConfig(str(tmp_path / "data.csv")))[0][:2] == (cell, cell)
