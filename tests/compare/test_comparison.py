"""Damage in a comparison's directory is refused by the file's name before anything runs."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from corda_lora.compare.comparison import Comparison
from corda_lora.compare.schedule import Job
from corda_lora.config import CompareConfig, CordaError, DataConfig, EvalConfig, MethodConfig, ModelConfig


@pytest.fixture
def comparison(tmp_path):
    """Opened once, with the base model's outputs and the preparation of an entry."""
    recipe = CompareConfig(["lora", "eva"], "learn.jsonl", EvalConfig(learn="learn.jsonl"))
    comparison = Comparison(ModelConfig("m"), recipe, tmp_path / "out")
    comparison.open()
    for job, name in ((Job(), "base"), (Job("eva"), "prepared"), (Job("lora", 1e-3), "")):
        comparison.folder(job).mkdir(parents=True)
        if name:
            save_file({"x": torch.ones(3)}, comparison.folder(job) / f"{name}.safetensors")
        comparison.write_result(job, {"status": "done"})
    comparison.open()
    return comparison


@pytest.mark.parametrize("file", ["base/base.safetensors", "starts/eva/prepared.safetensors"])
def test_a_changed_tensor(file, comparison):
    path = comparison.output / file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CordaError, match=rf"{file} is damaged: remove .*{path.parent.name}, to have it made again"):
        comparison.open()
    path.unlink()
    with pytest.raises(CordaError, match=rf"{file} is missing: remove .*{path.parent.name}, to have it made again"):
        comparison.open()


@pytest.mark.parametrize("file", ["recipe.json", "base/result.json", "starts/eva/result.json"])
@pytest.mark.parametrize("content", ['{"sta', "[]", "{}"])
def test_json_that_is_cut_short_or_of_something_else(file, content, comparison):
    (comparison.output / file).write_text(content)
    with pytest.raises(CordaError, match=f"{file} is damaged"):
        comparison.open()


def test_runs_of_an_earlier_version_whose_start_was_another(tmp_path):
    """Without an orientation in recipe.json the start was of the covariance, whatever the price."""
    names = ("kept", "swept")
    kept = {"method": "corda-kpm-anchored", "options": {"keep": 10}}
    swept = {"method": "corda-kpm-anchored", "options": {}, "sweep": {"keep": [0, 3]}}

    def opened(**options):
        entries = [MethodConfig(**each | {"options": each["options"] | options}) for each in (kept, swept)]
        recipe = CompareConfig(dict(zip(names, entries)), "learn.jsonl", EvalConfig(learn="l.jsonl"), "keep.jsonl")
        comparison = Comparison(ModelConfig("m"), recipe, tmp_path / "out")
        comparison.open()
        return json.loads((tmp_path / "out" / "recipe.json").read_text())["entries"]

    before = dict(zip(names, ({"method": each["method"], "options": each["options"]} for each in (kept, swept))))
    assert opened(orientation="covariance") == before
    differ = [f"{name}.options.orientation was 'covariance' there and is 'two_sided' here" for name in names]
    said = (
        f"another recipe ({'; '.join(differ)}): give kept, swept the option `orientation: covariance` to go on with it"
    )
    with pytest.raises(CordaError, match=re.escape(f"{said}, or remove it")):
        opened()
    with pytest.raises(CordaError, match=r"swept.options.damping was not set there and is 0.1 here\): remove it, or"):
        opened(damping=0.1)  # with the orientation alone it would be another recipe even so
    (tmp_path / "out" / "recipe.json").unlink()
    assert opened() == opened(orientation="two_sided")
    assert [entry["options"]["orientation"] for entry in opened().values()] == ["two_sided", "two_sided"]
    with pytest.raises(
        CordaError, match=r"'two_sided' there and is 'covariance' here\): give .* `orientation: two_sided`"
    ):
        opened(orientation="covariance")


