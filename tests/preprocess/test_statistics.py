"""C and D against a float64 reference that takes one sample, one drawn answer and one gradient at a time."""

import json
import re
from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from corda_lora.adapters.lora import lora_layers
from corda_lora.algebra.second_order import drawn_log_likelihood, uniform
from corda_lora.config import CordaError
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.context import answer_mask
from corda_lora.preprocess.statistics import Statistics, answered_batches, collect_statistics
from corda_lora.training.keeping import PredictedDrift

FAMILIES = ["llama", "gpt2_conv1d", "gemma2", "qwen3"]


def dense(M):
    return M.factor.double() @ M.factor.double().T + M.diagonal.double().diag()


def reference(model, targets, encoded, batch_tokens):
    """C and D of each layer by name: padded batches for the draw of y, then each sample alone."""
    sums = {name: [0.0, 0.0] for name in targets}
    tokens = 0
    for number, batch in enumerate(answered_batches(encoded, 0, batch_tokens)):
        answers = answer_mask(batch)
        logits = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][answers].float()
        )
        u = uniform(len(logits), number)
        y = (logits.softmax(-1).cumsum(-1) <= u[:, None]).sum(-1)  # the first token that brings the sum above u
        drawn = torch.zeros(answers.shape, dtype=torch.long)
        drawn[answers] = y
        for i, real in enumerate(batch["attention_mask"].bool()):
            ids = batch["input_ids"][i][real][None]
            x, g, hooks = {}, {}, []
            for name, module in targets.items():
                keep_x = partial(lambda name, x, module, args: x.update({name: args[0][0].detach()}), name, x)
                keep_g = partial(lambda name, g, module, before, after: g.update({name: after[0][0]}), name, g)
                hooks.append(module.register_forward_pre_hook(keep_x))
                hooks.append(module.register_full_backward_hook(keep_g))
            positions = answers[i].nonzero().flatten()
            log_probs = model(input_ids=ids).logits[0, positions].log_softmax(-1)
            log_probs.gather(1, drawn[i, positions][:, None]).sum().backward()
            for hook in hooks:
                hook.remove()
            tokens += len(ids[0])
            for name in targets:
                sums[name][0] = sums[name][0] + x[name].T @ x[name]
                sums[name][1] = sums[name][1] + g[name].T @ g[name]
    return {name: (C / tokens, D / tokens) for name, (C, D) in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_are_those_of_one_sample_at_a_time(family):
    model = tiny.build(family).double()
    targets = find_targets(model, "all-linear")
    found = collect_statistics(model, targets, tiny.answered(), 0, batch_tokens=40, progress=False)
    assert (found.samples, found.answers) == (20, 50)
    for name, (C, D) in reference(model, targets, tiny.answered(), 40).items():
        torch.testing.assert_close(dense(found.layers[name].C), C, rtol=1e-4, atol=1e-5 * float(C.diagonal().max()))
        torch.testing.assert_close(dense(found.layers[name].D), D, rtol=1e-4, atol=1e-5 * float(D.diagonal().max()))


def test_what_is_done_after_the_backward_has_a_bar_too(capsys):
    model = tiny.build("llama")
    collect_statistics(model, find_targets(model, "all-linear"), tiny.answered(), 0)
    bars = re.findall(r"^(the context|its directions) .* (\d+)/(\d+)", capsys.readouterr().err, re.MULTILINE)
    assert [name for name, *_ in bars] == ["the context", "its directions"]
    assert all(done == total != "0" for _, done, total in bars)


@pytest.mark.parametrize("adapted", [False, True])
def test_where_there_is_no_room_for_all_layers_they_are_collected_block_by_block(adapted, monkeypatch):
    model, rooms = tiny.build("llama"), []
    targets = find_targets(model, "all-linear")
    expected = collect_statistics(model, targets, tiny.answered(), 0, batch_tokens=40, progress=False)
    monkeypatch.setattr("corda_lora.preprocess.statistics.free_bytes", lambda device: rooms.append(device) or 1000)
    monkeypatch.setattr("corda_lora.preprocess.statistics.run_back", None)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=list(targets), init_lora_weights=False))
        targets = {name: layer.get_base_layer() for name, layer in lora_layers(model).items()}
        with model.disable_adapter():
            found = collect_statistics(model.get_base_model(), targets, tiny.answered(), 0, 40, progress=False)
    else:
        found = collect_statistics(model, targets, tiny.answered(), 0, batch_tokens=40, progress=False)
    assert rooms
    assert list(found.layers) == list(expected.layers)
    assert (found.samples, found.answers, found.tokens) == (expected.samples, expected.answers, expected.tokens)
    for name, sides in expected.layers.items():
        for M, exact in zip(found.layers[name], sides):
            torch.testing.assert_close(dense(M), dense(exact), rtol=1e-4, atol=1e-5 * float(exact.diagonal.max()))
    q, k = (found.layers[f"model.layers.0.self_attn.{x}_proj"].C.factor for x in "qk")
    assert q is k


