"""The penalty is trained with, and the meter tells the drift: through `train()`, on a tiny model."""

import json
import os
from dataclasses import replace

import peft
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerState, TrainingArguments

from corda_lora import get_corda_model
from corda_lora.adapters.lora import install, lora_layers
from corda_lora.algebra.second_order import Low
from corda_lora.config import CordaConfig, CordaError, LoraStart, TrainConfig
from corda_lora.data.samples import Sample
from corda_lora.evaluation.evaluate import loss_and_drift
from corda_lora.evaluation.meter import generic_penalty
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.statistics import Sides, Statistics, answered_batches, collect_statistics
from corda_lora.training.keeping import KeepCallback, Keeper, PredictedDrift
from corda_lora.training.train import plain_lora, train

TASK = [Sample(f"{i} + {i} =", f" {i + i}", {}) for i in range(40)]
CONTEXT, HELD_OUT = tiny.answered(48, seed=1), tiny.answered(32, seed=2)
SPLITS = ["anchored", "paper", "balanced", "seeded", "lora"]


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    model = tiny.build("llama")
    return collect_statistics(model, find_targets(model, "all-linear"), CONTEXT, 0, progress=False)


def recipe(**options) -> TrainConfig:
    settings = {"learning_rate": 3e-2, "max_steps": 24, "batch_size": 8, "precision": "fp32", "schedule": "constant"}
    return TrainConfig(**settings | {"warmup": 0.0} | options)


def adapted(split, config):
    model = tiny.build("llama")
    if split == "lora":
        return plain_lora(model, LoraStart(r=4), config)
    batches = answered_batches(CONTEXT, 0)
    mode = "ipm" if split == "seeded" else "kpm"
    return install(model, preprocess(model, CordaConfig(mode=mode, r=4, split=split), batches, progress=False))


def drift(model, tokenizer, encoded=HELD_OUT):
    return loss_and_drift(model, tokenizer, encoded)["tuned"]["drift"]


def run(split, tokenizer, statistics, keep=0.0, max_drift=None, work=None, **options):
    config = recipe(**options)
    model = adapted(split, config)
    keeper = Keeper(PredictedDrift(model, statistics), keep, max_drift, lambda: drift(model.eval(), tokenizer))
    record = train(
        model, tokenizer, TASK, config, 64, work, progress=False, callbacks=[keeper],
        penalties={"drift": keeper.penalty},
    )  # fmt: skip
    return model.eval(), keeper, record


