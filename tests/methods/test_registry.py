"""Every method by name: starts as the base model, has the budget's parameters, learns, and does what its paper says."""

import json
import math

import peft
import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from corda_lora.adapters.lora import lora_layers
from corda_lora.config import CordaError, DataConfig, TrainConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.methods.registry import METHODS, Setup, _found_once, _labelled, check_options, count_parameters
from corda_lora.models.targets import find_targets, weight_of
from corda_lora.training.train import train

KEEP = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(40)]
LEARN = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 41)]
STEPS = 10
# KaSA discards components of W. AdapterDrop and full fine-tuning have no ranks.
CHANGES_THE_START = {"kasa"}


@pytest.fixture
def files(tmp_path):
    for name, rows in (("keep", KEEP), ("learn", LEARN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def setup_of(model, tokenizer, files, rate=1e-3, **more):
    given = {
        "tokenizer": tokenizer,
        "learn": DataConfig(str(files / "learn.jsonl")),
        "keep": DataConfig(str(files / "keep.jsonl")),
        "samples": 16,
        "targets": find_targets(model, "all-linear"),
        "r": 4,
        "lora_alpha": 8.0,
        "train": TrainConfig(learning_rate=rate, max_steps=STEPS, batch_size=8, precision="fp32"),
        "steps": STEPS,
        "folder": files / "start",
    }
    (files / "start").mkdir(exist_ok=True)
    return Setup(**(given | more))


def prepare(name, files, tokenizer, rate=1e-3, family="llama", options=None, **more):
    """The prepared model, its setup, and an untouched copy of the base model."""
    model = tiny.build(family)
    setup = setup_of(model, tokenizer, files, rate, **more)
    torch.manual_seed(setup.train.seed)
    return METHODS[name].prepare(model, setup, **(options or {})), setup, tiny.build(family)


def run(prepared, setup, callbacks=()):
    samples = load_samples(setup.learn)
    everything = [*prepared.callbacks, *callbacks]
    return train(prepared.model, setup.tokenizer, samples, setup.train, 64, None, False, prepared.optimizer, everything)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "bitfit"])
def test_starts_as_the_base_with_the_budget_and_learns(name, files, tokenizer):
    prepared, setup, base = prepare(name, files, tokenizer, max(METHODS[name].learning_rates))
    change = (tiny.logits(prepared.model.eval()) - tiny.logits(base)).abs().max()
    if name not in CHANGES_THE_START:
        assert change < 1e-3
    losses = run(prepared, setup)["loss"]
    assert all(math.isfinite(loss) for _, loss in losses)
    assert losses[-1][1] < losses[0][1]
    parameters = count_parameters(prepared.model)
    if name not in ("full", "adapterdrop"):  # the latter rounds its width: on this tiny model by more than 1 %
        one = 96 if "+-" in name else 0  # allocation stops at most one component short of the budget
        # Both share out ranks as they cost the time before, and this tiny model has few.
        rel = {"eva": 0.04, "adalora": 0.04}.get(name, 0.01)
        assert parameters["adapter"] == pytest.approx(setup.budget, rel=rel, abs=one)


def test_bitfit_trains_biases_and_refuses_a_model_without(files, tokenizer):
    prepared, setup, base = prepare("bitfit", files, tokenizer, 1e-2, "qwen2_biased")
    run(prepared, setup)
    before = base.state_dict()
    for name, value in prepared.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".bias")
    with pytest.raises(CordaError, match="LlamaForCausalLM has none"):
        prepare("bitfit", files, tokenizer)


