"""The command, in this process: the four verbs in a row, recipes, broken-off runs, and every kind of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from jsonargparse import Namespace
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils
from transformers.models.llama.modeling_llama import LlamaMLP

from corda_lora.cli import main
from corda_lora.cli.arguments import with_data
from corda_lora.cli.shared import begin_imports
from corda_lora.config import CordaError, DataConfig, ModelConfig
from corda_lora.files import output_lock
from corda_lora.models.loading import load_model

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(12)]
LEARN = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 33)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty working directory for outputs, and beside it the files of samples."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


def init(checkpoint, data, *more, output="start"):
    context = ["--context", data / "keep.jsonl"]
    run("init", "--model", checkpoint, *context, "--r", 4, "--device", "cpu", "--output", output, *more)


def train(checkpoint, data, *more, output="tuned"):
    recipe = ["--precision", "fp32", "--batch_size", 4, "--learning_rate", 0.01]
    run("train", "--model", checkpoint, "--data", data / "learn.jsonl", *recipe, "--output", output, *more)


def run(*arguments):
    main([str(a) for a in arguments])


def refused(capsys, *arguments, call=run):
    """Run a command that must exit with 2; the sentence it says, its last line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def nothing_left(folder):
    return not list((folder / "work").iterdir())


# --- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_four_commands(mode, checkpoint, data, capsys):
    work = data / "work"
    init(checkpoint, data, "--mode", mode)
    split = "anchored" if mode == "kpm" else "seeded"
    assert f"corda, {mode}, {split}, covariance, 3,712 parameters" in capsys.readouterr().out
    record = json.loads((work / "start" / "corda.json").read_text())
    assert record["context"]["samples"] == 12
    assert record["data"]["data"] == str(data / "keep.jsonl")

    train(checkpoint, data, "--start", "start", "--epochs", 3)
    assert sorted(p.name for p in work.iterdir()) == ["start", "tuned"]
    log = json.loads((work / "tuned" / "training.json").read_text())
    assert log["steps"] == 24
    assert log["loss"][-1][1] < log["loss"][0][1] - 0.3
    assert json.loads((work / "tuned" / "corda.json").read_text())["fingerprint"] == record["fingerprint"]

    model = ["--model", checkpoint, "--adapter", "tuned"]
    run("eval", *model, "--keep", data / "keep.jsonl", "--learn", data / "learn.jsonl", "--output", "eval.json")
    results = json.loads((work / "eval.json").read_text())["results"]
    learned, kept = results["learn"][str(data / "learn.jsonl")], results["keep"][str(data / "keep.jsonl")]
    assert learned["tuned"]["loss"] < learned["base"]["loss"] - 0.3
    assert kept["tuned"]["drift"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "drift" in shown
    assert re.search(r"keep keep.jsonl: (kept well|kept in part|not kept): the probabilities of an answer's", shown)
    assert "learn learn.jsonl: learned: a token of a right answer is " in shown

    before = tiny.logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), "tuned"))
    run("export", *model, "--as", "merged", "--output", "merged")
    torch.testing.assert_close(tiny.logits(AutoModelForCausalLM.from_pretrained("merged")), before, rtol=0, atol=1e-4)
    assert (work / "merged" / "tokenizer.json").is_file()
    capsys.readouterr()
    run("export", *model, "--as", "lora", "--r", 2, "--output", "small")
    assert "compressed to rank 2: relative error" in capsys.readouterr().out
    assert json.loads((work / "small" / "adapter_config.json").read_text())["r"] == 2
    run("export", *model, "--output", "lora")
    lora = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), "lora")
    torch.testing.assert_close(tiny.logits(lora), before, rtol=0, atol=1e-4)


