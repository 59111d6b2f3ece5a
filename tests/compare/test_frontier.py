"""The frontier's arithmetic, against cases worked out by hand."""

import math

import pytest

from corda_lora.compare.frontier import (
    Point,
    Setting,
    abilities,
    best_setting,
    crossing,
    drift_at,
    learning_curve,
    lower_hull,
    mean_interval,
    milestones,
    points,
    ratio_at,
    ratios,
    reach,
    summary,
    t_quantile,
    training_seconds,
)

NQ = ("keep", "nq")


def run(method, rate, seed, loss, drift, status="done", curve=None, prepare=2.0):
    """A run that measured one ability; its learning curve falls from 2.0 on a line, unless one is given."""
    if status != "done":
        return {"method": method, "learning_rate": rate, "seed": seed, "status": status, "why": "it was so"}
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "status": status,
        "why": "",
        "results": {"learn": {"math": {"loss": loss}}, "keep": {"nq": {"loss": 3.0, "drift": drift}}},
        "curve": curve or [[50, 5.0, (2.0 + loss) / 2], [100, 10.0, loss]],
        "steps": 100,
        "seconds": 10.0,
        "prepare_seconds": prepare,
        "peak_bytes": None,
        "parameters": {"adapter": 100, "trainable": 50},
    }


def comparison(*runs):
    base = {"learn": {"math": {"loss": 2.0}}, "keep": {"nq": {"loss": 3.0}}}
    methods = {method: {"title": method.upper(), "source": ""} for method in dict.fromkeys(r["method"] for r in runs)}
    return {"methods": methods, "base": base, "runs": list(runs)}


def point(loss, drift, rate=1.0):
    return Point(Setting(rate), loss, math.log(drift), {0: (loss, math.log(drift))})


def test_a_point_is_the_mean_of_its_seeds_and_of_their_log_drift():
    compared = comparison(run("a", 2e-3, 0, 0.9, 0.01), run("a", 2e-3, 1, 1.1, 0.04), run("a", 1e-3, 0, 1.2, 0.005))
    low, high = points(compared, "a", NQ)
    assert (low.setting.rate, low.loss) == (1e-3, 1.2)
    assert math.exp(low.log_drift) == pytest.approx(0.005)
    assert (high.setting.rate, high.loss) == (2e-3, pytest.approx(1.0))
    assert math.exp(high.log_drift) == pytest.approx(0.02)  # √(0.01·0.04)
    assert abilities(compared) == [NQ]


@pytest.mark.parametrize(
    "lost", [{"status": "diverged"}, {"status": "failed"}, {"status": "not run"}, {"loss": math.nan}]
)
def test_a_run_that_is_not_done_is_never_averaged_but_counted(lost):
    lost = run("a", 1e-3, 1, **{"loss": 9.0, "drift": 9.0, **lost})
    compared = comparison(run("a", 1e-3, 0, 1.0, 0.1), lost)
    (only,) = points(compared, "a", NQ)
    assert list(only.seeds) == [0]
    assert best_setting(compared, "a").loss == (1.0, None, None, 1)
    (row,) = summary(compared)
    assert (row["runs"], row["done"]) == (2, 1)
    assert row["not_done"] == {"diverged" if lost["status"] == "done" else lost["status"]: 1}


def test_the_hull_keeps_what_nothing_beats_and_every_point_on_the_way():
    between, last = point(1.0, 0.9), point(0.8, 2.0)
    bent = [point(0.9, 1.0), point(1.1, 0.8), point(1.2, 0.1)]  # a convex hull would skip the one at 1.1
    assert lower_hull([bent[2], between, last, bent[0], bent[1]]) == [last, bent[0], between, bent[1], bent[2]]
    worse = point(1.15, 0.85)
    assert lower_hull([*bent, worse]) == bent
    assert lower_hull([]) == []


def test_drift_between_two_points_lies_on_a_line_in_its_logarithm_and_nowhere_beyond():
    hull = lower_hull([point(1.0, 0.1), point(1.4, 0.001)])
    assert drift_at(hull, 1.2).value == pytest.approx(0.01)
    assert drift_at(hull, 1.1).value == pytest.approx(10**-1.5)
    assert drift_at(hull, 1.0).value == pytest.approx(0.1)
    assert drift_at(hull, 1.4).value == pytest.approx(0.001)
    assert drift_at(hull, 0.999) is None
    assert drift_at(hull, 1.401) is None
    assert drift_at([], 1.0) is None
    assert drift_at(hull[:1], 1.0).value == pytest.approx(0.1)


