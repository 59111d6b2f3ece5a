"""The decomposition against the paper's formula, U Σ Vᵀ C_λ⁻¹, written out in float64 with its inverse."""

from functools import partial

import pytest
import torch
from tiny import start_of

from corda_lora.algebra.decomposition import orient, select, split_components
from corda_lora.algebra.solvers import components, singular_values
from corda_lora.config import CordaConfig

SHAPES = {"square": (40, 40), "tall": (56, 24), "wide": (24, 56)}
ORIENTATIONS = ["covariance", "diagonal", "identity"]


def orthogonal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def weight(m, n, spectrum):
    """A weight (m, n) with these singular values."""
    k = len(spectrum)
    return (orthogonal(m, k) * spectrum) @ orthogonal(n, k).T


def covariance(n, tokens=200):
    """Of activations whose channels differ a hundredfold."""
    X = torch.randn(tokens, n, dtype=torch.float64) * torch.logspace(-1, 1, n, dtype=torch.float64)
    return X.T @ X / tokens


def orientation_matrix(C, orientation, damping=0.01):
    n = C.shape[0]
    if orientation == "identity":
        return torch.eye(n, dtype=torch.float64)
    if orientation == "diagonal":
        d = C.diagonal()
        return torch.diag((d + damping * d.mean()).sqrt())
    return C + damping * C.diagonal().mean() * torch.eye(n, dtype=torch.float64)


def paper(W, C, orientation, mode, r, damping=0.01):
    """U_S Σ_S V_Sᵀ C_λ⁻¹, and all of Σ."""
    T = orientation_matrix(C, orientation, damping)
    U, sigma, Vh = torch.linalg.svd(W @ T, full_matrices=False)
    S = slice(0, r) if mode == "ipm" else slice(len(sigma) - r, len(sigma))
    return (U[:, S] * sigma[S]) @ Vh[S] @ torch.linalg.inv(T), sigma


