"""Knowledge and mathematics by lm-eval: the same scores as its own command gives on the same files."""

import copy
import json
import logging
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import transformers
import yaml

from corda_lora import CordaError, cli
from corda_lora.config import EvalConfig, ModelConfig
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.models.loading import load_model, load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
DEFINITIONS = {  # with the split that the definition evaluates
    "nq_open": ("nq_open/nq_open.yaml", "validation"),
    "triviaqa": ("triviaqa/default.yaml", "validation"),
    "webqs": ("webqs/webqs.yaml", "test"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "test"),
    "math": ("hendrycks_math/hendrycks_math_algebra.yaml", "test"),
}
WORDS = ["a plum", "the sea", "2", "x - 1"]


def rows_of(name: str, answers: list[str]) -> list[dict]:
    """Samples whose right answers are these."""
    asked = [f"what is {3 * i} of {'abcdefgh'[i]}" for i in range(len(answers))]
    made = {
        "nq_open": lambda q, a: {"question": q, "answer": [a, "none"]},
        "triviaqa": lambda q, a: {"question": q, "answer": {"aliases": ["none", a], "value": a}},
        "webqs": lambda q, a: {"question": q, "answers": [a, "none"], "url": ""},
        "gsm8k": lambda q, a: {"question": q, "answer": f"so\n#### {a}"},
        "math": lambda q, a: {"problem": q, "solution": f"so $\\boxed{{{a}}}$"},
    }[name]
    return [made(q, a) for q, a in zip(asked, answers)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def constant_llama(character: str, tokenizer) -> transformers.LlamaForCausalLM:
    """A model that always writes the same character."""
    size = tiny.SIZE | {"max_position_embeddings": 1024}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(character)] = 1
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny LLaMA with room for the answers."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZE | {"max_position_embeddings": 1024}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # answers of all lengths
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Samples of every benchmark."""
    for name, (_, split) in DEFINITIONS.items():
        write(tmp_path / "data" / name / f"{split}.jsonl", rows_of(name, WORDS))
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", rows_of("gsm8k", [*WORDS, "7", "8"]))
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))


def run(*arguments) -> None:
    cli.main([str(a) for a in arguments])


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def of_the_harness(folder: Path, data: Path, home: Path) -> dict[str, list[dict]]:
    """The samples that lm-eval's own run gives, from the same definitions over the same files."""
    home.mkdir()
    for name, (definition, split) in DEFINITIONS.items():
        files = {split: str(data / name / f"{split}.jsonl")}
        files |= {"train": str(data / name / "train.jsonl")} if name == "gsm8k" else {}
        local = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / definition),
            **{"task": f"{name}_local", "dataset_path": "json", "dataset_name": None},
            "dataset_kwargs": {"data_files": files},
        }
        (home / f"{name}.yaml").write_text(
            yaml.safe_dump(local | ({} if "train" in files else {"training_split": None}))
        )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[f"{name}_local" for name in DEFINITIONS],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(home), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    strict = {
        name: [s for s in results["samples"][f"{name}_local"] if s["filter"] != "flexible-extract"]
        for name in DEFINITIONS
    }
    for name, samples in strict.items():
        metric = next(key for key in results["results"][f"{name}_local"] if key.startswith("exact_match"))
        assert results["results"][f"{name}_local"][metric] == sum(s["exact_match"] for s in samples) / len(samples)
    return strict


def test_scores_and_answers_are_the_harnesss(folder, data, tmp_path):
    source = ModelConfig(str(folder))
    model, tokenizer = load_model(source), load_tokenizer(source)
    config = EvalConfig(tasks="nq_open,triviaqa,webqs,gsm8k,math", data_dir=data, batch_tokens=900)
    scores = {}
    evaluate(model, tokenizer, config, progress=False, scores=scores)
    for name in ("nq_open", "triviaqa"):  # half of the samples expect what the model answers
        answers = [detail["answered"] for detail in scores["tasks", name]["base"].details[:2]] + WORDS[2:]
        write(data / name / "validation.jsonl", rows_of(name, answers))
    results = evaluate(model, tokenizer, config, progress=False, scores=scores)["tasks"]
    assert results["nq_open"]["base"]["exact_match"] == results["triviaqa"]["base"]["exact_match"] == 0.5
    for name, samples in of_the_harness(folder, data, tmp_path / "definitions").items():
        ours = scores["tasks", name]["base"]
        assert ours.values == [sample["exact_match"] for sample in samples], name
        assert [d["asked"] for d in ours.details] == [s["arguments"][0][0] for s in samples], name
        if name != "webqs":
            assert [[d["answered"]] for d in ours.details] == [s["resps"][0] for s in samples], name
        assert results[name]["base"]["samples"] == len(WORDS)


