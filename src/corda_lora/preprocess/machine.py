"""A machine to plan for: its memory and its rates, measured on this machine or described by the user."""

import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from ..algebra.covariance import HALF
from ..config import CordaError
from ..devices import device_name, double_device, free_bytes, synchronize


@dataclass(frozen=True)
class Machine:
    """Memory and rates of a machine. A rate that was not measured is nan.

    Attributes:
        accelerator: free bytes of the accelerator; None if the CPU computes.
        cpu: free bytes of the CPU's memory.
        multiply: FLOP/s of products of half-precision matrices.
        single: FLOP/s of products of float32 matrices.
        double: FLOP/s of products of float64 matrices.
        eigen: seconds of a float64 `eigh` of an (n, n) matrix divided by n³, for n of a few thousands.
        read: bytes/s from the disk.
    """

    name: str
    accelerator: float | None
    cpu: float
    multiply: float = math.nan
    single: float = math.nan
    double: float = math.nan
    eigen: float = math.nan
    read: float = math.nan


# measured: benchmarks/results/init_7b_2026-11-22_h100.md
H100 = Machine("H100", 80e9, math.inf, 6.2e14, 5.0e13, 5.4e13, 0.127 / 4096**3, 0.9e9)


def this_machine(device: torch.device, dtype: torch.dtype = torch.float32, measure: bool = True) -> Machine:
    """This machine, which computes on `device` with a model of `dtype`. To measure its rates takes about 3 seconds,
    once a process."""
    name = device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    machine = Machine(f"this machine ({name})", free_bytes(device), psutil.virtual_memory().available)
    return replace(machine, **_rates(device, dtype)) if measure else machine


@cache
def _rates(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The rates of a `Machine`, measured."""

    def seconds(run: Callable[[], Any]) -> float:
        run()  # the first call sets up
        calls, since = 0, time.perf_counter()
        while not calls or time.perf_counter() < since + 0.4:
            run()
            calls += 1
            synchronize(device)
        return (time.perf_counter() - since) / calls

    cuda = device.type == "cuda"
    n = 2048 if cuda else 768
    x = torch.randn(n, n, dtype=torch.float64, device=double_device(device) if cuda else "cpu")
    double = x.repeat(2, 2) if cuda else x
    single, product = double.float().to(device if cuda else "cpu"), 2 * len(double) ** 3
    half = single.to(dtype if dtype in HALF else torch.float32)
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(1 << 20) * 64)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # or it would come from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        since = time.perf_counter()
        read = len(Path(file.name).read_bytes()) / (time.perf_counter() - since)
    return {
        "multiply": product / seconds(lambda: half @ half),
        "single": product / seconds(lambda: single @ single),
        "double": product / seconds(lambda: double @ double),
        "eigen": seconds(lambda: torch.linalg.eigh(x)) / n**3,  # reads one triangle
        "read": read,
    }


def described_machine(gpu: str, tflops: float | None = None, tflops64: float | None = None) -> Machine:
    """A machine with a card whose memory is `gpu`, such as "24GB".

    The CPU beside the card is unknown: its memory counts as without limit.

    Args:
        tflops, tflops64: speed of the card in half and in double precision. Default: an H100's. Its other rates scale
            with these.

    Raises CordaError if `gpu` is no size, or a speed is not above 0.
    """
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(i?)B?\s*", gpu, re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        raise CordaError(f"--gpu is {gpu!r}, but must be the memory of a card, such as 24GB")
    for flag, speed in {"tflops": tflops, "tflops64": tflops64}.items():
        if speed is not None and not speed > 0:
            raise CordaError(f"--{flag} is {speed}, but must be above 0")
    half = 1e12 * tflops if tflops else H100.multiply
    double = 1e12 * tflops64 if tflops64 else H100.double
    default = "" if tflops and tflops64 else "; what is not given is an H100's"
    return replace(
        H100,
        name=f"a GPU of {gpu.strip()} ({half / 1e12:g} TFLOP/s in half and {double / 1e12:g} in double{default})",
        accelerator=float(size[1]) * (1024 if size[3] else 1000) ** " KMGT".index(size[2].upper()),
        multiply=half,
        single=H100.single * half / H100.multiply,
        double=double,
        eigen=H100.eigen * H100.double / double,
    )
