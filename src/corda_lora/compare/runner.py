"""A comparison: what is checked before it, and the session that keeps processes at its jobs, several at a time.

A job is done when its result.json is there, and is then never done again. A job that was broken off is begun anew, and
gives the same numbers, on a CPU if it gets as many threads as before (the processes share the cores).

A process does jobs of one entry, one after the other, so that imports and compiled blocks serve them all: compiling
takes as long as training a small model. After a job that failed its process ends, and the next one begins in a new
process.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CompareConfig, CordaError, MethodConfig, ModelConfig
from ..data.batches import cut_away
from ..data.labels import check_labels, with_labels
from ..data.overview import check_fit, overview
from ..data.samples import digest_of, load_samples
from ..devices import accelerator, visible_gpus
from ..evaluation.choices import check_choices
from ..evaluation.evaluate import measured_samples
from ..evaluation.measures import KINDS
from ..evaluation.tasks.registry import TASKS, named_tasks
from ..files import write_json
from ..methods.keeping import check_contexts
from ..methods.registry import METHODS, check_options
from ..models.loading import class_of, empty_model, load_tokenizer, read_settings
from ..models.targets import check_saved_modules, find_targets, require_causal
from ..preprocess.statistics import check_samples
from ..progress import console, progress_bar
from ..training.arguments import check_trainer
from ..training.train import warn_without_bfloat16
from .comparison import RESULT, Comparison, gather
from .frontier import task_loss
from .pool import Pool, Processes, Worker
from .remote import Nodes, cluster
from .schedule import Job, can_start, count_runs, jobs_to_do, next_job, scheduled_jobs
from .work import LOG


def compare(
    source: ModelConfig,
    recipe: CompareConfig,
    output: Path,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    command: str = "",
    ray: str = "",
) -> dict[str, Any]:
    """Run what is not done yet, several at a time. Returns the comparison (see `gather`), and writes comparison.json.

    Args:
        jobs: how many processes at a time, on each GPU; none if 0: then the comparison is of the runs done before.
        gpus: which GPUs to use, as in CUDA_VISIBLE_DEVICES. Default: all, or the CPU if there is none.
        command: the command that makes this comparison, for its report.
        ray: the address of a Ray cluster, or "auto" for that of this host: its nodes do the runs (see `remote`).
            Default: processes of this host do.

    Raises CordaError for an unknown method, model, GPU or cluster, data that cannot be read, or an output that holds
    another comparison, all before any long work; and if the base model cannot be measured. A run that fails is
    reported, and the others go on.
    """
    comparison = Comparison(source, recipe, output)
    check_methods(recipe)
    if ray and gpus:
        raise CordaError("--gpus are of this host, and --ray shares out the GPUs of its cluster: leave one of them out")
    with cluster(ray) if ray and jobs else nullcontext(None) as nodes_have_gpus:
        # A trainer's options are checked where the runs will be, or on a device like it.
        if nodes_have_gpus in (None, torch.accelerator.is_available()):
            check_trainer(recipe.train, accelerator())
        source = with_labels(source, comparison.learn)
        comparison = replace(comparison, source=source)
        gpus = _checked_gpus(gpus)
        comparison.open(_checked_data(comparison, load_tokenizer(source), _checked_model(comparison)))
        if jobs:
            if not (nodes_have_gpus or torch.accelerator.is_available()):
                warn_without_bfloat16(recipe.train, torch.device("cpu"))
            _run_all(comparison, jobs, gpus, ray)
    results = comparison.results()
    if results.get(Job(), {"status": "missing"})["status"] != "done":
        raise CordaError(f"{output} has no results of the base model yet: there is nothing to report")
    gathered = gather(comparison, results, command)
    write_json(output / "comparison.json", gathered)
    return gathered


def check_methods(recipe: CompareConfig) -> None:
    """Raises CordaError if an entry's method, or an option of it, does not exist, or lacks a context, or its contexts
    have prices that do not go together."""
    for name, entry in recipe.entries.items():
        if entry.method not in METHODS:
            raise CordaError(f"there is no method {entry.method!r}: there are {', '.join(METHODS)}")
        for value in entry.swept_values or [None]:
            check_options(entry.method, entry.options | ({entry.swept_option: value} if entry.sweep else {}))
        try:
            check_contexts(entry, recipe.context_samples)
        except CordaError as error:
            raise CordaError(f"{name}: {error}") from error
        if entry.options.get("contexts"):
            continue
        if (METHODS[entry.method].prepares_from == "keep" or _prices_it(entry)) and recipe.context is None:
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
    targets = find_targets(model, comparison.recipe.target_modules)
    check_saved_modules(model, targets, comparison.recipe.modules_to_save)
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
        if use == "context":
            answered, recipe = sum(1 for e in encoded if e.targets), comparison.recipe
            cut = cut_away(shown, encoded, data.max_length)
            for entry in filter(_prices_it, recipe.entries.values()):
                drawn = entry.options.get("samples") or recipe.context_samples
                check_samples(min(answered, drawn), cut if answered < drawn else "")
    for name, asked in benchmarks:
        digests.append([f"task {name}", hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()])
    return digests


def _prices_it(entry: MethodConfig) -> bool:
    """Whether an entry pays for what it changes on the comparison's context, and not on samples of its own."""
    prices = entry.swept_values if entry.swept_option == "keep" else [entry.options.get("keep")]
    return any(prices) and not any(entry.options.get(own) for own in ("context", "contexts"))


