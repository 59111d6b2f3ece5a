"""Predicted drift against the formula with whole matrices in float64."""

import pytest
import torch

from corda_lora.algebra.second_order import Low, compact, predicted_drift, quadratic, whole


def random_psd(n, rank, seed):
    X = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X @ (X * torch.logspace(0, -2, rank, dtype=torch.float64)).T


def dense(M):
    return M.factor.double() @ M.factor.double().T + M.diagonal.double().diag()


@pytest.mark.parametrize(("n", "k"), [(24, 24), (24, 100), (24, 23)])
def test_nothing_is_lost_where_the_directions_kept_are_all_there_are(n, k):
    M = random_psd(n, 20, 0)
    torch.testing.assert_close(dense(compact(M, k)), M, rtol=1e-5, atol=1e-5)


def test_the_trace_is_kept_and_the_leading_part_is_the_best():
    M = random_psd(200, 150, 1)
    low = compact(M, 32)
    assert low.factor.shape == (200, 32)
    assert float(dense(low).trace()) == pytest.approx(float(M.trace()), rel=1e-5)
    values = torch.linalg.eigvalsh(M)
    best = float(values[:-32].square().sum().sqrt())  # Eckart and Young
    assert float((low.factor.double() @ low.factor.double().T - M).norm()) <= 1.05 * best
    again = compact(M, 32)
    assert torch.equal(low.factor, again.factor)


def test_it_is_the_trace_of_the_formula_for_one_layer_and_for_several_at_once():
    C, D = random_psd(12, 12, 2), random_psd(7, 7, 3)
    A, B = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    sides = [
        Low(M.float(), torch.zeros(len(M)))
        for M in (
            torch.linalg.cholesky(C + 1e-9 * C.diagonal().mean() * torch.eye(12)),
            torch.linalg.cholesky(D + 1e-9 * torch.eye(7)),
        )
    ]
    expected = [0.5 * (D @ b @ a @ C @ (b @ a).T).trace() for a, b in zip(A, B)]
    for a, b, drift in zip(A, B, expected):
        assert float(predicted_drift(a.float(), b.float(), *sides, torch.tensor(0.5))) == pytest.approx(
            float(drift), rel=1e-4
        )
    stacked = [Low(*(torch.stack([x, x]) for x in side)) for side in sides]
    torch.testing.assert_close(
        predicted_drift(A.float(), B.float(), *stacked, torch.tensor([0.5, 0.5])).double(),
        torch.stack(expected), rtol=1e-4, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("still", [False, True])
def test_its_gradients_are_those_of_the_formula(still):
    C, D = (Low(torch.randn(2, n, 3, dtype=torch.float64), torch.rand(2, n, dtype=torch.float64)) for n in (9, 6))
    A, B = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 9), (6, 4)))
    weight = torch.tensor([0.5, 3.0], dtype=torch.float64)
    inner = quadratic(A.detach(), C) if still else C
    found = predicted_drift(None if still else A, B, inner, D, weight)
    delta = B @ (A.detach() if still else A)
    whole_C, whole_D = (M.factor @ M.factor.mT + torch.diag_embed(M.diagonal) for M in (C, D))
    expected = weight * (whole_D @ delta @ whole_C * delta).sum((-2, -1))
    torch.testing.assert_close(found, expected)
    both, upstream = (B,) if still else (A, B), torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, both, upstream), torch.autograd.grad(expected, both, upstream)
    )


def test_a_quadratic_form_has_the_diagonal_beside_the_directions():
    M = Low(torch.randn(9, 3, dtype=torch.float64), torch.rand(9, dtype=torch.float64))
    X = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(quadratic(X, M), X @ dense(M) @ X.T)


def test_the_whole_of_a_low_one():
    M = random_psd(12, 5, 6)
    torch.testing.assert_close(whole(compact(M, 12)).double(), M, rtol=1e-5, atol=1e-5)