def test_train_without_a_start_is_a_plain_lora(checkpoint, data):
    train(checkpoint, data, "--r", 3, "--target_modules", "[q_proj]", "--max_steps", 2)
    config = json.loads((data / "work" / "tuned" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert not (data / "work" / "tuned" / "corda.json").exists()
    assert all("q_proj" in name for name in load_file("tuned/adapter_model.safetensors"))


def test_the_loss_is_on_the_response_alone(checkpoint, data):
    """Prompts differ, responses do not: the first loss is that of the responses, token by token."""
    train(checkpoint, data, "--max_steps", 1, "--batch_size", 32, "--warmup", 0)
    run("eval", "--model", checkpoint, "--learn", data / "learn.jsonl", "--output", "eval.json")
    base = json.loads((data / "work" / "eval.json").read_text())["results"]["learn"][str(data / "learn.jsonl")]
    log = json.loads((data / "work" / "tuned" / "training.json").read_text())
    assert log["loss"][0][1] == pytest.approx(base["base"]["loss"], abs=2e-4)


def test_micro_batches_train_the_same(checkpoint, data):
    for micro in (4, 2):
        train(checkpoint, data, "--micro_batch_size", micro, "--max_steps", 3, "--r", 3, output=f"micro{micro}")
    whole, parts = load_file("micro4/adapter_model.safetensors"), load_file("micro2/adapter_model.safetensors")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=2e-3)


def test_recipe_of_mixed_precision_and_checkpointing(checkpoint, data):
    init(checkpoint, data, "--split", "balanced")
    more = ["--start", "start", "--precision", "bf16", "--gradient_checkpointing", "true", "--max_steps", 12]
    train(checkpoint, data, *more)
    log = json.loads((data / "work" / "tuned" / "training.json").read_text())
    assert log["loss"][-1][1] < log["loss"][0][1] - 0.2
    assert all(t.dtype == torch.float32 for t in load_file("tuned/adapter_model.safetensors").values())


def test_same_command_same_bytes(checkpoint, data):
    work = data / "work"
    for output in ("one", "two"):
        init(checkpoint, data, "--samples", 7, output=output)
        train(checkpoint, data, "--start", output, "--max_steps", 3, output=f"{output}-tuned")
    assert weights(work / "one") == weights(work / "two")
    assert weights(work / "one-tuned") == weights(work / "two-tuned")
    assert weights(work / "one") != weights(work / "one-tuned")
    init(checkpoint, data, "--samples", 7, "--seed", 1, output="other")
    assert weights(work / "one") != weights(work / "other")
    train(checkpoint, data, "--start", "one", "--max_steps", 3, "--seed", 1, output="shuffled")
    assert weights(work / "one-tuned") != weights(work / "shuffled")


def test_training_that_diverges_leaves_nothing(checkpoint, data, capsys):
    train_options = ["--max_steps", 4, "--learning_rate", 1e12, "--lora_alpha", 1e12, "--precision", "fp32"]
    with pytest.raises(SystemExit) as stopped:
        train(checkpoint, data, *train_options)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert re.search(r"^corda train: the (loss was|trained parameters were) .* at step [2-4]: ", said, re.MULTILINE)
    assert nothing_left(data)


@pytest.mark.parametrize("split", ["anchored", "seeded", "paper"])
def test_a_broken_off_training_goes_on_to_the_same_bytes(split, checkpoint, data, monkeypatch, capsys):
    from corda_lora.training import train as training

    work, recipe = data / "work", ["--start", "start", "--max_steps", 8, "--checkpoints", 4, "--lora_dropout", 0.1]
    init(checkpoint, data, "--split", split)
    train(checkpoint, data, *recipe, output="whole")

    steps, on_step_end = [], training._Steps.on_step_end

    def broken(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Steps, "on_step_end", broken)
    with pytest.raises(SystemExit) as stopped:
        train(checkpoint, data, *recipe, output="broken")
    assert stopped.value.code == 130
    assert not (work / "broken").exists()

    run_file = work / "broken.work" / "run.json"
    earlier = json.loads(run_file.read_text())
    del earlier["train"]["compile"]  # as a version wrote it that had no such option
    run_file.write_text(json.dumps(earlier))
    message = refused(capsys, *recipe, "--seed", 1, call=lambda *a: train(checkpoint, data, *a, output="broken"))
    assert "unfinished work of another run (data.seed was 0 there and is 1 here)" in message

    train(checkpoint, data, *recipe, output="broken")
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert weights(work / "broken") == weights(work / "whole")
    assert sorted(p.name for p in work.iterdir()) == ["broken", "start", "whole"]


def test_dashes_and_underscores(checkpoint, data):
    init(checkpoint, data, "--target-modules=[q_proj,v_proj]", "--lora_alpha", 8, "--max-length", 9)
    config = json.loads((data / "work" / "start" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    record = json.loads((data / "work" / "start" / "corda.json").read_text())
    assert (record["config"]["lora_alpha"], record["data"]["max_length"]) == (8, 9)


def test_recipe_and_flags_over_it(checkpoint, data):
    (data / "recipe.yaml").write_text(
        f"model: {checkpoint}\ncontext: {data}/keep.jsonl\nmode: ipm\nsplit: paper\nr: 3\ndevice: cpu\n"
        "prompt: 'Q: {prompt}'\nresponse: '{response} # end'\noutput: start\n"
    )
    run("init", "--config", data / "recipe.yaml", "--r", 5)
    record = json.loads((data / "work" / "start" / "corda.json").read_text())
    assert (record["config"]["mode"], record["config"]["split"], record["config"]["r"]) == ("ipm", "paper", 5)
    assert record["data"]["prompt"] == "Q: {prompt}"
    assert record["data"]["response"] == "{response} # end"


def test_evaluation_recipe(checkpoint, data):
    (data / "recipe.yaml").write_text(
        f"keep:\n- {data}/keep.jsonl\n- data: {data}/learn.jsonl\n  rows: train[:4]\n  prompt: '{{prompt}}'\n"
    )
    run("eval", "--model", checkpoint, "--config", data / "recipe.yaml", "--output", "eval.json")
    keep = json.loads((data / "work" / "eval.json").read_text())["results"]["keep"]
    assert list(keep) == [f"{data}/keep.jsonl", f"{data}/learn.jsonl"]


def test_help_and_exit_codes_of_the_command():
    code = "import sys; from corda_lora.cli import main; main(sys.argv[1:])"

    def command(*arguments):
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

    shown = command("--help")
    assert shown.returncode == 0
    assert all(f"corda {verb}" in shown.stdout for verb in ("init", "train", "eval", "export"))
    assert command().returncode == 2
    missing = command("eval", "--model", "m", "--keep", "nowhere.jsonl")
    assert missing.returncode == 2
    assert missing.stderr == "corda eval: there is no file nowhere.jsonl\n"
    code = "import sys, corda_lora.cli.parser as p; p.build_parser(); sys.exit('torch' in sys.modules)"
    assert command().returncode == 0  # help is quick: the parser needs no torch


REFUSED = [
    ("train --model nowhere/ --data good.jsonl", "there is no model in nowhere/"),
    ("train --model model --data good.jsonl --prompt {x}", "no column 'x' for the template '{x}'"),
    ("init --model ./nowhere --context good.jsonl --r 2", "there is no model in ./nowhere"),
    ("init --model nowhere.gguf --context good.jsonl --r 2", "there is no file nowhere.gguf"),
    ("init --model model --context good.jsonl --r 2 --prompt {x}", "no column 'x' for the template '{x}'"),
    ("eval --before /nowhere --after model --keep good.jsonl", "there is no model in /nowhere"),
    ("eval --model model --original ./nowhere --keep good.jsonl", "there is no model in ./nowhere"),
    ("inspect --model ./nowhere --context good.jsonl", "there is no model in ./nowhere"),
]


def test_bad_input_is_refused_before_the_long_imports(tmp_path):
    """They take 10 s of a processor and more."""
    (tmp_path / "good.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    code = (
        "import contextlib, json, sys; from corda_lora.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit): main([*command.split(), '--output', 'out'])\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    commands = json.dumps([command for command, _ in REFUSED])
    ended = subprocess.run([sys.executable, "-c", code, commands], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0
    lines = ended.stderr.splitlines()
    assert len(lines) == len(REFUSED)
    assert all(said in line for (_, said), line in zip(REFUSED, lines))


def test_the_long_imports_are_said_when_they_begin(monkeypatch, capsys):
    begin_imports(Namespace())
    assert capsys.readouterr().err == ""  # they are done
    monkeypatch.delitem(sys.modules, "torch")
    begin_imports(Namespace())
    assert capsys.readouterr().err == "loading PyTorch and Transformers\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("init --model m --context nothere.jsonl --output o", "there is no file nothere.jsonl"),
        ("train --model m --data nothere.jsonl --output o", "there is no file nothere.jsonl"),
        ("train --model m --start nothere --data new --output o", "nothere is not an adapter directory"),
        ("eval --model m --keep nothere.jsonl", "there is no file nothere.jsonl"),
        ("eval --model m --adapter nothere --keep known", "nothere is not an adapter directory"),
        ("export --model m --adapter nothere --output o", "nothere is not an adapter directory"),
        ("inspect --adapter nothere --output o", "nothere is not an adapter directory"),
    ],
)
def test_what_is_not_there_is_said_before_torch_is_imported(command, message, tmp_path):
    code = "import sys\nfrom corda_lora.cli import main\ntry:\n main()\nfinally:\n print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, cwd=tmp_path)
    assert message in ended.stderr
    assert (ended.returncode, ended.stdout) == (2, "False\n")


# --- bad input: one sentence, exit code 2, nothing left --------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["init", "--r", "many"], "corda init: r is many, but must be a whole number at least 1 and at most"),
        (
            ["train", "--data", "x", "--data.samples", "3"],
            "corda train: --data.samples is no option of this command: give --samples",
        ),
        (["init", "--model", "m", "--r.x", "3"], "corda init: --r.x is no option of this command"),
        (["init", "--modle", "x"], "corda init: unrecognized arguments: --modle x"),
        (["init", "--mode", "kmp"], "corda init: mode is kmp, but must be one of kpm, ipm"),
        (
            ["train", "--max_steps", "true"],
            "corda train: max_steps is true, but must be a whole number at least 1 and at",
        ),
        (
            ["train", "--lora_alpha", "nan"],
            "corda train: lora_alpha is nan, but must be a number at least 1e-09 and at",
        ),
        (["train", "--compile", "maybe"], "corda train: compile is maybe, but must be true or false"),
        (["eval", "--config", "inner.yaml"], "corda eval: samples is many, but must be a whole number at least 1"),
        (["eval", "--config", "needed.yaml"], "corda: keep: data is needed"),
        (["init", "--config", "aliases.yaml"], "corda init: r is [[[0, 0, 0, 0, 0, 0"),
        (["init", "--config", "list.yaml"], "corda init: the recipe is no mapping of options to values"),
        (["init", "--config", "latin.yaml"], "corda: the recipe is not UTF-8: it has the byte 0xe9"),
        (["compare", "rates.yaml"], "corda compare: learning_rates is fast, but must be a list, each item a number"),
        (["init"], "corda init: give --model, --output"),
        (
            ["compare", "recipe.yaml"],
            "corda compare: Subcommand 'compare' does not accept option 'train.max_stepz'; nearest names: train.max_",
        ),
        (
            ["compare", "methods.yaml"],
            "corda compare: methods.mine: Option 'rates' is not accepted; nearest names: learning_rates",
        ),
        (["compare", "rows.yaml"], "corda compare: context: Option 'rowz' is not accepted; nearest names: rows"),
        (["compare", "nothing.yaml"], "corda compare: config: File does not exist:"),
        (["init", "recipe.yaml"], "corda init: a recipe is given as --config recipe.yaml"),
        (["compare", "r.yaml", "--seeds", "3", "s.yaml"], "corda compare: a recipe is given as --config s.yaml"),
        (["compare", "init.yaml"], "corda compare: mode is an option of init, or of a method under `methods`: a rec"),
        (["compare", "twice.yaml"], "corda compare: Problems parsing config: the key 'model' is given twice (line 1"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("train: {max_stepz: 5}\n")
    Path("inner.yaml").write_text("keep: {data: d, samples: many}\n")
    Path("needed.yaml").write_text("keep: {prompt: p}\n")
    Path("aliases.yaml").write_text(f"r: [&a [&b {[0] * 50}, {'*b, ' * 50}], {'*a, ' * 10}]\n")
    Path("list.yaml").write_text("- a\n")
    Path("latin.yaml").write_bytes(b"model: m\xe9\n")
    Path("rates.yaml").write_text("methods: {lora: {learning_rates: fast}}\n")
    Path("r.yaml").write_text("methods: [lora]\n")
    Path("init.yaml").write_text("mode: kpm\n")
    Path("twice.yaml").write_text("model: one\nmodel: two\n")
    Path("methods.yaml").write_text("methods: {lora: {learning_rates: [1, 2]}, mine: {method: lora, rates: [1, 2]}}\n")
    Path("rows.yaml").write_text("context: {data: d, rowz: train}\n")
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert line.endswith((f"(all options: corda {given[0]} --help)", "(all options: corda --help)"))
    assert len(line) < 240 or "config" in line


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan --config a.yaml", "corda plan: a.yaml is a recipe of a comparison: type corda plan a.yaml"),
        ("train --config=a.yaml", "corda train: a.yaml is a recipe of a comparison: type corda compare a.yaml"),
        ("plan a.yaml b.yml", "corda plan: one recipe at a time: type corda plan a.yaml, and then corda plan b.yml"),
    ],
)
def test_where_a_comparisons_recipe_belongs_is_said(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yml"):
        Path(name).write_text("methods: [lora]\ncontext: {data: d}\ntrain: {max_steps: 5}\n")
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("init --model m --output o --batch_tokens 0", "batch_tokens is 0, but must be a whole number at least 1"),
        ("init --model m --output o --seed -1", "seed is -1, but must be a whole number at least 0"),
        ("plan --model m --tflops -1", "tflops is -1.0, but must be a number at least 1e-09"),
        ("train --model m --output o --data d --epochs 0", "epochs is 0.0, but must be a number at least 1e-09"),
        (
            "train --model m --output o --data d --lora_alpha 1e-320",
            "lora_alpha is 1e-320, but must be a number at least",
        ),
        ("train --model m --output o --data d --weight_decay 1e300", "weight_decay is 1e+300, but must be a number at"),
        ("eval --model m --learn d --learn.samples [[", "learn.samples is '[[', but must be a whole number"),
        ("eval --model m --learn d --learn.chat maybe", "learn.chat is 'maybe', but must be true or false"),
        ("eval --model m --keep.prompt {q}", "--keep.prompt goes with data: give --keep DATA, too"),
        (
            "train --model m --output o --data d --context.weight 2",
            "--context.weight goes with data: give --context DATA",
        ),
        ("eval --model m --learn d --learn.promt x", "learn.promt is no option: there are learn.data, learn.prompt,"),
        ("train --model m --data d --output file/x", "the output file/x cannot be written: "),
        ("demo --output .", "the output . is a folder in use"),
        ("export --model m --adapter a --output " + 251 * "n", "the output's name is too long: 250 bytes at most"),
        (
            "compare --model m --data d --methods [lora] --eval.learn e --output " + 251 * "n",
            "the output's name is too",
        ),
        (
            "compare --model m --data d --methods [lora] --eval.learn e --output link",
            "the output link is a symbolic link",
        ),
        ("compare --model m --data d --methods [lora] --eval.learn e --output file/x", "the output file/x cannot be"),
        (
            "compare --model m --output o --data d --eval.learn e --methods {l:\xa0{learning_rates:\xa0[1,1.0000001]}}",
            "two learning rates of l have the same first six digits",
        ),
        ("export --model m --output o --adapter a --r 0", "r is 0, but must be a whole number at least 1"),
        ("eval --model m --keep {data:\xa0d,samples:\xa00}", "samples is 0, but must be a whole number at least 1"),
        ("eval --model m --learn d --exact_match ((", "exact_match '((' is no regular expression"),
        ("compare --model m --output o --data d --methods [lora] --eval.learn e --jobs -1", "jobs is -1, but must be"),
        ("compare --model m --output o --data d --methods [lora] --eval.learn e --train.epochs -1", "epochs is -1.0,"),
        (
            "compare --model m --output o --data d --methods {lora:\xa0{learning_rates:\xa0[-1.0]}} --eval.learn e",
            "learning_rates is [-1.0], but must be a list, each item a number at least 1e-09",
        ),
    ],
)
def test_a_number_out_of_range_is_refused_before_work(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    line = refused(capsys, *[a.replace("\xa0", " ") for a in arguments.split(" ")])
    assert line.startswith(f"corda {arguments.split()[0]}: {said}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("x"), 1, "corda init: this is a bug of corda-lora: please report it with the lines above"),
        (PermissionError(13, "Permission denied", "x"), 2, "corda init: Permission denied: 'x'"),
        (MemoryError(), 2, "corda init: out of memory (MemoryError)"),
        (ModuleNotFoundError("no", name="gguf"), 2, "corda init: the package gguf is needed: pip install gguf"),
        (
            ModuleNotFoundError("no"),
            1,
            "corda init: this is a bug of corda-lora",
        ),  # of an attribute
        (CordaError("a b\n" * 5000), 2, "corda init: a b a b"),
    ],
)
def test_what_ends_a_command(error, code, said, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("corda_lora.adapters.prepare.check_output", fail)
    with pytest.raises(SystemExit) as stopped:
        run("init", "--model", "m", "--orientation", "identity", "--output", "o")
    assert stopped.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(said)
    assert len(lines[-1]) < 500
    assert ("Traceback" in lines[0]) == (code == 1)


def test_an_unknown_verb_is_told_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        run("nonsense")
    said = capsys.readouterr().err
    assert "(choose from 'demo', 'init', 'plan', 'train', 'eval', 'compare', 'inspect', 'export')" in said


def test_sigterm_keeps_the_work_and_exits_with_143(checkpoint, data, monkeypatch, capsys):
    from corda_lora.training import train as training

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training._Steps, "on_step_end", stop)
    with pytest.raises(SystemExit) as stopped:
        train(checkpoint, data, "--max_steps", 4, "--checkpoints", 4)
    assert stopped.value.code == 143
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "corda train: stopped; finished work is kept, and the same command goes on from it"
    assert sorted(p.name for p in (data / "work").iterdir()) == ["tuned.work"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("verb", ["init", "eval"])
def test_sigterm_in_the_middle_of_a_forward(verb, checkpoint, data, monkeypatch, capsys):
    """`init` runs every batch in a greenlet of its own, where the signal then arrives."""
    forward = LlamaMLP.forward

    def stop(self, x):
        if verb == "eval" or Path("out.work/run.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, x)

    given = (
        ["--context", data / "keep.jsonl", "--batch_tokens", 60] if verb == "init" else ["--keep", data / "keep.jsonl"]
    )
    command = [verb, "--model", checkpoint, *given, "--output", "out"]
    monkeypatch.setattr(LlamaMLP, "forward", stop)
    with pytest.raises(SystemExit) as stopped:
        run(*command)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert stopped.value.code == 143
    kept = "; finished work is kept, and the same command goes on from it" * (verb == "init")
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"corda {verb}: stopped{kept}"
    assert sorted(p.name for p in Path().iterdir()) == ["out.work"] * (verb == "init")
    run(*command)
    assert [p.name for p in Path().iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target_modules", "[q_prj]"], "matches no layer of LlamaForCausalLM; nearest names: q_proj"),
        (["--target_modules", "[embed_tokens]"], "CorDA adapts linear layers only"),
        (
            ["--r", "17", "--target_modules", "[k_proj]"],
            "r is 17, but model.layers.0.self_attn.k_proj (16 × 32) has only 16 components",
        ),
        (["--r", "0"], "r is 0, but must be a whole number at least 1"),
        (["--damping", "0"], "damping is 0.0, but must be a number at least 1e-09"),
        (["--prompt", "{question}"], "no column 'question' for the template '{question}': it has prompt, response"),
        (["--context", "missing.jsonl"], "there is no file missing.jsonl"),
        (["--context", "someone/nothing"], "cannot load data 'someone/nothing'"),
        (["--model", "./nowhere"], "there is no model in ./nowhere: it has no config.json"),
        (["--model", "nowhere/"], "there is no model in nowhere/: it has no config.json"),
        (["--model", "someone/nothing"], "cannot load the model 'someone/nothing' (and there is no directory"),
        (["--model", "nowhere.gguf"], "there is no file nowhere.gguf"),
    ],
)
def test_init_refuses(more, message, checkpoint, data, capsys):
    said = refused(capsys, *more, call=lambda *a: init(checkpoint, data, *a))
    assert said.startswith("corda init: ")
    assert message in said
    assert nothing_left(data)


def test_others_of_the_data_have_a_bar_of_their_own(checkpoint, data, capsys):
    context = ["--context", data / "learn.jsonl", "--samples", 8]
    run("init", "--model", checkpoint, *context, "--r", 4, "--device", "cpu", "--output", "start")
    said = capsys.readouterr().err
    assert re.search(r"other samples .*14/14", said)


def test_the_interpreters_end_looks_through_no_objects():
    """Those of torch and transformers take it seconds."""
    script = "atexit.register(lambda: print(gc.get_freeze_count() > 0)); main(['nonsense'])"
    script = f"import atexit, gc; from corda_lora.cli import main; {script}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "True\n")


def test_a_base_that_has_moved_is_no_matter_at_the_checkpoints(checkpoint, data, capsys):
    shutil.copytree(checkpoint, data / "before")
    init(data / "before", data)
    (data / "before").rename(data / "after")
    train(data / "after", data, "--start", "start", "--max_steps", 2, "--checkpoints", 2, "--keep", 0)
    assert "config file" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"text": ""}\n'])
def test_an_empty_context_file(content, checkpoint, data, capsys):
    (data / "keep.jsonl").write_text(content)
    assert "keep.jsonl" in refused(capsys, call=lambda: init(checkpoint, data))
    assert nothing_left(data)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_not_finite_is_named(value, checkpoint, data, capsys):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float(value)
    model.save_pretrained(data / "damaged")
    arguments = ["--orientation", "identity", "--r", 4, "--device", "cpu", "--output", "start"]
    said = refused(capsys, "init", "--model", data / "damaged", *arguments)
    assert "the weight of model.layers.1.mlp.up_proj holds NaN or infinity: the checkpoint is damaged" in said


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "xpu", "meta"])
def test_a_device_that_is_missing(device, checkpoint, data, capsys):
    said = refused(capsys, "--device", device, call=lambda *a: init(checkpoint, data, *a))
    assert said.startswith(f"corda init: there is no device '{device}' on this machine: ")
    assert nothing_left(data)


