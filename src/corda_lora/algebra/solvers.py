"""U and Σ of an oriented weight without an SVD: pure tensors, in float64.

M = W T = U Σ Vᵀ, W: (m, n), R = min(m, n), and T the covariance C_λ (n, n), or a diagonal, or nothing: the functions
here are given `times`, W → W T (see `decomposition.orient`). Of a tall W = Q Lᵀ only the square Lᵀ is multiplied: Lᵀ T
has the same Σ and V, and U after Q.

**All components** (`components`). G = M Mᵀ = U Σ² Uᵀ is (R, R), and a float64 `eigh` of it is cheaper than an SVD, on a
GPU several times. Squaring costs accuracy: the relative error of σ_i is about 1e-16·(σ₁/σ_i)², and spectra are wide (on
SmolLM2's q_proj σ₁/σ_R is 1e7 and more). But all that goes wrong is that components far below σ₁ are mixed *among
themselves*: the space they span together is sharp. So the components well above the error are kept, M is projected onto
the space of the others, and the same is done there, where the largest σ is now a small one. Each step gains 3 to 4
decades of the spectrum, until what is left is rounding.

**Only those of the adapter** (`chosen_components`). The head of M is that of H = M Mᵀ, its tail the head of (M Mᵀ)⁻¹.
Either is found by subspace iteration: some more vectors than are wanted are multiplied by a polynomial of H that is
large on the wanted eigenvalues and small on the others, until the residuals are small: `leading_singular_vectors`.

**Where.** In float64, on the device that runs the model. One without float64 (Apple's GPUs) leaves it to the processor,
and so does one with so few float64 units (consumer cards) that the processor is twice as fast, which is measured:
`devices.double_device`. `corda plan` says what to expect.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..devices import factors_slowly
from .covariance import BLOCKS, add_gram, mirror
from .decomposition import select

Times = Callable[[Tensor], Tensor]

# One eigendecomposition of a Gram matrix resolves the components down to this share of the largest σ, to about
# eps / RESOLVED² = 2e-9; below it, another follows.
RESOLVED = 3e-4
# Largest error of a chosen subspace: root mean square, over its vectors, of the part of each that lies outside.
TOLERANCE = 1e-6
# Eigenvalues of H that are so many times the k-th are first found and taken out.
TOWERS = 1e6
EPS = torch.finfo(torch.float64).eps


def _as_it_is(W: Tensor) -> Tensor:
    return W


def components(W: Tensor, times: Times = _as_it_is, solver: str = "auto") -> tuple[Tensor, Tensor]:
    """U (m, R) and σ (R,), descending, float64, of the oriented W (m, n).

    Args:
        solver: `svd`: float64 SVD, the reference: B A = U_S U_Sᵀ W to some 1e-16·σ₁/σ_S, relative.
            `gram`, `auto`: `eigh` of Gram matrices: each σ_i to some 3e-14·σ₁, B A to some 2e-14·σ₁/σ_S.

    Raises ValueError for another solver.
    """
    if solver not in ("svd", "gram", "auto", "subspace"):
        raise ValueError(f"there is no solver {solver!r}")
    W = W.double()
    if solver == "svd":
        U, sigma, _ = torch.linalg.svd(times(W), full_matrices=False)
        return U, sigma
    T, back = triangle(W)
    U, sigma = _gram_components(times(T))
    return back(U), sigma


def triangle(W: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What is oriented in place of W (m, n) float64: itself, or Lᵀ (n, n) of a tall W = Q Lᵀ; and U → U of W."""
    if W.shape[0] <= W.shape[1]:
        return W, _as_it_is
    L = _tall_factor(W)
    if L is None:
        Q, Lt = torch.linalg.qr(W)
        return Lt, lambda U: Q @ U
    return L.T, lambda U: W @ torch.linalg.solve_triangular(L.T, U, upper=True)


