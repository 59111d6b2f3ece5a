"""Knowledge and mathematics, by EleutherAI's lm-evaluation-harness (the package lm-eval): its definitions of the tasks,
its prompts, its scoring. The samples are from the hub, or from local files in their place.

A local file takes the place of the split that the harness evaluates. It has the columns of the hub's data set:

    DIR/nq_open/dev.jsonl           question, answer: a list of right answers
    DIR/triviaqa/validation.jsonl   question, answer: a mapping with the list `aliases`
    DIR/webqs/test.jsonl            question, answers: a list
    DIR/gsm8k/test.jsonl            question, answer; and DIR/gsm8k/train.jsonl for the five examples in the prompt
    DIR/math/test.jsonl             problem, solution

.json and .parquet do as well, any of test, validation and dev is found, and so is DIR/nq_open.jsonl.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...config import CordaError, DataConfig, EvalConfig
from ...config.values import short
from ...data.rows import Row, load_rows
from ...progress import progress_bar
from .registry import TASKS, Scores, Task, writes

SHOTS_SEED = 1234  # lm-eval's default: it draws the examples in the prompt
SUFFIXES = (".jsonl", ".json", ".parquet")
EVALUATED = ("test", "validation", "dev")  # the names of files, in the order in which they are looked for


@dataclass(frozen=True)
class Kind:
    """What a cell has to be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda cell: isinstance(cell, str))
TEXTS = Kind(
    "a list of texts", lambda cell: isinstance(cell, list) and bool(cell) and all(isinstance(x, str) for x in cell)
)
ALIASES = Kind(
    "a mapping with a list of texts, `aliases`",
    lambda cell: isinstance(cell, dict) and TEXTS.fits(cell.get("aliases")),
)
SOLUTION = Kind(r"a text with the answer in \boxed{}", lambda cell: isinstance(cell, str) and "\\boxed{" in cell)


@dataclass(frozen=True)
class Benchmark:
    """A task of lm-eval, and where its samples are in a local directory.

    Attributes:
        name: ours.
        folder: of the definition, in lm_eval/tasks.
        tasks: the names of the parts there. A local file holds all parts.
        places: names that the folder or file may have in a local directory.
        columns: what the definition reads.
        renamed: other names of columns, that public copies of the data have.
        shots: how many examples from the training split the prompt has.
    """

    name: str
    folder: str
    tasks: tuple[str, ...]
    places: tuple[str, ...]
    columns: dict[str, Kind]
    renamed: dict[str, str]
    shots: int
    meaning: str


MATH_PARTS = "algebra counting_and_prob geometry intermediate_algebra num_theory prealgebra precalc"
BENCHMARKS = [
    Benchmark(
        "triviaqa",
        "triviaqa",
        ("triviaqa",),
        ("triviaqa", "trivia_qa"),
        {"question": TEXT, "answer": ALIASES},
        {},
        0,
        "TriviaQA, closed book: the answer is one of the right ones, but for case and punctuation",
    ),
    Benchmark(
        "nq_open",
        "nq_open",
        ("nq_open",),
        ("nq_open",),
        {"question": TEXT, "answer": TEXTS},
        {},
        0,
        "Natural Questions, closed book: the answer is one of the right ones, but for case, punctuation and articles",
    ),
    Benchmark(
        "webqs",
        "webqs",
        ("webqs",),
        ("webqs", "web_questions", "webquestions"),
        {"question": TEXT, "answers": TEXTS},
        {"qText": "question"},
        0,
        "WebQuestions: one of the right answers is what greedy decoding gives",
    ),
    Benchmark(
        "gsm8k",
        "gsm8k",
        ("gsm8k",),
        ("gsm8k",),
        {"question": TEXT, "answer": TEXT},
        {},
        5,
        "GSM8K, five examples in the prompt: the number after #### is right (strict-match)",
    ),
    Benchmark(
        "math",
        "hendrycks_math",
        tuple(f"hendrycks_math_{part}" for part in MATH_PARTS.split()),
        ("math", "hendrycks_math"),
        {"problem": TEXT, "solution": SOLUTION},
        {},
        0,
        "MATH: the answer is the one in the solution's box; from the hub, a --limit is of each of its seven parts",
    ),
]


# --- the samples -----------------------------------------------------------------------------------------------------


