"""What our methods keep, through the training that `corda compare` runs."""

import json

import pytest
import torch

from corda_lora.compare.job import train_prepared
from corda_lora.compare.runner import check_methods
from corda_lora.config import CompareConfig, CordaError, DataConfig, EvalConfig, MethodConfig, TrainConfig
from corda_lora.evaluation.evaluate import loss_and_drift
from corda_lora.methods.keeping import contexts_of
from corda_lora.preprocess.own_text import own_text
from corda_lora.training.keeping import keepers_of

RECIPE = TrainConfig(learning_rate=3e-2, max_steps=20, batch_size=8, precision="fp32", schedule="constant")


@pytest.mark.parametrize("name", ["lora", "corda-kpm-anchored"])
def test_a_price_on_the_models_own_texts_lowers_the_drift_on_others_of_them(name, prepare, files):
    def drift(**options):
        prepared, setup, base = prepare(name, options=options, train=RECIPE)
        record = train_prepared(prepared, setup)
        others = own_text(base, setup.tokenizer, texts=32, length=24, seed=5)
        assert record["loss"][-1][1] < record["loss"][0][1]
        return loss_and_drift(prepared.model.eval(), setup.tokenizer, others)["tuned"]["drift"], record["penalties"]

    free, _ = drift()
    kept, penalties = drift(keep_generic=30.0)
    assert kept < 0.7 * free
    assert penalties.keys() == {"generic"}
    both, penalties = drift(keep_generic=30.0, keep=30.0)
    assert both < 0.7 * free
    assert penalties.keys() == {"generic", "drift"}


def mixture(files, *weights):
    rows = [{"prompt": f"Spell {'abcdefgh'[i % 8] * 3}{i}?", "response": f" {'xyz'[i % 3] * 4}."} for i in range(40)]
    (files / "spelling.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"facts": "keep", "spelling": "spelling"}
    return [
        {"data": str(files / f"{file}.jsonl"), "ability": name, "weight": weight, "samples": 30}
        for (name, file), weight in zip(names.items(), weights)
    ]


@pytest.mark.filterwarnings("ignore:.*fewer than.*is wide")
def test_each_ability_of_a_mixture_is_kept_as_much_as_its_weight_says(prepare, files):
    def drifts(*weights, **options):
        options = {"contexts": mixture(files, *weights), "keep": 10.0, **options}
        prepared, setup, _ = prepare(
            "corda-kpm-anchored", options=options, train=RECIPE, folder=files / f"cache{weights}{len(options)}"
        )
        record = train_prepared(prepared, setup)
        assert record["penalties"].keys() == {"drift facts", "drift spelling"}
        with torch.no_grad():
            return {each.name: (float(each.predicted()), each.keep) for each in keepers_of(prepared.callbacks)}

    free, facts, spelling = drifts(1, 1, keep=1e-6), drifts(9, 1), drifts(1, 9)
    assert {name: price for name, (_, price) in facts.items()} == pytest.approx({"facts": 18.0, "spelling": 2.0})
    assert facts["facts"][0] < spelling["facts"][0] < free["facts"][0]
    assert spelling["spelling"][0] < facts["spelling"][0] < free["spelling"][0]
    even = drifts(1, 1, steer=True)
    assert sum(price for _, price in even.values()) == pytest.approx(20)


@pytest.mark.parametrize(
    ("contexts", "said"),
    [
        ([{"data": "a.jsonl"}, {"data": "b/a.jsonl"}], "two contexts are called a"),
        ([{"data": "a.jsonl", "wieght": 2}, {"data": "b.jsonl"}], "wieght"),
        ([{"data": "a.jsonl", "weight": 0}, {"data": "b.jsonl", "weight": 0}], "sum to zero"),
        ([{"data": "a.jsonl", "weight": -1}, {"data": "b.jsonl"}], "weight is -1"),
        (["a.jsonl", "b.jsonl"], "must be a list of mappings"),
    ],
)
def test_contexts_of_an_entry_are_checked_before_any_run(contexts, said):
    with pytest.raises(CordaError, match=said):
        contexts_of(contexts, 16)


@pytest.mark.filterwarnings("ignore:.*fewer than.*is wide")
def test_contexts_with_prices_are_kept_without_keep_and_one_alone_at_keep(prepare, files):
    def kept(contexts, **options):
        folder = files / f"cache{len(list(files.iterdir()))}"
        options |= {"contexts": contexts}
        prepared, _, _ = prepare("corda-kpm-anchored", options=options, train=RECIPE, folder=folder)
        return {each.name: each.keep for each in keepers_of(prepared.callbacks)}, set(prepared.penalties)

    facts, spelling = mixture(files, 1, 1)
    own = [facts | {"price": 3.0}, spelling | {"price": 5.0}]
    assert kept(own) == ({"facts": 3.0, "spelling": 5.0}, {"drift facts", "drift spelling"})
    assert kept([own[0], spelling])[0] == {"facts": 3.0, "spelling": 0.0}
    assert kept([facts], keep=7.0) == ({"keep": 7.0}, {"drift keep"})
    assert kept([facts, spelling]) == kept([facts]) == ({}, set())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"options": {"contexts": [{"data": "a", "price": 1.0}, {"data": "b", "price": 2.0}], "keep": 10.0}}, "own"),
        ({"options": {"contexts": [{"data": "a", "price": 1.0}, {"data": "b", "price": 2.0}]},
          "sweep": {"keep": [1.0, 2.0]}}, "own"),
        ({"options": {"contexts": [{"data": "a"}, {"data": "b"}], "steer": True}}, "steer shares"),
        ({"options": {"contexts": [{"data": "a"}], "steer": True, "keep": 1.0}}, "steer shares"),
        ({"options": {"steer": True, "keep": 1.0}}, "steer shares"),
        ({"method": "lora", "options": {"keep": 1.0}}, "give samples of it as `context`"),
    ],
)  # fmt: skip
def test_prices_that_would_be_ignored_are_refused_before_any_run(entry, said):
    entry = MethodConfig(**{"method": "corda-kpm-anchored"} | entry)
    with pytest.raises(CordaError, match=said):
        check_methods(CompareConfig({"mine": entry}, "learn", EvalConfig(learn=["learn"])))