def test_the_model_is_left_as_it_was():
    model = tiny.build("llama").train()
    model.lm_head.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    collect_statistics(model, find_targets(model, "all-linear"), tiny.answered(), 0, progress=False)
    assert model.training
    assert not model.lm_head.weight.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_answers_are_drawn_from_the_model_and_hang_on_the_seed_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(20000, 1).requires_grad_(True)
    u = uniform(len(logits), batch=0)
    drawn_log_likelihood(logits, u).backward()
    # The gradient of log p(y) is 1[y] − p: its mean is zero, where y is drawn from p.
    assert logits.grad.mean(0).abs().max() < 0.01
    again = logits.detach().requires_grad_(True)
    for rows, numbers in zip(again.split(7000), uniform(len(logits), batch=0).split(7000)):
        drawn_log_likelihood(rows, numbers).backward()
    assert torch.equal(again.grad, logits.grad)
    other = logits.detach().requires_grad_(True)
    drawn_log_likelihood(other, uniform(len(logits), batch=1)).backward()
    assert not torch.equal(other.grad, logits.grad)


def test_statistics_are_the_same_after_they_were_on_the_disk(tmp_path):
    model = tiny.build("llama")
    found = collect_statistics(
        model, find_targets(model, "all-linear"), tiny.answered(), 0, directions=8, progress=False
    )
    found.save(tmp_path / "s.safetensors")
    read = Statistics.load(tmp_path / "s.safetensors")
    assert (read.samples, read.answers, read.tokens, read.digests) == (
        found.samples, found.answers, found.tokens, found.digests,
    )  # fmt: skip
    assert list(read.layers) == list(found.layers)
    for name, sides in found.layers.items():
        for M, N in zip(sides, read.layers[name]):
            torch.testing.assert_close(dense(N), dense(M), rtol=0, atol=0.01 * float(dense(M).diagonal().max()))
    q, k = (read.layers[f"model.layers.0.self_attn.{x}_proj"].C.factor for x in "qk")
    assert q is k  # stored once


def test_bad_statistics_are_a_sentence(tmp_path):
    model = tiny.build("llama")
    with pytest.raises(CordaError, match=r"15 samples with a response.*from 16 on"):
        collect_statistics(model, find_targets(model, "all-linear"), tiny.answered(15), 0, progress=False)
    bert = tiny.build("bert")
    with pytest.raises(CordaError, match="no causal language model"):
        collect_statistics(bert, find_targets(bert, "all-linear"), tiny.answered(), 0, progress=False)
    path = tmp_path / "s.safetensors"
    with pytest.raises(CordaError, match="is missing"):
        Statistics.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CordaError, match="is damaged"):
        Statistics.load(path)
    save_file({"x": torch.zeros(1)}, path, {"corda": json.dumps({})})
    with pytest.raises(CordaError, match="is damaged"):
        Statistics.load(path)
    assert load_file(path)


def test_a_layer_that_no_token_reaches_costs_nothing():
    model = tiny.build("llama")
    model.register_module("spare", torch.nn.Linear(32, 8, bias=False))
    targets = {**find_targets(model, ["q_proj"]), "spare": model.spare}
    found = collect_statistics(model, targets, tiny.answered(), 0, progress=False)
    assert found.layers.keys() == targets.keys() - {"spare"}
    adapted = get_peft_model(model, LoraConfig(target_modules=list(targets), init_lora_weights=False))
    assert PredictedDrift(adapted, found).by_layer().keys() == found.layers.keys()
