"""CorDA++ against its algorithms written out as the paper has them: one covariance, one rank at a time."""

import itertools
import math

import pytest
import torch
from helpers import literal_allocation, literal_selection

from corda_lora.algebra.compactness import (
    allocate,
    allocation_scores,
    extreme_eigenvalues,
    log_compactness,
    selection_score,
)
from corda_lora.algebra.solvers import lanczos
from corda_lora.config import CordaConfig
from corda_lora.preprocess.layer import choose_covariance, extremes_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_model(seed, layers=7):
    """Spectra (some of low rank, two the same), log π and component costs of a model's layers."""
    torch.manual_seed(seed)
    spectra, log_pis, costs = [], [], []
    for layer in range(layers):
        m, n = (int(x) for x in torch.randint(6, 40, (2,)))
        R = min(m, n)
        sigma = torch.rand(R, dtype=torch.float64).pow(1 + layer % 3).sort(descending=True).values * 10**layer
        if layer == 3:
            sigma[R // 2 :] = 0
        spectra.append(sigma)
        log_pis.append(1 + 10 * float(torch.rand(())))
        costs.append(m + n)
    return [*spectra, spectra[0]], [*log_pis, log_pis[0]], [*costs, costs[0]]


@pytest.mark.parametrize("limits", [(1, None), (2, 9), (5, None), (1, 3), (50, None)])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_one_sort_gives_the_ranks_of_the_greedy_loop(mode, share, limits):
    least, most = limits
    for seed in range(8):
        spectra, log_pis, costs = random_model(seed)
        floor = sum(min(least, len(s)) * c for s, c in zip(spectra, costs))
        top = sum(max(min(least, len(s)), min(most or len(s), len(s))) * c for s, c in zip(spectra, costs))
        budget = int(floor + share * (top - floor))
        scores = [allocation_scores(log_pi, sigma) for log_pi, sigma in zip(log_pis, spectra)]
        ranks = allocate(scores, costs, budget, mode, least, most)
        assert ranks == literal_allocation(spectra, log_pis, costs, budget, mode, least, most)
        paid = sum(r * c for r, c in zip(ranks, costs))
        assert paid <= budget
        assert paid > budget - max(costs)


def test_scores_are_equation_9():
    sigma = torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)
    expected = torch.tensor([1 / 14, 2 / 12, 4 / 8, math.inf], dtype=torch.float64)
    torch.testing.assert_close(allocation_scores(3.0, sigma), 3 * expected)
    assert allocation_scores(3.0, torch.zeros(4, dtype=torch.float64)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_a_layer_seen_later_never_makes_a_rank_larger(mode):
    """What lets components be dropped before the whole model has been seen."""
    for seed in range(10):
        spectra, log_pis, costs = random_model(seed)
        scores = [allocation_scores(log_pi, sigma) for log_pi, sigma in zip(log_pis, spectra)]
        budget = int(0.2 * sum(len(s) * c for s, c in zip(spectra, costs)))
        seen = [allocate(scores[:k], costs[:k], budget - sum(costs[k:]), mode) for k in range(1, len(scores) + 1)]
        for fewer, more in itertools.pairwise(seen):
            assert all(a >= b for a, b in zip(fewer, more))


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="does not pay for 2 components a layer, which take 40"):
        allocate([torch.rand(5, dtype=torch.float64)] * 2, [10, 10], 39, "kpm", min_rank=2)


def covariance(n, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, n, dtype=torch.float64, generator=generator)
    X = X * torch.logspace(-1, 1, n, dtype=torch.float64).roll(seed)
    return X.T @ X / tokens


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [10, 200])
def test_selection_is_algorithm_1(tokens, device, by_products, monkeypatch):
    """... by whole spectra, as on a CPU, or by products, as on a GPU."""
    torch.manual_seed(0)
    monkeypatch.setattr("corda_lora.preprocess.layer.factors_slowly", lambda device: by_products)
    monkeypatch.setattr(f"corda_lora.preprocess.layer.{'singular_values' if by_products else 'norms'}", None)
    covariances = [covariance(30, tokens, seed) for seed in range(5)]
    weights = [torch.randn(m, 30) for m in (12, 30, 50)] + [torch.randn(30, 2) @ torch.randn(2, 30)]
    config = CordaConfig(preset="corda++", r=4)
    there = [C.to(device) for C in covariances]
    extremes = extremes_of(there, config, torch.device(device))
    found = [choose_covariance(W.to(device), there, extremes, config) for W in weights]
    for W, record in zip(weights, found):
        best, scores = literal_selection(W, covariances)
        assert record.round == best
        assert record.scores == pytest.approx(scores, rel=2e-5 if by_products else 1e-6)
    if tokens > 30:
        assert len({record.round for record in found}) > 1  # it hangs on W, though the inputs are shared


