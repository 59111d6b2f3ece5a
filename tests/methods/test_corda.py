"""CorDA's methods and MiLoRA."""

import pytest
import tiny
import torch

from corda_lora.adapters.lora import lora_layers
from corda_lora.config import CordaError
from corda_lora.methods.registry import Setup
from corda_lora.models.weights import is_4bit, weight_of


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


@pytest.mark.parametrize(
    ("name", "options"), [("corda-ipm-balanced", {"fold": 1}), ("corda-kpm-anchored", {"keep": 1.0})]
)
def test_over_a_quantized_base(name, options, prepare):
    options = options | {"quantization": "nf4"}
    prepared, _, full = prepare(name, family="llama_for_nf4", options=options)
    again, _, _ = prepare(name, family="llama_for_nf4", options=options)  # from the cache
    assert bool(prepared.penalties) == ("keep" in options)
    other = dict(lora_layers(again.model))
    for layer_name, layer in lora_layers(prepared.model).items():
        assert is_4bit(layer.get_base_layer())
        Q, delta = weight_of(layer.get_base_layer()), layer.get_delta_weight("default").detach()
        W = full.get_submodule(layer_name).weight
        assert (W - Q - delta).norm() < 0.15 * W.norm()  # plainly: it is small in the metric of the context
        assert torch.equal(Q + delta, weight_of(other[layer_name].get_base_layer()) + delta)
    if name == "corda-ipm-balanced":
        with pytest.raises(CordaError, match="so its drift cannot be predicted"):
            prepare(name, family="llama_for_nf4", options=options | {"keep": 1.0})