@pytest.mark.parametrize(("method", "orientation"), [("corda-kpm-anchored", "covariance"), ("milora", "identity")])
def test_runs_of_an_earlier_version_whose_orientation_was_written_out(method, orientation, tmp_path):
    """It wrote what was given, at its default or not."""
    entry = MethodConfig(method, options={"orientation": orientation})
    recipe = CompareConfig({"ours": entry}, "learn.jsonl", EvalConfig(learn="l.jsonl"), "keep.jsonl")
    comparison, path = Comparison(ModelConfig("m"), recipe, tmp_path / "out"), tmp_path / "out" / "recipe.json"
    comparison.open()
    first = json.loads(path.read_text())

    def opened(**key):
        path.write_text(json.dumps(first | {"entries": {"ours": key}}))
        comparison.open()
        return json.loads(path.read_text())

    assert opened(method=method, options={"orientation": orientation}) == first
    for other, said in (
        (
            {"options": {"orientation": "diagonal"}},
            f"options.orientation was 'diagonal' there and is '{orientation}' here",
        ),
        ({"method": "gone"}, f"method was 'gone' there and is '{method}' here"),
    ):
        with pytest.raises(CordaError, match=f"another recipe \\(ours.{said}"):
            opened(**{"method": method, "options": {}} | other)


@pytest.mark.parametrize(
    ("option", "values", "orientations"),
    [
        ("split", ["paper", "anchored"], ["two_sided", "covariance"]),
        ("rounds", [1, 2], ["two_sided", "covariance"]),
        ("keep", [0, 3], "two_sided"),  # all prices share a start
        ("damping", [0.01, 0.1], "two_sided"),
        ("orientation", ["two_sided", "covariance"], None),
    ],
)
def test_each_start_of_a_sweep_has_its_orientation_recorded(option, values, orientations, tmp_path):
    """Of an earlier version all were of the covariance."""
    entry = MethodConfig("corda-kpm-anchored", options={"keep": 3} if option != "keep" else {}, sweep={option: values})
    recipe = CompareConfig({"swept": entry}, "learn.jsonl", EvalConfig(learn="l.jsonl"), "keep.jsonl")
    key = Comparison(ModelConfig("m"), recipe, tmp_path / "out").keys()["swept"]
    assert key["options"].get("orientation") == orientations


def test_an_orientation_that_no_option_gives_back(tmp_path):
    """A swept option decided about it, or it is swept itself: the sentence offers no option that would not help."""
    path = tmp_path / "out" / "recipe.json"

    def opened(**entry):
        ours = MethodConfig("corda-kpm-anchored", **entry)
        recipe = CompareConfig({"ours": ours}, "learn.jsonl", EvalConfig(learn="l.jsonl"), "keep.jsonl")
        Comparison(ModelConfig("m"), recipe, tmp_path / "out").open()

    swept = {"options": {"keep": 3}, "sweep": {"rounds": [1, 2]}}
    opened(**swept)
    with pytest.raises(
        CordaError, match=r"was \['two_sided', 'covariance'\] there and is 'covariance' here\): remove it"
    ):
        opened(options={"keep": 3, "orientation": "covariance"}, sweep=swept["sweep"])
    path.unlink()
    opened(options={"keep": 3})
    with pytest.raises(CordaError, match=r"orientation was 'two_sided' there and is not set here\): remove it"):
        opened(options={"keep": 3}, sweep={"orientation": ["two_sided", "covariance"]})


def test_runs_of_an_earlier_version_that_had_fewer_options(tmp_path):
    """What is not in recipe.json came later. The runs go on if it is as it was then: at its default."""
    eval_config = EvalConfig(learn="learn.jsonl", keep=[DataConfig("keep.jsonl", samples=7)])
    recipe = CompareConfig(["lora"], DataConfig("learn.jsonl"), eval_config)
    Comparison(ModelConfig("m"), recipe, tmp_path / "out").open()
    path = tmp_path / "out" / "recipe.json"
    made = json.loads(path.read_text())
    shared = made["shared"]
    for settings, option in (
        (shared, "curve_samples"),
        (shared["model"], "revision"),
        (shared["eval"], "judge"),
        (shared["eval"]["keep"][0], "turns"),
        (shared["data"], "chat"),
        (shared["train"], "compile"),
    ):
        del settings[option]
    path.write_text(json.dumps(made))
    Comparison(ModelConfig("m"), recipe, tmp_path / "out").open()
    path.write_text(json.dumps(made))
    with pytest.raises(CordaError, match=r"another recipe \(curve_samples was None there and is 3 here\)"):
        Comparison(ModelConfig("m"), replace(recipe, curve_samples=3), tmp_path / "out").open()
    made["shared"]["base"] = "merged"  # an option that has gone since
    path.write_text(json.dumps(made))
    with pytest.raises(CordaError, match=r"another recipe \(base was 'merged' there\): remove it"):
        Comparison(ModelConfig("m"), recipe, tmp_path / "out").open()
