"""CorDA's methods and MiLoRA."""

import pytest
import tiny
import torch

from corda_lora.adapters.lora import lora_layers
from corda_lora.config import CordaError
from corda_lora.methods.registry import Setup


@pytest.mark.parametrize(("mode", "kind"), [("kpm", "keep"), ("ipm", "learn")])
def test_each_mode_analyses_its_own_samples(mode, kind, prepare, files, monkeypatch):
    kinds = []
    real = Setup.data
    monkeypatch.setattr(Setup, "data", lambda self, kind: kinds.append(kind) or real(self, kind))
    prepare(f"corda-{mode}-paper")
    assert kinds == [kind]
    if kind == "keep":
        with pytest.raises(CordaError, match="give a context"):
            prepare("corda-kpm-balanced", keep=None, folder=files / "other")


def test_milora_is_the_tail_of_the_plain_svd(prepare):
    prepared, _, base = prepare("milora")
    for name, layer in lora_layers(prepared.model).items():
        U, sigma, Vh = torch.linalg.svd(base.get_submodule(name).weight.double(), full_matrices=False)
        tail = U[:, -4:] * sigma[-4:] @ Vh[-4:]
        A, B = layer.lora_A["default"].weight[:4].double(), layer.lora_B["default"].weight[:, :4].double()
        assert torch.dist(2 * B @ A, tail) / torch.linalg.norm(tail) < 1e-4


def test_a_corda_adapter_with_a_faster_b(prepare):
    prepared, _, _ = prepare("corda-ipm-balanced", 1e-3, options={"ratio": 4.0})
    rates = {id(p): group["lr"] for group in prepared.optimizer.param_groups for p in group["params"]}
    for layer in lora_layers(prepared.model).values():
        assert rates[id(layer.lora_A["default"].weight)] == 1e-3
        assert rates[id(layer.lora_B["default"].weight)] == 4e-3


def test_another_context_and_fewer_samples_of_it(prepare, setup_of, files):
    """ipm on the samples to keep is the head of what kpm takes the tail of."""

    def A_of(folder, **options):
        (files / folder).mkdir()
        prepared, _, _ = prepare("corda-ipm-seeded", options=options, folder=files / folder)
        return {n: layer.lora_A["default"].weight.detach() for n, layer in lora_layers(prepared.model).items()}

    own, other = A_of("a"), A_of("b", context=str(files / "keep.jsonl"))
    fewer, swapped = A_of("c", context=str(files / "keep.jsonl"), samples=4), A_of("d", samples=4)
    as_task, _, _ = prepare("corda-ipm-seeded", learn=setup_of(tiny.build("llama")).keep)
    for name, layer in lora_layers(as_task.model).items():
        assert torch.equal(other[name], layer.lora_A["default"].weight)
        assert len({tuple(A[name].flatten().tolist()) for A in (own, other, fewer, swapped)}) == 4
