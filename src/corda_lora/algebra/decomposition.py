"""Context-oriented decomposition of one weight: pure tensors, nothing of models. (CorDA, arXiv 2406.05223.)

The layer computes y = W x, W: (m, n) = (d_out, d_in), R = min(m, n). The context's inputs have covariance C: (n, n).
CorDA takes the SVD of the *oriented* weight,

    W C_λ = U Σ Vᵀ                 C_λ = C + λ·mean(diag C)·I

and writes W = U Σ (Vᵀ C_λ⁻¹). A large σ_i means that component i carries much of what W does *on this context*; in
the tail are directions the context hardly uses. The adapter takes the r last components (kpm: keep the context, learn
elsewhere) or the r first (ipm: learn where the context is).

**No inverse is needed.** From Uᵀ(W C_λ) = Σ Vᵀ follows Σ Vᵀ C_λ⁻¹ = UᵀW. So the components S of W are a projection,

    U_S Σ_S (V_Sᵀ C_λ⁻¹) = U_S U_Sᵀ W

and only U and Σ are ever computed, and where only r components are used, only those: see `solvers`. (The paper's rule
of doubling λ while C_λ⁻¹ is inaccurate guards an explicit float32 inverse; with no inverse there is nothing to guard,
and λ stays as given.)

**Splitting a component.** Every component is an outer product u_i a_i, a_i = u_iᵀW (1, n). The product B A does not say
how its length is shared between A and B, and training depends on it: see `split_components`.
"""

import torch
from torch import Tensor

COLUMNS = 2048  # of a covariance are in float64 at a time


def regularize(C: Tensor, damping: float = 0.01) -> Tensor:
    """C_λ = C + λ·mean(diag C)·I, (n, n), float64. Positive definite unless C is zero."""
    C = C.to(torch.float64, copy=True)
    C.diagonal().add_(damping * C.diagonal().mean())
    return C


def orient(W: Tensor, C: Tensor | None, orientation: str, damping: float = 0.01) -> Tensor:
    """The oriented weight (m, n), float64, of W (m, n), C (n, n).

    `covariance`: W C_λ (CorDA). `diagonal`: W diag(C_λ)^½, each input channel scaled by its root mean square (ASVD,
    arXiv 2312.05821, which takes the mean absolute value instead). `identity`, or no C: W (PiSSA, MiLoRA).
    """
    W = W.double()
    if C is None or orientation == "identity":
        return W
    d = C.diagonal().double()  # (n,)
    ridge = damping * d.mean()
    return W * (d + ridge).sqrt() if orientation == "diagonal" else product(W, C).add_(W * ridge)


def product(W: Tensor, C: Tensor) -> Tensor:
    """W C (m, n) in float64, of W (m, n) float64 and C (n, n) in less, with no float64 copy of all of C: it is the
    largest matrix there is (1 GB for a down_proj of LLaMA-2-7B)."""
    M = torch.empty_like(W)
    for part, columns in zip(M.split(COLUMNS, dim=1), C.split(COLUMNS, dim=1)):
        part.copy_(W @ columns.double())
    return M


def select(mode: str, rank: int, r: int) -> slice:
    """The r of `rank` components that become the adapter: the tail in `kpm`, the head in `ipm`."""
    if not 1 <= r <= rank:
        raise ValueError(f"r is {r}, but the layer has {rank} components")
    return slice(rank - r, rank) if mode == "kpm" else slice(0, r)


def split_components(U: Tensor, sigma: Tensor, rows: Tensor, split: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors B (m, r) and A (r, n) of the components U (m, r), σ (r,), rows a_i = u_iᵀW (r, n): s·B A = U Uᵀ W.

    `paper`: B = U Σ^½, A = Σ^-½ Uᵀ W, as published. Multiplying C by c multiplies B by √c and divides A by it, so the
    balance of the two, and with it how fast each learns, hangs on the scale of the activations.
    `balanced`: ‖A_i‖ = ‖B_i‖ for every component i: no such dependence.
    `anchored`: rows of A of length one, to be frozen; B = 0. Here s·B A = 0: the weight itself keeps the components.
    Whatever B becomes, ‖ΔW X‖_F ≤ s·‖B‖₂·√(t·tr(A C Aᵀ)): see `energies`.
    `seeded`: the same factors, and A is trained, too: a LoRA whose A starts on the components.

    A component with σ = 0 (a rank-deficient W) has a zero row a_i; it stays zero in A, so it does nothing.
    """
    lengths = rows.norm(dim=1, keepdim=True)  # (r, 1)
    dead = lengths <= 1e-12 * lengths.max()
    lengths = torch.where(dead, torch.inf, lengths)
    if split in ("anchored", "seeded"):
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


def energies(rows: Tensor, C: Tensor) -> Tensor:
    """(r,): a_i C a_iᵀ of each row of (r, n), the mean over the context's tokens of (a_i·x)².

    rows: float64, as the energy of a tail is far below ‖a_i‖²‖C‖; C: (n, n), not regularized. Summed over the rows of W
    it is the context's output energy, tr(W C Wᵀ); over the components in the adapter, the part of it that the adapter
    holds (U is orthonormal); over the rows of A, the *leak* tr(A C Aᵀ), which is the certificate of `anchored`: for any
    B, on the inputs that the base model gives the layer over the context, the adapter moves its outputs by at most
    s·‖B‖₂·√(tr(A C Aᵀ)), as root mean square over tokens; known before training. (It bounds each layer by itself: once
    earlier layers are tuned, too, the inputs are no longer quite those.)
    """
    return (product(rows, C) * rows).sum(dim=1)
