"""`corda export --as ordered`, and what can be done with an adapter in order, at the command line."""

import json

import peft
import pytest
import tiny
import torch
from helpers import same
from peft import PeftModel
from transformers import AutoModelForCausalLM

from corda_lora.adapters.decoding import decoding_ranks, fixed
from corda_lora.adapters.lora import lora_layers
from corda_lora.adapters.order import read_order
from corda_lora.cli import main

ROWS = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 21)]


@pytest.fixture
def lora(checkpoint, tmp_path, monkeypatch):
    """A plain LoRA that is far from zero, in a directory with samples; the logits that it gives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(str(tmp_path / "lora"))
    return tiny.logits(adapted)


def run(*arguments):
    main(["export", *map(str, arguments)])


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_an_adapter_is_put_in_order_and_cut(lora, checkpoint, tmp_path, capsys):
    ordering = ["--model", checkpoint, "--adapter", "lora", "--as", "ordered", "--data", "rows.jsonl"]
    ordering += ["--data.prompt", "{prompt} #", "--output", "ordered"]
    run(*ordering)
    said = capsys.readouterr().out
    assert "7 layers" not in said
    assert "14 layers in order" in said
    assert "(100.0%)" in said
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, "ordered").eval()
    same(tiny.logits(adapted), lora)
    order = read_order("ordered")
    assert order.full == pytest.approx(4)
    assert len(set(order.ranks(2).values())) > 1
    with decoding_ranks(adapted, order, fixed(0.5)):
        half = tiny.logits(adapted)
    adapted.unload()
    run("--model", checkpoint, "--adapter", "ordered", "--r", 2, "--output", "half")
    assert "compressed to rank 2: relative error" in capsys.readouterr().out
    static = PeftModel.from_pretrained(base, "half").eval()
    assert {n: layer.r["default"] for n, layer in lora_layers(static).items()} == {
        n: max(r, 1) for n, r in order.ranks(2).items()
    }
    same(tiny.logits(static), half)
    static.unload()
    before = {path: path.read_bytes() for path in (tmp_path / "ordered").iterdir()}
    run(*ordering)
    assert "ordered is whole already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "ordered").iterdir()} == before


def test_the_half_that_gains_most_keeps_more_than_the_half_it_was_trained_in(lora, checkpoint):
    """The order's promise, on the model itself: KL(whole‖cut) on the samples."""
    run("--model", checkpoint, "--adapter", "lora", "--as", "ordered", "--data", "rows.jsonl", "--output", "ordered")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    whole = PeftModel.from_pretrained(base, "ordered").eval()
    order, log_p = read_order("ordered"), tiny.logits(whole).log_softmax(-1)
    with decoding_ranks(whole, order, fixed(0.5)):
        best = tiny.logits(whole).log_softmax(-1)
    whole.unload()
    plain = PeftModel.from_pretrained(base, "lora").eval()
    with torch.no_grad():
        for layer in lora_layers(plain).values():
            layer.lora_B["default"].weight[:, 2:] = 0
    half = tiny.logits(plain).log_softmax(-1)
    KL = [float((log_p.exp() * (log_p - other)).sum(-1).mean()) for other in (best, half)]
    assert KL[0] < 0.8 * KL[1]


def test_what_cannot_be_put_in_order_is_refused_before_the_model_is_loaded(
    lora, checkpoint, tmp_path, capsys, no_model_is_loaded
):
    start = ["--model", checkpoint, "--adapter", "lora", "--output", "out"]
    assert "--as ordered goes with --data" in refused(capsys, *start, "--as", "ordered")
    assert "--as ordered goes with --data" in refused(capsys, *start, "--data", "rows.jsonl")
    assert "nowhere.jsonl" in refused(capsys, *start, "--as", "ordered", "--data", "nowhere.jsonl")
    few = refused(capsys, *start, "--as", "ordered", "--data", "rows.jsonl", "--data.samples", 5)
    assert "the context has 5 samples with a response" in few
    assert "cut away" not in few
    cut = refused(capsys, *start, "--as", "ordered", "--data", "rows.jsonl", "--data.max_length", 10)
    assert "the context has 9 samples with a response" in cut  # those of one digit
    assert cut.endswith("; 11 responses are cut away at --max_length 10")
    said = refused(capsys, *start, "--as", "ordered", "--data", "rows.jsonl", "--prompt", "{x}")
    assert "--prompt is an option of data: after --data DATA give --data.prompt" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["anchored", "balanced"])
def test_a_start_that_is_not_trained_has_nothing_to_put_in_order(split, lora, checkpoint, tmp_path, capsys):
    main(["init", "--model", str(checkpoint), "--context", "rows.jsonl", "--r", "4", "--split", split,
          "--output", "start"])  # fmt: skip
    ordering = ["--model", checkpoint, "--adapter", "start", "--as", "ordered", "--data", "rows.jsonl"]
    said = refused(capsys, *ordering, "--output", "out")
    assert "the adapter in start changes nothing yet" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_the_output_head_has_no_order_and_is_cut_without(lora, checkpoint, tmp_path, capsys):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).save_pretrained(tmp_path / "head")
    start = ["--model", checkpoint, "--adapter", "head", "--output", "out"]
    said = refused(capsys, *start, "--as", "ordered", "--data", "rows.jsonl")
    assert "lm_head is the model's output head" in said
    assert "--as lora --r R cuts each layer by its plain SVD" in said
    assert not (tmp_path / "out").exists()
    run(*start, "--as", "lora", "--r", 2)  # as the sentence says
    with pytest.raises(SystemExit):
        main(["train", "--model", str(checkpoint), "--data", "rows.jsonl", "--context", "rows.jsonl", "--r", "2",
              "--target_modules", "[q_proj,lm_head]", "--precision", "fp32", "--output", "tuned"])  # fmt: skip
    assert "lm_head is the model's output head" in capsys.readouterr().err.strip().splitlines()[-1]
