"""The adapter in use: what trains, what is saved, what it becomes, and that the base model stays what it was."""

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from helpers import SPLITS, deltas, same, saved, start, train, tuned
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from corda_lora import CordaConfig, CordaError, files, get_corda_model, load_adapter
from corda_lora.adapters.export import compress, export_lora, export_merged, export_residual
from corda_lora.adapters.held import held_size
from corda_lora.adapters.lora import install, lora_layers, save_adapter
from corda_lora.models.residual import is_residual
from corda_lora.preprocess.pipeline import preprocess

# GPT-2's layers are Conv1D. PEFT wants `fan_in_fan_out` for them, and the reverse for the others.
FAMILIES = ["llama", "qwen2_biased", "gpt2_conv1d"]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_the_trained_part_alone(family, split, weight_decay):
    model, found = start(family, split)
    weights = tiny.snapshot(model)
    adapted = install(model, found)
    before = {n: t.clone() for n, t in adapted.named_parameters()}
    train(adapted, family=family, weight_decay=weight_decay)
    trained = "lora_B" if split == "anchored" else "lora_"
    for name, tensor in adapted.named_parameters():
        assert tensor.requires_grad is (trained in name), name
        assert torch.equal(tensor, before[name]) is not (trained in name), name
    for name, layer in lora_layers(adapted).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if split == "anchored":
            assert torch.equal(A, found.layers[name].A)
        elif split != "seeded":
            assert torch.equal(A[4:], found.layers[name].A)
            assert torch.equal(B[:, 4:], -found.layers[name].B)
    base = adapted.unload().state_dict()
    assert all(torch.equal(weights[name], base[name]) for name in weights)


@pytest.mark.parametrize("split", SPLITS)
def test_parameter_count(split):
    model, found = start(split=split)
    shapes = [layer.record.shape for layer in found.layers.values()]
    adapted = install(model, found)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert count - held_size(adapted) == sum(4 * (m if split == "anchored" else m + n) for m, n in shapes)


@pytest.mark.parametrize("split", ["paper", "balanced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_residual_model_with_its_adapter(family, split):
    """W' + s·B A, W' = W − s·B₀A₀, written out."""
    model, found, adapted, moved = tuned(family, split)
    by_hand = copy.deepcopy(model)
    for name, layer in lora_layers(adapted).items():
        A, B = layer.lora_A["default"].weight[:4].double(), layer.lora_B["default"].weight[:, :4].double()
        A0, B0 = found.layers[name].A.double(), found.layers[name].B.double()
        change = 2 * (B @ A - B0 @ A0)
        W = by_hand.get_submodule(name).weight
        W.data = (W.double() + (change.T if family == "gpt2_conv1d" else change)).float()
    same(tiny.logits(by_hand, family), moved)


@pytest.mark.parametrize("split", SPLITS)
def test_the_start_is_exact_under_autocast_and_with_checkpointing(split):
    model, found = start(split=split)
    model.gradient_checkpointing_enable()
    batch = tiny.batches()[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**batch).logits
    adapted = install(model, found).train()
    adapted.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        output = adapted(**batch, labels=batch["input_ids"])
    assert torch.equal(output.logits, before)
    output.loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained)
    assert all(torch.isfinite(p.grad).all() for p in trained)
    assert any(p.grad.norm() > 0 for p in trained)


def test_gradients_are_those_of_the_trained_factors():
    """The first step is the one that CorDA's own form, residual beside B A, would take."""
    model, found = start(split="balanced", target_modules=["down_proj"])
    adapted, name = install(model, found), "model.layers.1.mlp.down_proj"
    batch = tiny.batches()[0]
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    layer = lora_layers(adapted)[name]

    plain, A, B = tiny.build("llama"), found.layers[name].A, found.layers[name].B
    linear = plain.get_submodule(name)
    linear.weight.requires_grad_(True)
    plain(**batch, labels=batch["input_ids"]).loss.backward()
    G = linear.weight.grad
    torch.testing.assert_close(layer.lora_A["default"].weight.grad[:4], 2 * B.T @ G, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad[:, :4], 2 * G @ A.T, rtol=1e-4, atol=1e-7)


# --- the base is left as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", [*FAMILIES, "llama_tied"])
def test_taking_it_off_gives_back_the_model_bit_for_bit(family, split):
    model, found = start(family, split)
    weights, before = tiny.snapshot(model), tiny.logits(model, family)
    adapted = install(model, found)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.equal(tiny.logits(adapted, family), before)
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted, family), before)
    base = adapted.unload()
    assert torch.equal(tiny.logits(base, family), before)
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[n], t) for n, t in base.state_dict().items())


