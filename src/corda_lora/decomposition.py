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

**U and Σ without an SVD.** G = (W C_λ)(W C_λ)ᵀ = U Σ² Uᵀ is (R, R) if m ≤ n (a tall matrix is first reduced by QR), and
a float64 `eigh` of it is cheaper than an SVD, on a GPU several times. Squaring costs accuracy: the relative error of
σ_i is about 1e-16·(σ₁/σ_i)², and spectra are wide (on SmolLM2's q_proj σ₁/σ_R is 1e7 and more). But all that goes
wrong is that components far below σ₁ are mixed *among themselves*: the space they span together is sharp. So the
components well above the error are kept, M is projected onto the space of the others, and the same is done there, where
the largest σ is now a small one. Each step gains 3 to 4 decades of the spectrum, until what is left is rounding.

**Splitting a component.** Every component is an outer product u_i a_i, a_i = u_iᵀW (1, n). The product B A does not say
how its length is shared between A and B, and training depends on it: see `split_components`.
"""

import torch
from torch import Tensor

# One eigendecomposition of a Gram matrix resolves the components down to this share of the largest σ, to about
# eps / RESOLVED² = 2e-9; below it, another follows.
RESOLVED = 3e-4


def regularize(C: Tensor, damping: float = 0.01) -> Tensor:
    """C_λ = C + λ·mean(diag C)·I, (n, n), float64. Positive definite unless C is zero."""
    C = C.double()
    C = torch.add(C, C.T).div_(2)  # sums in floating point leave C symmetric only to rounding
    C.diagonal().add_(damping * C.diagonal().mean())
    return C


def metric(C: Tensor | None, orientation: str, damping: float = 0.01) -> Tensor | None:
    """What a weight is multiplied by, float64.

    `covariance`: C_λ (n, n) (CorDA). `diagonal`: diag(C_λ)^½ (n,), each input channel scaled by its root mean square
    (ASVD, arXiv 2312.05821, which takes the mean absolute value instead). `identity`, or no C: None (PiSSA, MiLoRA).
    """
    if C is None or orientation == "identity":
        return None
    if orientation == "diagonal":
        d = C.diagonal().double()
        return (d + damping * d.mean()).sqrt()
    return regularize(C, damping)


def orient(W: Tensor, by: Tensor | None) -> Tensor:
    """The oriented weight, (m, n), float64: W (m, n) times its `metric`."""
    W = W.double()
    if by is None:
        return W
    return W * by if by.ndim == 1 else W @ by


def components(M: Tensor, solver: str = "auto") -> tuple[Tensor, Tensor]:
    """U (m, R) and σ (R,), descending, of M = U Σ Vᵀ, M: (m, n) float64.

    Args:
        solver: `svd`: the reference. `gram`: `eigh` of Gram matrices (see above). `auto`: gram.
    """
    if M.shape[0] > M.shape[1]:
        Q, M = torch.linalg.qr(M)  # tall: the column space, and an (R, R) matrix in it with the same Σ and V
        U, sigma = components(M, solver)
        return Q @ U, sigma
    if solver == "svd":
        U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
        return U, sigma
    return _gram_components(M, noise=torch.finfo(M.dtype).eps * float(torch.linalg.norm(M)))


def _gram_components(M: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """`eigh` of the Gram matrix of M (R, n), R ≤ n; what lies too deep below σ₁ for that, again from its own rows."""
    squares, U = torch.linalg.eigh(M @ M.T)  # ascending; (R,), (R, R)
    sigma, U = squares.clamp(min=0).sqrt().flip(0), U.flip(1)
    resolved = int((sigma >= RESOLVED * sigma[0]).sum())
    if resolved < len(sigma) and sigma[0] > noise:
        tail = U[:, resolved:]  # (R, R'): spans the unresolved components, mixed
        inner, lower = _gram_components(tail.T @ M, noise)
        U[:, resolved:] = tail @ inner
        sigma[resolved:] = lower.clamp(max=sigma[resolved - 1])
    return U, sigma


def singular_values(M: Tensor) -> Tensor:
    """σ (R,) of M (m, n) float64, descending, each to about 1e-8·σ₁: enough for sums over the spectrum."""
    G = M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M
    return torch.linalg.eigvalsh(G).clamp(min=0).sqrt().flip(0)


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

    A component with σ = 0 (a rank-deficient W) has a zero row a_i; it stays zero in A, so it does nothing.
    """
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


def energies(rows: Tensor, C: Tensor) -> Tensor:
    """(r,): a_i C a_iᵀ of each row of (r, n), the mean over the context's tokens of (a_i·x)².

    C: (n, n), not regularized, of the rows' dtype: float64 for a tail, whose energy is far below ‖a_i‖²‖C‖. Summed
    over the rows of W it is the context's output energy, tr(W C Wᵀ); over the components in the adapter, the part of it
    that the adapter holds (U is orthonormal); over the rows of A, the *leak* tr(A C Aᵀ), which is the certificate of
    `anchored`: for any B, on the inputs that the base model gives the layer over the context, the adapter moves its
    outputs by at most s·‖B‖₂·√(tr(A C Aᵀ)), as root mean square over tokens; known before training. (It bounds each
    layer by itself: once earlier layers are tuned, too, the inputs are no longer quite those.)
    """
    return ((rows @ C) * rows).sum(dim=1)
