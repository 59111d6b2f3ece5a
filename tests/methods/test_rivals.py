"""The rivals at learning without forgetting do what their papers say, in the trained weights."""

import json

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft.tuners.osf.layer import OSFLayer
from safetensors.torch import load_file

from corda_lora.adapters.lora import lora_layers
from corda_lora.compare.job import train_prepared
from corda_lora.config import CordaError, DataConfig, TrainConfig
from corda_lora.data.batches import context_batches
from corda_lora.evaluation.answers import answer_log_probs, padded
from corda_lora.methods.registry import METHODS, check_options
from corda_lora.methods.rivals import _encoded_context, _shares
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_of

ON_CONTEXT = {"distill": "distillation", "replay": "replay"}


def trained(prepare, name, options, micro_batch_size=8, precision="fp32", **fields):
    """Weights and record of three steps of gradient descent. (AdamW would blow up differences in rounding.)"""
    recipe = TrainConfig(
        learning_rate=0.2, max_steps=3, batch_size=8, micro_batch_size=micro_batch_size, precision=precision,
        warmup=0.0, schedule="constant", **fields,
    )  # fmt: skip
    prepared, setup, _ = prepare(name, options=options, train=recipe)
    parameters = [p for p in prepared.model.parameters() if p.requires_grad]
    record = train_prepared(
        prepared._replace(optimizer=torch.optim.SGD(parameters, recipe.learning_rate), compiles=True), setup
    )
    return torch.cat([p.detach().flatten() for p in parameters]), record


@torch.no_grad()
def context_losses(prepared, setup, base):
    """KL(base‖tuned) and cross entropy, per answer token of the whole context, written out in float64."""
    inputs, answers = padded(_encoded_context(setup, None), setup.tokenizer, base)
    tuned, before = (answer_log_probs(m.eval(), inputs, answers).double() for m in (prepared.model, base))
    targets = inputs["input_ids"][:, 1:][answers]
    return (before.exp() * (before - tuned)).sum(1).mean(), F.nll_loss(tuned, targets)


@pytest.mark.parametrize("name", ON_CONTEXT)
def test_the_context_moves_the_weights_by_as_much_whatever_the_micro_batches(name, prepare):
    options = {"weight": 2.0, "size": 6}
    weights, record = trained(prepare, name, options)
    in_two, again = trained(prepare, name, options, 4)
    in_eight, _ = trained(prepare, name, options, 1)  # more micro-batches than samples of the context
    without, _ = trained(prepare, name, options | {"weight": 0.0})
    moved = torch.dist(weights, without)
    assert moved > 1e-3
    assert torch.dist(weights, in_two) < 1e-2 * moved
    assert torch.dist(weights, in_eight) < 1e-2 * moved
    for (_, one), (_, two) in zip(record["penalties"][ON_CONTEXT[name]], again["penalties"][ON_CONTEXT[name]]):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ON_CONTEXT)
