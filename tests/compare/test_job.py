"""What a process does for a job, in this process."""

import json
from functools import partialmethod
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from corda_lora.adapters.lora import load_adapter
from corda_lora.cli import main
from corda_lora.compare.comparison import Comparison, gather
from corda_lora.compare.frontier import summary
from corda_lora.compare.job import do_job, results_of
from corda_lora.compare.runner import compare
from corda_lora.compare.schedule import Job
from corda_lora.config import CompareConfig, EvalConfig, JudgeConfig, MethodConfig, ModelConfig, TrainConfig
from corda_lora.data.batches import Encoded
from corda_lora.evaluation.base_outputs import BaseOutputs, record_base
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.evaluation.tasks import mt_bench
from corda_lora.models.loading import load_model, load_tokenizer


@pytest.fixture
def comparison(checkpoint, folder):
    train = TrainConfig(max_steps=2, batch_size=8, precision="fp32", compile=True)
    evaluated = EvalConfig(learn="learn.jsonl")
    config = CompareConfig(["lora", "kasa"], "learn.jsonl", evaluated, train=train, r=4, curve_points=1)
    comparison = Comparison(ModelConfig(str(checkpoint)), config, folder / "out")
    comparison.folder(Job()).mkdir(parents=True)
    return comparison


@pytest.fixture
def do(comparison):
    return lambda *job: do_job(comparison, Job(*job), lambda steps: None)


