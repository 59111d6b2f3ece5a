"""Whether the samples shown stand for others: what `corda init` measures, says and recommends."""

import json

import pytest
import tiny
import torch

from corda_lora import CordaConfig
from corda_lora.adapters.prepare import prepare
from corda_lora.config import DataConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_others, load_samples
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.held_out import enough_samples, times_as_much
from corda_lora.report.verdicts import start_verdicts


@pytest.fixture
def made(tmp_path, tokenizer):
    """made(samples, rows, **options) → the model, the data and the start."""

    def make(samples, rows=200, **options):
        file = tmp_path / f"{rows}.jsonl"
        texts = [f"{i * 7919 % 1000} and {i * 31} are {'odd' if i % 3 else 'even'} numbers" for i in range(rows)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        model, data = tiny.build("llama"), DataConfig(str(file), samples=samples)
        output = tmp_path / f"start{len(list(tmp_path.iterdir()))}"
        start = prepare(model, CordaConfig(r=4, **options), data, output, tokenizer, progress=False)
        return model, data, start

    return make


def test_the_leak_of_others_is_that_of_their_covariance(made, tokenizer):
    model, data, start = made(40, skip_tokens=1)
    others = load_others(data, load_samples(data), 64)
    assert len(others) == 64
    batches, _ = context_batches(tokenizer, others, data.max_length)
    C = tiny.covariances_of(model, find_targets(model, "all-linear"), batches, skip_tokens=1)
    for name, layer in start.layers.items():
        A = layer.A.double()
        assert start.record["layers"][name]["held_out_leak"] == pytest.approx(
            float((A @ C[name].double() @ A.T).trace())
        )
    assert start.record["held_out"]["samples"] == 64
    (sentence,) = [s for s in start_verdicts(start.record) if s.startswith("sample: ")]
    assert "64 others leak" in sentence
    assert "the 40 shown" in sentence


def test_fewer_samples_stand_less_for_others(made):
    few, many = (made(n)[2].record["held_out"] for n in (8, 120))
    assert few["times"] > 1.5 * many["times"] > 1
    assert few["enough"] > 8


@pytest.mark.parametrize(
    ("samples", "options"),
    [(190, {}), (40, {"mode": "ipm"}), (40, {"preset": "corda++", "rounds": 2}), (40, {"orientation": "identity"})],
)
def test_nothing_is_said_where_there_is_nothing_to_say(samples, options, made):
    record = made(samples, **options)[2].record
    assert "held_out" not in record
    assert not any(s.startswith("sample: ") for s in start_verdicts(record))


@pytest.mark.parametrize(("rows", "said"), [(116, True), (115, False)])
def test_a_few_others_are_needed(rows, said, made):
    assert ("held_out" in made(100, rows)[2].record) == said


def test_others_that_are_longer_than_the_model_has_positions_are_passed_over(tmp_path, tokenizer):
    """Nobody asked for them: they end no work that is done."""
    texts, data = (
        [f"the number {i}" for i in range(60)],
        DataConfig(str(tmp_path / "d.jsonl"), "", "{text}", samples=20),
    )
    data.max_length = 400  # tiny GPT-2 has 256

    def write():
        (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    write()
    asked = {s.response for s in load_samples(data)}
    texts = [text if text in asked else text + " and so on" * (30 * (i % 2)) for i, text in enumerate(texts)]
    write()
    start = prepare(tiny.build("gpt2_conv1d"), CordaConfig(r=4), data, tmp_path / "start", tokenizer, progress=False)
    assert start.record["held_out"]["samples"] == sum(len(text) < 50 for text in texts) - 20


def test_enough_by_the_law_of_directions_that_are_chosen():
    """The r directions of least energy of n Gaussian samples, against the truth: `enough_samples` of an n that is too
    small finds the one at which others leak 1.1 times as much, within a half."""
    torch.manual_seed(0)
    d, r = 60, 6
    root = torch.linspace(1, 2, d, dtype=torch.float64)

    def times(n):
        ratios = []
        for _ in range(20):
            X, Y = (torch.randn(m, d, dtype=torch.float64) * root for m in (n, 4000))
            A = torch.linalg.eigh(X.T @ X / n).eigenvectors[:, :r].T
            shown, others = (((A @ Z.T).square().sum() / len(Z)).item() for Z in (X, Y))
            ratios.append(others / shown)
        return sum(ratios) / len(ratios)

    estimates = [enough_samples(n, times(n)) for n in (150, 400, 1000)]
    assert max(estimates) < 3 * min(estimates)
    assert times(estimates[-1]) == pytest.approx(1.1, abs=0.04)


def test_ratios_and_numbers():
    assert times_as_much({"a": 1.0, "b": 2.0, "c": 4.0, "zero": 0.0}, {"a": 3.0, "b": 4.0, "c": 4.0, "zero": 1.0}) == 2
    assert times_as_much({"a": 1.0, "expert": 1.0}, {"a": 1.5}) == 1.5
    assert times_as_much({"a": 0.0}, {"a": 1.0}) is None
    assert enough_samples(1000, 1.1) == 1000
    assert enough_samples(1000, 0.9) == 0
    assert enough_samples(256, 2.025) == pytest.approx(1635, rel=0.01)
