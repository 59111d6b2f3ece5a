"""Context-oriented decomposition of one weight: pure tensors, nothing of models. (CorDA, arXiv 2406.05223.)

The layer computes y = W x, W: (m, n) = (d_out, d_in), R = min(m, n). The context's inputs have covariance C: (n, n).
CorDA takes the SVD of the *oriented* weight,

    W C_λ = U Σ Vᵀ                 C_λ = C + λ·mean(diag C)·I

and writes W = U Σ (Vᵀ C_λ⁻¹). A large σ_i means that component i carries much of what W does *on this context*; in
the tail are directions the context hardly uses. The adapter takes the r last components (kpm: keep the context, learn
elsewhere) or the r first (ipm: learn where the context is).

**No inverse is needed.** From Uᵀ(W C_λ) = Σ Vᵀ follows Σ Vᵀ C_λ⁻¹ = UᵀW. So the components S of W are a projection,

    U_S Σ_S (V_Sᵀ C_λ⁻¹) = U_S U_Sᵀ W

and only U and Σ are ever computed. (The paper's rule of doubling λ while C_λ⁻¹ is inaccurate guards an explicit float32
inverse; with no inverse there is nothing to guard, and λ stays as given.)

**U and Σ without an SVD.** G = (W C_λ)(W C_λ)ᵀ = U Σ² Uᵀ is (R, R) if m ≤ n (else take the other side), and a float64
`eigh` of it is cheaper than an SVD, on a GPU several times. Squaring costs accuracy: the relative error of σ_i is about
1e-16·(σ₁/σ_i)². A float32 SVD has 1e-7·(σ₁/σ_i), so float64 eigh is the better of the two wherever σ₁/σ_i < 1e9.

**Splitting a component.** Every component is an outer product u_i a_i, a_i = u_iᵀW (1, n). The product B A does not say
how its length is shared between A and B, and training depends on it: see `split_components`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# `auto` takes the SVD where the Gram matrix would turn the chosen subspace by more than this.
GRAM_TOLERANCE = 1e-8


class Components(NamedTuple):
    """Chosen components of an oriented weight, float64: U (m, r), their σ (r,), and the whole spectrum (R,),
    descending."""

    U: Tensor
    sigma: Tensor
    spectrum: Tensor


def regularize(C: Tensor, damping: float = 0.01) -> Tensor:
    """C_λ = C + λ·mean(diag C)·I, (n, n), float64. Positive definite unless C is zero."""
    C = C.double()
    C = (C + C.T) / 2  # sums in floating point leave C symmetric only to rounding
    C.diagonal().add_(damping * C.diagonal().mean())
    return C


def orient(W: Tensor, C: Tensor | None, orientation: str, damping: float = 0.01) -> Tensor:
    """The oriented weight, (m, n), float64.

    `covariance`: W C_λ (CorDA). `diagonal`: W diag(C_λ)^½, each input channel scaled by its root mean square (ASVD,
    arXiv 2312.05821, which takes the mean absolute value instead). `identity`: W (PiSSA, MiLoRA); C may be None.
    """
    W = W.double()
    if orientation == "identity":
        return W
    assert C is not None
    if orientation == "diagonal":
        d = C.diagonal().double()
        return W * (d + damping * d.mean()).sqrt()
    return W @ regularize(C, damping)


def components(M: Tensor, chosen: slice, solver: str = "auto") -> Components:
    """U_S and σ_S of M = U Σ Vᵀ, M: (m, n) float64, for a head or a tail S = `chosen` of its R components.

    Args:
        solver: `svd`: the reference. `gram`: `eigh` of the (R, R) Gram matrix, then Rayleigh-Ritz within S; the
            subspace is off by an angle of about 1e-16·(σ₁/σ_b)² over the relative gap, b the component at S's border.
            `auto`: gram where that bound is below 1e-8, else svd. (On SmolLM2's q_proj it is 1e-2 in the first block:
            a wide spectrum is common.)
    """
    if M.shape[0] > M.shape[1]:
        Q, M = torch.linalg.qr(M)  # tall: the column space, and an (R, R) matrix in it with the same Σ and V
        U, sigma, spectrum = components(M, chosen, solver)
        return Components(Q @ U, sigma, spectrum)
    if solver != "svd":
        squares, U = torch.linalg.eigh(M @ M.T)  # ascending; (R,), (R, R)
        squares, U = squares.flip(0), U.flip(1)
        border = chosen.start - 1 if chosen.start else chosen.stop - 1
        bound = torch.finfo(M.dtype).eps * squares[0] / squares[border].clamp(min=1e-300)
        if solver == "gram" or bound < GRAM_TOLERANCE or chosen == slice(0, len(squares)):
            # Rayleigh-Ritz: within S, σ is now relative to the largest of S, not to σ₁.
            T = U[:, chosen].T @ M  # (r, n)
            inner, rotation = torch.linalg.eigh(T @ T.T)  # (r,), (r, r)
            sigma = inner.flip(0).clamp(min=0).sqrt()
            spectrum = squares.clamp(min=0).sqrt()
            spectrum[chosen] = sigma
            return Components(U[:, chosen] @ rotation.flip(1), sigma, spectrum)
    U, spectrum, _ = torch.linalg.svd(M, full_matrices=False)
    return Components(U[:, chosen], spectrum[chosen], spectrum)


def select(mode: str, rank: int, r: int) -> slice:
    """The r of `rank` components that become the adapter: the tail in `kpm`, the head in `ipm`."""
    if not 1 <= r <= rank:
        raise ValueError(f"r is {r}, but the layer has {rank} components")
    return slice(rank - r, rank) if mode == "kpm" else slice(0, r)


def split_components(U: Tensor, sigma: Tensor, W: Tensor, split: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors B (m, r) and A (r, n) of the components U (m, r), σ (r,) of W (m, n): s·B A = U Uᵀ W.

    `paper`: B = U Σ^½, A = Σ^-½ Uᵀ W, as published. Multiplying C by c multiplies B by √c and divides A by it, so the
    balance of the two, and with it how fast each learns, hangs on the scale of the activations.
    `balanced`: ‖A_i‖ = ‖B_i‖ for every component i: no such dependence.
    `anchored`: rows of A of length one, to be frozen; B = 0. Here s·B A = 0: the weight itself keeps the components.
    Whatever B becomes, ‖ΔW X‖_F ≤ s·‖B‖₂·√(t·tr(A C Aᵀ)): see `leak`.

    A component with σ = 0 (a rank-deficient W) has a zero row a_i; it stays zero in A, so it does nothing.
    """
    rows = U.T @ W.to(U.dtype)  # (r, n): a_i = u_iᵀ W
    lengths = rows.norm(dim=1, keepdim=True)  # (r, 1)
    dead = lengths <= 1e-12 * lengths.max()
    lengths = torch.where(dead, torch.inf, lengths)
    if split == "anchored":
        return torch.zeros_like(U), rows / lengths
    if split == "balanced":
        root = lengths.sqrt()
    elif split == "paper":
        root = sigma[:, None].sqrt()
        root = torch.where(dead | (root == 0), torch.inf, root)
    else:
        raise ValueError(f"unknown split {split!r}")
    A = rows / root
    B = U * torch.where(torch.isinf(root), 0.0, root).T
    return B / scale**0.5, A / scale**0.5


def leak(A: Tensor, C: Tensor) -> float:
    """tr(A C Aᵀ): mean over the context's tokens of ‖A x‖².

    A: (r, n), C: (n, n), not regularized, of one dtype: float64 for a tail, whose leak is far below ‖A‖²‖C‖.

    The certificate of `anchored`: for any B, on the inputs that the base model gives the layer over the context, the
    adapter moves its outputs by at most s·‖B‖₂·√(tr(A C Aᵀ)), as root mean square over tokens; known before training.
    (It bounds each layer by itself: once earlier layers are tuned, too, the inputs are no longer quite those.)
    """
    return float(((A @ C) * A).sum())
