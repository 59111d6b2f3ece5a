"""A small task, and methods prepared for it and trained on it."""

import json

import pytest
import tiny
import torch

from corda_lora.config import DataConfig, TrainConfig
from corda_lora.methods.registry import METHODS, Setup
from corda_lora.models.targets import find_targets

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(40)]
LEARN = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 41)]
STEPS = 5


@pytest.fixture
def files(tmp_path):
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "cache").mkdir()
    return tmp_path


@pytest.fixture
def setup_of(files, tokenizer):
    """setup_of(model, rate, **fields) → the `Setup` of a run of STEPS steps with this model."""

    def make(model, rate=1e-3, **fields):
        defaults = {
            "tokenizer": tokenizer,
            "learn": DataConfig(str(files / "learn.jsonl")),
            "keep": DataConfig(str(files / "keep.jsonl")),
            "samples": 16,
            "targets": find_targets(model, "all-linear"),
            "r": 4,
            "lora_alpha": 8.0,
            "train": TrainConfig(learning_rate=rate, max_steps=STEPS, batch_size=8, precision="fp32"),
            "steps": STEPS,
            "folder": files / "cache",
        }
        return Setup(**(defaults | fields))

    return make


@pytest.fixture
def prepare(setup_of):
    """prepare(name, rate, family, options, **fields) → the prepared model, its setup, and a copy of the base model."""

    def make(name, rate=1e-3, family="llama", options=None, **fields):
        model = tiny.build(family)
        setup = setup_of(model, rate, **fields)
        torch.manual_seed(setup.train.seed)
        return METHODS[name].prepare(model, setup, **(options or {})), setup, tiny.build(family)

    return make
