"""Over a model in 4 bits, at the command line: init, train, eval, export, and what is refused."""

import json
import sys

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from corda_lora.cli import main

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(20)]
LEARN = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 33)]


@pytest.fixture
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("full")
    tiny.build("llama_for_nf4", num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(verb, *arguments):
    main([verb, *map(str, arguments)])


def init(model, *more, output="start"):
    run("init", "--model", model, "--context", "keep.jsonl", "--r", 4, "--device", "cpu", "--output", output, *more)


def train(model, start, *more, output="tuned"):
    recipe = ["--learning_rate", 0.01, "--batch_size", 4, "--max_steps", 6, "--data", "learn.jsonl"]
    run("train", "--model", model, "--start", start, *recipe, "--output", output, *more)


def refused(capsys, verb, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(verb, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("split", ["balanced", "anchored"])
def test_the_four_commands(split, precision, model, here, capsys, undrawn):
    mode = "kpm" if split == "anchored" else "ipm"
    init(model, "--mode", mode, "--quantization", "nf4")
    said = " ".join(capsys.readouterr().out.split())
    assert "quantized: with its adapter a layer is off by" in said
    assert "corda train --model start/base --start start --data" in said
    folds = split == "balanced"
    assert ("error: what quantization lost" in said, "┃ error ┃" in said.replace("    ", " ")) == (folds, folds)
    assert ("leak: tr(A C Aᵀ)" in said, "leak of the start" in (here / "start" / "README.md").read_text()) == (
        not folds,
        not folds,
    )
    train("start/base", "start", "--precision", precision)
    log = json.loads((here / "tuned" / "training.json").read_text())
    assert log["loss"][-1][1] < log["loss"][0][1]
    run(
        "eval",
        "--model",
        "start/base",
        "--adapter",
        "tuned",
        "--learn",
        "learn.jsonl",
        "--keep",
        "keep.jsonl",
        "--exact_match",
        "text",
        "--max_new_tokens",
        2,
        "--output",
        "eval.json",
    )
    said = capsys.readouterr().out
    assert ("measured beside the full model" in said) == (split == "balanced")
    results = json.loads((here / "eval.json").read_text())["results"]
    sides = results["learn"]["learn.jsonl"]
    assert sides["tuned"]["loss"] < sides["base"]["loss"]
    assert results["keep"]["keep.jsonl"]["tuned"]["drift"] > 0
    run("inspect", "--adapter", "tuned", "--output", "seen")
    said = " ".join(capsys.readouterr().out.split())
    assert ("a part of the model that its quantized base lacks" in said) == (split == "balanced")
    run("export", "--model", "start/base", "--adapter", "tuned", "--as", "merged", "--output", "merged")
    assert "dequantized, and merged: rounding changed the weights by" in " ".join(capsys.readouterr().out.split())
    base = AutoModelForCausalLM.from_pretrained("start/base", device_map="cpu").train()
    with torch.no_grad():
        expected = tiny.logits(PeftModel.from_pretrained(base, "tuned").train())
        merged = tiny.logits(AutoModelForCausalLM.from_pretrained("merged"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    export = ["export", "--model", "start/base", "--adapter", "tuned", "--output", "onto"]
    run(*export, "--original", model)
    assert "this is another function than on the quantized one" in " ".join(capsys.readouterr().out.split())
    assert "has something in it already" in refused(capsys, *export)  # that is for the quantized model


def test_the_full_model_for_eval_can_be_named(model, here, capsys):
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0)
    config = json.loads((here / "start" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["corda"]["original"] == {"model": str(model), "revision": None}
    del config["auto_mapping"]["corda"]["original"]
    (here / "start" / "adapter_config.json").write_text(json.dumps(config))
    (here / "start" / "sha256.json").unlink()
    arguments = ["--model", "start/base", "--adapter", "start", "--keep", "keep.jsonl"]
    assert "give --original, the full model" in refused(capsys, "eval", *arguments)
    run("eval", *arguments, "--original", model)


def test_the_start_over_4_bits_is_not_said_to_be_trained_too_fast(model, here, capsys, monkeypatch):
    """Its drift from the full model is the quantization's."""
    monkeypatch.setattr("corda_lora.report.verdicts.KEPT_WELL", 0.0)
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0)
    measured = ["--adapter", "start", "--keep", "keep.jsonl"]
    run("eval", "--model", "start/base", *measured)
    assert "a part of this is of the quantization" in " ".join(capsys.readouterr().out.split())
    train("start/base", "start", "--learning_rate", 1.0, "--precision", "fp32")
    run("eval", "--before", model, "--after", "tuned", "--keep", "keep.jsonl")
    assert "a part of this is of the quantization" in " ".join(capsys.readouterr().out.split())
    run("eval", "--before", model, "--after", model, "--keep", "keep.jsonl")
    assert "quantization" not in " ".join(capsys.readouterr().out.split())


def test_the_same_command_again(model, here, capsys):
    for _ in range(2):
        init(model, "--mode", "ipm", "--quantization", "nf4")
    card = (here / "start" / "README.md").read_text()
    assert "base_model:" not in card  # of a path, which the hub would refuse
    assert "what quantization lost and the start does not hold" in card
    assert "start is whole already: the same command made it" in capsys.readouterr().out


def test_what_is_refused(model, here, capsys, monkeypatch, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("adapter")
    (adapter / "adapter_config.json").write_text("{}")
    arguments = ["--model", model, "--context", "keep.jsonl", "--output", "start"]
    assert "fold puts what quantization lost" in refused(capsys, "init", *arguments, "--fold", 1, "--split", "balanced")
    heads = ["--quantization", "nf4", "--target_modules", "[lm_head, q_proj]"]
    assert "lm_head stays in full precision" in refused(capsys, "init", *arguments, *heads)
    assert "quantization is nf5" in refused(capsys, "init", *arguments, "--quantization", "nf5")
    assert "--original goes with --as lora only" in refused(
        capsys,
        *("export", "--model", model, "--adapter", adapter, "--as", "merged", "--original", model, "--output", "y"),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("corda_lora.models.weights.find_spec", lambda name: None)
    said = refused(capsys, "init", *arguments, "--quantization", "nf4")
    assert "the package bitsandbytes is needed: pip install bitsandbytes" in said
    assert sorted(p.name for p in here.iterdir()) == ["keep.jsonl", "learn.jsonl"]


def test_before_and_after_quantization(model, here, capsys):
    """The full model before; after, the quantized one with its adapter, and the two merged."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"what is {i}", "answers": ["4", f"{i}"]} for i in range(6)]
    (here / "webqs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(model, "--mode", "ipm", "--quantization", "nf4")
    run("export", "--model", "start/base", "--adapter", "start", "--as", "merged", "--output", "merged")
    changes = {}
    for after in ("start", "merged"):
        measured = ["--keep", "keep.jsonl", "--tasks", "webqs", "--data_dir", here, "--output", f"{after}.json"]
        run("eval", "--before", model, "--after", after, *measured)
        result = json.loads((here / f"{after}.json").read_text())
        assert result["results"]["keep"]["keep.jsonl"]["tuned"]["drift"] > 0
        changes[after] = {c["data"]: c for c in result["changes"] if c["measure"] != "recall"}
        assert changes[after]["webqs"]["samples"] == 6
    losses = [changes[after]["keep.jsonl"]["after"] for after in ("start", "merged")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] != changes["start"]["keep.jsonl"]["before"]
    said = refused(capsys, "eval", "--before", "start/base", "--after", "start", "--keep", "keep.jsonl")
    assert said == f"corda eval: the adapter in start is on weights in 4 bits: give --before {model}"
    (here / "start").rename(here / "moved")
    said = refused(capsys, "eval", "--before", model, "--after", "moved", "--keep", "keep.jsonl")
    assert said.endswith(f"start/base: give --model BASE --adapter moved --original {model}")


def test_the_original_is_no_quantized_model(model, here, capsys):
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0)
    said = "the original start/base is quantized itself: give the full model"
    beside = ["--model", "start/base", "--original", "start/base"]
    recipe = ["--context", "keep.jsonl", "--mode", "ipm", "--r", 4, "--output", "again"]
    assert said in refused(capsys, "init", *beside, *recipe)
    assert said in refused(capsys, "eval", *beside, "--adapter", "start", "--keep", "keep.jsonl")
    assert said in refused(capsys, "export", *beside, "--adapter", "start", "--output", "again")
    assert not (here / "again").exists()


def test_another_model_is_no_original(model, here, capsys, tokenizer, monkeypatch):
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0)
    tiny.build("llama_for_nf4", seed=5).save_pretrained(here / "other")
    tokenizer.save_pretrained(here / "other")
    monkeypatch.setattr("corda_lora.evaluation.evaluate.evaluate_beside", None)  # before the model runs
    beside = ["--model", "start/base", "--original", "other"]
    said = "the weights of the original other have nothing in common with these: it is another model"
    assert said in refused(capsys, "eval", *beside, "--adapter", "start", "--keep", "keep.jsonl")
    assert said in refused(capsys, "eval", *beside, "--keep", "keep.jsonl")
    assert said in refused(capsys, "export", *beside, "--adapter", "start", "--output", "again")


def test_an_adapter_on_another_residual_is_refused_before_the_full_model_runs(model, here, capsys, monkeypatch):
    for fold in (0, 1):
        init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", fold, output=f"start{fold}")
    monkeypatch.setattr("corda_lora.evaluation.evaluate.evaluate_beside", None)
    arguments = ["--model", "start1/base", "--adapter", "start0", "--keep", "keep.jsonl"]
    assert "the adapter in start0 was made for other weights" in refused(capsys, "eval", *arguments)


@pytest.mark.parametrize("keep", [["--keep", 1], ["--context", "keep.jsonl"], ["--keep_generic", 1]])
def test_no_drift_from_a_residual_is_asked_for(keep, model, here, capsys, monkeypatch):
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0)
    monkeypatch.setattr("corda_lora.evaluation.meter.collect_statistics", None)  # before the model runs
    monkeypatch.setattr("corda_lora.evaluation.meter.own_text", None)
    recipe = ["--model", "start/base", "--start", "start", "--data", "learn.jsonl", "--output", "tuned", *keep]
    assert "a part of the model is in the adapter" in refused(capsys, "train", *recipe)


def test_a_residual_alone_is_no_model_to_train_or_start_from(model, here, capsys):
    """It is one no more when an adapter is merged in."""
    init(model, "--mode", "ipm", "--split", "paper", "--r", 16)
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0, "--r", 16, output="start4")
    init(model, "--mode", "kpm", "--quantization", "nf4", output="whole4")  # anchored: all of the model is in its base
    capsys.readouterr()
    run("export", "--model", model, "--adapter", "start", "--as", "residual", "--output", "left")
    run("export", "--model", "start4/base", "--adapter", "start4", "--as", "merged", "--output", "merged")
    recipe = ["--data", "learn.jsonl", "--max_steps", 1, "--precision", "fp32", "--output", "tuned"]
    context = ["--context", "keep.jsonl", "--r", 4, "--output", "again"]
    for residual in ("start4/base", "left"):
        said = f"{residual} is a residual, a model without the part that its adapter holds:"
        assert said in refused(capsys, "train", "--model", residual, *recipe)
        assert said in refused(capsys, "train", "--model", residual, *recipe, "--context", "keep.jsonl", "--keep", 10)
        assert said in refused(capsys, "init", "--model", residual, *context)
    beside = ["init", "--model", "start4/base", "--original", model, *context, "--mode", "ipm"]
    assert "is a residual" in refused(capsys, *beside)
    run(*beside, "--fold", 1)  # puts what the residual lacks into the adapter
    kept = ["--keep", 1, "--context", "keep.jsonl"]
    run("export", "--model", "start4/base", "--adapter", "start4", "--output", "plain")  # for the residual alone
    of_plain = ["train", "--model", "start4/base", "--start", "plain", *recipe, *kept]
    assert "a part of the model is in the adapter" in refused(capsys, *of_plain)
    assert not (here / "tuned").exists()
    for whole in ("merged", "whole4/base"):
        run("train", "--model", whole, *recipe[:-1], f"on {whole[:5]}")


def test_a_start_that_holds_a_part_of_the_model_is_not_put_in_order_untrained(model, here, capsys):
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0)
    order = ["export", "--model", "start/base", "--as", "ordered", "--data", "keep.jsonl", "--output", "ordered"]
    said = refused(capsys, *order, "--adapter", "start")
    assert "the adapter in start holds a part of the model and is not trained yet" in said
    assert not (here / "ordered").exists()
    train("start/base", "start", "--precision", "fp32", "--learning_rate", 1e-5, "--max_steps", 1)
    run(*order, "--adapter", "tuned")


def test_an_original_is_of_a_quantized_model(model, here, capsys, request):
    init(model, "--mode", "ipm", "--split", "paper")
    run("export", "--model", model, "--adapter", "start", "--as", "residual", "--output", "left")
    beside = ["--original", model, "--output", "onto"]
    run("export", "--model", "left", "--adapter", "left/adapter", *beside)  # which lacks a part of the model, too
    request.getfixturevalue("no_model_is_loaded")  # from here on
    said = refused(capsys, "export", "--model", model, "--adapter", "start", *beside[:-1], "no")
    assert f"full model that a quantized MODEL was made from, and {model} is not quantized" in said
    said = refused(capsys, "init", "--model", model, "--context", "keep.jsonl", "--r", 4, *beside[:-1], "no")
    assert "original is for a model that is quantized already" in said
    assert not (here / "no").exists()


def test_two_half_precisions_are_refused(model, here, capsys):
    init(model, "--mode", "ipm", "--quantization", "nf4", "--fold", 0, "--dtype", "float16")
    recipe = ["--model", "start/base", "--start", "start", "--data", "learn.jsonl", "--max_steps", 1, "--output"]
    said = refused(capsys, "train", *recipe, "no")  # bf16 is the default
    assert "computes in fp16, which does not go with --precision bf16: --precision fp16 or fp32, or --dtype" in said
    assert not (here / "no").exists()
    run("train", *recipe, "tuned", "--dtype", "bfloat16")


def test_folding_has_a_bound(model, here, capsys):
    said = refused(capsys, "init", "--model", model, "--context", "keep.jsonl", "--output", "no", "--fold", 10**6)
    assert "fold is 1000000, but must be a whole number at least 0 and at most 100" in said
