"""Which jobs there are, which are to do, which can start, how many runs there will be: from results alone."""

from corda_lora.compare.schedule import (
    Entry,
    Job,
    can_start,
    count_runs,
    jobs_to_do,
    next_job,
    possible_jobs,
    reference_loss,
    scheduled_jobs,
    seeded_rates,
)

RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
DONE = {"status": "done"}
UNFIT = {"status": "does not fit", "why": ""}


def sweep(entry, losses, seed=0):
    """Results of runs at RATES with these task losses; None for a run that diverged."""
    return {Job(entry, rate, seed): result(loss) for rate, loss in zip(RATES, losses)}


def result(loss):
    status = "diverged" if loss is None else "done"
    return {"status": status, "results": {"learn": {"task": {"loss": loss}}}}


def seeded(entries, results, seeds=3):
    """(entry, rate, seed) of the scheduled runs with other seeds than the first."""
    jobs = scheduled_jobs(entries, seeds, results)
    return {(job.entry, job.rate, job.seed) for job in jobs if job.is_run and job.seed}


def test_an_entry_prepares_just_before_its_runs():
    entries = {
        "lora": Entry((1e-3, 2e-3)),
        "corda": Entry((1e-2, 2e-2), prepares=True),
        "eva": Entry((3e-3, 4e-3), prepares=True),
    }
    results = {}

    def startable():
        return [job for job in jobs_to_do(entries, 1, results) if can_start(entries, results, job)]

    lora, corda, eva = ([Job(name, rate) for rate in entry.rates] for name, entry in entries.items())
    assert jobs_to_do(entries, 1, results) == [Job(), *lora, Job("corda"), *corda, Job("eva"), *eva]
    assert startable() == [Job()]  # a preparation would take the place of a run of an earlier entry
    results = {Job(): DONE, Job("eva"): DONE}
    assert startable() == [*lora, Job("corda"), *eva]
    results |= {job: result(0.9) for job in (*lora, *eva)}
    assert startable() == [Job("corda")]
    results |= {job: result(0.9) for job in corda}
    assert startable() == []  # an entry whose runs are all done need not prepare


def test_every_scheduled_job_is_a_possible_one():
    entries = {"lora": Entry(RATES), "eva": Entry(RATES, prepares=True, all_seeds=True)}
    results = sweep("lora", (0.9, 0.8, 0.7, 0.8, 0.9)) | sweep("eva", (0.9, 0.8, 0.7, 0.8, 0.9))
    assert set(scheduled_jobs(entries, 3, results)) < set(possible_jobs(entries, 3))
    assert scheduled_jobs(entries, 3, {}) == possible_jobs(entries, 1)


def test_other_seeds_are_for_the_best_rate_and_its_neighbours():
    losses = dict(zip(RATES, (0.95, 0.92, 0.85, 0.83, 0.9)))
    assert seeded_rates(losses, None) == {5e-3, 1e-2, 2e-2}
    assert seeded_rates({1e-3: 0.8, 2e-3: 0.9, 5e-3: 1.0}, None) == {1e-3, 2e-3}  # the best at the end
    assert seeded_rates({1e-3: 0.8}, None) == {1e-3}
    assert seeded_rates({1e-3: 0.8, 2e-3: 0.8, 5e-3: 1.0}, None) == {1e-3, 2e-3}  # of equal rates the lower


def test_other_seeds_are_for_the_rates_around_the_references_loss():
    losses = {1e-3: 0.84, 2e-3: 0.82, 5e-3: 0.80, 2e-2: 0.78}
    assert seeded_rates(losses, 0.83) == {1e-3, 2e-3, 5e-3, 2e-2}
    assert seeded_rates(losses, 0.84) == {1e-3, 2e-3, 5e-3, 2e-2}  # reached just so
    assert seeded_rates(losses, 0.85) == {5e-3, 2e-2}  # reached by every rate
    assert seeded_rates(losses, 0.78) == {5e-3, 2e-2}


