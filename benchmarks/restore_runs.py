"""Lay a committed comparison out as the directory that `corda compare` goes on from: to add entries, rates or seeds.

    python benchmarks/restore_runs.py benchmarks/results/NAME/comparison.json OUTPUT

What is done is then not run again; the base model's outputs and the methods' starts are computed anew.
"""

import json
import sys
from pathlib import Path


def main(source: Path, output: Path) -> None:
    comparison = json.loads(source.read_text())
    for run in comparison["runs"]:
        if run["status"] in ("done", "diverged"):
            folder = output / "runs" / run["method"] / f"lr{run['learning_rate']:g}_s{run['seed']}"
            folder.mkdir(parents=True)
            run.setdefault("machine", comparison["machine"])  # which versions before did not note of each run
            (folder / "result.json").write_text(json.dumps(run, indent=1) + "\n")
    shared = {key: value for key, value in comparison["recipe"].items() if key != "methods"}
    recipe = {"shared": shared, "entries": comparison["recipe"]["methods"]}
    (output / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
