"""Does every `corda init` and `corda train` end in an adapter that is right, or in one sentence?

    python benchmarks/property_verbs.py --examples 2000

Draws commands (rows, templates, options) on a tiny model as the test does (tests/commands.py), and counts how they end.
"""

import collections
import functools
import gc
import re
import sys
from pathlib import Path

import hypothesis
import record
import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import commands
import tiny

from corda_lora.cli import command


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command.build_parser = functools.cache(command.build_parser)  # it takes as long as the rest
    given = commands.given(tiny.character_tokenizer)
    gc.freeze()  # every training ends with a garbage collection
    ends: collections.Counter[str] = collections.Counter()
    drawn: set[str] = set()
    wrong: list[dict[str, str]] = []

    @hypothesis.seed(options.seed)
    @settings(
        max_examples=options.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(command=commands.commands())
    def run(command: commands.Command) -> None:
        drawn.add(repr(command))
        try:
            end = commands.outcome(command, given)
        except AssertionError as error:
            wrong.append({"command": repr(command), "why": str(error)})
            end = "wrong"
        ends[re.sub(r"'[^']*'|\d[\d,.]*|\[.*\]", "…", end)[:120]] += 1

    run()
    right, refused = ends.pop("right", 0), sum(ends.values()) - len(wrong)
    lines = [
        f"{right + refused + len(wrong):,} commands, {len(drawn):,} of them different: {right:,} came out right, "
        f"{refused:,} ended in one sentence, {len(wrong)} in neither.",
        "",
        "| times | the sentence |",
        "|---:|---|",
        *(f"| {count} | {text.replace('|', '/')} |" for text, count in ends.most_common() if text != "wrong"),
    ]
    record.write(
        options, {"right": right, "refused": refused, "wrong": wrong, "different": len(drawn), "ends": ends}, lines
    )


if __name__ == "__main__":
    main()