def test_a_classifier_gives_back_all_but_the_head_that_peft_trains():
    model, found = start("roberta")
    weights, before = tiny.snapshot(model), tiny.logits(model, "roberta")
    adapted = install(model, found)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted, "roberta"), before)
    for name, tensor in adapted.unload().state_dict().items():
        assert torch.equal(tensor, weights[name]) is not name.startswith("classifier."), name


@pytest.mark.parametrize("split", SPLITS)
def test_a_plain_lora_beside_it_acts_as_on_the_original_model(split):
    model, _, adapted, moved = tuned(split=split)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    alone = peft.get_peft_model(model, config)
    adapted.add_adapter("plain", copy.deepcopy(config))
    of_alone = {n.replace(".default", ""): t for n, t in alone.state_dict().items()}
    with torch.no_grad():
        for name, tensor in adapted.state_dict().items():
            if ".plain" in name:
                tensor.copy_(of_alone[name.replace(".plain", "")])
    adapted.set_adapter("plain")
    assert torch.equal(tiny.logits(adapted), tiny.logits(alone))
    adapted.set_adapter("default")
    assert torch.equal(tiny.logits(adapted), moved)


def test_merging_and_unmerging():
    _, _, adapted, moved = tuned()
    adapted.merge_adapter()
    same(tiny.logits(adapted), moved)
    adapted.unmerge_adapter()
    same(tiny.logits(adapted), moved)


def test_a_second_corda_on_an_adapted_model_is_refused():
    _, _, adapted, _ = tuned()
    with pytest.raises(CordaError, match="carries a PEFT adapter already"):
        preprocess(adapted, CordaConfig(r=4), tiny.batches(), progress=False)


@pytest.mark.parametrize("split", SPLITS)
def test_pefts_options(split, tmp_path):
    """Rank-stabilized scaling, dropout, and a module that is trained whole: saved, loaded, and the base as it was."""
    options = {"use_rslora": True, "lora_dropout": 0.25, "modules_to_save": ["lm_head"]}
    model, found = start(split=split, **options)
    weights, before = tiny.snapshot(model), tiny.logits(model)
    adapted = install(copy.deepcopy(model), found)
    assert torch.equal(tiny.logits(adapted.eval()), before)
    assert all(layer.scaling["default"] == 8 / 4**0.5 for layer in lora_layers(adapted).values())
    train(adapted.train()).eval()
    moved = tiny.logits(adapted)
    saved(adapted, found, tmp_path / "adapter")
    loaded = load_adapter(copy.deepcopy(model), tmp_path / "adapter", trainable=True)
    assert loaded.peft_config["default"].lora_dropout == 0.25
    same(tiny.logits(loaded.eval()), moved)
    assert (adapted.get_base_model().lm_head.modules_to_save["default"].weight - weights["lm_head.weight"]).norm() > 0
    export_merged(model, tmp_path / "adapter", tmp_path / "merged")
    same(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), moved)


