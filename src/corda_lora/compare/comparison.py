"""A comparison and its directory.

OUTPUT/recipe.json                    the settings that all runs share; another recipe is refused
OUTPUT/base/                          the base model's results and its outputs, computed once
OUTPUT/starts/ENTRY/                  the cached preparation of an entry, shared by its runs
OUTPUT/starts/ENTRY, samples 64/      the same for one value of a swept option that changes the preparation
OUTPUT/runs/ENTRY/lr0.001_s0/         a run: log.txt, and result.json when it is done
OUTPUT/runs/ENTRY/lr0.001_keep_10_s0/ the same of an entry that sweeps an option
OUTPUT/comparison.json                all results together
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import CompareConfig, CordaError, DataConfig, ModelConfig
from ..config.recorded import difference, differences
from ..config.values import short
from ..data.batches import encode_all
from ..data.samples import load_samples
from ..evaluation.measures import KINDS
from ..files import check_checksums, check_writable, is_partial, read_json, write_checksums, write_json
from ..methods.registry import METHODS, default_orientation, recorded_options, without_default
from ..models.loading import load_tokenizer
from ..training.train import training_steps
from .frontier import as_options
from .schedule import Entry, Job, Results, possible_jobs, scheduled_jobs, start_of

RECIPE, RESULT = "recipe.json", "result.json"


@dataclass(frozen=True)
class Comparison:
    """A model, the recipe of what is compared on it, and the directory of the results."""

    source: ModelConfig
    recipe: CompareConfig
    output: Path

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The entries with the learning rates that they sweep."""
        entries = {}
        for name, entry in self.recipe.entries.items():
            method = METHODS[entry.method]
            rates = tuple(sorted(set(entry.learning_rates or method.learning_rates)))
            option = entry.swept_option
            swept = tuple((option, value) for value in entry.swept_values)
            shares = not option or option in method.after
            prepares = bool(method.prepares_from or (option and shares))
            entries[name] = Entry(rates, prepares, entry.all_seeds, swept, shares)
        return entries

    @property
    def learn(self) -> DataConfig:
        """The data of the task."""
        return _data(self.recipe.data)

    @property
    def keep(self) -> DataConfig | None:
        """The data of the ability to keep, if there is any."""
        return None if self.recipe.context is None else _data(self.recipe.context)

    @cached_property
    def steps(self) -> int:
        """How many steps each run takes."""
        if self.recipe.train.max_steps:
            return self.recipe.train.max_steps
        tokenizer, length = load_tokenizer(self.source), self.learn.max_length
        trained = [bool(e.targets) for e in encode_all(tokenizer, load_samples(self.learn), length, end=True)]
        return training_steps(self.recipe.train, sum(trained))

    @property
    def files(self) -> list[Path]:
        """The recipe as it is written, the model's configuration and the data: those that are files here."""
        data = [self.learn, *([self.keep] if self.keep else [])]
        data += [one for kind in KINDS for one in self.recipe.eval.data(kind)]
        named = [Path(self.source.model, "config.json"), *(Path(one.data) for one in data)]
        return list(dict.fromkeys([self.output / RECIPE, *(path for path in named if path.is_file())]))

    def folder(self, job: Job) -> Path:
        return self.output / job.folder

    def start_folder(self, job: Job) -> Path:
        """Where the preparation that a job makes or uses is cached."""
        return self.folder(start_of(self.entries[job.entry], job))

    def options(self, job: Job) -> dict[str, Any]:
        """The method's options in a job. A preparation that a sweep shares is made with the highest value."""
        swept = self.entries[job.entry].swept
        return self.recipe.entries[job.entry].options | as_options(job.swept or (swept[-1] if swept else ()))

    def keys(self) -> dict[str, dict[str, Any]]:
        """What tells the results of each entry from those of another, whatever their rates and swept values."""
        keys = {}
        for name, entry in self.recipe.entries.items():
            plan = self.entries[name]
            jobs = dict.fromkeys(start_of(plan, Job(name, swept=value)) for value in plan.swept or [()])
            starts = [recorded_options(entry.method, self.options(job)) for job in jobs]
            whole, orientations = starts[-1], [start.get("orientation", "covariance") for start in starts]
            if len(set(orientations)) > 1:  # the swept option decides about it
                whole["orientation"] = orientations
            keys[name] = {"method": entry.method, "options": {k: v for k, v in whole.items() if k not in entry.sweep}}
        return keys

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job has written, or None if it is not done. Raises CordaError if it is damaged."""
        path = self.folder(job) / RESULT
        if not path.is_file():
            return None
        result = read_json(path)
        if not isinstance(result, dict) or "status" not in result:
            raise CordaError(f"{path} is damaged: remove {path.parent}, to have it done again")
        return result

    def results(self) -> dict[Job, dict[str, Any]]:
        """The results of all jobs that are done."""
        results = {job: self.result(job) for job in possible_jobs(self.entries, self.recipe.seeds)}
        return {job: result for job, result in results.items() if result is not None}

    def write_result(self, job: Job, result: Mapping[str, Any]) -> None:
        if not job.is_run:  # runs read its tensors
            write_checksums(self.folder(job), "*.safetensors")
        write_json(self.folder(job) / RESULT, result)

    def shared(self) -> dict[str, Any]:
        """The settings that all runs share. Entries, rates and seeds are not among them: they may be added later."""
        settings = {key: value for key, value in asdict(self.recipe).items() if key not in ("methods", "seeds")}
        return json.loads(json.dumps({"model": asdict(self.source), **settings}, default=str))

    def open(self, digests: Sequence[Sequence[str]] = ()) -> None:
        """Make the directory, or check that it belongs to this comparison.

        Args:
            digests: (name, digest of the samples) of each data set.

        Raises CordaError if something else is in it, or runs of another recipe, or a file that runs read is damaged.
        """
        check_writable(self.output)
        path, shared = self.output / RECIPE, self.shared()
        others = [p for p in self.output.iterdir() if not is_partial(p)] if self.output.is_dir() else []
        if self.output.is_file() or (others and not path.is_file()):
            raise CordaError(f"the output {self.output} has something else in it already: remove it, or choose another")
        entries = self.keys()
        if path.is_file():
            before = read_json(path)
            if not isinstance(before, dict) or not {"shared", "entries"} <= before.keys():
                raise CordaError(f"{path} is damaged: remove {self.output}, or choose another output")
            differing, remedies = differences(before["shared"], shared), dict[str, list[str]]()
            for name, key in entries.items():
                was = _recorded(before["entries"].get(name, key))
                found, orientation = _differences(name, was, key, self.recipe.entries[name].sweep)
                differing += found
                if orientation:
                    remedies.setdefault(orientation, []).append(name)
            changed = [data for data, was in zip(digests, before.get("data", digests)) if list(data) != was]
            differing += [f"the samples of {name} have changed" for name, _ in changed]
            if differing:
                remedy = ""
                if len(differing) == sum(map(len, remedies.values())):  # else it is another recipe even so
                    given = [f"{', '.join(names)} the option `orientation: {o}`" for o, names in remedies.items()]
                    remedy = f"give {' and '.join(given)} to go on with it, or "
                raise CordaError(
                    f"{self.output} holds runs of another recipe ({'; '.join(differing)}): {remedy}remove it, or "
                    "choose another output"
                )
            entries = before["entries"] | entries
            for job in self.results():
                if not job.is_run:
                    check_checksums(self.folder(job), f"remove {self.folder(job)}, to have it made again")
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(path, {"shared": shared, "entries": entries, "data": digests})


def _recorded(key: Mapping[str, Any]) -> Mapping[str, Any]:
    """What tells the results of an entry, as this version writes it: earlier ones wrote whatever was given."""
    known = key["method"] in METHODS  # one of an earlier version may be gone
    return {**key, "options": without_default(key["method"], key["options"])} if known else key


def _differences(
    name: str, was: Mapping[str, Any], key: Mapping[str, Any], sweep: Mapping[str, Any]
) -> tuple[list[str], str]:
    """What tells the recorded results of an entry from those of this recipe, in words; and, where this is the
    orientation alone, the one of the record."""
    if was["method"] != key["method"]:
        return [difference(was["method"], key["method"], f"{name}.method")], ""
    old, new = dict(was["options"]), dict(key["options"])
    if "orientation" in {**old, **new} and "orientation" not in sweep:  # one of the two goes without saying
        default = {"orientation": default_orientation(key["method"])}
        old, new = default | old, default | new

    def said(options: Mapping[str, Any], option: str) -> str:
        return short(options[option]) if option in options else "not set"

    differing = [o for o in {**old, **new} if (o in old) != (o in new) or old[o] != new[o]]
    words = [f"{name}.options.{o} was {said(old, o)} there and is {said(new, o)} here" for o in differing]
    # A list says that the values of a swept option had several orientations: no option asks for that.
    alone = differing == ["orientation"] and "orientation" in new and isinstance(old["orientation"], str)
    return words, old["orientation"] if alone else ""


def _data(data: str | DataConfig) -> DataConfig:
    return DataConfig(data) if isinstance(data, str) else data


def gather(comparison: Comparison, results: Results, command: str) -> dict[str, Any]:
    """The comparison as one dictionary: settings, machine, versions, the base model's results, and every scheduled run
    with its status ("done", "diverged", "failed", "does not fit" or "not run")."""
    base = results.get(Job(), {})
    runs: list[dict[str, Any]] = []
    for job in scheduled_jobs(comparison.entries, comparison.recipe.seeds, results):
        if job.is_run:
            preparation = results.get(start_of(comparison.entries[job.entry], job), {"status": "done"})
            missing = preparation if preparation["status"] != "done" else {"status": "not run", "why": ""}
            result = results.get(job, missing)
            swept = {"swept": as_options(job.swept)} if job.swept else {}
            runs.append({"method": job.entry, "learning_rate": job.rate, "seed": job.seed, **swept, **result})
    entries, methods = comparison.keys(), {}
    for name, entry in comparison.recipe.entries.items():
        method = METHODS[entry.method]
        title = method.title if name == entry.method else name
        methods[name] = {"title": title, "source": method.source, "options": entries[name]["options"]}
    return {
        "name": comparison.output.name,
        "command": command,
        "recipe": comparison.shared() | {"methods": entries},
        "machine": ", ".join(sorted({run["machine"] for run in [base, *runs] if run.get("machine")})) or None,
        "versions": base.get("versions", {}),
        "commit": ", ".join(sorted({run["commit"] for run in runs if run.get("commit")})) or None,
        "methods": methods,
        "base": base.get("results", {}),
        "runs": runs,
    }
