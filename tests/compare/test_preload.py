"""The server that a comparison's processes are forked from must not start CUDA."""

import subprocess
import sys

import pytest

BESIDE_A_GPU = """
import importlib.util, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: real("json") if name == "bitsandbytes" else real(name, *rest)
torch.cuda.is_available = lambda: True
"""


@pytest.mark.parametrize(("machine", "imported"), [(BESIDE_A_GPU, "False"), ("", "True")])
def test_peft_is_left_to_the_processes_where_its_import_would_start_cuda(machine, imported):
    code = f'{machine}\nimport sys\nimport corda_lora.compare.preload\nprint("peft" in sys.modules)'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == imported, done.stderr
