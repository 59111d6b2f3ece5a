"""The device that is made warm."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import allocated

from corda_lora.config import CordaConfig, CordaError, ModelConfig
from corda_lora.models.loading import open_model
from corda_lora.models.lockstep import shared_out
from corda_lora.preprocess import warm
from corda_lora.processes import Processes


@pytest.mark.parametrize("chosen", [None, "cuda:2"])
def test_the_device_that_a_loaded_model_runs_on(chosen, monkeypatch):
    """Another GPU is somebody else's: nothing is put there."""
    touched = []
    monkeypatch.setattr(warm, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "arange", lambda *_, device: touched.append(str(device)))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))  # a device that there is
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda:1"))]))
    with warm.warming(CordaConfig(device=chosen), model):
        pass
    assert touched == [chosen or "cuda:1"]


def test_what_is_wrong_with_the_device_is_said_where_it_is_needed():
    with warm.warming(CordaConfig(device="nowhere")):
        pass
    with pytest.raises(KeyboardInterrupt), warm.warming(CordaConfig(device="nowhere")):
        raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_gpu_does_to_get_warm_runs_to_its_end(device, mode):
    warm._work(mode, torch.device(device))  # an error in the thread would be lost


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "gemma3", "bert"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_pass_through_the_first_block_leaves_the_model_as_it_is(device, family, tmp_path):
    tiny.build(family).save_pretrained(tmp_path)
    model, stored = open_model(ModelConfig(str(tmp_path)))
    assert stored
    before = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()}
    warm._run_first_blocks(model, 16, torch.device(device))
    assert {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_blocks_that_are_not_run_take_no_memory(tmp_path):
    tiny.build("llama_for_nf4", num_hidden_layers=8, hidden_size=256).save_pretrained(tmp_path)
    model, _ = open_model(ModelConfig(str(tmp_path)))
    most, _ = allocated(lambda: warm._run_first_blocks(model, 16, torch.device("cpu")))
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert block < most < 4 * block


def test_a_model_of_fewer_positions_is_left_alone(tmp_path, monkeypatch):
    tiny.build("gpt2_conv1d").save_pretrained(tmp_path)
    model, _ = open_model(ModelConfig(str(tmp_path)))
    monkeypatch.setattr(warm, "LENGTH", 257)
    with pytest.raises(CordaError, match="256 positions"):
        warm._run_first_blocks(model, 300, torch.device("cpu"))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_another_process_will_read_is_not_pinned_here(rank, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model, _ = open_model(ModelConfig(str(tmp_path)))
    copy, _ = warm._first_blocks(model, torch.device("meta"), Processes(rank, 2, None))
    for block in copy.model.layers:
        here = {name for name, parameter in block.named_parameters() if not parameter.is_meta}
        readers = shared_out(list(block.parameters()), 2)
        assert here == {name for name, parameter in block.named_parameters() if readers[parameter] == rank}
    assert copy.model.embed_tokens.weight.is_meta


def test_the_first_blocks_are_run_by_the_thread_and_an_error_is_lost(monkeypatch):
    ran = []

    def run(*given):
        ran.append(given)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(warm, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(warm, "_work", lambda *_: None)
    monkeypatch.setattr(warm, "release_cache", lambda device: ran.append(device.type))
    monkeypatch.setattr(warm, "_run_first_blocks", run)
    with warm.warming(CordaConfig(), processes="both") as first_blocks:
        first_blocks("empty", 4096)
    assert ran == [("empty", 4096, torch.device("cuda"), "both"), "cuda"]
