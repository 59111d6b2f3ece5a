"""The processes that do the jobs of a comparison, several at a time.

A job is done when its result.json is there, and is then never done again. A job that was broken off is begun anew, and
gives the same numbers, on a CPU if it gets as many threads as before (the processes share the cores).

A process does jobs of one entry, one after the other, so that imports and compiled blocks serve them all: compiling
takes as long as training a small model. After a job that failed its process ends, and the next one begins in a new
process.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CompareConfig, CordaError, ModelConfig
from ..data.labels import check_labels, with_labels
from ..data.overview import check_fit, overview
from ..data.samples import digest_of, load_samples
from ..devices import accelerator, machine_name, release_cache, restart_peak, visible_gpus
from ..evaluation.choices import check_choices
from ..evaluation.evaluate import measured_samples
from ..evaluation.measures import KINDS
from ..evaluation.tasks.registry import named_tasks
from ..files import write_json
from ..methods.registry import METHODS, check_options
from ..models.loading import class_of, empty_model, load_tokenizer, read_settings
from ..models.targets import find_targets, require_causal
from ..progress import console, progress_bar
from ..training.arguments import check_trainer
from ..training.train import DivergedError, warn_without_bfloat16
from .comparison import RESULT, Comparison, gather
from .frontier import task_loss
from .job import do_job
from .process import begin
from .schedule import Job, can_start, count_runs, jobs_to_do, next_job, scheduled_jobs

LOG = "log.txt"


def compare(
    source: ModelConfig, recipe: CompareConfig, output: Path, jobs: int = 1, gpus: Sequence[str] = (), command: str = ""
) -> dict[str, Any]:
    """Run what is not done yet, several at a time. Returns the comparison (see `gather`), and writes comparison.json.

    Args:
        jobs: how many processes at a time, on each GPU; none if 0: then the comparison is of the runs done before.
        gpus: which GPUs to use, as in CUDA_VISIBLE_DEVICES. Default: all, or the CPU if there is none.
        command: the command that makes this comparison, for its report.

    Raises CordaError for an unknown method, model or GPU, data that cannot be read, or an output that holds another
    comparison, all before any long work; and if the base model cannot be measured. A run that fails is reported, and
    the others go on.
    """
    comparison = Comparison(source, recipe, output)
    check_methods(recipe)
    check_trainer(recipe.train, accelerator())
    source = with_labels(source, comparison.learn)
    comparison = replace(comparison, source=source)
    gpus = _checked_gpus(gpus)
    comparison.open(_checked_data(comparison, load_tokenizer(source), _checked_model(comparison)))
    if jobs:
        if not torch.accelerator.is_available():
            warn_without_bfloat16(recipe.train, torch.device("cpu"))
        _run_all(comparison, [*gpus] * jobs)
    results = comparison.results()
    if results.get(Job(), {"status": "missing"})["status"] != "done":
        raise CordaError(f"{output} has no results of the base model yet: there is nothing to report")
    gathered = gather(comparison, results, command)
    write_json(output / "comparison.json", gathered)
    return gathered


def check_methods(recipe: CompareConfig) -> None:
    """Raises CordaError if an entry's method, or an option of it, does not exist, or lacks a context."""
    for name, entry in recipe.entries.items():
        if entry.method not in METHODS:
            raise CordaError(f"there is no method {entry.method!r}: there are {', '.join(METHODS)}")
        for value in entry.swept_values or [None]:
            check_options(entry.method, entry.options | ({entry.swept_option: value} if entry.sweep else {}))
        if METHODS[entry.method].prepares_from == "keep" and recipe.context is None:
            raise CordaError(f"{name} analyses the ability to keep before it trains: give samples of it as `context`")


def _checked_gpus(gpus: Sequence[str]) -> Sequence[str]:
    visible = visible_gpus()
    if unknown := [gpu for gpu in gpus if gpu not in visible and visible != [""]]:
        raise CordaError(f"there is no GPU {unknown[0]}: there are {', '.join(visible)}")
    return gpus or visible


def _checked_model(comparison: Comparison) -> nn.Module | None:
    """The model without its weights; None where config.json does not say enough of it.

    Raises CordaError if no run could train it: it is neither a causal language model nor has labels, or has no such
    layers."""
    source = comparison.source
    if source.model.endswith(".gguf") or class_of(settings := read_settings(source)) is None:
        return None
    model = empty_model(settings, source)
    if source.labels is None:
        require_causal(model)
    find_targets(model, comparison.recipe.target_modules)
    return model