OF_UP = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
OF_BLOCK_1 = [name for name in dict(tiny.build("llama").named_modules()) if "layers.1" in name and "_proj" in name]


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({"target_modules": ["up_proj", "q_proj"], "exclude_modules": ["q_proj", "lm_head"]}, OF_UP),
        ({"exclude_modules": r".*\.(gate|down|[qkvo])_proj"}, OF_UP),
        ({"layers_to_transform": 1}, OF_BLOCK_1),
        ({"target_modules": ["up_proj"], "layers_to_transform": [1, 0]}, OF_UP),
        ({"exclude_modules": r".*self_attn.*|.*gate_proj|.*down_proj", "layers_to_transform": [1]}, OF_UP[1:]),
    ],
)
@pytest.mark.parametrize("split", ["anchored", "paper"])
def test_pefts_options_that_choose_layers(split, options, adapted, tmp_path):
    """The layers that plain PEFT would adapt are trained, and the saved configuration says why."""
    model, found = start(split=split, **options)
    trained = train(install(copy.deepcopy(model), found))
    folder = saved(trained, found, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.partition(".lora_")[0] for name in tensors} == {f"base_model.model.{name}" for name in adapted}
    assert all(delta.norm() > 0 for delta in deltas(trained).values())
    config = json.loads((folder / "adapter_config.json").read_text())
    for option in ("exclude_modules", "layers_to_transform"):
        wanted = options.get(option)
        assert config[option] == (
            sorted(wanted) if option == "exclude_modules" and isinstance(wanted, list) else wanted
        )
    same(tiny.logits(PeftModel.from_pretrained(copy.deepcopy(model), folder)), tiny.logits(trained.eval()))
    if "target_modules" in options:
        of_peft = peft.get_peft_model(model, LoraConfig(r=2, **options))
        assert sorted(lora_layers(of_peft)) == sorted(adapted)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"exclude_modules": ["qproj"]},
            r"exclude_modules \['qproj'\] matches no layer of Llama.*; nearest names: q_proj",
        ),
        ({"exclude_modules": "q_proj"}, r"a bare name is a pattern for whole names: write \[q_proj\]"),
        ({"exclude_modules": ".*_proj"}, r"exclude_modules '\.\*_proj' leaves no layer of LlamaForCausalLM to adapt"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform names block 2, which has none of the layers to adapt"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "not with a regular expression"),
        ({"bias": "all"}, "bias all trains biases of the base model itself, .* modules_to_save"),
        ({"bias": "both"}, "bias is 'both', but must be one of none, all, lora_only"),
        ({"use_dora": True}, "use_dora is an option of PEFT's that corda-lora does not have: with it, the adapter"),
    ],
)
def test_pefts_options_that_cannot_be_are_refused_before_any_work(options, why):
    with pytest.raises(CordaError, match=why):
        start(**options)


@pytest.mark.parametrize(("name", "why"), [("head", "LlamaForCausalLM does not have"), ("q_proj", "is a target, too")])
def test_modules_to_save_that_cannot_be_are_refused_before_any_work(name, why):
    with pytest.raises(CordaError, match=f"modules_to_save names '{name}', which {why}"):
        start(modules_to_save=[name])


# --- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_by_peft_and_loaded_by_plain_peft_on_the_original_model(family, split, tmp_path):
    model, _, adapted, moved = tuned(family, split)
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (4 if split in ("anchored", "seeded") else 8)
    assert config["lora_alpha"] == 2 * config["r"]
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    same(tiny.logits(PeftModel.from_pretrained(model, tmp_path), family), moved)


@pytest.mark.parametrize("family", ["t5", "bert", "roberta", "gemma2", "mixtral"])
@pytest.mark.filterwarnings("ignore:.*left out")
def test_other_families_load_in_plain_peft(family, tmp_path):
    model, found = start(family, r=3)
    adapted = install(copy.deepcopy(model), found).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                (parameter.chunk(2, dim=1)[0] if "lora_B" in name else parameter).mul_(1.1)
    moved = tiny.logits(adapted, family)
    assert (moved - tiny.logits(model, family)).abs().max() > 1e-3
    saved(adapted, found, tmp_path / "adapter")
    same(tiny.logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter"), family), moved)
    same(tiny.logits(load_adapter(model, tmp_path / "adapter"), family), moved)


def test_each_file_of_an_adapter_is_hashed_once(tmp_path, monkeypatch):
    """A gigabyte takes a second or more."""
    hashed = []
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path.name) or "0" * 64)
    model, found = start()
    save_adapter(install(model, found), tmp_path / "a", {})
    assert hashed.count("adapter_model.safetensors") == 1


def test_what_is_in_the_directory(tmp_path):
    model, found = start()
    spectra = {name: layer.spectrum for name, layer in found.layers.items()}
    save_adapter(install(model, found), tmp_path / "a", {"corda.json": {"model": "tiny", **found.record}}, spectra)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "corda.json", "sha256.json"}
    files.add("spectra.safetensors")
    assert {p.name for p in (tmp_path / "a").iterdir()} == files
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    record = json.loads((tmp_path / "a" / "corda.json").read_text())
    assert record["config"]["split"] == "balanced"
    assert record["versions"].keys() == {"corda-lora", "torch", "transformers", "peft"}
    assert record["context"]["tokens"] == 9 + 4 + 12 + 5 + 10 + 32
    for name, sigma in load_file(tmp_path / "a" / "spectra.safetensors").items():
        assert len(sigma) == record["layers"][name]["r"]  # of a fixed rank, no more are found
        assert (sigma[:-1] >= sigma[1:]).all()


