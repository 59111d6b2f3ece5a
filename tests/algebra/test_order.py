"""Components in order, and the ranks they are used from, against definitions written out in float64."""

import pytest
import torch

from corda_lora.algebra.order import entropy, needed_ranks, ordered

SHAPES = [(7, 12, 4), (12, 7, 4), (5, 9, 8)]  # m, n, r; the last has more components than rows


def random_psd(n, seed, spread=3):
    X = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = torch.logspace(0, -spread, n, dtype=torch.float64)[:, None] * X
    return X @ X.T / (2 * n)


def root(M, damping=0.01):
    values, V = torch.linalg.eigh(M + damping * M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype))
    return V @ (values.sqrt()[:, None] * V.T)


def factors(m, n, r, dtype=torch.float64):
    draw = torch.Generator().manual_seed(9)
    return torch.randn(r, n, generator=draw, dtype=dtype), torch.randn(m, r, generator=draw, dtype=dtype)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("sides", ["both", "C", "neither"])
def test_every_prefix_is_the_best_fit_of_its_rank(m, n, r, sides):
    A, B = factors(m, n, r)
    C, D = random_psd(n, 1), random_psd(m, 2)
    half_C = torch.eye(n, dtype=torch.float64) if sides == "neither" else root(C)
    half_D = root(D) if sides == "both" else torch.eye(m, dtype=torch.float64)
    new_A, new_B, squares = ordered(A, B, None if sides == "neither" else C, D if sides == "both" else None)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=0, atol=1e-10)
    U, sigma, Vh = torch.linalg.svd(half_D @ B @ A @ half_C, full_matrices=False)
    k = min(m, n, r)
    assert len(new_A) == new_B.shape[1] == k
    torch.testing.assert_close(squares, sigma[:k].square(), rtol=1e-9, atol=0)
    for b in range(k + 1):
        best = torch.linalg.solve(half_D, U[:, :b] * sigma[:b] @ Vh[:b]) @ torch.linalg.inv(half_C)
        torch.testing.assert_close(new_B[:, :b] @ new_A[:b], best, rtol=0, atol=1e-9)
        rest = half_D @ (B @ A - new_B[:, :b] @ new_A[:b]) @ half_C
        assert float(rest.square().sum()) == pytest.approx(float(squares[b:].sum()), rel=1e-8, abs=1e-12)
    torch.testing.assert_close(new_A.norm(dim=1), new_B.norm(dim=0))


def test_factors_that_are_not_independent_lose_nothing():
    """A start in two halves, [B, -B0] and [A; A0], has components that cancel."""
    A, B = factors(7, 12, 3)
    A, B = torch.cat([A, A, 2 * A[:1]]), torch.cat([B, -B, B[:, :1]], dim=1)
    new_A, new_B, squares = ordered(A, B, random_psd(12, 1), random_psd(7, 2))
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=0, atol=1e-10)
    assert float(squares[1:].max()) < 1e-20 * float(squares[0])
    for zero in (torch.zeros(7, 7), None):  # nothing is known of the outputs
        found = ordered(A, B, random_psd(12, 1), zero)
        assert torch.equal(found[0], ordered(A, B, random_psd(12, 1))[0])


def literal_needs(gains, costs):
    """One component at a time, always the one that gains most per parameter among the next of each layer."""
    used, paid, needs = [0] * len(gains), 0, [[] for _ in gains]
    while any(u < len(g) for u, g in zip(used, gains)):
        worth = [float(min(g[: u + 1]) / c) if u < len(g) else -1.0 for g, u, c in zip(gains, used, costs)]
        layer = worth.index(max(worth))
        used[layer] += 1
        paid += costs[layer]
        needs[layer].append(paid / sum(costs))
    return needs


def test_needed_ranks_are_those_of_the_greedy_loop():
    draw = torch.Generator().manual_seed(3)
    gains = [torch.rand(r, generator=draw).sort(descending=True).values for r in (4, 7, 1, 5)]
    gains[1][3:5] = gains[1][3]  # equal
    gains[3][2] = 2.0  # out of order: it counts as what is before it
    costs = [20, 35, 50, 20]
    needs = needed_ranks(gains, costs)
    assert [need.tolist() for need in needs] == [pytest.approx(need) for need in literal_needs(gains, costs)]
    assert max(float(need[-1]) for need in needs) == pytest.approx(
        sum(len(g) * c for g, c in zip(gains, costs)) / sum(costs)
    )
    for R in (0.3, 1.0, 2.5, 4.0):
        spent = sum(int((need <= R).sum()) * cost for need, cost in zip(needs, costs))
        assert R * sum(costs) - max(costs) < spent <= R * sum(costs) or spent == sum(
            len(g) * c for g, c in zip(gains, costs)
        )


def test_entropy_is_that_of_the_distribution():
    logits = 5 * torch.randn(4, 30, generator=torch.Generator().manual_seed(4))
    logits[3] = -torch.inf
    logits[3, 2] = 0.0  # certain
    p = logits.double().softmax(-1)
    torch.testing.assert_close(entropy(logits).double(), -torch.special.xlogy(p, p).sum(-1), rtol=1e-5, atol=1e-6)
    assert float(entropy(torch.zeros(1, 64))) == pytest.approx(float(torch.tensor(64.0).log()))
