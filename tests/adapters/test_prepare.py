"""The start of an adapter from a call: of a checkpoint as of a loaded model."""

import json

import pytest
import tiny
import torch

from corda_lora.adapters.prepare import prepare
from corda_lora.config import CordaConfig, CordaError, DataConfig, ModelConfig
from corda_lora.models.loading import load_model, load_tokenizer

CONFIG = CordaConfig(preset="corda++", r=4, rounds=2, split="paper", modules_to_save=["norm"], device="cpu")


@pytest.fixture
def known(tmp_path):
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps({"text": f"The capital of country {i} is city {i}."}) + "\n" for i in range(24)))
    return DataConfig(str(path), samples=12)


@pytest.mark.filterwarnings("ignore:the smallest of")
def test_a_loaded_model_starts_as_its_checkpoint_and_is_left_as_it_was(checkpoint, known, tmp_path):
    source = ModelConfig(str(checkpoint))
    prepare(source, CONFIG, known, tmp_path / "a", progress=False)
    model = load_model(source)
    weights = tiny.snapshot(model)
    prepare(model, CONFIG, known, tmp_path / "b", load_tokenizer(source), progress=False)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for name in ("adapter_model.safetensors", "spectra.safetensors", "adapter_config.json"):
        one, other = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert one == other or name == "adapter_config.json"  # which names the checkpoint
    records = [json.loads((tmp_path / folder / "corda.json").read_text()) for folder in "ab"]
    assert records[0]["model"] == str(checkpoint)
    assert {key: records[0][key] for key in records[1]} == records[1]
    assert not list(tmp_path.glob("*.work"))


def test_a_context_is_asked_for_unless_none_is_needed(checkpoint, tmp_path):
    source = ModelConfig(str(checkpoint))
    with pytest.raises(CordaError, match="give a context"):
        prepare(source, CONFIG, None, tmp_path / "start", progress=False)
    prepare(source, CordaConfig(r=4, orientation="identity"), None, tmp_path / "start", progress=False)
    assert json.loads((tmp_path / "start" / "corda.json").read_text())["data"] is None
