"""Killed at any place where it writes, a command given again comes to the same end."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import types
from multiprocessing.connection import Connection

import pytest
import tiny
import torch
import transformers
from crashes import crashes
from ranks import run_together

from corda_lora import cli
from corda_lora.compare import pool, work

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(4)]
LEARN = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 5)]
TIMES = {"seconds", "prepare_seconds", "peak_bytes", "name", "took"}


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer):
    """A model of one block, and data."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZE | {"num_hidden_layers": 1}))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends(folder):
    """What a command has made: each file's content, JSON without what is measured by a clock."""
    made = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.name == "timing.json":
            content = b""
        elif path.suffix == ".json":
            content = without_times(json.loads(content))
        if path.name == "sha256.json":  # JSON with times in it has another checksum each time
            content = {name: checksum for name, checksum in content.items() if not name.endswith(".json")}
        made[str(path.relative_to(folder))] = content
    return made


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def same_end_from_every_place(here, arguments, prepare=lambda: None, without=()):
    """Run a command, and again from every state in which a kill can leave its folder. Returns the number of states.
    Files in `without` must be there, but are not compared."""
    arguments = [str(a) for a in arguments]
    work = here / "work"
    work.mkdir()
    os.chdir(work)
    prepare()
    with crashes(work, here / "copies") as found:
        cli.main(arguments)
    whole = ends(work)
    gc.freeze()  # every training ends with a garbage collection
    differing = []
    for state in sorted((here / "copies").iterdir()):
        left = sorted(str(p.relative_to(state)) for p in state.rglob("*"))
        os.chdir(state)
        try:
            cli.main(arguments)
        except SystemExit as stopped:
            differing.append(f"{state.name}: exit {stopped.code} from {left}")
        os.chdir(here)
        again = ends(state)
        for name in without:
            whole[name] = again[name] = whole[name] and again.get(name) and b"there"
        if names := sorted(name for name in {**whole, **again} if again.get(name) != whole.get(name)):
            differing.append(f"{state.name}: {names} from {left}")
        shutil.rmtree(state)
    assert not differing, "\n".join(differing)
    return found.count


@pytest.mark.slow
def test_init(given, here):
    context = ["--context", given / "keep.jsonl", "--preset", "corda+", "--r", 2]
    assert same_end_from_every_place(here, ["init", "--model", given / "model", *context, "--output", "start"]) > 30


@pytest.mark.slow
def test_init_of_a_quantized_base(given, here, tokenizer):
    tiny.llama_for_nf4(num_hidden_layers=1, intermediate_size=64).save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")
    options = ["--context", given / "keep.jsonl", "--r", 2, "--mode", "ipm", "--quantization", "nf4", "--fold", 1]
    arguments = ["init", "--model", here / "model", *options, "--output", "start"]
    named = ("start/adapter_config.json", "start/sha256.json")  # the base by its path, which is another in each state
    assert same_end_from_every_place(here, arguments, without=named) > 40


@pytest.mark.slow
def test_train(given, here):
    recipe = ["--max_steps", 2, "--checkpoints", 2, "--batch_size", 2, "--precision", "fp32", "--lora_dropout", 0.1]
    model = ["--model", given / "model"]

    def start():
        cli.main([str(a) for a in ["init", *model, "--context", given / "keep.jsonl", "--r", 2, "--output", "start"]])

    arguments = ["train", *model, "--data", given / "learn.jsonl", "--start", "start", *recipe, "--output", "tuned"]
    assert same_end_from_every_place(here, arguments, start) > 40


def test_eval(given, here):
    arguments = ["eval", "--model", given / "model", "--keep", given / "keep.jsonl", "--output", "eval.json"]
    assert same_end_from_every_place(here, arguments) > 2


@pytest.fixture
def in_threads(monkeypatch):
    """The jobs of a comparison run in threads, so that their writes are seen in this process, and are remembered."""
    monkeypatch.setattr(work, "do_job", remembered(work.do_job))
    context = types.SimpleNamespace(Pipe=multiprocessing.Pipe, Value=multiprocessing.Value, Process=Thread)
    context.set_forkserver_preload = lambda names: None
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", lambda: None)
    monkeypatch.setattr("corda_lora.report.report.write_report", lambda output, comparison: None)
    monkeypatch.setattr(work.signal, "signal", lambda number, handler: signal.SIG_DFL)
    monkeypatch.setattr(work, "_redirect_output", lambda path: path.touch())


def remembered(do_job):
    """A job gives the same result and files where the same tensors are there: for each of these it is done once."""
    known = {}

    def do(comparison, job, advance):
        tensors = frozenset((str(p), p.read_bytes()) for p in comparison.output.rglob("*.safetensors"))
        key = job, tensors
        folder = comparison.folder(job)
        if key in known:
            result, files = known[key]
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            return result
        result = do_job(comparison, job, advance)
        known[key] = result, {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return result

    return do


class Thread(threading.Thread):
    """Has its own end of the pipe, as a process has."""

    def __init__(self, target, args, daemon):
        pipe, *others = args
        super().__init__(target=target, args=[Connection(os.dup(pipe.fileno())), *others], daemon=daemon)

    def terminate(self):
        pass


RECIPE = """\
model: {given}/model
data: {given}/learn.jsonl
context: {given}/keep.jsonl
context_samples: 4
r: 2
train: {{max_steps: 1, batch_size: 2, precision: fp32}}
eval: {{keep: {given}/keep.jsonl, learn: {given}/learn.jsonl}}
seeds: 1
curve_points: 1
methods: {{corda-kpm-anchored: {{learning_rates: [1.0e-2, 3.0e-2]}}}}
"""


@pytest.mark.slow
def test_compare(given, here, in_threads):
    (here / "recipe.yaml").write_text(RECIPE.format(given=given))
    arguments = ["compare", here / "recipe.yaml", "--output", "out"]
    assert same_end_from_every_place(here, arguments) > 40


# Where one run after another is killed by the system, each going on from what the last one left.
PLACES = [
    ("train", "open", "checkpoint-1/trainer_state.json"),
    ("train", "os.rename", "checkpoint-1/sha256.json"),
    ("train", "open", "checkpoint-2/trainer_state.json"),
    ("train", "os.rename", "tuned"),
    ("train", "os.rename", ".partial"),  # of the folder of work, to remove it
    ("eval", "os.rename", "eval.json"),
]


@pytest.mark.slow
def test_killed_by_the_system(given, here):
    recipe = ["--max_steps", "2", "--checkpoints", "2", "--batch_size", "2", "--precision", "fp32", "--r", "2"]
    model = ["--model", f"{given}/model"]
    commands = {
        "train": ["train", *model, "--data", f"{given}/learn.jsonl", *recipe, "--output", "tuned"],
        "eval": ["eval", *model, "--adapter", "tuned", "--keep", f"{given}/keep.jsonl", "--output", "eval.json"],
    }
    for folder, kills in (("whole", []), ("killed", PLACES)):
        (here / folder).mkdir()
        there = {"FIRST": f"import os; os.chdir({str(here / folder)!r})"}
        for verb, *place in kills:
            ended = run_together(1, commands[verb], here / "log", kills={0: place}, **there)
            assert ended.codes == [-signal.SIGKILL], (place, ended.err)
        for arguments in commands.values():
            ended = run_together(1, arguments, here / "log", **there)
            assert ended.codes == [0], ended.err
    assert ends(here / "killed") == ends(here / "whole")
    assert {path.name for path in (here / "killed").iterdir()} == {"tuned", "eval.json"}
