"""Starts over a base in NF4: what each is, against its definition in float64, and how near each comes."""

import inspect
from functools import partial

import pytest
import tiny
import torch

pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit
from peft.utils import loftq_utils

from corda_lora.adapters.lora import lora_layers
from corda_lora.algebra.folding import metric_norm
from corda_lora.config import CordaError
from corda_lora.methods import quantized as q
from corda_lora.methods.registry import METHODS
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import quantized_layer, weight_of

FAMILY = "llama_for_nf4"
NAMES = ["qlora", "loftq", "qpissa", "qera", "cloq", "qcorda", "qcorda-folded", "qcorda-kpm-anchored"]


def second_moment(n, tokens=1000):
    X = torch.randn(tokens, n) @ (torch.randn(n, n) * torch.logspace(0, -1, n))
    return X.T @ X / tokens


def layer_of(m=96, n=128):
    torch.manual_seed(m)
    W = torch.randn(m, n) / n**0.5
    return q.Layer(W, torch.float32, second_moment(n), 1e-6 * second_moment(m))


def lost(layer, start, r=8):
    """W − (Q + B A), with Q as bitsandbytes' layer reads it."""
    stored, A, B = start(layer, r)
    linear = torch.nn.Linear(layer.W.shape[1], layer.W.shape[0], bias=False)
    Q = weight_of(quantized_layer(linear, stored, layer.dtype))
    return layer.W.double() - Q.double() - B.double() @ A.double()


def nothing(layer, r):
    """QLoRA."""
    return layer.quantize(layer.W)[0], *layer.zero(r)


@pytest.mark.parametrize("shape", [(96, 128), (192, 64), (128, 128)])
def test_each_start_is_nearest_in_its_own_metric(shape):
    layer = layer_of(*shape)
    C, D = layer.C, layer.D
    both = {n: lost(layer, partial(q.folded, rounds=n, two_sided=True)) for n in (1, 5)}
    plain = {"qlora": nothing, "qpissa": q.qpissa, "loftq": q.loftq, "qcorda": q.qcorda}
    errors = {name: lost(layer, start) for name, start in plain.items()}
    assert errors["loftq"].norm() < 0.97 * errors["qlora"].norm()
    in_C = {name: metric_norm(E, C) for name, E in errors.items()}
    qera, cloq = (metric_norm(lost(layer, start), C) for start in (q.qera, q.cloq))
    assert cloq < qera < 0.96 * in_C["qlora"]
    nearest = partial(q.folded, by_columns=False)
    once, often = (metric_norm(lost(layer, partial(nearest, rounds=n)), C) for n in (1, 5))
    assert often <= once < 0.96 * min(in_C.values())
    from_zero = lost(layer, partial(nearest, rounds=1, from_head=False))  # then it is QERA's
    assert metric_norm(from_zero, C) == pytest.approx(qera, rel=1e-9)
    columns = [metric_norm(lost(layer, partial(q.folded, rounds=n)), C) for n in (1, 5)]
    assert columns[1] <= columns[0] < 0.9 * once
    assert columns[1] < 0.9 * min(often, cloq)
    two_sided = {n: metric_norm(E, C, D) for n, E in both.items()}
    assert two_sided[5] <= two_sided[1] < 0.96 * min(metric_norm(E, C, D) for E in errors.values())