def test_no_context_is_for_the_plain_svd_only(checkpoint, data, capsys):
    arguments = ["init", "--model", checkpoint, "--r", 4, "--device", "cpu", "--output", "start"]
    assert "give a --context" in refused(capsys, *arguments)
    run(*arguments, "--orientation", "identity")
    assert (data / "work" / "start" / "adapter_model.safetensors").is_file()


def test_nan_in_the_activations_names_layer_and_sample(checkpoint, data, tokenizer, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Z")] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    rows = [{"text": f"{i} fine {'!' * i}"} for i in range(5)] + [{"text": "one sample has a Z in it"}]
    (data / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(capsys, call=lambda: init(tmp_path / "broken", data))
    assert "input of model.layers.0.self_attn.q_proj, sample 5 of the context" in said
    assert nothing_left(data)


@pytest.mark.parametrize("verb", ["train", "eval", "export"])
def test_an_adapter_for_other_weights(verb, checkpoint, data, tokenizer, capsys):
    init(checkpoint, data)
    tiny.build("llama", seed=1).save_pretrained(data / "other")
    tokenizer.save_pretrained(data / "other")
    arguments = {
        "train": ["--start", "start", "--data", data / "learn.jsonl", "--output", "out"],
        "eval": ["--adapter", "start", "--keep", data / "keep.jsonl", "--output", "out"],
        "export": ["--adapter", "start", "--as", "merged", "--output", "out"],
    }[verb]
    said = refused(capsys, verb, "--model", data / "other", *arguments)
    assert f"the adapter in start was made for other weights than these (its base was {checkpoint})" in said
    assert [p.name for p in (data / "work").iterdir()] == ["start"]


@pytest.mark.parametrize("verb", ["train", "inspect"])
def test_an_adapter_for_the_same_weights_in_another_dtype(verb, checkpoint, data, capsys):
    init(checkpoint, data)
    arguments = {
        "train": ["--start", "start", "--data", data / "learn.jsonl", "--output", "out"],
        "inspect": ["--adapter", "start", "--context", data / "keep.jsonl", "--output", "out"],
    }[verb]
    said = refused(capsys, verb, "--model", checkpoint, *arguments, "--dtype", "float16")
    assert f"was made for other weights than these (its base was {checkpoint}), or the same in float32: " in said
    assert said.endswith("load the model in float32 (--dtype float32)")


@pytest.mark.parametrize("verb", ["init", "train", "export"])
def test_an_output_with_something_in_it(verb, checkpoint, data, capsys):
    init(checkpoint, data)
    (data / "work" / "out").mkdir()
    (data / "work" / "out" / "mine").write_text("mine")
    arguments = {
        "init": ["--context", data / "keep.jsonl"],
        "train": ["--start", "start", "--data", data / "learn.jsonl"],
        "export": ["--adapter", "start"],
    }[verb]
    said = refused(capsys, verb, "--model", checkpoint, *arguments, "--output", "out")
    assert said == f"corda {verb}: the output out has something in it already: remove it, or choose another"
    assert [p.name for p in (data / "work" / "out").iterdir()] == ["mine"]


def test_the_same_command_again_finds_its_output_whole(checkpoint, data, capsys):
    """A loop that retries until a command succeeds ends."""
    init(checkpoint, data)
    train(checkpoint, data, "--start", "start", "--max_steps", 2)
    before = {path: path.stat().st_mtime_ns for path in (data / "work").rglob("*")}
    capsys.readouterr()
    init(checkpoint, data)
    train(checkpoint, data, "--start", "start", "--max_steps", 2)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{name} is whole already: the same command made it" for name in ("start", "tuned")]
    assert {path: path.stat().st_mtime_ns for path in (data / "work").rglob("*")} == before
    for more, why in (
        (["--r", 5], "config.r was 4 there and is 5 here"),
        (["--samples", 3], "data.samples was 1000 there and is 3 here"),
        (["--batch_tokens", 100], "batch_tokens was 4096 there and is 100 here"),
        (["--dtype", "float32"], "dtype was 'auto' there and is 'float32' here"),
    ):
        said = refused(capsys, *more, call=lambda *a: init(checkpoint, data, *a))
        assert f"start has something in it already, made by another command ({why}): remove it" in said
    said = refused(capsys, "--start", "start", "--max_steps", 3, call=lambda *a: train(checkpoint, data, *a))
    assert "another command (recipe.train.max_steps was 2 there and is 3 here)" in said


def test_the_output_of_an_earlier_version_is_whole_where_its_options_were_at_their_defaults(checkpoint, data, capsys):
    init(checkpoint, data)
    path = data / "work" / "start" / "corda.json"
    record = json.loads(path.read_text())
    del record["config"]["weights"], record["data"]["bad_images"]
    record["config"]["allocation"] = "compactness"
    path.write_text(json.dumps(record))
    capsys.readouterr()
    init(checkpoint, data)
    assert "is whole already" in capsys.readouterr().out
    other = ["--bad_images", "skip"]
    assert "has something in it already" in refused(capsys, *other, call=lambda *a: init(checkpoint, data, *a))
    record["config"]["allocation"] = "drift"
    path.write_text(json.dumps(record))
    said = refused(capsys, call=lambda: init(checkpoint, data))
    why = "config.allocation was 'drift' there, an option that is gone"
    assert f"has something in it already, made by another command ({why}): remove it, or choose another" in said


def test_a_training_of_an_earlier_version_is_whole(checkpoint, data, capsys):
    train(checkpoint, data, "--max_steps", 2)
    path = data / "work" / "tuned" / "training.json"
    record = json.loads(path.read_text())
    del record["recipe"]["train"]["compile"], record["recipe"]["keep"]["weights"], record["recipe"]["model"]["labels"]
    del record["recipe"]["train"]["trainer"]  # whose default is a new dictionary each time
    path.write_text(json.dumps(record))
    capsys.readouterr()
    train(checkpoint, data, "--max_steps", 2)
    assert "is whole already" in capsys.readouterr().out
    other = ["--max_steps", 2, "--compile", "true"]
    assert "has something in it already" in refused(capsys, *other, call=lambda *a: train(checkpoint, data, *a))


def test_the_same_export_again_finds_its_output_whole(checkpoint, data, capsys):
    init(checkpoint, data)
    train(checkpoint, data, "--start", "start", "--max_steps", 2)
    model = ["--model", checkpoint, "--adapter", "tuned"]
    for form in (["--r", 2], ["--uniform"], ["--as", "merged"]):
        output = ["--output", "as_" + form[0].strip("-")]
        run("export", *model, *form, *output)
        capsys.readouterr()
        run("export", *model, *form, *output)
        assert "is whole already: the same command made it" in capsys.readouterr().out
        assert "has something in it already" in refused(capsys, "export", *model, "--r", 1, *output)
    train(checkpoint, data, "--start", "start", "--max_steps", 3, output="other")
    other = ["--model", checkpoint, "--adapter", "other", "--uniform", "--output", "as_uniform"]
    assert "has something in it already" in refused(capsys, "export", *other)


def test_the_same_command_on_other_data_is_not_the_same(checkpoint, data, capsys):
    more = ["--start", "start", "--max_steps", 2]
    init(checkpoint, data)
    train(checkpoint, data, *more)
    for name, checked, again in (
        ("keep", "samples_sha256", init),
        ("learn", "recipe.sha256.data", lambda *a: train(*a, *more)),
    ):
        text = (data / f"{name}.jsonl").read_text()
        (data / f"{name}.jsonl").write_text(text.replace("1", "2", 1))
        said = refused(capsys, call=lambda f=again: f(checkpoint, data))
        assert f"has something in it already, made by another command ({checked} has another checksum)" in said
        (data / f"{name}.jsonl").write_text(text)
        again(checkpoint, data)
        assert "is whole already" in capsys.readouterr().out
    (data / "work" / "start").rename(data / "work" / "before")
    init(checkpoint, data, "--seed", 1, "--samples", 9)
    assert "has something in it already" in refused(capsys, call=lambda: train(checkpoint, data, *more))


def test_eval_overwrites_its_own_results_only(checkpoint, data, capsys):
    arguments = ["eval", "--model", checkpoint, "--keep", data / "keep.jsonl", "--output"]
    mine = (data / "keep.jsonl").read_bytes()
    assert "holds no results of corda eval" in refused(capsys, *arguments, data / "keep.jsonl")
    assert (data / "keep.jsonl").read_bytes() == mine
    run(*arguments, "eval.json")
    first = (data / "work" / "eval.json").read_text()
    run(*arguments, "eval.json")
    assert (data / "work" / "eval.json").read_text() == first


@pytest.mark.parametrize("verb", ["demo", "init", "train", "eval", "export", "compare"])
def test_two_runs_with_one_output(verb, checkpoint, data, capsys):
    more = {
        "init": ["--orientation", "identity"],
        "train": ["--data", "d"],
        "demo": [],
        "eval": ["--keep", "d"],
        "export": ["--adapter", "a"],
        "compare": ["--data", "d", "--methods", "[lora]", "--eval.learn", "e"],
    }[verb]
    model = [] if verb == "demo" else ["--model", checkpoint]
    with output_lock(Path("out")):
        said = refused(capsys, verb, *model, "--output", "out", *more)
    assert said == f"corda {verb}: another run is writing out now: wait for its end, or choose another output"


def test_a_solver_that_does_not_converge_is_said_once_a_run(checkpoint, data, monkeypatch, capsys):
    """Fourteen layers, one note: however Python treats a warning that comes again."""
    monkeypatch.setattr("corda_lora.algebra.solvers.leading_singular_vectors", lambda *_: None)
    warnings.simplefilter("always")
    init(checkpoint, data, "--solver", "subspace", output="fallen")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("did not converge") == 1
    assert "did not converge on 14 layers, such as model.layers.0.self_attn.q_proj: gram" in said
    monkeypatch.undo()
    monkeypatch.chdir(data / "work")
    init(checkpoint, data, "--solver", "gram", output="gram")
    assert "did not converge" not in capsys.readouterr().err
    tensors = [load_file(data / "work" / name / "adapter_model.safetensors") for name in ("fallen", "gram")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (SafetensorError("No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "the quota of this disk is used up"),
        (SafetensorError("I/O error: File too large (os error 27)"), "a file may not be as large here (ulimit -f)"),
    ],
)
def test_a_full_disk(error, why, checkpoint, data, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise error

    init(checkpoint, data)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    said = refused(capsys, call=lambda: init(checkpoint, data, output="full"))
    assert said == f"corda init: {why}: full could not be written, and nothing is left of it"
    assert {p.name for p in (data / "work").iterdir()} == {"start", "full.work"}  # what was computed is kept

    more = ["--start", "start", "--max_steps", 2]
    assert "the disk is full or cannot" in refused(capsys, call=lambda: train(checkpoint, data, *more))  # a checkpoint
    assert not (data / "work" / "tuned").exists()
    monkeypatch.undo()
    monkeypatch.chdir(data / "work")
    train(checkpoint, data, *more)  # the same command, when there is room again
    assert (data / "work" / "tuned" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("form", "why"),
    [("merged", "only bitsandbytes' 4 bits can be merged into"), ("residual", "--as residual needs its full weights")],
)
def test_a_quantized_base_is_refused(form, why, checkpoint, data, monkeypatch, capsys):
    from corda_lora.models import loading as models

    init(checkpoint, data, "--split", "balanced")
    load = models.load_model

    def quantized(source):
        model = load(source)
        model.is_quantized = True
        return model

    monkeypatch.setattr(models, "load_model", quantized)
    arguments = ["--adapter", "start", "--as", form, "--output", "out"]
    said = refused(capsys, "export", "--model", checkpoint, *arguments)
    assert f"the base model is quantized, and {why}" in said
    assert not (data / "work" / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as", "gguf"], "as is gguf, but must be one of lora, merged, residual"),
        (["--as", "merged", "--r", 2], "--r goes with --as lora only"),
        (["--as", "residual"], "there is no residual to export"),
        (["--r", 5], "rank 5 is no compression"),
        (["--adapter", "nowhere"], "nowhere is not an adapter directory"),
    ],
)
def test_export_refuses(arguments, message, checkpoint, data, capsys):
    init(checkpoint, data)
    said = refused(capsys, "export", "--model", checkpoint, "--adapter", "start", "--output", "out", *arguments)
    assert message in said
    assert [p.name for p in (data / "work").iterdir()] == ["start"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "nowhere"], "nowhere is not an adapter directory"),
        (["--response", "{text}"], "no column 'text'"),
        (["--micro_batch_size", 3], "batch_size 4 is not a multiple of micro_batch_size 3"),
        (["--target_modules", "[q_prj]"], "nearest names: q_proj"),
        (["--precision", "fp8"], "fp8"),
    ],
)
def test_train_refuses(arguments, message, checkpoint, data, capsys):
    said = refused(capsys, *arguments, call=lambda *a: train(checkpoint, data, *a))
    assert message in said
    assert nothing_left(data)