def test_intervals_are_those_of_student():
    assert mean_interval([3.0]) == (3.0, None, None, 1)
    mean, low, high, n = mean_interval([1.0, 2.0, 3.0])  # s = 1
    assert (mean, n) == (2.0, 3)
    assert high - mean == pytest.approx(4.303 / math.sqrt(3)) == mean - low
    assert [t_quantile(n) for n in (1, 10, 12, 30)] == pytest.approx([12.706, 2.228, 2.179, 2.042], abs=4e-3)


def test_the_interval_at_a_loss_is_over_the_seeds_around_it():
    """Seeds off the line by ±log 1.1 at both rates; one of them also moved along the line, which is no spread."""
    slope = math.log(0.1 / 0.001) / -0.4

    def seed(s, loss, drift, factor, along=0.0):
        return run("a", loss, s, loss + along, drift * factor * math.exp(slope * along))

    runs = [seed(0, 1.0, 0.1, 1.1, 0.01), seed(0, 1.4, 0.001, 1.1), seed(1, 1.0, 0.1, 1 / 1.1, -0.01)]
    runs += [seed(1, 1.4, 0.001, 1 / 1.1), run("a", 0.9, 0, 0.9, 0.3)]
    hull = lower_hull(points(comparison(*runs), "a", NQ))
    half = 12.706 * math.log(1.1)  # s = √2·log 1.1, n = 2
    for loss, drift in ((1.2, 0.01), (1.0, 0.1), (1.4, 0.001)):
        value, low, high, n = drift_at(hull, loss)
        assert value == pytest.approx(drift)
        if loss > 1.0:
            assert math.log(high / value) == pytest.approx(half) == math.log(value / low)
        assert n == 2
    assert drift_at(hull, 0.95)[1:] == (None, None, 1)  # only seed 0 was run on both sides


def test_ratios_at_equal_loss_over_the_range_of_both():
    ours = lower_hull([point(0.8, 0.1), point(1.2, 0.001)])
    theirs = lower_hull([point(1.0, 1.0), point(1.6, 0.1)])
    found = ratios(ours, theirs, factor=99.9)
    assert (found.loss[0], found.loss[-1], len(found.loss)) == (1.0, 1.2, 101)
    assert found.ratio[0].value == pytest.approx(100)  # 1.0 / 0.01
    assert found.ratio[-1].value == pytest.approx(10 ** (-1 / 3) / 0.001)
    assert found.share == 1.0
    middle = found.ratio[50].value
    assert ratios(ours, theirs, factor=middle).share == pytest.approx(51 / 101)
    assert ratios(theirs, ours).share == 0.0
    assert ratios(ours, [point(1.3, 0.1)]) is None
    assert ratios([], theirs) is None


def test_the_interval_of_a_ratio_pairs_seeds():
    """A seed that moves both methods alike does not blur their ratio."""
    runs = [run(m, 1.0, s, 1.0, d * f) for m, d in (("a", 0.01), ("b", 1.0)) for s, f in ((0, 2.0), (1, 0.5), (2, 1.0))]
    a, b = (lower_hull(points(comparison(*runs), method, NQ)) for method in "ab")
    value, low, high, n = ratio_at(a, b, 1.0)
    assert (value, low, high, n) == (pytest.approx(100), pytest.approx(100), pytest.approx(100), 3)
    assert drift_at(a, 1.0).high > 0.04
    assert ratio_at(a, b, 1.1) is None


def test_a_best_rate_at_the_end_of_its_sweep_says_so():
    falling = [run("a", rate, 0, loss, 0.1) for rate, loss in ((1e-3, 1.2), (2e-3, 1.1), (5e-3, 1.0))]
    best = best_setting(comparison(*falling), "a")
    assert (best.setting.rate, best.loss.value) == (5e-3, 1.0)
    assert best.note == "at the high end of its sweep, so other rates may do better"
    beyond = run("a", 1e-2, 0, 0, 0, status="diverged")
    assert best_setting(comparison(*falling, beyond), "a").note == ""  # tried, and worse
    assert "high end" in best_setting(comparison(*falling, {**beyond, "status": "failed"}), "a").note  # not tried
    assert "low end" in best_setting(comparison(*falling[::2], run("a", 1e-4, 0, 0.9, 1.0)), "a").note
    assert "only rate" in best_setting(comparison(falling[0]), "a").note
    again = {**beyond, "learning_rate": 5e-3, "seed": 1}
    assert "1 of 2 runs at it diverged" in best_setting(comparison(*falling, again), "a").note
    assert best_setting(comparison(beyond), "a") is None


