"""The order of samples in training, and what micro-batches change: memory and padding, nothing else."""

import itertools
import json
from contextlib import nullcontext
from functools import partialmethod

import pytest
import tiny
import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from corda_lora.config import CordaError, LoraStart, TrainConfig
from corda_lora.data.samples import Sample
from corda_lora.devices import has_bfloat16
from corda_lora.training.sampler import SimilarLengths
from corda_lora.training.train import DivergedError, _Trainer, last_checkpoint, mean_loss, plain_lora, train

SAMPLES = [Sample(f"{'x' * (i * 7 % 23)} {i} =", f" {i + i}", {}) for i in range(40)]


class Steps(TrainerCallback):
    """The real tokens and the padding of every forward, by step."""

    def __init__(self, model):
        self.steps = [[]]
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.steps[-1].append((kwargs["input_ids"], kwargs["attention_mask"]))

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([])

    def samples(self):
        """The texts of every step, in no order, as JSON."""
        return [
            sorted(json.dumps(ids[mask.bool()].tolist()) for batch in step for ids, mask in zip(*batch))
            for step in self.steps[:-1]
        ]

    def padding(self):
        return sum(int((mask == 0).sum()) for step in self.steps for _, mask in step)


def run(tokenizer, micro=None, steps=8, batch=8, compiled=False, target_modules="all-linear"):
    config = TrainConfig(
        learning_rate=1e-2,
        max_steps=steps,
        batch_size=batch,
        micro_batch_size=micro,
        precision="fp32",
        seed=3,
        schedule="constant",
        compile=compiled,
    )
    model = plain_lora(tiny.build("llama"), LoraStart(r=4, target_modules=target_modules), config)
    seen = Steps(model)
    train(model, tokenizer, SAMPLES, config, 64, progress=False, callbacks=[seen])
    assert not any(module._compiled_call_impl for module in model.modules())  # nobody after training pays for it
    return seen, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_micro_batches_hold_samples_of_like_length_and_train_the_same(tokenizer):
    whole, trained = run(tokenizer)
    parts, trained_in_parts = run(tokenizer, 2)
    assert [len(step) for step in parts.steps[:-1]] == [4] * 8
    assert parts.samples() == whole.samples()
    assert parts.padding() < whole.padding() / 2
    for name, parameter in trained.items():
        assert torch.allclose(parameter, trained_in_parts[name], atol=1e-4), name


def test_a_training_of_one_step_trains(tokenizer):
    """Its warmup would be that step, at a rate of 0."""
    _, trained = run(tokenizer, steps=1)
    assert any(bool(p.any()) for name, p in trained.items() if "lora_B" in name)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tokenizer, monkeypatch):
    # Traced as ever; the kernels are torch's own, as a C++ compiler would take a minute for its.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    counters["stats"].clear()
    _, trained = run(tokenizer, steps=3, target_modules=["q_proj"])
    assert not counters["stats"]["unique_graphs"]
    _, compiled = run(tokenizer, steps=3, target_modules=["q_proj"], compiled=True)
    assert 1 <= counters["stats"]["unique_graphs"] <= 4  # one for all lengths and blocks, or few
    for name, parameter in trained.items():
        assert torch.allclose(parameter, compiled[name], atol=1e-4), name


@pytest.mark.parametrize(("precision", "has", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)])
def test_a_processor_without_bfloat16_is_said(precision, has, said, tokenizer, monkeypatch, recwarn):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # so it says of AVX-512 alone
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert has_bfloat16(torch.device("cpu")) == has
    assert has_bfloat16(torch.device("cuda"))
    config = TrainConfig(max_steps=1, batch_size=2, precision=precision)
    train(plain_lora(tiny.build("llama"), LoraStart(r=4), config), tokenizer, SAMPLES, config, 64, progress=False)
    notes = [str(warning.message) for warning in recwarn if "bfloat16" in str(warning.message)]
    assert len(notes) == said
    assert all("--dtype float32 --precision fp32" in note for note in notes)


