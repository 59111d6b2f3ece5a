"""What a training is asked for beyond its recipe: rates by split, TRL's own options, held-out samples, packing."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from helpers import start
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTConfig

from corda_lora.adapters.lora import install, load_adapter
from corda_lora.cli import main
from corda_lora.config import CompareConfig, CordaError, EvalConfig, LoraStart, TrainConfig
from corda_lora.data.samples import Sample, hold_out
from corda_lora.training.arguments import trainer_arguments
from corda_lora.training.rates import LORA_RATE, RATES
from corda_lora.training.train import plain_lora, train, trained_share

SUMS = [Sample(f"{i} + {i} =", f" {i + i}", {}) for i in range(1, 33)]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint):
    """A working directory with `model`, `keep.jsonl`, `learn.jsonl` and `other.jsonl`."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: CPU)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint)
    samples = {"learn": SUMS[:16], "keep": SUMS[16:], "other": [Sample(f"{i} - {i} =", " 0", {}) for i in range(8)]}
    for name, part in samples.items():
        rows = ({"prompt": s.prompt, "response": s.response} for s in part)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def corda(command):
    main(command.split())


def corda_train(*more, output="tuned"):
    recipe = ["--data", "learn.jsonl", "--batch_size", 4, "--precision", "fp32", "--output", output]
    main([str(a) for a in ("train", "--model", "model", *recipe, *more)])
    with open(f"{output}/training.json") as file:
        return json.load(file)


