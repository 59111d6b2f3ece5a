"""Every method by name: starts as the base model, has the budget's parameters, and learns from the same samples."""

import math

import peft
import pytest
import tiny
import torch
from transformers import TrainerCallback

from corda_lora.adapters.lora import lora_layers
from corda_lora.compare.job import train_prepared
from corda_lora.config import CordaError
from corda_lora.methods.baselines import labelled_batches
from corda_lora.methods.registry import METHODS, check_options, corda_config, count_parameters, recorded_options

QUANTIZED = ("qlora", "loftq", "qpissa", "qera", "cloq", "qcorda", "qcorda-folded", "qcorda-kpm-anchored")
CHANGES_THE_START = {"kasa", *QUANTIZED}  # it discards components of W; NF4 rounds
BASE = {"bitfit": "qwen2_biased"} | dict.fromkeys(QUANTIZED, "llama_for_nf4")  # the others: llama


class Seen(TrainerCallback):
    """The task's samples of every step, in their order. (Some methods run samples of the context, too.)"""

    def __init__(self, model):
        self.ids = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if "labels" in kwargs:
            self.ids.append(kwargs["input_ids"].tolist())

    def on_train_end(self, *args, **kwargs):
        self.handle.remove()


@pytest.fixture(scope="module")
def orders():
    """The samples of every step of each method that was trained."""
    return {}


@pytest.mark.parametrize("name", METHODS)
def test_starts_as_the_base_with_the_budget_and_learns(name, prepare, orders):
    family = BASE.get(name, "llama")
    prepared, setup, base = prepare(name, max(METHODS[name].learning_rates), family)
    model = prepared.model.eval()
    if name not in CHANGES_THE_START:
        assert (tiny.logits(model) - tiny.logits(base)).abs().max() < 1e-3

    @torch.no_grad()
    def loss():
        batches = labelled_batches(setup, setup.context("learn"), model)
        return sum(model(**batch).loss for batch in batches)

    before, seen = loss(), Seen(model)
    record = train_prepared(prepared, setup, [seen])
    model.eval()
    assert loss() < before
    assert all(math.isfinite(value) for _, value in record["loss"])
    assert len(seen.ids) == setup.steps
    assert orders.setdefault("the first", seen.ids) == seen.ids
    if name not in ("full", "bitfit", "adapterdrop"):  # the last rounds its width: here by more than 1 %
        component = 96 if "+-" in name else 0  # allocation stops at most one component short of the budget
        # Both allocate by the cost of a rank the time before, and this tiny model has few ranks.
        rel = {"eva": 0.04, "adalora": 0.04, "osf": 0.02}.get(name, 0.01)  # OSF trains singular values, too
        assert count_parameters(model)["adapter"] == pytest.approx(setup.budget, rel=rel, abs=component)


@pytest.mark.parametrize(
    ("name", "computed_by"),
    [
        ("corda++-kpm-balanced", "corda_lora.methods.corda.prepare"),
        ("milora", "corda_lora.methods.corda.prepare"),
        ("lora-null", "corda_lora.methods.baselines.walk"),
        ("eva", "corda_lora.methods.baselines.labelled_batches"),
        ("ewc", "corda_lora.methods.rivals._fisher"),
        ("oplora", "torch.linalg.svd"),
        ("qcorda-folded", "corda_lora.methods.quantized.collect_sides"),
        ("sc-lora", "corda_lora.methods.rivals.walk"),
        ("peft-corda-kpm", "peft.tuners.lora.corda.calib_cov_distribution"),
    ],
)
def test_a_slow_preparation_is_cached(name, computed_by, prepare, monkeypatch):
    assert METHODS[name].prepares_from
    first, _, _ = prepare(name, family=BASE.get(name, "llama"))
    monkeypatch.setattr(computed_by, None)  # would raise if it were called
    second, _, _ = prepare(name, family=BASE.get(name, "llama"))
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key])


