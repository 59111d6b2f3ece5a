"""`corda compare` on a tiny model, as a user runs it: killed and resumed, with runs that fail, and bad input."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_cli import LEARN, refused

from corda_lora.cli import _take, build_parser
from corda_lora.compare.runner import Job, _can_start, _jobs, _of_side, _todo, _total, _Worker
from corda_lora.compare.runner import compare as run_comparison
from corda_lora.config import CompareConfig, CordaError, EvalConfig, MethodConfig, ModelConfig
from corda_lora.data.batches import Encoded
from corda_lora.devices import visible_gpus
from corda_lora.evaluation.base_outputs import BaseOutputs, record_base
from corda_lora.methods.registry import METHODS, check_options

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(40)]
RECIPES = Path(__file__).parents[2] / "benchmarks" / "recipes"
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
TWO = {"lora": "[1.0e-3, 1.0e-2]", "corda-kpm-anchored": "[1.0e-2, 3.0e-2]"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(checkpoint, methods, name="recipe.yaml", **changes):
    text = RECIPE.format(checkpoint=checkpoint)
    for key, value in changes.items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.M)
    Path(name).write_text(text + "".join(f"  {m}: {{learning_rates: {rates}}}\n" for m, rates in methods.items()))
    return name


def start(*arguments):
    """The command as a process of its own: comparisons start processes themselves."""
    command = [sys.executable, "-m", "corda_lora.cli", "compare", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def compare(*arguments):
    process = start(*arguments)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return " ".join(text.split())


def results(output):
    return {str(path.parent.relative_to(output)): path for path in Path(output).glob("runs/*/*/result.json")}


def numbers(output):
    """What must not depend on when and how often the comparison was started."""
    return {
        name: {key: run[key] for key in ("status", "results", "loss", "parameters")}
        | {"curve": [[step, loss] for step, _, loss in run["curve"]]}
        for name, run in ((name, json.loads(path.read_text())) for name, path in results(output).items())
    }


def test_a_method_prepares_just_before_its_runs(tmp_path):
    entries = {
        "lora": MethodConfig(learning_rates=[1e-3, 2e-3]),
        "corda-kpm-anchored": MethodConfig(learning_rates=[1e-2, 2e-2]),
        "eva": MethodConfig(learning_rates=[3e-3, 4e-3]),
    }
    config = CompareConfig(methods=entries, data="x", eval=EvalConfig(learn="y"), seeds=1)
    expected = [("", None), ("lora", 1e-3), ("lora", 2e-3)]
    expected += [("corda-kpm-anchored", None), ("corda-kpm-anchored", 1e-2), ("corda-kpm-anchored", 2e-2)]
    expected += [("eva", None), ("eva", 3e-3), ("eva", 4e-3)]
    assert [(job.entry, job.rate) for job in _todo(config, tmp_path)] == expected

    def startable():
        return [(job.entry, job.rate) for job in _todo(config, tmp_path) if _can_start(config, tmp_path, job)]

    assert startable() == [("", None)], "what prepares would take the places of earlier entries"
    for job in (Job(), Job("eva")):
        (tmp_path / job.folder).mkdir(parents=True)
        (tmp_path / job.folder / "result.json").write_text('{"status": "done"}')
    assert startable() == [("lora", 1e-3), ("lora", 2e-3), ("corda-kpm-anchored", None), ("eva", 3e-3), ("eva", 4e-3)]


def faked(output, config, losses):
    """Results of runs: {(entry, rate, seed): task loss, or None for one that diverged}."""
    for (entry, rate, seed), loss in losses.items():
        folder = output / Job(entry, rate, seed).folder
        folder.mkdir(parents=True, exist_ok=True)
        status = "diverged" if loss is None else "done"
        result = {"status": status, "why": "", "results": {"learn": {"task": {"loss": loss}}}}
        (folder / "result.json").write_text(json.dumps(result))
    return {(job.entry, job.rate, job.seed) for job in _jobs(config, output) if job.rate and job.seed}


def test_the_other_seeds_are_run_where_they_count(tmp_path):
    rates = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]

    def config_of(**entries):
        methods = {name: MethodConfig(learning_rates=given) for name, given in entries.items()}
        return CompareConfig(methods=methods, data="x", eval=EvalConfig(learn="y"), seeds=3)

    config = config_of(lora=rates, pissa=rates)
    assert _total(config, tmp_path) == 2 * (5 + 2 * 3)  # before any is done: three rates with each other seed
    sweep = dict(zip(rates, (0.95, 0.92, 0.85, 0.83, 0.9)))
    seeded = faked(tmp_path, config, {("lora", rate, 0): loss for rate, loss in sweep.items()})
    assert seeded == {("lora", rate, seed) for rate in (5e-3, 1e-2, 2e-2) for seed in (1, 2)}

    # Best at 2e-2, which diverged at the next; LoRA's best loss lies between 1e-3 and 2e-3.
    sweep = dict(zip(rates, (0.84, 0.82, 0.80, None, 0.78)))
    seeded = faked(tmp_path, config, {("pissa", rate, 0): loss for rate, loss in sweep.items()})
    pissa = {("pissa", rate, seed) for rate in (1e-3, 2e-3, 5e-3, 2e-2) for seed in (1, 2)}
    assert {run for run in seeded if run[0] == "pissa"} == pissa
    assert _total(config, tmp_path) == 5 + 6 + 5 + 8

    # A rate is added that is the best: what was done with other seeds stays.
    seeded = faked(tmp_path, config_of(lora=rates, pissa=[5e-3, 2e-2, 5e-2]), {("pissa", 5e-2, 0): 0.7})
    assert {run for run in seeded if run[0] == "pissa"} == {
        ("pissa", rate, seed) for rate in (2e-2, 5e-2) for seed in (1, 2)
    }
    faked(tmp_path, config, {("pissa", 5e-3, 1): 0.8})
    seeded = faked(tmp_path, config_of(lora=rates, pissa=[5e-3, 2e-2, 5e-2]), {})
    assert ("pissa", 5e-3, 1) in seeded
    assert ("pissa", 5e-3, 2) not in seeded

    config.entries["lora"].all_seeds = True
    assert {("lora", rate, 2) for rate in rates} <= faked(tmp_path, config, {})

    # What could not prepare has no runs to wait for.
    config = config_of(lora=rates, eva=rates)
    folder = tmp_path / Job("eva").folder
    folder.mkdir(parents=True)
    assert _total(config, tmp_path) == 22
    (folder / "result.json").write_text('{"status": "does not fit", "why": ""}')
    assert _total(config, tmp_path) == 11


def test_killed_half_way_and_resumed(checkpoint, folder):
    file = recipe(checkpoint, TWO)
    process = start(file, "--output", "broken")
    deadline = time.time() + 120
    while len(results("broken")) < 3 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    written = {name: path.stat().st_mtime_ns for name, path in results("broken").items()}
    assert 3 <= len(written) < 8
    time.sleep(3)
    assert len(results("broken")) == len(written), "a run went on alone"

    compare(file, "--output", "broken", "--jobs", 0)
    assert len(results("broken")) == len(written)
    comparison = json.loads(Path("broken/comparison.json").read_text())
    assert comparison["command"] == "corda compare recipe.yaml --output broken"  # which would do the rest
    runs = comparison["runs"]
    assert sum(run["status"] == "done" for run in runs) == len(written)

    text = compare(file, "--output", "broken", "--jobs", 2)
    for name, at in written.items():
        assert results("broken")[name].stat().st_mtime_ns == at, "a finished run was run again"
    assert f"[{len(written) + 1}/" in text
    assert len(results("broken")) == 8  # two rates and two seeds of each
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

    assert comparison["command"] == "corda compare recipe.yaml --output broken --jobs 2"
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


def test_drift_is_that_of_eval(checkpoint, folder):
    """The stored outputs of the base model give the drift that base and tuned model side by side give."""
    from corda_lora.adapters.lora import load_adapter
    from corda_lora.evaluation.evaluate import evaluate
    from corda_lora.models.loading import load_model, load_tokenizer

    source = ModelConfig(str(checkpoint))
    config = EvalConfig(keep=["keep.jsonl", "learn.jsonl"], text="keep.jsonl", batch_tokens=256)
    record = {}
    model, tokenizer = load_model(source), load_tokenizer(source)
    base = evaluate(model, tokenizer, config, False, record=record)
    BaseOutputs.save(folder, record)
    assert all(" hidden " in name for name in record)
    train = ["--model", str(checkpoint), "--data", "learn.jsonl", "--precision", "fp32", "--learning_rate", "0.01"]
    command = [sys.executable, "-m", "corda_lora.cli", "train", *train, "--max_steps", "4", "--output", "tuned"]
    subprocess.run(command, check=True, capture_output=True)
    outputs = BaseOutputs(folder, model)
    tuned = load_adapter(model, "tuned").eval()
    beside, stored = evaluate(tuned, tokenizer, config, False), evaluate(tuned, tokenizer, config, False, outputs)
    for kind in ("keep", "text"):
        for name, sides in beside[kind].items():
            assert sides["tuned"]["drift"] > 1e-5
            assert stored[kind][name]["tuned"] == pytest.approx(sides["tuned"], rel=1e-4)
            assert base[kind][name]["base"] == pytest.approx(sides["base"], rel=1e-6)


@pytest.mark.parametrize(("family", "kept"), [("llama", "hidden"), ("gemma2", "logits"), ("gpt2_conv1d", "hidden")])
def test_stored_outputs_are_the_predictions(family, kept, folder, tokenizer):
    """Gemma 2 caps its logits after the output head: what the head gets is not enough there."""
    model = tiny.build(family)
    encoded = [Encoded(list(range(4, 4 + n)), [i >= n // 2 for i in range(n)]) for n in (5, 9, 12)]
    record = record_base(model, tokenizer, encoded, 24, False, "keep x")
    assert {name.split()[2] for name in record} == {kept}
    BaseOutputs.save(folder, record)
    base, found = BaseOutputs(folder, model), []
    with torch.no_grad():
        for number, ids in enumerate(sorted(e.ids for e in encoded)[:1]):
            n = len(ids) // 2
            found = F.log_softmax(model(torch.tensor([ids])).logits[0, n - 1 : -1], dim=-1)
            assert torch.allclose(base.log_probs("keep x", number)[: len(found)], found, atol=1e-5)


def test_a_run_that_fails_leaves_the_others_alone(checkpoint, folder):
    methods = {"lora": "[1.0e-3, 1.0e+30]", "bitfit": "[1.0e-3, 1.0e-2]"}
    file = recipe(checkpoint, methods, seeds=1)
    with open(file, "a") as more:
        more.write("  broken: {method: lora-ga, options: {samples: -1}, learning_rates: [1.0e-3, 1.0e-2]}\n")
        more.write("  unprepared: {method: eva, options: {rho: 0.5}, learning_rates: [1.0e-3, 1.0e-2]}\n")
    text = compare(file, "--output", "out")
    assert "bitfit, 0.001, seed 0: does not fit: BitFit trains biases, and LlamaForCausalLM has none" in text
    assert "[6/6] " in text  # of what could not prepare none
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
    assert not Path("out/runs/unprepared").exists(), "a run was begun without what it needs"
    assert "BitFit trains biases" in Path("out/report.md").read_text()
    finished = results("out")["runs/lora/lr0.001_s0"].stat().st_mtime_ns

    # Entries and rates may be added to a comparison; what is done stays.
    compare(recipe(checkpoint, {"lora": "[1.0e-3, 2.0e-3]", "pissa": "[1.0e-3, 2.0e-3]"}, seeds=1), "--output", "out")
    assert results("out")["runs/lora/lr0.001_s0"].stat().st_mtime_ns == finished
    assert len(results("out")) == 6 + 3


def test_a_run_whose_process_dies_is_reported_and_tried_again(checkpoint, folder):
    """As one that the system kills for its memory."""
    file = recipe(checkpoint, {"lora": "[1.0e-3, 1.0e-2]"}, seeds=1)
    process = start(file, "--output", "out")
    run, deadline = Path("out/runs/lora/lr0.001_s0"), time.time() + 120
    while not (run / "log.txt").exists() and time.time() < deadline:
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children():
        for worker in child.children():  # of the server that forks them
            worker.kill()
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    statuses = {name: json.loads(path.read_text())["status"] for name, path in results("out").items()}
    assert statuses == {"runs/lora/lr0.001_s0": "failed", "runs/lora/lr0.01_s0": "done"}
    assert "its process ended with -9 (out of memory?)" in " ".join(text.split())
    compare(file, "--output", "out")
    assert json.loads((run / "result.json").read_text())["status"] == "done"


@pytest.mark.parametrize("job", [None, Job("lora", 1e-3)])
def test_a_process_that_died_before_it_took_its_job_is_seen(job):
    """The pipe then says that it was reset (what was sent was never read), or that it is at its end."""
    ours, theirs = multiprocessing.Pipe()
    if job:
        ours.send(job)
    theirs.close()
    assert not _Worker(None, ours, "").lives()


def test_bad_input_before_anything_runs(checkpoint, folder, capsys):
    def says(methods=TWO, **changes):
        return refused(capsys, "compare", recipe(checkpoint, methods, **changes), "--output", "out")

    assert "there is no method 'loar': there are" in says({"loar": "[1.0e-3, 1.0e-2]"})
    assert "lora has one learning rate" in says({"lora": "[1.0e-3]"})
    assert "there is no file other.jsonl" in says(data="other.jsonl")
    Path("empty.jsonl").touch()
    assert "empty.jsonl is empty" in says(data="empty.jsonl")
    assert "there is no model in ./nowhere" in says(model="./nowhere")
    assert "give samples of it as `context`" in says(context="null")
    assert "cannot be an entry's name" in says({"a/b": "[1.0e-3, 1.0e-2]"})
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("")
    assert "something else in it" in says()


def test_another_recipe_is_refused(checkpoint, folder, capsys):
    begun = recipe(checkpoint, {"lora": "[1.0e-3, 1.0e-2]"}, seeds=1)
    assert "no results of the base model yet" in refused(capsys, "compare", begun, "--output", "out", "--jobs", "0")
    changed = recipe(checkpoint, {"lora": "[1.0e-3, 1.0e-2]"}, r=8)
    assert "another recipe (it differs in r)" in refused(capsys, "compare", changed, "--output", "out")


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


def test_data_is_called_by_its_file_where_that_tells_it():
    sides = {"base": {"loss": 1.0}}
    assert _of_side({"keep": {"a/nq.jsonl": sides, "openai/gsm8k": sides}}, "base")["keep"].keys() == {
        "nq",
        "openai/gsm8k",
    }
    assert len(_of_side({"keep": {"a/test.jsonl": sides, "b/test.jsonl": sides}}, "base")["keep"]) == 2


def test_all_methods_are_in_the_docs():
    text = (RECIPES.parent.parent / "docs" / "compare.md").read_text()
    assert not [name for name in METHODS if f"`{name}`" not in text and not name.startswith("corda")]


def test_a_list_of_names_means_their_own_rates():
    config = CompareConfig(methods=["lora", "pissa"], data="x", eval=EvalConfig(learn="y"))
    assert list(config.entries) == ["lora", "pissa"]
    with pytest.raises(CordaError, match="how well the task was learned"):
        CompareConfig(methods=["lora"], data="x", eval=EvalConfig())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_right(path):
    parser, _ = build_parser()
    options = parser.instantiate(parser.parse_args(["compare", "--config", str(path), "--output", "out"]))
    for entry in _take(CompareConfig, options.compare).entries.values():
        check_options(entry.method, entry.options)


def test_a_process_serves_an_entrys_runs_with_blocks_compiled_once(checkpoint, folder, monkeypatch):
    file = Path(recipe(checkpoint, {"lora": "[1.0e-3, 2.0e-3, 1.0e-2]"}, seeds=1))
    file.write_text(file.read_text().replace("train: {", "train: {compile: true, "))
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    process, workers = start(file, "--output", "out"), set()
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            servers = psutil.Process(process.pid).children()
            workers |= {worker.pid for server in servers for worker in server.children()}
        time.sleep(0.02)
    assert process.returncode == 0, process.stdout.read()
    assert len(workers) == 2, "one for the base model, one for all runs of the entry"
    logs = [Path(f"out/runs/lora/lr{rate}_s0/log.txt").read_text() for rate in (0.001, 0.002, 0.01)]
    assert ["Recompiling" in log for log in logs] == [True, False, False]  # with and without gradient of the input
