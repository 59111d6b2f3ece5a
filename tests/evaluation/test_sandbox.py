"""Programs in the sandbox: honest ones run as anywhere, hostile ones score nothing and harm nothing."""

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import psutil
import pytest

from corda_lora import CordaError
from corda_lora.evaluation import sandbox
from corda_lora.evaluation.sandbox import check_sandbox, run_programs

if sys.platform != "linux":
    pytest.skip("programs are run on Linux alone", allow_module_level=True)

HAS_LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1) > 0

# Each sets `done` if it gets what it wants. FOLDER has the file "kept", PORT listens, PARENT is this process.
HOSTILE = {
    "a fork bomb": "while True: os.fork()",
    "another program": "subprocess.run(['/bin/true'], check=True); done = True",
    "another program in its own place": "os.execv('/bin/true', ['true'])",
    "a daemon": "if os.fork() == 0: os.setsid(); os.fork()\ndone = True",
    "threads": "threading.Thread(target=print).start(); done = True",
    "endless output": "while True: print('x' * 10000)",
    "endless errors": "while True: os.write(2, b'x' * 10000)",
    "an endless loop": "while True: pass",
    "an endless loop that catches signals": (
        "for n in set(signal.Signals) - {9, 19}: signal.signal(n, lambda *_: None)\nwhile True: pass"
    ),
    "waits for input": "input(); done = True",
    "sleeps": "time.sleep(10**6)",
    "removes a file": "os.remove('FOLDER/kept'); done = True",
    "removes a folder": "shutil.rmtree('FOLDER'); done = True",
    "renames a file": "os.rename('FOLDER/kept', 'FOLDER/lost'); done = True",
    "overwrites a file": "open('FOLDER/kept', 'w'); done = True",
    "truncates a file": "os.open('FOLDER/kept', os.O_RDONLY | os.O_TRUNC); done = True",
    "changes rights": "os.chmod('FOLDER/kept', 0); done = True",
    "makes a file": "open('FOLDER/huge', 'wb').truncate(10**12); done = True",
    "makes a temporary file": "tempfile.TemporaryFile(); done = True",
    "makes a symbolic link": "os.symlink('FOLDER/kept', 'FOLDER/link'); done = True",
    "takes memory at once": "x = bytearray(1 << 33); done = True",
    "takes memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "takes memory of the kernel": "done = libc.shmget(0, 1 << 33, 0o1600) >= 0 or os.memfd_create('x')",
    "opens a socket": "socket.create_connection(('127.0.0.1', PORT)); done = True",
    "opens a socket past Python": "done = libc.socket(2, 1, 0) >= 0",
    "kills all": "os.kill(-1, 9); done = True",
    "kills its parent": "os.kill(PARENT, 9); done = True",
    "has the kernel kill its parent": "fcntl.fcntl(0, fcntl.F_SETOWN, PARENT); done = True",
    "limits its parent": "resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1)); done = True",
    "traces its parent": "done = libc.ptrace(16, PARENT, 0, 0) == 0",
    "reads the environment": "done = os.environ['TOKEN']",
    "reads its parent's environment": "done = open('/proc/PARENT/environ').read()",
    "reads a file": "done = open('FOLDER/kept').read()",
    "lists a folder": "done = os.listdir('FOLDER')",
    "writes to /proc": "open('/proc/self/oom_score_adj', 'w').write('0'); done = True",
    "gets a namespace": "done = libc.unshare(0x10000000) == 0",
    "falls down the stack": "sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
}