def test_training_stops_at_a_loss_that_is_not_finite(tokenizer, tmp_path):
    """The step with the bad loss is named; a bad last step, after which no loss is computed, is noticed, too."""

    class Break(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == self.step:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan

    config = TrainConfig(max_steps=4, batch_size=4, precision="fp32")
    for broken, message in (
        (2, "the loss was nan at step 3: "),
        (4, "the trained parameters were not finite at step 4"),
    ):
        model = plain_lora(tiny.build("llama"), LoraStart(r=4), config)
        with pytest.raises(DivergedError, match=message):
            train(model, tokenizer, SAMPLES, config, 64, progress=False, callbacks=[Break(broken)])


def test_the_mean_loss_counts_the_steps_before_a_resume(tokenizer, tmp_path, monkeypatch):
    """The run resumes at step 195, between steps 194 and 196, at which the loss would be logged without it."""
    config = TrainConfig(max_steps=200, batch_size=1, precision="fp32", checkpoints=13, learning_rate=1e-2)
    losses, training_step = {}, _Trainer.training_step

    def noted(self, *args, **kwargs):
        if self.state.global_step == 198 and 199 not in losses:
            losses[199] = 0.0
            raise KeyboardInterrupt
        loss = training_step(self, *args, **kwargs)
        losses[self.state.global_step + 1] = float(loss)
        return loss

    monkeypatch.setattr(_Trainer, "training_step", noted)
    for ends in (pytest.raises(KeyboardInterrupt), nullcontext()):
        model = plain_lora(tiny.build("llama"), LoraStart(r=4, target_modules=["q_proj"]), config)
        with ends:
            result = train(model, tokenizer, SAMPLES[:4], config, 64, tmp_path, progress=False)
    assert len(losses) == 200
    assert result["train_loss"] == pytest.approx(sum(losses.values()) / 200, rel=1e-5)
    assert [step for step, _ in result["loss"]][-4:] == [195, 196, 198, 200]
    assert mean_loss([(2, 3.0), (3, 6.0)]) == 4.0


@pytest.mark.parametrize("stopping", [None, 1])
def test_what_was_killed_after_its_last_step_takes_no_further_one(tokenizer, tmp_path, stopping):
    """Its checkpoint is there, and its adapter is not."""
    config = TrainConfig(
        max_steps=8, batch_size=8, precision="fp32", checkpoints=8, learning_rate=0.5, early_stopping=stopping
    )
    ends = []
    for _ in range(2):
        model = plain_lora(tiny.build("llama"), LoraStart(r=2), config)
        result = train(model, tokenizer, SAMPLES, config, 64, tmp_path, progress=False, held_out=SAMPLES[:4])
        trained = [p.tolist() for p in model.parameters() if p.requires_grad]
        ends.append((result["steps"], result["kept_step"], result["loss"], result["held_out_loss"], trained))
    assert ends[0] == ends[1]
    assert (ends[0][0] < 8) == bool(stopping)


def test_a_damaged_checkpoint_is_refused_by_name(tokenizer, tmp_path):
    config = TrainConfig(max_steps=3, batch_size=4, precision="fp32", checkpoints=3)
    train(plain_lora(tiny.build("llama"), LoraStart(r=2), config), tokenizer, SAMPLES, config, work=tmp_path)
    newest = tmp_path / "checkpoint-3"
    assert last_checkpoint(tmp_path) == str(newest)
    names = {path.name for path in newest.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors", "sha256.json"} <= names
    for name in sorted(names - {"sha256.json"}):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CordaError, match=rf"checkpoint-3/{name} is damaged: remove .*checkpoint-3 to go on"):
            last_checkpoint(tmp_path)
        (newest / name).unlink()
        with pytest.raises(CordaError, match=rf"checkpoint-3/{name} is missing: remove .*checkpoint-3 to go on"):
            last_checkpoint(tmp_path)
        (newest / name).write_bytes(content)
    (newest / "sha256.json").unlink()  # killed before it was complete
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not newest.exists()


def test_each_epoch_has_an_order_of_its_own_and_all_samples(tokenizer):
    seen, _ = run(tokenizer, steps=10)  # two epochs of five steps
    first, second = seen.samples()[:5], seen.samples()[5:]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
    assert first != second


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_order_is_the_one_it_always_was(epoch):
    """What accelerate's sampler gives for the same seed: results of earlier versions stay comparable."""

    ours = SimilarLengths([1] * 21, step_size=4, seed=5)
    theirs = SeedableRandomSampler(range(21), data_seed=5)
    for sampler in (ours, theirs):
        sampler.set_epoch(epoch)
    assert list(ours) == list(theirs)


def test_an_adapter_of_the_output_head_is_refused(tokenizer):
    model = plain_lora(tiny.build("llama"), LoraStart(r=2, target_modules=["lm_head"]), TrainConfig())
    with pytest.raises(CordaError, match="the output head carries an adapter"):
        train(model, tokenizer, SAMPLES, TrainConfig(max_steps=1, precision="fp32"))


@pytest.mark.parametrize("family", ["BertLMHeadModel", "RobertaForCausalLM", "ElectraForCausalLM"])
def test_a_model_whose_head_is_more_than_a_matrix_is_refused(family, tokenizer):
    config = transformers.AutoConfig.for_model(
        family.partition("LM")[0].partition("For")[0].lower(), **tiny.ENCODER, embedding_size=16, is_decoder=True
    )
    torch.manual_seed(0)
    model = getattr(transformers, family)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model = plain_lora(model, LoraStart(r=4), TrainConfig())
    with pytest.raises(CordaError, match="does more before its logits than TRL's trainer knows"):
        train(model, tokenizer, SAMPLES, TrainConfig(max_steps=1, batch_size=8, precision="fp32"), progress=False)


def test_a_quantized_base_does_not_round_the_adapter(tokenizer):
    adapters = []
    for quantized in (False, True):
        config = TrainConfig(learning_rate=1e-4, max_steps=3, batch_size=8, precision="fp32")
        model = plain_lora(tiny.build("llama"), LoraStart(r=4), config)
        model.get_base_model().is_loaded_in_8bit = quantized  # all that TRL asks
        train(model, tokenizer, SAMPLES, config, progress=False)
        adapters.append([p for p in model.parameters() if p.requires_grad])
    for plain, rounded in zip(*adapters):
        assert rounded.dtype == torch.float32
        assert torch.equal(plain, rounded)