def test_the_best_rate_is_one_of_those_with_the_most_seeds():
    """Seed 0 is a lucky one: 5e-3 was worse with it, but is below the mean of the three at 2e-3."""
    runs = [run("a", 2e-3, seed, loss, 0.1) for seed, loss in enumerate((1.0, 1.1, 1.2))]
    assert best_setting(comparison(*runs, run("a", 5e-3, 0, 1.05, 0.1)), "a").setting.rate == 2e-3


def test_the_best_rate_is_that_of_the_mean_not_of_the_luckiest_seed():
    lucky = [run("a", 1e-3, 0, 0.9, 0.1), run("a", 1e-3, 1, 1.3, 0.1)]
    steady = [run("a", 2e-3, 0, 1.0, 0.1), run("a", 2e-3, 1, 1.0, 0.1)]
    assert best_setting(comparison(*lucky, *steady), "a").setting.rate == 2e-3


def test_steps_and_seconds_to_a_loss():
    compared = comparison(run("a", 1e-3, 0, 1.0, 0.1))
    curve = learning_curve(compared, compared["runs"][0])
    assert curve == [(0, 2.0, 2.0), (50, 7.0, 1.5), (100, 12.0, 1.0)]  # from the base model; 2 s of preparing
    assert crossing(curve, 1.75) == (25, 4.5, 1.75)
    assert crossing(curve, 1.0) == (100, 12.0, 1.0)
    assert crossing(curve, 0.99) is None
    assert crossing([*curve, (150, 17.0, 1.6), (200, 22.0, 1.0)], 1.5) == (50, 7.0, 1.5)  # the first time
    found = reach(compared, "a", Setting(1e-3), 1.25)
    assert found == ((75, None, None, 1), (9.5, None, None, 1), 1, 1)
    assert reach(compared, "a", Setting(1e-3), 0.5) == (None, None, 0, 1)


def test_steps_over_seeds_and_those_that_did_not_get_there():
    compared = comparison(*(run("a", 1e-3, s, loss, 0.1) for s, loss in enumerate((0.9, 1.0, 1.1))))
    steps, _, reached, seeds = reach(compared, "a", Setting(1e-3), 1.2)
    assert (reached, seeds, steps.seeds) == (3, 3, 3)
    assert steps.value == pytest.approx(80)  # the mean curve falls by 1 in 100 steps
    assert steps.low < 80 / 1.1 < 80 / 0.9 < steps.high
    steps, seconds, reached, seeds = reach(compared, "a", Setting(1e-3), 1.0)
    assert (reached, seeds) == (2, 3)
    assert steps == (pytest.approx(100), None, None, 2)
    assert seconds.value == pytest.approx(12)
    assert reach(compared, "a", Setting(1e-3), 0.95) == (None, None, 1, 3)


def test_compiling_is_not_counted_as_training():
    """Whether a run's process compiled the blocks or had them from the run before, it takes the same seconds."""
    first = run("a", 1e-3, 0, 1.0, 0.1, curve=[[0, 0.0, 2.0], [20, 62.0, 1.8], [60, 66.0, 1.4], [100, 70.0, 1.0]])
    later = run("a", 1e-3, 1, 1.0, 0.1, curve=[[0, 0.0, 2.0], [20, 2.0, 1.8], [60, 6.0, 1.4], [100, 10.0, 1.0]])
    assert training_seconds(first) == training_seconds(later) == 10
    compared = comparison(first, later)
    assert learning_curve(compared, first) == learning_curve(compared, later)
    assert summary(compared)[0]["seconds"] == 10
    assert training_seconds(run("a", 1e-3, 0, 1.0, 0.1, curve=[[100, 8.0, 1.0]])) == 10  # not enough to tell
    assert training_seconds(run("a", 1e-3, 0, 0, 0, status="failed")) is None


