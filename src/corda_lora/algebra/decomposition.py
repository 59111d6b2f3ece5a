"""Context-oriented decomposition of one weight (CorDA, arXiv 2406.05223), as pure functions on tensors.

A linear layer computes y = W x, with W of shape (m, n) = (d_out, d_in) and R = min(m, n) components. While the model
reads the context, the layer's inputs have the covariance C = E[x xᵀ], of shape (n, n). CorDA takes the SVD of the
*oriented* weight,

    W C_λ = U Σ Vᵀ                 C_λ = C + λ·mean(diag C)·I

and writes W = U Σ (Vᵀ C_λ⁻¹). Component i with a large σ_i carries much of the layer's output *on this context*. The
components with small σ_i, the tail, act in directions that the context hardly uses. The adapter takes the last r
components (mode `kpm`: keep the context, learn elsewhere) or the first r (mode `ipm`: learn where the context is).

**No inverse is needed.** Uᵀ(W C_λ) = Σ Vᵀ implies Σ Vᵀ C_λ⁻¹ = UᵀW. Hence a set S of components is a projection of W:

    U_S Σ_S (V_Sᵀ C_λ⁻¹) = U_S U_Sᵀ W

Only U and Σ are computed. Where the adapter uses r components, only those r are computed: see `solvers`. The paper
doubles λ while its explicit float32 inverse C_λ⁻¹ is inaccurate. There is no inverse here, so λ stays as given.

**Two-sided.** What an error of the weight does to the model's answers also hangs on where in the output it is. With
D = E[g gᵀ], (m, m), of the gradients g of log p(y) at the layer's outputs (see `second_order`), the components of

    D_λ^½ W C_λ^½ = U Σ Vᵀ

are those for which ‖D_λ^½ (W − X) C_λ^½‖_F is least, over all X of rank r, where X is the first r (Eckart and Young). A
set S of them is

    D_λ^-½ U_S Σ_S V_Sᵀ C_λ^-½ = D_λ^-½ U_S U_Sᵀ D_λ^½ W

Any factors L Lᵀ = D_λ and T Tᵀ = C_λ may take the roots' place: Lᵀ W T has the same Σ, and the product of its
components is the same. So Cholesky factors do (`factor`). This is the decomposition of LᵀW instead of W, whose rows
u_iᵀLᵀW again need no inverse; the columns L⁻ᵀu_i need a triangular one. Nor does it need L: any Z with ZᵀZ = WᵀD_λW
may take the place of LᵀW, see `solvers.seen_by_outputs`.

**Splitting a component.** Component i is the outer product u_i a_i with the row a_i = u_iᵀW, of shape (1, n). The
product B A does not determine how the length of a component is shared between A and B, but training depends on it:
see `split_components`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .covariance import BLOCKS

COLUMNS = 2048  # so many columns of a covariance are converted to float64 at a time


def regularize(C: Tensor, damping: float = 0.01) -> Tensor:
    """C_λ = C + λ·mean(diag C)·I of C (n, n), in float64. C_λ is positive definite unless C is zero."""
    C = C.to(torch.float64, copy=True)
    C.diagonal().add_(damping * C.diagonal().mean())
    return C


def factor(M: Tensor, damping: float = 0.01) -> Tensor:
    """The lower triangular L (n, n), float64, with L Lᵀ = M_λ (see `regularize`), of a covariance M (n, n).

    Raises torch.linalg.LinAlgError where M_λ is singular to float64.
    """
    return torch.linalg.cholesky(regularize(M, damping))


def times_lower(X: Tensor, L: Tensor) -> Tensor:
    """X L (k, n) of X (k, n) and a lower triangular L (n, n), at little more than half the operations of a product."""
    product = torch.empty_like(X, memory_format=torch.contiguous_format)
    for low, high in pairwise(len(L) * i // BLOCKS for i in range(BLOCKS + 1)):
        torch.mm(X[:, low:], L[low:, low:high], out=product[:, low:high])
    return product


def orient(W: Tensor, C: Tensor | None, orientation: str, damping: float = 0.01, T: Tensor | None = None) -> Tensor:
    """The oriented weight (m, n), in float64, of W (m, n) and C (n, n).

    Args:
        orientation: `covariance` gives W C_λ (CorDA). `diagonal` gives W diag(C_λ)^½, which scales each input channel
            by its root mean square (ASVD, arXiv 2312.05821, scales by the mean absolute value). `identity` gives W
            itself (PiSSA, MiLoRA), and so does any orientation without a C. `two_sided` gives W T with T Tᵀ = C_λ; the
            side of the outputs is in W already.
        T: the `factor` of C, where it is known.
    """
    W = W.double()
    if C is None or orientation == "identity":
        return W
    if orientation == "two_sided":
        return times_lower(W, factor(C, damping) if T is None else T)
    d = C.diagonal().double()  # (n,)
    ridge = damping * d.mean()
    return W * (d + ridge).sqrt() if orientation == "diagonal" else product(W, C).add_(W * ridge)


def product(W: Tensor, C: Tensor) -> Tensor:
    """W C (m, n) in float64, of W (m, n) in float64 and C (n, n) in a lower precision.

    C is converted a few columns at a time, because C is the largest matrix of all: its float64 copy would take 1 GB
    for a down_proj of LLaMA-2-7B.
    """
    M = torch.empty_like(W)
    for part, columns in zip(M.split(COLUMNS, dim=1), C.split(COLUMNS, dim=1)):
        part.copy_(W @ columns.double())
    return M


def select(mode: str, rank: int, r: int) -> slice:
    """Which r of `rank` components become the adapter: the tail in mode `kpm`, the head in mode `ipm`.

    Raises ValueError if r is not in 1 ... `rank`.
    """
    if not 1 <= r <= rank:
        raise ValueError(f"r is {r}, but the layer has {rank} components")
    return slice(rank - r, rank) if mode == "kpm" else slice(0, r)


def discard(W: Tensor, U: Tensor, L: Tensor | None = None) -> Tensor:
    """W (m, n) without the components U (m, k), in float64: W − U UᵀW, which takes no inverse.

    Args:
        L: two-sided, the factor of D_λ (m, m), see `factor`. U is of LᵀW, and L⁻ᵀU UᵀLᵀW is taken out.
    """
    W = W.double()
    if L is None:
        return W - U @ (U.T @ W)
    return W - torch.linalg.solve_triangular(L.T, U, upper=True) @ (U.T @ (L.T @ W))


def split_components(U: Tensor, sigma: Tensor, rows: Tensor, split: str, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors B (m, r) and A (r, n) with s·B A = Σ u_i a_i, of U (m, r), σ (r,) and the rows a_i = u_iᵀW (r, n).

    Args:
        U: orthonormal columns, or the columns L⁻ᵀu_i of a two-sided decomposition, whose rows are u_iᵀLᵀW.
        split: how the length of each component is shared between its column of B and its row of A.
            `paper`: B = U Σ^½ and A = Σ^-½ Uᵀ W, as published. If C is multiplied by c, B is multiplied by √c and A
            is divided by √c. So the scale of the activations decides how fast each factor learns.
            `balanced`: ‖A_i‖ = ‖B_i‖ for every component i, independent of the scale of the activations.
            `anchored`: each row of A has length one and is to be frozen; B = 0, so the weight itself keeps the
            components. For any B that training finds, ‖ΔW X‖_F ≤ s·‖B‖₂·√(t·tr(A C Aᵀ)): see `energies`.
            `seeded`: the factors of `anchored`, but A is trained: a LoRA whose A starts on the components.

    A component with σ = 0 (of a rank-deficient W) has the row a_i = 0. The row stays zero in A, so the component has no
    effect.

    Raises ValueError for any other split.
    """
    lengths = rows.norm(dim=1, keepdim=True)  # (r, 1)
    dead = lengths <= 1e-12 * lengths.max()
    lengths = torch.where(dead, torch.inf, lengths)
    if split in ("anchored", "seeded"):
        return torch.zeros_like(U), rows / lengths
    if split == "balanced":
        root = (lengths / U.norm(dim=0)[:, None]).sqrt()
    elif split == "paper":
        root = sigma[:, None].sqrt()
        root = torch.where(dead | (root == 0), torch.inf, root)
    else:
        raise ValueError(f"unknown split {split!r}")
    A = rows / root
    B = U * torch.where(torch.isinf(root), 0.0, root).T
    return B.div_(scale**0.5), A.div_(scale**0.5)


def energies(rows: Tensor, C: Tensor) -> Tensor:
    """The energy a_i C a_iᵀ of each row a_i, (r,): the mean of (a_i·x)² over the context's tokens x.

    Args:
        rows: (r, n), float64, because the energy of a tail component is far below ‖a_i‖²‖C‖.
        C: (n, n), not regularized.

    Three sums of energies are used:
        over the rows of W: the context's output energy, tr(W C Wᵀ);
        over the components in the adapter: the share of the output energy that the adapter holds, as U is orthonormal
        (two-sided, of the energy of LᵀW x);
        over the rows of A: the *leak* tr(A C Aᵀ), the certificate of the split `anchored`. For any B, the adapter
        moves the layer's outputs by at most s·‖B‖₂·√(tr(A C Aᵀ)), as a root mean square over the context's tokens.

    The certificate is known before training. It bounds each layer for the inputs that the base model gives it. Once
    earlier layers are tuned, the inputs differ a little from those.
    """
    return (product(rows, C) * rows).sum(dim=1)
