"""XᵀX against float64, in every way it is summed; on a GPU, where there is one, also by the kernel."""

import pytest
import tiny
import torch

from corda_lora import CordaConfig
from corda_lora.algebra.covariance import Covariance, add_gram, float32_products, mirror
from corda_lora.preprocess.pipeline import preprocess

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def reference(x, lengths, scales):
    parts = x.double().split(lengths)
    return sum(float(s) ** 2 * part.T @ part for s, part in zip(scales, parts))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 100, 576])
def test_sums_of_batches(d, dtype, device):
    torch.manual_seed(0)
    covariance, seen = Covariance(), []
    for t in (70, 1, 257):
        seen.append(torch.randn(t, d, device=device).mul_(3).to(dtype))
        covariance.add(seen[-1])
    x = torch.cat(seen)
    C = covariance.mean()
    assert C.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(C, C.T)
    torch.testing.assert_close(C.double(), x.double().T @ x.double() / 328, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_samples_of_any_length_by_their_own_weights(dtype, device):
    """Weights over four decades: products are exact, so that none drowns in the rounding of another's rows."""
    torch.manual_seed(0)
    lengths, scales = [65, 1, 128, 7], torch.tensor([1e-2, 1.0, 30.0, 1e2], device=device)
    x = torch.randn(sum(lengths), 130, device=device).to(dtype)
    total = add_gram(None, x, lengths, scales)
    total = mirror(add_gram(total, x, lengths, scales))
    expected = 2 * reference(x, lengths, scales)
    assert (total.double() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_the_kernel_sums_half_precision(dtype, monkeypatch):
    """Fails where Triton is missing, or where another path runs in the kernel's place."""
    from corda_lora.algebra import kernels

    seen, kernel = [], kernels.add_gram
    monkeypatch.setattr(kernels, "add_gram", lambda total, x, *rest: seen.append(x.dtype) or kernel(total, x, *rest))
    x = torch.randn(300, 200, device="cuda").to(dtype)
    C = mirror(add_gram(None, x))
    assert seen == [dtype]
    torch.testing.assert_close(C.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    covariance = Covariance()
    covariance.add_samples(x, [100, 200])
    assert seen == [dtype, dtype]
    add_gram(None, x.float())
    assert seen == [dtype, dtype], "float32 rows do not go through the kernel"


def test_float32_is_real_in_a_run_and_the_users_choice_after_it():
    model, seen = tiny.build("llama"), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(KeyError), float32_products("highest"):
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


def test_float32_is_kept():
    """Rows whose products bfloat16 or TF32 would round away."""
    x = torch.tensor([[1.0, 2.0**-12], [1.0, -(2.0**-12)], [2.0**-12, 1.0]])
    torch.testing.assert_close(mirror(add_gram(None, x)), x.T @ x, rtol=0, atol=0)
