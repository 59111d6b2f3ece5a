"""Turn a committed comparison back into the directory of its runs, so that `corda compare` can add to it.

    python benchmarks/restore_runs.py benchmarks/results/NAME/comparison.json OUTPUT

`corda compare` does not run again what is done. It computes the base model's outputs and the methods' starts anew.
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from corda_lora.compare.frontier import setting_of
from corda_lora.compare.schedule import Job


def main(source: Path, output: Path) -> None:
    restore_runs(source, output)
    comparison = json.loads(source.read_text())
    shared = {key: value for key, value in comparison["recipe"].items() if key != "methods"}
    recipe = {"shared": shared, "entries": comparison["recipe"]["methods"]}
    (output / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


def restore_runs(
    source: Path, output: Path, without: Collection[str] = (), entries: dict[str, Any] | None = None
) -> None:
    """Write the results of the runs that are done, but for those of the commits `without`.

    Args:
        entries: of the recipe that goes on, as recipe.json has them: runs of an entry that is another there are left
            out, as of one whose defaults have changed.
    """
    comparison = json.loads(source.read_text())
    was = comparison["recipe"]["methods"]
    changed = {name for name in was.keys() & (entries or {}).keys() if was[name] != (entries or {})[name]}
    for run in comparison["runs"]:
        if run["method"] in changed:
            continue
        if run["status"] in ("done", "diverged") and run.get("commit", comparison["commit"]) not in without:
            setting = setting_of(run)
            folder = output / Job(run["method"], setting.rate, run["seed"], setting.swept).folder
            folder.mkdir(parents=True)
            run.setdefault("machine", comparison["machine"])  # earlier versions did not note it for each run
            (folder / "result.json").write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
