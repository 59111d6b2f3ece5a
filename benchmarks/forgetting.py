"""PEFT's `forgetting` out of a comparison: the rise of the loss on running text, for each method at its best setting.

    python benchmarks/forgetting.py COMPARISON.json [--methods lora osf ...]

The running text is the first under `eval: text`. PEFT's own measure is on Wikipedia's articles: see
method_comparison/MetaMathQA/run.py of huggingface/peft.
"""

import argparse
import json
from pathlib import Path

from corda_lora.compare.frontier import Estimate, best_setting, done_runs, exponential, log_drift, mean_interval
from corda_lora.report.text import number, setting_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--methods", nargs="+", help="entries to show; else all")
    options = parser.parse_args()
    comparison = json.loads(options.comparison.read_text())
    (text, before), *_ = comparison["base"]["text"].items()
    print(f"| {text}: {before['loss']:.4f} nats a token before | seeds | task loss | forgetting | drift |")
    print("|---|---:|---:|---:|---:|")
    for method in options.methods or comparison["methods"]:
        if (best := best_setting(comparison, method)) is None:
            continue
        after = [run["results"]["text"][text] for run in done_runs(comparison, method, best.setting)]
        rise = mean_interval([values["loss"] - before["loss"] for values in after])
        drift = exponential(mean_interval([log_drift(values["drift"]) for values in after]))
        title = comparison["methods"][method]["title"]
        cells = [f"{title}, {setting_text(best.setting)}", str(rise.seeds), f"{best.loss.value:.4f}{half(best.loss)}"]
        print(f"| {' | '.join(cells)} | {rise.value:+.4f}{half(rise)} | {number(drift.value)} |")


def half(e: Estimate) -> str:
    """Half of the 95 % interval over seeds, as text."""
    return "" if e.high is None else f" ± {e.high - e.value:.4f}"


if __name__ == "__main__":
    main()