@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_what_is_trained_whole_is_float32(name, files, tokenizer):
    model = tiny.build("qwen2_biased", torch.bfloat16)
    prepared = METHODS[name].prepare(model, setup := setup_of(model, tokenizer, files, 1e-4))
    trained = {n: p.detach().clone() for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    run(prepared, setup)
    steps = [
        (prepared.model.get_parameter(n) - p)[p != 0].abs() for n, p in trained.items() if "norm" in n or p.ndim == 1
    ]
    assert (torch.cat(steps) > 0).float().mean() > 0.9  # in bfloat16 most of numbers near one would stay


@pytest.mark.parametrize(("options", "ratio"), [({"ratio": 4.0}, 4), ({}, 16)])
def test_lora_plus_gives_b_a_higher_rate(options, ratio, files, tokenizer):
    prepared, _, _ = prepare("lora+", files, tokenizer, 1e-3, options=options)
    rates = {id(p): group["lr"] for group in prepared.optimizer.param_groups for p in group["params"]}
    for layer in lora_layers(prepared.model).values():
        assert rates[id(layer.lora_A["default"].weight)] == 1e-3
        assert rates[id(layer.lora_B["default"].weight)] == pytest.approx(ratio * 1e-3)


@pytest.mark.parametrize(("name", "options"), [("lora-fa", {}), ("lora-null", {"freeze": True})])
def test_a_stays_where_the_method_says_so(name, options, files, tokenizer):
    prepared, setup, _ = prepare(name, files, tokenizer, 1e-2, options=options)
    before = {n: layer.lora_A["default"].weight.clone() for n, layer in lora_layers(prepared.model).items()}
    B = {n: layer.lora_B["default"].weight.clone() for n, layer in lora_layers(prepared.model).items()}
    run(prepared, setup)
    for n, layer in lora_layers(prepared.model).items():
        assert torch.equal(layer.lora_A["default"].weight, before[n])
        assert not torch.equal(layer.lora_B["default"].weight, B[n])


def test_dora_is_not_compiled(files, tokenizer):
    recipe = TrainConfig(max_steps=2, batch_size=8, precision="fp32", compile=True)
    prepared, setup, _ = prepare("dora", files, tokenizer, train=recipe)
    counters["stats"].clear()
    run(prepared, setup)
    assert not counters["stats"]["unique_graphs"]


def test_peft_corda_with_the_drop_in(files, tokenizer):
    found = []
    for drop_in in (False, True):
        folder = files / str(drop_in)
        folder.mkdir()
        prepared, *_ = prepare("peft-corda-kpm", files, tokenizer, options={"drop_in": drop_in}, folder=folder)
        layer = next(iter(lora_layers(prepared.model).values()))
        found.append(layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert not torch.equal(*found)  # PEFT's is of float32
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


def test_what_was_found_is_kept_as_it_was(files, tokenizer):
    setup, whole = setup_of(tiny.build("llama"), tokenizer, files), torch.arange(12.0).reshape(4, 3)
    given = {"q": whole[:2], "k": whole[:3], "v": whole.T}  # layers with the same input, in EVA
    _found_once(setup, lambda: given)
    found = _found_once(setup, dict)  # not asked again
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_adalora_prunes_to_a_budget_of_parameters(files, tokenizer):
    recipe = TrainConfig(learning_rate=2e-2, max_steps=40, batch_size=8, precision="fp32")
    prepared, setup, _ = prepare("adalora", files, tokenizer, train=recipe, steps=40)
    layers = lora_layers(prepared.model).values()
    assert {int(layer.r["default"]) for layer in layers} == {6}
    run(prepared, setup)
    assert len({int((layer.lora_E["default"] != 0).sum()) for layer in layers}) > 1
    # Where ranks are counted, as PEFT does, two to three of the dearest are missing or too many.
    dearest = max(layer.in_features + layer.out_features for layer in layers)
    assert count_parameters(prepared.model)["adapter"] == pytest.approx(setup.budget, abs=dearest)


def test_dora_scales_rows_to_their_length(files, tokenizer):
    prepared, _, base = prepare("dora", files, tokenizer)
    for name, layer in lora_layers(prepared.model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            B.normal_()
        W, x = weight_of(base.get_submodule(name)).double(), torch.randn(3, A.shape[1])
        moved = W + 2 * B.double() @ A.double()
        expected = x.double() @ (W.norm(dim=1) / moved.norm(dim=1) * moved.T)  # Eq. 5 of the paper, m as at the start
        assert torch.dist(layer(x).double(), expected) < 1e-5 * expected.norm()


def test_pissa_trains_the_head_of_the_svd(files, tokenizer):
    prepared, _, base = prepare("pissa", files, tokenizer)
    for name, layer in lora_layers(prepared.model).items():
        U, sigma, Vh = torch.linalg.svd(weight_of(base.get_submodule(name)).double(), full_matrices=False)
        head = U[:, :4] * sigma[:4] @ Vh[:4]
        BA = 2 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert torch.dist(BA, head) < 1e-4 * head.norm()


def test_lora_ga_starts_on_the_tasks_gradient(files, tokenizer):
    prepared, setup, base = prepare("lora-ga", files, tokenizer)
    for batch in _labelled(setup, setup.context("learn", samples=64)[0], base):
        base(**batch).loss.backward()
    for name, layer in lora_layers(prepared.model).items():
        A = torch.nn.functional.normalize(layer.lora_A["default"].weight).double()
        Vh = torch.linalg.svd(base.get_submodule(name).weight.grad.double(), full_matrices=False).Vh
        assert (A @ Vh[:4].T).norm(dim=1).min() > 0.99


def test_eva_starts_on_the_inputs_and_shares_out_ranks(files, tokenizer):
    prepared, setup, base = prepare("eva", files, tokenizer)
    layers = lora_layers(prepared.model)
    ranks = [layer.r["default"] for layer in layers.values()]
    assert 4 < max(ranks) <= 8
    assert sum(ranks) <= 4 * len(ranks)
    batches = _labelled(setup, setup.context("learn")[0], base)
    for name, C in tiny.covariances_of(base, find_targets(base, "all-linear"), batches).items():
        if name in layers:  # not if all its ranks went to others
            A = layers[name].lora_A["default"].weight.double()
            assert torch.allclose(A @ A.T, torch.eye(len(A)).double(), atol=1e-4)
            by_chance = len(A) / len(C) * C.trace()
            assert (A @ C.double() @ A.T).trace() > 2 * by_chance


def test_eva_shares_out_as_many_ranks_as_the_budget_pays_for(files, tokenizer, monkeypatch):
    def to_wide_layers(model, batches, config=None, **_):
        """A rank for each of attention's layers, all others for the MLP's, which are wider."""
        names = [f"base_model.model.{name}" for name in find_targets(tiny.build("llama"), "all-linear")]
        wide = [name for name in names if "mlp" in name]
        total = sum(config.rank_pattern.values()) if config else 4 * len(names)
        each, more = divmod(total - (len(names) - len(wide)), len(wide))
        ranks = dict.fromkeys(names, 1) | {name: each + (i < more) for i, name in enumerate(wide)}
        return {name: torch.ones(r, model.get_submodule(name).in_features) for name, r in ranks.items()}

    monkeypatch.setattr(peft, "get_eva_state_dict", to_wide_layers)
    prepared, setup, _ = prepare("eva", files, tokenizer)
    assert count_parameters(prepared.model)["adapter"] == pytest.approx(setup.budget, abs=80)  # 1.16 times as many else


@pytest.mark.parametrize("options", [{"beta": 0.5, "gamma": 0.25}, {}])
def test_kasa_adds_its_penalty(options, files, tokenizer):
    prepared, _, _ = prepare("kasa", files, tokenizer, options=options)
    batch = tiny.batches("llama")[0]
    model = prepared.model.train()
    with_penalty = model(**batch, labels=batch["input_ids"]).loss
    plain = model.eval()(**batch, labels=batch["input_ids"]).loss
    penalty = model.base_model._get_kasa_loss()
    assert penalty > 0
    assert float((with_penalty - plain).detach()) == pytest.approx(float(penalty.detach()), rel=1e-4, abs=1e-6)


def test_lora_null_is_the_weight_on_the_least_used_directions(files, tokenizer):
    prepared, setup, base = prepare("lora-null", files, tokenizer)
    batches, _ = context_batches(tokenizer, setup.context("keep")[0], 512)
    targets = find_targets(base, "all-linear")
    for name, C in tiny.covariances_of(base, targets, batches).items():
        P = torch.linalg.eigh(C.double()).eigenvectors[:, :4]
        W = weight_of(targets[name]).double()
        layer = lora_layers(prepared.model)[name]
        A, B = layer.lora_A["default"].weight[:4].double(), layer.lora_B["default"].weight[:, :4].double()
        assert torch.dist(2 * B @ A, W @ P @ P.T) / torch.linalg.norm(W @ P) < 1e-5  # scale 8 / 4
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-4)


def test_pefts_corda_is_decomposed_once(files, tokenizer, monkeypatch):
    first, _, _ = prepare("peft-corda-kpm", files, tokenizer)
    monkeypatch.setattr("peft.tuners.lora.corda.calib_cov_distribution", None)  # would raise if it were called
    second, _, _ = prepare("peft-corda-kpm", files, tokenizer)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("corda++-kpm-balanced", "start_adapter"),
        ("milora", "start_adapter"),
        ("lora-null", "walk"),
        ("eva", "_labelled"),
    ],
)
def test_what_a_method_finds_before_training_is_found_once(name, work, files, tokenizer, monkeypatch):
    assert METHODS[name].looks
    first, _, _ = prepare(name, files, tokenizer)
    monkeypatch.setattr(f"corda_lora.methods.registry.{work}", None)  # would raise if it were called
    second, _, _ = prepare(name, files, tokenizer)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


