"""`corda plan RECIPE`: each entry's start is planned from what its method is shown, as the method itself chooses it."""

from pathlib import Path

import pytest
import tiny

from corda_lora import cli
from corda_lora.compare.plan import plan_comparison
from corda_lora.config import CompareConfig, CordaConfig, DataConfig, EvalConfig, MethodConfig, ModelConfig
from corda_lora.preprocess.machine import H100
from corda_lora.preprocess.plan import init_plan, planned_model, planned_tokens
from corda_lora.training.plan import ADAM


@pytest.fixture
def start_of(folder, checkpoint):
    """start_of(options, ...) → the entry that is planned with these options; start_of.expected(...) → what `init_plan`
    says of a start on these data."""
    source = ModelConfig(str(checkpoint))
    model = planned_model(source)
    (folder / "third.jsonl").write_text("".join((folder / "keep.jsonl").read_text().splitlines(True)[:5]))

    def planned(options, method="corda-kpm-anchored", modules_to_save=None, **settings):
        recipe = CompareConfig(
            {"entry": MethodConfig(method, options=options, **settings)},
            DataConfig("learn.jsonl"),
            EvalConfig(learn="learn.jsonl"),
            DataConfig("keep.jsonl"),
            context_samples=12,
            r=4,
            modules_to_save=modules_to_save,
        )
        (entry,) = plan_comparison(model, source, recipe, H100).entries
        return entry

    def expected(names, samples=12, **options):
        """(seconds, bytes, bytes on the disk), of a start on so many samples of each file."""
        config = CordaConfig(r=4, **options)
        datas = [DataConfig(f"{name}.jsonl", samples=samples) for name in names]
        tokens = planned_tokens(source, datas, config.rounds, 4096, False)
        plan = init_plan(model, config, tokens, "auto", H100, len(names))
        return plan.seconds, plan.peaks[0], plan.disk_bytes

    planned.expected = expected
    return planned


def of_start(entry):
    return entry.start_seconds, entry.start_bytes, entry.disk_bytes


@pytest.mark.parametrize("options", [{}, {"orientation": "two_sided"}, {"weights": "compactness"}])
def test_a_mixture_is_planned_from_all_of_its_contexts(start_of, options):
    both = [{"data": "learn.jsonl", "weight": 2}, {"data": "third.jsonl"}]
    planned = of_start(start_of({"contexts": both, "keep": 10, **options}))
    expected = start_of.expected(["learn", "third"], **{"orientation": "covariance", **options})
    assert planned == pytest.approx(expected, rel=1e-9)


def test_samples_of_a_context_win_over_those_of_the_entry(start_of):
    contexts = [{"data": "learn.jsonl", "samples": 20}, {"data": "keep.jsonl", "samples": 20}]
    planned = of_start(start_of({"contexts": contexts, "samples": 3}))
    assert planned == pytest.approx(start_of.expected(["learn", "keep"], 20), rel=1e-9)


def test_a_context_of_an_entry_is_planned_in_place_of_the_comparisons(start_of):
    assert of_start(start_of({"context": "third.jsonl"})) == pytest.approx(start_of.expected(["third"]), rel=1e-9)
    assert of_start(start_of({"contexts": [{"data": "third.jsonl"}]})) == of_start(start_of({"context": "third.jsonl"}))
    ipm = of_start(start_of({}, "corda-ipm-seeded"))
    assert ipm == pytest.approx(start_of.expected(["learn"], mode="ipm"), rel=1e-9)


def test_a_sweep_is_planned_with_the_starts_that_it_makes(start_of):
    """A price is swept with one start, made at the highest, which also decides about the orientation; samples with a
    start of each number."""
    priced = of_start(start_of({}, sweep={"keep": [3, 10]}, learning_rates=[1e-3]))
    assert priced == pytest.approx(start_of.expected(["keep"], orientation="two_sided"), rel=1e-9)
    few, more = (start_of.expected(["keep"], samples) for samples in (4, 40))
    swept = of_start(start_of({}, sweep={"samples": [4, 40]}, learning_rates=[1e-3]))
    assert swept == pytest.approx((few[0] + more[0], max(few[1], more[1]), few[2] + more[2]), rel=1e-9)


def test_modules_that_are_trained_whole_are_counted(start_of):
    """In the start's file and in training; those of an entry win over the comparison's."""
    expected = start_of.expected(["keep"], modules_to_save=["lm_head"])
    alone, whole = start_of({}), start_of({}, modules_to_save=["lm_head"])
    assert of_start(whole) == pytest.approx(expected, rel=1e-9)
    parameters = tiny.SIZE["vocab_size"] * tiny.SIZE["hidden_size"]
    assert whole.disk_bytes - alone.disk_bytes == 4 * parameters
    assert whole.train_bytes - alone.train_bytes == ADAM * parameters
    assert of_start(start_of({"modules_to_save": ["lm_head"]}, modules_to_save=["norm"])) == of_start(whole)


def test_contexts_that_are_not_here_count_as_samples_of_max_length(folder, recipe, capsys):
    path = Path(recipe({"lora": [1e-3, 2e-3]}))
    entry = "  mixed: {method: corda-kpm-anchored, options: {contexts: [{data: some/hub}, {data: other/rows}]}}\n"
    path.write_text(f"output: results\n{path.read_text()}{entry}")  # a recipe may also say where compare writes
    cli.main(["plan", str(path), "--gpu", "80GB"])
    assert "mixed" in capsys.readouterr().out
    assert not Path("results").exists()
