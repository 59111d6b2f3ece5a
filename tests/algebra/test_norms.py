"""Σσ and σ₁ by products, against a float64 SVD, on a CPU with TF32's rounding imitated."""

import pytest
import torch

from corda_lora.algebra import norms as module
from corda_lora.algebra.norms import norms
from corda_lora.algebra.solvers import leading_singular_vectors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Spectra (R,): as of random numbers, falling, over many decades, below a tower or several, and of low rank.
SPECTRA = {
    "flat": lambda R: torch.linspace(2, 1, R),
    "power": lambda R: torch.arange(1, R + 1) ** -1.2,
    "steep": lambda R: torch.logspace(0, -9, R),
    "tower 1e3": lambda R: torch.cat([torch.tensor([1e3]), torch.arange(1, R) ** -0.5]),
    "tower 1e6": lambda R: torch.cat([torch.tensor([1e6]), torch.arange(1, R) ** -0.5]),
    "towers": lambda R: torch.cat([torch.tensor([1e6, 3e5, 2e4, 1e4]), torch.linspace(2, 1, R - 4)]),
    "half of the rank": lambda R: torch.cat([torch.linspace(2, 1, R // 2), torch.zeros(R - R // 2)]),
    "half at 1e-7": lambda R: torch.cat([torch.linspace(2, 1, R // 2), torch.full((R - R // 2,), 1e-7)]),
    "rank 1": lambda R: torch.eye(R)[0],
}


def matrix(kind, R, n, concentrated=False):
    """M (R, n) of a spectrum; the right vector of the first nearly a unit vector, as of massive activations."""
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(R, R, dtype=torch.float64)).Q
    V = torch.randn(n, R, dtype=torch.float64)
    V[5, 0] = 1e4 * concentrated
    sigma = SPECTRA[kind](R).double()
    return (U * sigma) @ torch.linalg.qr(V).Q.T, sigma


def tf32(X):
    """Truncated, which is the worse of what hardware does."""
    return (X.contiguous().view(torch.int32) & -(2**13)).view(torch.float32)


def imitated_step(X, coefficients, split):
    a, b, c = coefficients
    A = tf32(X) @ tf32(X).T
    P = b * A + c * (tf32(A) @ tf32(A))
    P.diagonal().add_(a)
    rest = X - tf32(X) if split else torch.zeros_like(X)
    return tf32(P) @ tf32(X) + tf32(P) @ tf32(rest)


@pytest.mark.parametrize("concentrated", [False, True])
@pytest.mark.parametrize("shape", [(300, 300), (200, 520)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_sums_in_tf32_are_the_svds(kind, shape, concentrated, monkeypatch):
    monkeypatch.setattr(module, "_step", imitated_step)
    check(*matrix(kind, *shape, concentrated), tolerance=2.5e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_sums_on_a_device_are_the_svds(kind, device):
    """On a GPU in its TF32."""
    M, sigma = matrix(kind, 300, 420)
    check(M.to(device), sigma, tolerance=2.5e-5 if device == "cuda" else 1e-5)


def check(M, sigma, tolerance):
    total, first = norms(M)
    assert first == pytest.approx(float(sigma[0]), rel=2e-6)
    assert total == pytest.approx(float(sigma.sum()), rel=tolerance)


def test_without_its_split_tf32_would_drown_small_components(monkeypatch):
    """What the second product in a step is for."""
    M, sigma = matrix("towers", 300, 300)
    monkeypatch.setattr(module, "_step", lambda X, coefficients, split: imitated_step(X, coefficients, False))
    assert norms(M)[0] < (1 - 5e-5) * float(sigma.sum())


def test_what_is_lost_is_what_is_stated():
    """Each polynomial keeps [0, 1], and the last ones bring what has grown to 1."""
    sigma = torch.cat([torch.logspace(-9, -2, 10001), torch.linspace(0.01, 1, 100001)]).double()
    of = lambda y, coefficients: sum(c * y ** (2 * i + 1) for i, c in enumerate(coefficients))  # noqa: E731
    assert 0 <= of(sigma, module.GROW).min() <= of(sigma, module.GROW).max() < 0.995
    small = sigma[sigma < 1e-3]
    assert (of(small, module.GROW) / small).min() > 0.9999 * module.GROW[0]
    y = sigma
    for coefficients in module.FINISH:
        y = of(y, coefficients)
    assert (y[sigma > 0.1226] - 1).abs().max() < 6e-5
    f = (3 * y - y**3) / 2
    assert ((1 - f) * sigma).max() == pytest.approx(module.LOST, rel=0.01)


def test_a_matrix_of_zeros_and_a_row():
    assert norms(torch.zeros(20, 30, dtype=torch.float64)) == (0, 0)
    row = torch.zeros(1, 30, dtype=torch.float64)
    row[0, 3] = 2
    assert norms(row) == pytest.approx((2, 2), rel=1e-12), "nothing is left beside σ₁"
    assert module._nuclear_norm(torch.zeros(20, 30, dtype=torch.float64), beside=2) == 0


def test_a_first_singular_value_that_many_others_equal():
    """There is no gap for subspace iteration: it does not converge, and Lanczos takes over."""
    M = torch.eye(60, 80, dtype=torch.float64)
    assert leading_singular_vectors(M.T, 1) is None
    assert norms(M) == pytest.approx((60, 1), rel=2.5e-5)


def test_no_more_steps_than_the_spectrum_asks_for(monkeypatch):
    steps = {}
    original = module._step
    for kind in ("flat", "power", "tower 1e6"):
        made = []
        monkeypatch.setattr(module, "_step", lambda *x, made=made, **options: made.append(x) or original(*x, **options))
        norms(matrix(kind, 300, 300)[0])
        steps[kind] = len(made)
    assert steps["tower 1e6"] < 6 < steps["power"] < 13
    assert steps["flat"] < 12
