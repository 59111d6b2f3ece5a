"""`corda train` keeps the context of its start: the price, the bound and the meter, through the command line."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
from test_cli import data, init, refused, run, train, weights  # noqa: F401 (data is a fixture)

ROWS = [{"q": f"The capital of country {i}?", "a": f"city {i * 7 % 50}."} for i in range(100)]
TEMPLATES = ["--prompt", "{q}", "--response", " {a}"]


@pytest.fixture
def context(data):  # noqa: F811
    (data / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return data


def trained(folder, name):
    return json.loads((folder / "work" / name / "training.json").read_text())


def test_a_start_that_keeps_is_trained_with_the_penalty(checkpoint, context, capsys):
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    train(checkpoint, context, "--start", "start", "--epochs", 3)
    shown = capsys.readouterr()
    assert "keeps" in shown.err
    assert "(40 samples) at a price of 10 nats for a nat of drift" in " ".join(shown.err.split())
    assert "nats per answer token of the context: " in shown.out
    log = trained(context, "tuned")
    assert log["penalties"].keys() == {"drift"}
    steps, predicted, measured, prices = zip(*log["drift"])
    assert steps[0] == 0
    assert steps[-1] == log["steps"]
    assert predicted[0] == measured[0] == 0
    assert predicted[-1] > 0
    assert measured[-1] > 0
    assert set(prices) == {10.0}

    train(checkpoint, context, "--start", "start", "--epochs", 3, "--keep", 0, output="free")
    free = trained(context, "free")
    assert "drift" not in free
    assert not free["penalties"]
    train(checkpoint, context, "--start", "start", "--epochs", 3, "--keep", 1000, output="dear")
    assert trained(context, "dear")["drift"][-1][2] < 0.5 * measured[-1]
    model = ["--model", checkpoint, "--keep", context / "keep.jsonl", *TEMPLATES]
    for adapter in ("free", "dear"):
        capsys.readouterr()
        run("eval", *model, "--adapter", adapter, "--output", f"{adapter}.json")
        said = " ".join(capsys.readouterr().out.split())
        assert ("When it was trained: drift" in said) == (adapter == "dear")
    assert f"{trained(context, 'dear')['drift'][-1][1]:.3g} predicted from its statistics, at a price of 1e+03" in said
    drifts = [
        json.loads((context / "work" / f"{adapter}.json").read_text())["results"]["keep"][str(context / "keep.jsonl")]
        ["tuned"]["drift"] for adapter in ("free", "dear")
    ]  # fmt: skip
    assert drifts[1] < 0.3 * drifts[0]  # in the saved adapter, as another command measures it


def shown_bar(text):
    """The last state of the training's progress bar: its steps, and what stands between them and the times."""
    return re.findall(r"training +\S+ (\d+/\d+) (.*?) +\d+:\d\d:\d\d", text)[-1]


def on_terminal(command):
    """What a command writes to a terminal of 80 columns, in a process of its own."""
    controller, terminal = os.openpty()
    code = f"from corda_lora.cli import main; main({command.split()!r})"
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        written = b""
        with contextlib.suppress(OSError):  # nobody holds the terminal any more
            while more := os.read(controller, 4096):
                written += more
        os.close(controller)
    assert process.returncode == 0, written.decode()
    return written.decode()


def test_the_drift_is_shown_beside_the_progress(checkpoint, context, capsys):
    """On a terminal, where the bar is drawn anew as it moves, and in a log, where it is written when it is done."""
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    recipe = (
        f"train --model {checkpoint} --data ../learn.jsonl --start start --precision fp32 --batch_size 4 --epochs 3"
    )
    seen = on_terminal(f"{recipe} --output tuned")
    assert seen.count("\x1b[2K") > 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    measured = trained(context, "tuned")["drift"][-1][2]
    assert shown_bar(plain) == ("24/24", f"drift ≈ {measured:.2g}")

    capsys.readouterr()
    run(*f"{recipe} --output logged".split())
    log = capsys.readouterr().err
    assert "\x1b" not in log
    history = trained(context, "logged")["drift"]
    assert shown_bar(log) == ("24/24", f"drift ≈ {history[-1][2]:.2g}")
    said = re.findall(r"^step (\d+): drift (\S+)$", log, flags=re.MULTILINE)
    assert said == [(str(step), f"{measured:.2g}") for step, _, measured, _ in history if step > 0]
    assert "step 4: drift" not in plain

    run(*f"{recipe} --keep 0 --output free".split())
    assert shown_bar(capsys.readouterr().err) == ("24/24", "")


