"""The two-sided decomposition against its definition in float64: symmetric roots, an SVD, explicit inverses."""

import pytest
import torch
from tiny import start_of

from corda_lora.algebra import solvers
from corda_lora.algebra.decomposition import regularize, times_lower
from corda_lora.algebra.solvers import seen_by_outputs
from corda_lora.config import CordaConfig, CordaError
from corda_lora.preprocess.layer import decompose_layer, seen_from

SHAPES = {"square": (40, 40), "tall": (56, 24), "wide": (24, 56)}


def covariance(n, tokens=200, decades=1):
    X = torch.randn(tokens, n, dtype=torch.float64) * torch.logspace(-decades, decades, n, dtype=torch.float64)
    return X.T @ X / tokens


def weight(m, n, spectrum):
    U, V = (torch.linalg.qr(torch.randn(k, len(spectrum), dtype=torch.float64)).Q for k in (m, n))
    return (U * spectrum) @ V.T


def roots(M, damping=0.01):
    """M_λ^½ and M_λ^-½."""
    values, vectors = torch.linalg.eigh(M + damping * M.diagonal().mean() * torch.eye(len(M), dtype=torch.float64))
    return [(vectors * values**power) @ vectors.T for power in (0.5, -0.5)]


def definition(W, C, D, chosen):
    """The chosen components, D_λ^-½ U_S Σ_S V_Sᵀ C_λ^-½, and all of Σ, for a D of mean diagonal 1."""
    D = D / D.diagonal().mean()
    (C_half, C_inverse), (D_half, D_inverse) = roots(C), roots(D)
    U, sigma, Vh = torch.linalg.svd(D_half @ W @ C_half, full_matrices=False)
    return D_inverse @ (U[:, chosen] * sigma[chosen]) @ Vh[chosen] @ C_inverse, sigma


def case(shape, kind="regular"):
    torch.manual_seed(0)
    m, n = SHAPES[shape]
    R = min(m, n)
    if kind == "rank-deficient":
        return weight(m, n, torch.logspace(0, -1, R - 10, dtype=torch.float64)), covariance(n), covariance(m)
    if kind == "badly conditioned":  # a weight over six decades; fewer tokens than channels, which differ a millionfold
        spectrum = torch.logspace(0, -6, R, dtype=torch.float64)
        return weight(m, n, spectrum), covariance(n, 20, 3), covariance(m, 10, 3)
    return weight(m, n, torch.logspace(0, -2, R, dtype=torch.float64)), covariance(n), covariance(m)


def product(layer):
    return layer.B.double() @ layer.A.double()