@pytest.mark.parametrize("split", SPLITS)
def test_training_goes_on_as_if_it_had_not_been_saved(split, tmp_path):
    model, found, adapted, moved = tuned(split=split)
    saved(adapted, found, tmp_path / "adapter")
    loaded = load_adapter(model, tmp_path / "adapter", trainable=True)
    assert torch.equal(tiny.logits(loaded), moved)
    for other in (train(adapted), train(loaded)):
        other.eval()
    for name, layer in lora_layers(loaded).items():
        expected = lora_layers(adapted)[name]
        assert torch.equal(layer.lora_A["default"].weight, expected.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["default"].weight, expected.lora_B["default"].weight)
        if split != "seeded":
            assert torch.equal(layer.lora_A["default"].weight[-4:], found.layers[name].A)
    counts = [a.get_nb_trainable_parameters()[0] for a in (adapted, loaded)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("split", SPLITS)
def test_a_checkpoint_loaded_into_the_installed_adapter(split):
    """As a trainer resumes: the whole factors go back into the trained and the held parts."""
    _, found, adapted, moved = tuned(split=split)
    fresh = install(tiny.build("llama"), found).eval()
    assert not torch.equal(tiny.logits(fresh), moved)
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(adapted))
    assert torch.equal(tiny.logits(fresh), moved)
    for name, layer in lora_layers(fresh).items() if split != "seeded" else ():
        assert torch.equal(layer.lora_A["default"].weight[-4:], found.layers[name].A)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_has_nothing_to_correct(family):
    model, found = start(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(model, found)


def test_dropout_is_for_training_and_the_start_is_still_exact(tmp_path):
    model, found = start()
    before = tiny.logits(model)
    saved(install(copy.deepcopy(model), found), found, tmp_path / "adapter")
    loaded = load_adapter(model, tmp_path / "adapter", trainable=True, lora_dropout=0.5)
    assert torch.equal(tiny.logits(loaded.train()), before)  # both halves see the same dropped input
    train(loaded)
    assert not torch.equal(tiny.logits(loaded), tiny.logits(loaded))
    assert torch.equal(tiny.logits(loaded.eval()), tiny.logits(loaded))


def test_an_adapter_for_other_weights_is_refused(tmp_path):
    _, found, adapted, _ = tuned()
    folder = saved(adapted, found, tmp_path / "adapter")
    for other, why in ((tiny.build("llama", seed=1), "made for other weights"), (tiny.build("bert"), "another model")):
        weights = tiny.snapshot(other)
        with pytest.raises(CordaError, match=rf"{why}.* .its base was not recorded.$"):
            load_adapter(other, folder)
        assert all(torch.equal(weights[n], t) for n, t in other.state_dict().items())
    load_adapter(tiny.build("llama", torch.bfloat16), folder)  # the same weights, rounded


@pytest.mark.parametrize(("made_in", "now"), [("float32", "float16"), ("bfloat16", "float16"), ("float16", "float32")])
def test_weights_that_differ_by_a_cast_are_said_to(made_in, now, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "model")

    def loaded(dtype):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)

    config = CordaConfig(r=4, orientation="identity")
    get_corda_model(loaded(made_in), config, progress=False).save_pretrained(tmp_path / "a")
    why = rf"other weights than these .its base was .*\), or the same in {made_in}: float16 rounds them otherwise, "
    with pytest.raises(CordaError, match=rf"{why}so load the model in {made_in} \(--dtype {made_in}\)$"):
        load_adapter(loaded(now), tmp_path / "a")
    load_adapter(loaded(made_in), tmp_path / "a")
    other = tiny.build("llama", getattr(torch, made_in), seed=1)
    with pytest.raises(CordaError, match=r"made for other weights than these \(its base was .*/model\)$"):
        load_adapter(other, tmp_path / "a")


def test_a_residual_that_is_cast_is_said_to_be(tmp_path):
    model, found, adapted, _ = tuned()
    export_residual(model, saved(adapted, found, tmp_path / "a"), tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual", dtype=torch.float16)
    with pytest.raises(CordaError, match=r"or the same in another dtype: .* in the dtype that it had then"):
        load_adapter(residual, tmp_path / "residual" / "adapter")


def test_a_plain_lora_directory_is_loaded_as_peft_does(tmp_path):
    torch.manual_seed(0)
    model = tiny.build("llama")
    lora = peft.get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(load_adapter(tiny.build("llama"), tmp_path)), tiny.logits(lora))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("what", ["corda", "plain"])