def test_options_are_checked_before_anything_runs():
    check_options("lora+", {"ratio": 4})
    check_options("corda-ipm-balanced", {"ratio": 4, "samples": 8, "orientation": "diagonal"})
    with pytest.raises(CordaError, match="method dora has no option 'ratio': it has none"):
        check_options("dora", {"ratio": 4})
    with pytest.raises(CordaError, match="method peft-corda-kpm has no option 'mode'"):
        check_options("peft-corda-kpm", {"mode": "ipm"})
    with pytest.raises(CordaError, match="weight is -1, but must be a number at least 0"):
        check_options("distill", {"weight": -1})
    with pytest.raises(CordaError, match="size is 0, but must be a whole number at least 1"):
        check_options("replay", {"size": 0})
    with pytest.raises(CordaError, match="no option 'rank'"):
        check_options("corda-ipm-balanced", {"rank": 4})
    with pytest.raises(CordaError, match="min_rank"):
        check_options("corda-kpm-anchored", {"min_rank": 4})

    with pytest.raises(CordaError, match="orientation is 'identity', but must be one of covariance, two_sided"):
        check_options("qcorda-kpm-anchored", {"orientation": "identity"})
    with pytest.raises(CordaError, match="keep predicts the drift from W, but the base is quantized without a part"):
        check_options("corda-kpm-balanced", {"quantization": "nf4", "keep": 1})
    with pytest.raises(CordaError, match="5 rounds are of one context, but there are 2"):
        check_options("corda++-kpm-anchored", {"contexts": [{"data": "a"}, {"data": "b"}]})
    for options in ({}, {"contexts": [{"data": "a"}]}):
        with pytest.raises(CordaError, match="weights by compactness are of several contexts: give two or more"):
            check_options("corda-kpm-anchored", {"weights": "compactness"} | options)
    with pytest.raises(CordaError, match="contexts is 'a', but must be a list, each item a mapping, or null"):
        check_options("corda-kpm-anchored", {"contexts": "a"})


@pytest.mark.parametrize(
    ("name", "options", "orientation", "recorded"),
    [
        ("corda-kpm-anchored", {"keep": 10, "samples": 9}, "two_sided", {"orientation": "two_sided"}),
        ("corda-kpm-anchored", {"keep": 10, "orientation": "two_sided"}, "two_sided", {"orientation": "two_sided"}),
        ("corda-kpm-anchored", {"keep": 10, "orientation": "covariance"}, "covariance", {}),
        ("corda-kpm-anchored", {"keep": 10, "orientation": "diagonal"}, "diagonal", {"orientation": "diagonal"}),
        ("corda-kpm-anchored", {"samples": 9}, "covariance", {}),
        ("corda-kpm-anchored", {"keep_generic": 10}, "covariance", {}),
        ("corda-kpm-anchored", {"keep": 10, "contexts": [{"data": "a"}, {"data": "b"}]}, "covariance", {}),
        ("corda-kpm-anchored", {"keep": 10, "contexts": [{"data": "a"}]}, "two_sided", {"orientation": "two_sided"}),
        ("corda-kpm-paper", {"keep": 10}, "covariance", {}),
        ("corda++-kpm-anchored", {"keep": 10}, "covariance", {}),
        ("corda-ipm-seeded", {"keep": 10}, "covariance", {}),
        ("qcorda-kpm-anchored", {"keep": 10}, "two_sided", {"orientation": "two_sided"}),
        ("qcorda-kpm-anchored", {"keep": 10, "orientation": "covariance"}, "covariance", {}),
        ("milora", {"keep": 10}, "identity", {}),
    ],
)
def test_a_price_says_which_orientation_is_the_default(name, options, orientation, recorded):
    """As in `corda init --keep`. A record without an orientation, as of an earlier version, is of what a method had
    then."""
    config = corda_config(name, options)
    assert (config.orientation, config.keep) == (orientation, 0.0)
    others = {key: value for key, value in options.items() if key != "orientation"}
    assert recorded_options(name, options) == others | recorded


def test_others_have_no_start_of_ours():
    assert corda_config("lora", {"keep": 10}) is None
    assert recorded_options("lora", {"keep": 10}) == {"keep": 10}


def test_a_start_that_is_to_be_kept_is_two_sided(prepare, files):
    def rows(folder, **options):
        (files / folder).mkdir()
        prepared, _, _ = prepare("corda-kpm-anchored", folder=files / folder, options=options)
        return torch.cat([layer.lora_A["default"].weight.flatten() for layer in lora_layers(prepared.model).values()])

    kept, free = rows("kept", keep=1.0), rows("free")
    assert torch.equal(kept, rows("two_sided", keep=1.0, orientation="two_sided"))
    assert torch.equal(free, rows("covariance", keep=1.0, orientation="covariance"))
    assert not torch.equal(kept, free)


def test_parameters_are_counted(prepare):
    anchored, setup, _ = prepare("corda-kpm-anchored")
    lora, _, _ = prepare("lora")
    assert isinstance(lora.model, peft.PeftModel)
    assert count_parameters(lora.model) == {"adapter": setup.budget, "trainable": setup.budget}
    B = sum(layer.lora_B["default"].weight.numel() for layer in lora_layers(anchored.model).values())
    assert count_parameters(anchored.model) == {"adapter": setup.budget, "trainable": B}
