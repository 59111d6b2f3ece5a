"""Penalties are trained with, as `corda compare` trains: once per optimizer step, whatever the micro-batches."""

import pytest
import tiny
import torch

from corda_lora.compare.job import train_prepared
from corda_lora.config import TrainConfig

STRONG = {"kasa": {"beta": 0.5, "gamma": 0.25}, "adalora": {"orthogonality": 2.0}}
OFF = {"kasa": {"beta": 0.0, "gamma": 0.0}, "adalora": {"orthogonality": 0.0}}
NAME = {"kasa": "kasa", "adalora": "orthogonality"}


@pytest.fixture
def trained(prepare):
    """trained(method, options, micro_batch_size) → weights, record and the penalty before training, of three steps of
    gradient descent. (AdamW would blow up differences in rounding.)"""

    def train(name, options, micro_batch_size=8, averages=False, calls=None):
        recipe = TrainConfig(
            learning_rate=0.2, max_steps=3, batch_size=8, micro_batch_size=micro_batch_size, precision="fp32",
            warmup=0.0, schedule="constant",
        )  # fmt: skip
        prepared, setup, _ = prepare(name, options=options, train=recipe)
        parameters = [p for p in prepared.model.parameters() if p.requires_grad]
        prepared = prepared._replace(optimizer=torch.optim.SGD(parameters, recipe.learning_rate))
        if averages:  # the trainer then averages the losses of micro-batches, and otherwise adds them up
            prepared.model.get_base_model().accepts_loss_kwargs = False
        term = prepared.penalties[NAME[name]]
        start = term().item()
        if calls is not None:
            prepared = prepared._replace(penalties={NAME[name]: lambda: calls.append(name) or term()})
        record = train_prepared(prepared, setup)
        return torch.cat([p.detach().flatten() for p in parameters]), record, start

    return train


@pytest.mark.parametrize("name", STRONG)
def test_a_penalty_moves_the_weights_by_as_much_whatever_the_micro_batches(name, trained):
    weights, _, _ = trained(name, STRONG[name])
    in_two, _, _ = trained(name, STRONG[name], micro_batch_size=4)
    without, _, _ = trained(name, OFF[name])
    moved = torch.dist(weights, without)
    assert moved > 1e-3
    assert torch.dist(weights, in_two) < 1e-3 * moved


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("name", STRONG)
def test_a_penalty_is_in_the_loss_once_and_logged_by_its_name(name, averages, trained):
    calls = []
    _, record, start = trained(name, STRONG[name], 4, averages, calls)
    assert len(calls) == 3  # steps, of two micro-batches each
    _, plain, zero = trained(name, OFF[name], 4, averages)
    assert start > 0.1
    assert not zero
    assert record["penalties"].keys() == {NAME[name]}
    logged = record["penalties"][NAME[name]]
    assert [step for step, _ in logged] == [1, 2, 3]
    assert logged[0][1] == pytest.approx(start)
    assert logged[2][1] < logged[0][1]
    assert record["loss"][0][1] - plain["loss"][0][1] == pytest.approx(start, rel=1e-4)


def test_adalora_is_regularized_as_in_peft(prepare):
    prepared, _, _ = prepare("adalora", options={"orthogonality": 0.75})
    batch, config = tiny.batches()[0], prepared.model.peft_config["default"]
    plain = prepared.model(**batch, labels=batch["input_ids"]).loss
    config.orth_reg_weight = 0.75
    difference = prepared.model(**batch, labels=batch["input_ids"]).loss - plain
    assert prepared.penalties["orthogonality"]().item() == pytest.approx(difference.item(), rel=1e-5)
