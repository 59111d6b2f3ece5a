"""Which jobs a comparison consists of, which of them are to do, and which can start: pure functions, without files.

`results` maps each job that has been done to the dictionary of its result.json. Every learning rate is run with the
first seed. The other seeds are run where they count: at an entry's best rate and its two neighbours, and at the two
rates between which the entry reaches the best loss of the reference method (LoRA).

An entry that sweeps an option, too, runs each of its values at each rate. Its other seeds are run on the lower hull of
all these points: see `seeded_on_hull`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .frontier import (
    NEAR,
    Point,
    Setting,
    Swept,
    first_drift,
    is_done,
    log_drift,
    lower_hull,
    lowest_setting,
    reference_order,
    swept_text,
    task_loss,
)

Results = Mapping["Job", Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A run of an entry, the preparation that the entry's runs share (no rate), or the base model (no entry).

    `swept` is the value of the option that the entry sweeps. A preparation has one only if it serves that value alone.
    """

    entry: str = ""
    rate: float | None = None
    seed: int = 0
    swept: Swept = ()

    @property
    def is_run(self) -> bool:
        return self.rate is not None

    @property
    def folder(self) -> Path:
        """The job's directory, relative to the comparison's output."""
        if not self.entry:
            return Path("base")
        value = swept_text(self.swept)
        if self.rate is None:
            return Path("starts", f"{self.entry}, {value}" if value else self.entry)
        parts = [f"lr{self.rate:g}", value.replace(" ", "_"), f"s{self.seed}"]
        return Path("runs", self.entry, "_".join(filter(None, parts)))

    @property
    def setting(self) -> Setting:
        """The rate and the swept value of a run."""
        assert self.rate is not None
        return Setting(self.rate, self.swept)

    def __str__(self) -> str:
        if not self.entry:
            return "the base model"
        rate, seed = ("preparing", "") if self.rate is None else (f"{self.rate:g}", f"seed {self.seed}")
        return ", ".join(filter(None, [self.entry, rate, swept_text(self.swept), seed]))


@dataclass(frozen=True)
class Entry:
    """What the schedule needs to know of an entry.

    Attributes:
        rates: the learning rates to sweep, ascending.
        prepares: whether a preparation comes before the runs and is shared by them.
        all_seeds: run every rate with every seed.
        swept: an option with each of the values to sweep, ascending. Empty without a sweep.
        shares: whether one preparation serves all of these values.
    """

    rates: tuple[float, ...]
    prepares: bool = False
    all_seeds: bool = False
    swept: tuple[Swept, ...] = ()
    shares: bool = True

    @property
    def settings(self) -> list[Setting]:
        """Every rate with every value."""
        return [Setting(rate, swept) for swept in self.swept or ((),) for rate in self.rates]


Entries = Mapping[str, Entry]


def possible_jobs(entries: Entries, seeds: int) -> list[Job]:
    """Every job that can ever be among `scheduled_jobs`, in the same order for the first seed."""
    runs = [
        Job(name, rate, seed, swept)
        for seed in range(seeds)
        for name, entry in entries.items()
        for rate, swept in entry.settings
    ]
    starts = dict.fromkeys(start_of(entries[run.entry], run) for run in runs if entries[run.entry].prepares)
    return [Job(), *starts, *runs]


def start_of(entry: Entry, job: Job) -> Job:
    """The preparation that a job of an entry makes or uses."""
    return Job(job.entry, swept=() if entry.shares else job.swept)


def scheduled_jobs(entries: Entries, seeds: int, results: Results) -> list[Job]:
    """All jobs of the comparison, as far as the results so far decide them. An entry's other seeds are decided once
    all its rates have been tried with the first. Runs that were done before stay, even where they no longer count."""
    jobs = possible_jobs(entries, 1)
    reference = reference_loss(entries, results)
    for name, entry in entries.items():
        counting = seeded_settings(name, entry, results, reference)
        others = [Job(name, rate, seed, swept) for seed in range(1, seeds) for rate, swept in entry.settings]
        jobs += [job for job in others if job.setting in counting or job in results]
    return jobs


def swept_runs(name: str, entry: Entry, results: Results) -> dict[Setting, Mapping[str, Any]] | None:
    """Each setting's run with the first seed, if it counts. None before all settings have been tried."""
    jobs = [Job(name, rate, 0, swept) for rate, swept in entry.settings]
    jobs = [job for job in jobs if is_prepared(entry, results, job)]
    if any(job not in results for job in jobs):
        return None
    return {job.setting: results[job] for job in jobs if is_done(results[job])}


