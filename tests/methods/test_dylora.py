"""DyLoRA against Algorithm 1 of its paper, written out in float64."""

import copy

import datasets
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from corda_lora import CordaError
from corda_lora.adapters.lora import lora_layers
from corda_lora.methods.dylora import install, truncate

R, ALPHA = 6, 3.0


def config(r=R, **options):
    return LoraConfig(r=r, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def llama(dtype=torch.float64, **options):
    """A tiny LLaMA with DyLoRA whose B has moved from zero."""
    model, sampler = install(tiny.build("llama", dtype), config(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    return model, sampler


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x):
        return self.layer(x)


def one():
    torch.manual_seed(0)
    model, sampler = install(One().double(), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"]))
    layer = lora_layers(model)["layer"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = A.data.double(), torch.randn(5, R, dtype=torch.float64)
    return model.train(), sampler, layer.get_base_layer(), A, B


@pytest.mark.parametrize("b", [1, 4, R])
def test_output_and_gradients_of_one_layer_are_the_papers(b):
    model, sampler, base, A, B = one()
    sampler.b = b
    x, target = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    y = model(x)
    expected = x @ base.weight.T + base.bias + ALPHA / b * x @ A[:b].T @ B[:, :b].T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ((y - target) ** 2).sum().div(2).backward()
    e = (expected - target).detach()
    torch.testing.assert_close(A.grad[:b], ALPHA / b * (e @ B[:, :b]).T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.grad[:, :b], ALPHA / b * e.T @ (x @ A[:b].T), rtol=1e-12, atol=1e-12)
    assert not A.grad[b:].any()
    assert not B.grad[:, b:].any()


def test_adamw_leaves_what_lies_beyond_b_alone():
    """AdamW written out, on the first b components alone, against torch's with momentum and weight decay."""
    model, sampler, base, A, B = one()
    lr, beta, eps, decay = 0.05, (0.9, 0.99), 1e-8, 0.1
    optimizer = torch.optim.AdamW([A, B], lr, beta, eps, decay)
    a, c = A.detach().clone(), B.detach().clone()
    moments = [torch.zeros_like(w) for w in (a, a, c, c)]
    drawn = []
    for step in range(1, 9):
        sampler.on_step_begin(None, None, None)
        b = sampler.b
        drawn.append(b)
        x, target = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

        a_b, c_b = a[:b].clone().requires_grad_(), c[:, :b].clone().requires_grad_()
        y = x @ base.weight.T + base.bias + ALPHA / b * x @ a_b.T @ c_b.T
        gradients = torch.autograd.grad(((y - target) ** 2).mean(), (a_b, c_b))
        parts = [(a[:b], moments[0][:b], moments[1][:b]), (c[:, :b], moments[2][:, :b], moments[3][:, :b])]
        for (w, m, v), g in zip(parts, gradients):
            m.mul_(beta[0]).add_((1 - beta[0]) * g)
            v.mul_(beta[1]).add_((1 - beta[1]) * g**2)
            w.mul_(1 - lr * decay)
            w -= lr * (m / (1 - beta[0] ** step)) / ((v / (1 - beta[1] ** step)).sqrt() + eps)

        before = A[b:].detach().clone()
        ((model(x) - target) ** 2).mean().backward()
        sampler.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        sampler.on_optimizer_step(None, None, None)
        optimizer.zero_grad()
        assert torch.equal(A[b:], before)
    assert len(set(drawn)) > 2
    torch.testing.assert_close(A.detach(), a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(B.detach(), c, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("b", [1, 4, R])
def test_a_model_trains_with_the_function_it_is_truncated_to(b):
    model, sampler = llama()
    plain = tiny.build("llama", torch.float64)
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        plain.get_submodule(name).weight.data += ALPHA / b * B[:, :b] @ A[:b]
    sampler.b = b
    expected = tiny.logits(plain)
    assert not torch.allclose(expected, tiny.logits(tiny.build("llama", torch.float64)), atol=1e-3)
    torch.testing.assert_close(tiny.logits(model.train()), expected, rtol=1e-9, atol=1e-9)

    cut = truncate(copy.deepcopy(model), b)
    for mode in (True, False):
        torch.testing.assert_close(tiny.logits(cut.train(mode)), expected, rtol=1e-9, atol=1e-9)
    merged = cut.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged.eval()), expected, rtol=1e-9, atol=1e-9)


def test_evaluation_and_peft_see_the_whole_rank(tmp_path):
    model, sampler = llama()
    sampler.b = R
    whole = tiny.logits(model.train())
    sampler.b = 2
    assert not torch.allclose(tiny.logits(model), whole)
    assert torch.equal(tiny.logits(model.eval()), whole)
    base = tiny.build("llama", torch.float64)
    with model.train().disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).double()
    torch.testing.assert_close(tiny.logits(loaded), whole, rtol=1e-9, atol=1e-9)


def test_a_truncated_adapter_is_an_ordinary_lora_on_disk(tmp_path):
    ranks = {"down_proj": 2, "up_proj": 5}
    model, _ = llama(rank_pattern=ranks, alpha_pattern={"down_proj": 7.0})
    cut = truncate(model, 3).eval()
    assert {n.rpartition(".")[2]: (x.r["default"], x.scaling["default"]) for n, x in lora_layers(cut).items()} == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], (3, ALPHA / 3)),
        "down_proj": (2, 7.0 / 2),
    }
    cut.save_pretrained(tmp_path)
    base = tiny.build("llama", torch.float64)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).double()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(cut), rtol=1e-9, atol=1e-9)


