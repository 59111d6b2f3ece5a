"""What the processes of a comparison have in common: imported once, by the server that they are forked from.

PEFT imports bitsandbytes where it is installed, and bitsandbytes starts CUDA where there is a GPU. A process that is
forked afterwards cannot use CUDA. There, each process imports the rest for itself: see `process`.

What was imported is left out by Python's garbage collector: each training of a process ends with a whole collection,
which would look through all of it, for a third of a second, and copy the pages that it shares.
"""

import gc
import logging
from importlib.util import find_spec

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command does, in all that is forked from here
if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
    from . import runner  # noqa: F401
gc.freeze()
