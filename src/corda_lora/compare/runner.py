"""Methods × learning rates × seeds on one model: each run in a directory of its own, several processes at a time.

    OUTPUT/recipe.json                       what all runs share; another recipe is refused
    OUTPUT/base/                             the base model's numbers and outputs, computed once
    OUTPUT/starts/ENTRY/                     what a method found before training, shared by its runs
    OUTPUT/runs/ENTRY/lr0.001_s0/            result.json when the run is done, log.txt
    OUTPUT/comparison.json, report.html, ... what came out

A run is done when its result.json is there, and is then never run again; one that was broken off is begun anew, and
gives the same numbers. Every rate is run with the first seed; after that those where it counts with the others, too: an
entry's best rate and the two beside it, and the two between which it reaches the best loss of the reference (LoRA).

A process does runs of one entry, one after the other, so that imports and compiled blocks serve them all (compiling
takes as long as training a small model); after a run that failed its process ends, and the next begins in a new one.
"""

import gc
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..config import CompareConfig, CordaError, DataConfig, MethodConfig, ModelConfig
from ..data.batches import encode
from ..data.samples import load_samples
from ..devices import accelerator, machine_name, peak_bytes, release_cache, restart_peak, visible_gpus
from ..evaluation.answers import TUNED, loss_and_drift
from ..evaluation.base_outputs import BaseOutputs
from ..evaluation.evaluate import evaluate
from ..files import write_json
from ..methods.registry import METHODS, Setup, check_options, count_parameters
from ..models.loading import load_model, load_tokenizer
from ..models.targets import find_targets
from ..progress import console, progress_bar
from ..training.train import DivergedError, train, training_steps, warn_without_bfloat16
from ..version import __version__

BASE, RESULT, LOG = "base", "result.json", "log.txt"
PACKAGES = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Job:
    """The base model's outputs (no entry), what a method looks at before (no rate), or a run."""

    entry: str = ""
    rate: float | None = None
    seed: int = 0

    @property
    def folder(self) -> Path:
        if not self.entry:
            return Path(BASE)
        if self.rate is None:
            return Path("starts", self.entry)
        return Path("runs", self.entry, f"lr{self.rate:g}_s{self.seed}")

    def __str__(self) -> str:
        if not self.entry:
            return "the base model"
        return f"{self.entry}, preparing" if self.rate is None else f"{self.entry}, {self.rate:g}, seed {self.seed}"


def compare(
    source: ModelConfig, config: CompareConfig, output: Path, jobs: int = 1, gpus: Sequence[str] = (), command: str = ""
) -> dict[str, Any]:
    """Run what is not done yet, several at a time. Returns the comparison (see `gather`), and writes comparison.json.

    Args:
        jobs: how many processes at a time, on each GPU; none if 0: then the comparison is of the runs done before.
        gpus: which to use, as in CUDA_VISIBLE_DEVICES. Default: all there are, or the CPU.
        command: the command that makes this comparison, for its report.

    Raises CordaError for an unknown method, model or GPU, data that cannot be had, or an output with another comparison
    in it, all before any long work; and if the base model cannot be measured. A run that fails is reported, and the
    others go on.
    """
    for name, entry in config.entries.items():
        if entry.method not in METHODS:
            raise CordaError(f"there is no method {entry.method!r}: there are {', '.join(METHODS)}")
        check_options(entry.method, entry.options)
        entry.learning_rates = sorted(set(entry.learning_rates or METHODS[entry.method].learning_rates))
        if METHODS[entry.method].looks == "keep" and config.context is None:
            raise CordaError(f"{name} looks at the ability to keep before it trains: give samples of it as `context`")
    there = visible_gpus()
    if unknown := [gpu for gpu in gpus if gpu not in there and there != [""]]:
        raise CordaError(f"there is no GPU {unknown[0]}: there are {', '.join(there)}")
    load_tokenizer(source)  # or it is no model: said now, and not by the first process
    _check_data(config)
    _open(source, config, output)
    if jobs:
        if not torch.accelerator.is_available():
            warn_without_bfloat16(config.train, torch.device("cpu"))
        _run_all(source, config, output, list(gpus or there) * jobs)
    if not (base := _result(output, Job())) or base["status"] != "done":
        raise CordaError(f"{output} has no results of the base model yet: there is nothing to report")
    comparison = gather(source, config, output, command)
    write_json(output / "comparison.json", comparison)
    return comparison


