"""What was gained and lost: intervals against SciPy's, verdicts, and the page, through the command line."""

import json
import math
import re

import numpy as np
import pytest
import tiny
import torch

from corda_lora import cli
from corda_lora.config import EvalConfig
from corda_lora.evaluation.before_after import Change, changes
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.evaluation.measures import Sampled
from corda_lora.evaluation.tasks import registry
from corda_lora.evaluation.tasks.registry import Scores, Task
from corda_lora.report.before_after import gained_and_lost

RNG = np.random.default_rng(1)
BEFORE = (RNG.random(200) < 0.5).astype(float)
AFTER = np.where(RNG.random(200) < 0.2, 1.0, BEFORE)  # every fifth is right now


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    def correlation(values, labels):
        return float(np.corrcoef(values, labels)[0, 1])

    found = {
        "toy": Task("toy", "exact_match", lambda *_: None, ""),
        "pair": Task("pair", "pearson", None, "", correlation),
    }
    monkeypatch.setattr(registry, "TASKS", found)
    monkeypatch.setattr("corda_lora.evaluation.before_after.TASKS", found)
    return found


def of_task(before, after, name="toy", labels=()):
    sides = {
        side: Scores(list(values), [{}] * len(values), list(labels))
        for side, values in (("base", before), ("tuned", after))
    }
    return {("tasks", name): sides}


def change(low, high, measure="exact_match", data="toy", value=None):
    middle = (low + high) / 2 if value is None else value
    return Change("tasks", data, measure, 100, 0.5, 0.5 + middle, low, high)


