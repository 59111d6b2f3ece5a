"""`corda demo` from end to end, on a tiny model that stands in for the real one."""

import json
import re
from pathlib import Path

import peft
import pytest
import tiny
import torch

from corda_lora.adapters.lora import read_marks
from corda_lora.cli import main
from corda_lora.config.train import KEEP
from corda_lora.demo import run
from corda_lora.demo.facts import knowledge_questions, word_problems

FACTS = knowledge_questions()
SIZES = {
    "RANK": 4,
    "STEPS": 5,
    "BATCH": 4,
    "FACTS": 40,
    "METER_FACTS": 16,
    "MEASURED_FACTS": 24,
    "MEASURED_PROBLEMS": 6,
}


@pytest.fixture
def small(monkeypatch, tokenizer):
    """A demo of a few samples, on a model whose name says where it is."""
    monkeypatch.setattr(run, "packaged_model", lambda: Path("tiny"))
    monkeypatch.setattr(run, "load_model", lambda source: tiny.build("llama", getattr(torch, source.dtype)))
    monkeypatch.setattr(run, "load_tokenizer", lambda source: tokenizer)
    for name, size in SIZES.items():
        monkeypatch.setattr(run, name, size)


@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
@pytest.mark.parametrize("half", [True, False])
def test_the_demo(half, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "has_bfloat16", lambda device: half)
    main(["demo", "--output", str(tmp_path / "demo")])
    said = capsys.readouterr().err
    folder = tmp_path / "demo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "corda",
        "lora",
        "picture.png",
        "results.json",
        "table.md",
    ]
    results = json.loads((folder / "results.json").read_text())

    # CorDA is the default, and pays for its drift; LoRA does not. The meter shows what was measured last.
    assert read_marks(folder / "corda")["split"] == "anchored"
    assert read_marks(folder / "lora") is None
    shown = re.findall(r"^training .* 5/5 drift ≈ (\S+)", said, re.MULTILINE)
    last = [results["meters"][name][-1] for name in ("CorDA", "LoRA")]
    assert shown == [f"{measured:.2g}" for _, _, measured, _ in last]
    assert [price for *_, price in last] == [KEEP, 0]
    assert all(predicted > 0 for _, predicted, _, _ in last)
    for name, measured in results["meters"].items():
        assert measured[0][:3] == [0, 0, 0], name
        assert len(results["curves"][name]) == 5

    # Table and numbers are the same.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (folder / "table.md").read_text().splitlines()]
    tuned = {name: results["results"][name]["facts"]["tuned"]["drift"] for name in ("LoRA", "CorDA")}
    assert rows[0] == ["", "before", "LoRA", "CorDA (kpm)"]
    assert rows[6][1:] == ["", f"{tuned['LoRA']:.4f}", f"{tuned['CorDA']:.4f}"]
    assert rows[7][1:] == ["", f"{last[1][2]:.4f}", f"{last[0][2]:.4f}"]
    assert rows[7][-1] in said

    # Both adapters are those that were measured, on the model as it was.
    dtype = torch.bfloat16 if half else torch.float32
    measured = [run.encode(tiny.character_tokenizer(), sample, 128) for sample in run.samples(FACTS[56:80])]
    for name, expected in tuned.items():
        model = tiny.build("llama", dtype).float()
        adapted = peft.PeftModel.from_pretrained(model, folder / name.lower())
        assert run.drift(adapted, tiny.character_tokenizer(), measured) == pytest.approx(expected, rel=1e-3)


def test_what_is_shown_is_not_what_is_measured():
    facts = [fact["prompt"] + fact["response"] for fact in FACTS]
    assert len(set(facts)) == len(facts) > run.FACTS + run.METER_FACTS + run.MEASURED_FACTS
    trained = {problem["prompt"] for problem in word_problems(run.STEPS * run.BATCH, seed=0)}
    assert not trained & {problem["prompt"] for problem in word_problems(run.MEASURED_PROBLEMS, seed=1)}
