"""The methods of others do what their papers say."""

import peft
import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from corda_lora.adapters.lora import lora_layers
from corda_lora.compare.job import train_prepared
from corda_lora.config import CordaError, DataConfig, TrainConfig
from corda_lora.data.batches import context_batches
from corda_lora.methods.baselines import labelled_batches
from corda_lora.methods.registry import METHODS, count_parameters
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_of


def test_bitfit_trains_biases_and_refuses_a_model_without(prepare):
    prepared, setup, base = prepare("bitfit", 1e-2, "qwen2_biased")
    train_prepared(prepared, setup)
    before = base.state_dict()
    for name, value in prepared.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".bias")
    with pytest.raises(CordaError, match="LlamaForCausalLM has none"):
        prepare("bitfit")


@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_what_is_trained_whole_is_float32(name, prepare, setup_of):
    model = tiny.build("qwen2_biased", torch.bfloat16)
    prepared = METHODS[name].prepare(model, setup := setup_of(model, 1e-4))
    trained = {n: p.detach().clone() for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    train_prepared(prepared, setup)
    steps = [
        (prepared.model.get_parameter(n) - p)[p != 0].abs() for n, p in trained.items() if "norm" in n or p.ndim == 1
    ]
    assert (torch.cat(steps) > 0).float().mean() > 0.9  # in bfloat16 most of numbers near one would stay


@pytest.mark.parametrize(("options", "ratio"), [({"ratio": 4.0}, 4), ({}, 16)])
def test_lora_plus_gives_b_a_higher_rate(options, ratio, prepare):
    prepared, _, _ = prepare("lora+", 1e-3, options=options)
    rates = {id(p): group["lr"] for group in prepared.optimizer.param_groups for p in group["params"]}
    for layer in lora_layers(prepared.model).values():
        assert rates[id(layer.lora_A["default"].weight)] == 1e-3
        assert rates[id(layer.lora_B["default"].weight)] == pytest.approx(ratio * 1e-3)


@pytest.mark.parametrize(("name", "options"), [("lora-fa", {}), ("lora-null", {"freeze": True})])
def test_a_stays_where_the_method_says_so(name, options, prepare):
    prepared, setup, _ = prepare(name, 1e-2, options=options)
    before = {n: layer.lora_A["default"].weight.clone() for n, layer in lora_layers(prepared.model).items()}
    B = {n: layer.lora_B["default"].weight.clone() for n, layer in lora_layers(prepared.model).items()}
    train_prepared(prepared, setup)
    for n, layer in lora_layers(prepared.model).items():
        assert torch.equal(layer.lora_A["default"].weight, before[n])
        assert not torch.equal(layer.lora_B["default"].weight, B[n])


def test_dora_is_not_compiled(prepare):
    recipe = TrainConfig(max_steps=1, batch_size=8, precision="fp32", compile=True)
    prepared, setup, _ = prepare("dora", train=recipe)
    counters["stats"].clear()
    train_prepared(prepared, setup)
    assert not counters["stats"]["unique_graphs"]


def test_peft_corda_with_the_drop_in(prepare, files):
    products = []
    for drop_in in (False, True):
        folder = files / str(drop_in)
        folder.mkdir()
        prepared, *_ = prepare("peft-corda-kpm", options={"drop_in": drop_in}, folder=folder)
        layer = next(iter(lora_layers(prepared.model).values()))
        products.append(layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert not torch.equal(*products)  # PEFT decomposes in float32
    assert torch.dist(*products) < 1e-2 * products[1].norm()


def test_cached_tensors_come_back_as_they_were(setup_of):
    setup, whole = setup_of(tiny.build("llama")), torch.arange(12.0).reshape(4, 3)
    tensors = {"q": whole[:2], "k": whole[:3], "v": whole.T}  # views, as EVA gives layers with the same input
    setup.cached(lambda: tensors)
    read = setup.cached(dict)  # this function is not called
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_adalora_prunes_to_a_budget_of_parameters(prepare):
    recipe = TrainConfig(learning_rate=2e-2, max_steps=40, batch_size=8, precision="fp32")
    prepared, setup, _ = prepare("adalora", train=recipe, steps=40)
    layers = lora_layers(prepared.model).values()
    assert {int(layer.r["default"]) for layer in layers} == {6}
    train_prepared(prepared, setup)
    assert len({int((layer.lora_E["default"] != 0).sum()) for layer in layers}) > 1
    # Where ranks are counted, as PEFT does, two to three of the dearest are missing or too many.
    dearest = max(layer.in_features + layer.out_features for layer in layers)
    assert count_parameters(prepared.model)["adapter"] == pytest.approx(setup.budget, abs=dearest)


def test_dora_scales_rows_to_their_length(prepare):
    prepared, _, base = prepare("dora")
    for name, layer in lora_layers(prepared.model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            B.normal_()
        W, x = weight_of(base.get_submodule(name)).double(), torch.randn(3, A.shape[1])
        moved = W + 2 * B.double() @ A.double()
        expected = x.double() @ (W.norm(dim=1) / moved.norm(dim=1) * moved.T)  # Eq. 5 of the paper, m as at the start
        assert torch.dist(layer(x).double(), expected) < 1e-5 * expected.norm()


def test_pissa_trains_the_head_of_the_svd(prepare):
    prepared, _, base = prepare("pissa")
    for name, layer in lora_layers(prepared.model).items():
        U, sigma, Vh = torch.linalg.svd(weight_of(base.get_submodule(name)).double(), full_matrices=False)
        head = U[:, :4] * sigma[:4] @ Vh[:4]
        BA = 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert torch.dist(BA, head) < 1e-4 * head.norm()


def test_lora_ga_starts_on_the_tasks_gradient(prepare):
    prepared, setup, base = prepare("lora-ga")
    for batch in labelled_batches(setup, setup.context("learn", 64), base):
        base(**batch).loss.backward()
    for name, layer in lora_layers(prepared.model).items():
        A = torch.nn.functional.normalize(layer.lora_A["default"].weight).double()
        Vh = torch.linalg.svd(base.get_submodule(name).weight.grad.double(), full_matrices=False).Vh
        assert (A @ Vh[:4].T).norm(dim=1).min() > 0.99


def test_eva_starts_on_the_inputs_and_shares_out_ranks(prepare):
    prepared, setup, base = prepare("eva")
    layers = lora_layers(prepared.model)
    ranks = [layer.r["default"] for layer in layers.values()]
    assert 4 < max(ranks) <= 8
    assert sum(ranks) <= 4 * len(ranks)
    batches = labelled_batches(setup, setup.context("learn"), base)
    for name, C in tiny.covariances_of(base, find_targets(base, "all-linear"), batches).items():
        if name in layers:  # not if all its ranks went to others
            A = layers[name].lora_A["default"].weight.double()
            assert torch.allclose(A @ A.T, torch.eye(len(A)).double(), atol=1e-4)
            by_chance = len(A) / len(C) * C.trace()
            assert (A @ C.double() @ A.T).trace() > 2 * by_chance


def test_eva_shares_out_as_many_ranks_as_the_budget_pays_for(prepare, monkeypatch):
    def to_wide_layers(model, batches, config=None, **_):
        """A rank for each of attention's layers, all others for the MLP's, which are wider."""
        names = [f"base_model.model.{name}" for name in find_targets(tiny.build("llama"), "all-linear")]
        wide = [name for name in names if "mlp" in name]
        total = sum(config.rank_pattern.values()) if config else 4 * len(names)
        each, more = divmod(total - (len(names) - len(wide)), len(wide))
        ranks = dict.fromkeys(names, 1) | {name: each + (i < more) for i, name in enumerate(wide)}
        return {name: torch.ones(r, model.get_submodule(name).in_features) for name, r in ranks.items()}

    monkeypatch.setattr(peft, "get_eva_state_dict", to_wide_layers)
    prepared, setup, _ = prepare("eva")
    assert count_parameters(prepared.model)["adapter"] == pytest.approx(setup.budget, abs=80)  # 1.16 times as many else


def test_lora_null_is_the_weight_on_the_least_used_directions(prepare, tokenizer, monkeypatch):
    # A GPU sums C in another order, which turns eigenvectors of close eigenvalues.
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    prepared, setup, base = prepare("lora-null")
    batches, _ = context_batches(tokenizer, setup.context("keep"), 512)
    targets = find_targets(base, "all-linear")
    for name, C in tiny.covariances_of(base, targets, batches).items():
        P = torch.linalg.eigh(C.double()).eigenvectors[:, :4]
        W = weight_of(targets[name]).double()
        layer = lora_layers(prepared.model)[name]
        A, B = layer.lora_A["default"].weight[:4].double(), layer.lora_B["default"].weight[:, :4].double()
        assert torch.dist(2 * B @ A, W @ P @ P.T) / torch.linalg.norm(W @ P) < 1e-5  # scale 8 / 4
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-4)


def test_a_quantized_base_does_not_fit_lora_ga(setup_of):
    model = tiny.build("llama")
    model.is_quantized = True
    with pytest.raises(CordaError, match="quantized"):
        METHODS["lora-ga"].prepare(model, setup_of(model))


@pytest.mark.parametrize("name", ["lora-ga", "eva"])
def test_a_start_from_answers_that_were_all_cut_away_is_refused(name, prepare, files):
    learn = DataConfig(str(files / "learn.jsonl"), max_length=2)
    with pytest.raises(CordaError, match="responses are cut away at --max_length 2"):
        prepare(name, learn=learn)
