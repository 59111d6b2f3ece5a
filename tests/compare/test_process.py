"""The processes of a comparison and the server that they are forked from must not start CUDA too early."""

import subprocess
import sys

import pytest

BESIDE_A_GPU = """
import importlib.util, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: real("json") if name == "bitsandbytes" else real(name, *rest)
torch.cuda.is_available = lambda: True
"""
IMPORTED = """
import sys
import corda_lora.cli, corda_lora.compare.preload
print("peft" in sys.modules)
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
ours.send_bytes(b"(ccorda_lora.compare.runner\\n_work\\nNt.")  # as pickle writes it
begin(theirs, "5", 1, None, None)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("machine", "imported"), [(BESIDE_A_GPU, "False"), ("", "True")])
def test_peft_is_left_to_the_processes_where_its_import_would_start_cuda(machine, imported):
    assert run(machine + IMPORTED) == [imported]


def test_a_process_knows_its_gpu_before_anything_starts_cuda():
    assert run(BESIDE_A_GPU + STARTED) == ["peft is imported for GPU 5"]
