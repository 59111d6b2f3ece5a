"""The processes of a comparison and the server that they are forked from must not start CUDA too early."""

import json
import logging
import os
import subprocess
import sys

import pytest

from corda_lora.compare.pool import threads_of
from corda_lora.compare.process import visible_device

BESIDE_A_GPU = """
import importlib.util, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: real("json") if name == "bitsandbytes" else real(name, *rest)
torch.cuda.is_available = lambda: True
"""
IMPORTED = """
import gc, sys
import corda_lora.cli, corda_lora.compare.preload
print("peft" in sys.modules, gc.get_freeze_count() > 0)
"""
STARTED = """
import multiprocessing, os, sys
import corda_lora.cli, corda_lora.compare.preload
from corda_lora.compare.process import begin

class Seen:  # PEFT is what imports bitsandbytes
    def find_spec(self, name, *rest):
        if name == "peft":
            print("peft is imported for GPU", os.environ.get("CUDA_VISIBLE_DEVICES"))
            sys.exit()

sys.meta_path.insert(0, Seen())
ours, theirs = multiprocessing.Pipe()
ours.send_bytes(b"(ccorda_lora.compare.work\\nserve\\nNt.")  # as pickle writes it
begin(theirs, "5", 1, None, None)
"""
# Four processes of two GPUs, which tell their environment in place of doing jobs; in each of some environments.
FOUR = """
import json, os, sys

NAMES = "CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"

def tell(comparison, pipe, gpu, *rest):
    pipe.send((gpu, *map(os.environ.get, NAMES)))

def four():
    processes = pool.Processes(None, ["0", "1"] * 2, None)
    processes.context.set_forkserver_preload([])  # these import little
    for worker in [processes.start() for _ in range(4)]:
        print(*worker.pipe.recv(), flush=True)
        worker.end()
    assert processes.slots == ["0", "1"] * 2

def main():
    global pool
    from corda_lora.compare import pool
    pool.serve = tell
    for environment in json.loads(os.environ["ENVIRONMENTS"]):
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            four()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""
NVIDIA_SMI = """#!/bin/sh
[ "$*" = "--query-gpu=index,uuid --format=csv,noheader" ] && printf '0, GPU-aa\\n1, GPU-bb\\n'
"""


def run(code, **environment):
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("machine", "imported"), [(BESIDE_A_GPU, "False"), ("", "True")])
def test_peft_is_left_to_the_processes_where_its_import_would_start_cuda(machine, imported):
    """What is imported by then, no garbage collection of a process looks through."""
    assert run(machine + IMPORTED) == [f"{imported} True"]


def test_a_process_knows_its_gpu_before_anything_starts_cuda():
    assert run(BESIDE_A_GPU + STARTED) == ["peft is imported for GPU 5"]


def test_each_process_sees_one_gpu_and_finds_the_daemon_of_mps(tmp_path):
    (tmp_path / "four.py").write_text(FOUR)
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "with").mkdir()
    os.mkfifo(tmp_path / "with" / "control")
    expected, environments = [], []
    for pipes, names in (("without", {"0": "0", "1": "1"}), ("with", {"0": "GPU-aa", "1": "GPU-bb"})):
        given = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / pipes), "CUDA_MPS_LOG_DIRECTORY": str(tmp_path / "logs")}
        environments.append({"CUDA_VISIBLE_DEVICES": "0,1", **given})
        expected += [[gpu, names[gpu], *given.values()] for gpu in ("0", "1", "0", "1")]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import four; four.main()"
    told = run(code, PATH=f"{tmp_path}:{os.environ['PATH']}", ENVIRONMENTS=json.dumps(environments))
    assert [line.split() for line in told] == expected


def test_a_gpu_that_has_a_uuid_is_called_by_it(tmp_path):
    os.mkfifo(tmp_path / "control")
    assert visible_device("GPU-cc", {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}) == "GPU-cc"


def test_processes_are_as_silent_about_kernels_to_download_as_the_command():
    said = "import logging, corda_lora.compare.preload; print(logging.getLogger('bitsandbytes').level)"
    assert run(BESIDE_A_GPU + said) == [str(logging.ERROR)]


@pytest.mark.parametrize(
    ("processes", "cores", "asked", "threads"),
    [(1, 8, "", 8), (3, 8, "", 2), (16, 8, "", 1), (1, 8, "1", 1), (4, 8, "4", 2), (2, 8, "0", 4), (2, 8, "4,2", 4)],
)
def test_threads_are_as_many_as_asked_for(processes, cores, asked, threads):
    assert threads_of(processes, cores, asked) == threads
