"""MT-Bench through the command line, against an endpoint on this machine that speaks the protocol, or does not."""

import json
import re
import signal
import threading
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
from helpers import CHATML, saved, tuned, with_template

from corda_lora import cli
from corda_lora.adapters.lora import load_adapter
from corda_lora.config import EvalConfig, JudgeConfig
from corda_lora.evaluation.tasks import mt_bench

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["a poem", "a b"]},
    {"question_id": 101, "category": "reasoning", "turns": ["who is it?", "why?"], "reference": ["me", "so {it} is"]},
    {"question_id": 111, "category": "math", "turns": ["1+1?", "and 2+2?"], "reference": ["2", "4"]},
    {"question_id": 151, "category": "humanities", "turns": ["what is art?", "more"]},
]
SINGLE = "[Question]\n{question}\n[Answer]\n{answer}"
BOTH = "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}"
PROMPTS = {
    "single-v1": SINGLE,
    "single-math-v1": SINGLE + " [Right] {ref_answer_1}",
    "single-v1-multi-turn": BOTH,
    "single-math-v1-multi-turn": BOTH + " [Right] {ref_answer_1} and {ref_answer_2}",
}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(mt_bench, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(mt_bench, "WAITS", (0.0, 0.0))
    monkeypatch.delenv(mt_bench.KEY, raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny.build("llama").save_pretrained(folder)
    with_template(tokenizer, CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "mt_bench").mkdir(parents=True)
    write_lines(folder / "mt_bench" / "question.jsonl", QUESTIONS)
    prompts = [{"name": n, "system_prompt": f"You judge ({n}).", "prompt_template": p} for n, p in PROMPTS.items()]
    write_lines(folder / "judge_prompts.jsonl", [*prompts, {**prompts[0], "name": "pair-v2"}])
    return folder


@pytest.fixture
def evaluate(model, data, tmp_path, capsys):
    """`corda eval --tasks mt_bench`: the score of the base model, or None, and what was said. `code` is the exit code
    that it has to end with."""

    def run(*arguments, where=model, code=0):
        command = ["eval", "--model", where, "--tasks", "mt_bench", "--data_dir", data, "--json"]
        command += ["--judge.folder", tmp_path / "mt", *arguments]
        with pytest.raises(SystemExit) if code else nullcontext() as stopped:
            cli.main([str(word) for word in command])
        assert not code or stopped.value.code == code
        said = capsys.readouterr()
        results = json.loads(said.out)["results"]["tasks"]["mt_bench"]
        assert results["base"]["samples"] == len(QUESTIONS)
        return results["base"].get("score"), " ".join(said.err.split())

    return run


def rated(number):
    """What an endpoint answers."""
    words = f"It is short. Rating: [[{number:g}]]"
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": words}}]})


@pytest.fixture
def judge():
    """An endpoint. `answer` maps (what is asked, how many times it was asked before) to a rating, a status, text as it
    is, or a way not to answer. It is asked for "" whether it is there."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_GET(self):
            if "drip" in str(answer := self.server.answer("", 0)):
                self.drip(answer)

        def drip(self, what):
            """A right answer at last, if somebody waits for it."""
            with suppress(OSError):
                if what == "dripping headers":
                    self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Wait: ")
                else:
                    self.send_response(200)
                    self.end_headers()
                for _ in range(200):
                    self.server.end.wait(0.02)
                    self.wfile.write(b" ")
                self.server.heard_out = True
                self.wfile.write((b"\r\n\r\n" if what == "dripping headers" else b"") + rated(7.0).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][1]["content"]
            with self.server.lock:
                before = sum(call["messages"][1]["content"] == asked for call in self.server.calls)
                self.server.calls.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
            answer = self.server.answer(asked, before)
            if answer == "hang":
                self.server.end.wait()
                return
            if answer in ("drip", "dripping headers"):
                self.drip(answer)
                return
            status = answer if isinstance(answer, int) else 200
            text = answer if isinstance(answer, str) else json.dumps(answer)
            text = rated(answer) if isinstance(answer, float) else text
            self.send_response(status)
            self.send_header("Retry-After", "0")
            if answer == "zipped":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    server.calls, server.lock, server.end, server.heard_out = [], threading.Lock(), threading.Event(), False
    server.answer = lambda asked, before: 7.0
    server.options = ["--judge.url", f"http://127.0.0.1:{server.server_port}/v1", "--judge.model", "a/judge"]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.end.set()
    server.shutdown()
    thread.join()
    server.server_close()


def the_file(folder):
    (path,) = folder.iterdir()
    return path


def test_answers_alone_are_written_as_fastchat_does_and_go_on_where_they_were_broken_off(evaluate, tmp_path):
    score, said = evaluate()
    assert score is None
    assert "mt_bench: 4 questions are answered, but not judged" in said
    path = the_file(tmp_path / "mt" / "model_answer")
    lines = read_lines(path)
    assert [line["question_id"] for line in lines] == [81, 101, 111, 151]  # grouped by temperature: 0.7, 0, 0.1
    assert all(line["model_id"] == path.stem and len(line["choices"][0]["turns"]) == 2 for line in lines)
    assert all(0 < len(text) <= mt_bench.ANSWER_TOKENS for line in lines for text in line["choices"][0]["turns"])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 30])  # killed: one line and a part of the next
    evaluate()
    again = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["choices"] for line in again] == [line["choices"] for line in lines]
    assert again[0].encode() == whole.splitlines()[0]


def test_a_bar_counts_answers_and_notes_tokens(evaluate, monkeypatch):
    bars = []

    @contextmanager
    def recording(label, total, show=True):
        steps, notes = [], []
        bars.append((label, total, steps, notes))

        def advance(by=1, note=None):
            steps.append(by)
            notes.append(note)

        yield advance

    monkeypatch.setattr(mt_bench, "progress_bar", recording)
    evaluate("--batch_tokens", 24, "--limit", 4)
    ((label, total, steps, notes),) = bars
    assert (label, total) == ("mt_bench", 2 * len(QUESTIONS))
    assert [by for by in steps if by] == [1, 1, 2, 2, 1, 1]  # both turns of a poem; of two questions at 0; of art
    assert notes[:3] == ["token 1 of at most 6", "token 2 of at most 6", "token 3 of at most 6"]
    assert notes[steps.index(1) - 1] == ""


def test_a_judge_is_shown_what_fastchat_shows_and_asked_once(evaluate, judge, tmp_path, monkeypatch):
    monkeypatch.setenv(mt_bench.KEY, "sk-secret")
    judge.answer = lambda asked, before: 10.0 if "Q1" in asked else 4.0
    score, said = evaluate(*judge.options, "--judge.price", 5)
    assert score == 7.0
    cost = re.search(r"8 calls to a/judge at \S+ with about ([\d,]+) tokens shown and at most 16,384 said; "
                     r"at 5 a million tokens at most ([\d.]+)", said)  # fmt: skip
    shown = int(cost[1].replace(",", ""))
    assert cost[2] == f"{5 * (shown + 16384) / 1e6:.2f}"
    assert {call["path"] for call in judge.calls} == {"/v1/chat/completions"}
    assert {call["key"] for call in judge.calls} == {"Bearer sk-secret"}
    assert {(call["model"], call["temperature"]) for call in judge.calls} == {("a/judge", 0)}
    answers = {
        line["question_id"]: line["choices"][0]["turns"] for line in read_lines(the_file(tmp_path / "mt/model_answer"))
    }
    asked = {call["messages"][1]["content"]: call["messages"][0]["content"] for call in judge.calls}
    first, second = answers[101]
    math = f"Q1 who is it? A1 {first} Q2 why? A2 {second} [Right] me and so {{it}} is"
    assert asked[math] == "You judge (single-math-v1-multi-turn)."
    assert asked[f"[Question]\na poem\n[Answer]\n{answers[81][0]}"] == "You judge (single-v1)."
    path = the_file(tmp_path / "mt" / "model_judgment")
    assert path.name == "a--judge_single.jsonl"
    assert "sk-secret" not in path.read_text()
    written = {(line["question_id"], line["turn"]): line["score"] for line in read_lines(path)}
    assert written == {(q["question_id"], t): 4.0 if t == 1 else 10.0 for q in QUESTIONS for t in (1, 2)}
    judge.calls.clear()
    score, said = evaluate(*judge.options)
    assert score == 7.0
    assert not judge.calls
    assert "calls to" not in said


def test_what_an_endpoint_refuses_or_garbles_is_counted_and_asked_again(evaluate, judge):
    def misbehave(asked, before):
        if "a poem" in asked:
            return (429, 503, 8.0)[min(before, 2)]  # well again at the third time
        if "art" in asked:
            return "<html>busy</html>" if "Q1" in asked else {"choices": []}
        if "1+1" in asked:
            return 400 if "Q1" in asked else 500
        return 6.0 if "Q1" in asked else {"choices": [{"message": {"content": "I would rather not say."}}]}

    judge.answer = misbehave
    score, said = evaluate(*judge.options)
    assert score == 7.0  # 8 and 8 of the first question, 6 of the second
    assert "5 of 8 judgments are missing" in said
    for reason in (
        "an answer that is none of the protocol's: 2",
        "no rating in what was said: 1",
        "HTTP 400: 1",
        "HTTP 500: 1",
    ):
        assert reason in said
    tried = [call["messages"][1]["content"] for call in judge.calls]
    assert sum("1+1" in asked and "Q1" not in asked for asked in tried) == 3
    assert sum("1+1" in asked and "Q1" in asked for asked in tried) == 1
    judge.calls.clear()
    judge.answer = lambda asked, before: 5.0
    score, said = evaluate(*judge.options)
    assert len(judge.calls) == 5
    assert score == pytest.approx((8 + 5.5 + 5 + 5) / 4)
    assert "missing" not in said


NO_ANSWER = "an answer that is none of the protocol's"
NEVER = {
    "closed": "no connection",
    "hang": "time-out",
    "drip": "time-out",
    "dripping headers": "time-out",
    "flood": NO_ANSWER,
    "zipped": NO_ANSWER,
    401: "HTTP 401, is OPENAI_API_KEY right?",
}


@pytest.mark.parametrize("how", NEVER)
def test_an_endpoint_that_never_answers_costs_a_few_calls(evaluate, judge, monkeypatch, how, tmp_path):
    monkeypatch.setattr(mt_bench, "HOPELESS", 2)
    monkeypatch.setattr(mt_bench, "AT_ONCE", 1)
    if NEVER[how] == "time-out":
        monkeypatch.setattr(mt_bench, "SECONDS", 0.1)
        monkeypatch.setattr(mt_bench, "PATIENCE", 1.0)
    if how == "flood":
        monkeypatch.setattr(mt_bench, "LONGEST", 2000)
    judge.answer = lambda asked, before: " " * 2000 + rated(7.0) if how == "flood" else how
    options = [*judge.options]
    if how == "closed":
        options[1] = "http://127.0.0.1:1"
    score, said = evaluate(*options, code=2)
    assert score is None
    assert (
        f"8 of 8 judgments are missing (not asked, as 2 calls failed one after the other: 6, {NEVER[how]}: 2)" in said
    )
    assert "there is no score" in said
    end = "corda eval: mt_bench has no score for the base model, as a/judge at http"
    assert end in said
    assert said.endswith(f"they are kept in {tmp_path / 'mt'}, and the same command asks again")
    assert len(read_lines(the_file(tmp_path / "mt" / "model_answer"))) == len(QUESTIONS)
    refused = "mt_bench: there is no connection to http://127.0.0.1:1: the answers are written, and judged if"
    assert (refused in said) == (how == "closed")
    assert not judge.heard_out
    if NEVER[how] != "time-out":  # there the last request may not have been read yet
        assert len(judge.calls) == (0 if how == "closed" else 2)


def test_a_model_without_a_chat_template_is_asked_in_alpacas(evaluate, checkpoint):
    assert "no chat template" in evaluate(where=checkpoint)[1]


def test_an_answer_that_has_no_room_is_said(evaluate, data):
    long = [{**question, "turns": ["a " * 150, "b"]} for question in QUESTIONS]
    write_lines(data / "mt_bench" / "question.jsonl", long)
    assert "8 questions leave no room for an answer" in evaluate()[1]


def test_a_name_is_of_the_weights_with_the_adapter_on_or_off(tmp_path):
    base, start, adapted, _ = tuned(split="anchored")
    plain, on = mt_bench.name_of(base), mt_bench.name_of(adapted)
    with adapted.disable_adapter():
        assert mt_bench.name_of(adapted) == plain != on
    saved(adapted, start, tmp_path / "adapter")
    assert mt_bench.name_of(load_adapter(base, tmp_path / "adapter")) == on


def test_both_sides_are_judged_and_the_same_answer_once(evaluate, judge, model, tmp_path, capsys, data):
    _, start, adapted, _ = tuned(split="anchored")
    saved(adapted, start, tmp_path / "adapter")
    command = ["eval", "--model", model, "--tasks", "mt_bench", "--data_dir", data, "--adapter", tmp_path / "adapter"]
    cli.main([str(word) for word in [*command, "--judge.folder", tmp_path / "mt", *judge.options]])
    assert "tasks: score" in capsys.readouterr().out
    judgments = read_lines(tmp_path / "mt" / "model_judgment" / "a--judge_single.jsonl")
    assert len(list((tmp_path / "mt" / "model_answer").iterdir())) == 2
    assert len(judgments) == 16
    assert len(judge.calls) == len({line["user_prompt"] for line in judgments})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "mt_bench needs question.jsonl of FastChat's fastchat/llm_judge/data, which is not on the hub: give --"),
        (["--data_dir", "empty"], "mt_bench needs question.jsonl"),
        (["--data_dir", "data", "--judge.url", "http://x"], "give both judge.url and judge.model"),
        (["--data_dir", "data", "--judge.url", "x", "--judge.model", "y"], "must begin with http:// or https://"),
        (["--data_dir", "one_turn"], "the turns of question 1 are not two texts"),
        (["--data_dir", "twice"], "question.jsonl has two questions 81: answers are known by these numbers"),
        (["--data_dir", "columns"], "line 1 is not as FastChat writes it"),
        (["--data_dir", "prompts", "--judge.url", "http://x", "--judge.model", "y"], "no prompt single-math-v1,"),
    ],
)
def test_bad_input_is_a_sentence_before_the_model_is_loaded(data, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "one_turn", "twice", "columns", "prompts"):
        (tmp_path / name).mkdir()
    write_lines(tmp_path / "one_turn" / "question.jsonl", [{"question_id": 1, "category": "math", "turns": ["a"]}])
    write_lines(tmp_path / "twice" / "question.jsonl", [*QUESTIONS, QUESTIONS[0]])
    write_lines(tmp_path / "columns" / "question.jsonl", [{"prompt": "a"}])
    write_lines(tmp_path / "prompts" / "question.jsonl", QUESTIONS)
    prompts = [line for line in read_lines(data / "judge_prompts.jsonl") if line["name"] != "single-math-v1"]
    write_lines(tmp_path / "prompts" / "judge_prompts.jsonl", prompts)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", "nowhere", "--tasks", "mt_bench", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_a_url_may_name_the_whole_path(evaluate, judge, path):
    judge.options[1] = judge.options[1].replace("/v1", path)
    assert evaluate(*judge.options)[0] == 7.0
    assert {call["path"] for call in judge.calls} == {"/v1/chat/completions"}


@pytest.mark.parametrize("said", ["[[1000]]", "as of [2024], good", "[[0]]", "\ud800", None])
def test_what_is_no_rating_is_none(evaluate, judge, said):
    judge.answer = lambda asked, before: {"choices": [{"message": {"content": said}}]}
    score, shown = evaluate(*judge.options, code=2)
    assert score is None
    assert "8 of 8 judgments are missing (no rating in what was said: 8)" in shown


def test_an_answer_with_unicodes_ends_of_lines_is_read_again(tmp_path):
    line = {"question_id": 81, "choices": [{"turns": ["one\u2028two\x85three", "b"]}]}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    mt_bench.add_line(tmp_path / "ours.jsonl", line)
    for path in tmp_path.iterdir():
        assert [read["choices"] for read in mt_bench.read_lines(path, mt_bench.ANSWER, False)] == [line["choices"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--judge.url", "http://[::1"], "judge.url is 'http://[::1', which is no address"),
        (["--judge.url", "http://127.0.0.1:99999"], "which is no address: Port out of range"),
        (["--judge.url", "http://127.0.0.1:1"], "the key in OPENAI_API_KEY has a character that no key has"),
        (["--judge.folder", __file__], "is a file"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_the_model_is_loaded(
    arguments, sentence, data, monkeypatch, capsys
):
    monkeypatch.setenv(mt_bench.KEY, "sk-\u043a\u043b\u044e\u0447")
    command = ["eval", "--model", "nowhere", "--tasks", "mt_bench", "--data_dir", str(data), "--judge.model", "judge"]
    arguments = arguments if "--judge.url" in arguments else [*arguments, "--judge.url", "http://127.0.0.1:1"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, *arguments])
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_file_in_another_encoding_is_refused(data, capsys):
    path = data / "mt_bench" / "question.jsonl"
    path.write_bytes(json.dumps(QUESTIONS[0]).replace("a poem", "caf\xe9").encode("latin-1"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", "nowhere", "--tasks", "mt_bench", "--data_dir", str(data)])
    assert stopped.value.code == 2
    assert "question.jsonl is not UTF-8" in " ".join(capsys.readouterr().err.split())


def test_a_model_that_writes_nothing_is_refused(data, tmp_path, capsys):
    tiny.save_encoder(tmp_path / "encoder")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "--model", str(tmp_path / "encoder"), "--tasks", "mt_bench", "--data_dir", str(data)])
    assert stopped.value.code == 2
    assert "BertForMaskedLM is no causal language model" in capsys.readouterr().err


def test_an_interruption_waits_for_no_call(evaluate, judge, monkeypatch):
    monkeypatch.setattr(mt_bench, "SECONDS", 10.0)

    once = iter([signal.SIGINT])

    def interrupt(asked, before):
        for number in once:
            signal.pthread_kill(threading.main_thread().ident, number)
        return "hang"

    judge.answer = interrupt
    with pytest.raises(SystemExit) as stopped:
        evaluate(*judge.options)
    assert stopped.value.code == 130
    assert len(judge.calls) <= mt_bench.AT_ONCE


def test_a_comparison_notices_that_questions_or_prompts_change(data):
    config = EvalConfig(tasks="mt_bench", data_dir=data, judge=JudgeConfig("http://127.0.0.1:1", "judge"))
    seen = [mt_bench.check(config)]
    for path in (data / "mt_bench" / "question.jsonl", data / "judge_prompts.jsonl"):
        path.write_text(path.read_text().replace("a poem", "a song").replace("You judge", "Judge"))
        seen.append(mt_bench.check(config))
    assert seen[0] != seen[1] != seen[2]


def test_what_was_measured_is_written_where_one_side_has_no_judgment(evaluate, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(mt_bench, "HOPELESS", 9)
    _, start, adapted, _ = tuned(split="anchored")
    saved(adapted, start, tmp_path / "adapter")
    judge.answer = lambda asked, before: 401 if len(judge.calls) <= 8 else 7.0  # the base model is first
    options = ["--adapter", tmp_path / "adapter", *judge.options, "--output", tmp_path / "results"]
    score, said = evaluate(*options, code=2)
    assert score is None
    assert "mt_bench has no score for the base model" in said
    assert said.endswith("and another --output asks again")
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    assert written["results"]["tasks"]["mt_bench"]["tuned"]["score"] == 7.0
