"""Which jobs a comparison consists of, which of them are to do, and which can start: pure functions, without files.

`results` maps each job that has been done to the dictionary of its result.json. Every learning rate is run with the
first seed. The other seeds are run where they count: at an entry's best rate and its two neighbours, and at the two
rates between which the entry reaches the best loss of the reference method (LoRA).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .frontier import is_done, lowest_rate, reference_order, task_loss

Results = Mapping["Job", Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A run of an entry, the preparation that the entry's runs share (no rate), or the base model (no entry)."""

    entry: str = ""
    rate: float | None = None
    seed: int = 0

    @property
    def is_run(self) -> bool:
        return self.rate is not None

    @property
    def folder(self) -> Path:
        """The job's directory, relative to the comparison's output."""
        if not self.entry:
            return Path("base")
        if self.rate is None:
            return Path("starts", self.entry)
        return Path("runs", self.entry, f"lr{self.rate:g}_s{self.seed}")

    def __str__(self) -> str:
        if not self.entry:
            return "the base model"
        return f"{self.entry}, preparing" if self.rate is None else f"{self.entry}, {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Entry:
    """What the schedule needs to know of an entry.

    Attributes:
        rates: the learning rates to sweep, ascending.
        prepares: whether a preparation comes before the runs and is shared by them.
        all_seeds: run every rate with every seed.
    """

    rates: tuple[float, ...]
    prepares: bool = False
    all_seeds: bool = False


Entries = Mapping[str, Entry]


def possible_jobs(entries: Entries, seeds: int) -> list[Job]:
    """Every job that can ever be among `scheduled_jobs`, in the same order for the first seed."""
    jobs = [Job(), *(Job(name) for name, entry in entries.items() if entry.prepares)]
    return jobs + [
        Job(name, rate, seed) for seed in range(seeds) for name, entry in entries.items() for rate in entry.rates
    ]


def scheduled_jobs(entries: Entries, seeds: int, results: Results) -> list[Job]:
    """All jobs of the comparison, as far as the results so far decide them. An entry's other seeds are decided once
    all its rates have been tried with the first. Runs that were done before stay, even where they no longer count."""
    jobs = possible_jobs(entries, 1)
    reference = reference_loss(entries, results)
    for name, entry in entries.items():
        losses = swept_losses(name, entry, results)
        counting = seeded_rates(losses, reference, entry.all_seeds) if losses else set()
        others = [Job(name, rate, seed) for seed in range(1, seeds) for rate in entry.rates]
        jobs += [job for job in others if job.rate in counting or job in results]
    return jobs


def swept_losses(name: str, entry: Entry, results: Results) -> dict[float, float] | None:
    """The task loss of each rate whose run with the first seed counts. None before all rates have been tried."""
    runs = {rate: results.get(Job(name, rate)) for rate in entry.rates}
    if None in runs.values():
        return None
    return {rate: task_loss(run) for rate, run in runs.items() if run and is_done(run)}


def reference_loss(entries: Entries, results: Results) -> float | None:
    """The best task loss of the reference method with the first seed. None before it is known."""
    for name in reference_order(entries):
        losses = swept_losses(name, entries[name], results)
        if losses != {}:
            return min(losses.values()) if losses else None
    return None


def seeded_rates(losses: Mapping[float, float], reference: float | None, all_seeds: bool) -> set[float]:
    """The rates that are run with the other seeds, too.

    Args:
        losses: the task loss of each rate with the first seed, rates ascending; at least one.
        reference: the best task loss of the reference method, if it is known.
        all_seeds: all of them are.
    """
    rates = list(losses)
    if all_seeds:
        return set(rates)
    best = rates.index(lowest_rate({rate: [loss] for rate, loss in losses.items()}))
    counting = set(rates[max(0, best - 1) : best + 2])
    for pair in pairwise(rates):
        if reference is not None and min(losses[r] for r in pair) < reference <= max(losses[r] for r in pair):
            counting |= set(pair)  # the drift at the reference's loss is interpolated between these two
    return counting


def jobs_to_do(entries: Entries, seeds: int, results: Results) -> list[Job]:
    """The jobs without a result, each preparation just before the first run that needs it. An entry that could not
    prepare has no runs to do; an entry whose runs are all done need not prepare."""
    missing = [job for job in scheduled_jobs(entries, seeds, results) if job not in results]
    unprepared = unprepared_entries(entries, results)
    jobs = dict.fromkeys(job for job in missing if not job.entry)
    for run in missing:
        if run.is_run and run.entry not in unprepared:
            jobs |= dict.fromkeys(job for job in (Job(run.entry), run) if job in missing)
    return list(jobs)


def unprepared_entries(entries: Entries, results: Results) -> set[str]:
    """The entries whose preparation did not succeed: they have no runs."""
    return {name for name in entries if results.get(Job(name), {"status": "done"})["status"] != "done"}


def can_start(entries: Entries, results: Results, job: Job) -> bool:
    """Whether everything that a job needs is there. A preparation, too, waits for the base model, which it could do
    without: otherwise it would take the place of runs of earlier entries."""
    needed = [Job()] if job.entry else []
    if job.is_run and entries[job.entry].prepares:
        needed.append(Job(job.entry))
    return all(before in results for before in needed)


def next_job(startable: Collection[Job], running: Collection[str]) -> Job:
    """The job that a new process begins with: of the entry that has the fewest processes, so that the blocks of an
    entry are compiled by few of them. `running` names the entry of each process."""
    busy = list(running)
    return min(startable, key=lambda job: busy.count(job.entry))


def count_runs(entries: Entries, seeds: int, results: Results) -> int:
    """How many runs there will be in the end. An estimate while rates of an entry are not tried yet: three rates are
    then expected to be run with the other seeds."""
    unprepared = unprepared_entries(entries, results)
    prepared = {name: entry for name, entry in entries.items() if name not in unprepared}
    known = sum(job.is_run and job.entry in prepared for job in scheduled_jobs(entries, seeds, results))
    untried = [len(e.rates) for name, e in prepared.items() if swept_losses(name, e, results) is None]
    return known + (seeds - 1) * sum(min(3, rates) for rates in untried)