def test_later_runs_of_a_process_use_the_compiled_blocks_of_the_first(do, monkeypatch):
    """With a backend that compiles nothing: graphs are counted where they are traced."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()  # of other tests
    do()
    assert not counters["stats"]["unique_graphs"], "the base model is only measured"
    graphs = []
    for rate in (1e-3, 1e-2):
        assert do("lora", rate)["status"] == "done"
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]


def test_a_run_tells_its_penalties(do, comparison):
    comparison.recipe.train.compile = False
    do()
    assert [step for step, _ in do("kasa", 1e-3)["penalties"]["kasa"]] == [1, 2]
    assert "penalties" not in do("lora", 1e-3)


def test_benchmarks_are_measured_as_all_else(do, comparison, folder):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"what is {i}", "answers": [str(i), "x"]} for i in range(5)]
    (folder / "webqs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison.recipe.train.compile = False
    comparison.recipe.eval = EvalConfig(learn="learn.jsonl", tasks="webqs", data_dir=folder, limit=4)
    results = {Job(): do(), Job("lora", 1e-3): do("lora", 1e-3)}
    for result in results.values():
        assert result["results"]["tasks"]["webqs"]["samples"] == 4
    gathered = gather(comparison, results, "corda compare")
    assert gathered["recipe"]["eval"]["data_dir"] == str(folder)
    scores = summary(json.loads(json.dumps(gathered)))[0]["scores"]
    assert scores["tasks", "webqs", "exact_match"].value == results[Job()]["results"]["tasks"]["webqs"]["exact_match"]


def test_a_judge_that_was_down_is_asked_by_the_same_command(comparison, folder, monkeypatch, capsys):
    questions = [{"question_id": i, "category": "math", "turns": [f"{i}?", "why?"]} for i in (1, 2)]
    kinds = mt_bench.KINDS.values()
    prompts = [{"name": kind, "system_prompt": "", "prompt_template": f"{kind} {{answer_1}}"} for kind in kinds]
    for name, lines in (("question", questions), ("judge_prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = JudgeConfig("http://127.0.0.1:1", "judge", folder=folder / "judged")
    evaluated = EvalConfig(learn="learn.jsonl", tasks="mt_bench", data_dir=folder, judge=judge)
    train = TrainConfig(max_steps=1, batch_size=8, precision="fp32")
    lora = {"lora": MethodConfig(learning_rates=[1e-3, 1e-2])}
    recipe = CompareConfig(lora, "learn.jsonl", evaluated, train=train, r=4, curve_points=1, seeds=1)
    comparison = Comparison(comparison.source, recipe, folder / "judged" / "out")
    monkeypatch.setattr(mt_bench, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(mt_bench, "_is_there", lambda judge: True)
    monkeypatch.setattr(mt_bench, "_ask", lambda *call: mt_bench._Failure("down"))

    def compared():
        made = compare(comparison.source, recipe, comparison.output, gpus=[""])
        said = " ".join(capsys.readouterr().err.split())
        return [each["tasks"]["mt_bench"].get("score") for each in (made["base"], made["runs"][0]["results"])], said

    again = "mt_bench: 3 results lack a part (their log.txt says why): the same command asks for it again"
    comparison.open()
    for job in (Job(), Job("lora", 1e-3), Job("lora", 1e-2)):
        comparison.folder(job).mkdir(parents=True)
        comparison.write_result(job, do_job(comparison, job, lambda steps: None))
    scores, said = compared()
    assert scores == [None, None]
    assert again in said
    monkeypatch.setattr(mt_bench, "_is_there", lambda judge: False)
    assert again in compared()[1]
    monkeypatch.setattr(mt_bench, "_is_there", lambda judge: True)
    monkeypatch.setattr(mt_bench, "_ask", lambda *call: "[[7]]")
    scores, said = compared()
    assert scores == [7.0, 7.0]
    assert again not in said
    monkeypatch.setattr(mt_bench, "_ask", None)  # nothing is missing any more
    assert compared()[0] == [7.0, 7.0]


def test_drift_is_that_of_eval(checkpoint, folder):
    """The stored outputs of the base model give the drift that base and tuned model side by side give."""
    source = ModelConfig(str(checkpoint))
    config = EvalConfig(keep=["keep.jsonl", "learn.jsonl"], text="keep.jsonl", batch_tokens=256)
    record = {}
    model, tokenizer = load_model(source), load_tokenizer(source)
    base = evaluate(model, tokenizer, config, False, record=record)
    BaseOutputs.save(folder, record)
    assert all(" hidden " in name for name in record)
    train = ["train", "--model", str(checkpoint), "--data", "learn.jsonl", "--precision", "fp32", "--output", "tuned"]
    main([*train, "--learning_rate", "0.01", "--max_steps", "4"])
    outputs = BaseOutputs(folder, model)
    tuned = load_adapter(model, Path("tuned")).eval()
    beside, stored = evaluate(tuned, tokenizer, config, False), evaluate(tuned, tokenizer, config, False, outputs)
    for kind in ("keep", "text"):
        for name, sides in beside[kind].items():
            assert sides["tuned"]["drift"] > 1e-5
            assert stored[kind][name]["tuned"] == pytest.approx(sides["tuned"], rel=1e-4)
            assert base[kind][name]["base"] == pytest.approx(sides["base"], rel=1e-6)


@pytest.mark.parametrize(("family", "kept"), [("llama", "hidden"), ("gemma2", "logits"), ("gpt2_conv1d", "hidden")])
def test_stored_outputs_are_the_predictions(family, kept, folder, tokenizer):
    """Gemma 2 caps its logits after the output head: the inputs of the head are not enough there."""
    model = tiny.build(family)
    encoded = [Encoded(list(range(4, 4 + n)), [i >= n // 2 for i in range(n)]) for n in (5, 9, 12)]
    record = record_base(model, tokenizer, encoded, 24, False, "keep x")
    assert {name.split()[2] for name in record} == {kept}
    BaseOutputs.save(folder, record)
    base = BaseOutputs(folder, model)
    with torch.no_grad():
        for number, ids in enumerate(sorted(e.ids for e in encoded)[:1]):
            n = len(ids) // 2
            expected = F.log_softmax(model(torch.tensor([ids])).logits[0, n - 1 : -1], dim=-1)
            assert torch.allclose(base.log_probs("keep x", number)[: len(expected)], expected, atol=1e-5)


def test_data_is_called_by_its_file_where_that_name_is_unique():
    sides = {"base": {"loss": 1.0}}
    assert results_of({"keep": {"a/nq.jsonl": sides, "openai/gsm8k": sides}}, "base")["keep"].keys() == {
        "nq",
        "openai/gsm8k",
    }
    assert len(results_of({"keep": {"a/test.jsonl": sides, "b/test.jsonl": sides}}, "base")["keep"]) == 2
