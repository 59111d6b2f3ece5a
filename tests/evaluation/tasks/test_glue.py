"""GLUE's tasks on files as GLUE publishes them, and their metrics."""

import math

import pytest
import tiny
import torch
import transformers

from corda_lora import CordaError
from corda_lora.config import EvalConfig, ModelConfig
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.evaluation.measures import f1_of, pearson_of, spearman_of
from corda_lora.evaluation.tasks.glue import glue_samples
from corda_lora.evaluation.tasks.registry import checked_tasks
from corda_lora.models.loading import load_model

FILES = {
    "CoLA": ["gj04\t1\t\tthe cat", "gj04\t0\t*\tcat the", 'gj04\t1\t\t"shut up", he said', "gj04\t0\t*\tup shut"],
    "MRPC": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t1\t2\ta cat\tone cat", "0\t3\t4\ta cat\ta dog"],
    "STS-B": ["index\tsentence1\tsentence2\tscore", "0\ta\ta\t5.000", "1\ta\tb\t0.500", "2\tb\tc\t2.250"],
}


@pytest.fixture
def folder(tmp_path):
    tiny.save_encoder(tmp_path / "encoder")
    for name, lines in FILES.items():
        (tmp_path / "glue" / name).mkdir(parents=True)
        (tmp_path / "glue" / name / "dev.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def scored(folder, labels, tasks):
    torch.manual_seed(0)
    model = load_model(ModelConfig(str(folder / "encoder"), labels=labels))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "encoder")
    scores = {}
    config = EvalConfig(tasks=tasks, data_dir=folder / "glue")
    results = evaluate(model, tokenizer, config, progress=False, scores=scores)["tasks"]
    return model, tokenizer, results, scores


def test_scores_are_of_the_files_that_glue_publishes(folder):
    model, tokenizer, results, scores = scored(folder, "0,1", "cola, mrpc, mrpc_f1")
    texts = [line.split("\t")[3] for line in FILES["CoLA"]]
    with torch.no_grad():
        predicted = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
        pairs = [line.split("\t")[3:] for line in FILES["MRPC"][1:]]
        of_pairs = [int(model(**tokenizer(*pair, return_tensors="pt")).logits.argmax()) for pair in pairs]
    cola = scores["tasks", "cola"]["base"]
    assert cola.values == predicted
    assert cola.labels == [1, 0, 1, 0]
    assert cola.details[2] == {"text": '"shut up", he said', "label": "1", "predicted": str(predicted[2])}
    assert results["cola"]["base"] == {"matthews": pearson_of(predicted, [1, 0, 1, 0]), "samples": 4}
    assert results["mrpc"]["base"]["accuracy"] == sum(a == b for a, b in zip(of_pairs, [1, 0], strict=True)) / 2
    assert results["mrpc_f1"]["base"]["f1"] == f1_of(of_pairs, [1, 0])
    assert scores["tasks", "mrpc"]["base"].details[0]["pair"] == "one cat"


def test_a_number_is_correlated(folder):
    model, tokenizer, results, scores = scored(folder, "score", "stsb, stsb_spearman")
    stsb = scores["tasks", "stsb"]["base"]
    assert stsb.labels == [5, 0.5, 2.25]
    with torch.no_grad():
        expected = [float(model(**tokenizer("a", b, return_tensors="pt")).logits) for b in "ab"]
    assert stsb.values[:2] == pytest.approx(expected, rel=1e-4)
    assert results["stsb"]["base"]["pearson"] == pearson_of(stsb.values, stsb.labels)
    assert results["stsb_spearman"]["base"]["spearman"] == spearman_of(stsb.values, stsb.labels)


@pytest.mark.parametrize(
    ("task", "text", "sentence"),
    [
        ("rte", None, "rte needs dev.tsv in a folder rte of"),
        (
            "mrpc",
            "Quality\tone\ttwo\n1\ta\tb\n",
            "has no column '#1 String', which mrpc needs: it has Quality",
        ),
        ("cola", "gj04\t1\t\tthe cat\ngj04\t1\n", "line 2 has no sentence"),
    ],
)
def test_other_files_are_refused_before_the_model_is_loaded(folder, task, text, sentence):
    if text is not None:
        name = {"mrpc": "MRPC", "cola": "CoLA"}[task]
        (folder / "glue" / name / "dev.tsv").write_text(text)
    with pytest.raises(CordaError, match=sentence):
        checked_tasks(EvalConfig(tasks=task, data_dir=folder / "glue"))


def test_labels_that_the_model_does_not_have_are_refused(folder):
    with pytest.raises(CordaError, match="cola has the label '1', and the model does not: it has 'no', 'yes'"):
        scored(folder, "no,yes", "cola")


def test_the_metrics_by_their_definitions():
    predicted, targets = [1, 1, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 1]
    tp, fp, fn, tn = 3, 1, 2, 2
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert pearson_of(predicted, targets) == pytest.approx(matthews)
    assert f1_of(predicted, targets) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert pearson_of([1, 1, 1], [0, 1, 1]) == f1_of([0, 0], [0, 0]) == 0
    assert spearman_of([1, 2, 3, 50], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman_of([1, 1, 2], [3, 2, 1]) == pytest.approx(-math.sqrt(3) / 2)  # ties have their mean rank


@pytest.mark.parametrize(
    ("task", "name", "content", "sentence"),
    [
        ("sst2", "SST-2", b"sentence\tlabel\n", "dev.tsv has no rows"),
        ("sst2", "SST-2", b"", "no column 'sentence'"),
        ("cola", "CoLA", b"", "line 1 has no sentence"),
        ("cola", "CoLA", b"s\t1\t\tcaf\xe9\n", "dev.tsv is not UTF-8"),
    ],
)
def test_a_file_without_texts_is_refused(folder, task, name, content, sentence):
    (folder / "glue" / name).mkdir(exist_ok=True)
    (folder / "glue" / name / "dev.tsv").write_bytes(content)
    with pytest.raises(CordaError, match=sentence):
        checked_tasks(EvalConfig(tasks=task, data_dir=folder / "glue"))


def test_a_text_may_have_unicodes_ends_of_lines(folder):
    (folder / "glue" / "CoLA" / "dev.tsv").write_text("s\t1\t\tone\u2028two\x85three\r\n", newline="")
    (sample,) = glue_samples("cola", EvalConfig(data_dir=folder / "glue"))
    assert sample.prompt == "one\u2028two\x85three"
