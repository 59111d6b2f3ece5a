"""MT-Bench (Zheng et al., arXiv 2306.05685): 80 questions of two turns, answered by the model and judged by another.

Questions, judge prompts, temperatures and the reading of a rating are FastChat's (fastchat/llm_judge), and so are the
files in `judge.folder`, so that its tools read them:

    model_answer/MODEL.jsonl             a line for each question that is answered
    model_judgment/JUDGE_single.jsonl    a line for each answer that is judged

Lines are written as they come. What is there already is neither answered nor judged again.
"""

import asyncio
import copy
import hashlib
import json
import math
import os
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any, NamedTuple

from ...config import CordaError, EvalConfig, JudgeConfig
from ...data.rows import read_text
from ...files import check_writable
from ...progress import console, progress_bar
from .registry import Scores, task

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # other categories: greedy
ANSWER_TOKENS = 1024  # at which an answer is cut
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories whose judge is shown a right answer
KINDS = {(ref, turn): f"single{'-math' * ref}-v1{'-multi-turn' * (turn == 2)}" for ref in (0, 1) for turn in (1, 2)}
NUMBER = (int, str)  # of a question
ANSWER = {"question_id": NUMBER, "choices": list}  # the keys of a line, and the types of their values
JUDGMENT = {"user_prompt": str, "judgment": str, "score": (int, float)}
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
JUDGE_TOKENS = 2048
KEY = "OPENAI_API_KEY"
HINTS = {401: f", is {KEY} right?", 403: f", is {KEY} right?", 404: ", are --judge.url and --judge.model right?"}
SECONDS = 120.0  # until a call has timed out
PATIENCE = 10.0  # the same of the first, which asks for nothing
LONGEST = 2**24  # bytes of an answer
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before a call is tried again
AT_ONCE = 4  # calls
HOPELESS = 5  # calls that failed one after the other: no more are made
# A tokenizer without a chat template gets Alpaca's, in which CorDA's authors train.
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% if loop.first %}{{ bos_token or '' }}Below is "
    "an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "{% endif %}### Instruction:\n{{ message['content'] }}\n\n### Response:"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
)


class Call(NamedTuple):
    """What a judge is asked: about one turn of one question."""

    question: dict[str, Any]
    turn: int
    prompt: dict[str, Any]
    text: str


def mean(values: Sequence[float], labels: Sequence[float]) -> float:
    """The mean of the questions that have a rating; NaN if none has."""
    rated = [value for value in values if not math.isnan(value)]
    return fmean(rated) if rated else math.nan


def check(config: EvalConfig) -> list[Any]:
    """The questions, and the judge's prompts. Raises CordaError if they, or what judging needs, cannot be read, or
    nothing can be written into the judge's folder."""
    questions = read_questions(config)
    check_writable(config.judge.folder / "model_answer")
    if not config.judge.url:
        return questions
    prompts = read_prompts(config)
    calls_of(questions, {q["question_id"]: ["", ""] for q in questions}, prompts)
    _key()
    return [*questions, prompts]


def finish(name: str, tokenizer: Any, config: EvalConfig) -> Scores | None:
    """The scores of answers that are kept under this name, where judgments were missing. None if nothing answers at the
    judge's endpoint still, or the answers are not here."""
    questions, path = read_questions(config), answers_of(name, config.judge)
    answers = _turns(read_lines(path, ANSWER, whole=False)) if path.is_file() else {}
    if any(question["question_id"] not in answers for question in questions) or not _is_there(config.judge):
        return None
    return _scores(questions, answers, name, tokenizer, config)


MEANING = "answers to two turns, judged by --judge.model: 1 to 10"


@task("mt_bench", "score", MEANING, mean=mean, check=check, finish=finish)
def mt_bench(model: Any, tokenizer: Any, config: EvalConfig) -> Scores:
    """The value of a question is the mean of its turns' ratings, and NaN if there is none."""
    questions, name, judge = read_questions(config), name_of(model), config.judge
    path = answers_of(name, judge)
    if judge.url and not _is_there(judge):
        console.print(
            f"mt_bench: there is no connection to {judge.url}: the answers are written, and judged if there is then"
        )
    answers = answered(model, tokenizer, questions, path, config.batch_tokens)
    if not judge.url:
        warnings.warn(
            f"mt_bench: {len(answers)} questions are answered, but not judged: the answers are in {path}; give "
            "--judge.url and --judge.model for a score",
            stacklevel=2,
        )
    return _scores(questions, answers, name, tokenizer, config)