def _checked_data(comparison: Comparison, tokenizer: Any, model: nn.Module | None) -> list[list[str]]:
    """Show a sample of each data set. Returns the use and name of each, with the digest of its samples.

    Raises CordaError if one cannot be read, has nothing to learn or measure, or does
    not fit the model, if that is known."""
    prepared = [("task", comparison.learn)] + ([] if comparison.keep is None else [("context", comparison.keep)])
    measured = [(kind, data) for kind in KINDS for data in comparison.recipe.eval.data(kind)]
    benchmarks = [(task.name, task.check(comparison.recipe.eval)) for task in named_tasks(comparison.recipe.eval)]
    digests = []
    for use, data in [*prepared, *measured]:
        samples = load_samples(data)
        digests.append([f"{use} {data.data}", digest_of(samples)])
        check_labels(data.data, samples, comparison.source.labels)
        if use == "choices":
            check_choices(data.data, samples)
        kind = {"task": "learn", "context": "keep"}.get(use, use)
        shown, encoded = measured_samples(kind, tokenizer, samples, data.max_length)
        learned, end = use != "context", kind == "learn"
        console.print(overview(f"{use} {data.data}", tokenizer, shown, encoded, data.max_length, learned, end))
        if model is not None:
            check_fit(model, (e.ids for e in encoded))
    for name, asked in benchmarks:
        digests.append([f"task {name}", hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()])
    return digests


# --- the processes ---------------------------------------------------------------------------------------------------


def _run_all(comparison: Comparison, slots: Sequence[str]) -> None:
    """Do all jobs that have no result. `slots` names the GPU of each process, "" for the CPU."""
    for job, result in comparison.results().items():
        if result["status"] in ("failed", "does not fit"):
            (comparison.folder(job) / RESULT).unlink()  # tried again
    session = _Session(comparison, list(slots))
    with progress_bar("comparing", session.progress.session_steps()) as advance:
        session.run(advance)


@dataclass(eq=False)
class _Worker:
    """A process with the job that it does, and since when. Over the pipe it gets a job, and says when that is done."""

    process: Any
    pipe: Connection
    gpu: str
    job: Job
    since: float = 0.0

    def begin(self, comparison: Comparison, job: Job) -> None:
        folder = comparison.folder(job)
        shutil.rmtree(folder, ignore_errors=True)  # a run that was broken off
        folder.mkdir(parents=True)
        self.job, self.since = job, time.perf_counter()
        self.pipe.send(job)

    def lives(self) -> bool:
        """Whether the process has done its job, and not died. Asked when the pipe has something to read: that the job
        is done, or the end of the pipe."""
        try:
            self.pipe.recv()
            return True
        except (EOFError, ConnectionResetError):
            return False

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


