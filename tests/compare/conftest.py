"""A small task in the working directory, and recipes for comparisons on it."""

import json
import re
from pathlib import Path

import pytest

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(40)]
LEARN = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 33)]
RECIPE = """\
model: {checkpoint}
data: learn.jsonl
context: keep.jsonl
context_samples: 12
r: 4
train: {{max_steps: 6, batch_size: 8, precision: fp32}}
eval:
  keep: {{data: keep.jsonl, samples: 8}}
  learn: {{data: learn.jsonl, samples: 16}}
  text: {{data: keep.jsonl, samples: 4}}
seeds: 2
curve_points: 3
methods:
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, undrawn):
    """The working directory, with keep.jsonl and learn.jsonl. Everything runs on one thread of the CPU."""
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))  # for started processes
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    return tmp_path


@pytest.fixture
def recipe(folder, checkpoint):
    """recipe(methods, **changes) → the name of a recipe with these learning rates by method, and changed settings."""

    def write(methods, name="recipe.yaml", **changes):
        text = RECIPE.format(checkpoint=checkpoint)
        for key, value in changes.items():
            text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.M)
        entries = "".join(f"  {method}: {{learning_rates: {rates}}}\n" for method, rates in methods.items())
        Path(name).write_text(text + entries)
        return name

    return write
