"""Run programs that a model wrote, and the tests that they should pass, where they can harm nothing.

Each program runs in a process of its own, whose system calls the kernel filters (seccomp): it can compute, read its
Python's files and tell the time. It cannot start a process, open a socket, send a signal, or make, change or remove a
file, so nothing is left of it when it is killed. Its memory and processor time are limited, its environment is empty,
and where the kernel has Landlock, it can read no other files. This needs neither root nor a container.

A program passes as in every harness whose tests run in the program's process: one that ends itself or prints a word of
success does not, one that was written against these very lines could, and would still harm nothing.
"""

import builtins
import errno
import json
import os
import secrets
import signal
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from fcntl import F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import psutil

from ..config import CordaError
from ..progress import progress_bar

MEMORY = 1 << 30  # bytes of address space
SECONDS = 5  # of processor time, which a busy machine does not use up
LONGEST = 120  # seconds until a program is killed that sleeps
LINE = 2000  # characters of an answer

ALLOWED = """
brk madvise mmap mprotect mremap munmap
close dup dup2 dup3 fadvise64 fstat getdents64 lseek pread64 read readv write writev
access faccessat faccessat2 getcwd lstat newfstatat readlink readlinkat stat statx
exit exit_group futex restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn set_robust_list sigaltstack
clock_getres clock_gettime clock_nanosleep gettimeofday nanosleep poll ppoll pselect6 select time times
getegid geteuid getgid getpid getppid getrandom getrlimit getrusage gettid getuid sched_getaffinity sched_yield
sysinfo uname
"""
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC  # of the flags of open: none is set for reading
ALL_BITS = (1 << 64) - 1
TCGETS, FIOCLEX, FIONCLEX = 0x5401, 0x5451, 0x5450
NARROWED = {  # system calls that are allowed where an argument is one of these values, of those of its bits that count
    "open": (1, CHANGES, (0,)),
    "openat": (2, CHANGES, (0,)),
    "ioctl": (1, ALL_BITS, (TCGETS, FIOCLEX, FIONCLEX)),
    "fcntl": (1, ALL_BITS, (F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL)),
    "prlimit64": (2, ALL_BITS, (0,)),  # no new limit
}