def test_the_hubs_data_is_taken_where_there_is_no_data_dir(folder, data, monkeypatch):
    """All seven parts of MATH, each with the limit."""
    asked = []

    def load_dataset(path, name=None, **_):
        asked.append((path, name))
        test = datasets.Dataset.from_list(rows_of("math", WORDS))
        return {"train": test, "test": test}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = ModelConfig(str(folder))
    model = constant_llama("\n", load_tokenizer(source))
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, input_ids[:, -1:]], 1))
    results = evaluate(model, load_tokenizer(source), EvalConfig(tasks=["math"], limit=2), progress=False)
    assert results["tasks"]["math"]["base"]["samples"] == 14
    assert {path for path, _ in asked} == {"EleutherAI/hendrycks_math"}
    assert {"algebra", "precalculus", "number_theory"} < {name for _, name in asked}


def test_answers_end_at_a_stop_string_or_at_the_limit(tokenizer, data, monkeypatch):
    for character, answer, steps in (("a", "a" * 256, 256), (".", "", 1)):
        model = constant_llama(character, tokenizer)
        calls = []
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda *a, forward=forward, calls=calls, **k: calls.append(1) or forward(*a, **k)
        )
        scores = {}
        config = EvalConfig(tasks="nq_open", data_dir=data, limit=3)
        evaluate(model, tokenizer, config, progress=False, scores=scores)
        assert [detail["answered"] for detail in scores["tasks", "nq_open"]["base"].details] == [answer] * 3
        assert len(calls) == steps


def test_a_models_own_stop_strings_give_way_to_the_definitions(tokenizer, data):
    model, scores = constant_llama("a", tokenizer), {}
    model.generation_config.stop_strings = ["aaa"]
    config = EvalConfig(tasks="nq_open", data_dir=data, limit=1)
    evaluate(model, tokenizer, config, progress=False, scores=scores)
    assert scores["tasks", "nq_open"]["base"].details[0]["answered"] == "a" * 256


def test_a_batch_ends_when_each_row_has_come_to_some_stop_string(tokenizer, data, monkeypatch):
    """lm-eval's own criterion waits until all rows have come to the same one."""
    model, calls = constant_llama("a", tokenizer), []
    forward, ends = model.forward, [tokenizer.convert_tokens_to_ids(c) for c in ".,\n."]

    def to_different_ends(*arguments, **options):
        calls.append(1)
        output = forward(*arguments, **options)
        if len(calls) == 3:
            output.logits[torch.arange(4), -1, ends] = 1e9
        return output

    monkeypatch.setattr(model, "forward", to_different_ends)
    scores = {}
    evaluate(model, tokenizer, EvalConfig(tasks="nq_open", data_dir=data), progress=False, scores=scores)
    assert [detail["answered"] for detail in scores["tasks", "nq_open"]["base"].details] == ["aa"] * 4
    assert len(calls) == 3


def test_models_and_tokenizers_that_cannot_answer(tokenizer, data):
    config = EvalConfig(tasks="nq_open", data_dir=data)
    with pytest.raises(CordaError, match="BertForSequenceClassification is no causal language model"):
        evaluate(tiny.build("bert"), tokenizer, config, progress=False)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(CordaError, match="nq_open needs a tokenizer with an end-of-text token"):
        evaluate(tiny.build("llama"), endless, config, progress=False)


def test_memory_that_is_out_halves_the_batch(tokenizer, data, monkeypatch):
    model, rows = constant_llama(".", tokenizer), []
    generate = model.generate

    def short_of_memory(input_ids, **options):
        rows.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", short_of_memory)
    evaluate(model, tokenizer, EvalConfig(tasks="nq_open", data_dir=data), progress=False)
    assert rows == [4, 2, 1, 1, 1, 1]


def test_a_prompt_with_no_room_is_said(tokenizer, checkpoint, data, capsys):
    said = refused(capsys, "eval", "--model", checkpoint, "--tasks", "nq_open", "--data_dir", data)
    assert said == "corda eval: nq_open lets a model write 256 tokens, but this one holds 256"


