"""The benchmarks run by hand; here their imports are checked, and the module that writes their results."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from corda_lora.cli.command import instantiate
from corda_lora.cli.parser import build_parser
from corda_lora.cli.shared import take
from corda_lora.compare.comparison import Comparison
from corda_lora.compare.runner import check_methods
from corda_lora.config import CompareConfig, ModelConfig
from corda_lora.methods.registry import METHODS

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_a_benchmark_finds_what_it_imports(name, load):
    load(name)


def test_a_result_says_how_it_was_made(load, checkpoint, tmp_path, monkeypatch):
    record = load("record")
    monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py", "--r", "8", "--work", "made", "--results", str(tmp_path)])
    monkeypatch.setenv("COMMIT", "abc1234")
    options = record.parser("")
    options.add_argument("--r", type=int)
    options.add_argument("--work", type=Path)
    record.write(options.parse_args(), {"seconds": 1.5}, ["| seconds |", "|---:|", "| 1.5 |"], checkpoint)
    (result,) = tmp_path.glob("speed_20??-??-??_*.json")
    written = json.loads(result.read_text())
    assert written["command"] == "python benchmarks/speed.py --r 8 --work made --results RESULTS"
    assert written["options"] == {"r": 8, "work": "made"}
    assert written["commit"] == "abc1234"
    assert written["rows"] == {"seconds": 1.5}
    assert written["versions"]["torch"]
    assert written["machine"]
    assert written["model"]["hidden_size"] == 32
    text = result.with_suffix(".md").read_text()
    assert text.startswith(f"# {result.stem}\n")
    assert "abc1234" in text
    assert text.endswith("| 1.5 |\n")


def comparison(**methods):
    """A comparison whose runs are [learning rate, status, loss]."""
    whole = json.loads((FOLDER / "results" / "demo_2026-11-29_cpu" / "comparison.json").read_text())
    whole["methods"] = {name: {"title": name} for name in methods}
    whole["recipe"]["methods"] = {name: {"method": name} for name in methods}
    whole["runs"] = [
        {"method": name, "learning_rate": rate, "seed": 0, "status": status, "loss": loss, "commit": f"of-{name}"}
        for name, runs in methods.items()
        for rate, status, loss in runs
    ]
    return whole


def test_runs_of_several_calls_are_put_together(load):
    merge = load("merge_runs").merge
    first = comparison(lora=[[1e-3, "done", 1.0], [2e-3, "diverged", None]], corda=[[1e-2, "not run", None]])
    second = comparison(lora=[[1e-3, "done", 1.1], [5e-3, "not run", None]], pissa=[[1e-3, "done", 1.2]])
    second["recipe"]["train"]["micro_batch_size"], second["machine"] = 4, "another"
    merged = merge([first, second])
    runs = [(run["method"], run["learning_rate"], run["loss"]) for run in merged["runs"]]
    assert runs == [("lora", 1e-3, 1.1), ("lora", 2e-3, None), ("pissa", 1e-3, 1.2)]  # the later one of the same run
    assert merged["methods"].keys() == {"lora", "pissa"}
    assert merged["commit"] == "of-lora, of-pissa"
    assert merged["machine"] == f"another, {first['machine']}"
    second["recipe"]["methods"]["lora"] = {"method": "lora", "options": {"r": 8}}
    with pytest.raises(SystemExit, match="different settings of lora"):
        merge([first, second])
    second["recipe"]["train"]["batch_size"] = 4
    with pytest.raises(SystemExit, match="different recipes"):
        merge([first, second])


def test_sweeps_run_each_recipe_once_and_none_that_is_done(load, tmp_path, monkeypatch):
    """Two slots; what is committed of a recipe is restored when the command has made the folder, but for one commit and
    for an entry that is another now."""
    sweeps = load("sweeps")
    monkeypatch.setattr(sweeps, "HERE", tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)  # no MPS
    (tmp_path / "results" / "b_2026-11-29_cpu").mkdir(parents=True)
    runs = {"lora": [[1e-3, "done", 1.0], [2e-3, "failed", None]], "corda": [[1e-2, "done", 1.1]]}
    done = comparison(**runs, pissa=[[1e-3, "done", 1.2]])
    (tmp_path / "results" / "b_2026-11-29_cpu" / "comparison.json").write_text(json.dumps(done))
    ran = []

    def run(command, env, **rest):
        recipe, output, gpu, jobs = (command[command.index(k) + 1] for k in ("compare", "--output", "--gpus", "--jobs"))
        ran.append((Path(recipe).stem, jobs))
        assert (gpu, env["OMP_NUM_THREADS"]) in (("0", "1"), ("1", "1"))
        if jobs == "0":
            Path(output).mkdir()
            entries = done["recipe"]["methods"] | {
                "corda": {"method": "corda", "options": {"orientation": "two_sided"}}
            }
            (Path(output) / "recipe.json").write_text(json.dumps({"entries": entries}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("subprocess.run", run)
    options = ["--output", str(tmp_path / "out"), "--slots", "0:4", "1:4", "--without", "of-pissa", "--"]
    monkeypatch.setattr(sys, "argv", ["sweeps.py", *options, "a", "b", "c.yaml"])
    sweeps.main()
    assert sorted(ran) == [("a", "4"), ("b", "0"), ("b", "4"), ("c", "4")]
    restored = sorted(path.parent.relative_to(tmp_path / "out") for path in tmp_path.glob("out/**/result.json"))
    assert restored == [Path("b/runs/lora/lr0.001_s0")]


RECIPES = sorted(FOLDER.glob("recipes/*.yaml"))


def comparison_of(recipe, output):
    """A recipe as `corda compare` reads it."""
    parser, _ = build_parser()
    options = parser.parse_args(["compare", "--config", str(recipe), "--output", str(output)])
    options = instantiate(parser, options)["compare"]
    return Comparison(take(ModelConfig, options), take(CompareConfig, options), output)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_one_of_corda_compare(recipe, tmp_path):
    compared = comparison_of(recipe, tmp_path)
    assert {entry.method for entry in compared.recipe.entries.values()} <= METHODS.keys()
    check_methods(compared.recipe)


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem != "demo"], ids=lambda path: path.stem)
def test_committed_results_are_of_the_entries_of_their_recipe(recipe, load, tmp_path):
    """So the recipe goes on from them, and nobody reads results of one start for another's: the default of orientation
    has changed. (The demo has the new one.)"""
    for result in FOLDER.glob(f"results/{recipe.stem}_20*/comparison.json"):
        output = tmp_path / result.parent.name
        output.mkdir()
        load("restore_runs").main(result, output)
        were, keys = json.loads((output / "recipe.json").read_text())["entries"], comparison_of(recipe, output).keys()
        same = were.keys() & keys.keys()
        assert {name: json.loads(json.dumps(keys[name])) for name in same} == {name: were[name] for name in same}