def test_ranks_are_uniform_and_the_seeds():
    _, sampler = llama()

    def draw(n):
        torch.manual_seed(5)
        ranks = []
        for _ in range(n):
            sampler.on_step_begin(None, None, None)
            ranks.append(sampler.b)
        return ranks

    drawn = draw(3000)
    assert drawn[:50] == draw(50)
    assert set(drawn) == set(range(1, R + 1))
    assert all(abs(drawn.count(b) - 500) < 100 for b in range(1, R + 1))  # nearly 5 standard deviations
    sampler.b = 2
    sampler.on_train_end(None, None, None)
    assert sampler.b == R


def test_bad_input():
    with pytest.raises(CordaError, match="use_rslora"):
        install(tiny.build("llama"), config(use_rslora=True))
    model, _ = llama()
    for b in (0, R + 1):
        with pytest.raises(CordaError, match="ranks 1 to 6"):
            truncate(model, b)


class Watch(TrainerCallback):
    """What b each forward ran with, by step."""

    def __init__(self, sampler, factor):
        self.ranks, self.forwards = [], []
        factor.register_forward_pre_hook(lambda module, args: self.forwards.append(sampler.b))

    def on_step_end(self, *args, **kwargs):
        self.ranks.append(self.forwards)
        self.forwards = []


def test_sft_trainer_uses_one_rank_a_step(tmp_path, tokenizer):
    model, sampler = install(tiny.build("llama"), config())
    watch = Watch(sampler, lora_layers(model)["model.layers.0.mlp.up_proj"].lora_A["default"])
    rows = [{"input_ids": [1, 5 + i, 7, 9 + i, 2], "completion_mask": [0, 0, 0, 1, 1]} for i in range(12)]
    arguments = SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=3, learning_rate=0.05,
        gradient_checkpointing=True, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[sampler, watch],
    )
    trainer.train()
    assert [len(step) for step in watch.ranks] == [6] * 6  # 3 batches, each run again in the backward pass
    assert all(len(set(step)) == 1 for step in watch.ranks)
    assert len({step[0] for step in watch.ranks}) > 1
    assert lora_layers(model)["model.layers.0.mlp.up_proj"].lora_B["default"].weight[:, 0].all()


def test_a_resumed_run_draws_the_same_ranks(tmp_path):
    rows = [{"input_ids": [1, 5 + i, 7, 9 + i, 2], "labels": [1, 5 + i, 7, 9 + i, 2]} for i in range(12)]

    def run(folder, steps, resume=None):
        set_seed(3)
        model, sampler = install(tiny.build("llama"), config())
        arguments = TrainingArguments(
            str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=0.05, seed=3,
            report_to="none", use_cpu=True, disable_tqdm=True, weight_decay=0.1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[sampler])
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 6)
    again = run(tmp_path / "again", 6, str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