def answers_of(name: str, judge: JudgeConfig) -> Path:
    return judge.folder / "model_answer" / f"{name}.jsonl"


def _scores(
    questions: Sequence[dict[str, Any]], answers: dict[Any, list[str]], name: str, tokenizer: Any, config: EvalConfig
) -> Scores:
    """The scores of answers that a model gave, by what the judge has said or says now."""
    ratings: dict[tuple[Any, int], float] = {}
    if config.judge.url:
        ratings = judged(calls_of(questions, answers, read_prompts(config)), name, config.judge, tokenizer)
    values, details = [], []
    for question in questions:
        number = question["question_id"]
        rated = [ratings.get((number, turn)) for turn in (1, 2)]
        values.append(mean([math.nan if rating is None else rating for rating in rated], []))
        details.append(
            {
                "question": number,
                "category": question["category"],
                "asked": question["turns"],
                "answered": answers[number],
                "expected": question["reference"],
                "ratings": rated,
            }
        )
    missing = config.judge.url and len(ratings) < 2 * len(questions)
    return Scores(values, details, unfinished=name if missing else "")


# --- files -----------------------------------------------------------------------------------------------------------


def read_questions(config: EvalConfig) -> list[dict[str, Any]]:
    """The questions, each with a "reference": right answers to both turns, or None.

    Raises CordaError if there is no such file, or it is of another form.
    """
    path = _find(config, "question.jsonl")
    questions = read_lines(path, {"question_id": NUMBER, "category": str, "turns": list})[: config.limit]
    references: dict[Any, list[str]] = {}
    if right := next((p for p in _places(config, "reference_answer/gpt-4.jsonl") if p.is_file()), None):
        references = _turns(read_lines(right, ANSWER))
    numbers = set()
    for question in questions:
        number = question["question_id"]
        if not _are_two(question["turns"]):
            raise CordaError(f"{path}: the turns of question {number} are not two texts")
        if number in numbers:
            raise CordaError(f"{path} has two questions {number}: answers are known by these numbers")
        numbers.add(number)
        found = references.get(number, question.get("reference"))
        question["reference"] = found if _are_two(found) else None
    if not questions:
        raise CordaError(f"{path} has no questions")
    return questions


def _turns(answers: Sequence[dict[str, Any]]) -> dict[Any, list[str]]:
    """Both turns of the first choice of each line of answers, by question; lines without them are left out."""
    turns = {}
    for line in answers:
        first = line["choices"][0] if line["choices"] else None
        if isinstance(first, dict) and _are_two(first.get("turns")):
            turns[line["question_id"]] = first["turns"]
    return turns


def _are_two(texts: Any) -> bool:
    return isinstance(texts, list) and len(texts) == 2 and all(isinstance(text, str) for text in texts)