def product(layer):
    return layer.B.double() @ layer.A.double()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("solver", ["svd", "gram", "subspace", "auto"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_components_are_the_papers(shape, orientation, mode, solver):
    torch.manual_seed(0)
    m, n = SHAPES[shape]
    W, C = weight(m, n, torch.logspace(0, -2, min(m, n), dtype=torch.float64)), covariance(n)
    expected, sigma = paper(W, C, orientation, mode, r=7)
    config = CordaConfig(mode=mode, r=7, split="paper", orientation=orientation, solver=solver)
    layer = start_of(W, C, config)
    assert relative(product(layer), expected) < 1e-5
    expected = sigma if solver in ("svd", "gram") else sigma[select(mode, len(sigma), 7)]
    torch.testing.assert_close(layer.spectrum, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", ["svd", "gram", "subspace", "auto"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_deficient_weight(shape, orientation, mode, solver):
    """18 live components; the tail of 12 holds dead ones beside live ones, the head of 20 as well."""
    torch.manual_seed(1)
    m, n = SHAPES[shape]
    W, C = weight(m, n, torch.logspace(0, -1, 18, dtype=torch.float64)), covariance(n)
    r = min(m, n) - 12 if mode == "kpm" else 20
    expected, _ = paper(W, C, orientation, mode, r)
    for split in ("paper", "balanced"):
        config = CordaConfig(mode=mode, r=r, split=split, orientation=orientation, solver=solver)
        layer = start_of(W, C, config)
        assert torch.isfinite(layer.A).all()
        assert torch.isfinite(layer.B).all()
        assert relative(product(layer), expected) < 1e-5


@pytest.mark.parametrize("split", ["paper", "balanced", "anchored", "seeded"])
@pytest.mark.parametrize("solver", ["svd", "gram", "subspace", "auto"])
def test_a_tail_of_only_dead_components_does_nothing(split, solver):
    torch.manual_seed(2)
    W, C = weight(40, 40, torch.ones(20, dtype=torch.float64)), covariance(40)
    layer = start_of(W, C, CordaConfig(r=8, split=split, solver=solver))
    assert torch.isfinite(layer.A).all()
    assert torch.isfinite(layer.B).all()
    assert product(layer).norm() < 1e-6 * W.norm()


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_zero_weight(mode):
    for split in ("paper", "balanced", "anchored"):
        layer = start_of(torch.zeros(12, 20), covariance(20), CordaConfig(mode=mode, r=4, split=split))
        assert torch.isfinite(layer.A).all()
        assert torch.isfinite(layer.B).all()
        assert product(layer).norm() == 0


@pytest.mark.parametrize("solver", ["svd", "gram", "subspace"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_over_eight_decades(shape, mode, solver):
    torch.manual_seed(3)
    m, n = SHAPES[shape]
    W, C = weight(m, n, torch.logspace(0, -8, min(m, n), dtype=torch.float64)), covariance(n)
    expected, sigma = paper(W, C, "covariance", mode, r=6)
    assert sigma[0] / sigma[-1] > 1e8
    layer = start_of(W, C, CordaConfig(mode=mode, r=6, split="balanced", solver=solver))
    assert relative(product(layer), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_every_component_over_fourteen_decades_is_as_sharp_as_the_svds(shape):
    """Where one Gram matrix resolves four decades: σ_i to some 450 roundings of σ₁, and M's rows in U as small as they
    should be."""
    torch.manual_seed(3)
    m, n = SHAPES[shape]
    M = weight(m, n, torch.logspace(0, -14, min(m, n), dtype=torch.float64))
    U, sigma = components(M)
    reference = torch.linalg.svdvals(M)
    assert (sigma - reference).abs().max() < 1e-13
    resolved = reference > 1e-11
    torch.testing.assert_close(sigma[resolved], reference[resolved], rtol=1e-4, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(len(sigma), dtype=torch.float64), rtol=0, atol=1e-12)
    rows = (U.T @ M).norm(dim=1)
    assert (rows[resolved] / reference[resolved] - 1).abs().max() < 1e-3
    assert (sigma.diff() <= 0).all()


def test_sums_over_the_spectrum():
    torch.manual_seed(4)
    for m, n in SHAPES.values():
        M = weight(m, n, torch.logspace(0, -9, min(m, n), dtype=torch.float64))
        assert float(singular_values(M).sum()) == pytest.approx(float(torch.linalg.svdvals(M).sum()), rel=1e-6)


@pytest.mark.parametrize("solver", ["svd", "gram", "subspace", "auto"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_captured_energy_where_components_are_not_separated(shape, orientation, mode, solver):
    """Equal singular values on both sides of the border: which of them are taken is free, how much is not."""
    torch.manual_seed(4)
    m, n = SHAPES[shape]
    R = min(m, n)
    sigma = torch.linspace(3, 1, R, dtype=torch.float64)
    sigma[R // 3 : 2 * R // 3] = sigma[R // 2]
    C = covariance(n)
    T = orientation_matrix(C, orientation)
    W = weight(m, n, sigma) @ torch.linalg.inv(T)
    config = CordaConfig(mode=mode, r=R // 2, split="paper", orientation=orientation, solver=solver)
    energy = (product(start_of(W, C, config)) @ T).norm()
    chosen = sigma[: R // 2] if mode == "ipm" else sigma[R - R // 2 :]
    assert abs(energy / chosen.norm() - 1) < 1e-6


# --- splits ----------------------------------------------------------------------------------------------------------


def cut(mode, scale=1.0, split="balanced"):
    """W, C, U, and the factors of the split."""
    torch.manual_seed(6)
    W, C = weight(30, 44, torch.logspace(0, -2, 30, dtype=torch.float64)), covariance(44)
    U, sigma = components(W, partial(orient, C=C, orientation="covariance"), "svd")
    chosen = select(mode, 30, 5)
    U, sigma = U[:, chosen], sigma[chosen]
    return W, C, U, sigma, *split_components(U, sigma, U.T @ W, split, scale)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("split", ["paper", "balanced"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_scaled_product_is_the_projection(mode, split, scale):
    W, _, U, _, B, A = cut(mode, scale, split)
    torch.testing.assert_close(scale * B @ A, U @ U.T @ W, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_config_scale_reaches_the_factors(split):
    torch.manual_seed(0)
    W, C = weight(30, 30, torch.logspace(0, -2, 30, dtype=torch.float64)), covariance(30)
    expected, _ = paper(W, C, "covariance", "kpm", 5)
    layer = start_of(W, C, CordaConfig(r=5, split=split, lora_alpha=20))
    assert relative(4 * product(layer), expected) < 1e-5


def test_paper_split_is_equation_3():
    W, _, U, sigma, B, A = cut("ipm", split="paper")
    torch.testing.assert_close(B, U * sigma.sqrt())
    torch.testing.assert_close(A, (U.T @ W) / sigma.sqrt()[:, None])


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_balanced_components_are_as_long_in_a_as_in_b(mode):
    *_, B, A = cut(mode, scale=2.0)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_balance_does_not_hang_on_the_scale_of_the_activations():
    torch.manual_seed(0)
    W, C = weight(30, 30, torch.logspace(0, -2, 30, dtype=torch.float64)), covariance(30)
    norms = {}
    for split in ("paper", "balanced"):
        layers = [start_of(W, C * c, CordaConfig(r=5, split=split)) for c in (1, 100)]
        norms[split] = float(layers[1].B.norm() / layers[0].B.norm())
    assert norms["balanced"] == pytest.approx(1, rel=1e-5)
    assert norms["paper"] == pytest.approx(10, rel=1e-5)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_anchored_rows_are_the_components_at_length_one(mode):
    W, _, U, _, B, A = cut(mode, split="anchored")
    rows = U.T @ W
    torch.testing.assert_close(A, rows / rows.norm(dim=1, keepdim=True))
    assert torch.count_nonzero(B) == 0


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_anchored_certificate_holds_for_any_b(orientation):
    torch.manual_seed(7)
    X = torch.randn(44, 90, dtype=torch.float64) * torch.logspace(-1, 1, 44, dtype=torch.float64)[:, None]
    W, C = torch.randn(30, 44), X @ X.T / 90
    layer = start_of(W, C, CordaConfig(r=5, orientation=orientation))
    A = layer.A.double()
    assert layer.record.leak == pytest.approx(float((A @ X).square().sum() / 90), rel=1e-6)
    assert layer.record.output_energy == pytest.approx(float((W.double() @ X).square().sum() / 90), rel=1e-6)
    for _ in range(20):
        B = torch.randn(30, 5, dtype=torch.float64)
        bound = torch.linalg.matrix_norm(B, 2) * (90 * layer.record.leak) ** 0.5
        assert (B @ A @ X).norm() <= bound * (1 + 1e-6)


def test_kpm_leaks_less_of_the_context_than_ipm():
    torch.manual_seed(8)
    W, C = torch.randn(40, 40), covariance(40)
    leaks = [start_of(W, C, CordaConfig(mode=mode, split="anchored", r=5)).record.leak for mode in ("kpm", "ipm")]
    assert leaks[0] < 0.01 * leaks[1]


@pytest.mark.parametrize("r", [0, 41])
def test_rank_out_of_range(r):
    with pytest.raises(ValueError, match="40 components"):
        select("kpm", 40, r)