# --- the processes ---------------------------------------------------------------------------------------------------


def _run_all(comparison: Comparison, jobs: int, gpus: Sequence[str], ray: str) -> None:
    """Do all jobs that have no result, and finish those that lack a part of it."""
    for job, result in comparison.results().items():
        if result["status"] in ("failed", "does not fit"):
            (comparison.folder(job) / RESULT).unlink()  # tried again
    _finish(comparison)
    commit = _commit()  # now, before anybody edits the checkout
    pool: Pool = Nodes(comparison, jobs, commit) if ray else Processes(comparison, [*gpus] * jobs, commit)
    session = _Session(comparison, pool)
    with progress_bar("comparing", session.progress.session_steps()) as advance:
        session.run(advance)
    for name, count in _unfinished(comparison).items():
        console.print(f"{name}: {count} results lack a part (their {LOG} says why): the same command asks for it again")


def _unfinished(comparison: Comparison) -> Counter[str]:
    """How many results each task lacks something of."""
    return Counter(name for result in comparison.results().values() for name in result.get("unfinished", {}))


def _finish(comparison: Comparison) -> None:
    """Ask for what results of an earlier call lack, as a task's judge was down."""
    for name in _unfinished(comparison):
        tokenizer, config = load_tokenizer(comparison.source), comparison.recipe.eval
        for job, result in comparison.results().items():
            if unfinished := result.get("unfinished", {}).pop(name, None):
                scored = TASKS[name].finish(unfinished, tokenizer, config)
                if scored is None or all(map(math.isnan, scored.values)):
                    break  # nor will it now of the others
                result["results"]["tasks"][name] = TASKS[name].result(scored)
                if scored.unfinished:
                    result["unfinished"][name] = scored.unfinished
                write_json(comparison.folder(job) / RESULT, result)


class _Session:
    """One call of `compare`: the results so far, and the processes that do the rest. Keeps as many processes as there
    is room for until no job is left to do."""

    def __init__(self, comparison: Comparison, pool: Pool):
        self.comparison, self.pool = comparison, pool
        self.entries, self.seeds = comparison.entries, comparison.recipe.seeds
        self.results = comparison.results()
        self.workers: list[Worker] = []
        runs_done = sum(
            job.is_run and job in self.results for job in scheduled_jobs(self.entries, self.seeds, self.results)
        )
        self.progress = _Progress(self.count_runs(), runs_done, comparison.steps, pool.room())

    def run(self, advance: Callable[..., None]) -> None:
        """Do all jobs. `advance` moves the progress bar."""
        try:
            while True:
                while (startable := self.startable()) and self.pool.room():
                    self.start(next_job(startable, [worker.job.entry for worker in self.workers]))
                if not self.workers and not startable:
                    return
                ready = self.pool.wait(self.workers, timeout=0.5)
                advance(self.pool.steps())
                for worker in ready:
                    line = self.finish(worker)
                    advance(0, total=self.progress.session_steps())
                    console.print(line, highlight=False)
                    if worker in self.workers:  # otherwise it has died
                        self.go_on(worker)
        finally:
            self.pool.close(self.workers)

    def startable(self) -> list[Job]:
        """The jobs that are to do, can start, and are not being done."""
        busy = [worker.job for worker in self.workers]
        jobs = jobs_to_do(self.entries, self.seeds, self.results)
        return [job for job in jobs if job not in busy and can_start(self.entries, self.results, job)]

    def count_runs(self) -> int:
        return count_runs(self.entries, self.seeds, self.results)

    def start(self, job: Job) -> None:
        """Start a process with a job."""
        worker = self.pool.start()
        self.workers.append(worker)
        self.begin(worker, job)

    def begin(self, worker: Worker, job: Job) -> None:
        folder = self.comparison.folder(job)
        shutil.rmtree(folder, ignore_errors=True)  # a run that was broken off
        folder.mkdir(parents=True, exist_ok=True)
        worker.begin(job)

    def finish(self, worker: Worker) -> str:
        """Take the result of the job that a process has done, or has died of. Returns a line that tells it.

        Raises CordaError if the base model could not be measured.
        """
        job = worker.job
        result = worker.take()
        if result is None:
            self.end(worker)
            result = self.comparison.result(job)  # it may have died after that was written
        if result is None and worker.again:
            return f"{job}: {worker.death}; it is begun again"
        if result is None:
            result = {"status": "failed", "why": worker.death}
            self.comparison.write_result(job, result)
        self.results[job] = result
        if not job.entry and result["status"] != "done":
            log = self.comparison.folder(job) / LOG
            raise CordaError(f"{job}: {result['why']} (see {log})")
        self.progress.add(job, result, time.perf_counter() - worker.since, self.count_runs())
        return self.progress.line(job, result)

    def go_on(self, worker: Worker) -> None:
        """Give a process another job of its entry, or end it."""
        following = [job for job in self.startable() if job.entry == worker.job.entry]
        if following and self.results[worker.job]["status"] in ("done", "diverged"):
            self.begin(worker, following[0])
        else:
            self.end(worker)

    def end(self, worker: Worker) -> None:
        worker.end()
        self.workers.remove(worker)


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
