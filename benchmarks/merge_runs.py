"""Put together what several calls did of one comparison, and write its report.

    python benchmarks/merge_runs.py OUTPUT COMPARISON.json [COMPARISON.json ...]

Runs that were scheduled and not made are left out. The comparisons must share their recipe but for which methods and
seeds they have, and options that came later; and for micro_batch_size, as a step's gradient is the same however its
batch is cut.
"""

import json
import sys
from pathlib import Path
from typing import Any

from corda_lora.config.recorded import same_options
from corda_lora.report.report import write_report


def merge(comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    merged = comparisons[-1]
    shared = [_shared(comparison["recipe"]) for comparison in comparisons]
    if not all(same_options(recipe, shared[0]) for recipe in shared):
        raise SystemExit("the comparisons have different recipes")
    runs: dict[str, Any] = {}
    for comparison in comparisons:
        merged["methods"] = comparison["methods"] | merged["methods"]
        ours, others = comparison["recipe"]["methods"], merged["recipe"]["methods"]
        if odd := [name for name in ours.keys() & others.keys() if ours[name] != others[name]]:
            raise SystemExit(f"the comparisons have different settings of {min(odd)}")
        merged["recipe"]["methods"] = ours | others
        for run in comparison["runs"]:
            if run["status"] in ("done", "diverged"):
                runs[json.dumps([run["method"], run.get("swept"), run["learning_rate"], run["seed"]])] = run
    merged["runs"] = list(runs.values())
    merged["methods"] = {m: v for m, v in merged["methods"].items() if any(r["method"] == m for r in merged["runs"])}
    merged["commit"] = ", ".join(sorted({run["commit"] for run in merged["runs"] if run.get("commit")}))
    merged["machine"] = ", ".join(sorted({each["machine"] for each in comparisons if each["machine"]})) or None
    return merged


def _shared(recipe: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in recipe.items() if key not in ("methods", "seeds")}
    return settings | {"train": settings["train"] | {"micro_batch_size": None}}


def main(output: Path, sources: list[Path]) -> None:
    merged = merge([json.loads(path.read_text()) for path in sources])
    merged["name"] = output.name.partition("_20")[0]
    write_report(output, merged)
    (output / "comparison.json").write_text(json.dumps(merged) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
