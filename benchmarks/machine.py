"""Where a benchmark ran: what a committed result has to say."""

import os
import platform
import subprocess

import torch


def commit() -> str:
    """The checkout's, or $COMMIT."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return os.environ.get("COMMIT") or found or "not in a checkout"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
