"""AdapterDrop against its papers' equations, written out in float64."""

import copy

import datasets
import pytest
import tiny
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from corda_lora import CordaError
from corda_lora.methods.adapterdrop import Bottleneck, base_model, drop, install, width_for


def moved(model):
    """Adapters that do something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def by_hand(model, adapters, n, ids):
    """The logits of a LLaMA, block by block, with adapters in all but the first n."""
    h = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
    for i, block in enumerate(model.model.layers):
        h = block(h, position_embeddings=rotary)
        if i >= n:
            down, up = adapters[i].down, adapters[i].up
            h = h + (h @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias
    return model.lm_head(model.model.norm(h))


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_model_is_the_papers_formula_with_n_dropped(n):
    model = moved(install(tiny.build("llama", torch.float64), width=5)[0])
    ids = tiny.batches()[2]["input_ids"]  # no padding
    expected = by_hand(tiny.build("llama", torch.float64), adapters_of(model), n, ids)
    drop(model, n)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)
    drop(model, 0)
    all_on = by_hand(tiny.build("llama", torch.float64), adapters_of(model), 0, ids)
    torch.testing.assert_close(model(input_ids=ids).logits, all_on, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "bert", "t5", "gemma3", "qwen3_moe"])
def test_the_base_comes_back_to_the_last_bit(family, dtype):
    expected = tiny.logits(tiny.build(family, dtype), family)
    model, _ = install(tiny.build(family, dtype), width=3)
    assert torch.equal(tiny.logits(model, family), expected)  # as it starts
    moved(model)
    drop(model, 1)
    one_dropped = tiny.logits(model, family)
    assert one_dropped.dtype == dtype
    assert not torch.equal(one_dropped, expected)
    with base_model(model):
        assert torch.equal(tiny.logits(model, family), expected)
    assert torch.equal(tiny.logits(model, family), one_dropped)
    drop(model, len(adapters_of(model)))
    assert torch.equal(tiny.logits(model, family), expected)


def test_blocks_that_return_a_tuple_keep_the_rest_of_it():
    model = tiny.build("llama")
    rest = object()
    expected = tiny.logits(model)

    class Tuple(nn.Module):  # a block as older transformers had them
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs), rest

    class Unpack(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.inner = block

        def forward(self, *args, **kwargs):
            hidden, other = self.inner(*args, **kwargs)
            assert other is rest
            return hidden

    plain = moved(install(copy.deepcopy(model), width=4)[0])
    blocks = model.model.layers
    model.model.layers = nn.ModuleList([Tuple(block) for block in blocks])
    moved(install(model, width=4)[0])
    model.model.layers = nn.ModuleList([Unpack(block) for block in model.model.layers])
    assert not torch.equal(tiny.logits(plain), expected)
    assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_a_step_runs_and_trains_the_adapters_above_n_and_nothing_else():
    plain = tiny.build("llama")
    model, callback = install(tiny.build("llama"), width=4)
    adapters = adapters_of(moved(model))
    assert all("bottleneck" in name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    ids = tiny.batches()[2]["input_ids"]  # no padding
    torch.manual_seed(0)
    seen = set()
    for _ in range(8):
        callback.on_step_begin(None, None, None)
        before = [adapter.down.weight.detach().clone() for adapter in adapters]
        output = model.train()(input_ids=ids, labels=ids)
        output.loss.backward()
        n = sum(adapter.down.weight.grad is None for adapter in adapters)
        torch.testing.assert_close(output.logits, by_hand(plain, adapters, n, ids))
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, by_hand(plain, adapters, 0, ids))
        optimizer.step()
        optimizer.zero_grad()
        changed = [not torch.equal(adapter.down.weight, weight) for adapter, weight in zip(adapters, before)]
        assert changed == [i >= n for i in range(2)]
        seen.add(n)
    assert seen == {0, 1}
    with base_model(model):
        assert torch.equal(tiny.logits(model), tiny.logits(plain))


def test_n_is_uniform_up_to_the_most_and_the_seeds():
    model, callback = install(tiny.build("llama"), width=4)

    def draw(callback, times):
        torch.manual_seed(0)
        drawn = []
        for _ in range(times):
            callback.on_step_begin(None, None, None)
            drawn.append(sum(adapter.skipped for adapter in adapters_of(model)))
        return drawn

    drawn = draw(callback, 1000)
    assert drawn[:20] == draw(callback, 20)
    assert abs(drawn.count(1) - 500) < 80
    assert set(drawn) == {0, 1}  # never both: nothing would be trained
    adapters_of(model)[0].skipped = True
    callback.on_train_end(None, None, None)
    assert not adapters_of(model)[0].skipped
    callback.most = 0
    assert set(draw(callback, 20)) == {0}


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "t5"])
def test_width_for_meets_the_budget(family):
    for parameters in (800, 5000, 40_000):
        model = tiny.build(family)
        width = width_for(model, parameters)
        install(model, width)
        adapters = adapters_of(model)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == len(adapters) * ((2 * 32 + 1) * width + 32)
        assert abs(count - parameters) <= len(adapters) * (2 * 32 + 1) / 2  # the nearest there is


def test_bad_input():
    model = tiny.build("llama")
    with pytest.raises(CordaError, match="width 1 takes 194"):
        width_for(model, 100)
    with pytest.raises(CordaError, match="0 to 1 can be left out, not 2"):
        install(model, 4, drop=2)
    install(model, 4)
    with pytest.raises(CordaError, match="already"):
        install(model, 4)
    with pytest.raises(CordaError, match="2 adapters: 3"):
        drop(model, 3)


def test_sft_trainer_trains_it(tmp_path, tokenizer):
    model, callback = install(tiny.build("llama"), width=4)
    base = tiny.logits(tiny.build("llama"))
    skipped = []
    adapters_of(model)[0].register_forward_pre_hook(lambda module, args: skipped.append(module.skipped))
    rows = [{"input_ids": [1, 5 + i, 7, 9 + i, 2], "completion_mask": [0, 0, 0, 1, 1]} for i in range(12)]
    arguments = SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=0.05,
        gradient_checkpointing=False, logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.5
    assert skipped[::2] == skipped[1::2]  # one n a step
    assert set(skipped) == {True, False}
    assert not adapters_of(model)[0].skipped
    assert not torch.equal(tiny.logits(model.eval()), base)
    with base_model(model):
        assert torch.equal(tiny.logits(model), base)
