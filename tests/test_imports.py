"""Who imports whom in the package, at the top of a module or inside a function."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import corda_lora

ROOT = Path(corda_lora.__file__).parent

# A module imports from its own level and the levels above it here. A circle is found all the same.
LEVELS = [
    {"version", "config", "recipes", "devices", "files", "processes", "progress"},
    {"algebra"},
    {"models"},
    {"data"},
    {"preprocess"},
    {"peft"},
    {"adapters"},
    {"training"},
    {"evaluation"},
    {"tune"},
    {"methods", "inspection"},
    {"compare"},
    {"report"},
    {"__init__"},
    {"demo"},
    {"cli"},
    {"__main__"},
]


def imports_of(path: Path, package: list[str]) -> Iterator[str]:
    """The dotted names that a file imports. `from a import b` gives a.b, which may be a module or not. Imports that are
    for type checkers only do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, name.name]) for name in node.names)


def graph() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """For each module of the package, those of the package that it imports, and the other packages."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = ["corda_lora", *path.relative_to(ROOT).with_suffix("").parts]
        modules[".".join(parts)] = path
    inside, outside = {}, {}
    for module, path in modules.items():
        inside[module], outside[module] = set(), set()
        for name in imports_of(path, module.split(".")[:-1]):
            if not name.startswith("corda_lora"):
                outside[module].add(name.split(".")[0])
                continue
            parent = name.rpartition(".")[0]
            itself = {name, f"{name}.__init__"} & modules.keys()
            inside[module] |= itself or {parent, f"{parent}.__init__"} & modules.keys()
    return inside, outside


INSIDE, OUTSIDE = graph()


def part_of(module: str) -> str:
    """The folder of a module, or its name if it is in none."""
    return module.split(".")[1]


def test_no_import_goes_round_in_a_circle():
    assert len(list(TopologicalSorter(INSIDE).static_order())) == len(INSIDE)


def test_no_import_runs_against_the_order_of_the_folders():
    level = {part: i for i, parts in enumerate(LEVELS) for part in parts}
    assert {part_of(module) for module in INSIDE} <= level.keys(), "give a new folder its level"
    against = [
        f"{module} imports {other}"
        for module, others in INSIDE.items()
        for other in others
        if level[part_of(other)] > level[part_of(module)]
    ]
    assert not against


def test_the_algebra_knows_of_no_model():
    reached, waiting = set(), [module for module in INSIDE if part_of(module) == "algebra"]
    assert waiting
    while waiting:
        module = waiting.pop()
        reached.add(module)
        assert not OUTSIDE[module] & {"transformers", "peft"}, module
        waiting += INSIDE[module] - reached
