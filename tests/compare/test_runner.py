"""`corda compare` on a tiny model, as a user runs it: killed and resumed, with runs that fail, and bad input."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ranks import run_together

from corda_lora.cli import main
from corda_lora.cli.parser import build_parser
from corda_lora.cli.shared import take
from corda_lora.compare.comparison import Comparison
from corda_lora.compare.frontier import task_loss
from corda_lora.compare.pool import Process
from corda_lora.compare.runner import _Session
from corda_lora.compare.runner import compare as run_comparison
from corda_lora.compare.schedule import Job
from corda_lora.compare.work import LOG
from corda_lora.config import CompareConfig, CordaError, DataConfig, EvalConfig, MethodConfig, ModelConfig, TrainConfig
from corda_lora.devices import visible_gpus
from corda_lora.methods.registry import METHODS, check_options

RECIPES = Path(__file__).parents[2] / "benchmarks" / "recipes"
TWO = {"lora": "[1.0e-3, 1.0e-2]", "corda-kpm-anchored": "[1.0e-2, 3.0e-2]"}
# A comparison that is killed as soon as a process has begun the third run.
KILLED = """
import os, signal
from corda_lora.compare.pool import Process
os.chdir(os.environ["FOLDER"])
os.cpu_count = lambda: 1  # as in the fixture `folder`
begin, runs = Process.begin, []
def begin_and_die(self, job):
    begin(self, job)
    runs.append(job.is_run)
    if sum(runs) == 3:
        print(self.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
Process.begin = begin_and_die
"""

# A comparison that is stopped in its second run by Ctrl-C, which a terminal sends to all of its processes.
STOPPED = """
import os, signal, time
from corda_lora.cli import main
from corda_lora.compare.pool import Process
from corda_lora.compare.work import LOG
os.cpu_count = lambda: 1
begin, runs = Process.begin, []
def begin_and_stop(self, job):
    begin(self, job)
    runs.append(job.is_run)
    if sum(runs) == 2:
        print(self.process.pid, flush=True)
        while not (self.pool.comparison.folder(job) / LOG).exists():
            time.sleep(0.01)
        os.killpg(0, signal.SIGINT)
Process.begin = begin_and_stop
main(["compare", "recipe.yaml", "--output", "out"])
"""
STOPPED_WORK = "corda compare: stopped; finished work is kept, and the same command goes on from it"


@pytest.fixture
def compare(folder, capfd):
    """compare(recipe, output, *options) → all that `corda compare` prints, on one line."""

    def run(*arguments):
        capfd.readouterr()
        main(["compare", *map(str, arguments)])
        return " ".join(capfd.readouterr().err.split())

    return run


@pytest.fixture
def refused(recipe, capsys):
    """refused(methods, *options, **changes) → the sentence with which `corda compare` refuses a recipe."""

    def run(methods, *options, **changes):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", recipe(methods, **changes), "--output", "out", *options])
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def results(output):
    return {str(path.parent.relative_to(output)): path for path in Path(output).glob("runs/*/*/result.json")}


def numbers(output):
    """What must not depend on when, where and how often the comparison was started."""
    return {
        name: {key: run[key] for key in ("status", "results", "loss", "parameters")}
        | {"curve": [[step, loss] for step, _, loss in run["curve"]]}
        for name, run in ((name, json.loads(path.read_text())) for name, path in results(output).items())
    }


def test_killed_half_way_and_resumed(folder, recipe, compare, monkeypatch):
    file = recipe(TWO, seeds=1)
    command = ["compare", file, "--output", "broken"]
    ended = run_together(1, command, folder / "killed", FIRST=KILLED, FOLDER=str(folder))
    assert ended.codes == [-signal.SIGKILL], ended.err
    worker, deadline = int(ended.out[0].split()[-1]), time.monotonic() + 60
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(worker), "a run went on alone"
    written = {name: path.stat().st_mtime_ns for name, path in results("broken").items()}
    assert len(written) == 2

    compare(file, "--output", "broken", "--jobs", 0)
    assert len(results("broken")) == 2
    comparison = json.loads(Path("broken/comparison.json").read_text())
    assert comparison["command"] == f"corda compare {file} --output broken"  # which would do the rest
    assert [run["status"] for run in comparison["runs"]].count("done") == 2

    text = compare(file, "--output", "broken", "--jobs", 2)
    for name, at in written.items():
        assert results("broken")[name].stat().st_mtime_ns == at, "a finished run was run again"
    assert "[3/4]" in text
    assert len(results("broken")) == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    compare(file, "--output", "whole", "--gpus", "8,9")  # there are none of these numbers: it is computed on the CPU
    assert numbers("whole") == numbers("broken")
    assert {json.loads(path.read_text())["gpu"] for path in results("whole").values()} == {"8", "9"}

    restored = [sys.executable, RECIPES.parent / "restore_runs.py", "broken/comparison.json", "restored"]
    subprocess.run(restored, check=True)
    assert numbers("restored") == numbers("broken")
    comparison = json.loads(Path("broken/comparison.json").read_text())
    elsewhere = results("restored")["runs/lora/lr0.01_s0"]
    elsewhere.write_text(elsewhere.read_text().replace(comparison["machine"], "A faster GPU"))
    compare(file, "--output", "restored")
    assert not Path("restored/starts").exists(), "nothing was left to prepare for"
    machines = json.loads(Path("restored/comparison.json").read_text())["machine"]
    assert machines == f"A faster GPU, {comparison['machine']}", "each run names its own"

    assert comparison["command"] == f"corda compare {file} --output broken --jobs 2"
    assert {run["status"] for run in comparison["runs"]} == {"done"}
    assert comparison["base"]["keep"]["keep"]["loss"] > 0
    assert comparison["machine"]
    assert comparison["versions"]["peft"]
    for run in comparison["runs"]:
        assert [step for step, *_ in run["curve"]] == [0, 2, 4, 6]
        assert run["curve"][-1][2] < run["curve"][0][2]
        assert run["results"]["keep"]["keep"]["drift"] > 0
        assert run["results"]["text"]["keep"]["drift"] > 0
    report = Path("broken/report.html").read_text()
    assert "LoRA" in report
    assert Path("broken/report.md").is_file()
    assert Path("broken/runs.csv").is_file()


def test_ctrl_c_ends_all_processes_with_one_sentence(recipe):
    recipe({"lora": "[1.0e-3, 1.0e-2]"}, seeds=1)
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 130
    assert done.stderr.strip().splitlines()[-1] == STOPPED_WORK
    assert "Traceback" not in done.stderr
    assert not psutil.pid_exists(int(done.stdout.split()[0])), "a run went on alone"
    assert list(results("out")) == ["runs/lora/lr0.001_s0"]
    assert "Traceback" not in Path("out/runs/lora/lr0.01_s0/log.txt").read_text()


def test_sigterm_ends_the_runs_and_keeps_those_that_are_done(recipe, compare, monkeypatch, capfd):
    begin, processes = Process.begin, []

    def begin_and_stop(self, job):
        begin(self, job)
        processes.append(self.process)
        if len(results("out")) == 1:
            while not (self.pool.comparison.folder(job) / LOG).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Process, "begin", begin_and_stop)
    file = recipe({"lora": "[1.0e-3, 1.0e-2]"}, seeds=1)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", file, "--output", "out"])
    assert stopped.value.code == 143
    assert capfd.readouterr().err.strip().splitlines()[-1] == STOPPED_WORK
    assert not any(process.is_alive() for process in processes)
    written = {name: path.stat().st_mtime_ns for name, path in results("out").items()}
    monkeypatch.setattr(Process, "begin", begin)
    compare(file, "--output", "out")
    assert len(results("out")) == 2
    assert written.items() <= {name: path.stat().st_mtime_ns for name, path in results("out").items()}.items()


def test_a_run_that_fails_leaves_the_others_alone(recipe, compare):
    methods = {"lora": "[1.0e-3, 1.0e+30]", "bitfit": "[1.0e-3, 1.0e-2]"}
    file = recipe(methods, seeds=1)
    with open(file, "a") as more:
        more.write("  broken: {method: lora-ga, options: {samples: -1}, learning_rates: [1.0e-3, 1.0e-2]}\n")
        more.write("  unprepared: {method: eva, options: {rho: 0.5}, learning_rates: [1.0e-3, 1.0e-2]}\n")
    text = compare(file, "--output", "out")
    assert "bitfit, 0.001, seed 0: does not fit: BitFit trains biases, and LlamaForCausalLM has none" in text
    assert "[6/6] " in text  # an entry that could not prepare has none
    assert "12/12 " in text  # the bar, full: of six runs two were trained, six steps each
    runs = json.loads(Path("out/comparison.json").read_text())["runs"]
    by = {(run["method"], run["learning_rate"]): run for run in runs}
    assert by["lora", 1e-3]["status"] == "done"
    assert by["lora", 1e30]["status"] == "diverged"
    assert re.search("held-out loss|the loss was|not finite", by["lora", 1e30]["why"])
    assert {by["broken", 1e-3]["status"], by["broken", 1e-2]["status"]} <= {"failed", "does not fit"}
    assert by["broken", 1e-3]["why"]
    assert by["unprepared", 1e-3]["status"] == "failed"
    assert "rho" in by["unprepared", 1e-3]["why"]
    assert not Path("out/runs/unprepared").exists(), "a run was begun without its preparation"
    assert "BitFit trains biases" in Path("out/report.md").read_text()
    finished = results("out")["runs/lora/lr0.001_s0"].stat().st_mtime_ns

    # Entries and rates may be added to a comparison; what is done stays.
    compare(recipe({"lora": "[1.0e-3, 2.0e-3]", "pissa": "[1.0e-3, 2.0e-3]"}, seeds=1), "--output", "out")
    assert results("out")["runs/lora/lr0.001_s0"].stat().st_mtime_ns == finished
    assert len(results("out")) == 6 + 3


def test_a_second_option_is_swept_beside_the_rate(recipe, compare):
    """`ratio` is of the training alone, so its values share a preparation; `samples` is not."""
    file = recipe({"lora": "[1.0e-3, 1.0e-2]"}, seeds=2)
    with open(file, "a") as more:
        more.write(
            "  kept: {method: lora, options: {samples: 40}, learning_rates: [1.0e-2], sweep: {keep: [1, 100]}}\n"
        )
        more.write("  B faster: {method: corda-ipm-seeded, learning_rates: [1.0e-3, 5.0e-3], sweep: {ratio: [8, 2]}}\n")
        more.write("  more samples: {method: corda-ipm-seeded, learning_rates: [1.0e-3], sweep: {samples: [12, 3]}}\n")
    compare(file, "--output", "out")
    starts = {path.parent.name for path in Path("out/starts").glob("*/result.json")}
    assert starts == {"kept", "B faster", "more samples, samples 3", "more samples, samples 12"}
    runs = json.loads(Path("out/comparison.json").read_text())["runs"]
    assert {run["status"] for run in runs} == {"done"}
    first = [(run["method"], run["learning_rate"], run.get("swept")) for run in runs if run["seed"] == 0]
    assert first == [
        *(("lora", rate, None) for rate in (1e-3, 1e-2)),
        *(("kept", 1e-2, {"keep": keep}) for keep in (1, 100)),
        *(("B faster", rate, {"ratio": ratio}) for ratio in (2, 8) for rate in (1e-3, 5e-3)),
        *(("more samples", 1e-3, {"samples": samples}) for samples in (3, 12)),
    ]
    assert len({tuple(run["penalties"]) for run in runs if run["method"] == "kept"}) == 1
    drifts = [run["results"]["keep"]["keep"]["drift"] for run in runs if run["method"] == "kept" and not run["seed"]]
    assert drifts[0] > drifts[1], "the higher price keeps more"
    losses = {task_loss(run) for run in runs if run["seed"] == 0}
    assert len(losses) == len(first), "two values gave the same run"
    assert any(run["seed"] == 1 and run["method"] == "B faster" for run in runs)
    written = {name: path.stat().st_mtime_ns for name, path in results("out").items()}
    assert "runs/B faster/lr0.001_ratio_2_s0" in written
    page, table = Path("out/report.md").read_text(), csv.DictReader(Path("out/runs.csv").read_text().splitlines())
    assert re.search(r"\| B faster \| [0-9.e-]+, ratio [28]", page)
    assert {row["ratio"] for row in table if row["method"] == "B faster"} == {"2", "8"}

    # The same command runs nothing again, and a value may be added.
    Path(file).write_text(Path(file).read_text().replace("[12, 3]", "[12, 3, 6]"))
    compare(file, "--output", "out")
    again = {name: path.stat().st_mtime_ns for name, path in results("out").items()}
    assert again.items() >= written.items()
    assert "runs/more samples/lr0.001_samples_6_s0" in again
    restored = [sys.executable, RECIPES.parent / "restore_runs.py", "out/comparison.json", "restored"]
    subprocess.run(restored, check=True)
    assert results("restored").keys() == results("out").keys()


def test_a_process_serves_an_entrys_runs_until_it_dies(recipe, compare, monkeypatch):
    """It dies as one that the system kills for its memory. Its run is reported, and tried again the next time."""
    processes, start, begin = [], _Session.start, Process.begin

    def begin_and_die(self, job):
        begin(self, job)
        if job.rate == 2e-3:
            self.process.kill()

    monkeypatch.setattr(_Session, "start", lambda self, job: processes.append(str(job)) or start(self, job))
    monkeypatch.setattr(Process, "begin", begin_and_die)
    file = recipe({"lora": "[1.0e-3, 2.0e-3]"}, seeds=2)
    text = compare(file, "--output", "out")
    statuses = {
        name.rpartition("/")[2]: json.loads(path.read_text())["status"] for name, path in results("out").items()
    }
    assert statuses == {"lr0.001_s0": "done", "lr0.002_s0": "failed", "lr0.001_s1": "done"}
    assert "its process ended with -9 (out of memory?)" in text
    assert processes == ["the base model", "lora, 0.001, seed 0", "lora, 0.001, seed 1"]
    monkeypatch.setattr(Process, "begin", begin)
    compare(file, "--output", "out")
    assert json.loads(results("out")["runs/lora/lr0.002_s0"].read_text())["status"] == "done"
    assert processes[3:] == ["lora, 0.002, seed 0"]


@pytest.mark.parametrize("job", [None, Job("lora", 1e-3)])
def test_a_process_that_died_before_it_took_its_job_is_seen(job):
    """The pipe then says that it was reset (what was sent was never read), or that it is at its end."""
    ours, theirs = multiprocessing.Pipe()
    if job:
        ours.send(job)
    theirs.close()
    assert Process(None, None, ours, "").take() is None


def test_bad_input_before_anything_runs(refused):
    assert "there is no method 'loar': there are" in refused({"loar": "[1.0e-3, 1.0e-2]"})
    assert "lora has one learning rate" in refused({"lora": "[1.0e-3]"})
    assert "there is no file other.jsonl" in refused(TWO, data="other.jsonl")
    Path("empty.jsonl").touch()
    assert "empty.jsonl is empty" in refused(TWO, data="empty.jsonl")
    assert "there is no model in ./nowhere" in refused(TWO, model="./nowhere")
    assert "target_modules ['q_prj'] matches no layer" in refused(TWO, data="learn.jsonl\ntarget_modules: '[q_prj]'")
    assert "a section of the recipe, such as train or eval, is no mapping" in refused(TWO, train="5")
    assert "'a\\x00' cannot be an entry's name" in refused({'"a\\0"': "[1.0e-3, 1.0e-2]"})
    assert "give samples of it as `context`" in refused(TWO, context="null")
    assert "cannot be an entry's name" in refused({"a/b": "[1.0e-3, 1.0e-2]"})
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("")
    assert "something else in it" in refused(TWO)


@pytest.mark.parametrize("price", ["options: {keep: 10}", "sweep: {keep: [0, 10]}"])
def test_a_price_on_too_few_samples_before_anything_runs(price, recipe, capsys):
    with open(recipe({"lora": "[1.0e-3, 1.0e-2]"}), "a") as more:
        more.write(f"  ours: {{method: corda-kpm-anchored, {price}}}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "recipe.yaml", "--output", "out"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the context has 12 samples with a response" in said
    assert "cut away" not in said
    assert not Path("out").exists()


def test_a_price_on_answers_that_were_cut_away_names_max_length_before_anything_runs(recipe, capsys):
    changes = {"context": "{data: keep.jsonl, max_length: 27}", "context_samples": "20"}
    with open(recipe({"lora": "[1.0e-3, 1.0e-2]"}, **changes), "a") as more:
        more.write("  ours: {method: corda-kpm-anchored, options: {keep: 10}}\n")
    with pytest.raises(SystemExit):
        main(["compare", "recipe.yaml", "--output", "out"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the context has 10 samples with a response" in said  # of countries of one digit
    assert said.endswith("; 30 responses are cut away at --max_length 27")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("method: lora+, sweep: {ratio: [2, 8], beta: [1, 2]}", "beside the learning rate, one option can be swept"),
        ("method: lora+, sweep: {ratio: [2, 2]}", "sweeps ratio over one value: give at least two"),
        ("method: lora+, sweep: {ratio: [2, fast]}", r"over \[2, .*\], but must over numbers, or over words"),
        ("method: lora+, sweep: {ratio: [[2], [4]]}", "must over numbers, or over words"),
        (f"method: lora+, sweep: {{ratio: [2, {10**400}]}}", "must over numbers, or over words"),
        ("method: lora+, sweep: {ratio: [2, 8]}, options: {ratio: 2}", "gives ratio under options and under sweep"),
        ("method: lora+, sweep: {ratoi: [2, 8]}", "method lora\\+ has no option 'ratoi'"),
        (
            "method: corda-kpm-anchored, sweep: {damping: [0.01, -1]}",
            "damping is -1, but must be a number at least 1e-09",
        ),
    ],
)
def test_a_sweep_that_cannot_be(entry, said, recipe, capsys):
    with open(recipe({"lora": "[1.0e-3, 1.0e-2]"}), "a") as more:
        more.write(f"  swept: {{{entry}}}\n")
    with pytest.raises(SystemExit):
        main(["compare", "recipe.yaml", "--output", "out"])
    assert re.search(said, capsys.readouterr().err.strip().splitlines()[-1])
    assert not Path("out").exists()


def test_a_sample_of_each_data_set_before_anything_runs(recipe, capsys, monkeypatch):
    monkeypatch.setattr("corda_lora.compare.runner._run_all", lambda *_: None)
    rows = [{"prompt": f"{i}?", "response": "yes", "choices": ["yes", "no"]} for i in range(9)]
    Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main(["compare", recipe(TWO), "--output", "out", "--eval.choices", "choices.jsonl"])
    said = [line.strip() for line in capsys.readouterr().err.splitlines()]
    heads = [" ".join(line.split()[:4]) for line in said if "samples of" in line]
    assert heads == [
        "task learn.jsonl: 32 samples",
        "context keep.jsonl: 40 samples",
        "keep keep.jsonl: 8 samples",
        "learn learn.jsonl: 16 samples",
        "text keep.jsonl: 1 samples",
        "choices choices.jsonl: 9 samples",
    ]
    assert sum("as the model reads it" in line for line in said) == len(heads)
    assert not any("cut" in line for line in said)
    rows[3]["choices"] = ["no"]
    Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        main(["compare", recipe(TWO), "--output", "out", "--eval.choices", "choices.jsonl"])
    assert "sample 4 of choices.jsonl needs a column `choices`" in capsys.readouterr().err


def test_steps_leave_out_responses_that_are_cut_away(checkpoint, folder):
    rows = [{"prompt": "a" * (1 + 99 * (i % 2)), "response": "b"} for i in range(40)]
    Path("learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CompareConfig(["lora", "pissa"], DataConfig("learn.jsonl", max_length=50), EvalConfig(learn="learn.jsonl"))
    config.train = TrainConfig(batch_size=4, epochs=1)
    assert Comparison(ModelConfig(str(checkpoint)), config, Path("out")).steps == 5


def test_another_recipe_is_refused(refused):
    lora = {"lora": "[1.0e-3, 1.0e-2]"}
    assert "no results of the base model yet" in refused(lora, "--jobs", "0", seeds=1)
    assert "another recipe (r was 4 there and is 8 here)" in refused(lora, r=8)
    Path("learn.jsonl").write_text(Path("learn.jsonl").read_text().replace("4", "5", 1))
    said = refused(lora, seeds=1)
    assert "(the samples of task learn.jsonl have changed; the samples of learn learn.jsonl have changed)" in said


def test_training_in_bfloat16_without_instructions_for_it_is_said_at_once(checkpoint, folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr("corda_lora.compare.runner._run_all", lambda *_: None)
    config = CompareConfig(methods=["lora", "pissa"], data="learn.jsonl", eval=EvalConfig(learn="learn.jsonl"))
    with pytest.warns(match="no instructions for bfloat16"), pytest.raises(CordaError, match="no results"):
        run_comparison(ModelConfig(str(checkpoint)), config, Path("out"))


def test_gpus_are_those_that_may_be_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    config = CompareConfig(methods=["lora", "pissa"], data="x", eval=EvalConfig(learn="y"))
    with pytest.raises(CordaError, match="there is no GPU 0: there are 2, 5"):
        run_comparison(ModelConfig("nowhere"), config, Path("out"), gpus=["2", "0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus() == [""]


def test_all_methods_are_in_the_docs():
    text = (RECIPES.parent.parent / "docs" / "compare.md").read_text()
    assert not [name for name in METHODS if f"`{name}`" not in text and not name.startswith("corda")]


def test_a_list_of_names_means_their_own_rates():
    config = CompareConfig(methods=["lora", "pissa"], data="x", eval=EvalConfig(learn="y"))
    comparison = Comparison(ModelConfig("m"), config, Path("out"))
    assert {name: entry.rates for name, entry in comparison.entries.items()} == {
        name: METHODS[name].learning_rates for name in ("lora", "pissa")
    }
    assert not config.entries["lora"].learning_rates, "the recipe stays as it was given"
    with pytest.raises(CordaError, match="how well the task was learned"):
        CompareConfig(methods=["lora"], data="x", eval=EvalConfig())


def test_rates_are_swept_in_order_and_once():
    entry = MethodConfig(learning_rates=[1e-2, 1e-3, 1e-2])
    config = CompareConfig(methods={"lora": entry}, data="x", eval=EvalConfig(learn="y"))
    assert Comparison(ModelConfig("m"), config, Path("out")).entries["lora"].rates == (1e-3, 1e-2)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_right(path):
    parser, _ = build_parser()
    options = parser.instantiate(parser.parse_args(["compare", "--config", str(path), "--output", "out"]))
    for entry in take(CompareConfig, options.compare).entries.values():
        for value in entry.swept_values or [None]:
            check_options(entry.method, entry.options | ({entry.swept_option: value} if entry.sweep else {}))


def test_a_comparison_of_which_no_run_could_be_done_fails(recipe, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", recipe({"bitfit": "[1.0e-3, 1.0e-2]"}, seeds=1), "--output", "out"])
    said = " ".join(capsys.readouterr().err.split())
    assert "no run could be done; of bitfit: BitFit trains biases, and LlamaForCausalLM has none" in said
    assert Path("out/report.html").is_file()
