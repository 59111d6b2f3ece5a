"""Results of benchmarks. Each says its command, commit, machine and versions, and is named NAME_DATE_DEVICE.

A script takes its options from `parser` and hands its tables to `write`, which makes a JSON and a Markdown file.
(torch is imported late: the peak memory of a process that a script starts counts the script's own memory.)
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "safetensors")
MODEL_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
    "dtype",
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark that writes a result."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--name", default=Path(sys.argv[0]).stem, help="of the result; default: the script's")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return made


def write(
    options: argparse.Namespace, data: Any, lines: Sequence[str], model: str | Path | None = None, **more: Any
) -> None:
    """Write the result as JSON and Markdown, and print its tables.

    Args:
        options: of `parser`: the name of the result and its folder.
        data: the numbers, for the JSON.
        lines: the tables, as Markdown.
        model: folder of the model that was measured, whose shape is noted.
        more: further facts about the run.
    """
    facts: dict[str, Any] = {
        "command": command(),
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key not in ("name", "results") and "/" not in str(value)
        },
        "commit": commit(),
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        **more,
    }
    if model is not None:
        config = json.loads((Path(model) / "config.json").read_text())
        facts["model"] = {key: config[key] for key in MODEL_KEYS if key in config}
    path = options.results / f"{options.name}_{datetime.date.today()}_{device_name()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.json").write_text(json.dumps({**facts, "rows": data}, indent=1) + "\n")
    head = [f"# {path.name}", "", "| | |", "|---|---|"]
    for key, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        head.append(f"| {key} | {f'`{shown}`' if key == 'command' else shown} |")
    text = "\n".join(lines)
    path.with_name(f"{path.name}.md").write_text("\n".join(head) + f"\n\n{text}\n")
    print(f"{text}\n\nwritten to {path}.json and .md")


def command() -> str:
    """The command that runs, with paths replaced by the names of their options: `--model MODEL`."""
    words = [f"python benchmarks/{Path(sys.argv[0]).name}"]
    option = "path"
    for word in sys.argv[1:]:
        words.append(option.upper() if "/" in word or Path(word).exists() else word)
        if word.startswith("--"):
            option = word.strip("-")
    return " ".join(words)


def commit() -> str:
    """The checkout's commit, or $COMMIT."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return os.environ.get("COMMIT") or git.stdout.strip() or "not in a checkout"


def machine() -> str:
    """Accelerator, processor, cores and memory."""
    import psutil
    import torch

    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    parts = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join(
        [*parts, platform.machine(), f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads", memory]
    )


def device_name() -> str:
    """The device in the names of results, such as h200 or cpu."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    model = re.search(r"[A-Z]+\d+\w*", name)
    return (model[0] if model else name.replace(" ", "-")).lower()