def test_the_reference_is_lora_once_all_its_rates_were_tried():
    entries = {"pissa": Entry(RATES), "lora": Entry(RATES)}
    results = sweep("pissa", (0.84, 0.82, 0.80, None, 0.78))
    assert reference_loss(entries, results) is None
    results |= sweep("lora", (0.95, 0.92, 0.85, 0.83))
    assert reference_loss(entries, results) is None
    results |= sweep("lora", (0.95, 0.92, 0.85, 0.83, 0.9))
    assert reference_loss(entries, results) == 0.83
    # As in the report, the first method that has results is the reference where LoRA has none.
    assert reference_loss({"pissa": Entry(RATES)}, results) == 0.78
    assert reference_loss(entries, results | sweep("lora", (None,) * 5)) == 0.78


def test_other_seeds_wait_for_the_sweep_and_stay_once_done():
    entries = {"lora": Entry(RATES), "pissa": Entry(RATES)}
    results = sweep("lora", (0.95, 0.92, 0.85, 0.83))
    assert seeded(entries, results) == set()
    results |= sweep("lora", (0.95, 0.92, 0.85, 0.83, 0.9))
    assert seeded(entries, results) == {("lora", rate, seed) for rate in (5e-3, 1e-2, 2e-2) for seed in (1, 2)}

    # PiSSA is best at 2e-2 after a rate that diverged, and reaches LoRA's best loss between 1e-3 and 2e-3.
    results |= sweep("pissa", (0.84, 0.82, 0.80, None, 0.78))
    pissa = {run for run in seeded(entries, results) if run[0] == "pissa"}
    assert pissa == {("pissa", rate, seed) for rate in (1e-3, 2e-3, 5e-3, 2e-2) for seed in (1, 2)}

    # A rate is added that is the best; a run with another seed that was done before stays.
    entries["pissa"] = Entry((5e-3, 2e-2, 5e-2))
    results |= {Job("pissa", 5e-2): result(0.7), Job("pissa", 5e-3, 1): result(0.8)}
    pissa = {run for run in seeded(entries, results) if run[0] == "pissa"}
    assert pissa == {("pissa", rate, seed) for rate in (2e-2, 5e-2) for seed in (1, 2)} | {("pissa", 5e-3, 1)}

    entries["lora"] = Entry(RATES, all_seeds=True)
    assert {("lora", rate, seed) for rate in RATES for seed in (1, 2)} < seeded(entries, results)


def test_runs_are_counted_before_they_are_decided():
    entries = {"lora": Entry(RATES), "pissa": Entry(RATES)}
    assert count_runs(entries, 3, {}) == 2 * (5 + 2 * 3)  # three rates with each other seed
    results = sweep("lora", (0.95, 0.92, 0.85, 0.83, 0.9)) | sweep("pissa", (0.84, 0.82, 0.80, None, 0.78))
    assert count_runs(entries, 3, results) == 5 + 2 * 3 + 5 + 2 * 4
    assert count_runs({"lora": Entry(RATES[:2])}, 3, {}) == 2 + 2 * 2


def test_an_entry_that_could_not_prepare_has_no_runs():
    entries = {"lora": Entry(RATES), "eva": Entry(RATES, prepares=True)}
    assert count_runs(entries, 3, {}) == 22
    results = {Job(): DONE, Job("eva"): UNFIT}
    assert count_runs(entries, 3, results) == 11
    assert {job.entry for job in jobs_to_do(entries, 3, results)} == {"lora"}


def test_a_new_process_takes_the_entry_with_the_fewest():
    startable = [Job("lora", 1e-3), Job("lora", 2e-3), Job("pissa", 1e-3)]
    assert next_job(startable, []) == Job("lora", 1e-3)
    assert next_job(startable, ["lora"]) == Job("pissa", 1e-3)
    assert next_job(startable, ["lora", "pissa"]) == Job("lora", 1e-3)


SWEPT = (("keep", 3), ("keep", 10), ("keep", 30))


def swept_sweep(entry, points):
    """Results of the first seed for {(rate, value): (loss, drift)}."""
    return {
        Job(entry, rate, 0, ("keep", value)): {
            "status": "done",
            "results": {"learn": {"task": {"loss": loss}}, "keep": {"nq": {"drift": drift}}},
        }
        for (rate, value), (loss, drift) in points.items()
    }