def test_data_without_responses_is_not_trained_on(checkpoint, data, capsys):
    (data / "learn.jsonl").write_text('{"prompt": "only a prompt"}\n')
    assert "has a response: say with the template --response" in refused(capsys, call=lambda: train(checkpoint, data))
    assert nothing_left(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--keep", "missing.jsonl"], "there is no file missing.jsonl"),
        (["--keep", "{data}/keep.jsonl", "--output", "no/eval.json"], "there is no folder no"),
        (["--choices", "{data}/keep.jsonl"], "sample 1 of"),
        (["--keep", "{data}/keep.jsonl", "--adapter", "nowhere"], "nowhere is not an adapter directory"),
    ],
)
def test_eval_refuses(arguments, message, checkpoint, data, capsys):
    arguments = [a.format(data=data) for a in arguments]
    assert message in refused(capsys, "eval", "--model", checkpoint, *arguments)
    assert nothing_left(data)


def test_the_bar_of_a_gguf_files_weights_is_one_that_quiet_ends(tmp_path, capfd):
    (tmp_path / "model.gguf").write_bytes(b"no weights")
    with pytest.raises(CordaError):
        load_model(ModelConfig(str(tmp_path / "model.gguf")))
    transformers.utils.logging.disable_progress_bar()
    list(modeling_gguf_pytorch_utils.tqdm(range(3)))
    transformers.utils.logging.enable_progress_bar()
    assert capfd.readouterr().err == ""


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.setattr("corda_lora.files.find_spec", lambda name: None)
    (tmp_path / "c.jsonl").write_text('{"text": "a b c"}')
    with pytest.raises(SystemExit) as stopped:
        main(f"init --model {tmp_path}/model.gguf --context {tmp_path}/c.jsonl --output {tmp_path}/a".split())
    assert stopped.value.code == 2
    assert "the package gguf is needed: pip install gguf" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch):
    """The configurations that `corda eval` would measure by."""
    configs = []

    def evaluate(model, tokenizer, config, **_):
        configs.append(config)
        return {}

    monkeypatch.setattr("corda_lora.evaluation.evaluate.evaluate", evaluate)
    return configs


