"""What the pipeline makes of both sides: two-sided starts, and the statistics that an adapter is kept by."""

import json

import pytest
import tiny
import torch
from tiny import start_of

from corda_lora import CordaConfig, CordaError, get_corda_model
from corda_lora.algebra.decomposition import factor
from corda_lora.cli import main
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_of
from corda_lora.preprocess.backward import walk_back
from corda_lora.preprocess.context import Context, answer_mask
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.statistics import NAME, Statistics
from corda_lora.preprocess.walk import Place
from corda_lora.training.keeping import PredictedDrift


def batches():
    """The tiny batches twice, with other tokens: 18 samples, each with an answer."""
    return [*tiny.batches(), *({**b, "input_ids": b["input_ids"].roll(1, 0)} for b in tiny.batches())]


def both_sides(model, batches):
    steps = walk_back(model, find_targets(model, "all-linear"), Context(batches), Place(torch.device("cpu")))
    return {n: (Cs[0], step.gradients[n]) for step in steps for members, Cs in step.groups for n in members}


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d"])
@pytest.mark.parametrize("split", ["anchored", "balanced"])
def test_a_two_sided_start_is_cut_out_of_each_layer(family, split):
    model, config = tiny.build(family), CordaConfig(r=4, orientation="two_sided", split=split)
    start = preprocess(model, config, batches(), progress=False)
    assert start.statistics is None
    for name, (C, D) in both_sides(model, batches()).items():
        expected = start_of(weight_of(model.get_submodule(name)), C, config, D)
        assert torch.equal(start.layers[name].A, expected.A)
        assert torch.equal(start.layers[name].B, expected.B)
        plain = start_of(weight_of(model.get_submodule(name)), C, CordaConfig(r=4, split=split))
        assert not torch.allclose(start.layers[name].A, plain.A, atol=0.1)


def test_layers_that_share_their_input_share_the_factor_of_its_covariance(monkeypatch):
    factored = []
    monkeypatch.setattr(
        "corda_lora.preprocess.layer.factor", lambda C, damping: factored.append(C) or factor(C, damping)
    )
    start = preprocess(tiny.build("llama"), CordaConfig(r=4, orientation="two_sided"), batches(), progress=False)
    assert len(start.layers) == 14
    assert len(factored) == 8  # of q, k and v; o; gate and up; down


def test_ranks_and_rounds_go_with_two_sides():
    config = CordaConfig(preset="corda++", rounds=3, r=4, orientation="two_sided")
    start = preprocess(tiny.build("llama"), config, batches(), progress=False)
    assert len({len(layer.A) for layer in start.layers.values()}) > 1
    assert len({layer.record.round for layer in start.layers.values()}) > 1


@pytest.mark.parametrize("orientation", ["covariance", "identity", "two_sided"])
def test_what_is_to_be_kept_comes_with_its_statistics(orientation):
    model = tiny.build("llama")
    config = CordaConfig(r=4, keep=10, orientation=orientation)
    start = preprocess(model, config, batches(), progress=False)
    plain = preprocess(model, CordaConfig(r=4, orientation=orientation), batches(), progress=False)
    found = start.statistics
    assert (found.samples, found.answers) == (18, sum(int(answer_mask(b).sum()) for b in batches()))
    assert found.tokens == sum(int(b["attention_mask"].sum()) for b in batches())
    assert found.layers.keys() == found.digests.keys() == start.layers.keys()
    for name, both in both_sides(model, batches()).items():
        for M, low in zip(both, found.layers[name]):
            dense = low.factor @ low.factor.T + low.diagonal.diag()
            torch.testing.assert_close(dense, M, rtol=1e-4, atol=1e-5 * float(M.diagonal().max()))
        torch.testing.assert_close(start.layers[name].A, plain.layers[name].A, rtol=0, atol=1e-4)
    C = [found.layers[f"model.layers.0.self_attn.{name}"].C for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert C[0] is C[1] is C[2]
    assert C[0] is not C[3]


def test_statistics_of_several_rounds_are_those_of_all():
    model, pair = tiny.build("llama"), [tiny.batches()[2]] * 3
    config = CordaConfig(r=4, rounds=3, keep=1)
    several = preprocess(model, config, pair * 2, progress=False).statistics
    once = preprocess(model, CordaConfig(r=4, keep=1), pair * 2, progress=False).statistics
    for name, sides in several.layers.items():
        for low, expected in zip(sides, once.layers[name]):
            torch.testing.assert_close(low.factor @ low.factor.T, expected.factor @ expected.factor.T)


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"keep": 1}, "bert", r"no causal language model: a price on drift \(keep\) is for"),
        ({"orientation": "two_sided"}, "t5", "no causal language model: the orientation two_sided is for"),
        ({"keep": 1}, "llama", "the context has 9 samples with a response, but what it costs .* from 16 on"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, family, message):
    with pytest.raises(CordaError, match=message):
        preprocess(tiny.build(family), CordaConfig(r=4, **options), tiny.batches(family), progress=False)


