"""Adapter directories at the command line: which are refused, and what is written and sent."""

import json

import peft
import pytest
import tiny
import torch
from helpers import saved, start
from safetensors.torch import load_file, save_file

from corda_lora import load_adapter
from corda_lora.adapters.lora import install, lora_layers
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


# --- PEFT's options --------------------------------------------------------------------------------------------------

OPTIONS = ["--exclude_modules", "[q_proj,lm_head]", "--layers_to_transform", "[1]", "--modules_to_save", "[lm_head]"]
OPTIONS += ["--use_rslora", "true", "--lora_alpha", "8", "--r", "4", "--bias", "none"]


@pytest.mark.parametrize("verb", ["init", "train"])
def test_pefts_options_end_in_the_saved_file(verb, checkpoint, work):
    data = (
        ["--data", "rows.jsonl", "--precision", "fp32", "--warmup", 0]
        if verb == "train"
        else ["--context", "rows.jsonl"]
    )
    run(verb, checkpoint, *data, *OPTIONS, "--output", "out")
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    assert config["exclude_modules"] == ["lm_head", "q_proj"]
    assert config["layers_to_transform"] == [1]
    assert config["modules_to_save"] == ["lm_head"]
    assert config["bias"] == "none"
    loaded = load_adapter(tiny.build("llama"), work / "out")
    assert {layer.scaling["default"] for layer in lora_layers(loaded).values()} == {4.0}  # 8 / √4
    assert len(lora_layers(loaded)) == 6
    tensors = load_file(work / "out" / "adapter_model.safetensors")
    head = tensors["base_model.model.lm_head.weight"]
    if verb == "train":
        assert all(tensor.norm() > 0 for tensor in tensors.values())
        assert (head - tiny.build("llama").lm_head.weight).norm() > 0


@pytest.mark.parametrize("verb", ["init", "plan", "train"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--use_dora true",
            "use_dora is an option of PEFT's that corda-lora does not have: with it, the adapter would",
        ),
        ("--rank-pattern {}", "rank_pattern is an option of PEFT's that corda-lora does not have: presets corda+ and"),
        ("--bias lora_only", "bias lora_only trains biases of the base model itself"),
        ("--exclude_modules [", "exclude_modules '[' is no regular expression"),
    ],
)
def test_other_options_of_pefts_are_refused_by_name(arguments, said, verb, checkpoint, capsys):
    data = {"init": ["--context", "x", "--output", "out"], "plan": [], "train": ["--data", "x", "--output", "out"]}
    assert refused(capsys, verb, checkpoint, *data[verb], *arguments.split()).startswith(f"corda {verb}: {said}")


def test_an_adapter_that_trained_biases_is_not_compared_with_the_base(checkpoint, work, capsys):
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only")
    peft.get_peft_model(tiny.build("llama"), plain).save_pretrained(work / "biased")
    sentence = refused(capsys, "eval", checkpoint, "--adapter", "biased", "--keep", "rows.jsonl")
    assert "trained biases of the base model (bias lora_only), which stay when it is taken off" in sentence