@pytest.mark.parametrize("form", ["apart", "together"])
def test_evals_templates_are_taken_literally(form, checkpoint, data, measured):
    """The parser would read `{answer}` as a mapping and `# now` as a comment."""
    keep, learn = str(data / "keep.jsonl"), str(data / "learn.jsonl")
    templates = {"prompt": "Q: {prompt}\\nA: # now", "response": "#### {response}"}
    arguments = ["--keep.data" if form == "apart" else "--keep", keep, "--keep.prompt", templates["prompt"]]
    arguments += [f"--keep.response={templates['response']}", "--keep.samples", 3]
    run("eval", "--model", checkpoint, *arguments, "--learn", learn, "--learn.response", "{response}")
    (kept,), (learned,) = measured[0].data("keep"), measured[0].data("learn")
    assert (kept.data, kept.prompt, kept.response, kept.samples) == (keep, *templates.values(), 3)
    assert (learned.data, learned.prompt, learned.response) == (learn, "", "{response}")


def test_evals_templates_for_all_data(checkpoint, data, measured):
    (data / "words.csv").write_text("q,a\nWhich?,This\n")
    (data / "text.txt").write_text("running text\n")
    arguments = ["--learn", data / "words.csv", "--text", data / "text.txt"]
    arguments += ["--prompt", "Q: {q}\\nA: # now", "--response=#{a}"]
    run("eval", "--model", checkpoint, *arguments, "--keep", data / "words.csv", "--keep.prompt", "{q}")
    run("eval", "--model", checkpoint, *arguments, "--keep", json.dumps([str(data / "words.csv")]))
    for config, asked in zip(measured, ("{q}", "Q: {q}\\nA: # now")):
        ((kept,), (learned,), (text,)) = (config.data(kind) for kind in ("keep", "learn", "text"))
        assert (kept.prompt, kept.response) == (asked, "#{a}")
        assert (learned.prompt, learned.response) == ("Q: {q}\\nA: # now", "#{a}")
        assert (text.prompt, text.response) == ("", "")


