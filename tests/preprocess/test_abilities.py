"""Contexts of several abilities, against each collected by itself and mixed in float64."""

import weakref

import pytest
import tiny
import torch
from tiny import start_of

from corda_lora import CordaConfig, CordaError, get_corda_model
from corda_lora.adapters.lora import lora_layers
from corda_lora.algebra.mixture import even_weights
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.backward import run_back
from corda_lora.preprocess.context import Ability, Context, together
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.statistics import answered_batches, collect_sides

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than.*is wide")
NAMES = ("facts", "code", "prose")


def contexts(count=3):
    return [Context(answered_batches(tiny.answered(60, seed), 0), numbers=range(60)) for seed in range(count)]


def context(weights=(1.0, 2.0, 0.5)):
    return together(contexts(len(weights)), [Ability(name, weight) for name, weight in zip(NAMES, weights)])


def by_hand(matrices, weights):
    weights = [w / sum(weights) for w in weights]
    shares = sum(w * M.double() / M.double().trace() for w, M in zip(weights, matrices))
    return shares * sum(w * float(M.double().trace()) for w, M in zip(weights, matrices))


def collected(model, targets, batches):
    of = collect_sides(model, targets, batches, progress=False)
    return {name: (C, Ds[name]) for members, C, Ds in of for name in members}


def sides(model, targets):
    """C of each ability alone, and D of each: y is drawn by the number of a batch among all."""
    alone = [collected(model, targets, each.batches) for each in contexts()]
    Ds = run_back(model, targets, context()).gradients
    return {name: ([one[name][0] for one in alone], list(Ds[name])) for name in alone[0]}


