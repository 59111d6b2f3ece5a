"""One layer, from its weight and its covariances to the adapter's start. Ranks may be known only when every layer has
been seen, so the way has two halves: `decompose_layer`, whose result waits on disk, and `start_layer`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algebra.compactness import extreme_eigenvalues, log_compactness, selection_score
from ..algebra.covariance import float32_products
from ..algebra.decomposition import energies, orient, regularize, select, split_components
from ..algebra.norms import norms
from ..algebra.solvers import chosen_components, components, say_fallback, singular_values, triangle
from ..config import CordaConfig, CordaError
from ..devices import factors_slowly


@dataclass
class Decomposed:
    """The components of a layer that could still be chosen, k of R, in the order of σ: the tail in kpm, the head in
    ipm.

    Attributes:
        rows: a_i = u_iᵀW, (k, d_in) float32 on the CPU.
        U: (d_out, k), the same; None where the split needs none (B from zero).
        sigma: singular values of the oriented weight, descending, float64 on the CPU: all, (R,), or of a fixed rank
            those of the adapter, (r,).
        energy: of each row on the context (see `energies`), (k,) float64; None without a covariance.
        record: what corda.json will say of the layer.
    """

    rows: Tensor
    U: Tensor | None
    sigma: Tensor
    energy: Tensor | None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class LayerStart:
    """What one layer starts from.

    Attributes:
        A: (r, d_in) and
        B: (d_out, r), float32 on the CPU.
        spectrum: singular values of the oriented weight, descending, float64 on the CPU: all, (R,), or those of the
            adapter, (r,), where no more were computed.
        record: what corda.json says of the layer.
    """

    A: Tensor
    B: Tensor
    spectrum: Tensor
    record: dict[str, Any]


def extremes_of(covariances: Sequence[Tensor], config: CordaConfig, device: torch.device) -> list[tuple[float, float]]:
    """Smallest and largest eigenvalue of each round's C (n, n), regularized, or of what else orients; found on
    `device`."""
    found = []
    for C in covariances:
        C = C.to(device)
        if config.orientation == "covariance":
            try:
                found.append(extreme_eigenvalues(regularize(C, config.damping)))
            except torch.linalg.LinAlgError as error:
                raise CordaError(
                    "a covariance is singular to float64, so that its compactness is not defined: raise --damping"
                ) from error
        else:
            d = orient(C.new_ones(1, len(C)), C, config.orientation, config.damping)
            found.append((float(d.min()), float(d.max())))
    return found


def choose_covariance(
    W: Tensor, covariances: Sequence[Tensor], extremes: Sequence[tuple[float, float]], config: CordaConfig
) -> dict[str, Any]:
    """Dynamic covariance selection (CorDA++, Alg. 1): which round's C (n, n) orients W (m, n).

    Args:
        extremes: of the covariances, see `extremes_of`.

    Returns:
        {"round", "scores" (of every round), "log_pi" (of the chosen one)}.
    """
    log_pis = [log_compactness(W.shape[0], *pair) for pair in extremes]
    if len(covariances) == 1:
        return {"log_pi": log_pis[0]}
    T = triangle(W.double())[0]
    scores = []
    for C, log_pi in zip(covariances, log_pis):
        M = orient(T, C.to(W.device), config.orientation, config.damping)
        scores.append(selection_score(log_pi, *(norms(M) if factors_slowly(M.device) else _norms_by_spectrum(M))))
        del M
    best = scores.index(min(scores))  # the first of equals
    return {"round": best, "scores": scores, "log_pi": log_pis[best]}


def _norms_by_spectrum(M: Tensor) -> tuple[float, float]:
    """`norms`, at less cost on a CPU."""
    sigma = singular_values(M)
    return float(sigma.sum()), float(sigma[0])


def keeps_all(config: CordaConfig) -> bool:
    """Whether all components are found: ranks are to be allocated, or the solver finds no fewer."""
    return config.allocates or config.solver in ("gram", "svd")


def decompose_layer(
    W: Tensor,
    C: Tensor | None,
    config: CordaConfig,
    fell_back: Callable[[], None] = say_fallback,
) -> tuple[Tensor, Tensor]:
    """U and σ, float64, of a weight W (m, n) oriented by C (n, n), or by nothing: all its components, (m, R) and (R,),
    or those of the adapter, (m, r) and (r,). `fell_back`: see `chosen_components`.
    """
    times = partial(orient, C=C, orientation=config.orientation, damping=config.damping)
    if keeps_all(config):
        return components(W, times, config.solver)
    return chosen_components(W, times, config.mode, config.r, config.solver, fell_back)


def keep_components(
    W: Tensor, C: Tensor | None, U: Tensor, sigma: Tensor, k: int, config: CordaConfig, record: dict[str, Any]
) -> Decomposed:
    """What is kept of a layer of which at most k components will be chosen."""
    chosen = select(config.mode, len(sigma), k)
    U = U[:, chosen]
    rows = U.T @ W.double()  # (k, n)
    record = {"shape": list(W.shape), **record}
    energy = None
    if C is not None:
        energy = energies(rows, C).cpu()
        record["output_energy"] = _output_energy(W, C)
    kept = None if config.from_zero else U.float().cpu()
    return Decomposed(rows.float().cpu(), kept, sigma.cpu(), energy, record)


def _output_energy(W: Tensor, C: Tensor) -> float:
    """tr(W C Wᵀ). A sum of so many numbers that TF32 gives it to 1e-6."""
    with float32_products("high"):
        return float(((W.to(C.dtype) @ C) * W).sum())


def start_layer(layer: Decomposed, r: int, config: CordaConfig) -> LayerStart:
    """Split r of the kept components into the factors A and B."""
    chosen = select(config.mode, len(layer.rows), r)
    rows, sigma = layer.rows[chosen].double(), layer.sigma[select(config.mode, len(layer.sigma), r)]
    m = layer.record["shape"][0]
    # Where B starts from zero it does not matter what U is.
    U = rows.new_zeros(m, r) if layer.U is None else layer.U[:, chosen].double()
    assert config.split is not None
    B, A = split_components(U, sigma, rows, config.split, config.scale)
    record = {
        "r": r,
        **layer.record,
        "sigma_first": float(sigma[0]),
        "sigma_last": float(sigma[-1]),
        "norm_A": float(A.norm()),
        "norm_B": float(B.norm()),
    }
    if layer.energy is not None:
        energy = layer.energy[chosen]
        stretch = (A.norm(dim=1) / rows.norm(dim=1).clamp(min=1e-300)) ** 2  # A_i is a_i, longer or shorter
        record["energy_share"] = float(energy.sum()) / record["output_energy"] if record["output_energy"] else 0.0
        record["leak"] = float((stretch * energy).sum())
    return LayerStart(
        A.float(), B.float(), layer.sigma.clone(), record
    )  # a clone: not a view of the file it was read from