def test_prices_of_contexts_may_be_steered():
    contexts = [{"data": "a", "price": 1.0}, {"data": "b", "price": 2.0}]
    entry = MethodConfig("corda-kpm-anchored", options={"contexts": contexts, "steer": True})
    check_methods(CompareConfig({"mine": entry}, "learn", EvalConfig(learn=["learn"])))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_a_price_on_the_task_is_said_before_any_run(mode, recwarn):
    contexts = [{"data": "a", "price": 1.0}, {"data": "b"}]
    entry = MethodConfig(f"corda-{mode}-seeded", options={"contexts": contexts})
    check_methods(CompareConfig({"mine": entry}, "learn", EvalConfig(learn=["learn"])))
    said = [str(warning.message) for warning in recwarn]
    assert any("its price (keep) is on drift on the task itself" in each for each in said) == (mode == "ipm")


CUT = "; 40 responses are cut away at --max_length 4"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("corda-kpm-anchored", {"keep": 1.0, "orientation": "covariance"}),
        ("corda-kpm-anchored", {"keep": 1.0}),  # two-sided
        ("corda-kpm-anchored", {"keep": 1.0, "contexts": [{"data": "keep.jsonl", "max_length": 4}]}),
        ("distill", {}),
        ("ewc", {}),
    ],
)
def test_a_method_whose_answers_are_cut_away_names_max_length(method, options, prepare, files, monkeypatch):
    """Where a comparison did not see it before its runs: the entry has samples of its own, or needs fewer."""
    monkeypatch.chdir(files)
    keep = DataConfig(str(files / "keep.jsonl"), max_length=4)
    with pytest.raises(CordaError, match=rf"response.*{CUT}$"):
        prepare(method, options=options, train=RECIPE, keep=keep, samples=40)


def test_some_answers_that_are_cut_away_are_said_where_few_are_left(prepare, files):
    keep = DataConfig(str(files / "keep.jsonl"), max_length=27)  # with which countries of one digit are left
    with pytest.raises(CordaError, match=r"only 10 samples .*; 30 responses are cut away at --max_length 27$"):
        prepare("distill", train=RECIPE, keep=keep, samples=40)