@pytest.mark.parametrize(("mode", "of"), [("kpm", "keep"), ("ipm", "learn")])
def test_each_mode_looks_at_its_own_samples(mode, of, files, tokenizer, monkeypatch):
    seen = []
    real = Setup.data
    monkeypatch.setattr(Setup, "data", lambda self, of: seen.append(of) or real(self, of))
    prepare(f"corda-{mode}-paper", files, tokenizer)
    assert seen == [of]
    if of == "keep":
        with pytest.raises(CordaError, match="give a context"):
            prepare("corda-kpm-balanced", files, tokenizer, keep=None, folder=files / "other")


def test_milora_is_the_tail_of_the_plain_svd(files, tokenizer):
    prepared, _, base = prepare("milora", files, tokenizer)
    for name, layer in lora_layers(prepared.model).items():
        U, sigma, Vh = torch.linalg.svd(base.get_submodule(name).weight.double(), full_matrices=False)
        tail = U[:, -4:] * sigma[-4:] @ Vh[-4:]
        A, B = layer.lora_A["default"].weight[:4].double(), layer.lora_B["default"].weight[:, :4].double()
        assert torch.dist(2 * B @ A, tail) / torch.linalg.norm(tail) < 1e-4


class Seen(TrainerCallback):
    """The samples of every step, in their order."""

    def __init__(self, model):
        self.ids = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.ids.append(kwargs["input_ids"].tolist())


