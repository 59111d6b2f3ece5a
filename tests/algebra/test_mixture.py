"""Mixtures of covariances against their definition in float64, and their weights against a grid."""

import pytest
import torch

from corda_lora.algebra.mixture import even_weights, mixed


def psd(n, rank, seed, scale=1.0):
    X = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * X @ X.T / rank


def test_a_weight_means_the_same_for_a_loud_context_and_a_quiet_one():
    C1, C2 = psd(6, 9, 0), psd(6, 4, 1)
    for loud in (1.0, 1e6):
        C = mixed([loud * C1, C2], [0.3, 0.7])
        expected = 0.3 * C1 / C1.trace() + 0.7 * C2 / C2.trace()
        torch.testing.assert_close(C / C.trace(), expected, rtol=1e-12, atol=0)
        assert float(C.trace()) == pytest.approx(float(0.3 * loud * C1.trace() + 0.7 * C2.trace()), rel=1e-12)
    torch.testing.assert_close(mixed([C1, C2], [3, 7]), mixed([C1, C2], [0.3, 0.7]))


def test_one_ability_or_equal_ones_are_mixed_to_themselves():
    C = psd(5, 9, 2)
    for matrices, weights in (([C], [4.0]), ([C, C, C], [1.0, 2.0, 3.0]), ([C, torch.zeros(5, 5)], [1.0, 1.0])):
        torch.testing.assert_close(mixed(matrices, weights), C, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mixed([C, psd(5, 9, 3)], [1.0, 0.0]), C)
    assert not mixed([torch.zeros(5, 5)] * 2, [1.0, 1.0]).any()


def sum_of_smallest(matrices, alpha, r):
    C = sum(a * M / M.trace() for a, M in zip(alpha, matrices))
    return float(torch.linalg.eigvalsh(C)[:r].sum())


@pytest.mark.parametrize("r", [1, 3, 6])
@pytest.mark.parametrize("count", [2, 3])
def test_weights_by_layer_are_the_best_of_a_grid(count, r):
    """Their spectra differ, so that equal weights are not the best."""
    matrices = [psd(8, 5 + 4 * k, 10 + k, scale=10.0**k) for k in range(count)]
    alpha = even_weights(matrices, r)
    assert sum(alpha) == pytest.approx(1)
    steps = [i / 40 for i in range(41)]
    grid = (
        [(a, 1 - a) for a in steps] if count == 2 else [(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1]
    )
    best = max(sum_of_smallest(matrices, weights, r) for weights in grid)
    assert sum_of_smallest(matrices, alpha, r) >= 0.97 * best


def test_the_largest_leak_is_smaller_than_under_equal_weights():
    """A context in few directions needs little weight; one that is spread out needs more."""
    narrow, wide = psd(20, 3, 5), psd(20, 60, 6)
    r = 10

    def largest(alpha):
        C = sum(a * M / M.trace() for a, M in zip(alpha, (narrow, wide)))
        A = torch.linalg.eigh(C)[1][:, :r]
        return max(float((A.T @ M @ A).trace() / M.trace()) for M in (narrow, wide))

    alpha = even_weights([narrow, wide], r)
    assert largest(alpha) <= largest([0.5, 0.5])
    assert alpha[1] > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_leaks_rounding_is_no_reason_for_a_weight(seed):
    """Fewer tokens than inputs: r directions that no context uses. What they leak is noise, of any sign."""
    matrices = [psd(64, 10, 100 + 2 * seed), psd(64, 10, 101 + 2 * seed), torch.zeros(64, 64, dtype=torch.float64)]
    assert even_weights(matrices, 8) == [0.5, 0.5, 0.0]


def test_an_ability_that_is_not_there_gets_no_weight():
    assert even_weights([psd(5, 9, 0), torch.zeros(5, 5)], 2) == [1.0, 0.0]
    assert even_weights([torch.zeros(5, 5)] * 2, 2) == [0.5, 0.5]
