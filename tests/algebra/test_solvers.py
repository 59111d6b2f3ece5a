"""The components that become the adapter, found without the others: against a float64 SVD, where iteration is hard."""

import math
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from corda_lora import devices
from corda_lora.algebra import solvers
from corda_lora.algebra.decomposition import orient, select
from corda_lora.algebra.solvers import chosen_components, components
from corda_lora.config import CordaConfig, CordaError
from corda_lora.devices import double_device, float64_seconds

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {"square": (300, 300), "tall": (420, 260), "wide": (260, 420)}


def orthogonal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def spectrum(kind, R):
    if kind == "flat":  # as of random numbers: no gap, and at the ends hardly a slope
        return torch.linalg.svdvals(torch.randn(R, 2 * R, dtype=torch.float64))
    if kind == "steep":
        return torch.logspace(0, -9, R, dtype=torch.float64)
    values = torch.arange(1, R + 1, dtype=torch.float64) ** -1.2
    if kind == "massive":  # two directions tower over the others, as the first token's do
        values[:2] *= torch.tensor([1e6, 1e5], dtype=torch.float64)
    return values


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("kind", ["flat", "power", "steep", "massive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_subspace_is_the_svds(shape, kind, mode):
    check_against_svd(shape, kind, mode)


@pytest.mark.parametrize("kind", ["flat", "power", "steep", "massive"])
def test_head_of_a_tall_weight_without_its_triangle(kind, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(solvers, "factors_slowly", lambda device: True)
    monkeypatch.setattr(solvers, "triangle", None)
    check_against_svd("tall", kind, "ipm")


@pytest.mark.parametrize("kind", ["flat", "power", "steep", "massive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tail_by_cholesky_factors(shape, kind, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(solvers, "factors_slowly", lambda device: True)
    products = []
    monkeypatch.setattr(solvers, "_lower_product", lambda *x: products.append(x) or torch.mm(*x))
    check_against_svd(shape, kind, "kpm")
    assert products


def check_against_svd(shape, kind, mode):
    torch.manual_seed(0)
    m, n = SHAPES[shape]
    R = min(m, n)
    W = orthogonal(m, R) @ torch.diag(1 + torch.rand(R, dtype=torch.float64)) @ orthogonal(n, R).T
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    # T with W T = U Σ Vᵀ: W is well conditioned, and what it is multiplied by is not.
    T = torch.linalg.pinv(W) @ (U * spectrum(kind, R)) @ Vh + (torch.eye(n) - Vh.T @ Vh)
    times = lambda W: W @ T  # noqa: E731
    exact, values, _ = torch.linalg.svd(W @ T, full_matrices=False)
    chosen = select(mode, R, 20)
    found, sigma = chosen_components(W, times, mode, 20, "subspace")
    rows = exact[:, chosen].T @ W
    assert (found @ (found.T @ W) - exact[:, chosen] @ rows).norm() < 1e-5 * rows.norm()
    torch.testing.assert_close(sigma, values[chosen], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_auto_iterates_where_r_is_small(mode, monkeypatch):
    """... and all components are never computed; with a real covariance, of fewer tokens than the layer is wide."""
    torch.manual_seed(1)
    W, X = torch.randn(200, 160), torch.randn(120, 160) * torch.logspace(1, -2, 160)
    times = partial(orient, C=X.T @ X / 120, orientation="covariance")
    exact, _ = components(W, times, "svd")
    exact = exact[:, select(mode, 160, 10)]
    monkeypatch.setattr(solvers, "components", None)
    found, _ = chosen_components(W, times, mode, 10)
    rows = exact.T @ W.double()
    assert (found @ (found.T @ W.double()) - exact @ rows).norm() < 1e-5 * rows.norm()


def test_where_iteration_cannot_get_there_gram_takes_over_and_says_so():
    """A tail of zeros: there is no inverse."""
    torch.manual_seed(2)
    values = torch.linspace(2, 1, 120, dtype=torch.float64)
    values[110:] = 0
    W = (orthogonal(120, 120) * values) @ orthogonal(120, 120).T
    with pytest.warns(UserWarning, match="did not converge: gram"):
        U, sigma = chosen_components(W, lambda W: W, "kpm", 15, "subspace")
    torch.testing.assert_close(sigma, values[105:], rtol=0, atol=1e-7)
    assert abs((U.T @ W).norm() - values[105:].norm()) < 1e-7


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_border_among_equals(mode):
    """Any of them will do, if the energy is right; by iteration or not."""
    warnings.simplefilter("ignore")
    torch.manual_seed(2)
    values = torch.full((120,), 1.2, dtype=torch.float64)
    values[: 5 if mode == "ipm" else 0] = 2
    W = (orthogonal(120, 120) * values) @ orthogonal(120, 120).T
    U, sigma = chosen_components(W, lambda W: W, mode, 15, "subspace")
    torch.testing.assert_close(sigma, values[select(mode, 120, 15)], rtol=1e-9, atol=0)
    torch.testing.assert_close((U.T @ W).norm(dim=1), sigma, rtol=1e-6, atol=0)


def test_a_tall_weight_that_cholesky_cannot_factor():
    torch.manual_seed(3)
    values = torch.logspace(0, -10, 40, dtype=torch.float64)
    W = (orthogonal(90, 40) * values) @ orthogonal(40, 40).T
    U, sigma = components(W)
    torch.testing.assert_close(sigma, values, rtol=1e-4, atol=0)
    torch.testing.assert_close((U.T @ W).norm(dim=1), values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("apart", [1.0, 1e-12, 0.0])
def test_orthonormal_basis_of_rows_that_are_nearly_one(apart, device):
    X = torch.randn(1, 50, dtype=torch.float64) + apart * torch.randn(6, 50, dtype=torch.float64)
    Q = solvers.orthonormal(X.to(device), loss=1e-13)[0].cpu()
    torch.testing.assert_close(Q @ Q.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (X[0] - X[0] @ Q.T @ Q).norm() < 1e-9 * X[0].norm()


@pytest.mark.parametrize("kind", ["flat", "power", "steep"])
def test_what_making_a_block_orthonormal_says_of_the_spectrum(kind):
    """... after one product with H it tells the eigenvalues at which the filter is set, on the safe side of θ_b."""
    torch.manual_seed(4)
    theta = spectrum(kind, 300).square()
    theta = theta / theta[0]
    Q = orthogonal(300, 40).T
    for _ in range(2):
        Q, found = solvers.orthonormal(Q * theta)
    for i in (0, 19):
        assert 0.6 < found[i] / theta[i] < 1.5
    assert 0.4 < found[-1] / theta[39] < 1.1


@pytest.mark.parametrize("kind", ["flat", "power"])
def test_the_small_eigenproblem_is_solved_once(kind, monkeypatch):
    """It is what a GPU is slowest at."""
    original, sizes = solvers.eigh, []
    monkeypatch.setattr(solvers, "eigh", lambda G: (sizes.append(len(G)), original(G))[1])
    torch.manual_seed(5)
    values, V = spectrum(kind, 400), orthogonal(400, 400)
    sigma, X = solvers.leading_singular_vectors((orthogonal(400, 400) * values) @ V.T, 20)
    torch.testing.assert_close(sigma[:20], values[:20], rtol=1e-9, atol=0)
    torch.testing.assert_close((X[:20] @ V[:, :20]).norm(), torch.tensor(20.0).double().sqrt(), rtol=1e-9, atol=0)
    assert sizes == [len(sigma)]


def test_a_flat_spectrum_below_a_few_that_are_not_high_enough_to_be_taken_out():
    """Each filter may only have a low degree: it takes many, which are cheap."""
    torch.manual_seed(8)
    values, V = torch.linspace(1.6, 1, 400, dtype=torch.float64), orthogonal(400, 400)
    values[:10] *= 500
    found = solvers.leading_singular_vectors((orthogonal(400, 400) * values) @ V.T, 20)
    assert found is not None
    torch.testing.assert_close(found[0][:20], values[:20], rtol=1e-9, atol=0)
    assert (found[1][:20] @ V[:, 20:]).norm() < 1e-5


def test_a_tail_takes_next_to_nothing_of_what_towers_above_it():
    """σ₁ is 1e9 times the last: a part of U_S on u₁ so small that no residual shows it would be most of U_S Uᵀ_S M."""
    torch.manual_seed(10)
    sigma = torch.cat([torch.logspace(2, -3.9, 383), torch.logspace(-4.2, -7, 17)]).double()
    U = orthogonal(400, 400)
    tail, _ = chosen_components((U * sigma) @ orthogonal(400, 400).T, lambda W: W, "kpm", 16, "subspace")
    taken = (U[:, :-16].T @ tail) * sigma[:-16, None]
    assert taken.norm() < 1e-7 * sigma[-16:].norm()
    torch.testing.assert_close(tail.T @ tail, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("R", [100, 515, 768, 1024])
def test_inverse_and_product_of_a_triangle(R):
    torch.manual_seed(6)
    L = torch.randn(R, R, dtype=torch.float64).tril(-1) / R**0.5 + torch.diag(1 + torch.rand(R, dtype=torch.float64))
    X = torch.randn(R, 70, dtype=torch.float64)
    torch.testing.assert_close(solvers.lower_inverse(L) @ L, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(solvers._lower_product(L, X), L @ X, rtol=1e-10, atol=1e-10)


def test_an_eigensolver_that_fails_is_asked_again_on_the_cpu(monkeypatch):
    original, calls = torch.linalg.eigh, []

    def fails_once(G):
        calls.append(G)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(G)

    monkeypatch.setattr(torch.linalg, "eigh", fails_once)
    assert components(torch.diag(torch.tensor([1.0, 2.0])))[1].tolist() == [2, 1]
    assert len(calls) == 2


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_a_weight_of_zeros(mode):
    with pytest.warns(UserWarning, match="gram"):
        U, sigma = chosen_components(torch.zeros(90, 60), lambda W: W, mode, 5, "subspace")
    assert torch.isfinite(U).all()
    assert sigma.tolist() == [0] * 5


@pytest.mark.parametrize("rank", [3, 8, 30])
def test_head_of_a_weight_of_low_rank(rank):
    torch.manual_seed(7)
    W = torch.zeros(90, 60, dtype=torch.float64)
    W[:rank, :rank] = torch.diag(torch.linspace(2, 1, rank))
    warnings.simplefilter("ignore")
    U, sigma = chosen_components(W, lambda W: W, "ipm", 8, "subspace")
    torch.testing.assert_close(sigma, torch.linalg.svdvals(W)[:8], rtol=1e-6, atol=1e-6)
    assert abs((U.T @ W).norm() - sigma.norm()) < 1e-6


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="there is no solver 'bogus'"):
        chosen_components(torch.eye(4), lambda W: W, "ipm", 2, "bogus")


def test_no_iteration_where_all_components_are_needed():
    with pytest.raises(CordaError, match="to allocate ranks, all are needed: gram"):
        CordaConfig(preset="corda+", solver="subspace")


CPU, MPS, CUDA = map(torch.device, ("cpu", "mps", "cuda"))


@pytest.mark.parametrize(
    ("device", "capability", "seconds", "chosen", "said"),
    [
        (CPU, None, {}, CPU, None),
        (MPS, None, {MPS: math.inf, CPU: 1.0}, CPU, "mps has no float64"),
        (CUDA, (9, 0), {}, CUDA, None),  # an H100: nothing is measured
        (CUDA, (8, 9), {CUDA: 0.3, CPU: 1.0}, CUDA, None),  # slow, and still the faster one
        (CUDA, (8, 6), {CUDA: 3.0, CPU: 1.0}, CPU, "cuda is slow in float64"),
        (torch.device("xpu"), None, {torch.device("xpu"): math.inf, CPU: 1.0}, CPU, "xpu has no float64"),
    ],
)
def test_where_float64_is_slow_or_missing_the_processor_decomposes(
    device, capability, seconds, chosen, said, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(devices, "float64_seconds", seconds.__getitem__)
    with pytest.warns(UserWarning, match=said) if said else nullcontext():
        assert double_device.__wrapped__(device) == chosen


def test_seconds_of_a_product_are_infinite_where_there_is_none():
    assert 0 < float64_seconds(CPU) < 60
    assert float64_seconds(MPS) == math.inf  # here there is no such device at all