def test_statistics_of_the_start_are_used(checkpoint, context):
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--keep", 30, output="with")
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--orientation", "two_sided", output="without")
    assert (context / "work" / "with" / "statistics.safetensors").is_file()
    train(checkpoint, context, "--start", "with", output="tuned_with")
    train(checkpoint, context, "--start", "without", "--keep", 30, output="tuned_without")
    once, again = (trained(context, f"tuned_{start}")["drift"] for start in ("with", "without"))
    assert {row[3] for row in once} == {30}  # the price that the start names
    assert [row[1] for row in once] == pytest.approx([row[1] for row in again], rel=0.2)  # another draw of y


def test_a_start_that_is_to_be_kept_is_two_sided(checkpoint, context, capsys):
    """Where nothing else is asked for. A start of a version whose default was another is another start."""
    price = [*TEMPLATES, "--samples", 40, "--keep", 10]
    oriented = {}
    for name, options in (("ours", []), ("published", ["--split", "paper"]), ("chosen", ["--orientation", "diagonal"])):
        init(checkpoint, context, *price, *options, output=name)
        oriented[name] = json.loads((context / "work" / name / "corda.json").read_text())["config"]["orientation"]
        assert f", {oriented[name]}, " in capsys.readouterr().out  # the title of the table
        assert f", orientation {oriented[name]} |" in (context / "work" / name / "README.md").read_text()
    assert oriented == {"ours": "two_sided", "published": "covariance", "chosen": "diagonal"}
    init(checkpoint, context, *price, "--orientation", "covariance", output="older")
    capsys.readouterr()
    init(checkpoint, context, *price, "--orientation", "covariance", output="older")
    assert "older is whole already" in " ".join(capsys.readouterr().out.split())
    said = refused(capsys, checkpoint, context, *price, call=partial(init, output="older"))
    assert "config.orientation was 'covariance' there and is 'two_sided' here" in said
    train(checkpoint, context, "--start", "older", "--max_steps", 2, output="tuned_older")
    assert trained(context, "tuned_older")["drift"][-1][3] == 10


def test_a_plain_lora_keeps_a_context_that_is_given(checkpoint, context, capsys):
    given = ["--context", context / "keep.jsonl", "--context.prompt", "{q}", "--context.response", " {a}"]
    given += ["--context.samples", 40]
    train(checkpoint, context, *given, "--keep", 3, "--epochs", 3)
    log = trained(context, "tuned")
    assert log["drift"][-1][3] == 3
    assert log["recipe"]["keep"]["context"]["prompt"] == "{q}"
    train(checkpoint, context, "--epochs", 3, output="free")
    assert "drift" not in trained(context, "free")
    train(checkpoint, context, *given, "--max_drift", log["drift"][-1][2] / 2, "--epochs", 3, output="bound")
    assert trained(context, "bound")["drift"][-1][3] != 10


def test_what_cannot_be_kept_is_refused_before_work(checkpoint, context, capsys):
    said = refused(capsys, checkpoint, context, "--keep", 3, call=train)
    assert "a plain LoRA knows of nothing to keep: give a --context" in said
    assert "keep is -1" in refused(capsys, checkpoint, context, "--keep", -1, call=train)
    for more in (["--weights", "validation"], ["--eval_rows", "train[:3]"]):
        said = refused(capsys, checkpoint, context, *more, call=train)
        assert f"{more[0][2:]} " in said
        assert "leave " in said
    for keep in (0, 3):
        said = refused(capsys, checkpoint, context, "--keep", keep, "--max_drift", 0.1, call=train)
        assert "keep is a fixed price, and max_drift steers the price: leave one of them out" in said
    assert "keep is 0, so nothing of the context would be kept" in refused(
        capsys, checkpoint, context, "--keep", 0, "--context", "nowhere.jsonl", call=train
    )
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    (context / "keep.jsonl").rename(context / "away.jsonl")
    said = refused(capsys, checkpoint, context, "--start", "start", call=train)
    assert "start was made from it: give a --context, or --keep 0" in said
    train(checkpoint, context, "--start", "start", "--keep", 0)
    assert weights(context / "work" / "tuned")


