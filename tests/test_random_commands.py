"""Whatever the rows, templates and options of `init` and `train`: an adapter that is right, or one sentence."""

import pytest
import tiny
import torch
from commands import commands, given, outcome
from hypothesis import given as drawn
from hypothesis import settings


@pytest.fixture(scope="module")
def folder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
        yield given(tiny.character_tokenizer)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@drawn(command=commands())
def test_right_or_one_sentence(folder, command):
    outcome(command, folder)
