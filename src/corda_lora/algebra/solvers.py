"""U and Σ of an oriented weight without an SVD, in float64, as pure functions on tensors.

The oriented weight is M = W T = U Σ Vᵀ, with W of shape (m, n) and R = min(m, n). T is the covariance C_λ (n, n), a
diagonal, or the identity. The functions here take `orient`, the map W → W T (see `decomposition.orient`). Of a tall
W = Q Lᵀ only the square Lᵀ is oriented: Lᵀ T has the same Σ and V as W T, and its U is multiplied by Q.

**All components** (`components`). A float64 `eigh` of the Gram matrix G = M Mᵀ = U Σ² Uᵀ, (R, R), is cheaper than an
SVD; on a GPU it is several times cheaper. Squaring costs accuracy: the relative error of σ_i is about
1e-16·(σ₁/σ_i)², and spectra are wide (σ₁/σ_R is above 1e7 in SmolLM2's q_proj). But the error only mixes components
far below σ₁ *among themselves*; the space that they span together stays accurate. So the components well above the
error are kept, M is projected onto the space of the others, and the same is done there, where the largest σ is now
small. Each such step resolves 3 to 4 more decades of the spectrum, until only rounding is left.

**Only the adapter's components** (`chosen_components`). The head of M is the head of H = M Mᵀ, and the tail of M is
the head of (M Mᵀ)⁻¹. Subspace iteration finds either one: somewhat more vectors than are wanted are multiplied by a
polynomial of H that is large on the wanted eigenvalues and small on the others, until the residuals are small. See
`leading_singular_vectors`.

**Device.** The device that runs the model also decomposes, in float64, unless it has no float64 or the processor is
measured to be twice as fast: see `devices.double_device`. `corda plan` tells the time to expect.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..devices import factors_slowly
from .covariance import BLOCKS, add_gram, mirror
from .decomposition import factor, select, times_lower

Orient = Callable[[Tensor], Tensor]

# One eigendecomposition of a Gram matrix resolves components with σ above this share of σ₁, to a relative error of
# about eps / RESOLVED² = 2e-9. Another eigendecomposition resolves the components below.
RESOLVED = 3e-4
# The largest error of a chosen subspace: the root mean square over its vectors of the part that lies outside of it.
TOLERANCE = 1e-6
# Eigenvalues of H larger than this multiple of the k-th are found first and taken out.
TOWERS = 1e6
EPS = torch.finfo(torch.float64).eps


def _identity(W: Tensor) -> Tensor:
    return W


def components(W: Tensor, orient: Orient = _identity, solver: str = "auto") -> tuple[Tensor, Tensor]:
    """All components U (m, R) and σ (R,), descending, in float64, of the oriented weight of W (m, n).

    Args:
        solver: `svd` is a float64 SVD, the reference. Its relative error of B A = U_S U_Sᵀ W is about 1e-16·σ₁/σ_S.
            `gram` and `auto` take `eigh` of Gram matrices. The error of each σ_i is about 3e-14·σ₁, and the relative
            error of B A about 2e-14·σ₁/σ_S.

    Raises ValueError for any other solver.
    """
    if solver not in ("svd", "gram", "auto", "subspace"):
        raise ValueError(f"there is no solver {solver!r}")
    W = W.double()
    if solver == "svd":
        U, sigma, _ = torch.linalg.svd(orient(W), full_matrices=False)
        return U, sigma
    T, back = triangle(W)
    U, sigma = _gram_components(orient(T))
    return back(U), sigma


def triangle(W: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The matrix to orient in place of W (m, n), float64: W itself, or Lᵀ (n, n) of a tall W = Q Lᵀ. The function
    returned beside it maps the U of the oriented matrix to the U of the oriented W."""
    if W.shape[0] <= W.shape[1]:
        return W, _identity
    L = _tall_factor(W)
    if L is None:
        Q, Lt = torch.linalg.qr(W)
        return Lt, lambda U: Q @ U
    return L.T, lambda U: W @ torch.linalg.solve_triangular(L.T, U, upper=True)


