"""What one process does for one job of a comparison."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..config import CordaError
from ..data.batches import encode_all
from ..data.samples import load_samples
from ..devices import accelerator, peak_bytes
from ..evaluation.answers import TUNED
from ..evaluation.base_outputs import BaseOutputs
from ..evaluation.evaluate import BothSides, evaluate, loss_and_drift
from ..methods.registry import METHODS, Prepared, Setup, count_parameters
from ..models.loading import load_model, load_tokenizer
from ..models.residual import check_whole
from ..models.targets import find_targets, is_classifier, new_modules, task_type, trains_head
from ..training.keeping import keepers_of
from ..training.train import train
from ..version import __version__
from .comparison import Comparison
from .schedule import Job, start_of

Advance = Callable[[int], object]  # is told of steps that a run has taken

PACKAGES = ("torch", "transformers", "peft", "trl")


def do_job(comparison: Comparison, job: Job, advance: Advance) -> dict[str, Any]:
    """Measure the base model, prepare an entry, or do a run. Returns the job's result.

    Raises CordaError if a method does not fit the model.
    """
    began = time.perf_counter()
    torch.manual_seed(job.seed)  # of a classifier's new head
    model, tokenizer = load_model(comparison.source).to(accelerator()), load_tokenizer(comparison.source)
    check_whole(model)
    if not job.entry:
        return _measure_base(comparison, job, model, tokenizer, began)
    entry = comparison.recipe.entries[job.entry]
    base = BaseOutputs(comparison.folder(Job()), model) if job.is_run else None
    setup = _setup(comparison, job, model, tokenizer)
    torch.manual_seed(job.seed)
    began = time.perf_counter()
    prepared = METHODS[entry.method].prepare(model, setup, **comparison.options(job))
    seconds = time.perf_counter() - began
    if is_classifier(model) and not trains_head(prepared.model):
        raise CordaError("it trains adapters alone, and a classifier's head has to be trained, too")
    if base is None:
        return {"status": "done", "seconds": seconds}
    if shared := comparison.result(start_of(comparison.entries[job.entry], job)):
        seconds = shared["seconds"]
    return _run(comparison, setup, prepared, seconds, base, advance)


def _measure_base(comparison: Comparison, job: Job, model: nn.Module, tokenizer: Any, began: float) -> dict[str, Any]:
    record: dict[str, torch.Tensor] = {}
    scores: BothSides = {}
    results = evaluate(model, tokenizer, comparison.recipe.eval, progress=False, record=record, scores=scores)
    BaseOutputs.save(comparison.folder(job), record)
    return {
        "status": "done",
        "results": results_of(results, "base"),
        **unfinished_of(scores),
        "seconds": time.perf_counter() - began,
        "versions": {"corda-lora": __version__, "python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def _setup(comparison: Comparison, job: Job, model: nn.Module, tokenizer: Any) -> Setup:
    recipe = comparison.recipe
    rate = job.rate or 1.0  # a preparation alone trains nothing
    return Setup(
        tokenizer=tokenizer,
        learn=comparison.learn,
        keep=comparison.keep,
        samples=recipe.context_samples,
        targets=find_targets(model, recipe.target_modules),
        r=recipe.r,
        lora_alpha=recipe.lora_alpha or recipe.r,
        train=replace(recipe.train, learning_rate=rate, seed=job.seed, checkpoints=0),
        steps=comparison.steps,
        folder=comparison.start_folder(job),
        task_type=task_type(model),
        heads=new_modules(model),
        modules_to_save=recipe.modules_to_save or (),
    )


def _run(
    comparison: Comparison,
    setup: Setup,
    prepared: Prepared,
    prepared_in: float,
    base: BaseOutputs,
    advance: Advance,
) -> dict[str, Any]:
    """Train a prepared model and measure it."""
    curve = _Curve(comparison, setup.tokenizer, advance)
    training = train_prepared(prepared, setup, [curve])
    scores: BothSides = {}
    config = comparison.recipe.eval
    results = evaluate(prepared.model, setup.tokenizer, config, progress=False, base=base, scores=scores)
    result = {
        "status": "done",
        "why": "",
        "results": results_of(results, "tuned"),
        **unfinished_of(scores),
        "curve": curve.points,
        "loss": training["loss"],
        "steps": training["steps"],
        "seconds": training["seconds"] - curve.seconds,
        "prepare_seconds": prepared_in,
        "peak_bytes": peak_bytes(accelerator()),
        "parameters": count_parameters(prepared.model),
    }
    if training["penalties"]:
        result["penalties"] = training["penalties"]
    keepers = keepers_of(prepared.callbacks)
    if prices := {keeper.name: keeper.keep for keeper in keepers if keeper.name}:
        result["prices"] = prices  # that they were steered to
    if keepers:
        result["predicted_drift"] = sum(float(keeper.predicted().detach()) for keeper in keepers)
    first, last = curve.points[0][-1], curve.points[-1][-1]
    # A classifier that is surer of fewer wrong labels than before has not diverged.
    if not (last <= first or (is_classifier(prepared.model) and math.isfinite(last))):  # this holds for NaN, too
        why = f"the task's held-out loss began at {first:.3g} and ended at {last:.3g}"
        result |= {"status": "diverged", "why": why}
    return result


def train_prepared(prepared: Prepared, setup: Setup, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train a prepared model on the task. Returns what `train` returns."""
    return train(
        prepared.model,
        setup.tokenizer,
        load_samples(setup.learn),
        replace(setup.train, compile=setup.train.compile and prepared.compiles),
        setup.learn.max_length,
        progress=False,
        optimizer=prepared.optimizer,
        callbacks=[*prepared.callbacks, *callbacks],
        penalties=prepared.penalties,
        rehearsals=prepared.rehearsals,
    )


