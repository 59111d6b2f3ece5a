"""Where a benchmark ran: what a committed result has to say."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


def commit() -> str:
    """The checkout's, or $COMMIT."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return os.environ.get("COMMIT") or found or "not in a checkout"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def setup_of(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """Command, commit, machine, versions and model of a script that is given --model, --context and --output."""
    chosen = {k: v for k, v in vars(options).items() if k not in ("model", "context", "output")}
    config = json.loads((Path(options.model) / "config.json").read_text())
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "dtype")
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    return {
        "command": f"python benchmarks/{script} --model MODEL --context CONTEXT "
        + " ".join(f"--{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in chosen.items()),
        "commit": commit(),
        "machine": f"{machine()}; {platform.machine()}, {os.cpu_count()} CPU cores, {memory}",
        "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
        "model": {k: config[k] for k in keys if k in config},
    }


def head(options: argparse.Namespace, setup: dict[str, Any]) -> str:
    """The beginning of a result in Markdown."""
    text = f"# {options.output.stem}\n\n`{setup['command']}`\n\n{setup['machine']}; "
    text += ", ".join(f"{p} {v}" for p, v in setup["versions"].items()) + f"; commit {setup['commit']}\n\n"
    return text + "Model: " + ", ".join(f"{k} {v}" for k, v in setup["model"].items()) + "\n\n"