@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"num_hidden_layers": 1}, r"this one has no model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"it has nothing for model\.layers\.2\."),
        ({"hidden_size": 128}, r"has the shape \(\d+, \d+\) here, and \(\d+, \d+\) there"),
        ("gpt2_conv1d", r"this one has no model\.layers\.0\."),
    ],
)
def test_an_adapter_of_another_model_is_not_said_to_be_damaged(other, why, what, targets, tmp_path):
    """With more blocks than its own a model may take a plain LoRA, but not if that was for all blocks."""
    model = tiny.build("llama_for_nf4")
    if what == "plain":
        lora = LoraConfig(r=4, target_modules=targets, base_model_name_or_path="theirs")
        peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    else:
        config = CordaConfig(r=4, target_modules=targets)
        adapted = install(model, preprocess(model, config, tiny.batches(), progress=False))
        adapted.save_pretrained(tmp_path)
    other = tiny.build(other) if isinstance(other, str) else tiny.build("llama_for_nf4", **other)
    before = tiny.snapshot(other)
    if "nothing for" in why and what == "plain" and targets == "all-linear":  # PEFT names each layer in that case
        load_adapter(other, tmp_path).unload()
    else:
        why = "made for other weights" if "nothing for" in why and what == "corda" else f"of another model: .*{why}"
        with pytest.raises(CordaError, match=f"the adapter in .* {why}"):
            load_adapter(other, tmp_path)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


def edit(path, change):
    """Change what is in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def first_of(tensors):
    return next(name for name in sorted(tensors) if "lora_A" in name)


def rewrite(path, change):
    """Change the tensors in a file, as a program does that knows nothing of checksums."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("what", ["corda", "plain"])
@pytest.mark.parametrize("change", ["removed", "another rank", "cut off", "no file"])
def test_an_adapter_whose_tensors_do_not_fit_is_refused(change, what, tmp_path):
    model, found = start()
    adapted = install(copy.deepcopy(model), found)
    if what == "plain":
        adapted = peft.get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "a")
    path, message = tmp_path / "a" / "adapter_model.safetensors", r"a/adapter_model\.safetensors is damaged"
    if change == "removed":
        rewrite(path, lambda tensors: tensors.pop(first_of(tensors).replace("lora_A", "lora_B")))
        message += r": it has no base_model\..*_proj\.lora_B\.weight"
    elif change == "another rank":
        rewrite(path, lambda tensors: tensors.update({first_of(tensors): tensors[first_of(tensors)][:1]}))
        message += r", or does not fit the model: .*size mismatch"
    elif change == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        message = r"a is not an adapter directory: it has no adapter_model\.safetensors"
    weights = tiny.snapshot(model)
    with pytest.raises(CordaError, match=message):
        load_adapter(model, tmp_path / "a")
    if change != "another rank":  # where PEFT fails, it has put its layers into the model
        assert tiny.snapshot(model).keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adapter_config.json", lambda config: config.update(lora_alpha=32), "is damaged: make the adapter again"),
        ("adapter_config.json", lambda config: config["target_modules"].pop(), "is damaged: target_modules lacks"),
        ("corda.json", lambda record: record["config"].update(mode="ipm"), "is damaged: make the adapter again"),
        ("training.json", lambda record: record.update(steps=9), "is damaged: make the adapter again"),
    ],
)
def test_files_that_were_edited_are_refused_by_name(name, change, message, tmp_path):
    model, found = start()
    folder = tmp_path / "a"
    records = {"corda.json": {"model": "tiny", **found.record}, "training.json": {"steps": 3}}
    save_adapter(install(copy.deepcopy(model), found), folder, records)
    load_adapter(copy.deepcopy(model), folder)
    edit(folder / name, change)
    with pytest.raises(CordaError, match=rf"{name} {message}"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: next(iter(r["layers"].values())).update(r=3), r"\.safetensors has .*lora_A.weight of"),
        (lambda record: record["layers"].popitem(), r"\.safetensors has .* of shape .* says None"),
        (lambda record: record.pop("config"), r"corda\.json is damaged: KeyError"),
    ],
)
def test_a_record_of_another_adapter_is_refused_without_checksums_too(change, message, tmp_path):
    model, found = start()
    folder = saved(install(copy.deepcopy(model), found), found, tmp_path / "a")
    (folder / "sha256.json").unlink()  # as on the hub
    edit(folder / "corda.json", change)
    with pytest.raises(CordaError, match=message):
        load_adapter(model, folder)