def test_names_with_brackets_are_no_markup(checkpoint, data, capsys):
    rows = [*KEEP[:3], {"prompt": "", "response": "x"}]
    name = "[/red] :smile: [bold].jsonl"
    (data / "work" / "[").mkdir()
    (data / "work" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("eval", "--model", checkpoint, "--keep", name, "--output", "[red].json")
    said = capsys.readouterr()
    assert f"{name}: 1 of 4 rows left out" in " ".join(said.err.split())
    assert "red] :smile: [bold].jsonl" in " ".join(said.out.split())
    train(checkpoint, data, "--max_steps", 1, output="[/x]")
    assert "written to [/x]" in capsys.readouterr().out


def test_eval_takes_lists_of_data(checkpoint, data, measured):
    keep, learn = str(data / "keep.jsonl"), str(data / "learn.jsonl")
    run("eval", "--model", checkpoint, "--keep", json.dumps([keep, {"data": learn, "samples": 2}]))
    assert [(config.data, config.samples) for config in measured[0].data("keep")] == [(keep, None), (learn, 2)]


def test_data_given_several_times_is_a_list():
    given = ["eval", "--keep", "a.jsonl", "--keep.prompt", "{q}", "--keep", "b.jsonl", "--learn", "c.jsonl"]
    assert with_data(given, dict.fromkeys(["keep", "learn"], DataConfig)) == [
        *("eval", "--keep", json.dumps([{"data": "a.jsonl", "prompt": "{q}"}, {"data": "b.jsonl"}])),
        *("--learn", "c.jsonl"),
    ]
