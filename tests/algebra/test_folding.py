"""Folding what quantization lost back: against roots, an SVD and perturbations in float64."""

import pytest
import torch

from corda_lora.algebra.folding import best_fit, fold, left_by, metric_norm

SHAPES = {"square": (40, 40), "tall": (56, 32), "wide": (32, 56)}
METRICS = ["identity", "inputs", "outputs", "both"]


def covariance(n, tokens=200, decades=2):
    X = torch.randn(tokens, n, dtype=torch.float64) * torch.logspace(0, -decades, n, dtype=torch.float64)
    return X.T @ X / tokens


def sides(metric, m, n, tokens=200):
    """C and D of a metric; fewer tokens than channels make them rank-deficient."""
    C = covariance(n, tokens) if metric in ("inputs", "both") else None
    D = 1e-6 * covariance(m, tokens) if metric in ("outputs", "both") else None  # gradients are small
    return C, D


def roots(M, n, damping=0.01):
    """M_λ^½ and its inverse, by eigenvalues."""
    if M is None:
        return torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    values, V = torch.linalg.eigh(M + damping * M.diagonal().mean() * torch.eye(n))
    return (V * values.sqrt()) @ V.T, (V * values.rsqrt()) @ V.T


def definition(E, r, C, D):
    """The best fit by explicit roots and an SVD."""
    (C_half, C_back), (D_half, D_back) = roots(C, E.shape[1]), roots(D, E.shape[0])
    U, sigma, Vh = torch.linalg.svd(D_half @ E @ C_half, full_matrices=False)
    return D_back @ (U[:, :r] * sigma[:r]) @ Vh[:r] @ C_back


def distance(X, C, D):
    return float((roots(D, X.shape[0])[0] @ X @ roots(C, X.shape[1])[0]).norm())