@pytest.mark.parametrize(
    ("tasks", "files", "sentence"),
    [
        (
            "nq_open",
            {},
            "nq_open needs the file D/nq_open/test.jsonl (or nq_open/validation.jsonl, nq_open/dev.jsonl, ",
        ),
        (
            "nq_open",
            {"nq_open.jsonl": [{"query": "q", "answers": ["a"]}]},
            "D/nq_open.jsonl has the columns query, answers, but nq_open needs question and answer: there is no "
            "question and no answer",
        ),
        (
            "triviaqa",
            {
                "trivia_qa/dev.json": [
                    {"question": "q", "answer": {"aliases": ["a"]}},
                    {"question": "q", "answer": ["a"]},
                ]
            },
            "row 2 of D/trivia_qa/dev.json has answer ['a'], but needs a mapping with a list of texts, `aliases`",
        ),
        ("gsm8k", {"gsm8k/test.jsonl": [{"question": "q", "answer": "a"}]}, "needs the file D/gsm8k/train.jsonl"),
        (
            "gsm8k",
            {f"gsm8k/{split}.jsonl": [{"question": "q", "answer": "a"}] * 4 for split in ("test", "train")},
            "D/gsm8k/train.jsonl has 4 rows, and the prompt has 5 examples",
        ),
        (
            "math",
            {"math/test.jsonl": [{"problem": "q", "solution": "so 3"}]},
            "row 1 of D/math/test.jsonl has solution 'so 3', but needs a text with the answer in \\boxed{}",
        ),
    ],
)
def test_local_files_that_do_not_fit_are_refused_before_the_model_is_loaded(tasks, files, sentence, tmp_path, capsys):
    for name, rows in files.items():
        write(tmp_path / name, rows)
    said = refused(capsys, "eval", "--model", "nowhere", "--tasks", tasks, "--data_dir", tmp_path)
    assert sentence.replace("D/", f"{tmp_path}/") in said


def test_other_names_of_columns_and_files(tmp_path, capsys):
    """The copy of WebQuestions that is one JSON array."""
    (tmp_path / "webquestions").mkdir()
    (tmp_path / "webquestions" / "validation.json").write_text(
        json.dumps([{"qText": "q", "answers": ["a"], "qId": "1"}])
    )
    said = refused(capsys, "eval", "--model", "nowhere", "--tasks", "webqs", "--data_dir", tmp_path)
    assert "nowhere" in said  # the data is in order


def test_data_that_cannot_be_had(tmp_path, capsys):
    said = refused(capsys, "eval", "--model", "nowhere", "--tasks", "gsm8k")
    assert said.startswith(
        "corda eval: cannot load the data of gsm8k from the hub: a --data_dir with it takes its place ("
    )
    said = refused(capsys, "eval", "--model", "nowhere", "--tasks", "gsm8k", "--data_dir", tmp_path / "none")
    assert said == f"corda eval: there is no directory {tmp_path / 'none'} (--data_dir)"


def test_quiet_shows_nothing(folder, data, tmp_path, capfd):
    output = tmp_path / "scored"
    arguments = ["--tasks", "webqs", "--data_dir", data, "--output", output]
    run("eval", "--model", folder, *arguments, "--quiet")
    said = capfd.readouterr()
    assert said.out == f"{output}\n"
    assert said.err == ""
    assert logging.getLogger("lm_eval").level == logging.ERROR
    details = [json.loads(line) for line in (output / "webqs.base.jsonl").read_text().splitlines()]
    assert len(details) == 4
    assert details[0]["expected"] == ["a plum", "none"]
    assert json.loads((output / "results.json").read_text())["results"]["tasks"]["webqs"]["base"]["samples"] == 4


def test_a_comparison_goes_on_with_the_same_samples_alone(checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "learn.jsonl", [{"prompt": "1 + 1 =", "response": " 2"}])
    evaluated = {"learn": "learn.jsonl", "tasks": "webqs", "data_dir": str(data)}
    recipe = {"model": str(checkpoint), "data": "learn.jsonl", "methods": ["lora"], "eval": evaluated}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = ["compare", "recipe.yaml", "--output", "out", "--jobs", 0]
    assert "has no results of the base model yet" in refused(capsys, *command)
    write(data / "webqs" / "test.jsonl", rows_of("webqs", ["others"]))
    assert "(the samples of task webqs have changed)" in refused(capsys, *command)