def test_a_number_that_changed_is_refused(tmp_path):
    model, found = start()
    folder = saved(install(copy.deepcopy(model), found), found, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    numbers = bytearray(path.read_bytes())
    numbers[-1] ^= 1
    path.write_bytes(numbers)
    with pytest.raises(CordaError, match=r"adapter_model\.safetensors is damaged: make the adapter again"):
        load_adapter(model, folder)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("place", ["elsewhere", "over it"])
def test_what_peft_saves_of_ours_is_no_damage(place, trained, tmp_path):
    """Also with other options in the configuration, and over the files that the checksums are of."""
    model, found, adapted, _ = tuned()
    folder = saved(adapted, found, tmp_path / "a")
    loaded = load_adapter(copy.deepcopy(model), folder, trainable=True)
    moved = tiny.logits((train(loaded) if trained else loaded).eval())
    loaded.peft_config["default"].lora_dropout = 0.1
    loaded.peft_config["default"].revision = "main"
    target = folder if place == "over it" else tmp_path / "b"
    loaded.save_pretrained(target)
    same(tiny.logits(load_adapter(model, target)), moved)


def test_another_scale_is_said_where_there_are_no_checksums(tmp_path):
    model, _, adapted, _ = tuned()
    adapted.save_pretrained(tmp_path)
    edit(tmp_path / "adapter_config.json", lambda config: config.update(lora_alpha=32))
    with pytest.warns(UserWarning, match=r"adapter_config\.json scales .* by 4, but the adapter was made with 2"):
        load_adapter(copy.deepcopy(model), tmp_path)
    edit(tmp_path / "adapter_config.json", lambda config: config["target_modules"].remove("model.layers.0.mlp.up_proj"))
    with pytest.raises(CordaError, match=r"target_modules lacks model\.layers\.0\.mlp\.up_proj, which is adapted"):
        load_adapter(model, tmp_path)


def test_no_adapter_or_a_damaged_record_is_refused(tmp_path):
    model, found = start()
    with pytest.raises(CordaError, match="not an adapter directory"):
        load_adapter(model, tmp_path)
    folder = saved(install(model, found), found, tmp_path / "adapter")
    (folder / "corda.json").write_text('{"fingerprint": 3')
    with pytest.raises(CordaError, match=r"corda\.json is damaged"):
        load_adapter(tiny.build("llama"), folder)
    (folder / "corda.json").unlink()
    with pytest.raises(CordaError, match=r"corda\.json is missing: .* or remove sha256\.json if the change is meant"):
        load_adapter(tiny.build("llama"), folder)
    (folder / "sha256.json").unlink()
    load_adapter(tiny.build("llama"), folder)  # it is not needed
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["auto_mapping"]["corda"]["held"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CordaError, match=r"adapter_config\.json is damaged"):
        load_adapter(tiny.build("llama"), folder)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_an_output_with_something_in_it_is_refused(kind, tmp_path):
    model, found = start()
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    with pytest.raises(CordaError, match="has something in it already"):
        saved(install(model, found), found, output)
    assert (output if kind == "file" else output / "mine").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [output]


def test_an_empty_output_directory_will_do(tmp_path):
    model, found = start()
    (tmp_path / "out").mkdir()
    saved(install(model, found), found, tmp_path / "out")
    assert (tmp_path / "out" / "corda.json").is_file()


# --- other forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_lora_is_exact(family, split, tmp_path):
    model, found, adapted, moved = tuned(family, split)
    assert export_lora(copy.deepcopy(model), saved(adapted, found, tmp_path / "a"), tmp_path / "lora") == 0
    assert not (tmp_path / "lora" / "corda.json").exists()
    same(tiny.logits(PeftModel.from_pretrained(model, tmp_path / "lora"), family), moved)


@pytest.mark.parametrize("split", SPLITS)
def test_compressed_lora_reports_its_true_error(split, tmp_path):
    model, found, adapted, _ = tuned(split=split)
    folder = saved(adapted, found, tmp_path / "a")
    whole = deltas(adapted)
    total = sum(float(d.square().sum()) for d in whole.values())
    errors = []
    for r in (1, 3):
        errors.append(export_lora(copy.deepcopy(model), folder, tmp_path / f"r{r}", r))
        exported = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"r{r}")
        assert exported.peft_config["default"].r == r
        rest = sum(float((whole[n] - d).square().sum()) for n, d in deltas(exported).items())
        assert errors[-1] == pytest.approx((rest / total) ** 0.5, rel=1e-4)
        best = sum(float(torch.linalg.svdvals(d)[r:].square().sum()) for d in whole.values())
        assert errors[-1] == pytest.approx((best / total) ** 0.5, rel=1e-4)  # Eckart-Young
    assert errors[0] > errors[1] > 0.01