def _check_data(config: CompareConfig) -> None:
    for kind in ("keep", "learn", "text", "choices"):
        for data in config.eval.data(kind):
            load_samples(data)
    load_samples(_data(config.data))
    if config.context is not None:
        load_samples(_data(config.context))


def _data(given: str | DataConfig) -> DataConfig:
    return DataConfig(given) if isinstance(given, str) else given


def _shared(source: ModelConfig, config: CompareConfig) -> dict[str, Any]:
    """The settings that all runs share: entries, rates and seeds may be added to a comparison."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("methods", "seeds")}
    return json.loads(json.dumps({"model": asdict(source), **settings}))


def _open(source: ModelConfig, config: CompareConfig, output: Path) -> None:
    path, shared = output / "recipe.json", _shared(source, config)
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not path.is_file()):
        raise CordaError(f"the output {output} has something else in it already: remove it, or choose another")
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [key for key in shared if found["shared"].get(key) != shared[key]]
        changed = [n for n, e in config.entries.items() if found["entries"].get(n, e.key()) != e.key()]
        if differing or changed:
            raise CordaError(
                f"{output} holds runs of another recipe (it differs in {', '.join(differing + changed)}): remove it, "
                "or choose another output"
            )
    entries = {name: entry.key() for name, entry in config.entries.items()}
    if path.is_file():
        entries = found["entries"] | entries
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, {"shared": shared, "entries": entries})


# --- the runs, several at a time -------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """A process, what it does now and since when; over the pipe it gets a job and says when that is done."""

    process: Any
    pipe: Connection
    gpu: str
    job: Job = Job()
    since: float = 0.0

    def begin(self, job: Job, output: Path) -> None:
        shutil.rmtree(output / job.folder, ignore_errors=True)  # what was broken off
        (output / job.folder).mkdir(parents=True)
        self.job, self.since = job, time.perf_counter()
        self.pipe.send(job)

    def lives(self) -> bool:
        """Asked when the pipe has something: that the job is done, or its end, when the process died."""
        try:
            self.pipe.recv()
            return True
        except (EOFError, ConnectionResetError):
            return False

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def _run_all(source: ModelConfig, config: CompareConfig, output: Path, slots: list[str]) -> None:
    """Keep a process in every slot until nothing is left to do. A job waits for those that it builds on."""
    # Children are forked from a server that has imported everything and touched no GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([__name__])
    threads = max(1, (os.cpu_count() or 1) // len(slots))
    counter = context.Value("q", 0)  # steps taken by all runs of this session
    commit = _commit()  # before anybody edits the checkout
    for job in _jobs(config, output):
        if (result := _result(output, job)) and result["status"] in ("failed", "does not fit"):
            (output / job.folder / RESULT).unlink()  # tried again
    todo = _todo(config, output)
    total = _total(config, output)
    before = shown = sum(job.rate is not None and _result(output, job) is not None for job in _jobs(config, output))
    untrained = 0  # runs that failed or do not fit
    workers: list[_Worker] = []
    seconds: list[float] = []

    def start(job: Job) -> None:
        gpu = slots.pop(0)
        ours, theirs = context.Pipe()
        arguments = source, config, output, theirs, gpu, threads, counter, commit
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()  # or its end would never be seen
        workers.append(_Worker(process, ours, gpu))
        workers[-1].begin(job, output)

    def finish(worker: _Worker) -> None:
        """Show what a worker has done, and give it another job of the same entry, or end it."""
        nonlocal todo, total, shown, untrained
        job, lives = worker.job, worker.lives()
        if not lives:
            worker.process.join()
        if _result(output, job) is None:
            why = f"its process ended with {worker.process.exitcode} (out of memory?)"
            write_json(output / job.folder / RESULT, {"status": "failed", "why": why})
        result = _result(output, job) or {}
        if not job.entry and result["status"] != "done":
            raise CordaError(f"{job}: {result['why']} (see {output / BASE / LOG})")
        if job.rate is not None:
            shown += 1
            if result["status"] in ("done", "diverged"):
                seconds.append(time.perf_counter() - worker.since)
            else:
                untrained += 1
        total = _total(config, output)
        left = sum(seconds) / len(seconds) * (total - shown) / (len(slots) + len(workers)) if seconds else 0
        advance(0, total=(total - before - untrained) * _steps(config))
        console.print(_line(job, result, shown, total, left), highlight=False)
        busy = [other.job for other in workers]
        todo = [job for job in _todo(config, output) if job not in busy]
        following = [other for other in todo if other.entry == job.entry and _can_start(config, output, other)]
        if lives and following and result["status"] in ("done", "diverged"):
            todo.remove(following[0])
            worker.begin(following[0], output)
        else:
            worker.end()
            workers.remove(worker)
            slots.append(worker.gpu)

    with progress_bar("comparing", (total - before) * _steps(config)) as advance:
        try:
            while todo or workers:
                while slots and (startable := [job for job in todo if _can_start(config, output, job)]):
                    # Those of an entry with the fewest workers: it is then compiled once for most of its runs.
                    entries = [worker.job.entry for worker in workers]
                    job = min(startable, key=lambda job: entries.count(job.entry))
                    todo.remove(job)
                    start(job)
                ready = wait([worker.pipe for worker in workers], timeout=0.5)
                with counter.get_lock():
                    advance(counter.value)
                    counter.value = 0
                for worker in [worker for worker in workers if worker.pipe in ready]:
                    finish(worker)
        finally:
            for worker in workers:
                worker.process.terminate()


def _todo(config: CompareConfig, output: Path) -> list[Job]:
    """What has no result yet, a method's preparing before the first of its runs. A method that could not prepare has no
    runs to do: its result is theirs; one whose runs are all done need not prepare."""
    missing = [job for job in _jobs(config, output) if _result(output, job) is None]
    unprepared = _unprepared(config, output)
    todo = dict.fromkeys(job for job in missing if not job.entry)
    for run in missing:
        if run.rate is not None and run.entry not in unprepared:
            todo |= dict.fromkeys(job for job in (Job(run.entry), run) if job in missing)
    return list(todo)


def _jobs(config: CompareConfig, output: Path) -> list[Job]:
    """All that is to be done, as far as it can be told now: other seeds once all rates have been run with the first."""
    jobs = [Job()]
    jobs += [Job(name) for name, entry in config.entries.items() if METHODS[entry.method].looks]
    for name, entry in config.entries.items():
        jobs += [Job(name, rate) for rate in entry.learning_rates]
    swept = {name: _swept(output, name, entry) or {} for name, entry in config.entries.items()}
    reference = swept.get("lora", next(iter(swept.values())))  # as in `frontier.reference_method`
    at = min(reference.values(), default=None)
    for name, losses in swept.items():
        rates = list(losses)
        best = rates.index(min(losses, key=lambda rate: losses[rate])) if rates else 0
        seeded = set(rates if config.entries[name].all_seeds else rates[max(0, best - 1) : best + 2])
        for pair in itertools.pairwise(rates):
            if at is not None and min(losses[rate] for rate in pair) < at <= max(losses[rate] for rate in pair):
                seeded |= set(pair)  # its drift at the reference's best loss is read off between these
        others = [
            Job(name, rate, seed) for seed in range(1, config.seeds) for rate in config.entries[name].learning_rates
        ]  # those of before, too, if a rate was added that is the best now
        jobs += [job for job in others if job.rate in seeded or (output / job.folder / RESULT).is_file()]
    return jobs


def _swept(output: Path, name: str, entry: MethodConfig) -> dict[float, float] | None:
    """The task loss of each rate that was done with the first seed; None before all have been tried."""
    results = {rate: _result(output, Job(name, rate)) for rate in entry.learning_rates}
    if None in results.values():
        return None
    return {rate: task_loss(result) for rate, result in results.items() if result and result["status"] == "done"}


def _unprepared(config: CompareConfig, output: Path) -> set[str]:
    """Entries that could not prepare: none of their runs will be made."""
    starts = {name: _result(output, Job(name)) for name in config.entries}
    return {name for name, start in starts.items() if start and start["status"] != "done"}


def _total(config: CompareConfig, output: Path) -> int:
    """How many runs there will be, about: of an entry whose rates are not done, three with the other seeds."""
    unprepared = _unprepared(config, output)
    entries = {name: entry for name, entry in config.entries.items() if name not in unprepared}
    unknown = [len(entry.learning_rates) for name, entry in entries.items() if _swept(output, name, entry) is None]
    known = sum(job.rate is not None and job.entry in entries for job in _jobs(config, output))
    return known + (config.seeds - 1) * sum(min(3, rates) for rates in unknown)


def _can_start(config: CompareConfig, output: Path, job: Job) -> bool:
    """The base model is first, though what prepares could go beside it: it would take the places of earlier entries."""
    looks = job.rate is not None and METHODS[config.entries[job.entry].method].looks
    needed = [Job(), Job(job.entry)] if looks else [Job()] if job.entry else []
    return all(_result(output, before) for before in needed)


def _result(output: Path, job: Job) -> dict[str, Any] | None:
    path = output / job.folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def task_loss(result: dict[str, Any]) -> float:
    """Held-out loss of the task: of the first `learn` data."""
    return float(next(iter(result["results"]["learn"].values()))["loss"])


def _line(job: Job, result: dict[str, Any], shown: int, total: int, left: float) -> str:
    if result["status"] != "done":
        text = f"[yellow]{result['status']}[/]: {result['why']}"
    elif job.rate is None:
        text = f"{result['seconds']:.0f} s"
    else:
        drifts = [f"{Path(name).stem} {r['drift']:.3g}" for name, r in result["results"].get("keep", {}).items()]
        text = f"loss {task_loss(result):.4f}, drift {', '.join(drifts) or 'not measured'}, {result['seconds']:.0f} s"
    when = f", about {left / 60:.0f} min left" if left > 60 else ""
    return f"[{shown}/{total}{when}] {job}: {text}"


# --- the jobs of a process -------------------------------------------------------------------------------------------


def _work(
    source: ModelConfig,
    config: CompareConfig,
    output: Path,
    pipe: Connection,
    gpu: str,
    threads: int,
    counter: Any,
    commit: str | None,
) -> None:
    """Do the jobs that come and write their results, whatever happens, until the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        folder = output / job.folder
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        result: dict[str, Any]
        try:
            result = _do(source, config, output, job, counter)
        except CordaError as error:
            result = {"status": "does not fit", "why": str(error)}
        except DivergedError as error:
            result = {"status": "diverged", "why": str(error)}
            with counter.get_lock():
                counter.value += _steps(config) - (error.step - 1)  # steps that will not be taken
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            result = {"status": "failed", "why": f"{type(error).__name__}: {lines[0] if lines else ''}"}
        gc.collect()  # a trainer's parts hold on to one another, and to the model
        release_cache(accelerator())
        restart_peak(accelerator())
        write_json(folder / RESULT, result | {"commit": commit, "machine": machine_name(), "gpu": gpu or None})
        pipe.send(None)


