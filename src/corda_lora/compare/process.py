"""The first thing that a process of a comparison does: it takes its GPU, before it imports anything that starts CUDA.

CUDA looks once at which GPUs a process may use, when it starts. PEFT imports bitsandbytes where that is installed, and
bitsandbytes starts CUDA where there is a GPU. A process that were told later would compute on the first GPU.
"""

import os
import subprocess
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def begin(pipe: Connection, gpu: str, *rest: Any) -> None:
    """Call the function that comes over the pipe, with what comes with it, the pipe, the GPU ("" for the CPU), and the
    rest. Unpickling imports what these need."""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(gpu, os.environ)
    function, argument = pipe.recv()
    function(argument, pipe, gpu, *rest)


def visible_device(gpu: str, environ: Mapping[str, str]) -> str:
    """What a process sets CUDA_VISIBLE_DEVICES to, so that it sees one GPU and no other.

    Under MPS that is the GPU's UUID. A daemon that was started with CUDA_VISIBLE_DEVICES numbers its GPUs from 0: to
    its clients, a number may be another GPU, or none. (NVIDIA's documentation of MPS advises UUIDs.)

    Args:
        gpu: its number, or its UUID.
        environ: CUDA_MPS_PIPE_DIRECTORY, or its default, is where a client finds the daemon.
    """
    daemon = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control")
    if not gpu.isdigit() or not daemon.exists():
        return gpu
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split(", ") for line in lines)[gpu]