def read_prompts(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """The judge's prompts by name. Raises CordaError if one is missing."""
    path = _find(config, "judge_prompts.jsonl")
    texts = {"name": str, "system_prompt": str, "prompt_template": str}
    prompts = {line["name"]: line for line in read_lines(path, texts)}
    if missing := set(KINDS.values()) - prompts.keys():
        raise CordaError(f"{path} has no prompt {min(missing)}, which FastChat's has")
    return prompts


def _places(config: EvalConfig, name: str) -> list[Path]:
    """Where a file of FastChat's may be: in the data's directory, in its mt_bench/, or beside the answers."""
    folder = config.data_dir
    return [*([] if folder is None else [folder / "mt_bench" / name, folder / name]), config.judge.folder / name]


def _find(config: EvalConfig, name: str) -> Path:
    """Raises CordaError if the file is in none of these places."""
    found = next((path for path in _places(config, name) if path.is_file()), None)
    if found is None:
        where = f"{config.data_dir} and {config.judge.folder} have none" if config.data_dir else "give --data_dir"
        raise CordaError(
            f"mt_bench needs {name} of FastChat's fastchat/llm_judge/data, which is not on the hub: {where}"
        )
    return found


def read_lines(path: Path, types: dict[str, Any], whole: bool = True) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Args:
        types: the keys that each has, with the types of their values.
        whole: raise for a line that is none, and do not leave it out: a process that was killed may leave half a line.

    Raises CordaError if there is such a line.
    """
    read = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no character
            fits = all(isinstance(value[key], kind) for key, kind in types.items())
        except (ValueError, TypeError, LookupError, RecursionError):
            fits = False
        if fits:
            read.append(value)
        elif whole and line.strip():
            raise CordaError(f"{path} line {number} is not as FastChat writes it: an object with {', '.join(types)}")
    return read


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line in one call, so that several processes can write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line | {"tstamp": time.time()}) + "\n"  # in ASCII, as what a judge says may be no Unicode
    if path.is_file() and (size := path.stat().st_size):
        with open(path, "rb") as file:
            file.seek(size - 1)
            text = text if file.read() == b"\n" else "\n" + text  # after half a line
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())


# --- answers ---------------------------------------------------------------------------------------------------------


def name_of(model: Any) -> str:
    """The name that answers are kept under: the model's, and a digest of its weights, with the adapter on or off."""
    off = any(getattr(module, "disable_adapters", None) is True for module in model.modules())
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if not (off and re.search(r"\.(lora_\w+|modules_to_save)\.", name)):
            numbers = tensor.detach().flatten()[:256].float().cpu().numpy()
            digest.update(str(tuple(tensor.shape)).encode() + numbers.tobytes())
    path = Path(getattr(model.config, "_name_or_path", "") or "model")
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', path.name)}-{digest.hexdigest()[:8]}"


def answered(
    model: Any, tokenizer: Any, questions: Sequence[dict[str, Any]], path: Path, batch_tokens: int
) -> dict[Any, list[str]]:
    """The answers to both turns of each question, by its id, out of the file or from the model."""
    import torch

    if not tokenizer.chat_template:
        console.print("mt_bench: the tokenizer has no chat template, so the questions are put in Alpaca's")
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = ALPACA
    known = _turns(read_lines(path, ANSWER, whole=False)) if path.is_file() else {}
    cut = 0
    batches = _batches(questions, known, batch_tokens)
    with progress_bar("mt_bench", 2 * sum(map(len, batches))) as advance:
        for batch in batches:
            torch.manual_seed(0)
            turns, dropped = _answer(model, tokenizer, batch, advance)
            cut += dropped
            for question, texts in zip(batch, turns):
                if (number := question["question_id"]) not in known:
                    choices = [{"index": 0, "turns": texts}]
                    digest = hashlib.sha256(f"{path.stem} {number}".encode()).hexdigest()[:22]
                    line = {"question_id": number, "answer_id": digest, "model_id": path.stem, "choices": choices}
                    add_line(path, line)
                    known[number] = texts
    if cut:
        warnings.warn(f"mt_bench: {cut} questions leave no room for an answer in the model's context", stacklevel=2)
    return {question["question_id"]: known[question["question_id"]] for question in questions}


def _batches(
    questions: Sequence[dict[str, Any]], known: dict[Any, list[str]], batch_tokens: int
) -> list[list[dict[str, Any]]]:
    """Questions of one temperature, as many as fit; only batches in which one is not answered. A batch is drawn with
    one seed, so its answers are the same where it is answered again."""
    size = max(1, batch_tokens // (2 * ANSWER_TOKENS))
    groups: dict[float, list[dict[str, Any]]] = {}
    for question in questions:
        groups.setdefault(TEMPERATURES.get(question["category"], 0.0), []).append(question)
    batches = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return [batch for batch in batches if any(question["question_id"] not in known for question in batch)]


def _answer(
    model: Any, tokenizer: Any, batch: Sequence[dict[str, Any]], advance: Callable[..., None]
) -> tuple[list[list[str]], int]:
    """The answers to both turns of questions of one temperature, which advance a bar, and how many had no room."""
    from ...data.batches import Encoded
    from ...data.chats import render_question
    from ..generation import generate

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    chats: list[list[dict[str, str]]] = [[] for _ in batch]
    cut = 0
    for turn in (0, 1):
        for chat, question in zip(chats, batch):
            chat.append({"role": "user", "content": question["turns"][turn]})
        texts = [render_question(tokenizer, chat) for chat in chats]
        prompts = [Encoded(list(tokenizer(text, add_special_tokens=False).input_ids), []) for text in texts]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt.ids) < limit]
        cut += len(prompts) - len(fitting)
        said = [""] * len(prompts)
        if fitting:
            shown = [prompts[i] for i in fitting]
            room = min(ANSWER_TOKENS, limit - max(len(prompt.ids) for prompt in shown))
            temperature = TEMPERATURES.get(batch[0]["category"], 0.0)
            for i, text in zip(fitting, generate(model, tokenizer, shown, int(room), temperature, advance=advance)):
                said[i] = text.strip()
        advance(len(batch))
        for chat, text in zip(chats, said):
            chat.append({"role": "assistant", "content": text})
    return [[chat[1]["content"], chat[3]["content"]] for chat in chats], cut


