"""What is held stays held on every road that an adapter takes, and where it was not, somebody says so."""

import copy
import json
import warnings
from pathlib import Path

import datasets
import peft
import pytest
import tiny
import torch
from helpers import SPLITS, start, train, tuned
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from ranks import run_together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from corda_lora import CordaConfig, CordaError, HoldCallback, get_corda_model, hold, load_adapter
from corda_lora.adapters.held import HalvedLinear, describe_held, held_parts, marks_of, moved
from corda_lora.adapters.lora import install, lora_layers

HELD = [split for split in SPLITS if split != "seeded"]


def weights_of(adapted):
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def held(adapted, split):
    return [part.clone() for part in held_parts(weights_of(adapted), split)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved_by_peft(split, folder):
    """An adapter of some training, saved by PEFT alone; it and the base model."""
    model, _, adapted, moved = tuned(split=split)
    adapted.save_pretrained(folder)
    return model, adapted, moved


# --- loaded again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_saved_by_peft_loaded_and_trained_is_as_if_never_saved(split, tmp_path):
    model, adapted, moved = saved_by_peft(split, tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["adapter_config.json"]
    loaded = load_adapter(model, tmp_path, trainable=True)
    assert torch.equal(tiny.logits(loaded), moved)
    for other in (train(adapted), train(loaded)):
        other.eval()
    assert equal(weights_of(loaded).values(), weights_of(adapted).values())


@pytest.mark.parametrize("split", SPLITS)
def test_hold_after_plain_peft_and_after_somebody_unfroze_it(split, tmp_path):
    model, adapted, _ = saved_by_peft(split, tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    for name, parameter in loaded.named_parameters():  # as unsloth does
        parameter.requires_grad_("lora_A" in name or "lora_B" in name)
    hold(loaded)
    before = held(loaded, split)
    for other in (train(adapted), train(loaded)):
        other.eval()
    assert equal(held(loaded, split), before)
    assert equal(weights_of(loaded).values(), weights_of(adapted).values())


@pytest.mark.parametrize("split", SPLITS)
def test_hold_twice_and_through_other_adapters(split):
    _, _, adapted, _ = tuned(split=split)
    before = held(adapted, split)
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.set_adapter("other")
    adapted.set_adapter("default")
    with adapted.disable_adapter():
        pass
    hold(adapted)
    hold(adapted)
    train(adapted)
    assert equal(held(adapted, split), before)
    assert moved(weights_of(adapted), marks_of(adapted)) == 0


def test_hold_needs_an_adapter_of_corda():
    lora = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (lora, tiny.build("llama")):
        with pytest.raises(CordaError, match="no adapter 'default' that is CorDA's"):
            hold(model)


def test_hold_on_a_model_that_loaded_the_adapter_itself(tmp_path):
    model, _, moved = saved_by_peft("balanced", tmp_path)
    model.load_adapter(str(tmp_path), is_trainable=True)
    assert (tiny.logits(model) - moved).abs().max() < 1e-4
    hold(model)
    assert torch.equal(tiny.logits(model), moved)


@pytest.mark.parametrize("split", SPLITS)
def test_plain_peft_says_nothing_and_passes_the_marks_on(split, tmp_path):
    model, adapted, _ = saved_by_peft(split, tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(model, tmp_path / "first")
        loaded.save_pretrained(tmp_path / "second")
    assert marks_of(loaded) == marks_of(adapted)
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["corda"]["split"] == split


# --- what was trained all the same -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", HELD)
def test_what_was_trained_all_the_same_is_measured(split, tmp_path):
    model, adapted, _ = saved_by_peft(split, tmp_path / "good")
    before = torch.cat([part.flatten() for part in held(adapted, split)])
    loose = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "good", is_trainable=True)
    train(loose, steps=10).save_pretrained(tmp_path / "bad")
    after = torch.cat([part.flatten() for part in held(loose, split)])
    share = float((after - before).norm() / before.norm())
    assert moved(weights_of(loose), marks_of(loose)) == pytest.approx(share, rel=0.4)  # 9 % is a standard deviation
    with pytest.warns(UserWarning, match=r"trained by something that did not hold .* moved by about [0-9.]+%"):
        load_adapter(copy.deepcopy(model), tmp_path / "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path / "good")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", HELD)
def test_rounding_is_no_training(split, dtype):
    _, _, adapted, _ = tuned(split=split)
    rounded = {name: weight.to(dtype) for name, weight in weights_of(adapted).items()}
    assert moved(rounded, marks_of(adapted)) == 0


def test_the_sketch_tells_lengths():
    torch.manual_seed(0)
    weights = {f"{i}.lora_A.weight": torch.randn(8, 100) for i in range(5)}
    close = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    marks = {"split": "anchored", "held": describe_held(weights, "anchored")}
    assert marks["held"]["norm"] == pytest.approx(4000**0.5, rel=0.05)
    assert moved(close, marks) == pytest.approx(0.01, rel=0.3)


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_the_held_half_has_no_gradient_and_no_weight_decay(split):
    model, found = start(split=split)
    adapted = copy.deepcopy(install(model, found))  # a copy is held, too
    before = held(adapted, split)
    train(adapted, steps=2, weight_decay=0.5)
    assert equal(held(adapted, split), before)
    adapted(**tiny.batches()[0], labels=tiny.batches()[0]["input_ids"]).loss.backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all((part == 0).all() for part in held_parts(gradients, split))


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_a_kernel_that_reads_the_weight_does_not_move_the_held_half(split, monkeypatch):
    """axolotl and unsloth multiply by `lora_A.weight` and `lora_B.weight` in functions of their own."""
    model, found = start(split=split)
    adapted = train(install(model, found), steps=1)
    ours = train(copy.deepcopy(adapted), steps=2)
    monkeypatch.setattr(HalvedLinear, "forward", torch.nn.Linear.forward)
    before = held(adapted, split)
    train(adapted, steps=2)
    assert equal(held(adapted, split), before)
    for theirs, expected in zip(weights_of(adapted).values(), weights_of(ours).values()):
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


def test_optimizers_are_left_alone_until_a_half_is_held(tmp_path):
    """In a process of its own: this one has held halves already."""
    code = f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from torch.optim import optimizer
from helpers import start
from corda_lora.adapters.lora import install
counts = []
for split in ("anchored", "paper", "balanced"):
    install(*start(split=split))
    counts.append((len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)))
assert counts == [(0, 0), (1, 1), (1, 1)], counts
"""
    ended = run_together(1, ["--help"], tmp_path, FIRST=code)
    assert ended.codes == [0], ended.err


# --- other clients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_copied_parameter_by_parameter_it_is_the_same_adapter(split):
    """As TRL's DPO, KTO, GRPO and RLOO make their reference."""
    _, _, adapted, moved = tuned(split=split)
    adapted.add_adapter("ref", adapted.peft_config["default"])
    for name, parameter in adapted.named_parameters():
        if ".default." in name:
            adapted.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    adapted.set_adapter("ref")
    assert (tiny.logits(adapted.eval()) - moved).abs().max() < 1e-4
    adapted.set_adapter("default")
    assert torch.equal(tiny.logits(adapted), moved)
    before = held(adapted, split)
    train(adapted)
    assert equal(held(adapted, split), before)


@pytest.mark.parametrize("split", SPLITS)
def test_swapped_into_a_live_model(split, tmp_path):
    model, found, adapted, moved = tuned(split=split)
    adapted.save_pretrained(tmp_path)
    live = install(model, found).eval()
    hotswap_adapter(live, str(tmp_path), "default")
    assert torch.equal(tiny.logits(live), moved)


@pytest.mark.parametrize("split", SPLITS)
def test_cast_to_bfloat16_it_generates(split):
    """TRL casts what trains to bfloat16, over a base in bfloat16 or NF4."""
    model = tiny.build("llama", torch.bfloat16)
    adapted = get_corda_model(model, CordaConfig(r=4, split=split), tiny.batches(), progress=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    batch = tiny.batches()[0]
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert adapted.eval().generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(adapted):
    mesh = init_device_mesh("cpu", (1,))
    for block in adapted.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(adapted, mesh=mesh)


@pytest.mark.parametrize("split", SPLITS)
def test_sharded_it_trains_as_whole(split, one_process, tmp_path):
    model, adapted, _ = saved_by_peft(split, tmp_path)
    loaded = sharded(load_adapter(model, tmp_path, trainable=True))
    hold(loaded)
    train(adapted)
    train(loaded)
    for name, weight in weights_of(loaded).items():
        torch.testing.assert_close(weight.full_tensor(), weights_of(adapted)[name], rtol=0, atol=1e-6)
    if split in ("paper", "balanced"):
        with pytest.raises(CordaError, match="train with weight_decay 0"):
            train(loaded, weight_decay=0.1)
        late = sharded(PeftModel.from_pretrained(tiny.build("llama"), tmp_path, is_trainable=True))
        with pytest.raises(CordaError, match=f"a {split} adapter is to be held before it is sharded"):
            hold(late)


@pytest.mark.parametrize("mark", ["get_full_hp_param", "ds_id"])  # of ZeRO 1 and 2; of ZeRO 3
def test_weight_decay_on_the_flat_copies_of_deepspeed_is_refused(mark, tmp_path):
    """DeepSpeed's optimizer steps on copies, so that the held half could not be put back."""
    _, adapted, _ = saved_by_peft("paper", tmp_path)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    flat = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    flat.grad = torch.zeros_like(flat)
    for weight in weights:
        setattr(weight, mark, 0)
    torch.optim.AdamW([flat], weight_decay=0.0).step()
    with pytest.raises(CordaError, match="held half of the adapter in DeepSpeed: train with weight_decay 0"):
        torch.optim.AdamW([flat], weight_decay=0.1).step()


class _Loosen(HoldCallback):
    """Something else that sets free what is held, after the callback."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(iter(lora_layers(model).values())).lora_A["default"].weight[-1].add_(1e-3)


def trained_by_trainer(adapted, folder, callback, resume=False, steps=2):
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in tiny.batches()[2]["input_ids"]]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=5e-3,
        weight_decay=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(adapted, arguments, train_dataset=datasets.Dataset.from_list(rows), callbacks=[callback])
    # The trainer has wrapped nothing yet: DDP would wait for the gradient of what is frozen after it was wrapped.
    layers = lora_layers(adapted).values()
    assert all(not p.requires_grad for x in layers for p in x.lora_A.parameters() if x.frozen_peft_weight_names)
    trainer.train(resume_from_checkpoint=resume)
    return adapted


@pytest.mark.parametrize("split", HELD)
def test_the_callback_holds_what_plain_peft_loaded(split, tmp_path):
    model, _, _ = saved_by_peft(split, tmp_path / "start")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True)
    before = held(loaded, split)
    trained_by_trainer(loaded, tmp_path / "work", HoldCallback())
    assert equal(held(loaded, split), before)
    # The checkpoint is an adapter like any other, and is resumed on one that plain PEFT loaded.
    assert (
        moved(weights_of(load_adapter(copy.deepcopy(model), tmp_path / "work" / "checkpoint-2")), marks_of(loaded)) == 0
    )
    resumed = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True)
    trained_by_trainer(resumed, tmp_path / "work", HoldCallback(), resume=True, steps=4)
    assert equal(held(resumed, split), before)
    assert not equal(weights_of(resumed).values(), weights_of(loaded).values())


def test_the_callback_raises_where_something_moves_it(tmp_path):
    model, _, _ = saved_by_peft("anchored", tmp_path / "start")
    loaded = PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    with pytest.raises(CordaError, match="moved what the adapter holds still, by step 2"):
        trained_by_trainer(loaded, tmp_path / "work", _Loosen())