@pytest.mark.parametrize("keep", [-1.0, float("nan"), float("inf")])
def test_a_price_is_a_number_from_zero_on(keep):
    with pytest.raises(CordaError, match=r"keep is .*, but must be a number at least 0"):
        CordaConfig(keep=keep)


def test_the_python_interface_keeps_by_labels():
    answers = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"].cumsum(1) < 4, -100)} for b in batches()]
    adapted = get_corda_model(tiny.build("llama"), CordaConfig(r=4, keep=1), answers, progress=False)
    assert adapted.statistics.answers == sum(int(answer_mask(b).sum()) for b in answers)
    assert float(PredictedDrift(adapted, adapted.statistics)().detach()) == 0  # as B is
    assert not hasattr(get_corda_model(tiny.build("llama"), CordaConfig(r=4), answers, progress=False), "statistics")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory, tokenizer):
    """The arguments of a `corda init` on a model of two blocks, less --output."""
    folder = tmp_path_factory.mktemp("two_sided")
    tiny.build("llama").save_pretrained(folder / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"The capital of {a} is", "response": f" {b}."} for a, b in ["xy", "uv", "pq", "st"] * 6]
    (folder / "context.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--r", "4", "--batch_tokens", "200", "--keep", "30", "--orientation", "two_sided"]
    return ["init", "--model", f"{folder}/model", "--context", f"{folder}/context.jsonl", *options]


@pytest.mark.filterwarnings("ignore:the context has")
def test_stopped_and_given_again_it_comes_to_the_same_bytes(command, tmp_path, monkeypatch, capsys):
    from corda_lora.preprocess.work import LayerStore

    main([*command, "--output", str(tmp_path / "whole")])
    save = LayerStore.save

    def stop(self, layers):
        save(self, layers)
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerStore, "save", stop)
    with pytest.raises(SystemExit, match="130"):
        main([*command, "--output", str(tmp_path / "stopped")])
    monkeypatch.setattr(LayerStore, "save", save)
    assert len(list((tmp_path / "stopped.work").glob("*.safetensors"))) == 1
    main([*command, "--output", str(tmp_path / "stopped")])
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert NAME in files
    for name in files - {"timing.json"}:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    statistics = Statistics.load(tmp_path / "whole" / NAME)
    assert statistics.samples == 24
    assert statistics.answers < statistics.tokens / 3  # of responses alone
    assert NAME in json.loads((tmp_path / "whole" / "sha256.json").read_text())


def test_without_a_price_nothing_is_kept(command, tmp_path):
    arguments = [*command, "--keep", "0", "--orientation", "covariance"]
    main([*arguments, "--output", str(tmp_path / "start")])
    assert not (tmp_path / "start" / NAME).exists()
    assert "answers" not in json.loads((tmp_path / "start" / "corda.json").read_text())["context"]
