"""Several processes that run one command together, as torchrun starts them, on one machine.

They are forked from a process that has imported everything, and meet in a store that it holds. This takes a second
where torchrun, whose processes each import for themselves, takes ten.
"""

import functools
import json
import subprocess
import sys
from typing import NamedTuple

FORK = """
import functools, gc, json, os, signal, socket, sys, traceback
import peft.tuners.lora, torch, torch.distributed.checkpoint.state_dict, transformers.models.llama.modeling_llama
import corda_lora.adapters.prepare, corda_lora.compare.runner, corda_lora.report.terminal, corda_lora.tune
from corda_lora import cli
from corda_lora.cli import command

command.build_parser = functools.cache(command.build_parser)
command.build_parser()
gc.freeze()  # every training ends with a garbage collection

def child(rank, size, port, arguments, kills, more, there):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    names |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True, **more}
    os.environ.update({name: str(value) for name, value in names.items()})
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{there}/{rank}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    event, ending = kills.get(str(rank), ("", ""))

    def die(now, places):
        if now == event and str(places[now == "os.rename"]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)

    if event:
        sys.addaudithook(die)
    code = 1
    try:
        exec(os.environ.get("FIRST", ""), {})
        cli.main(arguments[rank] if isinstance(arguments[0], list) else arguments)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def hold_store(port):  # in a process of its own: it has threads, and the one that forks must have none
    held = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()

for line in sys.stdin:
    size, *job = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    holder = os.fork()
    if holder == 0:
        hold_store(port)
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            child(rank, size, port, *job)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    print(json.dumps(codes), flush=True)
"""


class Ended(NamedTuple):
    """How the processes have ended, by their numbers: exit codes (negative: by a signal), and what they printed."""

    codes: list[int]
    out: list[str]
    err: list[str]


@functools.cache
def server() -> subprocess.Popen:
    """The process that forks; it ends with this one."""
    return subprocess.Popen([sys.executable, "-c", FORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_together(size, arguments, there, kills=None, **environment) -> Ended:
    """Run `corda` with arguments, or with those of each process, in `size` processes.

    Args:
        there: a folder for what they print.
        kills: {rank: (event, ending)}: that process is killed when it writes such a file (see `sys.audit`).
        environment: variables; FIRST is code that each process runs before the command.
    """
    arguments = [[str(a) for a in each] if isinstance(each, list) else str(each) for each in arguments]
    there.mkdir(exist_ok=True)
    job = json.dumps([size, arguments, kills or {}, environment, str(there)])
    process = server()
    process.stdin.write(job + "\n")
    process.stdin.flush()
    codes = json.loads(process.stdout.readline())
    printed = [[(there / f"{rank}.{stream}").read_text() for rank in range(size)] for stream in ("out", "err")]
    return Ended(codes, *printed)