def test_a_term_on_the_context_is_what_it_says(name, prepare):
    prepared, setup, base = prepare(name, options={"weight": 3.0, "size": 16})  # all samples in each step
    for layer in lora_layers(prepared.model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    term = prepared.rehearsals[ON_CONTEXT[name]]()
    assert prepared.model.training or name == "replay"
    divergence, cross_entropy = context_losses(prepared, setup, base)
    assert term.item() == pytest.approx(3 * (divergence if name == "distill" else cross_entropy).item(), rel=1e-4)


@pytest.mark.parametrize("name", ON_CONTEXT)
def test_training_lowers_what_the_term_says(name, prepare):
    after = []
    for weight in (0.0, 10.0):
        prepared, setup, base = prepare(name, 1e-2, options={"weight": weight})
        train_prepared(prepared, setup)
        after.append(context_losses(prepared, setup, base)[name == "replay"])
    assert after[1] < 0.5 * after[0] if name == "distill" else after[1] < after[0]


@pytest.mark.parametrize("name", [*ON_CONTEXT, "ewc"])
def test_terms_train_in_mixed_precision_with_dropout_and_checkpointing(name, prepare):
    weights, _ = trained(prepare, name, None, 4, "bf16", lora_dropout=0.5, gradient_checkpointing=True)
    assert weights.isfinite().all()


def test_the_base_is_run_without_dropout(prepare):
    recipe = TrainConfig(max_steps=1, batch_size=8, precision="fp32", lora_dropout=0.5)
    prepared, _, _ = prepare("distill", train=recipe)
    prepared.model.train()
    for layer in lora_layers(prepared.model).values():  # dropout in front of B = 0 changes nothing
        assert not layer.lora_B["default"].weight.any()
    assert prepared.rehearsals["distillation"]().item() == pytest.approx(0, abs=1e-6)
    assert prepared.model.training
    assert all(layer.lora_A["default"].weight.requires_grad for layer in lora_layers(prepared.model).values())


def test_samples_are_drawn_without_replacement_and_dealt_out(setup_of):
    encoded = _encoded_context(setup_of(tiny.build("llama")), 15)
    shares = _shares(encoded, 6, 4, seed=0)
    steps = [[next(shares) for _ in range(4)] for _ in range(5)]
    drawn = [e for step in steps for rows, _ in step for e in rows]
    assert [sum(len(rows) for rows, _ in step) for step in steps] == [6] * 5
    assert all(sum(e is d for d in drawn[:12]) <= 1 for e in encoded)
    assert all(sum(e is d for d in drawn) == 2 for e in encoded)
    for step in steps:
        assert all(factor == 4 / sum(e.targets for rows, _ in step for e in rows) for _, factor in step)


def test_more_samples_in_a_step_than_there_are_is_refused(prepare):
    with pytest.raises(CordaError, match="size is 64, but there are only 16 samples with an answer"):
        prepare("distill", options={"size": 64})


def test_ewc_holds_the_weights_where_they_were(prepare):
    moved = []
    for weight in (0.0, 1e6):
        recipe = TrainConfig(learning_rate=1e-2, max_steps=20, batch_size=8, precision="fp32")
        prepared, setup, _ = prepare("ewc", options={"weight": weight}, train=recipe)
        train_prepared(prepared, setup)
        information = setup.cached(dict)
        deltas = {name: layer.get_delta_weight("default") for name, layer in lora_layers(prepared.model).items()}
        moved.append(sum((information[name] * delta.square()).sum().item() for name, delta in deltas.items()))
    assert moved[1] < 1e-3 * moved[0]


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d"])
def test_ewcs_term_is_the_drift_that_the_diagonal_predicts(family, prepare, files):
    sample = {"prompt": "The capital of country 7?", "response": " It is city 7."}
    (files / "same.jsonl").write_text((json.dumps(sample) + "\n") * 120)  # 120 draws of the answers
    keep = DataConfig(str(files / "same.jsonl"))
    prepared, setup, base = prepare("ewc", family=family, options={"weight": 2.0, "samples": 120}, keep=keep)
    weights = {name: base.get_submodule(name).weight for name in setup.targets}
    log_probs = answer_log_probs(base, *padded(_encoded_context(setup, 1), setup.tokenizer, base))  # (a, vocabulary)
    gradients = torch.autograd.grad(
        log_probs.flatten(),
        [*weights.values()],
        torch.eye(log_probs.numel()).reshape(-1, log_probs.numel()),
        is_grads_batched=True,
    )
    information = setup.cached(dict)
    p, term = log_probs.detach().exp().flatten(), 0.0
    for name, gradient in zip(weights, gradients):
        found = information[name]
        exact = torch.einsum("k,kij->ij", p, gradient.square()) / len(log_probs)  # Σ over y of p(y)·(∂ log p(y) / ∂W)²
        assert torch.dist(found, exact) < 0.4 * exact.norm()
        layer = lora_layers(prepared.model)[name]
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        term += (found.double() * layer.get_delta_weight("default").double().square()).sum()  # weight 2, times ½
    assert prepared.penalties["ewc"]().item() == pytest.approx(term.item(), rel=1e-4)


# --- directions of the update ----------------------------------------------------------------------------------------


def reloaded(model, base, folder):
    """The logits of a saved adapter on the base model, in plain PEFT."""
    model.save_pretrained(folder)
    return tiny.logits(peft.PeftModel.from_pretrained(base, folder).eval())


@pytest.mark.parametrize("name", ["osf", "deft", "mica", "oplora", "sc-lora"])
def test_a_trained_adapter_is_saved_and_loaded_in_plain_peft(name, prepare, tmp_path):
    prepared, setup, base = prepare(name, max(METHODS[name].learning_rates))
    train_prepared(prepared, setup)
    moved, start = tiny.logits(prepared.model.eval()), tiny.logits(base)
    assert (moved - start).abs().max() > 0.02
    torch.testing.assert_close(reloaded(prepared.model, base, tmp_path), moved, rtol=0, atol=1e-4)
    if name in ("mica", "oplora", "sc-lora"):
        keys = load_file(tmp_path / "adapter_model.safetensors")
        assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}