def refused(capsys, *more):
    with pytest.raises(SystemExit) as stopped:
        corda_train(*more)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def weights(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Optimizer(TrainerCallback):
    """The optimizer, and its learning rate at the first step."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 0:
            self.kind, self.rate = type(optimizer.optimizer).__name__, optimizer.param_groups[0]["lr"]


# --- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("split", ["anchored", "paper", "balanced", "seeded"])
def test_the_rate_follows_the_split_also_of_a_copy(split, mode, tokenizer, tmp_path):
    """What PEFT alone saves (a checkpoint of another trainer, an upload) is enough to know it."""
    model, found = start(split=split, mode=mode, target_modules=["q_proj"])
    install(model, found).save_pretrained(tmp_path / "copy")
    adapted = load_adapter(tiny.build("llama"), tmp_path / "copy", trainable=True)
    seen, config = Optimizer(), TrainConfig(max_steps=1, batch_size=4, precision="fp32", warmup=0, schedule="constant")
    result = train(adapted, tokenizer, SUMS, config, progress=False, callbacks=[seen])
    assert seen.rate == result["learning_rate"] == RATES[split][mode]


def test_the_rate_taken_is_said(folder, capsys):
    assert corda_train("--max_steps", 1)["learning_rate"] == LORA_RATE
    assert f"learning rate {LORA_RATE:g}: that of plain LoRA" in capsys.readouterr().err
    corda("init --model model --context keep.jsonl --r 4 --device cpu --output start")
    capsys.readouterr()
    corda_train("--start", "start", "--max_steps", 2, output="default")
    rate = RATES["anchored"]["kpm"]
    said = capsys.readouterr().err
    assert f"learning rate {rate:g}: that of the split anchored in kpm" in said
    trained = sum(p.numel() for name, p in weights("default").items() if "lora_B" in name)
    assert re.search(rf"^trains {trained:,} of [\d,]+ parameters \(\d\.\d %\)$", said, re.MULTILINE)
    assert corda_train("--start", "start", "--max_steps", 2, "--learning-rate", rate, output="given")["steps"] == 2
    assert "that of the split" not in capsys.readouterr().err
    assert same_weights("default", "given")


def test_a_whole_model_has_no_rate_of_its_own(tokenizer):
    with pytest.raises(CordaError, match="give a learning_rate"):
        train(tiny.build("llama"), tokenizer, SUMS, TrainConfig(max_steps=1, precision="fp32"), progress=False)


@pytest.mark.parametrize(("split", "trained"), [("anchored", 1 / 2), ("seeded", 1), ("paper", 1), ("balanced", 1)])
def test_the_held_half_is_not_counted(split, trained):
    model, found = start(split=split, target_modules=["q_proj"])
    parameters = int(2 * (32 + 32) * 4 * trained)  # two layers, r = 4
    assert trained_share(install(model, found)).startswith(f"trains {parameters:,} of ")


# --- TRL's own options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adafactor", "Adafactor"), ("adamw_torch", "AdamW")])
def test_an_optimizer(name, kind, tokenizer):
    config = TrainConfig(max_steps=1, batch_size=4, precision="fp32", trainer={"optim": name})
    seen = Optimizer()
    train(plain_lora(tiny.build("llama"), LoraStart(r=2), config), tokenizer, SUMS, config, callbacks=[seen])
    assert seen.kind == kind


def test_the_three_ways_to_say_an_option(folder):
    one = ["--start", "start", "--max_steps", 2]
    corda("init --model model --context keep.jsonl --split paper --r 4 --device cpu --output start")
    corda_train(*one, output="plain")
    corda_train(*one, "--trainer.optim", "adafactor", "--trainer.max-grad-norm=0.5", output="dotted")
    corda_train(*one, "--trainer", '{"optim": "adafactor", "max_grad_norm": 0.5}', output="json")
    (folder / "recipe.yaml").write_text("trainer: {optim: adafactor, max_grad_norm: 0.5}\n")
    corda_train("--config", "recipe.yaml", *one, output="yaml")
    assert same_weights("dotted", "json")
    assert same_weights("dotted", "yaml")
    assert not same_weights("dotted", "plain")


def test_the_logs_of_a_tracker_end_up_in_the_output(folder, monkeypatch):
    class Tracker(TrainerCallback):
        """As TensorBoard's: below the folder that the trainer knows."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            path = Path(args.output_dir, "runs", "now", "events")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                print(state.global_step, file=file)
            if state.global_step == 2 and not (folder / "stopped").exists():
                (folder / "stopped").touch()
                raise KeyboardInterrupt

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    more = ["--max_steps", 4, "--trainer.report_to", "tensorboard", "--trainer.logging_steps", 2]
    with pytest.raises(SystemExit):
        corda_train(*more)
    corda_train(*more)
    lines = (folder / "tuned" / "runs" / "now" / "events").read_text().split()
    assert (lines[0], lines[-1]) == ("1", "4")
    assert not (folder / "tuned.work").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.optimm", "sgd"], "TRL's SFTConfig has no option 'optimm'; nearest names: optim"),
        (["--trainer.output_dir", "x"], "trainer.output_dir cannot be given: --output says it"),
        (["--trainer.bf16", "true"], "trainer.bf16 cannot be given: --precision says it"),
        (["--trainer.completion_only_loss", "false"], "cannot be given: the loss is on the responses"),
        (["--trainer.push_to_hub", "true"], "trainer.push_to_hub cannot be given: --push and --hub_private_repo"),
        (["--trainer.max_grad_norm", "much"], "trainer.max_grad_norm is 'much', but must be of type float"),
        (["--trainer.optim", "sgdd"], "trainer: sgdd is not a valid OptimizerNames"),
        (["--trainer.optim", "galore_adamw"], "trainer: "),
        (["--trainer.report_to", "paper"], "trainer: paper is not supported"),
        (["--trainer.lr_scheduler_kwargs", "{cycles: 2}"], "trainer: "),
        (["--trainer.eval_strategy", "steps"], "needs held-out samples: give --eval_data or --eval_share"),
        (["--early_stopping", "2"], "early_stopping needs held-out samples: give --eval_data or --eval_share"),
        (["--early_stopping", "2", "--checkpoints", "0"], "early stopping goes back to the checkpoint with the lowest"),
        (["--trainer.packing_strategy", "wrapped"], "cuts samples in two and mixes them"),
        (["--eval_share", "0.5", "--eval_data", "x"], "leave it or --eval_data out"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(options, said, folder, no_model_is_loaded, capsys):
    assert said in refused(capsys, *options)
    assert not list(folder.glob("tuned*"))


def test_a_comparison_refuses_options_before_its_first_run(folder, capsys):
    (folder / "recipe.yaml").write_text(
        "{model: model, data: learn.jsonl, eval: {learn: other.jsonl}, methods: [lora], train: {trainer: {optm: sgd}}}"
    )
    with pytest.raises(SystemExit):
        main(["compare", "recipe.yaml", "--output", "compared"])
    assert "TRL's SFTConfig has no option 'optm'" in capsys.readouterr().err
    with pytest.raises(CordaError, match="leave early_stopping out"):
        CompareConfig(["lora"], "d", EvalConfig(learn="d"), train=TrainConfig(early_stopping=1))


# --- held-out samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_held_out_loss_is_that_of_eval(size, folder):
    """A mean over tokens, however the samples are put into batches."""
    rows = ({"prompt": f"{i} - {i} =", "response": " 0" * (1 + i % 3)} for i in range(8))
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = corda_train("--max_steps", 4, "--eval_data", "long.jsonl", "--trainer.per_device_eval_batch_size", size)
    assert [step for step, _ in log["held_out_loss"]] == [1, 2, 3, 4]
    corda("eval --model model --adapter tuned --learn long.jsonl --output eval.json")
    measured = json.loads((folder / "eval.json").read_text())["results"]["learn"]["long.jsonl"]["tuned"]["loss"]
    assert log["held_out_loss"][-1][1] == pytest.approx(measured, rel=1e-5)


def test_measuring_does_not_change_the_training(folder):
    corda_train("--max_steps", 3, "--lora_dropout", 0.2, output="plain")
    corda_train("--max_steps", 3, "--lora_dropout", 0.2, "--eval_data", "other.jsonl", output="measured")
    assert same_weights("plain", "measured")


def test_a_share_is_held_out(folder):
    log = corda_train("--epochs", 1, "--eval_share", 0.25)
    assert (log["samples"], log["steps"], len(log["held_out_loss"])) == (12, 3, 3)
    kept, held = hold_out(SUMS, 0.25, 0)
    assert sorted(s.prompt for s in (*kept, *held)) == sorted(s.prompt for s in SUMS)
    assert (len(held), hold_out(SUMS, 0.25, 0), hold_out(SUMS, 0.0, 0)) == (8, (kept, held), (SUMS, []))
    assert hold_out(SUMS, 0.25, 1) != (kept, held)
    with pytest.raises(CordaError, match="none is left to learn"):
        hold_out(SUMS[:1], 0.25, 0)


STOPPING = ["--schedule", "constant", "--warmup", 0, "--learning-rate", 0.03, "--seed", 0]


@pytest.mark.parametrize("split", ["anchored", "paper"])
def test_training_stops_early_and_keeps_the_best(split, folder, capsys):
    """The sums are learned by heart, so other sums get worse after a few steps."""
    corda(f"init --model model --context keep.jsonl --split {split} --r 4 --device cpu --output start")
    more = [
        "--start",
        "start",
        *STOPPING,
        "--eval_data",
        "other.jsonl",
        "--early_stopping",
        2,
        "--trainer.eval_steps",
        1,
    ]
    log = corda_train(*more, "--max_steps", 40)
    losses = dict(log["held_out_loss"])
    assert log["kept_step"] == min(losses, key=losses.get)
    assert log["steps"] == log["kept_step"] + 2 < 40
    assert f"at step {log['kept_step']}, whose adapter is kept" in capsys.readouterr().out
    corda_train("--start", "start", *STOPPING, "--max_steps", log["kept_step"], output="short")
    assert same_weights("tuned", "short")


@pytest.mark.parametrize("after", [1, 2])
def test_a_broken_off_run_stops_at_the_same_step(after, folder, monkeypatch):
    """Broken off one measurement after the best, and when it had stopped already."""
    from corda_lora.training import train as training

    more = [
        *STOPPING,
        "--max_steps",
        40,
        "--eval_data",
        "other.jsonl",
        "--early_stopping",
        2,
        "--trainer.eval_steps",
        1,
    ]
    whole = corda_train(*more, output="whole")
    on_save = training._Checksums.on_save

    def broken(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if state.global_step == whole["kept_step"] + after:
            monkeypatch.setattr(training._Checksums, "on_save", on_save)
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Checksums, "on_save", broken)
    with pytest.raises(SystemExit):
        corda_train(*more, output="broken")
    again = corda_train(*more, output="broken")
    assert same_weights("whole", "broken")
    assert again["kept_step"] == whole["kept_step"]


# --- packing ---------------------------------------------------------------------------------------------------------


def test_packed_samples_train_as_apart(tokenizer):
    """One step over all samples: the same tokens carry the loss, and no sample sees another."""
    trained = {}
    for name, batch, trainer in (("apart", 32, {}), ("packed", 7, {"packing": True})):
        config = TrainConfig(
            learning_rate=1e-2, batch_size=batch, precision="fp32", warmup=0, schedule="constant", trainer=trainer
        )
        model = plain_lora(tiny.build("llama"), LoraStart(r=4), config)
        result = train(model, tokenizer, SUMS, config, max_length=76, progress=False)
        assert result["steps"] == 1
        trained[name] = result["train_loss"], {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained["packed"][0] == pytest.approx(trained["apart"][0], abs=1e-5)
    for name, parameter in trained["apart"][1].items():
        assert torch.allclose(parameter, trained["packed"][1][name], atol=1e-4), name


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_would_mix_packed_samples_is_refused(family, tokenizer):
    config = TrainConfig(max_steps=1, precision="fp32", trainer={"packing": True})
    model = plain_lora(tiny.build(family), LoraStart(r=2), config)
    with pytest.raises(CordaError, match="packed samples attend to one another: train without packing"):
        train(model, tokenizer, SUMS, config, progress=False)


def test_one_device_is_used_where_there_are_several(monkeypatch):
    """transformers would spread the model over them by DataParallel, which TRL refuses."""
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: 1 if vars(self).get("_n_gpu") == 1 else 2))
    arguments = trainer_arguments(TrainConfig(precision="fp32"), 1e-3, 1, 64, torch.device("cpu"))
    assert arguments.n_gpu == 1