def _gram_components(M: Tensor, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """U (R, R) and σ (R,), descending, of M (R, n), R ≤ n, by `eigh` of its Gram matrix; what lies too deep below σ₁,
    again from its own rows."""
    G = add_gram(None, M.T) if len(M) > 512 else M @ M.T  # its lower triangle will do
    squares, U = _eigh(G)  # ascending
    U, sigma = U.flip(1), squares.clamp(min=0).sqrt().flip(0)
    noise = EPS * float(torch.linalg.norm(M)) if noise is None else noise
    resolved = int((sigma >= RESOLVED * sigma[0]).sum())
    if resolved < len(sigma) and sigma[0] > noise:
        tail = U[:, resolved:]  # (R, R'): spans the unresolved components, mixed
        inner, lower = _gram_components(tail.T @ M, noise)
        U[:, resolved:] = tail @ inner
        sigma[resolved:] = lower.clamp(max=sigma[resolved - 1])
    return U, sigma


def _eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`; on the CPU where cuSOLVER says that it did not converge, which was seen once here."""
    try:
        eigenvalues, U = torch.linalg.eigh(G)
    except torch.linalg.LinAlgError:
        eigenvalues, U = (x.to(G.device) for x in torch.linalg.eigh(G.cpu()))
    return eigenvalues, U


def _tall_factor(W: Tensor) -> Tensor | None:
    """L (n, n), lower triangular, of a tall W = Q Lᵀ: Q = W L⁻ᵀ has orthonormal columns to about 1e-16·cond(W)². A
    Cholesky factor of WᵀW, much cheaper than QR; None where W is too badly conditioned for it."""
    L, failed = torch.linalg.cholesky_ex(add_gram(None, W))
    d = L.diagonal()
    return None if failed or d.min() < 1e-4 * d.max() else L


def singular_values(M: Tensor) -> Tensor:
    """σ (R,) of M (m, n) float64, descending, each to about 1e-8·σ₁: enough for sums over the spectrum."""
    G = add_gram(None, M.T if M.shape[0] <= M.shape[1] else M)
    return torch.linalg.eigvalsh(G).clamp(min=0).sqrt().flip(0)


def say_fallback() -> None:
    warnings.warn("subspace iteration did not converge: gram takes over", stacklevel=3)


def chosen_components(
    W: Tensor, times: Times, mode: str, r: int, solver: str = "auto", fell_back: Callable[[], None] = say_fallback
) -> tuple[Tensor, Tensor]:
    """U_S (m, r) and σ_S (r,), descending, float64: tail (`kpm`) or head (`ipm`) of the oriented W (m, n).

    Args:
        solver: `subspace`: iteration, until the estimated error of the subspace, hence of B A = U_S U_Sᵀ W, is below
            1e-6 (root mean square over components), where σ₁/σ_S is below some 1e10: from there on float64's rounding,
            1e-16·σ₁/σ_S as in `svd`, is above what it estimates. Where it does not get there (no gap at r, as a rule),
            `gram` takes over. `auto`: subspace where r is small enough for it to pay, else gram. `gram`, `svd`: see
            `components`.
        fell_back: called where `gram` had to take over; default: a warning. (A run over many layers counts them, and
            warns once: `warn_of_fallbacks`.)
    """
    R = min(W.shape)
    if iterates(R, r, solver):
        found = _subspace(W.double(), times, mode, r)
        if found is not None:
            return found
        fell_back()
    U, sigma = components(W, times, solver)
    chosen = select(mode, R, r)
    return U[:, chosen], sigma[chosen]


def warn_of_fallbacks(layers: Sequence[str]) -> None:
    """One warning a run; each run its own, though Python shows a warning once a place."""
    if layers:
        text = (
            f"subspace iteration did not converge on {len(layers)} layers, such as {layers[0]}: "
            "gram, which is exact and slower, decomposed these"
        )
        warnings.warn_explicit(text, UserWarning, __file__, 0)


def iterates(R: int, r: int, solver: str) -> bool:
    """Whether `chosen_components` takes to iteration for r of R components."""
    return (solver == "subspace" and r < R) or (solver == "auto" and 6 * r <= R)


def block_width(R: int, k: int) -> int:
    """Vectors that are iterated on for k of R: as many again, within limits, for oversampling."""
    return min(R, k + min(max(k, 32), 128))


def _subspace(W: Tensor, times: Times, mode: str, r: int) -> tuple[Tensor, Tensor] | None:
    """`chosen_components` by subspace iteration; None if it does not converge."""
    R = min(W.shape)
    untouched = mode == "ipm" and W.shape[0] > R and factors_slowly(W.device)
    T, back = (W, _as_it_is) if untouched else triangle(W)
    M = times(T)  # (R, n), or all of (m, n)
    F = _inverse_factor(M) if mode == "kpm" else M if untouched else M.T  # (·, R)
    found = None if F is None else leading_singular_vectors(F, r)
    if F is None or found is None:
        return None
    values, X = found  # (b,), (b, R): more than r of them
    # Rounding of F mixes neighbours at the border: its size over their distance. (That of M is anybody's.)
    apart = (values[r - 1] - values[-1]) / (len(values) - r)
    if not EPS * torch.linalg.norm(F) < TOLERANCE * r**0.5 * apart:
        return None
    values, X = values[:r], X[:r].T
    if mode == "kpm":
        return back(X.flip(1)), 1 / values.flip(0)
    if untouched:  # X are right singular vectors of M; what errors of the first put into the others is taken out
        return _orthonormal((F @ X).T, loss=1e-13)[0].T, values
    return back(X), values


def _inverse_factor(M: Tensor) -> Tensor | None:
    """F (R, R) with (M Mᵀ)⁻¹ = FᵀF, of M (R, n); its large singular values, which are the tail of M, to about
    EPS·cond(M). None if M is too badly conditioned.

    F⁻¹ is the triangular factor of M. On a GPU, where QR is ten times slower than matrix products, these and small
    triangles find it: the Cholesky factor of M Mᵀ, shifted so that it exists, takes most of the conditioning away, and
    that of what is left the rest (shifted CholeskyQR, Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
    """
    if not factors_slowly(M.device):
        L = torch.linalg.qr(M.T, mode="r").R.T
        return lower_inverse(L) if L.diagonal().all() else None
    G = add_gram(None, M.T)
    G.diagonal().add_(10 * len(G) * EPS * G.diagonal().max())
    L, failed = torch.linalg.cholesky_ex(G)
    inverse = lower_inverse(L)
    rest = _lower_product(inverse, M)
    L, failed_again = torch.linalg.cholesky_ex(add_gram(None, rest.T))
    return None if failed or failed_again else _lower_product(lower_inverse(L), inverse)


def lower_inverse(L: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular L (R, R): of blocks on its diagonal by substitution, then of pairs of them by products,

        [A 0; B D]⁻¹ = [A⁻¹ 0; −D⁻¹ B A⁻¹ D⁻¹],

    on and on. Substitution in all of L has a GPU wait for one block of rows after the other.
    """
    size = len(L)
    while size % 2 == 0 and size > 256:
        size //= 2
    eye = torch.eye(size, dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(_blocks(L, size, 0, 1), eye, upper=False)  # (R / size, size, size)
    while size < len(L):
        A, D = inverse[0::2], inverse[1::2]
        inverse = L.new_zeros(len(A), 2 * size, 2 * size)
        inverse[:, :size, :size], inverse[:, size:, size:] = A, D
        inverse[:, size:, :size] = -D @ (_blocks(L, size, 1, 2) @ A)
        size *= 2
    return inverse[0]


def _blocks(L: Tensor, size: int, below: int, step: int) -> Tensor:
    """(count, size, size): every so many blocks of L (R, R), so many below the diagonal."""
    blocks = L.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # (R / size, size, R / size, size)
    return blocks[below::step, :, ::step].diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _lower_product(L: Tensor, X: Tensor) -> Tensor:
    """L X (R, n) of a lower triangular L (R, R) and X (R, n), little more than half of it."""
    product = torch.empty_like(X)
    for low, high in pairwise(len(L) * i // BLOCKS for i in range(BLOCKS + 1)):
        torch.mm(L[low:high, :high], X[:high], out=product[low:high])
    return product


def leading_singular_vectors(F: Tensor, k: int, sweeps: int = 40) -> tuple[Tensor, Tensor] | None:
    """σ (b,) and X (b, R), b > k: the k largest singular values of F (l, R) float64 with their right singular vectors
    as rows, and approximations to the b − k after them. None if they did not converge.

    Subspace iteration on H = FᵀF with a Chebyshev filter and b − k vectors of oversampling (Zhou and Saad, SIAM J.
    Matrix Anal. Appl. 29, 2007): of a spectrum that falls fast the polynomial has degree one or two, of a flat one up
    to 100. Between filters the block is only made orthonormal. What that divides by says how far the iteration has
    come; an eigendecomposition of the block (Rayleigh-Ritz), which costs a GPU more than ten products with H, is made
    when the k vectors should be there. It stops when the residuals say that the part of the k vectors outside of the
    true space is TOLERANCE, root mean square. These come from products with F and Fᵀ, whose rounding is that of F, not
    of its squares.
    """
    R = F.shape[1]
    b = block_width(R, k)
    size = float(torch.linalg.norm(F))
    if size == 0:
        return None
    H = mirror(add_gram(None, F))
    X = torch.randn(b, R, generator=torch.Generator(F.device).manual_seed(0), dtype=F.dtype, device=F.device)
    Q, _ = _orthonormal(X @ H)
    Q, powers = _orthonormal(Q @ H)
    first, kth, last = _at(powers, k)  # approximations to θ_1, θ_k, θ_b, as H has been applied once
    # What to expect after two products with H, of a random block (Halko et al., SIAM Review 53, 2011, theorem 10.5).
    error = math.sqrt(R / (b - k)) * (last / kth) ** 2 if b < R else 0.0
    for _ in range(sweeps):
        if error < TOLERANCE / 2 or not kth > first / TOWERS:
            Q, _ = _orthonormal(Q, loss=1e-13)
            QF = Q @ F.T  # (b, l)
            V, sigma = _gram_components(QF, noise=EPS * size)  # (b, b), (b,)
            Q, theta = V.T @ Q, sigma.square()
            # Q has no residual inside its own span: what is mixed in lies outside, with eigenvalues up to about θ_b.
            product = V[:, :k].T @ QF @ F  # (k, R): the first k of Q by H
            residual = (product - theta[:k, None] * Q[:k]).norm(dim=1)  # (k,)
            outside = (residual / (theta[:k] - theta[-1])).square().mean().sqrt()
            first, kth, last, error = torch.stack([theta[0], theta[k - 1], theta[-1], outside]).tolist()
            if error < TOLERANCE:
                # That product takes out what rounding had left of vectors far away: of σ₁, where the tail is wanted.
                # What it adds is the residual over θ, orthogonal to Q, so that they are orthonormal to TOLERANCE².
                Q[:k] = product / theta[:k, None]
            if b == R or error < TOLERANCE:
                return sigma, Q
            # Where a few tower above the rest (massive activations), the rest is found with them taken out of F.
            high = int((theta > TOWERS * kth).sum())
            if high and float((residual[:high] / theta[:high]).max()) < TOLERANCE:
                top = Q[:high]
                rest = leading_singular_vectors(F - (F @ top.T) @ top, k - high, sweeps)
                return None if rest is None else (torch.cat([sigma[:high], rest[0]]), torch.cat([top, rest[1]]))
        if not (math.isfinite(error) and last > 0):
            return None
        # cosh(m·growth(θ)) is what degree m does to θ, while all below θ_b stays below one. It must do enough to θ_k
        # (more than that: θ_b is still too low), and not so much more to θ_1 that rounding drowns the k-th vector.
        slow, fast = (math.acosh(2 * max(value / last, 1) - 1) for value in (kth, first))
        enough = 1.2 * math.log(3 * error / TOLERANCE) / max(slow, 1e-3)
        room = math.log(1e12) / max(fast - slow, 1e-3)
        degree = max(1, min(math.ceil(enough), int(room), 100))
        factors = (H,) if kth > 1e-8 * first else (F.T, F)
        Q, powers = _orthonormal(_filter(factors, Q, last, degree))
        grown = _at(powers, k)  # what the polynomial did to θ_1, θ_k, θ_b; so, what these are
        first, kth, last = [last * (1 + math.cosh(math.acosh(max(x, 1)) / degree)) / 2 for x in grown]
        error *= grown[2] / grown[1]
    return None


def _at(values: Tensor, k: int) -> tuple[float, float, float]:
    """The first, the k-th and the last of (b,), above zero."""
    found = values.clamp(min=torch.finfo(values.dtype).tiny).tolist()
    return found[0], found[k - 1], found[-1]


def _filter(factors: tuple[Tensor, ...], X: Tensor, below: float, degree: int) -> Tensor:
    """X T_m(2H/below − 1) of degree m: Chebyshev's polynomial, at most 1 where the eigenvalues of H are in 0 … below. H
    is the product of the factors."""

    def step(Y: Tensor) -> Tensor:
        for factor in factors:
            Y = Y @ factor
        return Y

    before, now = X, torch.sub(step(X).mul_(2 / below), X)
    for _ in range(degree - 1):
        after = step(now).mul_(4 / below)
        before, now = now, after.sub_(now, alpha=2).sub_(before)
    return now


def _orthonormal(X: Tensor, loss: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Q (b, R), a basis of the rows of X (b, R), orthonormal to about `loss`; and |diag T| (b,) of X = T Q, T
    triangular, descending: of X = Q' p(H) with Q' orthonormal, approximations to the largest eigenvalues of p(H).

    Cholesky factors of XXᵀ, shifted so that they exist (Fukaya et al., SIAM J. Sci. Comput. 42, 2020), as often as it
    takes: mostly once or twice. That is products, which a GPU has done before Householder's QR has well begun.
    """
    sizes = X.norm(dim=1)
    Q = X / sizes[:, None]
    for _ in range(4):
        G = Q @ Q.T
        G.diagonal().add_(10 * len(G) * EPS)
        L, _ = torch.linalg.cholesky_ex(G)
        Q = torch.linalg.solve_triangular(L, Q, upper=False)
        d = L.diagonal()
        sizes = sizes * d
        if float(d.max() / d.min()) ** 2 * EPS < loss:  # what Q lost is the square of its condition number
            return Q, sizes.sort(descending=True)[0]
    Q, T = torch.linalg.qr(X.T)
    return Q.T, T.diagonal().abs().sort(descending=True)[0]