def test_compactness_is_equation_6():
    C = torch.diag(torch.tensor([0.5, 8.0, 2.0], dtype=torch.float64))
    assert extreme_eigenvalues(C) == (0.5, 8.0)
    assert math.exp(log_compactness(9, 0.5, 8.0)) == pytest.approx(3 * 16)
    assert selection_score(2.0, 7.0, 4.0) == pytest.approx(2 * 7 / 4)
    assert selection_score(2.0, 0.0, 0.0) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [40, 300])
def test_extreme_eigenvalues_of_a_large_matrix(tokens, device, monkeypatch):
    C = covariance(120, tokens, 0)
    C.diagonal().add_(0.01 * C.diagonal().mean())
    exact = torch.linalg.eigvalsh(C)
    monkeypatch.setattr("corda_lora.algebra.compactness.DENSE", 100)
    lowest, highest = extreme_eigenvalues(C.to(device))
    assert lowest == pytest.approx(float(exact[0]), rel=1e-4)
    assert highest == pytest.approx(float(exact[-1]), rel=1e-4)
    assert log_compactness(120, lowest, highest) == pytest.approx(
        log_compactness(120, float(exact[0]), float(exact[-1])), rel=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_eigenvalues_where_lanczos_takes_many_steps(device):
    """Both ends dense, n as in real layers: stopped early, it would be wrong in the second digit."""
    n = 1400
    near, far = 1 - torch.linspace(0, 1, n // 2, dtype=torch.float64) ** 2 * 0.5, torch.logspace(-8, -1, n - n // 2)
    values = torch.cat([near, far.double()])
    torch.manual_seed(0)
    V = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    lowest, highest = extreme_eigenvalues(((V * values) @ V.T).to(device))
    assert highest == pytest.approx(1, rel=1e-4)
    assert lowest == pytest.approx(1e-8, rel=1e-4)


@pytest.mark.parametrize("n", [100, 1100])
def test_a_covariance_that_is_singular_to_float64_is_refused(n):
    C = covariance(n, 20, 0)
    C.diagonal().add_(1e-20 * C.diagonal().mean())
    with pytest.raises(torch.linalg.LinAlgError):
        extreme_eigenvalues(C)


def test_lanczos_gives_the_first_eigenvector_and_takes_few_steps():
    torch.manual_seed(0)
    V = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    products = []
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.2
    value, vector = lanczos(lambda v: (products.append(v), V @ (values * (V.T @ v)))[1], 300, torch.device("cpu"))
    assert value == pytest.approx(1, rel=1e-9)
    assert abs(float(vector @ V[:, 0])) == pytest.approx(1, rel=1e-9)
    assert len(products) <= 30


@pytest.mark.parametrize("multiply", [lambda v: 3 * v, lambda v: torch.cat([v[:1] * 3, v[1:] * 0])])
def test_lanczos_ends_in_an_invariant_subspace(multiply):
    value, vector = lanczos(multiply, 50, torch.device("cpu"))
    assert value == pytest.approx(3)
    torch.testing.assert_close(multiply(vector), 3 * vector)


def test_a_large_models_allocation_is_one_sort():
    """560 layers of 8192 components; how long it takes is in benchmarks/."""
    sigma = torch.logspace(0, -6, 8192, dtype=torch.float64)
    scores = [allocation_scores(5 + layer / 560, sigma) for layer in range(560)]
    budget = 128 * 560 * 16384
    ranks = allocate(scores, [16384] * 560, budget, "kpm")
    assert budget - 16384 < sum(ranks) * 16384 <= budget
    assert ranks == sorted(ranks, reverse=True)  # the less compact (π) layers give less