# --- the judge -------------------------------------------------------------------------------------------------------


def calls_of(
    questions: Sequence[dict[str, Any]], answers: dict[Any, list[str]], prompts: dict[str, dict[str, Any]]
) -> list[Call]:
    """What the judge is asked about each turn of each question.

    Raises CordaError if a prompt has a field that FastChat's has not.
    """
    calls = []
    for question in questions:
        asked, said, right = question["turns"], answers[question["question_id"]], question["reference"]
        compared = right is not None and question["category"] in WITH_REFERENCE
        fields = {"question": asked[0], "answer": said[0]}
        fields |= {f"question_{i}": text for i, text in enumerate(asked, 1)}
        fields |= {f"answer_{i}": text for i, text in enumerate(said, 1)}
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(right or [], 1)}
        for turn in (1, 2):
            prompt = prompts[KINDS[compared, turn]]
            try:
                calls.append(Call(question, turn, prompt, prompt["prompt_template"].format(**fields)))
            except (LookupError, ValueError, AttributeError) as error:
                raise CordaError(
                    f"the judge's prompt {prompt['name']} has another field than FastChat's: {error}"
                ) from error
    return calls


def judged(calls: Sequence[Call], name: str, judge: JudgeConfig, tokenizer: Any) -> dict[tuple[Any, int], float]:
    """Ratings by question and turn, out of the file or from the judge. The same answer to the same question is judged
    once, whatever model gave it. What the judge does not rate is left out, counted, and said."""
    path = judge.folder / "model_judgment" / f"{judge.model.replace('/', '--')}_single.jsonl"
    lines = read_lines(path, JUDGMENT, whole=False) if path.is_file() else []
    known = {line["user_prompt"]: line for line in lines if line["score"] != -1}
    here = {line["user_prompt"] for line in known.values() if line.get("model") == name}
    todo = [call for call in calls if call.text not in known]
    if todo:
        console.print(cost(todo, judge, tokenizer))
    missing = Counter[str]()
    for call, said in _said(todo, judge):
        score, why = (-1.0, said) if isinstance(said, _Failure) else (rating(said), "no rating in what was said")
        if score == -1:
            missing[str(why)] += 1
        if not isinstance(said, _Failure):
            known[call.text] = {"judgment": said, "score": score}
            _write(path, call, name, judge, known[call.text])
            here.add(call.text)
    ratings = {}
    for call in calls:
        line = known.get(call.text)
        if line is not None and line["score"] != -1:
            ratings[call.question["question_id"], call.turn] = float(line["score"])
            if call.text not in here:
                _write(path, call, name, judge, line)
    if missing:
        reasons = ", ".join(f"{why}: {count}" for why, count in missing.most_common())
        outcome = "the mean is of the others" if ratings else "there is no score"
        warnings.warn(
            f"mt_bench: {missing.total()} of {len(calls)} judgments are missing ({reasons}); {outcome}, and the same "
            "command asks for these again",
            stacklevel=2,
        )
    return ratings


def _write(path: Path, call: Call, name: str, judge: JudgeConfig, line: dict[str, Any]) -> None:
    add_line(
        path,
        {
            "question_id": call.question["question_id"],
            "model": name,
            "judge": [judge.model, call.prompt["name"]],
            "user_prompt": call.text,
            "judgment": line["judgment"],
            "score": line["score"],
            "turn": call.turn,
        },
    )


def cost(calls: Sequence[Call], judge: JudgeConfig, tokenizer: Any) -> str:
    """What judging takes, in a line. The judge's tokens are counted with the model's tokenizer."""
    shown = sum(len(tokenizer(call.prompt["system_prompt"] + call.text).input_ids) for call in calls)
    said = JUDGE_TOKENS * len(calls)
    line = f"mt_bench: {len(calls)} calls to {judge.model} at {judge.url}, with about {shown:,} tokens shown"
    line += f" and at most {said:,} said"
    if judge.price is None:
        return line
    return f"{line}; at {judge.price:g} a million tokens at most {judge.price * (shown + said) / 1e6:.2f}"


def rating(judgment: str) -> float:
    """The rating in what a judge said; -1 if there is none, or none from 1 to 10."""
    match = next((found for pattern in RATINGS if (found := pattern.search(judgment))), None)
    return float(match[1]) if match and 1 <= float(match[1]) <= 10 else -1.0


def _base(judge: JudgeConfig) -> str:
    """The endpoint without the path of a call, as documents of endpoints often name the whole."""
    return re.sub(r"(/chat/completions)?/*$", "", judge.url)


