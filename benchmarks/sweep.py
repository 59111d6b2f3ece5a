"""Run `corda init`, `corda train` and `corda eval` over starts × learning rates × seeds, several at a time, and make a
table of what came out.

    python benchmarks/sweep.py RECIPE ... --model MODEL --data DATA --output RUNS [--jobs 5] [--gpus 0,1]
        [--results DIR]

RECIPE is a YAML file (see benchmarks/recipes/); `{data}` in it is the folder DATA. Every run is a directory in
RUNS/NAME, NAME the recipe's; what is there is not run again. `--jobs` run at a time on each of `--gpus`.
`--results DIR` writes DIR/NAME.json and .md with the numbers, commit, machine and versions (where there is no git,
$COMMIT says which).
"""

import argparse
import json
import os
import platform
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--gpus", default="", help="numbers of the GPUs to share the runs, such as 0,1,2")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    recipes = {path: yaml.safe_load(path.read_text().replace("{data}", str(options.data))) for path in options.recipes}
    slots: queue.Queue[str] = queue.Queue()
    for gpu in options.gpus.split(",") * options.jobs:  # [""]: whatever there is
        slots.put(gpu)
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    def corda(verb: str, where: Path, settings: dict[str, Any], **flags: Any) -> bool:
        """Run a verb unless its output is there; False (and a log beside it) if it failed."""
        if where.exists():
            return True
        config = where.parent / f"{where.name}.{verb}.yaml"
        config.write_text(yaml.safe_dump({**settings, **flags, "model": options.model, "output": str(where)}))
        gpu = slots.get()
        try:
            with open(where.parent / f"{where.name}.{verb}.log", "w") as log:
                command = [sys.executable, "-m", "corda_lora.cli", verb, "--config", str(config)]
                env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
                return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode == 0
        finally:
            slots.put(gpu)

    def prepare(path: Path, start: str) -> None:
        flags, where = recipes[path]["starts"][start], options.output / path.stem / start
        if flags is not None and not corda("init", where, recipes[path]["init"], **flags):
            say(f"{path.stem}: {start}: init failed")

    def run(path: Path, start: str, rate: float, seed: int) -> None:
        recipe, folder = recipes[path], options.output / path.stem
        where = folder / f"{start}_lr{rate:g}_s{seed}"
        given = {} if recipe["starts"][start] is None else {"start": str(folder / start)}
        done = (
            corda("train", where, recipe["train"], learning_rate=rate, seed=seed, **given)
            and corda("eval", folder / f"{where.name}.json", recipe["eval"], adapter=str(where))
        )  # fmt: skip
        say(f"{path.stem}: {where.name}: {'done' if done else 'FAILED'}")

    for path in recipes:
        (options.output / path.stem).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(slots.qsize()) as pool:
        list(pool.map(lambda pair: prepare(*pair), [(p, start) for p in recipes for start in recipes[p]["starts"]]))
        list(pool.map(lambda cell: run(*cell), [(p, *cell) for p in recipes for cell in cells(recipes[p])]))
    for path, recipe in recipes.items():
        rows = collect(recipe, options.output / path.stem)
        table = markdown(rows)
        print(f"{path.stem}\n{table}", flush=True)
        if options.results:
            write(options.results / path.stem, path, recipe, rows, table)


def write(name: Path, path: Path, recipe: dict[str, Any], rows: list[dict[str, Any]], table: str) -> None:
    """NAME.json and NAME.md."""
    setup = {
        "command": f"python benchmarks/sweep.py {path} --model MODEL --data DATA --output RUNS",
        "recipe": recipe,
        "commit": commit(),
        "machine": machine(),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "trl")},
    }
    name.parent.mkdir(parents=True, exist_ok=True)
    name.with_name(f"{name.name}.json").write_text(json.dumps({**setup, "rows": rows}, indent=1) + "\n")
    packages = ", ".join(f"{package} {v}" for package, v in setup["versions"].items())
    head = f"`{setup['command']}`\n\n{setup['machine']}; {packages}; commit {setup['commit']}"
    name.with_name(f"{name.name}.md").write_text(f"# {name.name}\n\n{head}\n\n{table}\n")


def cells(recipe: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(start, learning rate, seed) of every run."""
    for start, rates in recipe["learning_rates"].items():
        for rate in rates:
            for seed in recipe.get("seeds", [0]):
                yield start, float(rate), seed


def collect(recipe: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """One flat row a finished run."""
    rows = []
    for start, rate, seed in cells(recipe):
        path = output / f"{start}_lr{rate:g}_s{seed}.json"
        if not path.exists():
            continue
        row: dict[str, Any] = {"start": start, "learning_rate": rate, "seed": seed}
        for kind, datas in json.loads(path.read_text())["results"].items():
            for data, sides in datas.items():
                name = Path(data.split(" (")[0]).stem
                for side, numbers in sides.items():
                    row |= {f"{kind} {name} {side} {key}": value for key, value in numbers.items()}
        training = json.loads((output / path.name.removesuffix(".json") / "training.json").read_text())
        row["seconds"] = training["seconds"]
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tuned models' numbers, and the base model's in the first line."""
    if not rows:
        return "no run finished"
    wanted = {
        "keep": ("drift", "recall"),
        "learn": ("loss", "exact_match"),
        "text": ("drift",),
        "choices": ("accuracy",),
    }
    keys = [k for k in rows[0] if " tuned " in k and k.split()[-1] in wanted[k.split()[0]]]
    lines = ["| start | learning rate | seed | " + " | ".join(k.replace(" tuned", "") for k in keys) + " |"]
    lines.append("|" + "---|" * (len(keys) + 3))
    base = [f"{rows[0][b]:.4g}" if (b := k.replace(" tuned ", " base ")) in rows[0] else "0" for k in keys]
    lines.append("| base | | | " + " | ".join(base) + " |")
    for row in rows:
        numbers = " | ".join(f"{row[k]:.4g}" for k in keys)
        lines.append(f"| {row['start']} | {row['learning_rate']:g} | {row['seed']} | {numbers} |")
    return "\n".join(lines)


def commit() -> str:
    """The checkout's, or $COMMIT."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return os.environ.get("COMMIT") or found or "not in a checkout"


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
