"""CorDA++ from end to end: budgets and limits, and adapters whose ranks differ, through PEFT and every export."""

import copy
import json

import pytest
import tiny
import torch
from peft import PeftModel

from corda_lora import CordaConfig, CordaError
from corda_lora.adapters.export import export_lora, export_merged, export_residual
from corda_lora.adapters.lora import install, lora_layers, save_adapter
from corda_lora.cli import main
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_shape
from corda_lora.preprocess.pipeline import preprocess

LLAMA_COST = sum(sum(weight_shape(m)) for m in find_targets(tiny.build("llama"), "all-linear").values())


def started(split, mode="kpm", **options):
    model = tiny.build("llama")
    config = CordaConfig(**{"mode": mode, "split": split, "preset": "corda+", "r": 4, "lora_alpha": 6} | options)
    return model, preprocess(model, config, 2 * tiny.batches(), progress=False)


def trained(adapted):
    """Every trained weight moved by a random step, as training would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


@pytest.mark.parametrize("split", ["anchored", "seeded", "balanced", "paper"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_ranks_differ_and_plain_peft_reads_them(mode, split, tmp_path):
    model, start = started(split, mode)
    ranks = {name: layer.record.r for name, layer in start.layers.items()}
    assert len(set(ranks.values())) > 2
    before = tiny.logits(model)
    adapted = install(copy.deepcopy(model), start).eval()
    assert torch.equal(tiny.logits(adapted), before)
    assert {layer.scaling["default"] for layer in lora_layers(adapted).values()} == {1.5}
    trained(adapted)
    moved = tiny.logits(adapted)
    assert (moved - before).abs().max() > 0.01

    save_adapter(adapted, tmp_path / "a", {"corda.json": start.record})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    times = 1 if split in ("anchored", "seeded") else 2
    assert {n: config["rank_pattern"].get(n, config["r"]) for n in ranks} == {n: times * r for n, r in ranks.items()}
    assert {n: config["alpha_pattern"].get(n, config["lora_alpha"]) for n in ranks} == {
        n: 1.5 * times * r for n, r in ranks.items()
    }
    plain = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a")).eval()
    torch.testing.assert_close(tiny.logits(plain), moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", ["anchored", "balanced"])
def test_every_export_of_an_allocated_adapter(split, tmp_path):
    model, start = started(split)
    adapted = trained(install(copy.deepcopy(model), start))
    moved = tiny.logits(adapted)
    save_adapter(adapted, tmp_path / "a", {"corda.json": start.record})
    export_merged(copy.deepcopy(model), tmp_path / "a", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged), moved, rtol=0, atol=1e-4)
    if split == "balanced":
        export_residual(copy.deepcopy(model), tmp_path / "a", tmp_path / "residual")
        residual = type(model).from_pretrained(tmp_path / "residual")
        residual = PeftModel.from_pretrained(residual, str(tmp_path / "residual" / "adapter")).eval()
        torch.testing.assert_close(tiny.logits(residual), moved, rtol=0, atol=1e-4)

    largest = max(layer.r["default"] for layer in lora_layers(adapted).values())
    assert export_lora(copy.deepcopy(model), tmp_path / "a", tmp_path / "whole", r=largest) < 1e-6
    same = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "whole")).eval()
    torch.testing.assert_close(tiny.logits(same), moved, rtol=0, atol=1e-4)
    error = export_lora(copy.deepcopy(model), tmp_path / "a", tmp_path / "less", r=largest - 1)
    less = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "less"))
    kept = {n: layer.r["default"] for n, layer in lora_layers(less).items()}
    was = {n: layer.r["default"] for n, layer in lora_layers(adapted).items()}
    R = {n: min(record["shape"]) for n, record in start.record["layers"].items()}
    assert kept == {n: min(r, largest - 1, R[n]) for n, r in was.items()}
    change = [(lora_layers(m)[n].get_delta_weight("default").double()) for n in kept for m in (adapted, less)]
    off = sum(((a - b) ** 2).sum() for a, b in zip(change[::2], change[1::2]))
    assert error == pytest.approx(
        float((off / sum((a**2).sum() for a in change[::2])).sqrt().detach()), rel=1e-3, abs=1e-6
    )


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"r": 3}, 3 * LLAMA_COST),
        ({"budget": 2000}, 2000),
        ({"budget": 0.1}, int(0.1 * sum(p.numel() for p in tiny.build("llama").parameters()))),
    ],
)
def test_the_budget_is_met(mode, options, budget):
    _, start = started("balanced", mode, **options)
    spent = sum(r["r"] * sum(r["shape"]) for r in start.record["layers"].values())
    assert start.record["totals"]["parameters"] == spent
    assert budget - 80 < spent <= budget  # the largest component has 80 parameters


def test_limits_on_ranks():
    _, start = started("anchored", min_rank=3, max_rank=6)
    ranks = [record["r"] for record in start.record["layers"].values()]
    assert min(ranks) == 3
    assert max(ranks) == 6


def test_presets_set_rounds_and_what_is_given_beside_them_wins():
    def rounds_and_allocation(**options):
        config = CordaConfig(**options)
        return config.rounds, config.allocates

    assert rounds_and_allocation() == (1, False)
    assert rounds_and_allocation(preset="corda+") == (1, True)
    assert rounds_and_allocation(preset="corda++") == (5, True)
    assert rounds_and_allocation(preset="corda++", rounds=2) == (2, True)
    assert rounds_and_allocation(preset="corda", rounds=3) == (3, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 600}, r"the budget is 600 parameters, but min_rank 1 in each of 14 layers takes 928"),
        ({"min_rank": 5}, r"the budget is 3,712 parameters, but min_rank 5 in each of 14 layers takes 4,640"),
        ({"budget": 1e6}, r"the budget is 1,000,000 parameters, but all components that may be chosen have"),
        ({"max_rank": 3}, r"the budget is 3,712 parameters, but all components that may be chosen have 2,784"),
        ({"preset": "corda++++"}, "preset is 'corda\\+\\+\\+\\+', but must be one of corda, corda\\+, corda\\+\\+"),
        ({"min_rank": 5, "max_rank": 4}, "min_rank 5 and max_rank 4 leave no rank to allocate"),
        ({"preset": "corda", "max_rank": 4}, "go with rank allocation: preset corda\\+ or corda\\+\\+"),
        ({"budget": -1}, "budget is -1, but must be a number at least 1e-09"),
        ({"rounds": 0}, "rounds is 0, but must be a whole number at least 1"),
        ({"rounds": 2, "orientation": "identity"}, "there are no rounds of it to choose from"),
    ],
)
def test_what_cannot_be_allocated_is_refused_before_the_forward(options, message):
    model = tiny.build("llama")
    model.forward = None  # so a forward would fail otherwise

    def run():
        preprocess(model, CordaConfig(**{"preset": "corda+", "r": 4} | options), tiny.batches(), progress=False)

    with pytest.raises(CordaError, match=message):
        run()


def test_the_record_and_the_summary_tell_what_was_chosen(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rows = [{"text": f"The capital of {a}{i} is {b}."} for i, (a, b) in enumerate(["xy", "uv", "pq"] * 20)]
    (tmp_path / "context.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--model", str(checkpoint), "--context", str(tmp_path / "context.jsonl"), "--output", str(tmp_path / "s")]
    main(["init", *where, "--preset", "corda++", "--rounds", "2", "--samples", "20", "--r", "4"])
    out = capsys.readouterr().out
    assert "corda++, kpm, anchored, covariance, " in out
    for word in ("rounds", "rank", "energy", "leak", "q_proj", "down_proj"):
        assert word in out
    record = json.loads((tmp_path / "s" / "corda.json").read_text())
    assert record["context"]["rounds"] == 2
    for layer in record["layers"].values():
        assert layer["round"] == layer["scores"].index(min(layer["scores"]))
        assert {"r", "log_pi", "energy_share", "leak", "output_energy"} <= layer.keys()
        assert 0 <= layer["energy_share"] <= 1
    energies = [
        (layer["energy_share"] * layer["output_energy"], layer["output_energy"]) for layer in record["layers"].values()
    ]
    share = sum(e for e, _ in energies) / sum(w for _, w in energies)
    assert record["totals"]["energy_share"] == pytest.approx(share)
    assert "seconds" not in record
    assert json.loads((tmp_path / "s" / "timing.json").read_text())["seconds"]["all"] > 0


@pytest.mark.parametrize("work", ["extremes_of", "decompose_layer"])
def test_decomposed_where_float64_is(work, monkeypatch):
    """As on a GPU without it: selection and decomposition are told of another device than the model's."""

    class StopError(Exception):
        pass

    def stop(first, second, third, *_):
        raise StopError(third.type if work == "extremes_of" else first.device.type)

    monkeypatch.setattr("corda_lora.preprocess.pipeline.double_device", lambda device: torch.device("meta"))
    monkeypatch.setattr(f"corda_lora.preprocess.pipeline.{work}", stop)
    with pytest.raises(StopError, match="meta"):
        started("anchored", preset="corda+" if work == "extremes_of" else "corda")


def test_a_damping_that_leaves_a_covariance_singular():
    few = [{key: value[:1, :8] for key, value in tiny.batches()[0].items()}]
    config = CordaConfig(preset="corda+", r=4)
    config.damping = 1e-20  # below what the command line takes
    with pytest.raises(CordaError, match="raise --damping"):
        preprocess(tiny.build("llama"), config, few, progress=False)
