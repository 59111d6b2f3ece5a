"""What covariance selection (CorDA++) takes on a GPU, part by part, and how near it comes to float64's answer.

    python benchmarks/speed_selection.py [--width 4096] [--wide 11008] [--device cuda]

A weight (width, width) and one (width, wide), random, and covariances of activations with power-law spectra and massive
activations in every 512th token. Prints tables as Markdown; the medians of three runs.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from machine import commit, machine
from torch import Tensor

from corda_lora.algebra import norms as polar
from corda_lora.algebra.compactness import extreme_eigenvalues
from corda_lora.algebra.covariance import float32_products
from corda_lora.algebra.decomposition import orient, regularize
from corda_lora.algebra.norms import norms
from corda_lora.algebra.solvers import lanczos, leading_singular_vectors, lower_inverse, singular_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=11008)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    command = f"python benchmarks/speed_selection.py --width {options.width} --wide {options.wide}"
    print(f"# speed_selection\n\n`{command}`\n")
    print(f"{machine()}; torch {torch.__version__}; commit {commit()}")
    with float32_products("highest"):
        for n in (options.width, options.wide):
            W = random(options.width, n, options.device, seed=1).double()
            print(f"\n**({options.width}, {n})**\n\n| | ms |\n|---|---:|")
            parts(W, covariance(n, 0.7, 300.0, options.device))
            print("\n| covariance: power, massive | Σσ/σ₁ | σ_R/σ₁ | error of Σσ | of σ₁ | ms |")
            print("|---|---:|---:|---:|---:|---:|")
            for power, massive in ((0.5, 0.0), (0.7, 300.0), (1.0, 1e4), (0.7, 1e6)):
                errors(W, covariance(n, power, massive, options.device), f"{power}, {massive:g}")
            print("\n| extremes of the covariance | error of the lowest | of the highest | ms |\n|---|---:|---:|---:|")
            for power, massive in ((0.5, 0.0), (0.7, 300.0)):
                extremes(covariance(n, power, massive, options.device), f"{power}, {massive:g}")


def random(rows: int, columns: int, device: str, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator(device).manual_seed(seed), device=device)


def covariance(n: int, power: float, massive: float, device: str) -> Tensor:
    """C (n, n) float32 of 2 n tokens whose principal axes are random and fall as i^-power."""
    scale = torch.arange(1, n + 1, device=device) ** -power
    mix = random(n, n, device, seed=2) / n**0.5
    x = (random(2 * n, n, device, seed=3) * scale) @ mix + 0.1 * scale.norm() / n**0.5
    x[::512, :3] += massive * x.std()
    return x.T @ x / len(x)


def milliseconds(run: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times + 1):  # the first warms up
        since = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)
    return 1e3 * sorted(seconds[1:])[times // 2]


def show(what: str, run: Callable[[], object]) -> None:
    print(f"| {what} | {milliseconds(run):.2f} |", flush=True)


def parts(W: Tensor, C: Tensor) -> None:
    M = orient(W, C, "covariance")  # (R, n)
    X = (M / torch.linalg.norm(M)).float()
    show("the oriented weight, float64", lambda: orient(W, C, "covariance"))
    show("Σσ and σ₁ by a spectrum (`eigvalsh`)", lambda: singular_values(M))
    show("Σσ and σ₁ by products (`norms`)", lambda: norms(M))
    show("of it σ₁, by a block of vectors", lambda: leading_singular_vectors(M.T, 1, sweeps=4))
    show("σ₁ by Lanczos instead", lambda: lanczos(lambda v: M @ (M.T @ v), len(M), M.device))
    with float32_products("high"):
        show("a growing step", lambda: polar._step(X, polar.GROW, split=True))
        show("a finishing step", lambda: polar._step(X, polar.GROW, split=False))
    damped = regularize(C)
    L = torch.linalg.cholesky(damped)
    show("extremes of the covariance", lambda: extreme_eigenvalues(damped))
    show("of it Cholesky", lambda: torch.linalg.cholesky(damped))
    show("of it the inverse of the factor", lambda: lower_inverse(L))


def errors(W: Tensor, C: Tensor, what: str) -> None:
    M = orient(W, C, "covariance")
    sigma = torch.linalg.svdvals(M)
    total, first = norms(M)
    off = total / float(sigma.sum()) - 1, first / float(sigma[0]) - 1
    line = f"{float(sigma.sum() / sigma[0]):.2f} | {float(sigma[-1] / sigma[0]):.0e} | {off[0]:.1e} | {off[1]:.1e}"
    print(f"| {what} | {line} | {milliseconds(lambda: norms(M)):.1f} |", flush=True)


def extremes(C: Tensor, what: str) -> None:
    damped = regularize(C)
    exact = torch.linalg.eigvalsh(damped)
    lowest, highest = extreme_eigenvalues(damped)
    off = lowest / float(exact[0]) - 1, highest / float(exact[-1]) - 1
    print(
        f"| {what} | {off[0]:.1e} | {off[1]:.1e} | {milliseconds(lambda: extreme_eigenvalues(damped)):.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