class _Curve(TrainerCallback):
    """Measures the task's held-out loss at a few steps of a run.

    Attributes:
        points: [step, seconds of training, loss] of each measurement.
        seconds: the time that the measurements took.
    """

    def __init__(self, comparison: Comparison, tokenizer: Any, advance: Advance):
        recipe = comparison.recipe
        data = recipe.eval.data("learn")[0]
        samples = load_samples(data)[: recipe.curve_samples]
        self.encoded = encode_all(tokenizer, samples, data.max_length, end=True)
        self.steps = {round(i * comparison.steps / recipe.curve_points) for i in range(recipe.curve_points + 1)}
        self.tokenizer, self.batch_tokens, self.advance = tokenizer, recipe.eval.batch_tokens, advance
        self.points: list[list[float]] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        self.measure(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.advance(1)
        if state.global_step in self.steps:
            self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        now = time.perf_counter()
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiled blocks are for training
            numbers = loss_and_drift(model, self.tokenizer, self.encoded, self.batch_tokens, compared=TUNED)
        model.train()
        self.points.append([step, now - self.began - self.seconds, numbers["tuned"]["loss"]])
        self.seconds += time.perf_counter() - now


def results_of(results: dict[str, Any], side: str) -> dict[str, Any]:
    """The part of `evaluate`'s results about one side, "base" or "tuned". Data is called by the name of its file
    where that name is unique."""
    by_kind = {}
    for kind, datas in results.items():
        names = [Path(name).stem if Path(name).suffix else name for name in datas]
        names = names if len(set(names)) == len(names) else list(datas)
        by_kind[kind] = {name: sides[side] for name, sides in zip(names, datas.values())}
    return by_kind


def unfinished_of(scores: BothSides) -> dict[str, Any]:
    """{"unfinished": {task: what `Task.finish` takes}} of the tasks that lack something, as their judge was down; {} if
    none does."""
    tasks = {name: scored.unfinished for (kind, name), by_side in scores.items() if kind == "tasks"
             for scored in by_side.values() if scored.unfinished}  # fmt: skip
    return {"unfinished": tasks} if tasks else {}