def test_loftq_is_pefts():
    """PEFT's function is written for a GPU: here "cuda" in it reads "cpu"."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"').replace("@torch.no_grad()\n", "")
    names = dict(vars(loftq_utils))
    exec(source, names)
    layer = layer_of()
    values, A, B = names["loftq_init"](layer.W, num_bits=4, reduced_rank=8, num_iter=5)
    theirs = (layer.W - values - B @ A).norm()
    assert float(lost(layer, q.loftq).norm()) == pytest.approx(float(theirs), rel=1e-3)


def test_qpissa_is_the_head_beside_what_is_left_in_nf4():
    layer = layer_of()
    stored, A, B = q.qpissa(layer, 8)
    U, sigma, Vh = torch.linalg.svd(layer.W.double(), full_matrices=False)
    head = U[:, :8] * sigma[:8] @ Vh[:8]
    assert torch.dist(B @ A, head) < 1e-6 * head.norm()
    assert torch.equal(stored["weight"], layer.quantize(layer.W - head.float())[0]["weight"])


def test_qcorda_is_the_oriented_head_beside_what_is_left_in_nf4():
    layer = layer_of()
    stored, A, B = q.qcorda(layer, 8)
    C = layer.C.double()
    C += 0.01 * C.diagonal().mean() * torch.eye(len(C))
    U = torch.linalg.svd(layer.W.double() @ C).U[:, :8]
    head = U @ U.T @ layer.W.double()
    assert torch.dist(B @ A, head) < 1e-5 * head.norm()
    assert torch.equal(stored["weight"], layer.quantize(layer.W - (B @ A).float())[0]["weight"])


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_with_the_stored_weights_and_the_adapter(name, prepare):
    prepared, setup, base = prepare(name, family=FAMILY)
    layers = lora_layers(prepared.model)
    assert layers.keys() == setup.targets.keys()
    assert not isinstance(prepared.model.get_output_embeddings(), Linear4bit)
    for module_name, layer in layers.items():
        assert isinstance(layer.get_base_layer(), Linear4bit)
        weight = base.get_submodule(module_name).weight
        weight.data = weight_of(layer.get_base_layer()) + layer.get_delta_weight("default")
    assert (tiny.logits(prepared.model.eval()) - tiny.logits(base)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qlora", "qera"])
def test_layers_that_are_no_target_are_quantized_too(name, setup_of):
    model = tiny.build(FAMILY)
    targets = find_targets(model, ["q_proj"])
    prepared = METHODS[name].prepare(model, setup_of(model, targets=targets))
    assert isinstance(prepared.model.get_submodule("base_model.model.model.layers.1.mlp.down_proj"), Linear4bit)
    assert lora_layers(prepared.model).keys() == targets.keys()


def test_folding_brings_the_predictions_nearer(prepare, files):
    """KL(full‖quantized) on the task, before any training."""
    tokenizer_free = tiny.logits(tiny.build(FAMILY)).log_softmax(-1)
    divergence = {}
    for name in ("qlora", "qcorda-folded"):
        prepared, _, _ = prepare(name, family=FAMILY, r=16)
        tuned = tiny.logits(prepared.model.eval()).log_softmax(-1)
        divergence[name] = float((tokenizer_free.exp() * (tokenizer_free - tuned)).sum(-1).mean())
    assert divergence["qcorda-folded"] < 0.5 * divergence["qlora"]


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"keep": 1.0, "orientation": "covariance"}])
def test_anchored_rows_are_those_of_the_full_model(options, prepare, files):
    (files / "full").mkdir()
    quantized, _, _ = prepare("qcorda-kpm-anchored", family=FAMILY, options=options)
    full, _, _ = prepare("corda-kpm-anchored", family=FAMILY, folder=files / "full", options=options)
    layers = lora_layers(full.model)
    for name, layer in lora_layers(quantized.model).items():
        assert torch.equal(layer.lora_A["default"].weight, layers[name].lora_A["default"].weight)
        assert not layer.lora_A["default"].weight.requires_grad
        assert not layer.lora_B["default"].weight.any()
    assert quantized.penalties.keys() == {"drift"}


@pytest.mark.parametrize("name", ["qlora", "qcorda-folded", "qcorda-kpm-anchored"])
def test_a_model_that_cannot_be_quantized_is_refused(name, prepare, setup_of):
    with pytest.raises(CordaError, match="blocks of 64"):
        prepare(name, family="llama")  # 32 wide
    model = tiny.build(FAMILY)
    model.is_quantized = True
    with pytest.raises(CordaError, match="quantized already"):
        METHODS[name].prepare(model, setup_of(model))
