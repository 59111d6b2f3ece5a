"""Tasks by name, from the command line to the table, with the adapter off and on."""

import json

import pytest

from corda_lora import CordaError, cli
from corda_lora.config import EvalConfig
from corda_lora.data.labels import check_labels
from corda_lora.data.samples import Sample
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.evaluation.tasks import registry
from corda_lora.evaluation.tasks.registry import Scores, task


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setattr(registry, "TASKS", {})

    @task("lengths", "exact_match", "all are right with an adapter, and a third without")
    def lengths(model, tokenizer, config):
        on = any(not module.disable_adapters for module in model.modules() if hasattr(module, "disable_adapters"))
        values = [float(i % 3 == 0 or on) for i in range(config.limit or 6)]
        return Scores(values, [{"asked": i} for i in range(len(values))])

    def no_data(config):
        if config.data_dir is None:
            raise CordaError("spread needs a --data_dir")

    @task("spread", "matthews", "", mean=lambda values, labels: max(values) - min(labels), check=no_data)
    def spread(model, tokenizer, config):
        return Scores([1.0, 2.0], [{}, {}], [5.0, -1.0])


def test_a_task_is_run_with_the_adapter_off_and_on(adapted, tokenizer, tmp_path):
    scores = {}
    config = EvalConfig(tasks="lengths, spread", data_dir=tmp_path, limit=3)
    results = evaluate(adapted, tokenizer, config, progress=False, scores=scores)
    assert results["tasks"]["lengths"] == {
        "base": {"exact_match": pytest.approx(1 / 3), "samples": 3},
        "tuned": {"exact_match": 1.0, "samples": 3},
    }
    assert results["tasks"]["spread"]["tuned"] == {"matthews": 3.0, "samples": 2}
    assert scores["tasks", "lengths"]["base"].values == [1.0, 0.0, 0.0]


def test_tasks_stand_in_the_table_and_in_the_results(checkpoint, capsys):
    cli.main(["eval", "--model", str(checkpoint), "--tasks", "lengths", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["results"]["tasks"]["lengths"]["base"]["exact_match"] == pytest.approx(1 / 3)
    cli.main(["eval", "--model", str(checkpoint), "--tasks", "lengths"])
    assert "tasks: exact match" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("lenghts", "there is no task 'lenghts'; nearest names: lengths"),
        ("lengths,spread", "spread needs a --data_dir"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_the_model_is_loaded(names, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", "nowhere", "--tasks", names])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_comparison_of_an_unknown_task_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "learn.jsonl").write_text('{"prompt": "1 + 1 =", "response": " 2"}\n')
    recipe = {"model": str(checkpoint), "data": "learn.jsonl", "methods": ["lora"]}
    recipe["eval"] = {"learn": "learn.jsonl", "tasks": ["lenghts"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "recipe.yaml", "--output", "out"])
    assert stopped.value.code == 2
    assert "corda compare: there is no task 'lenghts'; nearest names: lengths" in capsys.readouterr().err


def test_a_task_that_the_model_cannot_do_is_refused_before_anything_is_measured(checkpoint, monkeypatch, capsys):
    asked = []

    @task("first", "exact_match", "")
    def first(model, tokenizer, config):
        asked.append(model)

    @task("labels", "accuracy", "", requires=lambda *_: check_labels("labels", [Sample("", "", {}, label="1")], None))
    def labels(model, tokenizer, config):
        asked.append(model)

    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", str(checkpoint), "--tasks", "first,labels"])
    assert stopped.value.code == 2
    assert "it is no classifier" in capsys.readouterr().err
    assert not asked


def test_results_without_an_adapter_name_none(checkpoint, tmp_path, capsys):
    cli.main(["eval", "--model", str(checkpoint), "--tasks", "lengths", "--output", str(tmp_path / "results.json")])
    assert json.loads((tmp_path / "results.json").read_text())["adapter"] is None


def test_a_directory_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", "nowhere", "--tasks", "lengths", "--data_dir", "none"])
    assert stopped.value.code == 2
    assert "there is no directory none (--data_dir)" in capsys.readouterr().err