def _gram_components(M: Tensor, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """U (R, R) and σ (R,), descending, of M (R, n), R ≤ n, by `eigh` of its Gram matrix. Components too far below σ₁
    are found again from M projected onto their space."""
    G = add_gram(None, M.T) if len(M) > 512 else M @ M.T  # `eigh` reads the lower triangle
    squares, U = eigh(G)  # ascending
    U, sigma = U.flip(1), squares.clamp(min=0).sqrt().flip(0)
    noise = EPS * float(torch.linalg.norm(M)) if noise is None else noise
    resolved = int((sigma >= RESOLVED * sigma[0]).sum())
    if resolved < len(sigma) and sigma[0] > noise:
        tail = U[:, resolved:]  # (R, R'): a basis of the space of the unresolved components
        inner, lower = _gram_components(tail.T @ M, noise)
        U[:, resolved:] = tail @ inner
        sigma[resolved:] = lower.clamp(max=sigma[resolved - 1])
    return U, sigma


def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, repeated on the CPU if cuSOLVER reports that it did not converge (seen once)."""
    try:
        eigenvalues, U = torch.linalg.eigh(G)
    except torch.linalg.LinAlgError:
        eigenvalues, U = (x.to(G.device) for x in torch.linalg.eigh(G.cpu()))
    return eigenvalues, U


def _tall_factor(W: Tensor) -> Tensor | None:
    """The lower triangular L (n, n) of a tall W = Q Lᵀ, or None where W is too badly conditioned.

    L is a Cholesky factor of WᵀW, much cheaper than QR. The columns of Q = W L⁻ᵀ are orthonormal to about
    1e-16·cond(W)².
    """
    L, failed = torch.linalg.cholesky_ex(add_gram(None, W))
    d = L.diagonal()
    return None if failed or d.min() < 1e-4 * d.max() else L


class Seen(NamedTuple):
    """A weight W (m, n) as D (m, m) at its outputs sees it.

    Attributes:
        Z: (k, n), float64, with ZᵀZ = WᵀD_λW: it has the singular values of D_λ^½W, and Z T those of D_λ^½W T. So Z is
            decomposed in its place, and the rows of a component are u_iᵀZ.
        columns: maps U (k, r) of Z T to the columns (m, r) that belong to these rows.
    """

    Z: Tensor
    columns: Callable[[Tensor], Tensor]


def seen_by_outputs(W: Tensor, D: Tensor, damping: float = 0.01, by_gram: bool = True) -> Seen:
    """W (m, n) as D (m, m) sees it, scaled to a mean diagonal of 1.

    Z is the triangle Kᵀ (n, n) of a tall W, with K Kᵀ = WᵀD_λW. Then the columns are W K⁻ᵀU. D, the largest matrix, is
    only multiplied by. Of another W, or where WᵀD_λW is too badly conditioned, Z is LᵀW, with L Lᵀ = D_λ.

    Args:
        by_gram: False: LᵀW in any case.

    Raises torch.linalg.LinAlgError where L is needed, and D_λ is singular to float64.
    """
    m, n = W.shape
    K = _output_triangle(W.double(), D, damping) if by_gram and m > n else None
    if K is not None:
        return Seen(K.T, lambda U: W.double() @ torch.linalg.solve_triangular(K.T, U, upper=True))
    L = factor(D, damping).div_(D.diagonal().double().mean().sqrt())
    return Seen(times_lower(W.double().T, L).T, lambda U: torch.linalg.solve_triangular(L.T, U, upper=True))


def _output_triangle(W: Tensor, D: Tensor, damping: float) -> Tensor | None:
    """The lower triangular K (n, n) with K Kᵀ = WᵀD_λW of a tall W (m, n), float64, and of D (m, m) scaled to a mean
    diagonal of 1; None where it is too badly conditioned, as in `_tall_factor`.

    Of the symmetric D_λ = E + Eᵀ only the triangle E is multiplied by: WᵀD_λW = P + Pᵀ with P = WᵀE W.
    """
    n, mean = W.shape[1], D.diagonal().double().mean()
    P, squares = W.new_zeros(n, n), W.new_zeros(n)
    for low, high in pairwise(len(D) * i // BLOCKS for i in range(BLOCKS + 1)):
        E = D[low:high, :high].to(torch.float64, copy=True).tril_(low)
        E.diagonal(low).add_(damping * mean).mul_(0.5)
        EW = E @ W[:high]  # (high - low, n)
        P.addmm_(W[low:high].T, EW)
        squares += EW.norm(dim=0).square()
        del E, EW  # before the next are made
    # What is rounded are numbers of this size, though they may cancel in the sum.
    size = (2 * squares.sqrt() * W.norm(dim=0) / mean).max().sqrt()
    K, failed = torch.linalg.cholesky_ex((P + P.T).div_(mean))
    return None if failed or not K.diagonal().min() >= 1e-4 * size else K


def singular_values(M: Tensor) -> Tensor:
    """The singular values σ (R,), descending, of M (m, n), float64. The error of each is about 1e-8·σ₁, which is enough
    for sums over the spectrum."""
    G = add_gram(None, M.T if M.shape[0] <= M.shape[1] else M)
    return torch.linalg.eigvalsh(G).clamp(min=0).sqrt().flip(0)


def say_fallback() -> None:
    warnings.warn("subspace iteration did not converge: gram takes over", stacklevel=3)


def chosen_components(
    W: Tensor, orient: Orient, mode: str, r: int, solver: str = "auto", fell_back: Callable[[], None] = say_fallback
) -> tuple[Tensor, Tensor]:
    """The adapter's components U_S (m, r) and σ_S (r,), descending, in float64: the tail (mode `kpm`) or the head (mode
    `ipm`) of the oriented weight of W (m, n).

    Args:
        solver: `subspace` iterates until the estimated error of the subspace, and so of B A = U_S U_Sᵀ W, is below 1e-6
            (root mean square over components). If it does not converge, usually for want of a gap at r, `gram` takes
            over. Where σ₁/σ_S is above about 1e10, float64's rounding, 1e-16·σ₁/σ_S as in `svd`, exceeds the estimate.
            `auto` is `subspace` where r is small enough for it to pay, else `gram`.
            `gram`, `svd`: see `components`.
        fell_back: called when `gram` takes over. Default: a warning. A run over many layers counts them instead, and
            warns once: see `warn_of_fallbacks`.
    """
    R = min(W.shape)
    if iterates(R, r, solver):
        iterated = _subspace(W.double(), orient, mode, r)
        if iterated is not None:
            return iterated
        fell_back()
    U, sigma = components(W, orient, solver)
    chosen = select(mode, R, r)
    return U[:, chosen], sigma[chosen]


def warn_of_fallbacks(layers: Sequence[str]) -> None:
    """Warn once a run. (`warnings.warn` would be shown for the first run of a process alone.)"""
    if layers:
        text = (
            f"subspace iteration did not converge on {len(layers)} layers, such as {layers[0]}: "
            "gram, which is exact and slower, decomposed these"
        )
        warnings.warn_explicit(text, UserWarning, __file__, 0)


def iterates(R: int, r: int, solver: str) -> bool:
    """Whether `chosen_components` iterates to find r of R components."""
    return (solver == "subspace" and r < R) or (solver == "auto" and 6 * r <= R)


def block_width(R: int, k: int) -> int:
    """The number of vectors to iterate on for k of R components: about 2k, within limits. The surplus speeds up
    convergence."""
    return min(R, k + min(max(k, 32), 128))


def _subspace(W: Tensor, orient: Orient, mode: str, r: int) -> tuple[Tensor, Tensor] | None:
    """`chosen_components` by subspace iteration, or None if it does not converge."""
    R = min(W.shape)
    untouched = mode == "ipm" and W.shape[0] > R and factors_slowly(W.device)
    T, back = (W, _identity) if untouched else triangle(W)
    M = orient(T)  # (R, n), or all of (m, n)
    F = _inverse_factor(M) if mode == "kpm" else M if untouched else M.T  # (·, R)
    leading = None if F is None else leading_singular_vectors(F, r)
    if F is None or leading is None:
        return None
    values, X = leading  # (b,), (b, R), b > r
    # Rounding of F mixes the components beside the border, by its size over their distance. (Any method rounds M.)
    apart = (values[r - 1] - values[-1]) / (len(values) - r)
    if not EPS * torch.linalg.norm(F) < TOLERANCE * r**0.5 * apart:
        return None
    values, X = values[:r], X[:r].T
    if mode == "kpm":
        return back(X.flip(1)), 1 / values.flip(0)
    if untouched:  # X holds right singular vectors of M; their errors are removed from U by making it orthonormal
        return orthonormal((F @ X).T, loss=1e-13)[0].T, values
    return back(X), values


def _inverse_factor(M: Tensor) -> Tensor | None:
    """F (R, R) with (M Mᵀ)⁻¹ = FᵀF, of M (R, n), or None if M is too badly conditioned.

    The large singular values of F belong to the tail of M; their relative error is about EPS·cond(M). F⁻¹ is the
    triangular factor of M. On a GPU QR is ten times slower than matrix products, so two Cholesky factors take its
    place: the factor of M Mᵀ, shifted so that it exists, removes most of the conditioning, and the factor of the
    remaining matrix removes the rest (shifted CholeskyQR, Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
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
    """The inverse of a lower triangular L (R, R).

    Blocks on the diagonal are inverted by substitution. Pairs of inverted blocks are then merged by products:

        [A 0; B D]⁻¹ = [A⁻¹ 0; −D⁻¹ B A⁻¹ D⁻¹]

    Substitution in the whole of L would be sequential in blocks of rows, which is slow on a GPU.
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
    """(count, size, size): every `step`-th of the (size, size) blocks of L (R, R) that lie `below` blocks under the
    diagonal."""
    blocks = L.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # (R / size, size, R / size, size)
    return blocks[below::step, :, ::step].diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _lower_product(L: Tensor, X: Tensor) -> Tensor:
    """L X (R, n) of a lower triangular L (R, R) and X (R, n), at little more than half the operations of a product."""
    product = torch.empty_like(X)
    for low, high in pairwise(len(L) * i // BLOCKS for i in range(BLOCKS + 1)):
        torch.mm(L[low:high, :high], X[:high], out=product[low:high])
    return product


def leading_singular_vectors(F: Tensor, k: int, sweeps: int = 40) -> tuple[Tensor, Tensor] | None:
    """The k largest singular values of F (l, R), float64, and their right singular vectors.

    Returns:
        σ (b,) and X (b, R), b > k: the singular values, descending, and the vectors as rows. The last b − k are
        approximations. None if the iteration does not converge in `sweeps` filters.

    Subspace iteration on H = FᵀF with a Chebyshev filter and b − k extra vectors (Zhou and Saad, SIAM J. Matrix Anal.
    Appl. 29, 2007). The polynomial has degree one or two where the spectrum falls fast, and up to 100 where it is flat.
    Between filters the block is only made orthonormal; the divisors of that step tell how far the iteration has come.
    An eigendecomposition of the block (Rayleigh-Ritz) costs a GPU more than ten products with H, so it is made when the
    k vectors are expected to have converged. The iteration stops when the residuals show that the part of the k
    vectors outside of the true space is at most TOLERANCE, root mean square. The residuals are computed from products
    with F and Fᵀ, whose rounding is relative to F, not to its square.
    """
    R = F.shape[1]
    b = block_width(R, k)
    size = float(torch.linalg.norm(F))
    if size == 0:
        return None
    H = mirror(add_gram(None, F))
    X = torch.randn(b, R, generator=torch.Generator(F.device).manual_seed(0), dtype=F.dtype, device=F.device)
    Q, _ = orthonormal(X @ H)
    Q, powers = orthonormal(Q @ H)
    first, kth, last = _at(powers, k)  # approximations to the eigenvalues θ_1, θ_k, θ_b of H
    # The expected error of a random block after two products with H (Halko et al., SIAM Review 53, 2011, thm. 10.5).
    error = math.sqrt(R / (b - k)) * (last / kth) ** 2 if b < R else 0.0
    for _ in range(sweeps):
        if error < TOLERANCE / 2 or not kth > first / TOWERS:
            Q, _ = orthonormal(Q, loss=1e-13)
            QF = Q @ F.T  # (b, l)
            V, sigma = _gram_components(QF, noise=EPS * size)  # (b, b), (b,)
            Q, theta = V.T @ Q, sigma.square()
            # Q has no residual inside its own span: the error lies outside, at eigenvalues up to about θ_b.
            product = V[:, :k].T @ QF @ F  # (k, R): the first k of Q by H
            residual = (product - theta[:k, None] * Q[:k]).norm(dim=1)  # (k,)
            outside = (residual / (theta[:k] - theta[-1])).square().mean().sqrt()
            first, kth, last, error = torch.stack([theta[0], theta[k - 1], theta[-1], outside]).tolist()
            if error < TOLERANCE:
                # The product with H removes what rounding has left of distant vectors, such as that of σ₁ where the
                # tail is wanted. It adds the residual over θ, orthogonal to Q: orthonormality holds to TOLERANCE².
                Q[:k] = product / theta[:k, None]
            if b == R or error < TOLERANCE:
                return sigma, Q
            # Where a few eigenvalues tower above the rest (massive activations), they are taken out of F first.
            high = int((theta > TOWERS * kth).sum())
            if high and float((residual[:high] / theta[:high]).max()) < TOLERANCE:
                top = Q[:high]
                rest = leading_singular_vectors(F - (F @ top.T) @ top, k - high, sweeps)
                return None if rest is None else (torch.cat([sigma[:high], rest[0]]), torch.cat([top, rest[1]]))
        if not (math.isfinite(error) and last > 0):
            return None
        # A polynomial of degree m multiplies the vector of θ by cosh(m·acosh(2θ/θ_b − 1)), and those below θ_b by at
        # most one. m must be large enough for θ_k (with a margin, as the estimate of θ_b is too low), and small enough
        # that the vector of θ_1 does not grow until rounding drowns the k-th.
        slow, fast = (math.acosh(2 * max(value / last, 1) - 1) for value in (kth, first))
        enough = 1.2 * math.log(3 * error / TOLERANCE) / max(slow, 1e-3)
        room = math.log(1e12) / max(fast - slow, 1e-3)
        degree = max(1, min(math.ceil(enough), int(room), 100))
        factors = (H,) if kth > 1e-8 * first else (F.T, F)
        Q, powers = orthonormal(_filter(factors, Q, last, degree))
        grown = _at(powers, k)  # the polynomial's values at θ_1, θ_k, θ_b, which give new estimates of these
        first, kth, last = [last * (1 + math.cosh(math.acosh(max(x, 1)) / degree)) / 2 for x in grown]
        error *= grown[2] / grown[1]
    return None


def _at(values: Tensor, k: int) -> tuple[float, float, float]:
    """The first, the k-th and the last of `values` (b,), each at least the smallest positive number."""
    positive = values.clamp(min=torch.finfo(values.dtype).tiny).tolist()
    return positive[0], positive[k - 1], positive[-1]


def _filter(factors: tuple[Tensor, ...], X: Tensor, below: float, degree: int) -> Tensor:
    """X T_m(2H/below − 1) of X (b, R), with Chebyshev's polynomial T_m of degree m, which is at most 1 for eigenvalues
    of H in [0, below]. H (R, R) is the product of the `factors`."""

    def step(Y: Tensor) -> Tensor:
        for side in factors:
            Y = Y @ side
        return Y

    before, now = X, torch.sub(step(X).mul_(2 / below), X)
    for _ in range(degree - 1):
        after = step(now).mul_(4 / below)
        before, now = now, after.sub_(now, alpha=2).sub_(before)
    return now


def orthonormal(X: Tensor, loss: float = 1e-6) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q (b, R) of the rows of X (b, R), and |diag T| (b,), descending, of the triangular T in
    X = T Q.

    Q is orthonormal to about `loss`. If X = Q' p(H) with an orthonormal Q', |diag T| approximates the largest
    eigenvalues of p(H). Q comes from Cholesky factors of XXᵀ, shifted so that they exist (Fukaya et al., SIAM J. Sci.
    Comput. 42, 2020). One or two factors are usually enough. They are made of products, so on a GPU they are
    much faster than Householder's QR.
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
        if float(d.max() / d.min()) ** 2 * EPS < loss:  # Q loses orthonormality by the square of its condition number
            return Q, sizes.sort(descending=True)[0]
    Q, T = torch.linalg.qr(X.T)
    return Q.T, T.diagonal().abs().sort(descending=True)[0]


def lanczos(
    multiply: Callable[[Tensor], Tensor], n: int, device: torch.device, steps: int = 400, tolerance: float = 1e-6
) -> tuple[float, Tensor]:
    """The largest eigenvalue of a symmetric positive semidefinite matrix (n, n), and its eigenvector (n,).

    Args:
        multiply: the product of the matrix with a vector (n,).
        steps: the most Lanczos steps.
        tolerance: Lanczos, with full reorthogonalization, ends when half as many steps again change the eigenvalue by
            less than this, relative. The eigenvalue is then more accurate than that, because its error falls with the
            square of the eigenvector's.
    """
    steps = min(steps, n)
    checks = [*(c for c in (20, 30, 45, 68, 100, 150, 225, 340) if c < steps), steps]
    Q = torch.zeros(steps + 1, n, dtype=torch.float64, device=device)  # the Krylov basis: a row for each step
    T = torch.zeros(steps, steps, dtype=torch.float64, device=device)  # the lower triangle of the matrix in that basis
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q[0] = (start / start.norm()).to(device)
    value, vector = 0.0, Q[0]
    for j in range(steps):
        w = multiply(Q[j])
        basis, limit = Q[: j + 1], 1e-12 * w.norm()
        torch.mv(basis, w, out=T[j, : j + 1])
        w = torch.addmv(w, basis.T, T[j, : j + 1], alpha=-1)
        w = torch.addmv(w, basis.T, basis @ w, alpha=-1)  # reorthogonalizing twice is enough
        beyond = w.norm()
        # Once the basis is complete, all further rows are zero.
        torch.mul(w, (beyond > limit) / beyond.clamp(min=1e-300), out=Q[j + 1])
        if j + 1 in checks:
            values, vectors = torch.linalg.eigh(T[: j + 1, : j + 1].cpu())
            before, value = value, float(values[-1])
            vector = vectors[:, -1].to(device) @ basis
            if abs(value - before) <= tolerance * abs(value):
                break
    return value, vector