@pytest.mark.parametrize(("family", "k"), [("llama", None), ("gpt2_conv1d", 9)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_oplora_leaves_the_leading_triples_as_they_are(family, k, precision, prepare):
    recipe = TrainConfig(learning_rate=1e-2, max_steps=4, batch_size=8, precision=precision)
    prepared, setup, base = prepare("oplora", family=family, options={"k": k}, train=recipe)
    train_prepared(prepared, setup)
    for name, layer in lora_layers(prepared.model).items():
        W = weight_of(base.get_submodule(name)).double()
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        delta = 2 * B @ A  # scale 8 / 4
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        assert delta.norm() > 1e-3
        assert (U[:, : k or 4].T @ delta).norm() < 1e-5 * delta.norm()
        assert (delta @ Vh[: k or 4].T).norm() < 1e-5 * delta.norm()
        torch.testing.assert_close((W + delta) @ Vh[: k or 4].T, U[:, : k or 4] * sigma[: k or 4], rtol=0, atol=1e-5)


def test_osf_trains_the_last_triples_of_every_layer(prepare):
    prepared, setup, base = prepare("osf", 1e-3)
    train_prepared(prepared, setup)
    for name, module in prepared.model.get_base_model().named_modules():
        if isinstance(module, OSFLayer):
            W = weight_of(base.get_submodule(name)).double()
            U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
            last = U[:, -4:] * sigma[-4:] @ Vh[-4:]
            factors = module.osf_svd_params["default"]
            assert {tuple(x.shape) for x in factors.values()} == {(W.shape[0], 4), (4,), (4, W.shape[1])}
            assert (
                0 < torch.dist(factors["U_low"] * factors["S_low"] @ factors["V_low"], last.float()) < 0.2 * last.norm()
            )


def test_mica_trains_a_alone_beside_the_last_left_vectors(prepare):
    prepared, setup, base = prepare("mica", 1e-2)
    train_prepared(prepared, setup)
    for name, layer in lora_layers(prepared.model).items():
        U = torch.linalg.svd(weight_of(base.get_submodule(name)).double(), full_matrices=False).U[:, -4:]
        B = layer.lora_B["default"].weight.double()
        assert torch.dist(B @ B.T, U @ U.T) < 1e-4  # the same subspace
        assert layer.lora_A["default"].weight.any()


def test_deft_passes_its_option_on(prepare):
    prepared, _, _ = prepare("deft", options={"decomposition": "qr"})
    assert prepared.model.peft_config["default"].decomposition_method == "qr"
    with pytest.raises(CordaError, match="decomposition is 'svd', but must be one of relu, qr"):
        check_options("deft", {"decomposition": "svd"})


@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_sc_lora_starts_on_what_the_task_uses_and_the_ability_does_not(beta, prepare, tokenizer, monkeypatch):
    # A GPU sums C in another order, which turns eigenvectors of close eigenvalues.
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    prepared, setup, base = prepare("sc-lora", options={"beta": beta})
    targets = find_targets(base, "all-linear")
    plus, minus = (
        tiny.covariances_of(base, targets, context_batches(tokenizer, setup.context(kind), 512)[0])
        for kind in ("learn", "keep")
    )
    assert torch.equal(tiny.logits(prepared.model.eval()), tiny.logits(base))
    for name, layer in lora_layers(prepared.model).items():
        W = weight_of(targets[name]).double()
        outputs = [W @ C[name].double() @ W.T for C in (plus, minus)]  # E[h hᵀ], h = W x
        Q = torch.linalg.eigh((1 - beta) * outputs[0] - beta * outputs[1]).eigenvectors[:, -4:]
        A, B = layer.lora_A["default"].weight[:4].double(), layer.lora_B["default"].weight[:, :4].double()
        assert torch.dist(2 * B @ A, Q @ Q.T @ W) < 1e-4 * (Q.T @ W).norm()  # scale 8 / 4


def test_directions_that_there_are_not_are_refused(prepare):
    with pytest.raises(CordaError, match="k is 16, but must be below 16, the singular directions of the narrowest"):
        prepare("oplora", options={"k": 16})
    with pytest.raises(CordaError, match="r is 16, but must be below 16"):
        prepare("osf", r=16)
    with pytest.raises(CordaError, match="the model has Conv1D"):
        prepare("osf", family="gpt2_conv1d")