@pytest.mark.parametrize("split", SPLITS)
def test_the_prediction_is_the_sum_of_the_formula_over_the_layers(split, tokenizer, statistics):
    model, _, _ = run(split, tokenizer, statistics, max_steps=3)
    expected = {}
    for name, layer in lora_layers(model).items():
        delta = (
            layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        C, D = (M.factor.double() @ M.factor.double().T + M.diagonal.double().diag() for M in statistics.layers[name])
        expected[name] = (
            0.5 * statistics.tokens / statistics.answers * float((D @ delta @ C @ delta.T).trace().detach())
        )
    predicted = PredictedDrift(model, statistics)
    found = predicted.by_layer()
    # float32 of two halves that nearly cancel
    assert {name: float(v.detach()) for name, v in found.items()} == pytest.approx(expected, rel=1e-2, abs=1e-7)
    assert float(predicted().detach()) == pytest.approx(sum(expected.values()), rel=1e-2)


@pytest.mark.parametrize("split", SPLITS)
def test_the_penalty_lowers_the_drift_on_samples_it_has_not_seen(split, tokenizer, statistics):
    free, _, before = run(split, tokenizer, statistics)
    kept, _, after = run(split, tokenizer, statistics, keep=100.0)
    assert drift(kept, tokenizer) < 0.5 * drift(free, tokenizer)
    assert after["loss"][-1][1] < before["loss"][0][1]  # it learned all the same
    assert after["penalties"]["drift"][0][1] == 0  # nothing has moved yet


def test_max_drift_is_where_the_run_ends(tokenizer, statistics):
    free, _, _ = run("lora", tokenizer, statistics, max_steps=60)
    aim = drift(free, tokenizer) / 4
    model, keeper, _ = run("lora", tokenizer, statistics, keep=1.0, max_drift=aim, max_steps=60)
    assert drift(model, tokenizer) == pytest.approx(aim, rel=0.3)
    assert keeper.history[-1][2] == pytest.approx(drift(model, tokenizer), rel=1e-3)
    assert keeper.history[-1][3] != 1.0


def test_a_bound_below_what_the_start_has_is_refused_before_training(tokenizer, statistics):
    model, _, _ = run("lora", tokenizer, statistics)
    keeper = Keeper(PredictedDrift(model, statistics), 1.0, 1e-6, lambda: drift(model, tokenizer))
    with pytest.raises(CordaError, match="max_drift is 1e-06, but the adapter to start from has a drift of"):
        train(model, tokenizer, TASK, recipe(), 64, progress=False, callbacks=[keeper])


@pytest.mark.parametrize("keep", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_no_price_is_refused(keep, statistics):
    with pytest.raises(CordaError, match="keep is"):
        Keeper(PredictedDrift(adapted("lora", recipe()), statistics), keep)


def test_statistics_of_another_model_are_refused(statistics):
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(CordaError, match=r"of another model: model\.layers\.0\.mlp\.up_proj has other weights"):
        PredictedDrift(plain_lora(model, LoraStart(r=4), recipe()), statistics)
    with pytest.raises(CordaError, match="has other weights, or the same in another dtype: float16 rounds them"):
        PredictedDrift(plain_lora(tiny.build("llama", torch.float16), LoraStart(r=4), recipe()), statistics)
    model = tiny.build("llama")
    few = collect_statistics(model, find_targets(model, ["q_proj"]), CONTEXT, 0, progress=False)
    with pytest.raises(CordaError, match="lack the layer"):
        PredictedDrift(adapted("lora", recipe()), few)


def test_statistics_that_do_not_fit_their_layers_are_refused(statistics):
    name, (C, D) = next(iter(statistics.layers.items()))
    cut = replace(statistics, layers=statistics.layers | {name: Sides(Low(C.factor[:-4], C.diagonal[:-4]), D)})
    with pytest.raises(CordaError, match=f"are damaged: {name} is no layer of {len(C.diagonal) - 4} inputs"):
        PredictedDrift(adapted("lora", recipe()), cut)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "q_proj by more than B A"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "the adapter is of the kind IA3"),
    ],
)
def test_an_adapter_whose_drift_is_not_that_of_its_factors_is_refused(config, said, statistics):
    config.task_type = "CAUSAL_LM"
    with pytest.raises(CordaError, match=said):
        PredictedDrift(peft.get_peft_model(tiny.build("llama"), config), statistics)


def test_what_is_trained_beside_the_factors_is_named(statistics):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"does not see .*lm_head\.modules_to_save.*one of 1 such"):
        KeepCallback(peft.get_peft_model(tiny.build("llama"), config), statistics)