def test_compressing_to_all_there_is_loses_nothing(tmp_path):
    model, found, adapted, moved = tuned()
    error = export_lora(copy.deepcopy(model), saved(adapted, found, tmp_path / "a"), tmp_path / "lora", 8)
    assert error < 1e-6
    same(tiny.logits(PeftModel.from_pretrained(model, tmp_path / "lora")), moved)


def test_compress_is_eckart_young():
    torch.manual_seed(0)
    A, B = torch.randn(6, 40, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    sigma = torch.linalg.svdvals(B @ A)
    new_A, new_B, rest, whole = compress(A, B, 2)
    assert (new_A.shape, new_B.shape) == ((2, 40), (30, 2))
    assert rest == pytest.approx(float(sigma[2:].square().sum()))
    assert whole == pytest.approx(float(sigma.square().sum()))
    assert float((B @ A - new_B @ new_A).square().sum()) == pytest.approx(rest)


def test_compressing_to_a_higher_rank_is_refused(tmp_path):
    model, found, adapted, _ = tuned()
    with pytest.raises(CordaError, match="rank 9 is no compression"):
        export_lora(model, saved(adapted, found, tmp_path / "a"), tmp_path / "lora", 9)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_merged(family, split, tmp_path):
    model, found, adapted, moved = tuned(family, split)
    export_merged(model, saved(adapted, found, tmp_path / "a"), tmp_path / "merged")
    same(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), family), moved)


