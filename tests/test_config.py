"""Every number, choice and regular expression is checked where its dataclass is made."""

import dataclasses
import math
from typing import get_type_hints

import pytest
from peft import LoraConfig

from corda_lora.config import (
    CompareConfig,
    CordaConfig,
    CordaError,
    DataConfig,
    EvalConfig,
    InspectConfig,
    KeepConfig,
    LoraStart,
    MethodConfig,
    ModelConfig,
    TrainConfig,
)
from corda_lora.config.values import Positive, check_value
from corda_lora.recipes import load_recipe

NEEDED = {
    DataConfig: {"data": "x.jsonl"},
    ModelConfig: {"model": "x"},
    CompareConfig: {"methods": ["lora"], "data": "x.jsonl", "eval": EvalConfig(learn="x.jsonl")},
}
CONFIGS = [CordaConfig, DataConfig, TrainConfig, LoraStart, ModelConfig, EvalConfig, MethodConfig, CompareConfig]


def numbers(kind):
    """The names of a dataclass's numbers."""
    hints = get_type_hints(kind, include_extras=True)
    return [n for n, hint in hints.items() if "Range" in str(hint) or "at least" in str(hint) or "above" in str(hint)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_number_has_a_range(kind):
    for name, hint in get_type_hints(kind, include_extras=True).items():
        bare = [part for part in (hint, *getattr(hint, "__args__", ())) if part in (int, float)]
        assert not bare or hasattr(hint, "__metadata__"), name


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in CONFIGS for name in numbers(kind)])
@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, True, "many"])
def test_a_number_out_of_range_is_one_sentence_with_the_range(kind, name, bad):
    value = [bad, bad] if name == "learning_rates" else bad
    with pytest.raises(CordaError, match=rf"^{name} is .*, but must be .*number (at least|above) \d"):
        kind(**NEEDED.get(kind, {}) | {name: value})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (CordaConfig, {"mode": "kmp"}, "mode is 'kmp', but must be one of kpm, ipm"),
        (CordaConfig, {"split": "half"}, "split is 'half', but must be one of anchored, seeded, balanced, paper"),
        (TrainConfig, {"precision": "fp8"}, "precision is 'fp8', but must be one of bf16, fp16, fp32"),
        (TrainConfig, {"warmup": 1.5}, "warmup is 1.5, but must be a number at least 0 and at most 1"),
        (TrainConfig, {"lora_dropout": 1.0}, "lora_dropout is 1.0, but must be a number at least 0 and below 1"),
        (TrainConfig, {"batch_size": 2.5}, "batch_size is 2.5, but must be a whole number at least 1"),
        (TrainConfig, {"seed": 2**32}, "seed is 4294967296, but must be a whole number at least 0 and at most"),
        (LoraStart, {"r": 10**400}, "r is 1000"),
        (CordaConfig, {"target_modules": "(q_proj"}, "target_modules '(q_proj' is no regular expression: missing )"),
        (EvalConfig, {"exact_match": "#### ["}, "exact_match '#### [' is no regular expression"),
    ],
)
def test_a_value_that_is_none_of_the_choices(kind, options, message):
    with pytest.raises(CordaError) as refused:
        kind(**options)
    assert str(refused.value).startswith(message)
    assert len(str(refused.value)) < 240


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EvalConfig, {"keep": "a.jsonl", "limit": 3}, "limit is of benchmarks: give tasks"),
        (InspectConfig, {"context": "a.jsonl", "samples": [4, 8]}, "a second number of samples is of the components"),
        (KeepConfig, {"keep": 0.0, "weights": "validation"}, "keep is 0, so there is no price for weights to share"),
    ],
)
def test_an_option_without_what_it_is_of_is_refused(kind, options, message):
    with pytest.raises(CordaError) as refused:
        kind(**options)
    assert str(refused.value).startswith(message)


def test_defaults_are_in_range():
    for kind in CONFIGS:
        made = kind(**NEEDED.get(kind, {}))
        assert dataclasses.replace(made) == made
    assert check_value("learning_rate", 1, Positive) is None  # an int is a number


@pytest.mark.parametrize(
    ("orientation", "options"),
    [
        ("two_sided", {"keep": 10}),
        ("two_sided", {"keep": 10, "split": "seeded"}),
        ("two_sided", {"keep": 10, "quantization": "nf4"}),
        ("covariance", {}),
        ("covariance", {"mode": "ipm"}),
        ("covariance", {"mode": "ipm", "keep": 10}),
        ("covariance", {"keep": 10, "split": "paper"}),  # as published
        ("covariance", {"keep": 10, "split": "balanced"}),
        ("covariance", {"keep": 10, "preset": "corda+"}),
        ("covariance", {"keep": 10, "preset": "corda++"}),
        ("covariance", {"keep": 10, "preset": "corda++", "rounds": 1}),
        ("covariance", {"keep": 10, "rounds": 2}),
        ("identity", {"keep": 10, "orientation": "identity"}),
        ("covariance", {"keep": 10, "orientation": "covariance"}),
    ],
)
def test_the_orientation_by_default(orientation, options):
    """Two-sided where the context runs backward in any case, and nothing asks for what is published."""
    config = CordaConfig(**options)
    assert config.orientation == orientation
    assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 1\nr: 2\n", "the key 'r' is given twice"),
        ("train: {seed: 1, seed: 1}\n", "the key 'seed' is given twice"),
        ("a: &a [*a]\n", "an alias"),
        (
            "a: &a [0,0,0,0,0,0,0,0,0,0]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
            "expand to more than",
        ),
        ("[" * 3000, "nested too deep"),
    ],
)
def test_recipes_that_are_refused(text, message):
    with pytest.raises(Exception, match=message):
        load_recipe(text)


def test_a_recipe_with_aliases():
    text = "a: &a {r: 1, s: 1e-3}\nb: *a\nc: {<<: *a, r: 2}\n"
    assert load_recipe(text) == {"a": {"r": 1, "s": 1e-3}, "b": {"r": 1, "s": 1e-3}, "c": {"r": 2, "s": 1e-3}}


@pytest.mark.parametrize("kind", [CordaConfig, LoraStart])
def test_every_option_of_pefts_is_ours_or_is_refused_by_name(kind):
    ours = {f.name for f in dataclasses.fields(kind)} | {f.name for f in dataclasses.fields(TrainConfig)}
    for name in {f.name for f in dataclasses.fields(LoraConfig)} - ours:
        with pytest.raises(CordaError, match=rf"^{name} is an option of PEFT's that corda-lora does not have: \w+"):
            kind(**{name: None})