def test_few_samples_are_said_and_not_trusted(checkpoint, context, capsys):
    init(checkpoint, context, *TEMPLATES, "--samples", 10)
    train(checkpoint, context, "--start", "start")
    said = " ".join(capsys.readouterr().err.split())
    assert "the context has 10 samples with a response" in said
    assert "cut away" not in said
    assert "drift" not in trained(context, "tuned")
    explicit = partial(train, output="more")
    said = refused(capsys, checkpoint, context, "--start", "start", "--keep", 5, call=explicit)
    assert "10 samples with a response" in said
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--max_length", 4, output="cut")
    train(checkpoint, context, "--start", "cut", "--max_steps", 1, output="from_cut")
    said = " ".join(capsys.readouterr().err.split())
    assert "0 samples with a response; 40 responses are cut away at --max_length 4" in said


@pytest.mark.parametrize("more", [["--keep", 10], ["--orientation", "two_sided"]])
def test_too_few_answers_within_max_length_name_it(more, checkpoint, context, capsys):
    """Without --keep one answer is enough."""
    given = ["--context", context / "keep.jsonl", *TEMPLATES, "--samples", 40, "--output", "start", *more]
    said = refused(capsys, "init", "--model", checkpoint, *given, "--max_length", 4)
    assert said.endswith("; 40 responses are cut away at --max_length 4")
    without = [each for each in given if each not in TEMPLATES[2:]]
    said = refused(capsys, "init", "--model", checkpoint, *without, "--max_length", 4)
    assert "response" in said
    assert "cut away" not in said  # there was none to cut


def test_a_start_of_the_default_that_was_is_whole_by_its_orientation(checkpoint, context, capsys):
    made = [*TEMPLATES, "--samples", 40, "--keep", 10]
    init(checkpoint, context, *made, "--orientation", "covariance")
    said = refused(capsys, checkpoint, context, *made, call=init)
    assert "(config.orientation was 'covariance' there and is 'two_sided' here)" in said
    init(checkpoint, context, *made, "--orientation", "covariance")
    assert "start is whole already" in capsys.readouterr().out


def test_early_stopping_tells_the_drift_of_the_adapter_that_is_kept(checkpoint, context):
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    stopping = ["--eval_share", 0.3, "--early_stopping", 1, "--learning_rate", 8.0, "--epochs", 4]
    train(checkpoint, context, "--start", "start", *stopping)
    log = trained(context, "tuned")
    assert log["kept_step"] < log["steps"]
    step, _, measured, _ = log["drift"][-1]
    assert step == log["kept_step"]
    assert measured != log["drift"][-2][2]