def test_gradients_of_each_ability_are_those_of_all_apart():
    model = tiny.build("llama")
    targets = find_targets(model, "all-linear")
    pooled, first = (collected(model, targets, each.batches) for each in (context(), contexts()[0]))
    tokens = torch.tensor([sum(int(b["attention_mask"].sum()) for b in each.batches) for each in contexts()])
    for name, D in run_back(model, targets, context()).gradients.items():
        assert D.shape == (3, *pooled[name][1].shape)
        together = (tokens[:, None, None] * D).sum(0) / tokens.sum()
        torch.testing.assert_close(together, pooled[name][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(D[0], first[name][1], rtol=1e-4, atol=1e-6)  # its batches have the same numbers


def test_gradients_of_each_ability_go_as_those_of_a_layer_are_stacked(monkeypatch):
    """Else all of a block's would be there twice."""
    model = tiny.build("llama")
    targets = find_targets(model, "all-linear")
    alive, counts, stack = [], [], torch.stack

    def stacked(parts, *args):
        counts.append(sum(D() is not None for D in alive))
        alive.extend(weakref.ref(part) for part in parts if part.ndim == 2)
        return stack(parts, *args)

    monkeypatch.setattr("torch.stack", stacked)
    run_back(model, targets, context())
    assert max(counts) <= 4  # three of the layer before; one is held by a loop's variable


@pytest.mark.parametrize(
    "options",
    [
        {"split": "balanced"},
        {"orientation": "two_sided", "split": "balanced"},
        {"mode": "ipm", "orientation": "diagonal"},
        {"weights": "compactness"},
        {"preset": "corda+"},
    ],
    ids=str,
)
def test_the_start_is_that_of_the_covariances_mixed_by_hand(options):
    model, weights = tiny.build("llama"), (1.0, 2.0, 0.5)
    targets = find_targets(model, "all-linear")
    config = CordaConfig(r=3, solver="gram", **options)
    start = preprocess(model, config, context(weights), progress=False)
    for name, (Cs, Ds) in sides(model, targets).items():
        alpha = [w / sum(weights) for w in weights]
        if config.weights == "compactness":
            alpha = even_weights(list(Cs), 3)
        record = start.layers[name].record
        assert record.weights == pytest.approx(alpha, abs=1e-3)
        C, D = by_hand(Cs, record.weights), by_hand(Ds, record.weights)
        expected = start_of(
            targets[name].weight.detach(),
            C.float(),
            CordaConfig(**{**vars(config), "r": record.r, "preset": "corda"}),
            D.float(),
        )
        BA, exact = (layer.B.double() @ layer.A.double() for layer in (start.layers[name], expected))
        if not config.from_zero:
            assert (BA - exact).norm() / exact.norm() < 1e-3, name
        P, Q = (torch.linalg.qr(layer.A.double().T)[0] for layer in (start.layers[name], expected))
        assert float((Q - P @ (P.T @ Q)).norm()) < 1e-2, name
        assert record.leak == pytest.approx(float(((start.layers[name].A.double() @ C) * start.layers[name].A).sum()),
                                            rel=1e-3, abs=1e-12)  # fmt: skip


def test_one_ability_with_all_the_weight_is_that_ability_alone():
    model, config = tiny.build("llama"), CordaConfig(r=3)
    alone = preprocess(model, config, contexts()[1], progress=False)
    mixture = preprocess(model, config, context((0.0, 1.0, 0.0)), progress=False)
    for name, layer in alone.layers.items():
        torch.testing.assert_close(mixture.layers[name].A, layer.A, rtol=0, atol=1e-4)
    assert mixture.record["context"]["abilities"][1]["weight"] == 1


def test_more_weight_leaks_less_of_an_ability_and_more_of_the_others():
    model = tiny.build("llama")
    targets = find_targets(model, "all-linear")
    known = sides(model, targets)

    def leaks(weights):
        start = preprocess(model, CordaConfig(r=3), context(weights), progress=False)
        return [
            sum(
                float(((layer.A @ known[n][0][k]) * layer.A).sum() / known[n][0][k].trace())
                for n, layer in start.layers.items()
            )
            for k in range(3)
        ]

    curve = [leaks((weight, 1.0, 1.0)) for weight in (0.25, 1.0, 4.0, 16.0)]
    first = [leak[0] for leak in curve]
    assert first == sorted(first, reverse=True)
    assert curve[0][1] < curve[-1][1]


def test_python_takes_abilities_by_name():
    config = CordaConfig(r=3)
    expected = preprocess(tiny.build("llama"), config, context((1.0, 2.0)), progress=False)
    given = {"facts": contexts()[0].batches, "code": (iter(contexts()[1].batches), 2.0)}
    adapted = get_corda_model(tiny.build("llama"), config, given, progress=False)
    for name, layer in lora_layers(adapted).items():
        assert torch.equal(layer.lora_A["default"].weight, expected.layers[name].A)
    for weights, said in (((0, 0), "facts, code sum to zero"), ((-1, 1), "the weight of facts is -1")):
        given = {name: (contexts()[0].batches, weight) for name, weight in zip(NAMES, weights)}
        with pytest.raises(CordaError, match=said):
            get_corda_model(tiny.build("llama"), config, given, progress=False)


def test_what_several_contexts_cannot_be_is_said_before_any_long_work(monkeypatch):
    model = tiny.build("llama")
    monkeypatch.setattr("corda_lora.preprocess.pipeline.walk", None)

    def refused(said, context=context(), **options):  # noqa: B008
        with pytest.raises(CordaError, match=said):
            preprocess(model, CordaConfig(r=3, **options), context, progress=False)

    refused("with several each has its own, in training", keep=3.0)
    refused("weights by compactness are of several contexts", contexts()[0], weights="compactness")
    refused("2 rounds are of one context, but there are 3", rounds=2)
    few = Context(answered_batches(tiny.answered(60), 0)[:1], numbers=range(60))
    size = len(few.batches[0]["input_ids"])
    mixture = together([few, contexts()[1]], [Ability("few", 20.0), Ability("code", 1.0)])
    least = -(-16 * 2 * 20 // 21)
    if size < least:
        refused(f"few has {size} samples, too few for 95% of the weight: give at least {least}", mixture)
    empty = {k: torch.zeros_like(v) for k, v in few.batches[0].items()}
    refused("hollow holds only padding", together([Context([empty]), few], [Ability("hollow", 1.0), Ability("a", 1.0)]))