def _end_with_parent() -> None:
    """A comparison that is killed leaves no run behind that would go on alone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(source: ModelConfig, config: CompareConfig, output: Path, job: Job, counter: Any) -> dict[str, Any]:
    since = time.perf_counter()
    device = accelerator()
    model, tokenizer = load_model(source).to(device), load_tokenizer(source)
    if not job.entry:
        record: dict[str, torch.Tensor] = {}
        results = evaluate(model, tokenizer, config.eval, progress=False, record=record)
        BaseOutputs.save(output / BASE, record)
        found = {"status": "done", "results": _of_side(results, "base"), "seconds": time.perf_counter() - since}
        versions = {"corda-lora": __version__, "python": platform.python_version()}
        return found | {"versions": versions | {package: version(package) for package in PACKAGES}}

    entry, data = config.entries[job.entry], _data(config.data)
    base = BaseOutputs(output / BASE, model) if job.rate is not None else None
    setup = _setup(config, output, job, model, tokenizer)
    torch.manual_seed(job.seed)
    since = time.perf_counter()
    prepared = METHODS[entry.method].prepare(model, setup, **entry.options)
    prepare_seconds = time.perf_counter() - since
    if job.rate is None:
        return {"status": "done", "seconds": prepare_seconds}

    curve = _Curve(config, tokenizer, setup.steps, counter)
    training = train(
        prepared.model,
        tokenizer,
        load_samples(data),
        setup.train,
        data.max_length,
        progress=False,
        optimizer=prepared.optimizer,
        callbacks=[*prepared.callbacks, curve],
    )
    results = _of_side(evaluate(prepared.model, tokenizer, config.eval, progress=False, base=base), "tuned")
    start = _result(output, Job(job.entry)) or {"seconds": prepare_seconds}
    result = {
        "status": "done",
        "why": "",
        "results": results,
        "curve": curve.points,
        "loss": training["loss"],
        "steps": training["steps"],
        "seconds": training["seconds"] - curve.taken,
        "prepare_seconds": start["seconds"],
        "peak_bytes": peak_bytes(device),
        "parameters": count_parameters(prepared.model),
    }
    begin, end = curve.points[0][-1], curve.points[-1][-1]
    if not end <= begin:  # or not a number
        why = f"the task's held-out loss began at {begin:.3g} and ended at {end:.3g}"
        result |= {"status": "diverged", "why": why}
    return result


def _setup(config: CompareConfig, output: Path, job: Job, model: Any, tokenizer: Any) -> Any:
    return Setup(
        tokenizer=tokenizer,
        learn=_data(config.data),
        keep=None if config.context is None else _data(config.context),
        samples=config.context_samples,
        targets=find_targets(model, config.target_modules),
        r=config.r,
        lora_alpha=config.lora_alpha or config.r,
        train=replace(config.train, learning_rate=job.rate or config.train.learning_rate, seed=job.seed, checkpoints=0),
        steps=_steps(config),
        folder=output / "starts" / job.entry,
    )


class _Curve(TrainerCallback):
    """The task's held-out loss at a few steps of a run: points [step, seconds of training, loss]; and the seconds that
    measuring it took."""

    def __init__(self, config: CompareConfig, tokenizer: Any, steps: int, counter: Any):
        data = config.eval.data("learn")[0]
        samples = load_samples(data)[: config.curve_samples]
        self.encoded = [encode(tokenizer, sample, data.max_length, end=True) for sample in samples]
        self.steps = {round(i * steps / config.curve_points) for i in range(config.curve_points + 1)}
        self.tokenizer, self.batch_tokens, self.counter = tokenizer, config.eval.batch_tokens, counter
        self.points: list[list[float]] = []
        self.taken = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.since = time.perf_counter()
        self.measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with self.counter.get_lock():
            self.counter.value += 1
        if state.global_step in self.steps:
            self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        began = time.perf_counter()
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiled blocks are for training
            numbers = loss_and_drift(model, self.tokenizer, self.encoded, self.batch_tokens, compared=TUNED)
        model.train()
        self.points.append([step, began - self.since - self.taken, numbers["tuned"]["loss"]])
        self.taken += time.perf_counter() - began


def _steps(config: CompareConfig) -> int:
    """Of each run."""
    if config.train.max_steps:
        return config.train.max_steps
    return training_steps(config.train, sum(bool(sample.response) for sample in load_samples(_data(config.data))))


def _of_side(results: dict[str, Any], side: str) -> dict[str, Any]:
    """`evaluate`'s results of one side, the data called by its file's name where that is enough to tell it."""
    found = {}
    for kind, datas in results.items():
        names = [Path(name).stem if Path(name).suffix else name for name in datas]
        names = names if len(set(names)) == len(names) else list(datas)
        found[kind] = {name: sides[side] for name, sides in zip(names, datas.values())}
    return found


# --- what came out ---------------------------------------------------------------------------------------------------


def gather(source: ModelConfig, config: CompareConfig, output: Path, command: str) -> dict[str, Any]:
    """The comparison as one JSON: settings, machine, versions, the base model's results, and every run that was to be
    made, with its status: done, diverged, failed, does not fit, or not run."""
    base = _result(output, Job()) or {}
    runs = []
    for job in _jobs(config, output):
        if job.rate is None:
            continue
        start = _result(output, Job(job.entry)) or {"status": "done"}
        result = _result(output, job) or start
        if result is start:
            result = {"status": "not run", "why": ""} if start["status"] == "done" else start
        runs.append({"method": job.entry, "learning_rate": job.rate, "seed": job.seed, **result})
    titles = {}
    for name, entry in config.entries.items():
        method = METHODS[entry.method]
        title = method.title if name == entry.method else name
        titles[name] = {"title": title, "source": method.source, "options": entry.options}
    return {
        "name": output.name,
        "command": command,
        "recipe": _shared(source, config) | {"methods": {n: e.key() for n, e in config.entries.items()}},
        "machine": ", ".join(sorted({run["machine"] for run in [base, *runs] if run.get("machine")})) or None,
        "versions": base.get("versions", {}),
        "commit": ", ".join(sorted({run["commit"] for run in runs if run.get("commit")})) or None,
        "methods": titles,
        "base": base.get("results", {}),
        "runs": runs,
    }


def _commit() -> str | None:
    """Of the checkout that this code runs from, or $COMMIT."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or None
