"""Every question about devices: which one computes, what it is good at, how much memory it took."""

import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from resource import RUSAGE_SELF, getrusage

import torch
from torch import nn

from .config import CordaError

# Compute capabilities of NVIDIA GPUs whose float64 rate is half or a third of float32's: P100, V100, A100, H100, B200.
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def accelerator() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if current is None else current


def compute_device(model: nn.Module, chosen: str | None = None) -> torch.device:
    """Where a model's blocks are run: the `chosen` device, or where the model is, or the accelerator for a model on the
    CPU. A quantized model is run where it is.

    Raises CordaError if this machine has no such device, or a quantized model is on another.
    """
    home = next(model.parameters()).device
    if getattr(model, "is_quantized", False):
        if chosen is not None and torch.device(chosen).type != home.type:
            raise CordaError(f"the quantized model is on {home}, and runs there: leave device {chosen!r} out")
        return home
    if chosen is not None:
        try:
            torch.zeros(1, device=chosen).item()  # "meta" holds no numbers
            return torch.device(chosen)
        except Exception as error:  # of many types: no such name, no driver, not compiled for it, no such number
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CordaError(f"there is no device {chosen!r} on this machine: {reason}") from error
    return accelerator() if home.type == "cpu" else home


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine_name() -> str:
    """The GPU of this machine, or its processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def visible_gpus() -> list[str]:
    """The numbers of the CUDA GPUs that this process may use; one empty name where there is none."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (allowed.split(",") if allowed else [str(i) for i in range(torch.cuda.device_count())]) or [""]


# --- what a device is good at ----------------------------------------------------------------------------------------


@cache
def double_device(device: torch.device) -> torch.device:
    """Where layers are decomposed, in float64, when blocks run on `device`.

    That is `device` itself, unless it has no float64 (Apple's GPUs) or the processor computes in float64 at twice its
    speed (a consumer GPU beside many cores). The two speeds are measured once a process, except where float64 is known
    to be fast. A warning says so when the processor is chosen.
    """
    cpu = torch.device("cpu")
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) in FAST_FLOAT64):
        return device
    seconds = float64_seconds(device)
    if seconds < 2 * float64_seconds(cpu):
        return device
    why = "has no float64" if math.isinf(seconds) else "is slow in float64"
    warnings.warn(f"{device} {why}: layers are decomposed on the processor", stacklevel=2)
    return cpu


def float64_seconds(device: torch.device, n: int = 1024) -> float:
    """The seconds that a product of two (n, n) float64 matrices takes; infinite where a device has no float64."""
    try:
        x = torch.ones(n, n, dtype=torch.float64, device=device)
        taken = []
        for _ in range(4):
            since = time.perf_counter()
            (x @ x)[0, 0].item()  # reading a number waits for the product
            taken.append(time.perf_counter() - since)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):
        return math.inf
    return min(taken)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. Without them a product in bfloat16 took 4 times as long as in
    float32 on a processor with AVX-512, and 50 times on another."""
    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # Of an x86 processor, oneDNN says yes to AVX-512 alone, on which it emulates bfloat16.
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported()


def factors_slowly(device: torch.device) -> bool:
    """Whether several products cost less than one factorization (QR, SVD) on a device: true of GPUs."""
    return device.type == "cuda"


def has_streams(device: torch.device) -> bool:
    """Whether copies can run beside computation."""
    return device.type == "cuda"


def to_this_gpu() -> Callable[[], None]:
    """A function that makes this thread's current GPU that of the thread which calls it: a new thread has the first."""
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return lambda: None if gpu is None else torch.cuda.set_device(gpu)


# --- waiting and memory ----------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def restart_peak(device: torch.device) -> None:
    """Count a CUDA device's peak memory from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors took on a CUDA device since `restart_peak`; else the most that this process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_cache(device: torch.device) -> None:
    """Give memory that PyTorch holds back for later tensors back to a CUDA device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a CUDA device; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