def on_a_grid(step=0.25):
    """Rounds to the nearest multiples of `step`. What is stored are their numbers."""

    def quantize(W, _):
        codes = (W / step).round().to(torch.int8)
        return codes, codes.to(W.dtype) * step

    return quantize


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tokens", [200, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_fit_is_that_of_the_definition(shape, tokens, metric):
    m, n = SHAPES[shape]
    E = torch.randn(m, n)
    C, D = sides(metric, m, n, tokens)
    A, B = best_fit(E, 6, C, D)
    assert (A.shape, B.shape) == ((6, n), (m, 6))
    expected = definition(E.double(), 6, C, D)
    assert float((B @ A - expected).norm()) < 1e-8 * float(expected.norm())
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    assert metric_norm(E, C, D) == pytest.approx(distance(E.double(), C, D), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_small_step_from_the_best_fit_is_nearer(shape, metric):
    m, n = SHAPES[shape]
    E, (C, D) = torch.randn(m, n, dtype=torch.float64), sides(metric, m, n)
    A, B = (x.requires_grad_() for x in best_fit(E, 5, C, D))
    C_half, D_half = roots(C, n)[0], roots(D, m)[0]
    loss = (D_half @ (E - B @ A) @ C_half).square().sum()
    for gradient, x in zip(torch.autograd.grad(loss, [A, B]), [A, B]):
        assert (gradient * x).abs().max().item() < 1e-8 * loss.item()
    for seed in range(5):
        torch.manual_seed(seed)
        near = [x.detach() + 1e-3 * x.detach().abs().mean() * torch.randn_like(x) for x in (A, B)]
        assert metric_norm(E - near[1] @ near[0], C, D) > loss.sqrt().item()


def test_a_side_without_any_weight_prefers_nothing():
    E = torch.randn(20, 30)
    for mine, plain in zip(best_fit(E, 4, torch.zeros(30, 30), torch.zeros(20, 20)), best_fit(E, 4)):
        assert torch.equal(mine, plain)


def test_nothing_lost_needs_no_adapter():
    A, B = best_fit(torch.zeros(12, 20), 3, covariance(20))
    assert not A.any()
    assert not B.any()


@pytest.mark.parametrize("r", [0, 13])
def test_a_rank_that_the_layer_has_not_is_refused(r):
    with pytest.raises(ValueError, match=f"r is {r}, but the layer has 12 components"):
        best_fit(torch.randn(12, 20), r)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_folding_is_nearer_than_not_and_each_round_no_farther(shape, metric):
    m, n = SHAPES[shape]
    W, (C, D), quantize = torch.randn(m, n), sides(metric, m, n), on_a_grid()
    A, B = best_fit(W, 6, C)  # the head of the weight on its context
    plain = metric_norm(W - B @ A - quantize((W - B @ A).float(), None)[1], C, D)
    left = [plain]
    for rounds in (1, 2, 3, 5, 8):
        stored, fitted_A, fitted_B = fold(W, quantize, A, B, C, D, rounds)
        assert stored.dtype == torch.int8
        left.append(metric_norm(W - stored.double() * 0.25 - fitted_B @ fitted_A, C, D))
        assert left[-1] <= left[-2]
    assert left[1] < 0.95 * plain


def test_the_first_round_from_zero_is_the_best_fit_of_what_quantization_loses():
    W, C, quantize = torch.randn(30, 50), covariance(50), on_a_grid()
    stored, A, B = fold(W, quantize, torch.zeros(4, 50), torch.zeros(30, 4), C, rounds=1)
    codes, values = quantize(W, None)
    assert torch.equal(stored, codes)
    expected = best_fit(W.double() - values.double(), 4, C)
    assert torch.equal(A, expected[0])
    assert torch.equal(B, expected[1])


@pytest.mark.parametrize("rows", ["few", "dependent", "none", "all"])
@pytest.mark.parametrize("inputs", [True, False])
def test_what_an_error_costs_where_B_is_free(rows, inputs):
    C = covariance(24) if inputs else torch.eye(24, dtype=torch.float64)
    A = torch.randn(24 if rows == "all" else 5, 24, dtype=torch.float64)
    A = {"dependent": torch.cat([A, A[:2] + A[2:4]]), "none": 0 * A}.get(rows, A)
    H, X = left_by(A, C if inputs else None, damping=0), torch.randn(7, 24, dtype=torch.float64)
    half = roots(C, 24, 0)[0]
    B = torch.linalg.lstsq((A @ half).T, (X @ half).T, driver="gelsd").solution.T  # the least squares
    expected = float(((X - B @ A) @ half).square().sum())
    assert float((X @ H * X).sum()) == pytest.approx(expected, abs=1e-7 * float((X @ C * X).sum()))
    assert torch.linalg.eigvalsh(left_by(A, C))[0] > 0


def test_the_weight_is_rounded_in_the_metric_that_the_adapter_leaves():
    W, C, seen = torch.randn(30, 50), covariance(50), []

    def quantize(X, H):
        seen.append((X.double(), H))
        return on_a_grid()(X, H)

    A, B = best_fit(W, 4, C)
    fold(W, quantize, A, B, C, rounds=2)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(50)
    torch.testing.assert_close(seen[0][1], left_by(A, C))
    lost = W.double() - on_a_grid()(*seen[0])[1]
    torch.testing.assert_close(seen[1][1], left_by(best_fit(lost, 4, C, damping=0)[0], C), rtol=1e-6, atol=1e-9)


def test_folding_without_a_round_is_refused():
    with pytest.raises(ValueError, match="rounds is 0"):
        fold(torch.randn(8, 8), on_a_grid(), torch.zeros(2, 8), torch.zeros(8, 2), rounds=0)


@pytest.mark.slow
def test_real_layers(smollm2):
    """q_proj, v_proj, gate_proj and down_proj of one block: fitted as the definition says, and folding helps."""
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"):
            W = file.get_tensor(f"model.layers.7.{name}.weight").float()
            m, n = W.shape
            C, D = covariance(n, 3 * n, 1.5), covariance(m, 3 * m, 1.5)
            quantize = on_a_grid(float(W.std()) / 2)
            values = quantize(W, None)[1].double()
            E = W.double() - values
            A, B = best_fit(E, 16, C, D)
            expected = definition(E, 16, C, D)
            assert float((B @ A - expected).norm()) < 1e-8 * float(expected.norm())
            once, often = (
                fold(W, quantize, torch.zeros(16, n), torch.zeros(m, 16), C, D, rounds)[0] for rounds in (1, 3)
            )
            assert not torch.equal(once, often)
            assert metric_norm(E - B @ A, C, D) < 0.97 * metric_norm(E, C, D)
