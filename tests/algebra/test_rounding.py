"""OPTQ against its definition, column by column with explicit least squares."""

import pytest
import torch

from corda_lora.algebra.rounding import optq

LEVELS = torch.tensor([-1.0, -0.6, -0.25, 0.0, 0.2, 0.5, 1.0])


def metric(n, damping=0.01):
    mixing = torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -1, n, dtype=torch.float64)
    X = torch.randn(500, n, dtype=torch.float64) @ mixing
    H = X.T @ X / len(X)
    return H + damping * H.diagonal().mean() * torch.eye(n)


def largest(W, block):
    return W.unflatten(1, (-1, block)).abs().amax(2).float()


def values(codes, scales, block):
    return LEVELS[codes.long()] * scales.repeat_interleave(block, dim=1)


def nearest(W, scales, block):
    scaled = W.double() / scales.repeat_interleave(block, 1)
    return (scaled[..., None] - LEVELS.double()).abs().argmin(-1)


@pytest.mark.parametrize("n", [24, 160])  # within one chunk of columns, and over several
def test_the_columns_to_come_are_the_best_for_what_is_rounded(n):
    """The definition: before each column is rounded, those to come are fitted anew to the whole error so far."""
    block, W, H = 8, torch.randn(6, n, dtype=torch.float64), metric(n)
    scales = largest(W, block)
    codes = optq(W, H, LEVELS, scales)
    Q, order = values(codes, scales, block), H.diagonal().argsort(descending=True)
    for j in range(n):
        done, left = order[:j], order[j:]
        lost = W[:, done] - Q[:, done]
        free = W[:, left] + lost @ H[done][:, left] @ torch.linalg.inv(H[left][:, left])  # least squares
        scaled = free[:, 0] / scales[:, left[0] // block]
        assert torch.equal(codes[:, left[0]].long(), (scaled[:, None] - LEVELS.double()).abs().argmin(1))


def test_outputs_are_nearer_than_with_the_nearest_levels():
    block, W, H = 16, torch.randn(40, 64, dtype=torch.float64), metric(64)
    scales = largest(W, block)

    def error(codes):
        E = W - values(codes, scales, block)
        return float((E @ H * E).sum())

    assert error(optq(W, H, LEVELS, scales)) < 0.5 * error(nearest(W, scales, block))


def test_the_error_of_a_value_in_half_precision_is_made_up_for():
    block, W, H = 16, torch.randn(40, 64, dtype=torch.float64), metric(64)
    scales = largest(W, block)
    levels = torch.linspace(-1, 1, 256)  # so many that rounding to bfloat16 costs more
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        codes = optq(W, H, levels, scales, dtype)
        E = W - (levels[codes.long()] * scales.repeat_interleave(block, 1)).bfloat16()
        errors.append(float((E @ H * E).sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("H", [torch.eye(32, dtype=torch.float64), torch.diag(torch.rand(32, dtype=torch.float64) + 1)])
def test_where_inputs_are_not_correlated_each_number_takes_its_nearest_level(H):
    W = torch.randn(5, 32)
    scales = largest(W, 8)
    assert torch.equal(optq(W, H, LEVELS, scales).long(), nearest(W, scales, 8))


def test_a_zero_weight_stays_zero():
    scales = torch.zeros(3, 2)
    assert not values(optq(torch.zeros(3, 16), metric(16), LEVELS, scales), scales, 8).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_chooses_the_same_levels(dtype):
    W, H = torch.randn(70, 160, dtype=torch.float64), metric(160)
    scales = largest(W, 8)
    codes = optq(W, H, LEVELS, scales, dtype)
    assert torch.equal(optq(W, H.cuda(), LEVELS, scales, dtype).cpu(), codes)
