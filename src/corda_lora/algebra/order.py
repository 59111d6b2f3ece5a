"""The components of an update in order of what they do, as pure functions on tensors.

An update ΔW = B A of rank r is a sum of r components b_i a_i, in as many ways as there are bases. One of them is best
cut short. What leaving out X of ΔW does to the answers is, to second order (see `second_order`),

    ½ · tokens/answers · tr(D X C Xᵀ)        nats per answer token, KL(whole‖cut)

with C = E[x xᵀ] (n, n) and D = E[g gᵀ] (m, m) of the model with the update on it. So the first k components should be
the best fit of rank k in this metric, for every k (Eckart and Young). They come from the singular values of

    Lᵀ ΔW T = U Σ Vᵀ        L Lᵀ = D_λ,  T Tᵀ = C_λ        b_i = L⁻ᵀ u_i,   a_i = σ_i v_iᵀ T⁻¹

where σ_i² is what component i does: tr(D X C Xᵀ) of X = b_i a_i; those of several components add up. Where the update
was trained to the least loss of a task, and C and D are of this task, it is also the loss that is gained by the
component: there the slope is zero, and the Fisher matrix is the curvature.

LᵀB and TᵀAᵀ have r columns, so that the SVD is of the r × r product of their triangles. Nothing is squared.

**Sharing.** Components of all layers in the order of gain per parameter: a budget of R·Σ(m + n) parameters, those of a
LoRA of rank R, pays for the first of them. In each layer these are the first ones again. So every component has a rank
R from which on it is used, and which components a budget pays for is one comparison.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .decomposition import factor, split_components
from .folding import DAMPING


def ordered(
    A: Tensor, B: Tensor, C: Tensor | None = None, D: Tensor | None = None, damping: float = DAMPING
) -> tuple[Tensor, Tensor, Tensor]:
    """A (k, n) and B (m, k) of the same product, whose components are in order, and σ² (k,), descending; all float64.
    k is r, or min(m, n) where that is less. Each row of A is as long as its column of B.

    Args:
        A: (r, n).
        B: (m, r).
        C: of the layer's inputs (n, n). Default: the identity.
        D: of the gradients at its outputs (m, m). Default: the identity. A matrix of zeros counts as the identity.
        damping: λ, see `regularize`.

    Raises torch.linalg.LinAlgError where C_λ or D_λ is singular to float64.
    """
    T, L = (None if M is None or not M.diagonal().any() else factor(M, damping) for M in (C, D))
    Q_b, R_b = torch.linalg.qr(B.double() if L is None else L.T @ B.double())  # (m, k), (k, r)
    Q_a, R_a = torch.linalg.qr(A.double().T if T is None else T.T @ A.double().T)  # (n, k), (k, r)
    U, sigma, Vh = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)
    columns, rows = Q_b @ U, sigma[:, None] * (Vh @ Q_a.T)  # (m, k), (k, n)
    if L is not None:
        columns = torch.linalg.solve_triangular(L.T, columns, upper=True)
    if T is not None:
        rows = torch.linalg.solve_triangular(T.T, rows.T, upper=True).T
    B, A = split_components(columns, sigma, rows, "balanced")
    return A, B, sigma.square()


def needed_ranks(gains: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
    """For each layer the R from which on its components are used, (r,), float64, ascending. With R the components that
    need no more have at most R·Σ costs parameters, one component less than that at worst.

    Args:
        gains: of each layer's components, (r,), in their order. A component counts as no more than the one before it.
        costs: the parameters of one component of each layer, m + n.
    """
    lengths = torch.tensor([len(gain) for gain in gains])
    layer = torch.repeat_interleave(torch.arange(len(gains)), lengths)  # of each component
    each = [gain.double().cpu().cummin(0).values / cost for gain, cost in zip(gains, costs)]
    order = torch.sort(torch.cat(each), descending=True, stable=True).indices
    paid = torch.tensor(costs)[layer[order]].cumsum(0)
    needs = torch.empty(len(order), dtype=torch.float64)
    needs[order] = paid.double() / sum(costs)
    return list(needs.split(lengths.tolist()))


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p of each row of logits (b, vocabulary), in nats: (b,), float32."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
