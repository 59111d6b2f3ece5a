"""Several processes that do one piece of work together, as `torchrun` and `accelerate launch` start them.

The launcher tells each process its number and how many there are (RANK, LOCAL_RANK, WORLD_SIZE), and where they meet
(MASTER_ADDR, MASTER_PORT). Small things are told over gloo, between CPUs; tensors on CUDA devices go over NCCL. If one
of the processes ends, the others end too. Its sentence is printed once, and once more where process 0 is, if that is on
another host.
"""

import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .config import CordaError

MEETING = 60  # seconds that the first process to come waits for the last, and that they have to connect
PATIENCE = 10  # seconds from the launcher's request to end until it is obeyed; the launcher's own patience is 30
FAILED = "corda/failed"  # the name in the store for what the first process to end has said
LONGEST_WAIT = timedelta(hours=6)  # for a process that lives: one that dies is noticed at once


def number_of_processes() -> int:
    """How many processes the launcher started; 1 without one. Raises CordaError if WORLD_SIZE is no number."""
    return _number("WORLD_SIZE", "1")


def rank_here() -> int:
    """The number of this process, from 0 on."""
    return _number("RANK", "0")


def is_first_of_host() -> bool:
    """Whether this process is the first of those that a launcher started on this host, or alone."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"


def launched() -> list[str]:
    """The words before a verb that start it as this command was started. A launcher's further options are not known."""
    if number_of_processes() == 1:
        return ["corda"]
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        return ["accelerate", "launch", "-m", "corda_lora"]
    return ["torchrun", "--nproc-per-node", str(_number("LOCAL_WORLD_SIZE", "1")), "-m", "corda_lora", "--"]


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise CordaError(f"{name} is {text!r} in the environment, but must be a number: start with torchrun")
    return int(text)


class ProcessEndedError(CordaError):
    """Another process has ended, so that this one cannot go on."""


