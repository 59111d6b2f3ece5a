"""The rivals at learning without forgetting do what their papers say, in the trained weights."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from corda_lora.adapters.lora import lora_layers
from corda_lora.compare.job import train_prepared
from corda_lora.config import CordaError, DataConfig, TrainConfig
from corda_lora.evaluation.answers import answer_log_probs, padded
from corda_lora.methods.rivals import _encoded_context, _shares

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
    rows = padded(_encoded_context(setup, None), setup.tokenizer, base)
    tuned, before = (answer_log_probs(m.eval(), *rows).double() for m in (prepared.model, base))
    targets = rows[0][:, 1:][rows[2]]
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
    term = prepared.penalties[ON_CONTEXT[name]]()
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
    assert prepared.penalties["distillation"]().item() == pytest.approx(0, abs=1e-6)
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
