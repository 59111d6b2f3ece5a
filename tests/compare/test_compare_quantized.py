"""`corda compare` over a base in NF4: prepared, trained, measured, and compared with the full model."""

import json
from pathlib import Path

import pytest
import tiny

pytest.importorskip("bitsandbytes")

from corda_lora.cli import main
from corda_lora.compare.comparison import Comparison
from corda_lora.compare.job import do_job
from corda_lora.compare.schedule import Job
from corda_lora.config import CompareConfig, CordaError, EvalConfig, ModelConfig


def test_starts_over_nf4_from_end_to_end(recipe, tokenizer):
    tiny.build("llama_for_nf4").save_pretrained("wide")
    tokenizer.save_pretrained("wide")
    methods = {
        "qlora": "[1.0e-3, 5.0e-3]",
        "qcorda-folded": "[1.0e-3, 5.0e-3]",
        "loftq": "[1.0e-3, 5.0e-3]",
    }
    file = recipe(methods, model="wide", seeds=1, context_samples=16)
    with open(file, "a") as more:
        more.write("  kept: {method: qcorda-kpm-anchored, learning_rates: [1.0e-2], sweep: {keep: [1, 10]}}\n")
    main(["compare", file, "--output", "out"])
    comparison = json.loads(Path("out/comparison.json").read_text())
    runs = comparison["runs"]
    assert {run["status"] for run in runs} <= {"done", "diverged"}
    assert len(runs) == 8
    base = comparison["base"]["learn"]["learn"]["loss"]
    starts = {run["method"]: run["curve"][0][2] for run in runs}  # before any training
    assert abs(starts["qcorda-folded"] - base) < abs(starts["qlora"] - base)
    assert starts["kept"] == pytest.approx(starts["qlora"], abs=1e-4)  # both add nothing to the quantized base
    for run in runs:
        assert run["results"]["keep"]["keep"]["drift"] > 0
        assert run["curve"][-1][2] < run["curve"][0][2]
        assert run["parameters"]["adapter"] == runs[0]["parameters"]["adapter"]


def test_a_residual_is_no_model_to_compare_on(folder, tokenizer):
    tiny.build("llama_for_nf4").save_pretrained("wide")
    tokenizer.save_pretrained("wide")
    start = ["--mode", "ipm", "--quantization", "nf4", "--fold", "0", "--r", "16", "--output", "start"]
    main(["init", "--model", "wide", "--context", "keep.jsonl", *start])
    recipe = CompareConfig(["lora"], "learn.jsonl", EvalConfig(learn="learn.jsonl"))
    comparison = Comparison(ModelConfig("start/base"), recipe, Path("out"))
    with pytest.raises(CordaError, match=r"start/base is a residual, .*: give the full model"):
        do_job(comparison, Job(), lambda steps: None)
