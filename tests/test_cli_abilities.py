"""Several abilities to keep, at the command line: `init`, `train`, `eval` and what is refused."""

import json
import random

import pytest
import torch

from corda_lora.cli import main
from corda_lora.config import ContextConfig, KeepConfig
from corda_lora.evaluation.meter import load_contexts

DRAW = random.Random(0)
FILES = {
    "sums": [{"prompt": f"{i} + {i} =", "response": f" {2 * i}"} for i in range(1, 101)],
    "words": [
        {"prompt": "say " + "".join(DRAW.choices("abcdefgh", k=6)), "response": " " + "".join(DRAW.choices("xyz", k=3))}
        for _ in range(100)
    ],
    "new": [{"prompt": f"{i} - 1 =", "response": f" {i - 1}"} for i in range(10, 90)],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    for name, rows in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(verb, checkpoint, *arguments):
    main([verb, "--model", str(checkpoint), *map(str, arguments)])


def refused(capsys, verb, checkpoint, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(verb, checkpoint, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


BOTH = ["--context", "sums.jsonl", "--context", "words.jsonl", "--context.weight", 3, "--context.ability", "spelling"]
TRAINING = ["--data", "new.jsonl", "--precision", "fp32", "--max_steps", 4, "--batch_size", 4]


@pytest.mark.filterwarnings("ignore:.*fewer than.*is wide")
def test_what_was_mixed_is_kept_in_training_each_at_its_price(folder, checkpoint, capsys, undrawn):
    start = ["--r", 4, *BOTH, "--samples", 80, "--output", "start"]
    run("init", checkpoint, *start)
    record = json.loads((folder / "start" / "corda.json").read_text())
    assert [(a["name"], a["weight"], a["samples"]) for a in record["context"]["abilities"]] == [
        ("sums", 0.25, 80),
        ("spelling", 0.75, 80),
    ]
    assert all(layer["weights"] == [0.25, 0.75] for layer in record["layers"].values())
    assert "`sums` (25%, 80 samples" in (folder / "start" / "README.md").read_text()
    run("init", checkpoint, *start)
    said = capsys.readouterr()
    assert "start is whole already" in said.out
    assert "spelling: 80 samples of" in said.err
    run("train", checkpoint, "--start", "start", *TRAINING, "--keep", 8, "--output", "tuned")
    said = capsys.readouterr()
    assert "keeps sums (80 samples) at a price of 4 nats" in said.err
    assert "keeps spelling (80 samples) at a price of 12 nats" in said.err
    assert "step 4: drift of sums" in said.err
    assert "spelling ██" in said.err or "sums ██" in said.err
    training = json.loads((folder / "tuned" / "training.json").read_text())
    assert training["drift"].keys() == {"sums", "spelling"}
    assert {name: history[-1][3] for name, history in training["drift"].items()} == {"sums": 4.0, "spelling": 12.0}
    assert training["penalties"].keys() == {"drift sums", "drift spelling"}
    run("eval", checkpoint, "--adapter", "tuned", "--keep", "sums.jsonl")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "on samples of sums" in said
    assert "on samples of spelling" in said
    main(["inspect", "--adapter", "tuned", "--output", "page"])
    assert "Predicted drift on kept spelling: " in (said := capsys.readouterr().out.replace("\n", " "))
    assert "Predicted drift on kept sums: " in said
    main(["export", "--model", str(checkpoint), "--adapter", "tuned", "--as", "lora", "--r", "2", "--output", "cut"])
    main(["inspect", "--adapter", "cut", "--output", "page_of_cut"])  # its layers are others
    assert "Predicted drift" not in capsys.readouterr().out
    run("train", checkpoint, "--start", "tuned", *TRAINING, "--output", "again")  # keeps the same at the same prices
    assert "keeps spelling (80 samples) at a price of 12 nats" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*fewer than.*is wide")
def test_prices_that_are_steered_keep_their_sum_and_go_on_from_where_they_were(folder, checkpoint, capsys):
    run("train", checkpoint, *TRAINING, *BOTH, "--keep", 5, "--weights", "validation", "--r", 4, "--output", "tuned",
        "--learning_rate", 1e-2)  # fmt: skip
    drift = json.loads((folder / "tuned" / "training.json").read_text())["drift"]
    assert sum(history[0][3] for history in drift.values()) == pytest.approx(10)
    assert sum(history[-1][3] for history in drift.values()) == pytest.approx(10)
    larger = max(drift, key=lambda name: drift[name][-1][2])
    assert drift[larger][-1][3] > drift[larger][0][3]
    capsys.readouterr()
    run("train", checkpoint, *TRAINING, "--start", "tuned", "--output", "again")
    assert f"at a price of {drift['sums'][-1][3]:g} nats" in capsys.readouterr().err


@pytest.mark.parametrize("own", [["--context.price", 3], ["--context.weight", 2], ["--weights", "validation"]])
def test_what_is_steered_to_a_bound_has_no_price_of_its_own(own, folder, checkpoint, capsys):
    bound = ["--context", "sums.jsonl", "--context", "words.jsonl", *own, "--max_drift", 0.1, "--output", "out"]
    said = refused(capsys, "train", checkpoint, *TRAINING, *bound)
    assert "max_drift steers the price of each context by itself: leave it or weights and prices out" in said


def test_prices_of_their_own():
    contexts = [ContextConfig("sums.jsonl", price=2.0), ContextConfig("words.jsonl", weight=3.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_lora.evaluation.meter.load_rounds", lambda data, rounds: [[]])
        kept = load_contexts(KeepConfig(keep=10.0, context=contexts), None, None)
        assert {each.name: each.price for each in kept} == {"sums": 2.0, "words": 15.0}
        assert load_contexts(KeepConfig(keep=10.0, context=contexts[1]), None, None)[0].price == 10.0
        assert [k.price for k in load_contexts(KeepConfig(context=["sums.jsonl", "words.jsonl"]), None, None)] == [
            10,
            10,
        ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--context", "sums.jsonl", "--context", "sums.jsonl", "--context.rows", "train[:9]"],
            "two contexts are called sums",
        ),
        (
            ["--context", "sums.jsonl", "--context", "sums.jsonl", "--context.ability", "adding"],
            "context names the same samples of sums.jsonl twice",
        ),
        (
            ["--context", "./sums.jsonl", "--context", "sums.jsonl", "--context.ability", "adding"],
            "context names the same samples of ./sums.jsonl twice",
        ),
        (["--context", "sums.jsonl", "--context.weight", -1, "--context", "words.jsonl"], "context.weight is -1"),
        (
            ["--context", "sums.jsonl", "--context.weight", 0, "--context", "words.jsonl", "--context.weight", 0],
            "the weights of sums, words sum to zero",
        ),
        (["--context", "sums.jsonl", "--context", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["--context", "sums.jsonl", "--context.weight", "1.0e+308", "--context", "words.jsonl"],
            "context.weight is 1e+308",
        ),
        (["--context", "sums.jsonl", "--context.price", "1.0e+300"], "context.price is 1e+300"),
        (["--context", "sums.jsonl", "--context.price", 3], "price is of one context among several"),
        (["--context", "sums.jsonl", "--context.weight", 0], "the weights of sums.jsonl sum to zero"),
    ],
)
@pytest.mark.parametrize("verb", ["init", "train"])
def test_contexts_that_do_not_go_together_are_refused(verb, arguments, said, folder, checkpoint, capsys):
    rest = TRAINING if verb == "train" else ["--r", 4]
    assert said in refused(capsys, verb, checkpoint, *rest, *arguments, "--output", "out")
    assert not (folder / "out").exists()


def test_a_context_too_small_for_its_weight_and_other_options_that_are_of_one(folder, checkpoint, capsys):
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FILES["words"][:20]))
    start = ["--context", "sums.jsonl", "--context", "few.jsonl", "--context.weight", 9, "--output", "out"]
    said = refused(capsys, "init", checkpoint, "--r", 4, *start)
    assert said.startswith("corda init: few has 20 samples, too few for 90% of the weight: give at least 29")
    assert "leave keep out here" in refused(capsys, "init", checkpoint, "--r", 4, *start, "--keep", 1)
    assert "rounds are of one context" in refused(capsys, "init", checkpoint, "--preset", "corda++", *start)
    said = refused(capsys, "train", checkpoint, *TRAINING, "--context", "sums.jsonl", "--weights", "validation",
                   "--output", "out")  # fmt: skip
    assert "weights are shared by several contexts, and there is one" in said
    assert not (folder / "out").exists()


def test_weights_may_be_written_with_an_exponent(folder, checkpoint):
    run("init", checkpoint, "--r", 4, "--context", "sums.jsonl", "--context.weight", "1e1", "--context", "words.jsonl",
        "--context.weight", "3e1", "--output", "out")  # fmt: skip
    abilities = json.loads((folder / "out" / "corda.json").read_text())["context"]["abilities"]
    assert [a["weight"] for a in abilities] == [0.25, 0.75]


@pytest.mark.parametrize("weights", ["given", "validation"])
def test_prices_that_are_all_zero_keep_nothing(weights, folder, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("corda_lora.tune.load_model", None)
    free = [*BOTH[:2], "--context.price", 0, *BOTH[2:], "--context.price", 0, "--weights", weights, "--output", "out"]
    said = refused(capsys, "train", checkpoint, *TRAINING, *free)
    assert "the price of each context is 0, so nothing of them would be kept: give one a price" in said
    said = refused(capsys, "train", checkpoint, *TRAINING, *free, "--keep", 10)
    assert "keep is the price of contexts without their own, and each has one: leave keep out" in said
    assert not (folder / "out").exists()


def test_a_training_says_nothing_of_torchs(folder, checkpoint, capsys):
    torch.set_warn_always(True)
    try:
        run("train", checkpoint, *TRAINING, *BOTH, "--r", 2, "--output", "out")
    finally:
        torch.set_warn_always(False)
    assert "note: Converting a tensor" not in capsys.readouterr().err


def test_a_context_that_is_cut_to_nothing_is_named(folder, checkpoint, capsys, monkeypatch):
    """Whether or not a price was given: who names an ability wants it kept. And before the model is loaded."""
    monkeypatch.setattr("corda_lora.tune.load_model", None)
    for price in ([], ["--keep", 5]):
        cut = [*BOTH, "--context.max_length", 4, *price, "--output", "out"]
        said = refused(capsys, "train", checkpoint, *TRAINING, *cut)
        assert said.startswith("corda train: spelling: the context has 0 samples with a response")
        assert "; 100 responses are cut away at --max_length 4" in said
    run("init", checkpoint, "--r", 4, *BOTH, "--context.max_length", 4, "--output", "start")
    said = refused(capsys, "train", checkpoint, *TRAINING, "--start", "start", "--output", "out")
    assert said.startswith("corda train: spelling: the context has 0 samples with a response")
    assert said.endswith("cut away at --max_length 4; the start names it: give --context, or --keep 0")
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(20)))
    for more in (["--context", "sums.jsonl"], []):
        said = refused(capsys, "train", checkpoint, *TRAINING, "--context", "asked.jsonl", *more, "--output", "out")
        assert "the context has 0 samples with a response" in said
        assert "cut away" not in said
    assert not (folder / "out").exists()
