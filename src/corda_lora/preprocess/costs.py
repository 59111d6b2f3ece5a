"""What the decomposition of a layer, and what goes with it, costs: floating-point operations by kind, and the float64
numbers that are held at once. Counted as the code of each runs and allocates them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..algebra.compactness import DENSE
from ..algebra.covariance import BLOCKS
from ..algebra.decomposition import COLUMNS
from ..algebra.solvers import block_width, iterates
from ..config import CordaConfig
from ..models.weights import BLOCK
from .layer import keeps_all
from .machine import Machine
from .statistics import DIRECTIONS

LANCZOS = 200  # products with a vector until both extreme eigenvalues of a large matrix are found
# FLOP of decompositions of an (n, n) matrix, divided by n³.
EIGH = 9  # symmetric, with eigenvectors
EIGVALSH = 4  # symmetric, without eigenvectors
GRAM = 15  # both that `gram` takes: the second is of the part that the first did not resolve
SVD = 54  # in terms of its time
STEPS = 12  # iterations of `norms`
EVENING = 5  # eigendecompositions of `even_weights` that are assumed; it makes 24 at most
TRIANGLE = (1 + 1 / BLOCKS) / 2  # of a product's operations, where one factor is triangular


class Layer(NamedTuple):
    """A target layer with weight W (m, n). `leader` is the layer whose input it shares, or itself; None if the layer is
    never run."""

    name: str
    m: int
    n: int
    leader: str | None


def groups_of(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """The layers that share their input, by the first of them."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.leader or layer.name, []).append(layer)
    return groups


def group_seconds(
    members: Sequence[Layer], config: CordaConfig, on_cpu: bool, machine: Machine, abilities: int = 1
) -> float:
    """Seconds that layers which share their input take, from their covariances, of so many abilities, to what is kept
    of them."""
    seen = members[0].leader is not None
    costs = [decomposing(layer, min(config.r, layer.m, layer.n), seen, config, on_cpu)[0] for layer in members]
    if config.quantization:
        costs += [quantizing(layer, seen, config)[0] for layer in members]
    if config.keep:
        costs.append(compacting(members)[0])
    if seen and ((config.rounds or 1) > 1 or config.allocates):
        costs.append(selecting(members, config, on_cpu)[0])
    if seen and abilities > 1:
        costs.append(mixing(members, abilities, config)[0])
    return sum(flop / rate_of(machine, kind) for cost in costs for kind, flop in cost.items())


def rate_of(machine: Machine, kind: str) -> float:
    """FLOP/s of a kind of work. QR and Cholesky (`factor`) reach a fifth of the rate of products. Products with a
    vector (`vector`) are as fast as memory is read."""
    rates = {"eigen": EIGH / machine.eigen, "factor": machine.double / 5, "vector": machine.double / 32}
    return rates[kind] if kind in rates else float(getattr(machine, kind))


def mixing(layers: Sequence[Layer], abilities: int, config: CordaConfig) -> tuple[dict[str, int], int]:
    """FLOP of mixing C of several abilities, and D, into one, for layers that share their input; and the float64
    numbers that are held at once, beside C and D of each ability."""
    n, work = layers[0].n, Counter[str]()
    numbers = max(n * n, *(layer.m**2 * config.runs_back for layer in layers)) // 2  # the mixture, in float32
    if config.weights == "compactness":  # `even_weights`
        work["eigen"] = EVENING * EIGH * n**3
        work["double"] = EVENING * abilities * 2 * n * n * min(config.r, n - 1)
        # Each C; their mixture and its eigenvectors, two more of its size for `eigh`, and the eigenvectors of before.
        numbers = max(numbers, (abilities + 5) * n * n)
    return work, numbers


