"""Contexts from Python: batches, texts, chats, rows and tokens."""

import pytest
import tiny
import torch
from datasets import Dataset
from helpers import CHAT, CHATML, messages, with_template
from peft import PeftModel

from corda_lora import CordaConfig, CordaError, get_corda_model
from corda_lora.data.batches import as_batches, context_batches
from corda_lora.data.samples import Sample

TEXTS = ["one and two", "three", "four is more"]
EXPECTED = [Sample("", text, {}) for text in TEXTS]


@pytest.mark.parametrize(
    "items",
    [
        TEXTS,
        (text for text in TEXTS),
        [{"text": text} for text in TEXTS],
        Dataset.from_dict({"text": TEXTS}),
    ],
)
def test_texts_and_rows(items, tokenizer):
    batches, rounds = as_batches(items, lambda: tokenizer)
    expected, _ = context_batches(tokenizer, EXPECTED, 512)
    assert rounds == [0] * len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) for key in batch)


def test_chats(tokenizer):
    tokenizer = with_template(tokenizer, CHATML)
    for items in ([messages(CHAT)], Dataset.from_list([{"messages": messages(CHAT)}])):
        (batch,), _ = as_batches(items, lambda: tokenizer)
        assert tokenizer.decode(batch["input_ids"][0]).startswith("#system\nbe brief$")


def test_rows_of_tokens(tokenizer):
    for kind in (None, "torch"):
        rows = Dataset.from_list([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]).with_format(kind)
        batches, _ = as_batches(rows, lambda: tokenizer, batch_tokens=99)
        assert sorted(ids[mask.bool()].tolist() for b in batches for ids, mask in zip(*b.values(), strict=True)) == [
            [5, 6, 7],
            [8],
        ]


def test_rows_of_tokens_with_labels():
    rows = [
        {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    batches, _ = as_batches(rows, None)
    assert [batch["labels"].tolist() for batch in batches] == [[[-100, 9, -100], [-100, 6, 7]]]
    batches, _ = as_batches([*rows, {"input_ids": [5]}], None)
    assert not any("labels" in batch for batch in batches)


def test_batches_are_given_back():
    batches = tiny.batches()
    assert as_batches(batches, None) == (batches, [])
    assert list(as_batches(iter(batches), None)[0]) == batches
    assert list(as_batches((), None)[0]) == []


def test_rounds_of_samples_that_follow_one_another(tokenizer):
    batches, rounds = as_batches([c * n for n, c in enumerate("abcdef", 1)], lambda: tokenizer, rounds=3)
    assert sorted(set(rounds)) == [0, 1, 2]
    assert [tokenizer.decode(batch["input_ids"][0])[3] for batch in batches] == [
        {0: "a", 1: "c", 2: "e"}[i] if rounds.index(i) == n else {0: "b", 1: "d", 2: "f"}[i]
        for n, i in enumerate(rounds)
    ]
    with pytest.raises(CordaError, match="only 2 samples"):
        as_batches(TEXTS[:2], lambda: tokenizer, rounds=3)


def test_what_is_no_context(tokenizer):
    with pytest.raises(CordaError, match="item 0 of the context is of type int"):
        as_batches([3], lambda: tokenizer)
    with pytest.raises(CordaError, match="none of the columns"):
        as_batches([{"question": "why?"}], lambda: tokenizer)


def test_get_corda_model_from_texts(tokenizer, checkpoint):
    from transformers import AutoModelForCausalLM

    config = CordaConfig(r=4)
    model = get_corda_model(AutoModelForCausalLM.from_pretrained(checkpoint), config, TEXTS, progress=False)
    assert isinstance(model, PeftModel)
    assert get_corda_model(tiny.build("llama"), config, TEXTS, False, tokenizer)
    with pytest.raises(CordaError, match="give the tokenizer"):
        get_corda_model(tiny.build("llama"), config, TEXTS, progress=False)