PROBE = """
import os, socket
def refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError:
        return True
"""
PROBES = """
assert refused(os.fork), "it could start processes"
assert refused(socket.socket), "it could use the network"
assert refused(os.kill, os.getppid(), 0), "it could send signals"
assert refused(os.open, FILE, os.O_WRONLY), "it could change files"
assert refused(os.unlink, FILE), "it could remove files"
"""


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed its tests, and in a few words why not: words of ours, as a program's own could have the
    text of a file in them."""

    passed: bool
    reason: str = ""


def check_sandbox() -> None:
    """Raises CordaError if this system cannot shut a program in. For use before long work."""
    if sys.platform != "linux":
        raise CordaError("programs that a model wrote are run on Linux alone, whose kernel can shut them in (seccomp)")
    with tempfile.NamedTemporaryFile() as file:
        outcome = _run(PROBE, PROBES.replace("FILE", repr(file.name)), ours=True)
    if not outcome.passed:
        raise CordaError(
            f"programs that a model wrote are not run here, as the kernel does not shut them in ({outcome.reason}): "
            "use a kernel with seccomp (CONFIG_SECCOMP_FILTER), and a container that allows it"
        )


def run_programs(programs: Sequence[tuple[str, str]], label: str = "programs", progress: bool = True) -> list[Outcome]:
    """Run each (program, tests), some at once: the tests are statements that follow the program's.

    An interruption ends those that run at once.

    Raises CordaError as `check_sandbox` does.
    """
    check_sandbox()
    fit = psutil.virtual_memory().available // MEMORY
    pool = ThreadPoolExecutor(max(1, min(len(os.sched_getaffinity(0)), fit)))
    running: set[Popen[bytes]] = set()
    futures: list[Future[Outcome]] = []
    with progress_bar(label, len(programs), progress) as advance:
        try:
            futures += [pool.submit(_run, program, tests, running) for program, tests in programs]
            outcomes = []
            for future in futures:
                outcomes.append(future.result())
                advance()
            return outcomes
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while left := [future for future in futures if not future.done()]:
                for process in tuple(running):  # one that starts just now is met in the next round
                    process.kill()
                wait(left, timeout=0.1)


def _run(program: str, tests: str, running: set[Popen[bytes]] | None = None, ours: bool = False) -> Outcome:
    """Run a program and its tests.

    Args:
        running: has the process while it runs.
        ours: whether the program is one of ours, whose words can be repeated.
    """
    word = secrets.token_hex(16)
    settings = {"calls": _filter(), "readable": _readable(), "memory": MEMORY, "seconds": SECONDS}
    talk = (  # what is said, and what has to be answered
        (settings, {"ready": "program"}),
        ({"code": program}, {"ready": "tests"}),
        ({"code": tests, "word": word}, {"word": word}),
    )
    command = [sys.executable, "-B", "-s", str(Path(__file__).with_name("sandboxed.py"))]
    libraries = {name: path for name, path in os.environ.items() if name == "LD_LIBRARY_PATH"}
    environment = {**libraries, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with Popen(
        command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, cwd="/", env=environment, start_new_session=True
    ) as process:
        watch = threading.Timer(LONGEST, process.kill)
        watch.start()
        running = set() if running is None else running
        running.add(process)
        try:
            for said, expected in talk:
                answer = _ask(process, said)
                if answer != expected:
                    return Outcome(False, _reason(answer, process, ours))
            return Outcome(True)
        finally:
            watch.cancel()
            process.kill()
            running.discard(process)


def _ask(process: Popen[bytes], message: dict[str, Any]) -> dict[str, Any]:
    """What the process answers to a message; nothing if it has closed the pipe, as it does when it ends."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        line = process.stdout.readline(LINE)
        return dict(json.loads(line)) if line else {}
    except BrokenPipeError:
        return {}
    except (TypeError, ValueError, RecursionError):
        return {"error": "no message of ours"}


def _reason(answer: dict[str, Any], process: Popen[bytes], ours: bool) -> str:
    """Why a program did not pass, by its last answer, or by how it ended."""
    if answer:
        name = str(answer.get("error"))
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            return "it wrote into the sandbox's pipe"
        return f"{name}: {answer.get('message')}" if ours else name
    code = process.wait()
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it took more than {SECONDS} seconds of processor time, or {LONGEST} of any"
    return f"it ended with {signal.Signals(-code).name}" if code < 0 else "it ended before its tests did"


@cache
def _filter() -> str:
    """The instructions of the seccomp filter, in hexadecimal digits."""
    try:
        import pyseccomp
    except ImportError as error:
        raise CordaError(
            "to run programs that a model wrote, install pyseccomp: pip install corda-lora[benchmarks]"
        ) from error
    except RuntimeError as error:  # it found no libseccomp
        raise CordaError(
            "to run programs that a model wrote, install libseccomp, such as: apt install libseccomp2"
        ) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    whole = [(name, ()) for name in ALLOWED.split()]
    narrow = [
        (name, (pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, bits, value),))
        for name, (argument, bits, values) in NARROWED.items()
        for value in values
    ]
    for name, conditions in whole + narrow:
        with suppress(OSError):  # an old libseccomp does not know every name, nor has every architecture all calls
            rules.add_rule(pyseccomp.ALLOW, name, *conditions)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read().hex()


@cache
def _readable() -> list[str]:
    """The folders that a Python program reads: the system's libraries, and this Python's own."""
    paths = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return sorted({"/usr", "/lib", "/lib64", *(str(path.parent) for path in paths[:2]), *map(str, paths)})
