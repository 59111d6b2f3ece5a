"""NF4 through bitsandbytes: what is stored, what it stands for, and what is refused."""

import sys

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from corda_lora.config import CordaError
from corda_lora.models.weights import (
    check_quantizer,
    digest_of,
    layer_digest,
    quantize,
    quantized_layer,
    quantized_names,
    values_of,
    weight_of,
)

# QLoRA (arXiv 2305.14314), appendix E.
LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
LEVELS += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
LEVELS += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def nearest_level(W):
    """NF4 as the paper says it: each number is the nearest level times the largest of its block of 64."""
    blocks, levels = W.double().reshape(-1, 64), torch.tensor(LEVELS, dtype=torch.float64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[:, :, None] / scales[:, :, None] - levels).abs().argmin(-1)
    return (levels[nearest] * scales).reshape(W.shape)


@pytest.mark.parametrize("shape", [(64, 128), (3, 64), (576, 192)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_the_paper_says(shape, double, dtype):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, values = quantize(W, dtype, double)
    error = (values - nearest_level(W)).norm() / W.norm()
    assert error < (0.006 if double else 0.003 if dtype == torch.bfloat16 else 1e-6)
    layer = nn.Linear(*shape[::-1]).to(dtype)
    made = quantized_layer(layer, stored, dtype)
    assert torch.equal(weight_of(made).float(), values)
    assert layer_digest(made) == digest_of(shape, stored["weight"])
    x = torch.randn(5, shape[1], dtype=dtype)
    expected = nn.functional.linear(x, values.to(dtype), layer.bias)
    for training in (True, False):  # with AVX512-BF16 the latter would round the scales
        assert torch.allclose(made.train(training)(x), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)
        assert torch.equal(weight_of(made).float(), values)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_that_a_metric_chose_are_those_that_are_read(double, dtype):
    generator = torch.Generator().manual_seed(0)
    W, X = (torch.randn(shape, generator=generator) for shape in [(96, 128), (256, 128)])
    X = X @ torch.randn(128, 128, generator=generator) * torch.logspace(0, -1, 128)
    H = (X.T @ X).double() + torch.eye(128)
    stored, values = quantize(W, dtype, double, H)
    plain, nearest = quantize(W, dtype, double)
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[key], plain[key]) for key in plain if key != "weight")
    assert torch.equal(values_of(stored), values)
    layer = quantized_layer(nn.Linear(128, 96).to(dtype), stored, dtype)
    assert torch.equal(weight_of(layer).float(), values)
    errors = [((W - Q).double() @ H * (W - Q)).sum() for Q in (values, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_a_conv1d_becomes_a_linear_layer():
    layer = Conv1D(128, 64)  # d_out, d_in
    stored, values = quantize(weight_of(layer), torch.float32)
    x = torch.randn(5, 64)
    made = quantized_layer(layer, stored, torch.float32)
    assert torch.allclose(made(x), x @ values.T + layer.bias, atol=1e-5)


def test_the_layers_that_are_quantized():
    model = tiny.build("llama_for_nf4", intermediate_size=96)
    names, left = quantized_names(model, ["model.layers.0.mlp.gate_proj"])
    assert "model.layers.0.self_attn.q_proj" in names
    assert "lm_head" in left
    assert {n for n in left if n.endswith("down_proj")} == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    with pytest.raises(CordaError, match=r"down_proj \(64 × 96\) cannot be quantized in blocks of 64"):
        quantized_names(model, ["model.layers.0.mlp.down_proj"])
    with pytest.raises(CordaError, match="lm_head stays in full precision"):
        quantized_names(model, ["lm_head"])


def test_without_bitsandbytes_and_on_other_devices(monkeypatch):
    check_quantizer(torch.device("cpu"))
    with pytest.raises(CordaError, match=r"quantizes on cpu, .*, not on mps: --device cpu"):
        check_quantizer(torch.device("mps"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("corda_lora.models.weights.find_spec", lambda name: None)
    with pytest.raises(CordaError, match="bitsandbytes is needed: pip install bitsandbytes"):
        check_quantizer(torch.device("cpu"))