def test_losses_are_compared_seed_by_seed():
    """All methods see a seed's samples in the same order, so that seeds move their losses alike."""
    lora = [run("lora", 1, seed, loss, 0.1) for seed, loss in enumerate((1.0, 1.2, 1.4))]
    ours = [run("ours", rate, seed, loss, 0.1) for rate in (1, 2) for seed, loss in enumerate((0.9, 1.11, 1.29))]
    rows = {row["method"]: row for row in summary(comparison(*lora, *ours))}
    assert rows["lora"]["beside"] is None
    value, low, high, seeds = rows["ours"]["beside"]
    assert (value, seeds) == (pytest.approx(-0.1), 3)
    assert (low, high) == (pytest.approx(-0.1 - 4.303 * 0.01 / 3**0.5), pytest.approx(-0.1 + 4.303 * 0.01 / 3**0.5))
    assert rows["ours"]["loss"].high > rows["lora"]["loss"].low
    (_, one) = summary(comparison(*lora, ours[0]))
    assert one["beside"] == (pytest.approx(-0.1), None, None, 1)  # less LoRA's with that seed
    (_, none) = summary(comparison(*lora[1:], ours[0]))
    assert none["beside"] == (pytest.approx(-0.4), None, None, 0)


def test_the_summary_compares_at_loras_loss():
    fast = [[25, 2.5, 1.2], [50, 5.0, 1.0], [100, 10.0, 0.8]]
    compared = comparison(
        *(run("ours", rate, 0, loss, drift, curve=fast) for rate, loss, drift in ((1, 1.2, 0.001), (2, 0.8, 0.1))),
        *(run("lora", rate, 0, loss, drift) for rate, loss, drift in ((1, 1.4, 0.5), (2, 1.0, 2.0), (3, 1.1, 3.0))),
        *(run("weak", rate, 0, loss, 0.1) for rate, loss in ((1, 1.6), (2, 1.5))),
        run("none", 1, 0, 0, 0, status="does not fit"),
    )
    rows = {row["method"]: row for row in summary(compared)}
    assert list(rows) == ["ours", "lora", "weak", "none"]
    assert {row["equal_loss"] for row in rows.values()} == {1.0}
    assert rows["ours"]["equal"][NQ].value == pytest.approx(0.01)
    assert rows["lora"]["equal"][NQ].value == pytest.approx(2.0)
    assert rows["weak"]["equal"][NQ] is None
    assert rows["ours"]["drift"][NQ].value == pytest.approx(0.1)
    assert rows["ours"]["reach"].steps.value == 50
    assert rows["lora"]["reach"].steps.value == 100
    assert rows["weak"]["reach"].steps is None
    assert rows["none"]["best"] is rows["none"]["loss"] is rows["none"]["reach"] is rows["none"]["trainable"] is None
    assert rows["none"]["not_done"] == {"does not fit": 1}
    assert (rows["ours"]["trainable"], rows["ours"]["seconds"], rows["ours"]["peak_bytes"]) == (50, 10, None)


def test_scores_are_taken_at_the_best_setting():
    runs = [run("a", rate, 0, loss, 0.1) for rate, loss in ((1, 1.2), (2, 1.0))]
    for one, share in zip(runs, (0.9, 0.4)):
        one["results"]["learn"]["math"]["exact_match"] = share
        one["results"]["choices"] = {"arc": {"accuracy": share / 2}}
    (row,) = summary(comparison(*runs))
    scores = {key: e.value for key, e in row["scores"].items()}
    assert scores == {("learn", "math", "exact_match"): 0.4, ("choices", "arc", "accuracy"): 0.2}


def test_milestones_are_where_the_reference_is_after_quarters_of_its_steps():
    def run(method, rate, curve):
        final = curve[-1][2]
        return {
            "method": method,
            "learning_rate": rate,
            "seed": 0,
            "status": "done",
            "results": {"learn": {"t": {"loss": final}}},
            "curve": curve,
        }

    curve = [[0, 0.0, 2.0], [50, 5.0, 1.0], [100, 10.0, 0.8]]
    comparison = {
        "methods": {"pissa": {"title": "PiSSA"}, "lora": {"title": "LoRA"}},
        "base": {"learn": {"t": {"loss": 2.0}}},
        "runs": [run("lora", 1e-3, curve), run("lora", 1e-4, [[0, 0, 2.0], [100, 9, 1.5]]), run("pissa", 1e-3, curve)],
    }
    assert milestones(comparison) == pytest.approx([1.5, 1.0, 0.9, 0.8])
    assert milestones(comparison | {"runs": []}) == []