def test_the_interval_is_a_paired_bootstrap():
    scipy = pytest.importorskip("scipy.stats")
    (found,) = changes(of_task(BEFORE, AFTER))
    theirs = scipy.bootstrap(
        (BEFORE, AFTER),
        lambda before, after, axis: after.mean(axis) - before.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found.change == pytest.approx(AFTER.mean() - BEFORE.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.006)
    assert found.outcome == "gained"
    (unpaired,) = changes(of_task(BEFORE, RNG.permutation(AFTER)))
    assert unpaired.high - unpaired.low > 1.5 * (found.high - found.low)
    assert changes(of_task(BEFORE, AFTER)) == [found]  # seeded


def test_answers_without_a_rating_are_left_out():
    """Of both models: the others stay pairs."""
    gone = np.where(np.arange(200) < 50, math.nan, AFTER)
    assert changes(of_task(BEFORE, gone)) == changes(of_task(BEFORE[50:], AFTER[50:]))
    assert not changes(of_task(BEFORE, np.full(200, math.nan)))


def test_a_metric_that_is_no_mean_is_computed_anew():
    labels = RNG.standard_normal(80)
    near, far = labels + 0.2 * RNG.standard_normal(80), labels + 3 * RNG.standard_normal(80)
    (found,) = changes(of_task(near, far, "pair", labels))
    assert found.before == pytest.approx(np.corrcoef(near, labels)[0, 1])
    assert found.low < found.change < found.high < 0
    assert found.outcome == "lost"


def test_losses_per_token_weigh_samples_by_their_tokens():
    sides = {"base": {"loss": Sampled([1.0, 8.0], [1, 4])}, "tuned": {"loss": Sampled([2.0, 8.0], [1, 4])}}
    (found,) = changes({("learn", "x.jsonl"): sides})
    assert (found.before, found.after) == (9 / 5, 10 / 5)
    assert (found.low, found.high) == (0, 1)  # draws of the second sample alone, and of the first
    assert found.outcome == ""
    assert found.hidden_loss == 1


def test_what_each_sample_gave_adds_up(adapted, tokenizer, tmp_path):
    """Of data in two passes, whose batches differ."""
    rows = [{"prompt": "ab" * i, "response": f" {i} + {i}", "choices": [f" {i} + {i}", " no"]} for i in range(1, 9)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, scores = str(tmp_path / "d.jsonl"), {}
    config = EvalConfig(
        keep=data, learn=data, text=data, choices=data, exact_match="text", max_new_tokens=3, batch_tokens=70
    )
    results = evaluate(adapted, tokenizer, config, progress=False, scores=scores)
    for (kind, name), sides in scores.items():
        for side, by_measure in sides.items():
            for measure, sampled in by_measure.items():
                if measure in ("tokens", "samples"):
                    continue
                value = sum(sampled.totals) / sum(sampled.counts)
                value = math.exp(value) if measure == "perplexity" else value
                assert value == pytest.approx(results[kind][name][side][measure], rel=1e-4), (kind, measure)
    assert {c.measure for c in changes(scores)} == {"loss", "recall", "perplexity", "exact_match", "accuracy"}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            [change(-0.01, 0.03), change(0.0, 0.0, data="b")],
            [
                "kept: no measurable loss on 2 of 2",
                "losses up to these are not excluded: toy exact match −1.0 points; more samples",
            ],
        ),
        (
            [change(0.01, 0.03)],
            ["kept: no measurable loss on 1 of 1", "gained on 1 of 1: toy (exact match +2.0 points"],
        ),
        (
            [change(-0.05, -0.01), change(-0.02, 0.02, data="b")],
            [
                "lost on 1 of 2: toy (exact match −3.0 points)",
                "no measurable loss on the other 1",
                "losses up to these are not excluded: b exact match −2.0 points; more samples narrow them",
            ],
        ),
        ([change(0.1, 0.3, "loss")], ["lost on 1 of 1: toy (loss +0.2000)"]),
        ([change(-0.3, -0.1, "loss")], ["kept: no measurable loss on 1 of 1", "gained on 1 of 1: toy (loss −0.2000"]),
        (
            [change(-0.02, 0.02), Change("tasks", "b", "exact_match", 9, 0, 0, 0, 0)],
            [
                "kept: no measurable loss on 1 of 1",
                "losses up to these",
                "nothing can be said of b: the score is 0 before and after",
            ],
        ),
        ([change(math.nan, math.nan, "loss", value=math.nan)], ["lost on 1 of 1: toy (loss —"]),
    ],
)
def test_the_verdict(found, said):
    for sentence, begins in zip(gained_and_lost(found), said, strict=True):
        assert sentence.startswith(begins)


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch, checkpoint, tasks):
    """A directory with an adapter that is tuned, samples, and a task that is right where the model is untouched."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tiny.build("llama")

    @torch.no_grad()
    def untouched(model, tokenizer, config):
        ids = torch.arange(4, 40).reshape(12, 3)[: config.limit]
        same = (model(ids).logits - base(ids).logits).abs().amax((1, 2)) < 1e-3
        details = [
            {"asked": f"<b>{i}", "answered": "yes" if s else "no", "expected": "yes"} for i, s in enumerate(same)
        ]
        return Scores(same.float().tolist(), details)

    tasks["toy"] = Task("toy", "exact_match", untouched, "")
    adapter = ["--r", 4, "--precision", "fp32", "--learning_rate", 0.03, "--max_steps", 4, "--output", "tuned"]
    run("train", "--model", checkpoint, "--data", "sums.jsonl", *adapter)
    return tmp_path


def run(*arguments):
    cli.main([str(a) for a in arguments])


def test_before_and_after(work, checkpoint, capsys):
    measured = ["--tasks", "toy", "--learn", "sums.jsonl", "--limit", 10]
    run("eval", "--before", checkpoint, "--after", "tuned", *measured, "--output", "changed")
    said = " ".join(capsys.readouterr().out.split())
    assert "lost on 1 of 2: toy (exact match −100.0 points)" in said
    assert "gained on 1 of 2: learn sums.jsonl (loss −" in said
    folder = work / "changed"
    assert sorted(p.name for p in folder.iterdir()) == [
        "report.html",
        "results.json",
        "toy.base.jsonl",
        "toy.tuned.jsonl",
    ]
    result = json.loads((folder / "results.json").read_text())
    assert {c["data"]: c["samples"] for c in result["changes"]} == {"sums.jsonl": 12, "toy": 10}
    assert json.loads((folder / "toy.tuned.jsonl").read_text().splitlines()[3])["answered"] == "no"
    page = (folder / "report.html").read_text()
    assert "{{" not in page
    assert not re.search(r"""(src|href)=["']?http|@import|fetch\(""", page)
    assert "<h1>Lost on 1 of 2: toy" in page
    assert "10 got worse, the first 5" in page
    assert "&lt;b&gt;4" in page
    assert "&lt;b&gt;5" not in page
    assert "corda eval --before" in page

    run("export", "--model", checkpoint, "--adapter", "tuned", "--as", "merged", "--output", "merged")
    capsys.readouterr()
    run("eval", "--before", checkpoint, "--after", "merged", *measured, "--output", "merged.json", "--json")
    merged = json.loads(capsys.readouterr().out)
    for one, other in zip(result["changes"], merged["changes"], strict=True):
        for key in ("before", "after", "low", "high"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)
    assert json.loads((work / "merged.json").read_text())["gained_and_lost"] == merged["gained_and_lost"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give --model, or --before and --after"),
        (["--before", "MODEL"], "give both --before and --after: the model as it was, and as it is now"),
        (
            ["--before", "MODEL", "--after", "tuned", "--adapter", "tuned"],
            "--before and --after name the models: leave --model, --adapter and --original out",
        ),
        (
            ["--before", "MODEL", "--after", "other"],
            "other has another vocabulary than MODEL, so nothing is comparable",
        ),
        (
            ["--before", "MODEL", "--after", "tuned", "--output", "sums"],
            "the output sums has something in it already: remove it, or choose another",
        ),
    ],
)
def test_models_that_are_not_named_rightly(tmp_path, checkpoint, arguments, sentence, capsys, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1 =", "response": " 2"}\n')
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "mine").write_text("mine")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text("{}")
    if "other" in arguments:
        tiny.build("llama").save_pretrained("other")
        tokenizer = type(tokenizer).from_pretrained(checkpoint)
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained("other")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("eval", *(checkpoint if a == "MODEL" else a for a in arguments), "--learn", "sums.jsonl")
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"corda eval: {sentence.replace('MODEL', str(checkpoint))}"
