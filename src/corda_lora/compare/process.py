"""The first thing that a process of a comparison does: it takes its GPU, before it imports anything that starts CUDA.

CUDA looks once at which GPUs a process may use, when it starts. PEFT imports bitsandbytes where that is installed, and
bitsandbytes starts CUDA where there is a GPU. A process that were told later would compute on the first GPU.
"""

import os
from multiprocessing.connection import Connection
from typing import Any


def begin(pipe: Connection, gpu: str, *rest: Any) -> None:
    """Call the function that comes over the pipe, with what comes with it, the pipe, the GPU ("" for the CPU), and the
    rest. Unpickling imports what these need."""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    function, argument = pipe.recv()
    function(argument, pipe, gpu, *rest)