def reference_loss(entries: Entries, results: Results) -> float | None:
    """The best task loss of the reference method with the first seed. None before it is known."""
    for name in reference_order(entries):
        runs = swept_runs(name, entries[name], results)
        if runs != {}:
            return min(map(task_loss, runs.values())) if runs else None
    return None


def seeded_settings(name: str, entry: Entry, results: Results, reference: float | None) -> set[Setting]:
    """The settings of an entry that are run with the other seeds, too. None of them before all have been tried.

    Args:
        reference: the best task loss of the reference method, if it is known.
    """
    runs = swept_runs(name, entry, results)
    if not runs or entry.all_seeds:
        return set(runs or ())
    if entry.swept:
        # Without a drift to weigh against the loss, only the lowest loss is on the hull.
        return seeded_on_hull(
            [Point(at, task_loss(r), log_drift(first_drift(r) or 0.0), {}) for at, r in runs.items()], reference
        )
    return seeded_rates({at: task_loss(run) for at, run in runs.items()}, reference)


def seeded_on_hull(points: Sequence[Point], reference: float | None) -> set[Setting]:
    """The settings, of all that an entry swept, that are run with the other seeds, too: on the lower hull, the point of
    the lowest loss and the next, those between the reference's best loss and `NEAR` above it, and the next on each side
    of these.

    Args:
        points: of the first seed; at least one.
        reference: the best task loss of the reference method, if it is known.
    """
    hull = lower_hull(points)
    counting = hull[:2]
    if reference is not None:
        counting += [p for p in hull if reference <= p.loss <= reference + NEAR]
        counting += [p for p in hull if p.loss < reference][-1:] + [p for p in hull if p.loss > reference + NEAR][:1]
    return {point.setting for point in counting}


def seeded_rates(losses: Mapping[Setting, float], reference: float | None) -> set[Setting]:
    """The settings of an entry without a swept option that are run with the other seeds, too.

    Args:
        losses: the task loss of each rate with the first seed, rates ascending; at least one.
        reference: the best task loss of the reference method, if it is known.
    """
    rates = list(losses)
    best = rates.index(lowest_setting({rate: [loss] for rate, loss in losses.items()}))
    counting = set(rates[max(0, best - 1) : best + 2])
    for pair in pairwise(rates):
        if reference is not None and min(losses[r] for r in pair) < reference <= max(losses[r] for r in pair):
            counting |= set(pair)  # the drift at the reference's loss is interpolated between these two
    return counting


def jobs_to_do(entries: Entries, seeds: int, results: Results) -> list[Job]:
    """The jobs without a result, each preparation just before the first run that needs it. An entry that could not
    prepare has no runs to do; an entry whose runs are all done need not prepare."""
    missing = [job for job in scheduled_jobs(entries, seeds, results) if job not in results]
    jobs = dict.fromkeys(job for job in missing if not job.entry)
    for run in missing:
        if run.is_run and is_prepared(entries[run.entry], results, run):
            start = start_of(entries[run.entry], run)
            jobs |= dict.fromkeys(job for job in (start, run) if job in missing)
    return list(jobs)


def is_prepared(entry: Entry, results: Results, run: Job) -> bool:
    """Whether the preparation of a run has not failed. If it has, there is no such run."""
    return results.get(start_of(entry, run), {"status": "done"})["status"] == "done"


def can_start(entries: Entries, results: Results, job: Job) -> bool:
    """Whether everything that a job needs is there. A preparation, too, waits for the base model, which it could do
    without: otherwise it would take the place of runs of earlier entries."""
    needed = [Job()] if job.entry else []
    if job.is_run and entries[job.entry].prepares:
        needed.append(start_of(entries[job.entry], job))
    return all(before in results for before in needed)


def next_job(startable: Collection[Job], running: Collection[str]) -> Job:
    """The job that a new process begins with: of the entry that has the fewest processes, so that the blocks of an
    entry are compiled by few of them. `running` names the entry of each process."""
    busy = list(running)
    return min(startable, key=lambda job: busy.count(job.entry))


def count_runs(entries: Entries, seeds: int, results: Results) -> int:
    """How many runs there will be in the end. An estimate while settings of an entry are not tried yet: three of them
    are then expected to be run with the other seeds."""
    runs = [job for job in scheduled_jobs(entries, seeds, results) if job.is_run]
    known = sum(is_prepared(entries[run.entry], results, run) for run in runs)
    untried = [len(e.settings) for name, e in entries.items() if swept_runs(name, e, results) is None]
    return known + (seeds - 1) * sum(min(3, settings) for settings in untried)