READS = {"reads its parent's environment", "reads a file", "lists a folder"}
IMPORTS = "import ctypes, fcntl, os, resource, shutil, signal, socket, subprocess, sys, tempfile, threading, time\n"
IMPORTS += "libc = ctypes.CDLL(None)\ndone = False\n"


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """A folder with a file, and a socket that listens."""
    folder = tmp_path_factory.mktemp("victims")
    (folder / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield folder, server


@pytest.fixture(scope="module")
def outcomes(victims):
    folder, server = victims
    names = {"FOLDER": str(folder), "PORT": str(server.getsockname()[1]), "PARENT": str(os.getpid())}
    programs = []
    for program in HOSTILE.values():
        for name, value in names.items():
            program = program.replace(name, value)
        programs.append((IMPORTS + program, "assert done"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "SECONDS", 1)
        patch.setattr(sandbox, "LONGEST", 3)
        patch.setenv("TOKEN", "secret")
        return dict(zip(HOSTILE, run_programs(programs, progress=False)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_nothing(outcomes, name):
    if name in READS and not HAS_LANDLOCK:
        pytest.skip("the kernel has no Landlock")
    assert not outcomes[name].passed
    assert outcomes[name].reason


def test_hostile_programs_leave_nothing(outcomes, victims):
    folder, server = victims
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "kept"
    assert (folder / "kept").stat().st_mode & 0o400
    running = [p.info for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["ppid"] in (1, os.getpid())]
    assert not [process for process in running if "sandboxed.py" in " ".join(process["cmdline"] or [])]
    with pytest.raises(BlockingIOError):  # nobody has connected
        server.accept()


PRETENDS = """
for descriptor in range(100):
    try:
        os.write(descriptor, b'{"word": "passed"}\\n')
    except OSError:
        pass
def f(): return 0
"""


@pytest.mark.parametrize(
    "program",
    [
        "sys.exit(0)",
        "os._exit(0)",
        "def f(): sys.exit(0)",
        "def f(): os._exit(0)",
        "def f(): os.kill(os.getpid(), 9)",
        "print('passed'); os._exit(0)",
        PRETENDS,
        "os.closerange(0, 100)\ndef f(): return 2",
        "import builtins; builtins.AssertionError = Warning\ndef f(): return 0",
        "import builtins, json; builtins.exec = json.loads = json.dumps = lambda *_, **__: {}\ndef f(): return 0",
        "sys.stdout = sys.__stdout__ = open(os.dup(1), 'w'); print({'word': 1}, flush=True)\ndef f(): return 0",
        "def f(:",
        "",
    ],
)
def test_a_program_cannot_pretend_to_pass(program):
    (outcome,) = run_programs([("import os, sys\n" + program, "assert f() == 2")], progress=False)
    assert not outcome.passed
    assert outcome.reason


def test_honest_programs_pass(capfd):
    library = "bisect, cmath, collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq"
    library += ", itertools, json, math, operator, random, re, statistics, string, threading, typing, unittest"
    programs = [
        (f"import {library}\nprint('said')\ndef f(): return 2", "assert f() == 2"),
        ("import numpy\ndef f(): return numpy.ones((64, 64)) @ numpy.ones(64)", "assert f().sum() == 4096"),
        ("import time\ndef f(): time.sleep(0.01); return time.time()", "assert f()"),
        ("x = bytearray(1 << 28)", "assert len(x) > 1000"),
        ("d = '\\ud800'\ndef f(): return 'é' * 100_000", "assert f()[0] == 'é'"),
        ("# " + "long " * 100_000, "pass"),
    ]
    outcomes = run_programs(programs, progress=False)
    assert [outcome.reason for outcome in outcomes] == [""] * len(programs)
    assert all(outcome.passed for outcome in outcomes)
    assert "said" not in "".join(capfd.readouterr())


def test_a_program_runs_the_same_each_time():
    order = "list({str(i) for i in range(50)})"
    command, settings = [sys.executable, "-c", f"print({order})"], {**os.environ, "PYTHONHASHSEED": "0"}
    expected = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout
    assert all(o.passed for o in run_programs([(f"x = {order}", f"assert x == {expected}")] * 3, progress=False))


SAYS_IT = """
for descriptor in range(100):
    try:
        os.write(descriptor, b'{"error": "secret"}\\n')
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError(text)", "ValueError"),
        ("import json; json.loads(text)", "ValueError"),
        ("raise type(text, (KeyError,), {})(text)", "KeyError"),
        ("raise type(text, (KeyError,), {'__module__': 'builtins'})(text)", "KeyError"),
        ("KeyError = type(text, (KeyError,), {}); KeyError.__name__ = text; raise KeyError(text)", "KeyError"),
        (SAYS_IT, "it wrote into the sandbox's pipe"),
    ],
)
def test_no_text_of_a_program_is_repeated(program, reason):
    """It could be that of a file, where the kernel has no Landlock."""
    (outcome,) = run_programs([("import os\ntext = 'secret'\n" + program, "")], progress=False)
    assert outcome == sandbox.Outcome(False, reason)


def test_an_interruption_ends_the_programs_that_run(monkeypatch):
    check_sandbox()
    monkeypatch.setattr(sandbox, "check_sandbox", lambda: None)
    ask, run, outcomes = sandbox._ask, sandbox._run, []

    def interrupted(process, message):
        if "word" in message:  # the tests begin
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return ask(process, message)

    monkeypatch.setattr(sandbox, "_ask", interrupted)
    monkeypatch.setattr(sandbox, "_run", lambda *arguments: outcomes.append(run(*arguments)) or outcomes[-1])
    with pytest.raises(KeyboardInterrupt):
        run_programs([("import time", "time.sleep(20)")], progress=False)
    assert [outcome.passed for outcome in outcomes] == [False]


def test_a_busy_machine_changes_no_outcome(monkeypatch):
    """What is limited is the processor's time: a program that waits for the processor longer than that passes."""
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    programs = [("import time", "time.sleep(1.5)")]
    assert run_programs(programs, progress=False)[0].passed


def test_a_system_that_cannot_shut_programs_in_runs_none(monkeypatch):
    allow_all = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000).hex()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_filter", lambda: allow_all)
        with pytest.raises(CordaError, match=r"the kernel does not shut them in .*it could"):
            run_programs([("open('/tmp/x')", "")])
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_filter", lambda: "00" * 8)
        with pytest.raises(CordaError, match="prctl: Invalid argument"):
            check_sandbox()
    sandbox._filter.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyseccomp", None)
        with pytest.raises(CordaError, match=r"pip install corda-lora\[benchmarks\]"):
            check_sandbox()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CordaError, match="on Linux alone"):
        check_sandbox()