def test_every_value_is_run_at_every_rate_after_one_preparation():
    entries = {"lora": Entry((1e-3,)), "kept": Entry((1e-2, 2e-2), prepares=True, swept=SWEPT)}
    runs = [Job("kept", rate, 0, swept) for swept in SWEPT for rate in (1e-2, 2e-2)]
    assert jobs_to_do(entries, 1, {}) == [Job(), Job("lora", 1e-3), Job("kept"), *runs]
    assert {str(run.folder) for run in runs[:3]} == {
        "runs/kept/lr0.01_keep_3_s0",
        "runs/kept/lr0.02_keep_3_s0",
        "runs/kept/lr0.01_keep_10_s0",
    }
    assert str(runs[0]) == "kept, 0.01, keep 3, seed 0"
    assert not can_start(entries, {Job(): DONE}, runs[0])
    assert can_start(entries, {Job(): DONE, Job("kept"): DONE}, runs[0])
    assert count_runs(entries, 3, {}) == 1 + 2 * 1 + 6 + 2 * 3
    assert count_runs(entries, 3, {Job("kept"): UNFIT}) == 1 + 2


def test_a_value_that_changes_the_preparation_has_its_own():
    swept = (("samples", 16), ("samples", 64))
    entries = {"kept": Entry((1e-2, 2e-2), prepares=True, swept=swept, shares=False)}
    few, many = ([Job("kept", rate, 0, value) for rate in (1e-2, 2e-2)] for value in swept)
    starts = [Job("kept", swept=value) for value in swept]
    assert jobs_to_do(entries, 1, {}) == [Job(), starts[0], *few, starts[1], *many]
    assert [str(start.folder) for start in starts] == ["starts/kept, samples 16", "starts/kept, samples 64"]
    assert str(starts[0]) == "kept, preparing, samples 16"
    results = {Job(): DONE, starts[0]: UNFIT}
    assert jobs_to_do(entries, 1, results) == [starts[1], *many], "the other value is run"
    results |= {starts[1]: DONE, **{run: result(0.9) for run in many}}
    assert count_runs(entries, 3, results) == 2 + 2, "the best of the two rates counts with other seeds"


def test_other_seeds_of_a_sweep_are_for_the_hull_near_its_best_and_the_references_loss():
    points = {
        (1e-2, 3): (0.850, 0.09),  # beaten in both by the next
        (2e-2, 3): (0.830, 0.09),  # the lowest loss
        (1e-2, 10): (0.842, 0.05),  # within 0.005 of the reference
        (2e-2, 10): (0.834, 0.07),  # below the reference, next to the lowest
        (1e-2, 30): (0.849, 0.02),  # the next beyond
        (2e-2, 30): (0.870, 0.01),  # far beyond
    }
    entries = {"lora": Entry(RATES), "kept": Entry((1e-2, 2e-2), swept=SWEPT)}
    results = swept_sweep("kept", points)
    kept = {(job.rate, job.swept[1]) for job in scheduled_jobs(entries, 2, results) if job.seed and job.entry == "kept"}
    assert kept == {(2e-2, 3), (2e-2, 10)}, "while the reference is not known"
    results |= sweep("lora", (0.95, 0.92, 0.85, 0.84, 0.9))
    jobs = [job for job in scheduled_jobs(entries, 3, results) if job.seed and job.entry == "kept"]
    assert {(job.rate, job.swept[1]) for job in jobs} == {(2e-2, 3), (2e-2, 10), (1e-2, 10), (1e-2, 30)}
    assert {job.seed for job in jobs} == {1, 2}
    partly = {job: found for job, found in results.items() if job != Job("kept", 2e-2, 0, ("keep", 30))}
    assert not [job for job in scheduled_jobs(entries, 3, partly) if job.seed and job.entry == "kept"]


def test_without_a_drift_a_sweeps_other_seeds_are_for_its_lowest_loss():
    entries = {"kept": Entry((1e-2,), swept=SWEPT)}
    results = {Job("kept", 1e-2, 0, swept): result(loss) for swept, loss in zip(SWEPT, (0.9, 0.8, 0.85))}
    assert [job.swept for job in scheduled_jobs(entries, 2, results) if job.seed] == [("keep", 10)]
