"""One layer, from its weight and its covariances to the start of its adapter.

`decompose_layer` and `keep_components` come first, and their result waits on disk. A fixed rank lets them make the
adapter's factors at once. A rank that is to be allocated is known only when every layer has been seen: until then they
keep all components that could be chosen, and `start_layer` makes the factors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.compactness import extreme_eigenvalues, log_compactness, selection_score
from ..algebra.covariance import float32_products
from ..algebra.decomposition import energies, factor, orient, regularize, select, split_components
from ..algebra.folding import best_fit, fold, metric_norm
from ..algebra.norms import norms
from ..algebra.solvers import (
    Seen,
    chosen_components,
    components,
    say_fallback,
    seen_by_outputs,
    singular_values,
    triangle,
)
from ..config import CordaConfig, CordaError
from ..devices import factors_slowly
from ..models.weights import Quantized, values_of
from .statistics import Sides


class Choice(NamedTuple):
    """Which round's covariance orients a layer (CorDA++, Alg. 1).

    Attributes:
        round: its number; None if there was nothing to choose from.
        scores: Eq. 8 for every round.
        log_pi: logarithm of the compactness (Eq. 6) of the chosen covariance; None if nobody needs it.
    """

    round: int | None = None
    scores: list[float] | None = None
    log_pi: float | None = None


@dataclass(frozen=True)
class LayerRecord:
    """What corda.json says of a layer. None stands for what does not apply, and is left out there.

    Attributes:
        r: rank.
        shape: (d_out, d_in).
        round, scores, log_pi: see `Choice`.
        input_energy: tr(C) / d_in, what a random direction sees of the inputs.
        output_energy: tr(W C Wᵀ); two-sided, tr(Z C Zᵀ), see `seen_from`.
        sigma_first, sigma_last: largest and smallest singular value of the adapter's components.
        norm_A, norm_B: Frobenius norms of the factors.
        energy_share: share of the output energy in the adapter's components, if it holds components.
        leak: tr(A C Aᵀ).
        error: ‖W − Q − s·BA‖ / ‖W‖, where Q are the values that the quantized weight stands for.
        context_error: the same in the metric of the context (see `folding.metric_norm`), which is two-sided where the
            context also runs backward.
        digest: of the weight, see `layer_digest`. It is not in corda.json, which has the fingerprint of all layers.
        input: the layer that was given the same input first, itself included. It is not in corda.json either.
        weights: α of the abilities of the context, in its order, where there are several (see `algebra.mixture`).
    """

    r: int | None = None
    shape: list[int] | None = None
    round: int | None = None
    scores: list[float] | None = None
    log_pi: float | None = None
    input_energy: float | None = None
    output_energy: float | None = None
    sigma_first: float | None = None
    sigma_last: float | None = None
    norm_A: float | None = None
    norm_B: float | None = None
    energy_share: float | None = None
    leak: float | None = None
    error: float | None = None
    context_error: float | None = None
    digest: str | None = None
    input: str | None = None
    weights: list[float] | None = None

    def as_json(self) -> dict[str, Any]:
        record = {key: value for key, value in asdict(self).items() if key not in ("digest", "input")}
        return {key: value for key, value in record.items() if value is not None}


@dataclass
class Decomposed:
    """A layer that waits for the end, on the CPU: the factors of its adapter, or the k components that could still be
    chosen for it, out of R = min(d_out, d_in), in the order of σ: the tail in kpm, the head in ipm.

    Attributes:
        sigma: singular values of the oriented weight, descending, float64: all, (R,), or with a fixed rank those of the
            adapter, (r,).
        record: what is known of the layer by now.
        A, B: see `LayerStart`. None where the rank is to be allocated; B is also None where it starts from zero.
        rows: where the rank is to be allocated, a_i = u_iᵀW, (k, d_in) float32; two-sided, u_iᵀZ, see `solvers.Seen`.
        U: (d_out, k) float32; two-sided, the columns that belong to the rows. None where B starts from zero.
        energy: of each row on the context (see `energies`), (k,) float64; None without a covariance.
        sides: C and D in small, from which drift is predicted; None if nobody asks for it.
        stored: the quantized weight, if it was quantized with the decomposition.
    """

    sigma: Tensor
    record: LayerRecord
    A: Tensor | None = None
    B: Tensor | None = None
    rows: Tensor | None = None
    U: Tensor | None = None
    energy: Tensor | None = None
    sides: Sides | None = None
    stored: Quantized | None = None


@dataclass
class LayerStart:
    """The start of one layer's adapter.

    Attributes:
        A: (r, d_in) float32 on the CPU.
        B: (d_out, r) float32 on the CPU.
        spectrum: singular values of the oriented weight, descending, float64 on the CPU: all, (R,), or those of the
            adapter, (r,), where no more were computed.
        record: see `LayerRecord`.
    """

    A: Tensor
    B: Tensor
    spectrum: Tensor
    record: LayerRecord = field(default_factory=LayerRecord)


SINGULAR = "a covariance is singular to float64"


@contextmanager
def _said_if_singular(what: str) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise CordaError(f"{what}: raise --damping") from error


def _oriented(W: Tensor, C: Tensor | None, config: CordaConfig, T: Tensor | None = None) -> Tensor:
    assert config.orientation is not None
    return orient(W, C, config.orientation, config.damping, T)


def extremes_of(covariances: Sequence[Tensor], config: CordaConfig, device: torch.device) -> list[tuple[float, float]]:
    """Smallest and largest eigenvalue of the matrix that each round orients by: C (n, n), regularized, its root, or the
    root of its diagonal. Computed on `device`.

    Raises CordaError if a regularized C is singular.
    """
    extremes = []
    for C in covariances:
        C = C.to(device)
        if config.orientation in ("covariance", "two_sided"):
            with _said_if_singular("a covariance is singular to float64, so that its compactness is not defined"):
                lowest, highest = extreme_eigenvalues(regularize(C, config.damping))
            power = 0.5 if config.orientation == "two_sided" else 1
            extremes.append((lowest**power, highest**power))
        else:
            d = _oriented(C.new_ones(1, len(C)), C, config)
            extremes.append((float(d.min()), float(d.max())))
    return extremes


def choose_covariance(
    W: Tensor,
    covariances: Sequence[Tensor],
    extremes: Sequence[tuple[float, float]],
    config: CordaConfig,
    seen: Seen | None = None,
) -> Choice:
    """Dynamic covariance selection (CorDA++, Alg. 1): which round's C (n, n) orients W (m, n).

    Args:
        extremes: eigenvalues of the covariances, see `extremes_of`.
        seen: see `seen_from`.
    """
    log_pis = [log_compactness(W.shape[0], *pair) for pair in extremes]
    if len(covariances) == 1:
        return Choice(log_pi=log_pis[0])
    T = triangle(seen.Z if seen else W.double())[0]
    scores = []
    for C, log_pi in zip(covariances, log_pis):
        M = _oriented(T, C.to(W.device), config)
        scores.append(selection_score(log_pi, *(norms(M) if factors_slowly(M.device) else _norms_by_spectrum(M))))
        del M
    best = scores.index(min(scores))  # the first of equals
    return Choice(best, scores, log_pis[best])


def _norms_by_spectrum(M: Tensor) -> tuple[float, float]:
    """`norms`, at less cost on a CPU."""
    sigma = singular_values(M)
    return float(sigma.sum()), float(sigma[0])


def keeps_all(config: CordaConfig) -> bool:
    """Whether all components are computed: ranks are to be allocated, or the solver computes no fewer."""
    return config.allocates or config.solver in ("gram", "svd")


def decompose_layer(
    W: Tensor,
    C: Tensor | None,
    config: CordaConfig,
    fell_back: Callable[[], None] = say_fallback,
    T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """U and σ, float64, of a weight W (m, n) oriented by C (n, n), or not oriented where C is None. All components,
    (m, R) and (R,), or those of the adapter, (m, r) and (r,).

    Args:
        fell_back: see `chosen_components`.
        T: of `input_factors`, where it is known.

    Raises CordaError if the decomposition is two-sided and C_λ is singular.
    """

    def oriented(W: Tensor) -> Tensor:
        with _said_if_singular(SINGULAR):
            return _oriented(W, C, config, T)

    if keeps_all(config):
        return components(W, oriented, config.solver)
    return chosen_components(W, oriented, config.mode, config.r, config.solver, fell_back)


def input_factors(
    covariances: Sequence[Tensor], config: CordaConfig, device: torch.device
) -> Callable[[int], Tensor | None]:
    """Gives T (n, n) on `device`, with T Tᵀ = C_λ of the covariance (n, n) of a round. None where none is needed.

    The T asked for last is kept: layers that share their input share it, too.

    Raises CordaError if C_λ is singular.
    """

    @lru_cache(maxsize=1)
    def of(round: int) -> Tensor | None:
        if config.orientation != "two_sided" or not covariances:
            return None
        with _said_if_singular(SINGULAR):
            return factor(covariances[round].to(device), config.damping)

    return of


def seen_from(W: Tensor, D: Tensor | None, config: CordaConfig) -> Seen | None:
    """W (m, n) as D (m, m) at its outputs sees it. None where the outputs are not looked at, or no answer hangs on
    them.

    Raises CordaError if D_λ is singular.
    """
    if config.orientation != "two_sided" or D is None or float(D.diagonal().sum()) == 0:
        return None
    with _said_if_singular("a covariance of gradients is singular to float64"):
        return seen_by_outputs(W, D, config.damping, by_gram=config.solver != "svd")


def keep_components(
    W: Tensor,
    C: Tensor | None,
    U: Tensor,
    sigma: Tensor,
    k: int,
    config: CordaConfig,
    record: LayerRecord,
    seen: Seen | None = None,
) -> Decomposed:
    """What to keep of a decomposition: the factors of the adapter where its rank k is fixed; else the components, of
    which at most k will be chosen.

    Args:
        record: to be completed.
        seen: see `seen_from`; then U and σ are of `seen.Z`.
    """
    chosen = select(config.mode, len(sigma), k)
    U, record = U[:, chosen], replace(record, shape=list(W.shape))
    W = seen.Z if seen else W
    rows = U.T @ W.double()  # (k, n)
    energy = None
    if C is not None:
        energy = energies(rows, C)
        record = replace(record, input_energy=float(C.diagonal().mean()), output_energy=_output_energy(W, C))
    columns = None if config.from_zero else (seen.columns(U) if seen else U)
    if config.allocates:
        return Decomposed(
            sigma.cpu(),
            record,
            rows=rows.float().cpu(),
            U=None if columns is None else columns.float().cpu(),
            energy=None if energy is None else energy.cpu(),
        )
    A, B, record = _split(rows, columns, sigma[chosen], energy, config, record)
    return Decomposed(sigma.cpu(), record, A.float().cpu(), None if B is None else B.float().cpu())


def _output_energy(W: Tensor, C: Tensor) -> float:
    """tr(W C Wᵀ). A sum of so many numbers that TF32 gives it to 1e-6."""
    with float32_products("high"):
        return float(((W.to(C.dtype) @ C) * W).sum())


def start_layer(layer: Decomposed, r: int, config: CordaConfig) -> LayerStart:
    """The factors A and B of a layer: those that it has, or split from r of the kept components. No tensor is a view of
    a file that the layer was read from."""
    A, B, record = layer.A, layer.B, layer.record
    if A is None:
        assert layer.rows is not None
        chosen, sigma = select(config.mode, len(layer.rows), r), layer.sigma[select(config.mode, len(layer.sigma), r)]
        U = None if layer.U is None else layer.U[:, chosen].double()
        energy = None if layer.energy is None else layer.energy[chosen]
        A, B, record = _split(layer.rows[chosen].double(), U, sigma, energy, config, record)
    assert record.shape is not None
    B = torch.zeros(record.shape[0], r) if B is None else B.to(torch.float32, copy=True)
    return LayerStart(A.to(torch.float32, copy=True), B, layer.sigma.clone(), record)


def _split(
    rows: Tensor, U: Tensor | None, sigma: Tensor, energy: Tensor | None, config: CordaConfig, record: LayerRecord
) -> tuple[Tensor, Tensor | None, LayerRecord]:
    """A (r, n) and B (m, r) of the components of an adapter, which are float64, and the completed record.

    Args:
        U: None where B starts from zero, as the result then is.
    """
    assert config.split is not None
    # Where B starts from zero, any U will do: this one takes no memory.
    B, A = split_components(rows.new_zeros(1, len(rows)) if U is None else U, sigma, rows, config.split, config.scale)
    if energy is not None:
        stretch = (A.norm(dim=1) / rows.norm(dim=1).clamp(min=1e-300)) ** 2  # A_i is a_i, longer or shorter
        share = float(energy.sum()) / record.output_energy if record.output_energy else 0.0
        record = replace(record, energy_share=share, leak=float((stretch * energy).sum()))
    record = replace(
        record,
        r=len(rows),
        sigma_first=float(sigma[0]),
        sigma_last=float(sigma[-1]),
        norm_A=float(A.norm()),
        norm_B=float(B.norm()),
    )
    return A, None if U is None else B, record


def quantize_layer(
    W: Tensor,
    layer: Decomposed,
    r: int,
    config: CordaConfig,
    store: Callable[[Tensor, Tensor | None], tuple[Quantized, Tensor]],
    C: Tensor | None = None,
    D: Tensor | None = None,
    values: Tensor | None = None,
) -> Decomposed:
    """A decomposed layer with its weight quantized: W (m, n) itself where B starts from zero, else W − s·B A. With
    `config.fold`, B A are fitted to what that lost.

    Args:
        r: the rank.
        store: quantizes a float32 matrix, to the nearest levels or by a metric (n, n) (see `weights.quantize`): what is
            stored, and its values in float32.
        C, D: the metric of the fit and of the record's errors. Default: the identity.
        values: Q (m, n) of a weight that is quantized already, which then stays as it is.

    Raises CordaError if the metric is singular.
    """
    start, s = start_layer(layer, r, config), config.scale
    W, A, B, stored = W.float(), start.A.to(W.device), start.B.to(W.device), None
    with _said_if_singular(SINGULAR):
        if config.fold and values is None:
            stored, A, B = fold(W, store, A, s * B, C, D, config.fold, config.damping)
            values = values_of(stored).to(W.device)
        elif values is None:
            stored, values = store(W - s * (B @ A), None)
        elif config.fold:
            A, B = best_fit(W - values, r, C, D, config.damping)
        if config.fold:  # the factors are no components of W any more
            A, B = (A / s**0.5).float(), (B / s**0.5).float()
            record = replace(
                layer.record,
                energy_share=None,
                leak=None if C is None else float(energies(A.double(), C).sum()),
                norm_A=float(A.double().norm()),
                norm_B=float(B.double().norm()),
            )
            layer = replace(layer, A=A.cpu(), B=B.cpu(), record=record)
        lost = W - values - s * (B @ A)
        record = replace(
            layer.record,
            error=float(lost.norm() / W.norm().clamp(min=1e-30)),
            context_error=metric_norm(lost, C, D, config.damping) / (metric_norm(W, C, D, config.damping) or 1.0),
        )
    stored = stored and {name: tensor.cpu() for name, tensor in stored.items()}
    return replace(layer, record=record, stored=stored)
