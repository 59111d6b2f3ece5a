"""What commands print: verdicts, the next command, --quiet and --json, warnings before work."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import tiny
import torch
from helpers import start

from corda_lora.adapters.lora import install
from corda_lora.cli import main
from corda_lora.config import CordaConfig
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.report.verdicts import start_verdicts
from corda_lora.training.rates import rate_of


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint):
    """A working directory with `model`, `keep.jsonl` and `learn.jsonl`."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint)
    for name, sign in (("keep", "-"), ("learn", "+")):
        rows = [{"prompt": f"{i} {sign} {i} =", "response": f" {i}"} for i in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


INIT = "init --model model --context keep.jsonl --r 4 --device cpu --output start"
TRAIN = (
    "train --model model --start start --data learn.jsonl --precision fp32 --max_steps 2 --batch_size 4 --output tuned"
)
EVAL = "eval --model model --adapter tuned --keep keep.jsonl --output results.json"
EXPORT = "export --model model --adapter tuned --as merged --output merged"


def run(command):
    main(command.split())


def test_quiet_prints_the_outputs_alone(folder, capfd):
    """Also where the libraries print: the file descriptors are read."""
    for command in (INIT, TRAIN, EVAL, EXPORT):
        run(f"{command} --quiet")
    printed = capfd.readouterr()
    assert printed.out.split() == ["start", "tuned", "results.json", "merged"]
    assert printed.err == ""
    with pytest.raises(SystemExit):
        run(f"{INIT} --quiet --r 5")
    assert capfd.readouterr().err.startswith("corda init: the output start has something in it already")
    run(f"{INIT} --quiet")  # whole already
    assert capfd.readouterr().out == "start\n"
    run(INIT)
    assert "is whole already" in capfd.readouterr().out


def test_json_is_one_object(folder, capfd):
    printed = []
    for command in (INIT, INIT, TRAIN, TRAIN, EVAL, EXPORT):
        run(f"{command} --json")
        printed.append(json.loads(capfd.readouterr().out))
    init, init_again, train, train_again, evaluation, export = printed
    assert init == init_again
    assert train == train_again
    assert init.items() >= json.loads((folder / "start" / "corda.json").read_text()).items()
    assert (init["output"], init["learning_rate"]) == ("start", rate_of("anchored", "kpm"))
    assert init["verdicts"] == start_verdicts(init)
    assert train.items() >= json.loads((folder / "tuned" / "training.json").read_text()).items()
    assert evaluation.items() >= json.loads((folder / "results.json").read_text()).items()
    assert export.pop("relative_error") < 1e-6
    assert export == {"output": "merged", "form": "merged"}


def said_next(capsys):
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    return line


def test_init_ends_with_the_command_that_trains(folder, capsys):
    run(f"{INIT} --dtype bfloat16 --revision main --trust_remote_code true")
    command, rate = re.fullmatch(r"next: corda (.*)  \(its learning rate: (.*)\)", said_next(capsys)).groups()
    assert "--model model --revision main --dtype bfloat16 --trust_remote_code true --start" in command
    (folder / "NEW.jsonl").write_text((folder / "learn.jsonl").read_text())
    main([*shlex.split(command), "--precision", "fp32", "--max_steps", "1"])
    assert json.loads((folder / "tuned" / "training.json").read_text())["learning_rate"] == float(rate)


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_init_names_no_command_that_would_be_refused(family, folder, tokenizer, capsys):
    """A model without a head for language, and one that is an encoder-decoder; and a classifier, whose data are to have
    labels, though the context has none."""
    (folder / "model").unlink()
    model = tiny.build(family)
    model = model.model if family == "llama" else model
    if family == "bert":
        model.config.id2label, model.config.label2id = {0: "no", 1: "so", 2: "yes"}, {"no": 0, "so": 1, "yes": 2}
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    run(INIT)
    line = said_next(capsys)
    assert line.startswith("next: a trainer of your own (docs/trainers.md): corda train takes") == (family != "bert")
    if family == "bert":
        rows = [{"text": f"{i}", "COLUMN": ["no", "so", "yes"][i % 3]} for i in range(12)]
        (folder / "NEW.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = re.fullmatch(r"next: corda (.*)  \(its learning rate: .*\)", line)[1]
        main([*shlex.split(command), "--precision", "fp32", "--max_steps", "1"])


def test_the_table_of_a_start_has_no_empty_column(folder, capsys):
    run(f"{INIT} --orientation identity")
    assert "energy" not in capsys.readouterr().out


def test_plan_says_what_it_assumes(folder, capsys):
    run("plan --model model --r 4 --samples 100 --max_length 50")
    assert "assumed, as no --context is given: 100 samples of 50 tokens" in capsys.readouterr().out
    run("plan --model model --r 4 --context keep.jsonl")
    assert "assumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "has", "said"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_a_processor_without_bfloat16_is_said_before_the_context_runs(dtype, has, said, monkeypatch, recwarn):
    monkeypatch.setattr("corda_lora.preprocess.pipeline.has_bfloat16", lambda device: has)
    model = tiny.build("llama", getattr(torch, dtype))
    preprocess(model, CordaConfig(r=2, target_modules=["q_proj"]), tiny.batches("llama"), progress=False)
    notes = [str(w.message) for w in recwarn if "bfloat16" in str(w.message)]
    assert len(notes) == said
    assert all("--dtype float32" in note for note in notes)


def test_no_warnings_of_libraries(folder):
    """In a process of its own, where the environment is read: a checkpoint whose tokenizer transformers warns of."""
    copy = folder / "copy"
    copy.mkdir()
    for path in (folder / "model").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": True}))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    code = f"from corda_lora.cli import main; main({INIT.replace('model model', 'model copy').split()!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines[0] == "loading PyTorch and Transformers"
    assert lines[1].startswith("keep.jsonl: 16 samples of ")
    assert not any("transformers" in line or "Loading" in line for line in lines)


# --- what the figures of a start mean --------------------------------------------------------------------------------


def record(**options):
    _, found = start(target_modules=["q_proj", "down_proj"], **options)
    return found.record


def test_what_a_reads_is_measured_on_the_inputs():
    """‖A x‖² over the context's tokens, beside that of random directions of the same lengths."""
    model, found = start(split="paper", target_modules=["down_proj"])
    adapted = install(model, found)
    inputs = []
    layer = adapted.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for batch in tiny.batches("llama"):
        adapted(**batch)
        inputs[-1] = inputs[-1][batch["attention_mask"].bool()]
    x, A = torch.cat(inputs).double(), found.layers["model.layers.1.mlp.down_proj"].A.double()
    about = found.record["layers"]["model.layers.1.mlp.down_proj"]
    reads = about["leak"] / (about["norm_A"] ** 2 * about["input_energy"])
    randomly = A.square().sum() * x.square().mean()
    assert reads == pytest.approx(float((x @ A.T).square().sum(1).mean() / randomly), rel=1e-3)


def test_verdicts_of_starts():
    good = start_verdicts(record(mode="kpm", split="anchored"))
    assert re.match(r"good: A reads the context \d[\d,.]* times less than random directions would", good[0])
    assert good[-1].startswith("certificate: whatever is trained, a layer's output on these samples moves by at most")
    all_of_it = start_verdicts(record(mode="kpm", split="seeded", r=32))
    assert all_of_it[0].startswith("bad: A reads the context 1")
    assert "a smaller --r" in all_of_it[0]
    ipm = start_verdicts(record(mode="ipm", split="seeded", r=2))
    assert re.match(r"good: A reads the task \d[\d.]* times as much as random directions would", ipm[0])
    assert "kept hardly more than LoRA" in start_verdicts(record(mode="kpm", split="balanced"))[-1]
    uneven = record(mode="kpm", split="seeded", preset="corda+", r=4)
    uneven["totals"]["ranks"] = [1, 29]
    assert "ranks go up to 29" in start_verdicts(uneven)[-1]
    assert "--min_rank 2 --max_rank 8" in start_verdicts(uneven)[-1]
    few = record(mode="kpm", split="seeded") | {"context": {"tokens": 9, "widest": 48, "samples_for_full_rank": 64}}
    assert "9 tokens for layers of up to 48 inputs; 64 samples would do" in start_verdicts(few)[-1]
    few["context"]["samples"] = 9
    few["held_out"] = {"samples": 64, "times": 4.3, "enough": 220}  # one count of samples, the measured one
    said = " ".join(start_verdicts(few))
    assert "with about 220 it would be 1.1 times" in said
    assert "64 samples would do" not in said
    nothing = record(mode="kpm", split="anchored")
    for layer in nothing["layers"].values():
        layer["leak"] = -1e-12
    assert start_verdicts(nothing)[0].startswith("good: A reads the context over a million times less")
    assert start_verdicts(record(orientation="identity")) == [
        "No context oriented the components: nothing here says what the adapter will do to an ability."
    ]