@pytest.mark.parametrize("name", ["full", "dylora", "adapterdrop", "adalora", "corda-kpm-anchored", "eva"])
def test_all_see_the_same_samples_in_the_same_order(name, files, tokenizer):
    orders = []
    for one in ("lora", name):
        prepared, setup, _ = prepare(one, files, tokenizer)
        seen = Seen(prepared.model)
        run(prepared, setup, [seen])
        orders.append(seen.ids)
    assert len(orders[0]) == STEPS
    assert orders[0] == orders[1]


def test_a_corda_adapter_with_a_faster_b(files, tokenizer):
    prepared, _, _ = prepare("corda-ipm-balanced", files, tokenizer, 1e-3, options={"ratio": 4.0})
    rates = {id(p): group["lr"] for group in prepared.optimizer.param_groups for p in group["params"]}
    for layer in lora_layers(prepared.model).values():
        assert rates[id(layer.lora_A["default"].weight)] == 1e-3
        assert rates[id(layer.lora_B["default"].weight)] == 4e-3


def test_another_context_and_fewer_samples_of_it(files, tokenizer):
    """ipm on the samples to keep is the head of what kpm takes the tail of."""

    def A_of(folder, **options):
        (files / folder).mkdir()
        prepared, _, _ = prepare("corda-ipm-seeded", files, tokenizer, options=options, folder=files / folder)
        return {n: layer.lora_A["default"].weight.detach() for n, layer in lora_layers(prepared.model).items()}

    own, other = A_of("a"), A_of("b", context=str(files / "keep.jsonl"))
    fewer, swapped = A_of("c", context=str(files / "keep.jsonl"), samples=4), A_of("d", samples=4)
    kept = setup_of(tiny.build("llama"), tokenizer, files)
    as_task, _, _ = prepare("corda-ipm-seeded", files, tokenizer, learn=kept.keep, folder=files / "start")
    for name, layer in lora_layers(as_task.model).items():
        assert torch.equal(other[name], layer.lora_A["default"].weight)
        assert len({tuple(A[name].flatten().tolist()) for A in (own, other, fewer, swapped)}) == 4


def test_options_are_checked_before_anything_runs():
    check_options("lora+", {"ratio": 4})
    check_options("corda-ipm-balanced", {"ratio": 4, "samples": 8, "orientation": "diagonal"})
    with pytest.raises(CordaError, match="method lora has no option 'ratio': it has none"):
        check_options("lora", {"ratio": 4})
    with pytest.raises(CordaError, match="method peft-corda-kpm has no option 'mode'"):
        check_options("peft-corda-kpm", {"mode": "ipm"})
    with pytest.raises(CordaError, match="no option 'rank'"):
        check_options("corda-ipm-balanced", {"rank": 4})
    with pytest.raises(CordaError, match="min_rank"):
        check_options("corda-kpm-anchored", {"min_rank": 4})


def test_a_quantized_base_does_not_fit_lora_ga(files, tokenizer):
    model = tiny.build("llama")
    model.is_quantized = True
    with pytest.raises(CordaError, match="quantized"):
        METHODS["lora-ga"].prepare(model, setup_of(model, tokenizer, files))


def test_what_is_trained_is_counted(files, tokenizer):
    anchored, setup, _ = prepare("corda-kpm-anchored", files, tokenizer)
    lora, _, _ = prepare("lora", files, tokenizer)
    assert isinstance(lora.model, peft.PeftModel)
    assert count_parameters(lora.model) == {"adapter": setup.budget, "trainable": setup.budget}
    B = sum(layer.lora_B["default"].weight.numel() for layer in lora_layers(anchored.model).values())
    assert count_parameters(anchored.model) == {"adapter": setup.budget, "trainable": B}