def harness_tasks(benchmark: Benchmark, config: EvalConfig) -> dict[str, Any]:
    """The harness's tasks with their samples, by name.

    Raises CordaError if the samples cannot be had, or do not have the columns that the definition reads."""
    local = None if config.data_dir is None else _local_splits(benchmark, config.data_dir)
    import datasets
    import lm_eval.api.task
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # it would be seen with --quiet
    datasets.disable_progress_bars()
    changes: dict[str, Any] = {}
    names = benchmark.tasks
    if local is not None:
        splits = {split: datasets.Dataset.from_list(rows) for split, rows in local.items()}
        changes = {"custom_dataset": lambda **_: splits, "test_split": "test", "validation_split": None}
        if not benchmark.shots:
            changes["training_split"] = None
        names = names[:1]  # the parts of a benchmark differ in their samples alone
    folder = Path(lm_eval.tasks.__file__).with_name(benchmark.folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    parts = [{"task": name, **changes} for name in names]
    try:
        return manager.load({"group": benchmark.name, "task": parts})["tasks"]
    except Exception as error:  # of many kinds, from `datasets` and from the definitions
        reason = short(str(error).strip().split("\n")[0], 160)
        where = config.data_dir or "the hub: a --data_dir with it takes its place"
        raise CordaError(f"cannot load the data of {benchmark.name} from {where} ({reason})") from error


def _check(benchmark: Benchmark, config: EvalConfig) -> dict[str, list[Row]] | None:
    """The samples, if they are local. Raises CordaError as `harness_tasks` does."""
    harness_tasks(benchmark, config)
    return None if config.data_dir is None else _local_splits(benchmark, config.data_dir)


def _local_splits(benchmark: Benchmark, directory: Path) -> dict[str, list[Row]]:
    """The rows of the evaluated split, as "test", and of the training split if the prompt has examples of it."""
    splits = {"test": _rows(benchmark, _file(benchmark, directory, EVALUATED))}
    if benchmark.shots:
        file = _file(benchmark, directory, ("train",))
        splits["train"] = _rows(benchmark, file)
        if len(splits["train"]) < benchmark.shots:
            raise CordaError(f"{file} has {len(splits['train'])} rows, and the prompt has {benchmark.shots} examples")
    return splits


def _file(benchmark: Benchmark, directory: Path, splits: Sequence[str]) -> Path:
    stems = [f"{place}/{split}" for place in benchmark.places for split in splits]
    stems += benchmark.places if "test" in splits else ()
    files = [directory / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    if found := [file for file in files if file.is_file()]:
        return found[0]
    others = ", ".join(f"{stem}.jsonl" for stem in stems[1:])
    raise CordaError(
        f"{benchmark.name} needs the file {files[0]}{f' (or {others})' if others else ''}, with the columns "
        f"{' and '.join(benchmark.columns)}; there is none"
    )


def _rows(benchmark: Benchmark, file: Path) -> list[Row]:
    """The rows of a file, with the columns that the definition reads."""
    rows, names = load_rows(DataConfig(str(file)))
    names = [benchmark.renamed.get(name, name) for name in names]
    if missing := [name for name in benchmark.columns if name not in names]:
        raise CordaError(
            f"{file} has the columns {', '.join(names) or '(none)'}, but {benchmark.name} needs "
            f"{' and '.join(benchmark.columns)}: there is no {' and no '.join(missing)}"
        )
    kept = []
    for number, row in enumerate(rows, 1):
        row = {benchmark.renamed.get(name, name): cell for name, cell in row.items()}
        for name, kind in benchmark.columns.items():
            if not kind.fits(row.get(name)):
                raise CordaError(f"row {number} of {file} has {name} {short(row.get(name))}, but needs {kind.words}")
        kept.append({name: row[name] for name in benchmark.columns})
    return kept


# --- the model -------------------------------------------------------------------------------------------------------


def _scorer(model: Any, tokenizer: Any, label: str, batch_tokens: int) -> Any:
    """A model for the harness."""
    from accelerate.utils import find_executable_batch_size
    from lm_eval.models.huggingface import HFLM
    from transformers import StoppingCriteriaList

    from ..generation import largest_batch, stops_at

    @cache
    def stopping(strings: tuple[str, ...]) -> StoppingCriteriaList:
        return StoppingCriteriaList(stops_at(tokenizer, strings))  # it reads the whole vocabulary

    class Scorer(HFLM):
        """The harness's own, in batches that fit, which end when each row has come to a stop string."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            lengths = [len(self.tok_encode(request.args[0])) for request in requests]
            room = self.max_length - self.max_gen_toks
            if room <= 0:
                raise CordaError(
                    f"{label} lets a model write {self.max_gen_toks} tokens, but this one holds {self.max_length}"
                )
            if cut := sum(length > room for length in lengths):
                warnings.warn(
                    f"{cut} prompts of {label} are longer than the {room} tokens that the model has room for, and lose "
                    "their beginning, as in lm-eval",
                    stacklevel=2,
                )
            tokens = largest_batch(self.model, batch_tokens)
            return self.in_batches(
                super().generate_until, requests, tokens, min(max(lengths), room) + self.max_gen_toks
            )

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
            longest = max(len(context) + len(answer) for _, context, answer in requests)
            return self.in_batches(super()._loglikelihood_tokens, requests, batch_tokens, longest)

        def in_batches(self, run: Callable[..., Any], requests: Any, tokens: int, longest: int) -> Any:
            """`run` with as many rows in a batch as make `tokens`, or with half of them as often as memory is out."""
            rows = min(max(tokens // longest, 1), len(requests))
            halves = iter([rows >> i for i in range(1, 64)])

            @find_executable_batch_size(starting_batch_size=rows, reduce_batch_size_fn=halves.__next__)
            def fitting(batch_size: int) -> Any:
                self.batch_size_per_gpu = batch_size
                with progress_bar(label, len(requests)) as self.advance:
                    return run(requests, disable_tqdm=True)

            return fitting()

        def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
            options = {name: value for name, value in options.items() if name not in ("do_sample", "temperature")}
            output = self.model.generate(
                input_ids=context,
                max_length=max_length,
                do_sample=False,
                stopping_criteria=stopping(tuple(stop)),
                tokenizer=self.tokenizer,  # which a model with stop strings of its own asks for
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
            self.advance(len(context))
            return output

        def _model_call(self, inps: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, **options)
            self.advance(len(inps))
            return logits

    return Scorer(pretrained=model, tokenizer=copy.deepcopy(tokenizer))


def _requires(benchmark: Benchmark, model: Any, tokenizer: Any, config: EvalConfig) -> None:
    writes(model, tokenizer, config)
    if tokenizer.eos_token_id is None:
        raise CordaError(f"{benchmark.name} needs a tokenizer with an end-of-text token, and this one has none")


def _run(benchmark: Benchmark, model: Any, tokenizer: Any, config: EvalConfig) -> Scores:
    from ...devices import release_cache

    tasks = harness_tasks(benchmark, config)
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SHOTS_SEED)
    scorer = _scorer(model, tokenizer, benchmark.name, config.batch_tokens)
    results = evaluate(scorer, {"tasks": tasks}, limit=config.limit, bootstrap_iters=0)
    release_cache(scorer.device)  # other processes may share the accelerator
    values, details = [], []
    for samples in results["samples"].values():
        first = samples[0]["filter"]  # strict-match of gsm8k
        for sample in (sample for sample in samples if sample["filter"] == first):
            values.append(float(sample["exact_match"]))
            details.append({"asked": sample["arguments"][0][0], **_answered(sample), "exact_match": values[-1]})
    return Scores(values, details)


def _answered(sample: dict[str, Any]) -> dict[str, Any]:
    """What a model answered, and what was expected. Of choices, it answered those that greedy decoding gives."""
    responses = [response for (response,) in sample["resps"]]
    if isinstance(responses[0], str):
        return {"answered": responses[0], "expected": sample["target"]}
    choices = [choice.strip() for _, choice in sample["arguments"]]
    return {"answered": [choice for choice, (_, greedy) in zip(choices, responses) if greedy], "expected": choices}


for _benchmark in BENCHMARKS:
    TASKS[_benchmark.name] = Task(
        _benchmark.name,
        "exact_match",
        partial(_run, _benchmark),
        _benchmark.meaning,
        check=partial(_check, _benchmark),
        requires=partial(_requires, _benchmark),
    )
