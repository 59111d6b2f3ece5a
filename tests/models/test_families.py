"""Every family of models: covariances to the bit, the start exact, the head left alone."""

import copy
import warnings
from collections import defaultdict

import pytest
import tiny
import torch
import transformers
from torch import nn

from corda_lora import CordaConfig, get_corda_model
from corda_lora.adapters.lora import install, lora_layers
from corda_lora.algebra.covariance import Covariance
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.pipeline import preprocess

CPU = torch.device("cpu")
CASES = [(family, False) for family in tiny.FAMILIES] + [("t5", True)]
SHARED = {
    "gpt2_conv1d": [],
    "bert": ["query", "key", "value"],
    "roberta": ["query", "key", "value"],
    "t5": ["q", "k", "v"],
}


def inputs(model, batch):
    """What each target layer is given in a plain forward."""
    found = {}
    targets = find_targets(model, "all-linear")
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0]))
        for name, module in targets.items()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def real_rows(name, x, batch):
    """The rows of `x` that are not padding: by hand, from what each layer of each family is given."""
    if x.shape[0] == len(batch["input_ids"]) and x.ndim == 2:  # one pooled vector a sample
        return x
    mask = batch["attention_mask"]
    cross = "EncDecAttention" in name and name[-2:] in (".k", ".v")
    if name.startswith("decoder.") and not cross:
        mask = batch["labels"] != -100
    x = x.reshape(*mask.shape, -1)
    return torch.cat([row[keep.bool()] for row, keep in zip(x, mask)])


@pytest.mark.parametrize(("family", "equal"), CASES)
def test_covariances_are_those_of_a_plain_forward_to_the_bit(family, equal):
    """The same rows in the same order: summed by one function, they come to the same bits on every processor."""
    model, batches = tiny.build(family), tiny.batches(family, equal)
    expected, exact = defaultdict(Covariance), {}
    for batch in batches:
        for name, x in inputs(model, batch).items():
            rows = real_rows(name, x, batch)
            expected[name].add(rows)
            exact[name] = exact.get(name, 0) + rows.double().T @ rows.double()

    targets = find_targets(model, "all-linear")
    found = tiny.covariances_of(model, targets, batches)
    assert found.keys() == targets.keys() == expected.keys()
    for name, C in found.items():
        reference = exact[name] / expected[name].count
        assert (C - reference).norm() < 1e-6 * reference.norm(), name
        assert torch.equal(C, expected[name].mean()), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_with_one_input_share_one_covariance(family):
    model = tiny.build(family)
    C = tiny.covariances_of(model, find_targets(model, "all-linear"), tiny.batches(family))
    groups = [SHARED.get(family, ["q_proj", "k_proj", "v_proj"])]
    if "gate_proj" in {name.rpartition(".")[2] for name in C}:
        groups.append(["gate_proj", "up_proj"])
    for name in C:
        parent, _, last = name.rpartition(".")
        for group in groups:
            if last in group and "EncDecAttention" not in parent:
                assert C[name] is C[f"{parent}.{group[0]}"]
    if family == "t5":  # the encoder's output goes to k and v of every decoder block
        cross = {id(C[n]) for n in C if "EncDecAttention" in n and n[-1] in "kv"}
        assert len({id(C[n]) for n in C if "EncDecAttention" in n and n[-1] == "q"} & cross) == 0
        for block in (0, 1):
            name = f"decoder.block.{block}.layer.1.EncDecAttention."
            assert C[name + "k"] is C[name + "v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_first_output_is_the_base_models_to_the_last_bit(family, dtype):
    model, batches = tiny.build(family, dtype), tiny.batches(family)
    before = tiny.logits(model, family)
    for mode in ("kpm", "ipm"):
        for split in ("paper", "balanced", "anchored", "seeded"):
            config = CordaConfig(mode=mode, split=split, r=4, lora_alpha=8)
            adapted = install(copy.deepcopy(model), preprocess(model, config, batches, progress=False)).eval()
            assert torch.equal(tiny.logits(adapted, family), before)
            A = [layer.lora_A["default"].weight for layer in lora_layers(adapted).values()]
            assert all(torch.isfinite(a).all() and a.norm() > 0 for a in A)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_adapts_what_pefts_all_linear_does_but_no_output_head(family):
    model = tiny.build(family)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    heads = {n for n in linear if n.partition(".")[0] in ("lm_head", "classifier")}
    assert heads
    adapted = lora_layers(get_corda_model(model, CordaConfig(r=4), tiny.batches(family), progress=False))
    assert adapted.keys() == linear - heads


@pytest.mark.parametrize(("kind", "head"), [("TokenClassification", "classifier"), ("QuestionAnswering", "qa_outputs")])
def test_heads_of_other_tasks_are_left_alone(kind, head):
    model = getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**tiny.ENCODER))
    targets = find_targets(model, "all-linear")
    assert head not in targets
    assert "bert.encoder.layer.1.output.dense" in targets


def test_one_line_says_which_experts_are_left_out():
    for family in ("mixtral", "qwen3_moe"):
        model = tiny.build(family)
        with pytest.warns(UserWarning, match=r"left out: 4 fused parameters.*model\.layers\.0\.mlp\.experts") as seen:
            start = preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)
        assert sum("left out" in str(w.message) for w in seen) == 1
        assert {n.rpartition(".")[2] for n in start.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert len(start.record["left_out"]) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "t5", "roberta"])
def test_biased_and_dense_families_warn_of_nothing(family):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        preprocess(tiny.build(family), CordaConfig(r=4, orientation="identity"), progress=False)


def test_padding_on_the_left_is_left_out_too():
    model, name = tiny.build("llama"), "model.layers.0.mlp.gate_proj"
    layer = {name: model.get_submodule(name)}
    C = []
    for left in (False, True):
        ids, mask = tiny.padded([5, 9], 9, seed=0, left=left)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        x = inputs(model, batch)[name]
        found = tiny.covariances_of(model, layer, [batch])[name]
        torch.testing.assert_close(found, x[mask.bool()].T @ x[mask.bool()] / 14)
        C.append(found)


def test_what_the_padding_holds_does_not_matter():
    model, config = tiny.build("llama"), CordaConfig(r=4)
    clean = tiny.batches()
    noisy = [{**b, "input_ids": torch.where(b["attention_mask"] == 0, torch.tensor(50), b["input_ids"])} for b in clean]
    a, b = (preprocess(model, config, batches, progress=False) for batches in (clean, noisy))
    for name in a.layers:
        assert torch.equal(a.layers[name].A, b.layers[name].A)
