"""OPTQ against its definition, column by column with explicit least squares."""

import pytest
import torch

from corda_lora.algebra.rounding import optq

LEVELS = torch.tensor([-1.0, -0.6, -0.25, 0.0, 0.2, 0.5, 1.0])


def inputs(n):
    mixing = torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -1, n, dtype=torch.float64)
    X = torch.randn(500, n, dtype=torch.float64) @ mixing
    return X.T @ X / len(X)


def values(codes, scales, block):
    return LEVELS.double()[codes] * scales.double().repeat_interleave(block, dim=1)


def test_the_columns_to_come_are_the_best_for_what_is_rounded():
    """The definition: before each column is rounded, those to come are fitted anew to the whole error so far."""
    block, W = 8, torch.randn(6, 24, dtype=torch.float64)
    C = inputs(24)
    Cd = C + 0.01 * C.diagonal().mean() * torch.eye(24)
    codes, scales = optq(W, C, LEVELS, block)
    Q = values(codes, scales, block)
    for j in range(24):
        lost = W[:, :j] - Q[:, :j]  # what the rounded columns are off by
        free = W[:, j:] + lost @ Cd[:j, j:] @ torch.linalg.inv(Cd[j:, j:])  # least squares for the others
        if j % block == 0:
            torch.testing.assert_close(scales[:, j // block], free[:, :block].abs().amax(1).float())
        nearest = (free[:, :1] / scales[:, j // block, None] - LEVELS.double()).abs().argmin(1)
        assert torch.equal(codes[:, j], nearest)


def test_outputs_are_nearer_than_with_the_nearest_levels():
    block, W, C = 16, torch.randn(40, 64, dtype=torch.float64), inputs(64)
    Q = values(*optq(W, C, LEVELS, block), block)
    scales = W.unflatten(1, (-1, block)).abs().amax(2)
    nearest = (W.unflatten(1, (-1, block)) / scales[..., None])[..., None].sub(LEVELS.double()).abs().argmin(-1)
    plain = values(nearest.flatten(1), scales, block)

    def error(Q):
        return float(((W - Q) @ C * (W - Q)).sum())

    assert error(Q) < 0.7 * error(plain)


@pytest.mark.parametrize("C", [torch.eye(32, dtype=torch.float64), torch.diag(torch.rand(32, dtype=torch.float64) + 1)])
def test_where_inputs_are_not_correlated_each_number_takes_its_nearest_level(C):
    W = torch.randn(5, 32)
    codes, scales = optq(W, C, LEVELS, 8, damping=0.0)
    assert torch.equal(scales, W.unflatten(1, (-1, 8)).abs().amax(2))
    nearest = (W[..., None].double() / scales.repeat_interleave(8, 1)[..., None] - LEVELS.double()).abs().argmin(-1)
    assert torch.equal(codes, nearest)


def test_a_zero_weight_stays_zero():
    codes, scales = optq(torch.zeros(3, 16), torch.eye(16), LEVELS, 8)
    assert not values(codes, scales, 8).any()