def _is_there(judge: JudgeConfig) -> bool:
    """Whether something answers at the endpoint, be it that it has no such page."""
    import httpx

    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook's own has a loop of events already
            thread.submit(_called, judge, PATIENCE).result()
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError):
        return False
    except (httpx.HTTPError, ValueError):
        pass  # it took the call
    return True


class _Failure(str):
    """Why there is no answer."""


def _key() -> str:
    """The endpoint's key, or "". Raises CordaError if it cannot be sent."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise CordaError(f"the key in {KEY} has a character that no key has: copy it once more")
    return key


def _said(calls: Sequence[Call], judge: JudgeConfig) -> Iterator[tuple[Call, str]]:
    """(call, what the judge said, or a `_Failure`) as they come. An interruption waits for no call."""
    failed, lock = 0, threading.Lock()  # calls, one after the other
    waiting, stopped = iter(calls), threading.Event()
    heard: SimpleQueue[tuple[Call, str | Exception]] = SimpleQueue()

    def ask(call: Call) -> str:
        nonlocal failed
        if failed >= HOPELESS:
            return _Failure(f"not asked, as {HOPELESS} calls failed one after the other")
        said = _ask(call, judge, stopped)
        with lock:
            failed = failed + 1 if isinstance(said, _Failure) else 0
        return said

    def work() -> None:
        for call in waiting:
            if stopped.is_set():
                return
            try:
                heard.put((call, ask(call)))
            except Exception as error:
                heard.put((call, error))

    with progress_bar("judging", len(calls)) as advance:
        for _ in range(min(AT_ONCE, len(calls))):
            threading.Thread(target=work, daemon=True).start()  # the process ends without waiting for it
        try:
            for _ in calls:
                call, said = heard.get()
                if isinstance(said, Exception):
                    raise said
                advance()
                yield call, said
        finally:
            stopped.set()


def _ask(call: Call, judge: JudgeConfig, stopped: threading.Event) -> str:
    """What the judge said, or a `_Failure`. Asks again after a time-out, a broken connection, and 429 or 5xx, until
    `stopped` is set."""
    import httpx

    body = {
        "model": judge.model,
        "messages": [
            {"role": "system", "content": call.prompt["system_prompt"]},
            {"role": "user", "content": call.text},
        ],
        "temperature": 0,
        "max_tokens": JUDGE_TOKENS,
    }
    for wait in (*WAITS, None):
        asked_to_wait = 0.0
        try:
            response, said = _called(judge, SECONDS, body)
            if response.status_code == 200:
                return str(json.loads(said)["choices"][0]["message"]["content"])
            failure = _Failure(f"HTTP {response.status_code}{HINTS.get(response.status_code, '')}")
            if response.status_code not in (408, 409, 429) and response.status_code < 500:
                return failure
            with suppress(ValueError):
                asked_to_wait = min(float(response.headers.get("retry-after", 0)), 60)
        except httpx.TimeoutException:
            failure = _Failure("time-out")
        except (httpx.DecodingError, ValueError, LookupError, TypeError, RecursionError):
            return _Failure("an answer that is none of the protocol's")
        except httpx.HTTPError:
            failure = _Failure("no connection")
        if wait is None or stopped.wait(max(wait, asked_to_wait)):
            break
    return failure


def _called(judge: JudgeConfig, seconds: float, body: dict[str, Any] | None = None) -> tuple[Any, bytes]:
    """The response to a call, and what it says. Without a body it is the endpoint itself that is called.

    Raises httpx.ReadTimeout if that is not there after so many seconds (httpx's own time-out is of each read, which is
    a byte of what drips), and ValueError if it is longer than LONGEST.
    """
    import httpx

    method, url = ("POST", f"{_base(judge)}/chat/completions") if body else ("GET", _base(judge))
    headers = {"Authorization": f"Bearer {key}"} if body and (key := _key()) else {}

    async def call() -> tuple[Any, bytes]:
        said = bytearray()
        client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None, connect=seconds / 2))
        async with client, client.stream(method, url, json=body) as response:
            async for part in response.aiter_bytes():
                said += part
                if len(said) > LONGEST:
                    raise ValueError(f"more than {LONGEST} bytes")
        return response, bytes(said)

    try:
        return asyncio.run(asyncio.wait_for(call(), seconds))
    except asyncio.TimeoutError as error:
        raise httpx.ReadTimeout(f"more than {seconds} seconds") from error
