"""What a checkpoint may not hold is refused by name, whether it is loaded whole or read block by block."""

import json
import pickle
import shutil
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from corda_lora.config import CordaError, ModelConfig
from corda_lora.models.loading import load_model, load_tokenizer, open_model, read_settings

BOTH = pytest.mark.parametrize("load", [load_model, open_model])
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def change(folder, **tensors):
    """Replace tensors of a checkpoint; None removes one."""
    path = folder / "model.safetensors"
    stored = load_file(path) | tensors
    save_file({n: t for n, t in stored.items() if t is not None}, path, metadata={"format": "pt"})


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@BOTH
@pytest.mark.filterwarnings("ignore:the whole model is loaded")
def test_a_missing_weight_is_named(load, folder):
    change(folder, **{WEIGHT: None})
    with pytest.raises(CordaError, match=f"has no {WEIGHT}: it is damaged or of another model"):
        load(ModelConfig(str(folder)))


@BOTH
def test_a_weight_of_another_shape_is_named(load, folder):
    change(folder, **{WEIGHT: torch.zeros(3, 5)})
    with pytest.raises(CordaError, match=rf"has {WEIGHT} of shape \(3, 5\), but its config.json says \(32, 48\)"):
        load(ModelConfig(str(folder)))


@pytest.mark.parametrize("family", ["llama_tied", "gpt2_conv1d", "qwen3_moe", "mixtral", "t5", "bert"])
def test_tied_weights_and_buffers_are_not_missing(family, tmp_path):
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path))).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@BOTH
def test_a_tensor_that_the_model_does_not_have_is_said(load, folder):
    change(folder, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32), "other.bias": torch.zeros(3)})
    with pytest.warns(
        match=r"has 2 tensors that LlamaForCausalLM does not have, such as model\.layers\.2\.mlp\.up_proj"
    ):
        load(ModelConfig(str(folder)))


@BOTH
@pytest.mark.parametrize("family", ["llama_tied", "gpt2_conv1d"])
def test_tied_weights_and_tables_of_older_versions_are_silent(load, family, tmp_path):
    model = tiny.build(family)
    model.save_pretrained(tmp_path)
    base, embedding = ("model", "embed_tokens") if family == "llama_tied" else ("transformer", "wte")
    stored = load_file(tmp_path / "model.safetensors")
    old = {f"{base}.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    old |= {f"{base}.h.0.attn.bias": torch.ones(8, 8), f"{base}.h.0.attn.masked_bias": torch.zeros(())}
    change(tmp_path, **old, **{"lm_head.weight": stored[f"{base}.{embedding}.weight"].clone()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(ModelConfig(str(tmp_path)))


@BOTH
def test_a_pickle_is_not_read(load, folder):
    class Harm:
        def __reduce__(self):
            return (open, (str(folder / "harm"), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CordaError, match=r"are a pickle \(pytorch_model.bin\).*save_pretrained"):
        load(ModelConfig(str(folder)))
    assert not (folder / "harm").exists()


@BOTH
@pytest.mark.parametrize("place", ["../other.safetensors", "{}/other.safetensors"])
def test_an_index_that_names_a_file_outside_the_folder(load, place, folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    names = load_file(folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place.format(folder.parent))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CordaError, match="names a file outside its folder"):
        load(ModelConfig(str(folder)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_on_the_hub_is_refused_unless_asked_for(key, folder):
    configure(folder, **{key: "someone/kernel"})
    read_settings(ModelConfig(str(folder), trust_remote_code=True))
    with pytest.raises(CordaError, match="someone/kernel"):
        load_model(ModelConfig(str(folder)))


@BOTH
@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"torch_dtype": "float7", "dtype": "float7"},
        {"architectures": "Llama"},
        {"rope_parameters": [1]},
        {"vocab_size": None},
    ],
)
@pytest.mark.filterwarnings("ignore:the whole model is loaded")
def test_a_damaged_config_is_one_sentence(load, values, folder):
    configure(folder, **values)
    with pytest.raises(CordaError) as refused:
        load(ModelConfig(str(folder)))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_changed_while_its_blocks_are_read_is_one_sentence(folder):
    load_model(ModelConfig(str(folder))).save_pretrained(folder, max_shard_size=20_000)
    (folder / "model.safetensors").unlink(missing_ok=True)
    _, stored = open_model(ModelConfig(str(folder)))
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        path.unlink()  # another file: what is open stays as it is
        path.write_bytes(content[:-30])
    with pytest.raises(CordaError, match=r"safetensors was changed while it was read: "):
        [read() for read in stored.values()]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_a_file_cut_short_is_one_sentence(file, folder):
    path = folder / file
    path.write_bytes(path.read_bytes()[:-30])
    load = load_tokenizer if file.startswith("tokenizer") else load_model
    with pytest.raises(CordaError) as refused:
        load(ModelConfig(str(folder)))
    assert "\n" not in str(refused.value)


def test_an_end_token_that_begins_texts_is_warned_of(folder):
    """As transformers gives it to the tokenizer of a GGUF file, which is then saved as a folder."""
    tokenizer = load_tokenizer(ModelConfig(str(folder)))
    begin, end = tokenizer.convert_ids_to_tokens([1, 2])
    configure(folder, bos_token_id=1, eos_token_id=2)
    tokenizer.eos_token = end
    tokenizer.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(ModelConfig(str(folder)))
    tokenizer.eos_token = begin
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="the model stops at"):
        load_tokenizer(ModelConfig(str(folder)))
