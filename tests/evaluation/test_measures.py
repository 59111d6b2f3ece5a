"""The registry: a new measure is one function, and shows in every table."""

import csv
import io
import json

import pytest
import tiny
from rich.console import Console

from corda_lora.compare.frontier import summary
from corda_lora.config import CordaError, EvalConfig
from corda_lora.evaluation.evaluate import PASSES, evaluate
from corda_lora.evaluation.measures import MEASURES, measure
from corda_lora.report.markdown import markdown_report, write_csv
from corda_lora.report.terminal import results_table


@pytest.fixture
def registry(monkeypatch):
    """The measures as they were, when the test is over."""
    before = dict(MEASURES)
    yield
    MEASURES.clear()
    MEASURES.update(before)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def printed(results):
    text = io.StringIO()
    Console(width=120, file=text).print(results_table(results))
    return text.getvalue()


def compared(base, tuned):
    """A comparison of one run, whose results are `evaluate`'s."""
    run = {"method": "lora", "learning_rate": 1e-3, "seed": 0, "status": "done", "why": "", "curve": []}
    run |= {"steps": 3, "seconds": 1.0, "results": {"learn": {"sums": tuned}}}
    return {
        **{"name": "toy", "command": "corda compare", "recipe": {}, "machine": None, "versions": {}, "commit": None},
        "methods": {"lora": {"title": "LoRA", "source": ""}},
        "base": {"learn": {"sums": base}},
        "runs": [run],
    }


def test_a_new_measure_shows_everywhere(registry, data, adapted, tokenizer, tmp_path):
    @measure("answers", ("learn",), per="token", better="low", form=".2f", unit="tokens", title="mean rank")
    def mean_rank(answers):
        right = answers.log_probs.gather(1, answers.targets[:, None])
        return float((answers.log_probs > right).sum())

    results = evaluate(adapted, tokenizer, EvalConfig(learn=data), progress=False)
    base, tuned = (results["learn"][data][side] for side in ("base", "tuned"))
    assert base["mean_rank"] != tuned["mean_rank"]
    assert 0 < tuned["mean_rank"] < tiny.VOCABULARY
    text, shown = printed(results), f"{tuned['mean_rank']:.2f}"
    row = next(line for line in text.splitlines() if "learn: mean rank" in line)
    assert [cell.strip() for cell in row.split("│")[3:5]] == [f"{base['mean_rank']:.2f}", shown]
    assert "mean rank in tokens" in " ".join(text.split())

    comparison = compared(base, tuned)
    (entry,) = summary(comparison)
    assert entry["scores"]["learn", "sums", "mean_rank"].value == tuned["mean_rank"]
    page = markdown_report(comparison)
    assert "| mean rank: sums |" in page
    assert f"| {shown} |" in next(line for line in page.splitlines() if line.startswith("| LoRA |"))
    assert f"| {base['mean_rank']:.2f} |" in next(line for line in page.splitlines() if "| base model |" in line)
    write_csv(tmp_path / "runs.csv", comparison)
    with (tmp_path / "runs.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["learn sums mean_rank"]) == tuned["mean_rank"]


def test_a_measure_says_which_models_it_is_defined_for(registry, data, tokenizer, monkeypatch):
    """A model of another kind is measured by what is defined for it; with nothing defined for it, it is refused."""
    model = tiny.build("t5")
    with pytest.raises(CordaError, match="T5ForConditionalGeneration is no causal language model"):
        evaluate(model, tokenizer, EvalConfig(keep=data))

    class Rows:
        samples, base = 4, None

    monkeypatch.setitem(PASSES, "rows", lambda request: [("base", Rows)])

    @measure("rows", ("learn",), requires=lambda model: None)
    def three_quarters(rows):
        return 3

    results = evaluate(model, tokenizer, EvalConfig(learn=data), progress=False)
    assert results == {"learn": {data: {"base": {"three_quarters": 0.75}}}}


def test_the_table_of_eval():
    tuned = {"loss": 1.5, "recall": 0.25, "drift": 0.000123456, "agreement": 0.975, "tokens": 40}
    results = {
        "keep": {"some/where/nq.jsonl": {"base": {"loss": 1.25, "recall": 0.5, "tokens": 40}, "tuned": tuned}},
        "choices": {"arc": {"base": {"accuracy": 0.3125, "samples": 16}, "tuned": {"accuracy": 0.25, "samples": 16}}},
    }
    text = printed(results)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["keep: loss", "nq.jsonl", "1.2500", "1.5000"],
        ["keep: recall", "nq.jsonl", "50.0%", "25.0%"],
        ["keep: drift", "nq.jsonl", "", "0.000123"],
        ["keep: agreement", "nq.jsonl", "", "97.5%"],
        ["choices: accuracy", "arc", "31.2%", "25.0%"],
    ]
    below = " ".join(text.split("┘")[1].split())
    assert below == "loss and drift in nats per token; drift = mean KL(base‖tuned) per answer token"
