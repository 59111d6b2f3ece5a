"""The script that `sandbox` starts for each program: it gives up its process's rights, and then runs the program.

It speaks with `sandbox` in lines of JSON, and needs the standard library alone. From `shut_in` on the kernel refuses
this process all that is not on the filter's list, whatever the program does in Python.
"""

import builtins
import ctypes
import json
import os
import resource
import sys
from contextlib import suppress
from struct import pack
from typing import Any

DEATH_SIGNAL, SIGKILL, SECCOMP, FILTER, NO_NEW_PRIVILEGES = 1, 9, 22, 2, 38  # of prctl
CREATE, ADD, RESTRICT, BENEATH = 444, 445, 446, 1  # Landlock's system calls, which have no function in C's library
READ_FILE, READ_FOLDER, RIGHTS = 1 << 2, 1 << 3, (1 << 13) - 1  # of Landlock's first version


def shut_in(calls: str, readable: list[str], memory: int, seconds: int) -> None:
    """Give up this process's rights for good.

    Args:
        calls: the system calls that are left to it, as a seccomp filter's instructions in hexadecimal digits.
        readable: folders that can still be read, where the kernel has Landlock.
        memory: address space in bytes.
        seconds: processor time.

    Raises OSError if the kernel cannot do so.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: Any) -> int:
        if (result := getattr(libc, name)(*arguments)) < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return int(result)

    call("prctl", DEATH_SIGNAL, SIGKILL, 0, 0, 0)  # when the parent dies
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel ends this process first
    if libc.syscall(CREATE, None, 0, 1) > 0:  # the kernel has Landlock
        rules = call("syscall", CREATE, pack("=Q", RIGHTS), 8, 0)
        for folder in filter(os.path.isdir, readable):
            descriptor = os.open(folder, os.O_PATH)
            call("syscall", ADD, rules, BENEATH, pack("=Qi", READ_FILE | READ_FOLDER, descriptor), 0)
            os.close(descriptor)
        call("syscall", RESTRICT, rules, 0)
        os.close(rules)
    limits = {"AS": memory, "CORE": 0, "FSIZE": 0, "NOFILE": 64, "NPROC": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, then SIGKILL
    instructions = bytes.fromhex(calls)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    call("prctl", SECCOMP, FILTER, pack("@HP", len(instructions) // 8, ctypes.addressof(buffer)), 0, 0)


def main() -> None:
    """Shut in, run the program, run its tests, and send back the word that came with the tests.

    The word comes only when the program has run: one that ends before, or stops its tests, has not seen it.
    """
    run, build, end, load, dump = exec, compile, os._exit, json.loads, json.dumps  # before the program changes them
    heard, said = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    kinds = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
    names = {kind: kind.__name__ for kind in kinds}
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)

    def say(**message: str) -> None:
        said.write(dump(message) + "\n")
        said.flush()

    sys.path.pop(0)  # the folder of this file
    scope: dict[str, Any] = {}
    try:
        shut_in(**load(heard.readline()))
        for part in ("program", "tests"):
            say(ready=part)
            message = load(heard.readline())
            run(build(message["code"], part, "exec", dont_inherit=True), scope)
        say(word=message["word"])
    except BaseException as error:
        say(error=next(names[kind] for kind in type(error).__mro__ if kind in names), message=str(error)[:200])
    end(0)


if __name__ == "__main__":
    main()
