"""Covariance selection (CorDA++) on a GPU: the time of each part, and the distance from float64's answer.

    python benchmarks/speed_selection.py [--width 4096] [--wide 11008] [--device cuda]

One weight is (width, width) and one (width, wide), both random. The covariances are of activations with power-law
spectra, and with massive activations in every 512th token. Medians of three runs.
"""

import time
import warnings
from collections.abc import Callable

import record
import torch
from torch import Tensor

from corda_lora.algebra import norms as polar
from corda_lora.algebra.compactness import extreme_eigenvalues
from corda_lora.algebra.covariance import float32_products
from corda_lora.algebra.decomposition import orient, regularize
from corda_lora.algebra.norms import norms
from corda_lora.algebra.solvers import lanczos, leading_singular_vectors, lower_inverse, singular_values

POWERS_AND_MASSIVE = ((0.5, 0.0), (0.7, 300.0), (1.0, 1e4), (0.7, 1e6))


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=11008)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, lines = {}, []
    with float32_products("highest"):
        for n in (options.width, options.wide):
            W = random(options.width, n, options.device, seed=1).double()
            covariances = {pair: covariance(n, *pair, options.device) for pair in POWERS_AND_MASSIVE}
            times = parts(W, covariances[POWERS_AND_MASSIVE[1]])
            scores = {pair: norms_row(W, C) for pair, C in covariances.items()}
            ends = {pair: extremes_row(covariances[pair]) for pair in POWERS_AND_MASSIVE[:2]}
            rows[f"{options.width} x {n}"] = {
                "milliseconds": times,
                "norms": [{"power": p, "massive": m, **row} for (p, m), row in scores.items()],
                "extremes": [{"power": p, "massive": m, **row} for (p, m), row in ends.items()],
            }
            lines += [f"**({options.width}, {n})**", "", "| | ms |", "|---|---:|"]
            lines += [f"| {part} | {ms:.2f} |" for part, ms in times.items()]
            lines += ["", "| covariance: power, massive | Σσ/σ₁ | σ_R/σ₁ | error of Σσ | of σ₁ | ms |"]
            lines += ["|---|---:|---:|---:|---:|---:|"]
            lines += [
                f"| {p}, {m:g} | {row['sum']:.2f} | {row['last']:.0e} | {row['error_sum']:.1e} "
                f"| {row['error_first']:.1e} | {row['milliseconds']:.1f} |"
                for (p, m), row in scores.items()
            ]
            lines += ["", "| extremes of the covariance | error of the lowest | of the highest | ms |"]
            lines += ["|---|---:|---:|---:|"]
            lines += [
                f"| {p}, {m:g} | {row['error_lowest']:.1e} | {row['error_highest']:.1e} | {row['milliseconds']:.1f} |"
                for (p, m), row in ends.items()
            ]
            lines += [""]
    record.write(options, rows, lines)


def random(rows: int, columns: int, device: str, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(seed), device=device)


def covariance(n: int, power: float, massive: float, device: str) -> Tensor:
    """C (n, n) float32 of 2 n tokens whose principal axes are random and fall as i^-power."""
    scale = torch.arange(1, n + 1, device=device) ** -power
    mix = random(n, n, device, seed=2) / n**0.5
    x = (random(2 * n, n, device, seed=3) * scale) @ mix + 0.1 * scale.norm() / n**0.5
    x[::512, :3] += massive * x.std()
    return x.T @ x / len(x)


def milliseconds(run: Callable[[], object], repeats: int = 3) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        since = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    return 1e3 * sorted(seconds[1:])[repeats // 2]


def parts(W: Tensor, C: Tensor) -> dict[str, float]:
    """Milliseconds of each part of a score."""
    M = orient(W, C, "covariance")  # (R, n)
    X = (M / torch.linalg.norm(M)).float()
    damped = regularize(C)
    L = torch.linalg.cholesky(damped)
    runs: dict[str, Callable[[], object]] = {
        "the oriented weight, float64": lambda: orient(W, C, "covariance"),
        "Σσ and σ₁ by a spectrum (`eigvalsh`)": lambda: singular_values(M),
        "Σσ and σ₁ by products (`norms`)": lambda: norms(M),
        "in it σ₁, by a block of vectors": lambda: leading_singular_vectors(M.T, 1, sweeps=4),
        "σ₁ by Lanczos instead": lambda: lanczos(lambda v: M @ (M.T @ v), len(M), M.device),
        "a growing step": lambda: polar._step(X, polar.GROW, split=True),
        "a finishing step": lambda: polar._step(X, polar.GROW, split=False),
        "extremes of the covariance": lambda: extreme_eigenvalues(damped),
        "in them Cholesky": lambda: torch.linalg.cholesky(damped),
        "in them the inverse of the factor": lambda: lower_inverse(L),
    }
    times = {}
    for name, run in runs.items():
        with float32_products("high" if name.endswith("step") else "highest"):
            times[name] = milliseconds(run)
        print(f"{name}: {times[name]:.2f} ms", flush=True)
    return times


def norms_row(W: Tensor, C: Tensor) -> dict[str, float]:
    """Σσ and σ₁ of the oriented weight by products, against float64's spectrum."""
    M = orient(W, C, "covariance")
    sigma = torch.linalg.svdvals(M)
    total, first = norms(M)
    return {
        "sum": float(sigma.sum() / sigma[0]),
        "last": float(sigma[-1] / sigma[0]),
        "error_sum": total / float(sigma.sum()) - 1,
        "error_first": first / float(sigma[0]) - 1,
        "milliseconds": milliseconds(lambda: norms(M)),
    }


def extremes_row(C: Tensor) -> dict[str, float]:
    """The extreme eigenvalues of a covariance, against float64's spectrum."""
    damped = regularize(C)
    exact = torch.linalg.eigvalsh(damped)
    lowest, highest = extreme_eigenvalues(damped)
    return {
        "error_lowest": lowest / float(exact[0]) - 1,
        "error_highest": highest / float(exact[-1]) - 1,
        "milliseconds": milliseconds(lambda: extreme_eigenvalues(damped)),
    }


if __name__ == "__main__":
    main()