@dataclass
class Processes:
    """The processes of one run (see `joined`). They can do nothing together before they have met.

    Attributes:
        rank: the number of this one, from 0 on.
        size: how many there are, at least 2.
        store: where one that fails leaves its sentence for the others.
        waited: seconds spent until all had come to the same place.
    """

    rank: int
    size: int
    store: Any
    waited: float = 0.0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self, say: Callable[[str], None]) -> None:
        """Wait for the others, and connect: each with a CUDA device of its own, if there are any. `say` prints a
        sentence where the process must end without coming back.

        Raises CordaError if there are fewer devices than processes on this host, or the others do not come or cannot be
        reached.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _set_pg_timeout

        local, backend = _number("LOCAL_RANK", str(self.rank)), "gloo"
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise CordaError(
                    f"process {local} of this host has no GPU of its own: there are {torch.cuda.device_count()}; start "
                    "as many processes as GPUs"
                )
            torch.cuda.set_device(local)
            torch.zeros(1, device="cuda")  # a GPU that is full ends its process before others wait for it within NCCL
            # torchrun leaves each process one thread, but what the GPUs have made is put together on the CPU.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // _number("LOCAL_WORLD_SIZE", "1")))
            backend = "cpu:gloo,cuda:nccl"
        self._wait_for_all()
        _end_when_stuck(say, lambda: self.last_word(self.ended))
        with _connecting():
            try:
                dist.init_process_group(
                    backend,
                    store=self.store,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timedelta(seconds=MEETING),
                )
            except dist.DistStoreError as error:
                raise ProcessEndedError(
                    f"the {self.size} processes have come, but did not connect within {MEETING} seconds: one has ended "
                    "since, or cannot be reached from here (GLOO_SOCKET_IFNAME names the network to take)"
                ) from error
        _set_pg_timeout(LONGEST_WAIT)
        if torch.cuda.is_available():  # NCCL connects when it is used first
            dist.all_reduce(torch.zeros(1, device="cuda"))

    def _wait_for_all(self) -> None:
        """Come to the store, and wait until all have: where one fails on the way here, a launcher on another host does
        not know of it."""
        names = [f"corda/here/{number}" for number in range(self.size)]
        until = time.monotonic() + MEETING
        with self.watching():
            self.store.set(names[self.rank], "")
            while not self.store.check(names):  # and not `wait`, during which Python hears of no signal
                if self.store.check([FAILED]):
                    raise ProcessEndedError(self.ended)
                if time.monotonic() > until:
                    missing = [str(number) for number, name in enumerate(names) if not self.store.check([name])]
                    raise ProcessEndedError(
                        f"of {self.size} processes these have not come within {MEETING} seconds: {', '.join(missing)}; "
                        "what ended them is said where they were started"
                    )
                time.sleep(0.1)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in the order of their numbers: all must call this at the same place.

        Raises ProcessEndedError if one has ended."""
        import torch.distributed as dist

        since, found = time.perf_counter(), [None] * self.size
        with self.watching():
            dist.all_gather_object(found, value)
        self.waited += time.perf_counter() - since
        return found

    def hand_on(self, tensor: Any, rank: int) -> None:
        """Give a tensor that lies in one piece the bytes that it has in one of the processes: all must call this at the
        same place.

        Raises ProcessEndedError if one has ended."""
        import torch
        import torch.distributed as dist

        with self.watching():
            dist.broadcast(tensor.view(-1).view(torch.uint8), rank)  # not all engines know all dtypes

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context an error of the connection is a ProcessEndedError."""
        try:
            yield
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ProcessEndedError(self.ended) from error

    @property
    def ended(self) -> str:
        return (
            f"one of the {self.size} processes has ended without a word (killed, or out of memory), so the others end, "
            "too; finished work is kept, and the same command goes on from it"
        )

    def check_same(self, what: dict[str, Any]) -> None:
        """Raises CordaError, in every process, if `what` is not the same in all of them: it names the first entry that
        differs, and where."""
        found = self.gather((socket.gethostname(), what))
        for number, (host, other) in enumerate(found):
            if other != found[0][1]:
                key, first, here = _difference(found[0][1], other)
                raise CordaError(
                    f"process {number} on {host} sees another {key} than process 0 on {found[0][0]} "
                    f"({_short(here)} and {_short(first)}): all need the same command, files and versions"
                )

    def last_word(self, sentence: str) -> str:
        """What this process says when it ends with a sentence, or with none: nothing, where another was the first to
        end, and what that one said is on the same terminal."""
        host = socket.gethostname()
        with suppress(Exception):  # whoever holds the store may be gone
            self.store.set_timeout(timedelta(seconds=5))
            if not sentence and not self.store.check([FAILED]):
                return sentence
            said = self.store.compare_set(FAILED, "", "\0".join((str(self.rank), host, sentence))).decode()
            rank, where, first = said.split("\0")
            if int(rank) != self.rank:
                return f"process {rank} on {where}: {first}" if self.first and where != host else ""
        return sentence


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _difference(first: Any, other: Any, name: str = "") -> tuple[str, Any, Any]:
    """The first entry that differs, of dictionaries in one another, as "outer.inner", and its two values."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                return _difference(first.get(key), other.get(key), f"{name}.{key}".strip("."))
    return name, first, other


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _end_when_stuck(say: Callable[[str], None], sentence: Callable[[], str]) -> None:
    """Have a thread end this process when the launcher has asked it to end (SIGTERM), and it does not: Python cannot
    act on a signal while it waits for a collective on a GPU that another process will never come to."""
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)

    def listen() -> None:
        while os.read(hears, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(PATIENCE)
        if text := sentence():
            say(text)
        sys.stderr.flush()
        os._exit(2)

    threading.Thread(target=listen, daemon=True).start()


@contextmanager
def _connecting() -> Iterator[None]:
    """Inside this context an error is a CordaError."""
    try:
        yield
    except CordaError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CordaError(f"the processes cannot meet ({str(error).splitlines()[0]}): start with torchrun") from error


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run, for a `with` block, which begins with their meeting. Raises CordaError if the place
    where they meet cannot be reached."""
    import torch.distributed as dist

    with _connecting():
        store, rank, size = _find_store()
    yield Processes(rank, size, store)
    with suppress(Exception):  # not after an error: it might wait for those that have ended
        dist.destroy_process_group()


def _find_store() -> tuple[Any, int, int]:
    """Where the processes meet, the number of this one, and how many there are. A thread looks for it: where something
    else listens at that port and says nothing, torch waits on, deaf to signals."""
    from torch.distributed import DistNetworkError
    from torch.distributed.rendezvous import rendezvous

    found: list[Any] = []

    def find() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=timedelta(seconds=MEETING))))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(MEETING + PATIENCE)
    if not found or isinstance(found[0], DistNetworkError):
        _check_someone_listens()
    if not found:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise CordaError(
            f"what listens at {where}, where the processes meet, does not answer: choose another MASTER_PORT"
        )
    if isinstance(found[0], Exception):
        raise found[0]
    store, rank, size = found[0]
    return store, rank, size


def _check_someone_listens() -> None:
    """Raises CordaError if nobody is where the processes meet."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise CordaError(
            f"nobody is to be reached at {host}:{port}, where the processes meet ({error.strerror or error}): start "
            "the first process there, too"
        ) from error
