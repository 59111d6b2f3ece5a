"""Exports that other programs read: one rank, half precision, tied heads, sampling options."""

import copy
import json
import warnings

import pytest
import tiny
import torch
from helpers import SPLITS, deltas, same, saved, start, train, tuned
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corda_lora import load_adapter
from corda_lora.adapters.export import export_lora, export_merged, export_residual
from corda_lora.adapters.lora import install, lora_layers, save_adapter


def exported(directory):
    """The configuration, and (A, B) by layer, of an adapter on disk."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return config, {
        name.removeprefix("base_model.model."): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in names
    }


@pytest.mark.parametrize("split", SPLITS)
def test_r_is_the_largest_rank_and_uniform_is_exact(split, tmp_path):
    """llama.cpp takes lora_alpha / rank of each tensor as the scale, and vLLM compares r with its largest."""
    model, found, adapted, moved = tuned(split=split, preset="corda+")
    folder = saved(adapted, found, tmp_path / "a")
    config, factors = exported(folder)
    ranks = {len(A) for A, _ in factors.values()}
    assert len(ranks) > 1
    assert config["r"] == max(ranks)
    export_lora(copy.deepcopy(model), folder, tmp_path / "uniform", uniform=True)
    config, padded = exported(tmp_path / "uniform")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    for name, delta in deltas(adapted).items():
        A, B = padded[name]
        assert len(A) == B.shape[1] == config["r"]
        update = config["lora_alpha"] / len(A) * B.double() @ A.double()
        torch.testing.assert_close(update, delta, rtol=0, atol=1e-6 * float(delta.abs().max()) + 1e-7)
    same(tiny.logits(PeftModel.from_pretrained(model, tmp_path / "uniform")), moved)


def test_one_scale_for_all_layers_of_another_lora(tmp_path):
    """EVA, for one, gives each layer a scale of its own, which a uniform LoRA cannot have: it goes into B."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = tiny.build("llama")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, use_rslora=True, **patterns)
    lora = get_peft_model(copy.deepcopy(model), config)
    lora.save_pretrained(tmp_path / "a")
    export_lora(copy.deepcopy(model), tmp_path / "a", tmp_path / "uniform", uniform=True)
    config, factors = exported(tmp_path / "uniform")
    assert not config["use_rslora"]
    for name, delta in deltas(lora).items():
        A, B = factors[name]
        torch.testing.assert_close(config["lora_alpha"] / len(A) * B.double() @ A.double(), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_halves_that_cancel_are_not_rounded_apart(split, tmp_path):
    model, found = start(split=split)
    adapted = install(copy.deepcopy(model), found)
    train(adapted, steps=1)  # so little that the halves nearly cancel
    folder = saved(adapted, found, tmp_path / "a")
    export_lora(copy.deepcopy(model), folder, tmp_path / "lora")
    worst = {}
    for kind, path in (("as it is", folder), ("exported", tmp_path / "lora")):
        config, factors = exported(path)
        errors = []
        for name, delta in deltas(adapted).items():
            A, B = (factor.bfloat16().double() for factor in factors[name])
            errors.append(float((config["lora_alpha"] / config["r"] * B @ A - delta).norm() / delta.norm()))
        worst[kind] = max(errors)
    assert worst["exported"] < 0.01 < worst["as it is"]


def test_a_tied_head_is_merged_without_the_embedding(tmp_path):
    """PEFT's merge changes the embedding, too: whoever makes such an adapter is told, once and by name."""
    with pytest.warns(UserWarning, match=r"lm_head shares its weight .* by `corda export --as merged`"):
        model, found = start("llama_tied", target_modules=["lm_head", "q_proj"])
    adapted = train(install(copy.deepcopy(model), found), family="llama_tied").eval()
    moved = tiny.logits(adapted)
    assert (moved - tiny.logits(model)).abs().max() > 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        load_adapter(copy.deepcopy(model), saved(adapted, found, tmp_path / "b"))
    embedding = model.get_input_embeddings().weight.clone()
    folder = saved(adapted, found, tmp_path / "a")
    export_merged(copy.deepcopy(model), folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same(tiny.logits(merged), moved)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    export_residual(model, folder, tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    same(tiny.logits(PeftModel.from_pretrained(residual, tmp_path / "residual" / "adapter")), moved)


def test_sampling_options_without_sampling_do_not_stop_a_merge(tmp_path):
    model, found, adapted, moved = tuned(split="anchored")
    folder = saved(adapted, found, tmp_path / "a")
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6  # as LLaMA-2-chat, Vicuna
    with pytest.warns(UserWarning, match="left out of generation_config.json: temperature, top_p"):
        export_merged(model, folder, tmp_path / "merged")
    same(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), moved)


def test_a_model_without_a_task_is_loaded_like_any(tmp_path):
    model = tiny.build("llama").model
    from corda_lora import CordaConfig, load_adapter
    from corda_lora.preprocess.pipeline import preprocess

    found = preprocess(model, CordaConfig(r=2, orientation="identity"), progress=False)
    save_adapter(install(copy.deepcopy(model), found), tmp_path / "a", {})
    loaded = load_adapter(model, tmp_path / "a", trainable=True)
    assert not any(layer.lora_A["default"].weight.requires_grad for layer in lora_layers(loaded).values())
