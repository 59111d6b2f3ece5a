"""What a process of a comparison does, on this host or on another."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..config import CordaError
from ..devices import accelerator, machine_name, release_cache, restart_peak
from ..training.train import DivergedError
from .comparison import Comparison
from .job import Advance, do_job
from .schedule import Job

LOG = "log.txt"


def serve(comparison: Comparison, pipe: Connection, gpu: str, threads: int, counter: Any, commit: str | None) -> None:
    """Do the jobs that come over the pipe until it is closed.

    Args:
        counter: a shared integer with a lock, to which runs add their steps.
    """

    def advance(steps: int) -> None:
        with counter.get_lock():
            counter.value += steps

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes: the parent ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not at once, which leaves semaphores behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        do_and_write(comparison, job, advance, {"commit": commit, "gpu": gpu or None})
        pipe.send(None)


def do_and_write(comparison: Comparison, job: Job, advance: Advance, facts: dict[str, Any]) -> dict[str, Any]:
    """Do a job in this process, and write its result, whatever happens, with these facts. Returns the result."""
    _redirect_output(comparison.folder(job) / LOG)
    result = _attempt(comparison, job, advance) | {"machine": machine_name()} | facts
    gc.collect()  # the parts of a trainer refer to one another and to the model
    release_cache(accelerator())
    restart_peak(accelerator())
    comparison.write_result(job, result)
    return result


def _attempt(comparison: Comparison, job: Job, advance: Advance) -> dict[str, Any]:
    try:
        return do_job(comparison, job, advance)
    except CordaError as error:
        return {"status": "does not fit", "why": str(error)}
    except DivergedError as error:
        advance(comparison.steps - (error.step - 1))  # the steps that will not be taken
        return {"status": "diverged", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        return {"status": "failed", "why": f"{type(error).__name__}: {lines[0] if lines else ''}"}


def _redirect_output(path: Path) -> None:
    """Everything that this process prints goes to a file from now on."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _end_with_parent() -> None:
    """End this process when its parent ends, so that no run goes on alone after a comparison was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
