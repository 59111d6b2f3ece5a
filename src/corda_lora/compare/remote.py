"""The processes of a comparison on the nodes of a Ray cluster, on one host or on many.

Ray shares out the nodes' GPUs: a process gets a fraction of one, and sees no other (Ray sets CUDA_VISIBLE_DEVICES
before the process imports anything of ours, which `process` explains). The files of the comparison are in a folder that
all nodes share. A job whose process died, most likely with its node, is begun again, wherever there is room. Nodes may
join while runs go on.

This module is imported in those processes, too, before they know their GPU: so nothing here imports PEFT.
"""

import hashlib
import logging
import math
import os
import platform
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import CordaError
from ..version import __version__

if TYPE_CHECKING:
    from .comparison import Comparison
    from .schedule import Job

STEPS = "steps"  # the name of an actor, among those of one command
ATTEMPTS = 3  # a job that ended so many processes has failed: most likely it takes too much memory
# A node has its own environment. Of the command's, these change what a run does.
VARIABLES = ("COMMIT", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF", "TRANSFORMERS_VERBOSITY")


@contextmanager
def cluster(address: str) -> Iterator[bool]:
    """Be connected to a Ray cluster. Yields whether it has GPUs.

    Args:
        address: its HOST:PORT; "auto" is the cluster that this host is a node of.

    Raises CordaError if Ray is not installed, or there is no such cluster.
    """
    if find_spec("ray") is None:
        raise CordaError("--ray needs Ray, which is not installed: pip install 'corda-lora[ray]'")
    import ray

    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    _check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many types
        raise _no_cluster(address, error) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's would end this process with another exit code
    try:
        yield any(node.get("GPU") for node in _resources())
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises CordaError if nobody answers at an address: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit() or "/" in host:
        raise CordaError(f"--ray is {address!r}, but must be auto, or the HOST:PORT of a Ray cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> CordaError:
    at = "on this host" if address == "auto" else f"at {address}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return CordaError(
        f"there is no Ray cluster {at} ({reason}): start one with `ray start --head`, and on each further host with "
        "`ray start --address HEAD:6379`"
    )


class Nodes:
    """Processes on the nodes of the cluster that this process is connected to: `jobs` on each GPU, or on each node if
    none has a GPU."""

    def __init__(self, comparison: "Comparison", jobs: int, commit: str | None):
        """Raises CordaError if a node does not see the comparison's files, or has another version of this package."""
        import ray

        self.comparison, self.jobs = comparison, jobs
        self.running = 0
        resources = _resources()
        self.resource = "GPU" if any(node.get("GPU") for node in resources) else "CPU"
        used = [node for node in resources if node.get(self.resource, 0) >= 1]
        if not used:
            raise CordaError("no node of the Ray cluster has a GPU or a CPU for runs")
        self.share, threads = shares(used, self.resource, jobs)
        _check_nodes(comparison, [node["id"] for node in used])
        # On this node: it is there as long as this process is.
        here = _on(ray.get_runtime_context().get_node_id())
        self.counted = ray.remote(Steps).options(name=STEPS, num_cpus=0, scheduling_strategy=here).remote()
        variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        self.arguments = os.getcwd(), variables, threads, commit

    def room(self) -> int:
        have = (node.get(self.resource, 0) for node in _resources())
        return sum(math.floor(count / self.share + 1e-6) for count in have) - self.running

    def start(self) -> "Actor":
        import ray

        needs = {"num_gpus": self.share, "num_cpus": 0} if self.resource == "GPU" else {"num_cpus": self.share}
        actor = ray.remote(Remote).options(**needs, scheduling_strategy="SPREAD").remote(*self.arguments)
        self.running += 1
        return Actor(self, actor)

    def wait(self, workers: Sequence["Actor"], timeout: float) -> list["Actor"]:
        import ray

        if not workers:  # there is no node left: others may join
            time.sleep(timeout)
            return []
        ready, _ = ray.wait([worker.done for worker in workers], num_returns=len(workers), timeout=timeout)
        return [worker for worker in workers if worker.done in ready]

    def steps(self) -> int:
        import ray

        return ray.get(self.counted.take.remote())

    def close(self, workers: Sequence["Actor"]) -> None:
        for worker in list(workers):
            worker.end()


def shares(nodes: Sequence[dict[str, Any]], resource: str, jobs: int) -> tuple[float, int]:
    """How much of a resource ("GPU" or "CPU") a process takes, and how many threads it computes with: the same on all
    nodes.

    Ray counts in ten-thousandths, and has whole numbers only above 1.
    """
    if resource == "GPU":
        cores = min(node.get("CPU", 0) / (node["GPU"] * jobs) for node in nodes)
        return math.floor(1e4 / jobs) / 1e4, max(1, int(cores))
    share = min(node["CPU"] for node in nodes) / jobs
    return (float(int(share)) if share >= 1 else math.floor(1e4 * share) / 1e4), max(1, int(share))


class Actor:
    """A process on some node."""

    def __init__(self, pool: Nodes, actor: Any):
        self.pool, self.actor = pool, actor
        self.death, self.again = "", False

    def begin(self, job: "Job") -> None:
        self.job, self.since = job, time.perf_counter()
        self.done = self.actor.do.remote(self.pool.comparison, job)

    def take(self) -> dict[str, Any] | None:
        import ray

        try:
            return ray.get(self.done)  # not from the file, which this host may not see at once
        except ray.exceptions.RayError as error:
            self.death = _death(error)
            begun = ray.get(self.pool.counted.begun_so_far.remote(str(self.job)))
            self.again = not isinstance(error, ray.exceptions.RayTaskError) and begun < ATTEMPTS
            return None

    def end(self) -> None:
        import ray

        ray.kill(self.actor)
        self.pool.running -= 1


def _death(error: Exception) -> str:
    """Why a process of Ray has died, in one line: of a traceback the last, else the one that tells most."""
    import ray

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"its process failed: {lines[-1]}"
    return "its process died: " + next((line for line in lines if "died because" in line), lines[0]).rstrip(".")


def _resources() -> list[dict[str, Any]]:
    """The id and the resources of each node that lives."""
    import ray

    return [{"id": node["NodeID"], **node["Resources"]} for node in ray.nodes() if node["Alive"]]


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _check_nodes(comparison: "Comparison", nodes: Sequence[str]) -> None:
    """Raises CordaError if a node has another version of this package, or does not see the files that this one does."""
    import ray

    files = [str(path) for path in comparison.files]
    ours, looking = seen_here(os.getcwd(), files), ray.remote(seen_here)
    seen = {
        node: looking.options(num_cpus=0, scheduling_strategy=_on(node)).remote(os.getcwd(), files) for node in nodes
    }
    for node, asked in seen.items():
        name = next(n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node)
        try:
            theirs = ray.get(asked)
        except ray.exceptions.RayError as error:
            raise CordaError(f"the node {name} of the Ray cluster cannot run corda-lora: {_death(error)}") from error
        for what, value in ours.items():
            if theirs.get(what) != value:
                raise CordaError(
                    f"the node {name} of the Ray cluster sees another {what} than this host: a comparison's nodes need "
                    "one version of corda-lora, and share the folder it is started in, its output and its data"
                )


# --- on a node -------------------------------------------------------------------------------------------------------


def seen_here(folder: str, files: Sequence[str]) -> dict[str, str | None]:
    """The version of this package, whether a folder is here, and the digest of each file (None: there is none)."""
    seen: dict[str, str | None] = {"version of corda-lora": __version__, folder: str(os.path.isdir(folder))}
    for file in files:
        path = Path(folder, file)
        seen[file] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return seen


class Steps:
    """Counts the steps that runs take, and how often each job was begun."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.counts: dict[str, int] = {}
        self.told = 0

    def begin(self, job: str) -> None:
        """A job begins, from its first step on."""
        self.begun[job] += 1
        self.counts[job] = 0

    def begun_so_far(self, job: str) -> int:
        return self.begun[job]

    def add(self, job: str, steps: int) -> None:
        self.counts[job] += steps

    def take(self) -> int:
        """How many more they are than when this was last asked."""
        before, self.told = self.told, sum(self.counts.values())
        return self.told - before


class Remote:
    """A process that does jobs of one entry, one after the other."""

    def __init__(self, folder: str, variables: dict[str, str], threads: int, commit: str | None):
        os.chdir(folder)
        os.environ.update(variables)
        self.threads, self.commit = threads, commit

    def do(self, comparison: "Comparison", job: "Job") -> dict[str, Any]:
        """Do a job and write its result. Returns the result."""
        import ray
        import torch

        from .work import do_and_write

        steps, name = ray.get_actor(STEPS), str(job)
        ray.get(steps.begin.remote(name))  # before it can end this process
        torch.set_num_threads(self.threads)
        facts = {"commit": self.commit, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES") or None, "host": platform.node()}
        return do_and_write(comparison, job, lambda more: steps.add.remote(name, more), facts)
