"""Steps of each method to the loss where the reference's curve ends, all at one learning rate, as papers often compare.

    python benchmarks/at_one_rate.py COMPARISON.json --rate 2e-5

`corda compare` itself reads the steps at each method's own best rate.
"""

import argparse
import json
from pathlib import Path

from corda_lora.compare.frontier import Setting, done_runs, learning_curve, mean_curve, reach, reference_order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--rate", type=float, required=True)
    options = parser.parse_args()
    comparison, at = json.loads(options.comparison.read_text()), Setting(options.rate)
    curves = {}
    for method in reference_order(comparison["methods"]):
        runs = done_runs(comparison, method, at)
        if curve := mean_curve([learning_curve(comparison, run) for run in runs]):
            curves[method] = curve
    if not curves:
        print(f"no run at {options.rate:g}")
        return
    reference = next(iter(curves))
    final = curves[reference][-1]
    print(f"| at {options.rate:g} | first loss | last | steps to {final.loss:.4f}, {reference}'s final loss |")
    print("|---|---:|---:|---:|")
    for method, curve in curves.items():
        steps = reach(comparison, method, at, final.loss).steps
        title = comparison["methods"][method]["title"]
        said = f"{steps.value:.0f} ({final.step / steps.value:.1f} times fewer)" if steps else "not reached"
        print(f"| {title} | {curve[0].loss:.4f} | {curve[-1].loss:.4f} | {said} |")


if __name__ == "__main__":
    main()