def test_another_context_or_price_is_not_the_same_command(checkpoint, context, capsys):
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--keep", 30)
    train(checkpoint, context, "--start", "start", "--max_steps", 2)
    shutil.rmtree(context / "work" / "start")
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--keep", 300)  # A and B are the same bytes
    again = ["--start", "start", "--max_steps", 2]
    assert "has something in it already" in refused(capsys, checkpoint, context, *again, call=train)
    train(checkpoint, context, *again, output="dear")
    assert trained(context, "dear")["drift"][-1][3] == 300
    rows = [{**row, "a": row["a"] + "!"} for row in ROWS]
    (context / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    explicit = partial(train, output="dear")
    assert "has something in it already" not in refused(capsys, checkpoint, context, *again, call=explicit)


def test_samples_that_changed_since_the_start_are_refused(checkpoint, context, capsys):
    given = ["--context", context / "keep.jsonl", "--context.prompt", "{q}", "--context.response", " {a}"]
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--keep", 30)
    init(checkpoint, context, *TEMPLATES, "--samples", 40, output="without")
    train(checkpoint, context, *given, "--context.samples", 40, "--max_steps", 2, output="lora")
    other = [{"q": f"{i} + {i} =", "a": f"{i + i}"} for i in range(100)]
    (context / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    for start in ("start", "without", "lora"):
        said = refused(capsys, checkpoint, context, "--start", start, "--max_steps", 2, call=train)
        assert f"keep.jsonl has other samples now than when {start} was made: give a --context, or --keep 0" in said
    train(checkpoint, context, "--start", "start", *given, "--max_steps", 2)


def test_the_meters_samples_are_in_none_of_the_starts_rounds(checkpoint, context, monkeypatch):
    init(checkpoint, context, *TEMPLATES, "--samples", 20, "--keep", 30, "--preset", "corda++")
    drawn = []
    monkeypatch.setattr("corda_lora.evaluation.meter.unseen_samples", lambda *given: drawn.extend(given[3]) or [])
    train(checkpoint, context, "--start", "start", "--max_steps", 1)
    assert (
        len(drawn) == json.loads((context / "work" / "start" / "corda.json").read_text())["context"]["samples"] == 100
    )


def test_what_init_was_told_to_keep_is_kept_in_either_mode(checkpoint, context, capsys):
    """In ipm it is the task itself, which is said."""
    priced = "in mode ipm the context is the task to learn, so its price (keep) is on drift on the task itself"
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--keep", 30, output="kpm")
    assert priced not in " ".join(capsys.readouterr().err.split())
    init(checkpoint, context, *TEMPLATES, "--samples", 40, "--keep", 30, "--mode", "ipm")
    assert priced in " ".join(capsys.readouterr().err.split())
    train(checkpoint, context, "--start", "start", "--max_steps", 2)
    assert trained(context, "tuned")["drift"][-1][3] == 30


def test_a_bound_that_is_not_held_is_said(checkpoint, context, capsys):
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    train(checkpoint, context, "--start", "start", "--max_drift", 1e-6, "--max_steps", 4, "--learning_rate", 0.3)
    assert "(1e-06 was asked for)" in " ".join(capsys.readouterr().out.split())


def test_the_models_own_texts_are_kept_at_a_price(checkpoint, context, capsys):
    train(checkpoint, context, "--keep_generic", 3, "--max_steps", 3)
    assert "of its own accord, at a price of 3" in " ".join(capsys.readouterr().err.split())
    log = trained(context, "tuned")
    assert log["penalties"].keys() == {"generic"}
    assert log["penalties"]["generic"][-1][1] > 0
    assert "drift" not in log
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    train(checkpoint, context, "--start", "start", "--keep_generic", 3, "--max_steps", 3, output="both")
    assert trained(context, "both")["penalties"].keys() == {"drift", "generic"}
    said = refused(capsys, checkpoint, context, "--keep_generic", -1, call=partial(train, output="none"))
    assert "keep_generic is -1.0, but must be a number at least 0" in said


def test_a_training_that_goes_on_keeps_what_the_one_before_kept_at_its_price(checkpoint, context):
    given = ["--context", context / "keep.jsonl", "--context.prompt", "{q}", "--context.response", " {a}"]
    given += ["--context.samples", 40, "--max_steps", 2]
    train(checkpoint, context, *given, "--keep", 3, output="first")
    train(checkpoint, context, "--start", "first", "--max_steps", 2, output="second")
    assert trained(context, "second")["drift"][-1][3] == 3
    train(checkpoint, context, "--start", "first", "--max_steps", 2, "--keep", 7, output="third")
    assert trained(context, "third")["drift"][-1][3] == 7
    train(checkpoint, context, *given, "--max_drift", 1.0, output="bound")
    train(checkpoint, context, "--start", "bound", "--max_steps", 2, output="goes_on")
    assert trained(context, "goes_on")["drift"][-1][3] == trained(context, "bound")["drift"][-1][3] < 10
    init(checkpoint, context, *TEMPLATES, "--samples", 40)
    train(checkpoint, context, "--start", "start", "--max_steps", 2, "--keep", 0, output="free")
    train(checkpoint, context, "--start", "free", "--max_steps", 2, output="still_free")
    assert "drift" not in trained(context, "still_free")
