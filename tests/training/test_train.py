"""The order of samples in training, and what micro-batches change: memory and padding, nothing else."""

import itertools
import json
import shutil

import pytest
import tiny
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from corda_lora.config import LoraStart, TrainConfig
from corda_lora.data.samples import Sample
from corda_lora.devices import has_bfloat16
from corda_lora.training.sampler import SimilarLengths
from corda_lora.training.train import plain_lora, train

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


def run(tokenizer, micro=None, steps=8, batch=8, schedule="constant", compiled=False):
    config = TrainConfig(
        learning_rate=1e-2,
        max_steps=steps,
        batch_size=batch,
        micro_batch_size=micro,
        precision="fp32",
        seed=3,
        schedule=schedule,
        compile=compiled,
    )
    model = plain_lora(tiny.build("llama"), LoraStart(r=4), config)
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


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler")
def test_compiled_blocks_train_the_same(tokenizer):
    counters["stats"].clear()
    _, trained = run(tokenizer, steps=3)
    assert not counters["stats"]["unique_graphs"]
    _, compiled = run(tokenizer, steps=3, compiled=True)
    assert 1 <= counters["stats"]["unique_graphs"] <= 4  # one for all lengths and blocks, or few
    for name, parameter in trained.items():
        assert torch.allclose(parameter, compiled[name], atol=1e-4), name


@pytest.mark.parametrize(("precision", "has", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)])
def test_a_processor_without_bfloat16_is_said(precision, has, said, tokenizer, monkeypatch, recwarn):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    assert has_bfloat16(torch.device("cpu")) == has
    assert has_bfloat16(torch.device("cuda"))
    config = TrainConfig(max_steps=1, batch_size=2, precision=precision)
    train(plain_lora(tiny.build("llama"), LoraStart(r=4), config), tokenizer, SAMPLES, config, 64, progress=False)
    notes = [str(warning.message) for warning in recwarn if "bfloat16" in str(warning.message)]
    assert len(notes) == said
    assert all("--dtype float32 --precision fp32" in note for note in notes)


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
