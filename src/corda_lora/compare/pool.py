"""The processes of a comparison on this host, several at a time on each GPU; and what any pool of processes does."""

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from .comparison import Comparison
from .process import begin
from .schedule import Job
from .work import serve


class Worker(Protocol):
    """A process, with the job that it does, and since when (as time.perf_counter).

    Attributes:
        death: how it ended, in words, if it died.
        again: whether its job is to be begun again then.
    """

    job: Job
    since: float
    again: bool

    @property
    def death(self) -> str: ...

    def begin(self, job: Job) -> None:
        """Give it a job. The job's folder is there, and empty."""

    def take(self) -> dict[str, Any] | None:
        """The result of its job, once it is done. None if the process has died of it."""

    def end(self) -> None:
        """End it, when it has done its job or died."""


class Pool(Protocol):
    """Where processes are started."""

    def room(self) -> int:
        """How many more processes can be started now."""

    def start(self) -> Any:
        """Start a process (a Worker)."""

    def wait(self, workers: Sequence[Any], timeout: float) -> list[Any]:
        """The workers whose job is done, or that died. Waits for one, for so many seconds at most."""

    def steps(self) -> int:
        """How many steps runs have taken since this was last asked."""

    def close(self, workers: Sequence[Any]) -> None:
        """End the processes, whatever they do. They write no more when this returns."""


# --- on this host ----------------------------------------------------------------------------------------------------


def threads_of(processes: int, cores: int, asked: str) -> int:
    """The threads of each process: they share the cores, or each has what OMP_NUM_THREADS asks for, if that is less."""
    share = max(1, cores // processes)
    return min(share, int(asked) or share) if asked.isdigit() else share


class Processes:
    """Processes of this host: as many as `slots` names GPUs for, "" for the CPU, whose cores they share."""

    def __init__(self, comparison: Comparison, slots: Sequence[str], commit: str | None):
        # Processes are forked from a server that has imported what it can without touching a GPU: see `preload`.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(kind)
        if kind == "forkserver":
            self.context.set_forkserver_preload([f"{__package__}.preload"])
        self.comparison, self.slots, self.commit = comparison, list(slots), commit
        self.threads = threads_of(len(slots), os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS", ""))
        self.counter = self.context.Value("q", 0)  # steps that runs have taken since it was last read

    def room(self) -> int:
        return len(self.slots)

    def start(self) -> "Process":
        gpu = self.slots.pop(0)
        ours, theirs = self.context.Pipe()
        arguments = theirs, gpu, self.threads, self.counter, self.commit
        process = self.context.Process(target=begin, args=arguments, daemon=True)
        process.start()
        theirs.close()  # otherwise the end of the pipe would never be seen
        ours.send((serve, self.comparison))
        return Process(self, process, ours, gpu)

    def wait(self, workers: Sequence["Process"], timeout: float) -> list["Process"]:
        ready = wait([worker.pipe for worker in workers], timeout)
        return [worker for worker in workers if worker.pipe in ready]

    def steps(self) -> int:
        with self.counter.get_lock():
            taken, self.counter.value = self.counter.value, 0
        return taken

    def close(self, workers: Sequence["Process"]) -> None:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:  # the lock on the output is held until they write no more
            worker.process.join(10)
            worker.process.kill()


@dataclass(eq=False)
class Process:
    """A process of this host. Over the pipe it gets a job, and says when that is done."""

    pool: Processes
    process: Any
    pipe: Connection
    gpu: str
    job: Job = field(default_factory=Job)
    since: float = 0.0
    again = False  # a process that died here has most likely run out of memory, and would again

    def begin(self, job: Job) -> None:
        self.job, self.since = job, time.perf_counter()
        self.pipe.send(job)

    def take(self) -> dict[str, Any] | None:
        try:
            self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        return self.pool.comparison.result(self.job)

    def end(self) -> None:
        self.pipe.close()
        self.process.join()
        self.pool.slots.append(self.gpu)

    @property
    def death(self) -> str:
        return f"its process ended with {self.process.exitcode} (out of memory?)"