@pytest.mark.parametrize("solver", ["svd", "gram", "subspace", "auto"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("kind", ["regular", "rank-deficient", "badly conditioned"])
@pytest.mark.parametrize("shape", SHAPES)
def test_components_are_those_of_the_definition(shape, kind, mode, solver):
    W, C, D = case(shape, kind)
    r = 14 if kind == "rank-deficient" else 7  # the tail of 14 holds dead components beside live ones
    R = min(W.shape)
    chosen = slice(0, r) if mode == "ipm" else slice(R - r, R)
    expected, sigma = definition(W, C, D, chosen)
    for split in ("paper", "balanced"):
        config = CordaConfig(mode=mode, r=r, split=split, orientation="two_sided", solver=solver)
        layer = start_of(W, C, config, D)
        assert (product(layer) - expected).norm() < 1e-5 * expected.norm()
        if kind != "rank-deficient":
            found = layer.spectrum if len(layer.spectrum) == r else layer.spectrum[chosen]
            torch.testing.assert_close(found, sigma[chosen], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_is_the_nearest_of_its_rank(shape):
    """... as nothing else is: alternating least squares in the same metric, from five starts, ends there."""
    W, C, D = case(shape)
    (C_half, _), (D_half, _) = roots(C), roots(D)

    def distance(X):
        return float((D_half @ (W - X) @ C_half).norm())

    config = CordaConfig(mode="ipm", r=5, split="balanced", orientation="two_sided", solver="gram")
    found = product(start_of(W, C, config, D))
    M = D_half @ W @ C_half
    best = float("inf")
    for _ in range(5):
        B = torch.randn(len(W), 5, dtype=torch.float64)
        for _ in range(500):
            A = torch.linalg.lstsq(D_half @ B, M).solution  # A C_half
            B = torch.linalg.lstsq(A.T, torch.linalg.solve(D_half, M).T).solution.T
        best = min(best, float((M - D_half @ B @ A).norm()))
    assert distance(found) == pytest.approx(best, rel=1e-6)
    one_sided = product(start_of(W, C, CordaConfig(mode="ipm", r=5, split="balanced")))
    assert distance(found) < 0.99 * distance(one_sided)


@pytest.mark.parametrize("shape", SHAPES)
def test_head_and_tail_add_up_to_the_weight(shape):
    W, C, D = case(shape)
    parts = [
        product(start_of(W, C, CordaConfig(mode=mode, r=r, split="balanced", orientation="two_sided"), D))
        for mode, r in (("ipm", 9), ("kpm", min(W.shape) - 9))
    ]
    assert (sum(parts) - W).norm() < 1e-5 * W.norm()


@pytest.mark.parametrize("split", ["anchored", "seeded"])
def test_rows_of_a_start_from_zero_are_the_components(split):
    W, C, D = case("tall")
    layer = start_of(W, C, CordaConfig(r=6, split=split, orientation="two_sided"), D)
    assert not layer.B.any()
    torch.testing.assert_close(layer.A.norm(dim=1), torch.ones(6))
    expected, _ = definition(W, C, D, slice(18, 24))
    rows = torch.linalg.svd(expected).Vh[:6]  # a basis of the same space
    torch.testing.assert_close(layer.A.double() @ rows.T @ rows, layer.A.double(), rtol=0, atol=1e-5)


def test_balanced_components_are_as_long_in_a_as_in_b():
    W, C, D = case("wide")
    layer = start_of(W, C, CordaConfig(r=6, split="balanced", orientation="two_sided"), D)
    torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", ["svd", "gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_covariances_in_float32_are_not_rounded_again(shape, solver):
    """D is scaled in float64: in float32 that moves these components by 1e-8."""
    W, C, D = case(shape)
    C, D = C.float(), D.float()
    config = CordaConfig(r=7, orientation="two_sided", split="balanced", solver=solver)
    seen = seen_from(W, D, config)
    U, _ = decompose_layer(seen.Z, C, config)
    R = min(W.shape)
    U = U[:, -7:]
    expected, _ = definition(W, C.double(), D.double(), slice(R - 7, R))
    assert (seen.columns(U) @ (U.T @ seen.Z) - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_outputs_see_has_the_products_of_the_weight(shape):
    W, _, D = case(shape)
    given = D.clone()
    Z, columns = seen_by_outputs(W, D)
    assert torch.equal(D, given)
    expected = W.T @ regularize(D / D.diagonal().mean()) @ W
    torch.testing.assert_close(Z.T @ Z, expected, rtol=1e-12, atol=1e-12 * float(expected.max()))
    torch.testing.assert_close(columns(Z), W, rtol=1e-10, atol=1e-10)


def test_d_of_a_tall_weight_is_multiplied_by_and_not_factored(monkeypatch):
    W, _, D = case("tall")
    monkeypatch.setattr(solvers, "factor", None)
    assert seen_by_outputs(W, D).Z.shape == (24, 24)
    with pytest.raises(TypeError):
        seen_by_outputs(W, D, by_gram=False)


@pytest.mark.parametrize("why", ["a weight over six decades", "outputs that cancel"])
def test_a_tall_weight_whose_products_would_be_rounded_away(why):
    W, _, D = case("tall", "badly conditioned" if why.startswith("a weight") else "regular")
    damping = 0.01
    if why == "outputs that cancel":  # nearly all that D sees is at right angles to W
        v = torch.linalg.qr(torch.cat([W, torch.randn(56, 1, dtype=torch.float64)], dim=1)).Q[:, -1:]
        D, damping = v @ v.T, 1e-9
    Z, columns = seen_by_outputs(W, D, damping)
    assert Z.shape == W.shape
    torch.testing.assert_close(columns(Z), W, rtol=1e-9, atol=1e-9)


def test_a_product_with_a_triangle():
    X, L = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, 40, dtype=torch.float64).tril()
    torch.testing.assert_close(times_lower(X, L), X @ L)
    torch.testing.assert_close(times_lower(L.T, L), L.T @ L)


def test_outputs_on_which_nothing_hangs_are_not_looked_at():
    W, C, D = case("wide")
    config = CordaConfig(r=6, split="balanced", orientation="two_sided")
    eye = torch.eye(len(W), dtype=torch.float64)
    torch.testing.assert_close(product(start_of(W, C, config, 0 * D)), product(start_of(W, C, config, eye)))


def test_a_damping_that_leaves_d_or_c_singular():
    W, C, D = case("wide", "badly conditioned")
    config = CordaConfig(r=6, orientation="two_sided")
    config.damping = 1e-30  # below what the command line takes
    with pytest.raises(CordaError, match="a covariance of gradients is singular to float64: raise --damping"):
        start_of(W, C, config, torch.outer(D[0], D[0]))
    with pytest.raises(CordaError, match="a covariance is singular to float64: raise --damping"):
        start_of(W, torch.outer(C[0], C[0]), config, torch.eye(len(W)))
