"""Texts that a model draws from its own distribution."""

from contextlib import contextmanager

import pytest
import tiny
import torch

from corda_lora.config import CordaError, LoraStart, TrainConfig
from corda_lora.preprocess.own_text import own_text
from corda_lora.training.train import plain_lora


def test_texts_are_of_the_models_own_distribution():
    """The second token of many texts has the probabilities that the model gives it after the first."""
    model, tokenizer = tiny.build("llama"), tiny.character_tokenizer()
    tokenizer.bos_token_id = 1
    encoded = own_text(model, tokenizer, texts=2000, length=2)
    assert all(e.ids[0] == 1 and e.answer == [False, True] for e in encoded)
    drawn = torch.bincount(torch.tensor([e.ids[1] for e in encoded]), minlength=tiny.VOCABULARY) / len(encoded)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1]])).logits[0, 0].softmax(0)
    assert float((drawn - expected).abs().sum()) < 3 * float((expected / len(encoded)).sqrt().sum())
    assert float((drawn - expected.sort().values).abs().sum()) > 0.1


def test_a_text_ends_where_the_model_ends_it_and_a_seed_says_which():
    model, tokenizer = tiny.build("llama"), tiny.character_tokenizer()
    encoded, state = own_text(model, tokenizer, texts=70, length=40), torch.get_rng_state()
    ends = [tokenizer.eos_token_id in e.ids[1:] for e in encoded]
    assert any(ends)
    for e, ended in zip(encoded, ends):
        assert len(e.ids) == len(e.answer) <= 40
        assert e.ids.index(tokenizer.eos_token_id, 1) == len(e.ids) - 1 if ended else len(e.ids) == 40
    assert own_text(model, tokenizer, texts=70, length=40) == encoded
    assert torch.equal(torch.get_rng_state(), state)
    assert own_text(model, tokenizer, texts=70, length=40, seed=1) != encoded


def test_an_adapter_is_left_out():
    tokenizer = tiny.character_tokenizer()
    expected = own_text(tiny.build("llama"), tokenizer, texts=4, length=10)
    adapted = plain_lora(tiny.build("llama"), LoraStart(r=4), TrainConfig()).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert own_text(adapted, tokenizer, texts=4, length=10) == expected
    assert adapted.training


def test_a_tokenizer_without_a_first_token():
    tokenizer = tiny.character_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CordaError, match="no token that begins or ends a text"):
        own_text(tiny.build("llama"), tokenizer)


def test_the_bar_moves_with_every_token(monkeypatch):
    """64 texts are drawn at a time, which may take a minute."""
    shown = []

    @contextmanager
    def bar(label, total, show):
        assert (label, total, show) == ("own texts", 70, True)
        yield lambda steps, completed: shown.append(completed)

    monkeypatch.setattr("corda_lora.preprocess.own_text.progress_bar", bar)
    model, tokenizer = tiny.build("llama"), tiny.character_tokenizer()
    own_text(model, tokenizer, texts=70, length=20)
    assert shown == sorted(shown)
    assert shown[-1] == 70
    assert len([x for x in shown if x < 64]) >= 18