def selecting(layers: Sequence[Layer], config: CordaConfig, on_cpu: bool) -> tuple[dict[str, int], int]:
    """FLOP of `extremes_of` and `choose_covariance` for layers that share their input, and the float64 numbers that are
    held at once."""
    rounds, n, work, numbers = config.rounds or 1, layers[0].n, Counter[str](), 0
    two_sided = config.orientation == "two_sided"
    square = n * n if two_sided or config.orientation == "covariance" else 0  # numbers of C
    if square:
        numbers = 2 * square  # C_λ and C
        if n <= DENSE:
            work["eigen"] += rounds * EIGVALSH * n**3
        else:
            work.update(factor=rounds * n**3, vector=rounds * LANCZOS * 2 * square)
            numbers = 5 * square + 400 * n  # the Cholesky factor, its inverse and parts of it; the Krylov basis
    for _, m, n, _ in layers if rounds > 1 else ():
        R, tall = min(m, n), m > n and not two_sided  # two-sided, a tall weight is a triangle already
        orienting = TRIANGLE if two_sided else 1
        work.update(double=2 * tall * m * n * n + rounds * int(2 * R * square * orienting + 2 * R * R * n))
        work.update(factor=rounds * two_sided * n**3 // 3)
        numbers = max(numbers, tall * (m * n + 2 * n * n), _oriented(R, n, str(config.orientation)))
        # The triangle (R, n) is kept for all rounds. Beside it are M and the memory of `eigvalsh` or `norms`.
        if on_cpu:
            work.update(eigen=rounds * EIGVALSH * R**3)
            numbers = max(numbers, 2 * R * n + 3 * R * R)
        else:
            # `norms`: products in TF32, at half the rate of bfloat16, the last in float64; σ₁ by Lanczos.
            work.update(multiply=rounds * STEPS * 4 * R * R * (3 * n + R), double=rounds * 4 * R * R * n)
            work.update(vector=rounds * LANCZOS * 2 * R * n)
            numbers = max(numbers, 6 * R * n + R * R, 5 * R * n + 3 * R * R)
    # Two-sided, what the layer before was oriented by is held, and W beside what is seen of it.
    return work, numbers + two_sided * (rounds > 1) * (n * n + max(min(m, n) * n for _, m, n, _ in layers))


def _oriented(m: int, n: int, orientation: str) -> int:
    """Float64 numbers that `orient` holds at once: W and W C, and some columns of C and of their product; or W and W T,
    and T with its C_λ."""
    beside = {"covariance": (m + n) * min(n, COLUMNS), "two_sided": 2 * n * n}
    return 2 * m * n + beside.get(orientation, 0)


def decomposing(layer: Layer, k: int, seen: bool, config: CordaConfig, on_cpu: bool) -> tuple[dict[str, int], int]:
    """FLOP of `seen_from`, `decompose_layer` and `keep_components`, and the float64 numbers that are held at once.

    Args:
        k: components to keep.
        seen: whether the layer has a covariance.
    """
    name, m, n, leader = layer
    two_sided = seen and config.orientation == "two_sided"
    if two_sided:
        seeing, making, beside_Z = _seeing(m, n, config)
        m = min(m, n) if config.solver != "svd" else m  # Z is decomposed in place of W
    R, W, rows = min(m, n), m * n, k * n
    by_covariance = seen and config.orientation == "covariance"
    iterated = not keeps_all(config) and iterates(R, k, config.solver)
    # A tall W = Q Lᵀ is reduced to its triangle L, which is oriented instead (not for svd, nor for the head on a GPU).
    # Then W and L are held beside the oriented M, else W alone.
    tall = m > n and config.solver != "svd" and (on_cpu or config.mode == "kpm" or not iterated)
    M, beside = (n * n, W + n * n) if tall else (W, W)
    work = Counter(double=2 * M * n * by_covariance + 2 * tall * W * n + 2 * k * (W + n * n * seen))
    work.update(single=2 * W * n * seen)
    numbers = _oriented(R if tall else m, n, "covariance" if by_covariance else "") + beside - M
    if two_sided:  # T of the first layer serves all that share its input, where all have the same covariance
        work.update(seeing)
        work.update(double=int(2 * M * n * TRIANGLE))
        work.update(factor=n**3 // 3 * (leader == name or (config.rounds or 1) > 1))
    if config.solver == "svd":
        work["eigen"] += SVD * R**3
        numbers = max(numbers, 4 * W + 2 * R * R)
    elif not iterated:  # two Gram matrices and the rows not resolved; U, and three more of its size for `eigh`
        work.update(eigen=GRAM * R**3, double=5 * R * M + 2 * tall * W * n)
        numbers = max(numbers, beside + 2 * M + 4 * R * R, tall * (2 * W + 2 * n * n))
    else:  # kpm: the tensors of `_inverse_factor`; ipm: those of the iteration, H and some blocks of b vectors
        b = block_width(R, k)
        products = 3 * R * M + 2 * R**3 if config.mode == "kpm" else 0
        work.update(double=2 * (products + R * M + 30 * R * R * b), eigen=4 * GRAM * b**3)
        inverse, iteration = M + (2 if on_cpu else 5) * R * R, R * R + 4 * b * (R + M // R)
        numbers = max(numbers, beside + M + (inverse if config.mode == "kpm" else iteration))
    # U is held beside W in another dtype and its products, or beside C.
    numbers = max(numbers, m * R + max(W + rows, (n * n + 3 * rows) * seen, (3 * W // 2 + rows) * seen))
    if two_sided:  # T throughout, which is made beside Z and C_λ
        numbers = max(making, beside_Z + n * n + max(numbers, W + n * n))
    return work, numbers


def _seeing(m: int, n: int, config: CordaConfig) -> tuple[dict[str, int], int, int]:
    """FLOP of `seen_by_outputs`; the float64 numbers that are held at once, and those that stay beside Z."""
    W = m * n
    if m > n and config.solver != "svd":  # a part of D's triangle and its product with W, both with WᵀD_λW; its factor
        work = {"double": int(2 * m * W * TRIANGLE) + 2 * n * W, "factor": n**3 // 3}
        return work, W + max(n * n + (m + n) * m // BLOCKS, 3 * n * n), 0
    return {"double": int(2 * m * W * TRIANGLE), "factor": m**3 // 3}, max(2 * m * m, m * m + 2 * W), m * m


def quantizing(layer: Layer, seen: bool, config: CordaConfig) -> tuple[dict[str, int], int]:
    """FLOP of `quantize_layer`, and the float64 numbers that are held at once."""
    _, m, n, _ = layer
    R, W, fold = min(m, n), m * n, config.fold or 0
    two_sided = seen and config.orientation == "two_sided"
    metric = 2 * W * (n * seen + m * two_sided)  # X C, or D X C, of X (m, n)
    rounding = m * n * n + 4 * config.r * n * n  # by columns; the metric that A leaves
    work = {"double": (2 * fold + 2) * metric + fold * (2 * W * (R + 2 * config.r) + rounding)}
    work |= {"eigen": fold * EIGH * R**3, "factor": fold * n**3 // 3}
    metrics = n * n * seen + m * m * two_sided  # C_λ and D_λ
    numbers = 17 * W // 4  # W, what is stored of it, and its values
    if fold:
        fit = numbers + (7 + 4 * two_sided) * W // 4 + (1 + two_sided) * R * R
        # The metric and its Cholesky factor, in whose making it is copied; then W in float64, and the errors.
        numbers = max(fit, 3 * n * n + 13 * W // 8, 2 * n * n + 15 * W // 4)
    return work, metrics + numbers


def stored_bytes(layer: Layer, config: CordaConfig) -> int:
    """Bytes of a layer in NF4: its numbers, their scales and the tables of levels."""
    blocks = layer.m * layer.n // BLOCK
    scales = blocks + blocks // 64 + 1024 if config.double_quantization else 4 * blocks
    return layer.m * layer.n // 2 + scales + 64


def small(n: int) -> int:
    """Numbers of a C or D (n, n) as it is kept."""
    return n * (min(n, DIRECTIONS) + 1)


def compacting(members: Sequence[Layer]) -> tuple[dict[str, int], int]:
    """FLOP of `compact` for C and D of layers that share their input, and the float64 numbers that are held at once."""
    sizes = [members[0].n, *(layer.m for layer in members)]
    large = [n for n in sizes if n > DIRECTIONS]
    work = {
        "single": sum(6 * 2 * n * n * (DIRECTIONS + 8) for n in large),
        "eigen": sum(EIGH * n**3 for n in sizes if n <= DIRECTIONS),
    }
    return work, max(n * n for n in sizes)  # float32: the matrix, and a copy