def test_a_run_that_was_broken_off_goes_on_with_the_same_price(tokenizer, statistics, tmp_path):
    whole, keeper, _ = run("lora", tokenizer, statistics, 1.0, 0.01, tmp_path / "whole", checkpoints=4)
    state = json.loads((tmp_path / "whole/checkpoint-18/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Keeper"]["attributes"]["keep"] != 1.0
    for path in (tmp_path / "whole").glob("checkpoint-24"):
        path.rename(tmp_path / "away")
    again, resumed, _ = run("lora", tokenizer, statistics, 1.0, 0.01, tmp_path / "whole", checkpoints=4)
    assert resumed.keep == pytest.approx(keeper.keep, rel=1e-6)
    assert [row[0] for row in resumed.history] == [row[0] for row in keeper.history]
    for a, b in zip(whole.parameters(), again.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_run_that_is_resumed_with_another_fixed_price_has_that_price(tokenizer, statistics, tmp_path):
    run("lora", tokenizer, statistics, 1.0, work=tmp_path, checkpoints=4)
    (tmp_path / "checkpoint-24").rename(tmp_path / "away")
    _, keeper, _ = run("lora", tokenizer, statistics, 30.0, work=tmp_path, checkpoints=4)
    assert keeper.keep == 30.0
    assert [row[3] for row in keeper.history] == [1.0] * 5 + [30.0] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses a GPU cannot fork")
@pytest.mark.parametrize("callback", [False, True])
def test_in_two_processes_its_gradient_enters_once(callback, tokenizer, statistics, tmp_path):
    config = recipe(learning_rate=0.1, max_steps=1, micro_batch_size=4, trainer={"max_grad_norm": 0.0})

    def trained(keep):
        model = adapted("lora", config)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        weights = [p for p in model.parameters() if p.requires_grad]
        predicted = PredictedDrift(model, statistics)
        keeper = KeepCallback(model, statistics, keep) if callback else Keeper(predicted, keep)
        penalties = {} if callback else {"drift": keeper.penalty}
        gradient = torch.autograd.grad(50 * predicted(), weights)
        sgd = torch.optim.SGD(weights, config.learning_rate)
        train(model, tokenizer, TASK, config, 64, None, False, sgd, [keeper], penalties)
        return torch.cat([p.detach().flatten() for p in weights]), torch.cat([g.flatten() for g in gradient])

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, and not used
        AcceleratorState._reset_state(True)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        (free, expected), (kept, _) = trained(0.0), trained(50.0)
        assert AcceleratorState().num_processes == 2
        torch.testing.assert_close((free - kept) / config.learning_rate, expected, rtol=1e-3, atol=1e-4)
        (tmp_path / f"{rank} is right").touch()

    torch.multiprocessing.start_processes(work, nprocs=2, start_method="fork")
    assert len(list(tmp_path.glob("* is right"))) == 2


@pytest.mark.parametrize("accumulated", [1, 4])
def test_the_callback_keeps_in_a_trainer_of_somebody_else(accumulated, tokenizer, statistics, tmp_path):
    def weights(keep):
        model = adapted("lora", recipe())
        rows = [{"input_ids": tokenizer(s.prompt + s.response).input_ids} for s in TASK[10:]]
        rows = [{**row, "labels": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=8 // accumulated, use_cpu=True,
            gradient_accumulation_steps=accumulated, learning_rate=1e-2, lr_scheduler_type="constant",
            max_grad_norm=0.0, report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        callback = KeepCallback(model, statistics, keep)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        assert trainer.state.log_history[0].keys() >= {"loss", "drift"}
        return float(callback.predicted())

    assert weights(100.0) < 0.3 * weights(0.0)


def test_the_callback_refuses_scaled_gradients(statistics, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_grad_norm=0.0)
    arguments.fp16 = True
    callback = KeepCallback(adapted("lora", recipe()), statistics, 1.0)
    with pytest.raises(CordaError, match="set max_grad_norm"):
        callback.on_train_begin(arguments, None, None)


def test_the_callback_refuses_engines_whose_step_it_would_not_reach(statistics, tmp_path):
    arguments, model = TrainingArguments(str(tmp_path)), adapted("lora", recipe())
    callback = KeepCallback(model, statistics, 1.0)
    arguments.deepspeed_plugin = object()
    with pytest.raises(CordaError, match="DeepSpeed shows no gradients between two steps"):
        callback.on_train_begin(arguments, TrainerState(), None)
    arguments.deepspeed_plugin = None
    factor = next(iter(lora_layers(model).values())).lora_B["default"]
    factor.weight = torch.nn.Parameter(torch.empty(0))  # of a shard of FSDP 1 or ZeRO-3
    with pytest.raises(CordaError, match="show no whole factor"):
        callback.on_train_begin(arguments, TrainerState(), None)


def test_callbacks_of_several_abilities_log_a_drift_each(statistics):
    model, state = adapted("lora", recipe()), TrainerState(log_history=[{}])
    for name in ("facts", "sums"):
        KeepCallback(model, statistics, 1.0, name=name).on_log(None, state, None)
    assert state.log_history == [{"drift facts": 0.0, "drift sums": 0.0}]


def test_the_prediction_follows_what_trains_and_where_it_is(statistics):
    model = adapted("anchored", recipe())
    callback = KeepCallback(model, statistics)
    for layer in lora_layers(model).values():  # as a trainer might after the callback was made
        layer.lora_A["default"].weight.requires_grad_(True)
        layer.lora_A["default"].weight.data.mul_(2)
        layer.lora_B["default"].weight.data.normal_()
    callback.on_train_begin(TrainingArguments("x"), TrainerState(), None)
    assert float(callback.predicted().detach()) == pytest.approx(float(PredictedDrift(model, statistics)().detach()))


def test_the_callbacks_price_is_that_of_the_configuration(statistics):
    config, model = CordaConfig(mode="kpm", r=4, keep=30), tiny.build("llama")
    model = get_corda_model(model, config, answered_batches(CONTEXT, 0), progress=False)
    assert KeepCallback(model).keep == 30
    assert KeepCallback(model, keep=3.0).keep == 3
    assert KeepCallback(adapted("lora", recipe()), statistics).keep == 10


@pytest.mark.parametrize("options", [{"max_drift": 0.0}, {"max_drift": float("nan")}, {"points": 0}, {"keep": "5"}])
def test_options_of_the_callback_are_checked(options, statistics):
    with pytest.raises(CordaError, match=f"{next(iter(options))} is"):
        KeepCallback(adapted("lora", recipe()), statistics, **options)


def test_an_adapter_that_is_not_active_is_refused(statistics):
    model = adapted("lora", recipe())
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(CordaError, match="no active adapter 'default'"):
        KeepCallback(model, statistics)
    with pytest.raises(CordaError, match="nothing says what to keep"):
        KeepCallback(adapted("lora", recipe()))


@pytest.mark.parametrize(("name", "value"), [("answers", 0), ("answers", -5), ("tokens", "x"), ("digests", None)])
def test_statistics_that_cannot_be_are_damaged(name, value, statistics, tmp_path):
    statistics.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["corda"])
    save_file(tensors, tmp_path / "s.safetensors", {"corda": json.dumps(about | {name: value})})
    with pytest.raises(CordaError, match="is damaged"):
        Statistics.load(tmp_path / "s.safetensors")
    broken = tensors | {next(iter(tensors)): torch.full_like(next(iter(tensors.values())), torch.nan)}
    save_file(broken, tmp_path / "s.safetensors", {"corda": json.dumps(about)})
    with pytest.raises(CordaError, match="is damaged"):
        Statistics.load(tmp_path / "s.safetensors")


def test_two_adapters_that_are_active_together_are_refused(tokenizer, statistics):
    """Both change the model, and one would be counted."""
    model = plain_lora(tiny.build("llama"), LoraStart(r=4), recipe())
    keeper = KeepCallback(model, statistics)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear"))
    PredictedDrift(model, statistics)  # it is not active
    model.base_model.set_adapter(["default", "other"])
    said = "the adapter 'other' is active beside 'default', and drift is predicted of one alone"
    with pytest.raises(CordaError, match=said):
        PredictedDrift(model, statistics)
    with pytest.raises(CordaError, match=said):
        generic_penalty(model, tokenizer, 1.0)
    with pytest.raises(CordaError, match=said):  # it was made active in between
        train(model, tokenizer, TASK, recipe(), callbacks=[keeper])


def test_rehearsals_are_refused_where_fsdp_shards(tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = plain_lora(tiny.build("llama"), LoraStart(r=4), recipe())
    with pytest.raises(CordaError, match=r"FSDP trains on no further samples \(distillation\): use DDP"):
        train(model, tokenizer, TASK, recipe(), rehearsals={"distillation": lambda: torch.zeros(())})
