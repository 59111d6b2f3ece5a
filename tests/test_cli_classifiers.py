"""Classifiers, through the command line: from a file of labels to a model that plain PEFT and transformers load."""

import json
import math
import random
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers

from corda_lora.cli import main
from corda_lora.compare.frontier import best_setting
from corda_lora.config import ModelConfig
from corda_lora.files import write_checksums
from corda_lora.models.loading import load_model
from corda_lora.models.targets import trains_head

LABELS = ["--label", "label", "--columns", "source,label,mark,sentence"]  # CoLA's files
IN_EVAL = ["--learn.label", "label", "--learn.columns", "source,label,mark,sentence"]
TRAINING = ["--precision", "fp32", "--batch_size", 16, "--learning_rate", 0.02, "--max_steps", 40]


def texts(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        label = rng.choice(["no", "yes"])
        yield "".join(rng.choice("abc" if label == "yes" else "cde") for _ in range(rng.randint(4, 9))), label


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-bert")
    tiny.save_encoder(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The working directory, with train.tsv and test.tsv."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    for name, count in (("train", 200), ("test", 60)):
        rows = "".join(f"s{i}\t{label}\t*\t{text}\n" for i, (text, label) in enumerate(texts(count, len(name))))
        (tmp_path / f"{name}.tsv").write_text(rows)
    return tmp_path


def run(*arguments):
    main([str(a) for a in arguments])


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def result(capsys, *arguments):
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def start_and_tuned(encoder, *more):
    options = ["--mode", "ipm", "--r", 4, "--target_modules", "[query, value]", "--device", "cpu"]
    run("init", "--model", encoder, "--context", "train.tsv", *LABELS, *options, "--output", "start")
    files = ["--data", "train.tsv", "--eval_data", "test.tsv"]
    run("train", "--model", encoder, "--start", "start", *files, *LABELS, *TRAINING, *more, "--output", "tuned")


@torch.no_grad()
def outputs(model, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    return model.eval()(**tokenizer(["abab", "edcedced"], padding=True, return_tensors="pt")).logits


def test_from_a_file_of_labels_to_what_plain_peft_loads(encoder, work, capsys):
    start_and_tuned(encoder, "--micro_batch_size", 8)
    measured = result(capsys, "eval", "--model", encoder, "--adapter", "tuned", "--learn", "test.tsv", *IN_EVAL)
    values = measured["results"]["learn"]["test.tsv"]
    assert values.keys() == {"tuned"}  # a random head is no model to compare with
    assert values["tuned"]["matthews"] > 0.9
    assert values["tuned"]["accuracy"] > 0.9
    assert values["tuned"]["samples"] == 60
    training = json.loads((work / "tuned" / "training.json").read_text())
    assert training["held_out_loss"][-1][1] == pytest.approx(values["tuned"]["loss"], rel=1e-5)
    assert training["loss"][-1][1] < 0.3 < training["loss"][0][1]

    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained("tuned")
    run("export", "--model", encoder, "--adapter", "tuned", "--as", "merged", "--output", "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(outputs(loaded, encoder), outputs(merged, encoder))
    assert (outputs(loaded, encoder)[0, 1] > 0).item()  # "abab" is a yes
    alone = result(capsys, "eval", "--model", "merged", "--learn", "test.tsv", *IN_EVAL)
    assert alone["results"]["learn"]["test.tsv"]["base"] == pytest.approx(values["tuned"], rel=1e-4)
    swapped = ["eval", "--model", "merged", "--labels", "yes,no", "--learn", "test.tsv", *IN_EVAL]
    assert refused(capsys, *swapped) == (
        "corda eval: merged has the labels no, yes, in this order: give --labels in the same"
    )


def test_the_covariance_is_that_of_the_texts_alone_as_the_model_reads_them(encoder, work):
    run("init", "--model", encoder, "--context", "test.tsv", *LABELS, "--r", 4, "--device", "cpu", "--output", "start")
    record = json.loads((work / "start" / "corda.json").read_text())
    assert record["context"]["samples"] == 60
    lengths = [len(line.split("\t")[3]) for line in (work / "test.tsv").read_text().splitlines()]
    assert record["context"]["tokens"] == sum(lengths) + 2 * 60  # with [CLS] and [SEP], and no label
    assert record["labels"] == ["no", "yes"]


def test_each_seed_has_a_head_of_its_own(encoder, work):
    options = ["--r", 4, "--target_modules", "[query, value]", "--device", "cpu"]
    run("init", "--model", encoder, "--context", "train.tsv", *LABELS, *options, "--output", "start")
    rate = ["--learning_rate", 1e-9, "--max_steps", 1, "--precision", "fp32"]
    heads = []
    for name, more in (("a", ["--start", "start"]), ("b", ["--start", "start", "--seed", 1]), ("c", ["--seed", 1])):
        run("train", "--model", encoder, "--data", "train.tsv", *LABELS, *rate, *more, "--output", name)
        loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(name)
        heads.append(loaded.classifier.modules_to_save["default"].weight.detach())
        assert isinstance(loaded.bert.pooler.dense.modules_to_save["default"], torch.nn.Linear)  # it is new, too
    assert not torch.allclose(heads[0], heads[1])
    torch.testing.assert_close(heads[1], heads[2])


def test_two_texts_and_a_number(encoder, work, capsys):
    rows = [{"a": text, "b": other, "score": 1.5 * (other == "a")} for text, _ in texts(30) for other in "ab"]
    rows[3]["score"] = None
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = ["--prompt", "{a}", "--pair", "{b}", "--label", "score"]
    run("train", "--model", encoder, "--data", "pairs.jsonl", *pair, *TRAINING, "--max_steps", 80, "--output", "tuned")
    said = capsys.readouterr().err
    assert "[SEP] a [SEP]" in said
    assert said.count("1 of 60 rows left out: 1 without 'score'") == 1
    assert load_model(ModelConfig(str(encoder), labels="score")).config.problem_type == "regression"
    options = [f"--learn.{option[2:]}" if option.startswith("--") else option for option in pair]
    values = result(capsys, "eval", "--model", encoder, "--adapter", "tuned", "--learn", "pairs.jsonl", *options)
    tuned = values["results"]["learn"]["pairs.jsonl"]["tuned"]
    assert {"loss", "pearson", "spearman"} < tuned.keys()
    assert tuned["samples"] == 59
    assert tuned["pearson"] > 0.5


def test_a_training_that_was_broken_off_goes_on(encoder, work, monkeypatch):
    whole = ["--model", encoder, "--data", "train.tsv", *LABELS, *TRAINING, "--max_steps", 8, "--checkpoints", 4]
    run("train", *whole, "--output", "whole")
    written = []

    def stop(folder, *names):
        write_checksums(folder, *names)
        written.append(folder)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("corda_lora.training.train.write_checksums", stop)
    with pytest.raises(SystemExit):
        run("train", *whole, "--output", "broken")
    run("train", *whole, "--output", "broken")
    a, b = (json.loads((work / name / "training.json").read_text()) for name in ("whole", "broken"))
    assert a["loss"] == b["loss"]
    assert outputs(peft.AutoPeftModelForSequenceClassification.from_pretrained("whole"), encoder).equal(
        outputs(peft.AutoPeftModelForSequenceClassification.from_pretrained("broken"), encoder)
    )


def test_what_does_not_go_together_is_one_sentence(encoder, checkpoint, work, capsys):
    start_and_tuned(encoder, "--max_steps", 1)
    model, tuned = ["--model", encoder], ["--adapter", "tuned", "--learn"]
    (work / "odd.tsv").write_text("s\tmaybe\t\tab\ns\tno\t\tab\n")
    (work / "same.tsv").write_text("s\tno\t\tab\n" * 3)
    (work / "numbers.tsv").write_text("".join(f"s\t{i}.5\t\tab\n" for i in range(3)))
    (work / "gaps.tsv").write_text("s\tnan\t\tab\ns\t1\t\tab\ns\t0\t\tab\n")
    (work / "mixed.tsv").write_text("s\tlow\t\tab\ns\t1.5\t\tab\ns\t0\t\tab\n")
    for sentence, arguments in {
        "odd.tsv has the label 'maybe', and the model does not: it has 'no', 'yes'": [
            *("eval", *model, *tuned, "odd.tsv", *IN_EVAL)
        ],
        "the model is a classifier: say with label which column of test.tsv has the labels": [
            *("eval", *model, *tuned, "test.tsv", *IN_EVAL[2:], "--learn.prompt", "{sentence}")
        ],
        "has no head for these labels, so there is no before to compare with: measure the adapter alone": [
            *("eval", "--before", encoder, "--after", "tuned", "--learn", "test.tsv", *IN_EVAL)
        ],
        "there is no model in tuned: it is an adapter, which goes with its model": [
            *("eval", "--model", "tuned", "--learn", "test.tsv", *IN_EVAL)
        ],
        "the adapter in tuned has the labels no, yes, in this order: leave labels out": [
            *("eval", *model, "--labels", "yes,no", *tuned, "test.tsv", *IN_EVAL)
        ],
        "has no head for these labels: give --model and --adapter": [
            *("eval", *model, "--labels", "no,yes", "--learn", "test.tsv", *IN_EVAL)
        ],
        "the model has no head for any: it is no classifier": [
            *("eval", "--model", checkpoint, "--learn", "test.tsv", *IN_EVAL)
        ],
        "numbers in label, and 'nan': leave the cell empty": [
            *("train", *model, "--data", "gaps.tsv", *LABELS, "--output", "new")
        ],
        "numbers in label, and 'low'": [*("train", *model, "--data", "mixed.tsv", *LABELS, "--output", "new")],
        "test.tsv has labels, and the model has no head for any": [*("eval", *model, "--learn", "test.tsv", *IN_EVAL)],
        "--label is an option of data: after --learn DATA give --learn.label": [
            *("eval", *model, *tuned, "test.tsv", *LABELS)
        ],
        "is no causal language model": [
            *("eval", *model, "--adapter", "tuned", "--keep", "test.tsv"),
            *("--keep.label", "label", "--keep.columns", "source,label,mark,sentence"),
        ],
        "all samples of same.tsv have the label 'no'": [
            *("train", *model, "--data", "same.tsv", *LABELS, "--output", "new")
        ],
        "odd.tsv has the label 'maybe'": [
            *("train", *model, "--data", "odd.tsv", "--start", "tuned", *LABELS, "--output", "new")
        ],
        "a classifier has none": [
            *("train", *model, "--data", "train.tsv", *LABELS, "--keep_generic", 1, "--output", "new")
        ],
        "trainer.packing": [
            *("train", *model, "--data", "train.tsv", *LABELS, "--trainer", "{packing: true}", "--output", "new")
        ],
        "a text to classify has a label and no response": [
            *("train", *model, "--data", "train.tsv", *LABELS, "--response", "{mark}", "--output", "new")
        ],
        "leaves no room for a text between 2 special tokens": [
            *("train", *model, "--data", "train.tsv", *LABELS, "--max_length", 2, "--output", "new")
        ],
        "train.tsv: no column 'lable'": [
            *("train", *model, "--data", "train.tsv", "--label", "lable", *LABELS[2:], "--output", "new")
        ],
        "label is a number": [
            *("train", *model, "--labels", "label", "--data", "train.tsv", *LABELS, "--output", "new")
        ],
    }.items():
        assert sentence in refused(capsys, *arguments)
        assert not (work / "new").exists()
        assert not (work / "new.work").exists()


RECIPE = """\
model: {encoder}
data: {{data: train.tsv, label: label, columns: "source,label,mark,sentence"}}
context_samples: 40
r: 4
target_modules: [query, value]
train: {{max_steps: 6, batch_size: 16, precision: fp32}}
eval:
  learn: {{data: test.tsv, label: label, columns: "source,label,mark,sentence"}}
seeds: 1
curve_points: 2
methods:
  lora: {{learning_rates: [1.0e-3, 2.0e-3]}}
  corda++-ipm-seeded: {{learning_rates: [1.0e-3, 2.0e-3]}}
"""


def test_a_method_that_trains_no_head_does_not_fit():
    model = tiny.build("bert").requires_grad_(False)
    assert not trains_head(model)
    model.classifier.bias.requires_grad_(True)  # as BitFit alone would
    assert not trains_head(model)
    assert trains_head(peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])))


def test_a_comparison_of_classifiers(encoder, work):
    (work / "recipe.yaml").write_text(RECIPE.format(encoder=encoder))
    run("compare", "recipe.yaml", "--output", "out")
    comparison = json.loads((work / "out" / "comparison.json").read_text())
    by_method = {}
    for one in comparison["runs"]:
        by_method.setdefault(one["method"], []).append(one)
    for method, runs in by_method.items():
        assert {one["status"] for one in runs} == {"done"}, method
        assert best_setting(comparison, method) is not None
        assert all(-1 <= one["results"]["learn"]["test"]["matthews"] <= 1 for one in runs)
        assert all(math.isfinite(loss) for one in runs for _, _, loss in one["curve"])
        assert runs[0]["parameters"]["trainable"] > runs[0]["parameters"]["adapter"]  # with the head
    report = (work / "out" / "report.md").read_text()
    assert "Matthews correlation" in report
    assert "per token" not in report
    assert "rift" not in report
    run("compare", "recipe.yaml", "--output", "out", "--jobs", 0)


def test_whole_numbers_are_labels_however_they_are_written(encoder, work, capsys):
    """A table with an empty cell in the column comes out of pandas and of spreadsheets as 1.0 and 0.0."""
    rows = [f"{text}\t{float(label == 'yes')}" for text, label in texts(20)]
    (work / "floats.tsv").write_text("\n".join(["sentence\tlabel", *rows, "abc\t"]) + "\n")
    training = ["--label", "label", *TRAINING, "--max_steps", 1, "--output", "floats"]
    run("train", "--model", encoder, "--data", "floats.tsv", *training)
    learn = ["--learn", "floats.tsv", "--learn.label", "label"]
    (measured,) = result(capsys, "eval", "--model", encoder, "--adapter", "floats", *learn)["results"]["learn"].values()
    assert "accuracy" in measured["tuned"]
