"""Adapter directories at the command line: which are refused, and what is written and sent."""

import json

import peft
import pytest
import tiny
import torch
from helpers import saved, start
from safetensors.torch import load_file, save_file

from corda_lora.adapters.lora import install
from corda_lora.cli import main

ROWS = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 9)]


@pytest.fixture
def work(checkpoint, tmp_path, monkeypatch):
    """A working directory with samples, and two adapters for the model in `checkpoint`: CorDA's and a plain LoRA."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    saved(install(*(made := start(split="anchored"))), made[1], tmp_path / "corda")
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.build("llama"), plain).save_pretrained(tmp_path / "plain")
    return tmp_path


def run(verb, checkpoint, *arguments):
    main([verb, "--model", str(checkpoint), *map(str, arguments)])


def refused(capsys, verb, checkpoint, *arguments):
    """Run a command that must exit with 2; the sentence it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(verb, checkpoint, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", ["train", "eval", "export"])
@pytest.mark.parametrize("adapter", ["corda", "plain"])
def test_a_damaged_adapter_is_refused_by_the_name_of_its_file(adapter, verb, checkpoint, work, capsys):
    path = work / adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path)
    arguments = {
        "train": ["--start", adapter, "--data", "rows.jsonl", "--output", "out"],
        "eval": ["--adapter", adapter, "--keep", "rows.jsonl"],
        "export": ["--adapter", adapter, "--output", "out"],
    }
    sentence = refused(capsys, verb, checkpoint, *arguments[verb])
    assert f"{adapter}/adapter_model.safetensors is damaged: " in sentence
    assert not (work / "out").exists()