@pytest.mark.parametrize("split", ["paper", "balanced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_residual(family, split, tmp_path):
    model, found, adapted, moved = tuned(family, split)
    export_residual(copy.deepcopy(model), saved(adapted, found, tmp_path / "a"), tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    assert (tiny.logits(residual, family) - tiny.logits(model, family)).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(residual, tmp_path / "residual" / "adapter")
    assert loaded.peft_config["default"].r == 4
    same(tiny.logits(loaded, family), moved)


def test_a_residuals_adapter_belongs_to_the_residual(tmp_path, monkeypatch):
    """Its base is the residual, which it names by its path; on the original model it would be silently wrong."""
    model, found, adapted, moved = tuned()
    adapted.peft_config["default"].revision = "of the original"
    monkeypatch.chdir(tmp_path)
    export_residual(copy.deepcopy(model), saved(adapted, found, Path("a")), Path("residual"))
    plain = peft.AutoPeftModelForCausalLM.from_pretrained("residual/adapter")
    same(tiny.logits(plain), moved)
    assert plain.peft_config["default"].base_model_name_or_path == str(tmp_path / "residual")
    assert "| base model | `residual` |" in Path("residual/adapter/README.md").read_text()
    export_lora(plain.unload(), Path("residual/adapter"), Path("again"), uniform=True)
    for folder in ("residual/adapter", "again"):
        same(tiny.logits(load_adapter(AutoModelForCausalLM.from_pretrained("residual"), folder)), moved)
        with pytest.raises(CordaError, match=rf"{folder} was made for other weights .* \(its base was .*/residual\)"):
            load_adapter(copy.deepcopy(model), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_residual_is_told_whatever_dtype_it_is_loaded_in(dtype, tmp_path):
    model, found, adapted, _ = tuned()
    export_residual(model, saved(adapted, found, tmp_path / "a"), tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual", dtype=dtype)
    assert is_residual(residual)
    residual.save_pretrained(tmp_path / "again")
    assert is_residual(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32))
    loaded = PeftModel.from_pretrained(residual, tmp_path / "residual" / "adapter")
    assert is_residual(loaded.get_base_model())
    assert not is_residual(loaded.merge_and_unload())


def test_a_residual_is_told_by_a_layer_that_has_lost_something(tmp_path):
    """The tail of a weight of low rank is zero: without it the layer is as before, and so it is when it is merged."""
    model = tiny.build("llama")
    first = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        first.copy_(first[:, :4] @ first[:4])
    context = [{"input_ids": torch.randint(3, tiny.VOCABULARY, (8, 12))}]
    config = CordaConfig(r=4, split="balanced", device="cpu")
    get_corda_model(copy.deepcopy(model), config, context).save_pretrained(tmp_path / "a")
    export_residual(model, tmp_path / "a", tmp_path / "residual")
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    assert is_residual(residual)
    assert not is_residual(PeftModel.from_pretrained(residual, tmp_path / "residual" / "adapter").merge_and_unload())


def test_a_residual_is_whole_with_its_own_adapter_alone(tmp_path):
    """Merging another LoRA into it changes the layer by which it is told, but brings back nothing."""
    model, found, adapted, moved = tuned()
    export_residual(model, saved(adapted, found, tmp_path / "a"), tmp_path / "residual")

    def merged_with(folder):
        residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
        export_merged(residual, folder, tmp_path / f"merged with {folder.name}")
        return AutoModelForCausalLM.from_pretrained(tmp_path / f"merged with {folder.name}")

    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    plain = peft.get_peft_model(residual, LoraConfig(r=2, init_lora_weights=False))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match=r"another adapter than the one in .*plain: what is written lacks it, too"):
        assert is_residual(merged_with(tmp_path / "plain"))
    small = tmp_path / "small"
    export_lora(plain.unload(), tmp_path / "residual" / "adapter", small, r=3)  # it is for the residual, too
    assert not is_residual(merged_with(small))
    whole = merged_with(tmp_path / "residual" / "adapter")
    assert not is_residual(whole)
    same(tiny.logits(whole), moved)


def test_an_anchored_adapter_has_no_residual(tmp_path):
    model, found, adapted, _ = tuned(split="anchored")
    with pytest.raises(CordaError, match="no residual to export"):
        export_residual(model, saved(adapted, found, tmp_path / "a"), tmp_path / "residual")


@pytest.mark.parametrize(
    ("export", "sentence"),
    [
        (export_merged, "the base model is quantized, and only bitsandbytes' 4 bits can be merged into"),
        (export_residual, "the base model is quantized, and --as residual needs its full weights"),
    ],
)
def test_a_quantized_base_is_refused_where_full_weights_are_needed(export, sentence, tmp_path):
    model, found, adapted, _ = tuned()
    folder = saved(adapted, found, tmp_path / "a")
    model.is_quantized = True
    with pytest.raises(CordaError, match=sentence):
        export(model, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model, found = start()
    adapted = install(model, found)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corda_lora.adapters.lora.save_file", full)
    with pytest.raises(CordaError, match=r"the disk is full: .*out could not be written, and nothing is left of it"):
        save_adapter(adapted, tmp_path / "out", {}, {"x": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_training_is_that_of_a_residual_in_place(split):
    """W + s·(BA − B₀A₀) with A₀, B₀ held takes the same steps as the paper's W' + s·BA with W' written over W."""
    model = tiny.build("llama").double()
    start = preprocess(model, CordaConfig(r=4, split=split, lora_alpha=8), tiny.batches(), progress=False)
    ours = install(copy.deepcopy(model), start).double()

    for name, layer in start.layers.items():
        model.get_submodule(name).weight.data -= start.config.scale * layer.B.double() @ layer.A.double()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(start.layers), task_type="CAUSAL_LM")
    residual = peft.get_peft_model(model, config).double()
    for name, layer in lora_layers(residual).items():
        layer.lora_A["default"].weight.data.copy_(start.layers[name].A)
        layer.lora_B["default"].weight.data.copy_(start.layers[name].B)

    batch = tiny.batches()[0]
    for adapted in (ours, residual):
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
        for _ in range(5):
            adapted(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    plain = lora_layers(residual)
    for name, layer in lora_layers(ours).items():
        for factor in ("lora_A", "lora_B"):
            trained = getattr(layer, factor)["default"].weight.chunk(2, dim=0 if factor == "lora_A" else 1)[0]
            assert not torch.allclose(trained, getattr(start.layers[name], factor[-1]).double(), atol=1e-3)  # it moved
            torch.testing.assert_close(trained, getattr(plain[name], factor)["default"].weight, atol=1e-6, rtol=1e-6)