class _Session:
    """The processes of one call of `compare`, and the results so far. Keeps a process in every slot until no job is
    left to do."""

    def __init__(self, comparison: Comparison, slots: list[str]):
        # Processes are forked from a server that has imported what it can without touching a GPU: see `preload`.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            self.context.set_forkserver_preload([f"{__package__}.preload"])
        self.threads = max(1, (os.cpu_count() or 1) // len(slots))
        self.counter = self.context.Value("q", 0)  # steps that runs have taken since it was last read
        self.commit = _commit()  # now, before anybody edits the checkout
        self.comparison, self.slots = comparison, slots
        self.entries, self.seeds = comparison.entries, comparison.recipe.seeds
        self.results = comparison.results()
        self.workers: list[_Worker] = []
        runs_done = sum(
            job.is_run and job in self.results for job in scheduled_jobs(self.entries, self.seeds, self.results)
        )
        self.progress = _Progress(self.count_runs(), runs_done, comparison.steps, len(slots))

    def run(self, advance: Callable[..., None]) -> None:
        """Do all jobs. `advance` moves the progress bar."""
        try:
            while True:
                while self.slots and (startable := self.startable()):
                    self.start(next_job(startable, [worker.job.entry for worker in self.workers]))
                if not self.workers:
                    return
                ready = wait([worker.pipe for worker in self.workers], timeout=0.5)
                with self.counter.get_lock():
                    advance(self.counter.value)
                    self.counter.value = 0
                for worker in [worker for worker in self.workers if worker.pipe in ready]:
                    line = self.finish(worker)
                    advance(0, total=self.progress.session_steps())
                    console.print(line, highlight=False)
                    if worker in self.workers:  # otherwise it has died
                        self.go_on(worker)
        finally:
            for worker in self.workers:
                worker.process.terminate()
            for worker in self.workers:  # the lock on the output is held until they write no more
                worker.process.join(10)
                worker.process.kill()

    def startable(self) -> list[Job]:
        """The jobs that are to do, can start, and are not being done."""
        busy = [worker.job for worker in self.workers]
        jobs = jobs_to_do(self.entries, self.seeds, self.results)
        return [job for job in jobs if job not in busy and can_start(self.entries, self.results, job)]

    def count_runs(self) -> int:
        return count_runs(self.entries, self.seeds, self.results)

    def start(self, job: Job) -> None:
        """Start a process with a job."""
        gpu = self.slots.pop(0)
        ours, theirs = self.context.Pipe()
        arguments = theirs, gpu, self.threads, self.counter, self.commit
        process = self.context.Process(target=begin, args=arguments, daemon=True)
        process.start()
        theirs.close()  # otherwise the end of the pipe would never be seen
        ours.send((_work, self.comparison))
        worker = _Worker(process, ours, gpu, job)
        self.workers.append(worker)
        worker.begin(self.comparison, job)

    def finish(self, worker: _Worker) -> str:
        """Take the result of the job that a process has done, or has died of. Returns a line that tells it.

        Raises CordaError if the base model could not be measured.
        """
        job = worker.job
        if not worker.lives():
            self.end(worker)
        result = self.comparison.result(job)
        if result is None:
            result = {"status": "failed", "why": f"its process ended with {worker.process.exitcode} (out of memory?)"}
            self.comparison.write_result(job, result)
        self.results[job] = result
        if not job.entry and result["status"] != "done":
            log = self.comparison.folder(job) / LOG
            raise CordaError(f"{job}: {result['why']} (see {log})")
        self.progress.add(job, result, time.perf_counter() - worker.since, self.count_runs())
        return self.progress.line(job, result)

    def go_on(self, worker: _Worker) -> None:
        """Give a process another job of its entry, or end it."""
        following = [job for job in self.startable() if job.entry == worker.job.entry]
        if following and self.results[worker.job]["status"] in ("done", "diverged"):
            worker.begin(self.comparison, following[0])
        else:
            self.end(worker)

    def end(self, worker: _Worker) -> None:
        worker.end()
        self.workers.remove(worker)
        self.slots.append(worker.gpu)


class _Progress:
    """Counts the runs, for the progress bar and the lines above it.

    Args:
        total: how many runs there will be.
        done: how many of them have a result already.
        steps: how many steps each run takes.
        processes: how many runs go on at the same time.
    """

    def __init__(self, total: int, done: int, steps: int, processes: int):
        self.total, self.done, self.done_before = total, done, done
        self.steps, self.processes = steps, processes
        self.untrained = 0  # runs of this session that failed or do not fit
        self.seconds: list[float] = []  # of the other runs of this session

    def add(self, job: Job, result: dict[str, Any], seconds: float, total: int) -> None:
        self.total = total
        if job.is_run:
            self.done += 1
            if result["status"] in ("done", "diverged"):
                self.seconds.append(seconds)
            else:
                self.untrained += 1

    def session_steps(self) -> int:
        """How many steps all runs of this session take."""
        return (self.total - self.done_before - self.untrained) * self.steps

    def line(self, job: Job, result: dict[str, Any]) -> str:
        if result["status"] != "done":
            text = f"{result['status']}: {result['why']}"
        elif not job.is_run:
            text = f"{result['seconds']:.0f} s"
        else:
            drifts = [f"{Path(name).stem} {r['drift']:.3g}" for name, r in result["results"].get("keep", {}).items()]
            drift = ", ".join(drifts) or "not measured"
            text = f"loss {task_loss(result):.4f}, drift {drift}, {result['seconds']:.0f} s"
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else 0.0
        left = mean * (self.total - self.done) / self.processes
        when = f", about {left / 60:.0f} min left" if left > 60 else ""
        return f"[{self.done}/{self.total}{when}] {job}: {text}"


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, or $COMMIT."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# --- inside a process ------------------------------------------------------------------------------------------------


def _work(comparison: Comparison, pipe: Connection, gpu: str, threads: int, counter: Any, commit: str | None) -> None:
    """Do the jobs that come over the pipe until it is closed. Each gets a result, whatever happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes: the parent ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not at once, which leaves semaphores behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        _redirect_output(comparison.folder(job) / LOG)
        result = _attempt(comparison, job, counter)
        gc.collect()  # the parts of a trainer refer to one another and to the model
        release_cache(accelerator())
        restart_peak(accelerator())
        comparison.write_result(job, result | {"commit": commit, "machine": machine_name(), "gpu": gpu or None})
        pipe.send(None)


def _attempt(comparison: Comparison, job: Job, counter: Any) -> dict[str, Any]:
    try:
        return do_job(comparison, job, counter)
    except CordaError as error:
        return {"status": "does not fit", "why": str(error)}
    except DivergedError as error:
        with counter.get_lock():
            counter.value += comparison.steps - (error.step - 1)  # the steps that will not be taken
        return {"status": "diverged", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        return {"status": "failed", "why": f"{type(error).__name__}: {lines[0] if lines else ''}"}


def _redirect_output(path: Path) -> None:
    """Everything that this process prints goes to a file from now on."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _end_with_parent() -> None:
    """End this process when its parent ends, so that no run goes on alone after a comparison was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
