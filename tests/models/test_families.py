"""Every family of models: covariances to the bit, the start exact, the head left alone."""

import copy
import threading
import warnings
from collections import defaultdict
from unittest.mock import Mock

import peft
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftsConfig
from torch import nn

from corda_lora import CordaConfig, CordaError, get_corda_model, load_adapter
from corda_lora.adapters.export import export_merged
from corda_lora.adapters.lora import install, lora_layers
from corda_lora.algebra.covariance import Covariance
from corda_lora.models.targets import choose_targets, find_targets
from corda_lora.peft import preprocess_corda
from corda_lora.preprocess.collect import Collector
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.pipeline import preprocess

CPU = torch.device("cpu")
CASES = [(family, False) for family in [*tiny.FAMILIES, *tiny.MORE_FAMILIES]] + [("t5", True)]
SHARED = {
    "gpt2_conv1d": [],
    "bert": ["query", "key", "value"],
    "roberta": ["query", "key", "value"],
    "t5": ["q", "k", "v"],
}


def inputs(model, batch):
    """What each target layer is given in a plain forward: a list, as DeBERTa calls some layers twice."""
    inputs_of = defaultdict(list)
    targets = find_targets(model, "all-linear")
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs_of[name].append(args[0]))
        for name, module in targets.items()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs_of


def real_rows(name, x, batch):
    """The rows of `x` that are not padding: by hand, from what each layer of each family is given."""
    samples = len(batch["input_ids"])
    if x.shape[0] == samples and x.ndim == 2:  # one pooled vector a sample
        return x
    if x.shape[0] == 1 and "deberta" in name:  # embeddings of relative positions, which every sample is given
        return x.repeat(samples, 1, 1).flatten(0, 1)
    mask = batch["attention_mask"]
    cross = ("EncDecAttention" in name and name[-2:] in (".k", ".v")) or "encoder_attn.k_" in name
    cross = cross or "encoder_attn.v_" in name
    if "labels" in batch and "decoder." in name and not cross:
        mask = batch["labels"] != -100
    x = x.reshape(*mask.shape, -1)
    return torch.cat([row[keep.bool()] for row, keep in zip(x, mask)])


@pytest.mark.parametrize(("family", "equal"), CASES)
def test_covariances_are_those_of_a_plain_forward_to_the_bit(family, equal):
    """The same rows in the same order: summed by one function, they come to the same bits on every processor."""
    model, batches = tiny.build(family), tiny.batches(family, equal)
    expected, exact = defaultdict(Covariance), {}
    for batch in batches:
        for name, calls in inputs(model, batch).items():
            for x in calls:
                rows = real_rows(name, x, batch)
                expected[name].add(rows)
                exact[name] = exact.get(name, 0) + rows.double().T @ rows.double()

    targets = find_targets(model, "all-linear")
    found = tiny.covariances_of(model, targets, batches)
    assert found.keys() == targets.keys() == expected.keys()
    for name, C in found.items():
        reference = exact[name] / expected[name].count
        assert (C - reference).norm() < 1e-6 * reference.norm(), name
        if family != "deberta_v2":  # where a layer is called twice, the calls are summed apart
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
    for mode, split in [("kpm", "paper"), ("kpm", "anchored"), ("ipm", "balanced"), ("ipm", "seeded")]:
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
        [x] = inputs(model, batch)[name]
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


# --- from the model to the merged one, family by family --------------------------------------------------------------

# What `all-linear` leaves out: last names of layers, where others of the same name may be adapted.
NOT_ADAPTED = {
    "deepseek_v2": {"gate_proj", "up_proj", "down_proj"},
    "deepseek_v3": {"gate_proj", "up_proj", "down_proj"},
    "qwen2_moe": {"shared_expert_gate"},
    "mamba": {"out_proj", "x_proj", "dt_proj"},
    "distilbert": {"pre_classifier"},
}
HEADS = ("lm_head", "classifier", "embed_out")
END_TO_END = [(family, "anchored") for family in [*tiny.FAMILIES, *tiny.MORE_FAMILIES]]
END_TO_END += [(family, "paper") for family in ("deepseek_v3", "mamba", "deberta_v2", "qwen2_moe", "bart")]


@pytest.mark.parametrize(("family", "split"), END_TO_END)
@pytest.mark.filterwarnings("ignore:.*left out", "ignore:.*real tokens")
def test_from_the_model_to_the_merged_one(family, split, tmp_path):
    model = tiny.build(family)
    before, untouched = tiny.logits(model, family), copy.deepcopy(model)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    expected = {n for n in linear if n.partition(".")[0] not in HEADS}
    expected = {n for n in expected if n.rpartition(".")[2] not in NOT_ADAPTED.get(family, ())}

    config = CordaConfig(r=4, split=split)
    adapted = get_corda_model(model, config, tiny.batches(family), progress=False).eval()
    assert lora_layers(adapted).keys() == expected
    assert torch.equal(tiny.logits(adapted, family), before)

    batch = tiny.batches(family)[0]
    if "labels" not in batch:
        classes = torch.arange(3)
        tokens = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"] = classes if "Classification" in type(untouched).__name__ else tokens
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted(**batch).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    optimizer.step()
    tuned = tiny.logits(adapted, family)
    assert (tuned - before).abs().max() > 1e-3

    adapted.save_pretrained(tmp_path / "tuned", save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "tuned").eval()
    tolerance = 1e-4 * float(tuned.abs().max())
    assert (tiny.logits(loaded, family) - tuned).abs().max() < tolerance
    export_merged(untouched, tmp_path / "tuned", tmp_path / "merged")
    merged = type(untouched).from_pretrained(tmp_path / "merged").eval()
    assert (tiny.logits(merged, family) - tuned).abs().max() < tolerance


@pytest.mark.parametrize(
    ("family", "sentences"),
    {
        "deepseek_v3": [
            "fused parameters",
            r"linear layers that no LoRA of PEFT's can adapt \(down_proj, gate_proj, up_proj\)",
        ],
        "qwen2_moe": ["fused parameters", r"2 layers with fewer than r = 4 components \(shared_expert_gate\)"],
        "mamba": [r"6 linear layers that no LoRA of PEFT's can adapt \(dt_proj, out_proj, x_proj\)"],
    }.items(),
)
def test_one_line_says_which_layers_are_left_out(family, sentences):
    model = tiny.build(family)
    with pytest.warns(UserWarning, match="left out: .*" + ".*".join(sentences)) as seen:
        start = preprocess(model, CordaConfig(r=4, orientation="identity"), progress=False)
    assert sum("left out" in str(w.message) for w in seen) == 1
    assert start.record["left_out"]
    assert not set(start.record["left_out"]) & start.layers.keys()


@pytest.mark.parametrize(
    ("family", "target", "sentence"),
    [
        ("deepseek_v3", "down_proj", r"model\.layers\.0\.mlp\.down_proj of DeepseekV3ForCausalLM cannot be adapted"),
        ("qwen2_moe", "shared_expert_gate", r"r is 4, but .*shared_expert_gate \(1 × 32\) has only 1 components"),
        ("mamba", "out_proj", "cannot be adapted: PEFT says: .*incompatible with Mamba"),
        ("mamba", "dt_proj", "cannot be adapted: the model reads its weight directly"),
    ],
)
def test_a_named_layer_that_cannot_be_adapted_is_refused_before_work(family, target, sentence, monkeypatch):
    monkeypatch.setattr("corda_lora.preprocess.pipeline.walk", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(CordaError, match=sentence):
        preprocess(tiny.build(family), CordaConfig(r=4, target_modules=[target]), tiny.batches(), progress=False)


def test_ranks_are_allocated_to_narrow_layers_too():
    targets = choose_targets(tiny.build("qwen2_moe"), CordaConfig(r=4, preset="corda+"))
    assert "model.layers.0.mlp.shared_expert_gate" in targets


@pytest.mark.parametrize("compiled", ["wrapped", "in place", "a block"])
def test_a_compiled_model_is_refused(compiled):
    model = tiny.build("llama")
    if compiled == "wrapped":
        model = torch.compile(model, backend="eager")
    elif compiled == "in place":
        model.compile(backend="eager")
    else:
        model.model.layers[1].compile(backend="eager")
    with pytest.raises(CordaError, match="was compiled"):
        preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)


def test_a_block_on_the_disk_is_refused(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "model")
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    with pytest.raises(CordaError, match=r"model\.layers\.1\..* is not in memory"):
        preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)


def test_a_model_in_a_wrapper_that_copies_it_is_refused(tmp_path):
    base = tiny.build("llama")
    model = nn.DataParallel(base)
    for give in (
        lambda: get_corda_model(model, CordaConfig(r=4), ["a text"], progress=False),
        lambda: load_adapter(model, tmp_path),
        lambda: preprocess_corda(base, LoraConfig(corda_config=PeftsConfig()), hooked_model=model),
    ):
        with pytest.raises(CordaError, match=r"inside a DataParallel, .* give the model itself, `model\.module`"):
            give()


def test_a_model_on_several_devices_is_refused():
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda:1")

    model = tiny.build("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = Elsewhere(layer.weight.data)
    with pytest.raises(CordaError, match="spread over cpu, cuda:1, as by a device_map"):
        preprocess(model, CordaConfig(r=4), tiny.batches(), progress=False)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_resized_embeddings(family, tmp_path):
    model = tiny.build(family)
    model.resize_token_embeddings(tiny.VOCABULARY + 8, mean_resizing=False)
    base, before = copy.deepcopy(model), tiny.logits(model)
    adapted = get_corda_model(model, CordaConfig(mode="ipm", r=4, split="paper"), tiny.batches(), progress=False)
    assert torch.equal(tiny.logits(adapted), before)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), before)


def test_trying_pefts_configuration_changes_nothing():
    model = tiny.build("bert")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.lock, hooks = threading.Lock(), Mock(side_effect=lambda *_: None)  # neither can be copied
    hooks.lock = model.lock
    model.bert.register_forward_pre_hook(hooks)
    model.gradient_checkpointing_enable()  # for which PEFT puts a hook on the embeddings
    embeddings = model.get_input_embeddings()
    trained = [p.requires_grad for p in model.parameters()]
    modules, random = list(model.modules()), torch.get_rng_state()
    parameters = [p.data_ptr() for p in model.parameters()]
    hooks_before = len(embeddings._forward_hooks)
    assert len(find_targets(model, "all-linear")) == 13
    assert len(embeddings._forward_hooks) == hooks_before
    assert [p.requires_grad for p in model.parameters()] == trained
    assert list(model.modules()) == modules
    assert [p.data_ptr() for p in model.parameters()] == parameters
    assert torch.equal(torch.get_rng_state(), random)


# --- inputs of unusual shapes ----------------------------------------------------------------------------------------


def covariance_of_given(give, batch, **context):
    """C of a linear layer in a model that gives it what `give` makes of random hidden states (b, s, 8)."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask):
            return self.layer(give(hidden, attention_mask.bool()))

    model = Model()
    hidden = torch.randn(*batch["input_ids"].shape, 8, generator=torch.Generator().manual_seed(0))
    collector = Collector(model, {"layer": model.layer}, Context([batch], **context))
    with collector.listening(), torch.no_grad():
        model(**batch)
    [group] = collector.take(["layer"])
    return group.covariances[0]


@pytest.mark.parametrize("skip_tokens", [0, 2])
@pytest.mark.parametrize(
    "give",
    [
        lambda hidden, mask: hidden.flatten(0, 1),
        lambda hidden, mask: hidden.flatten(0, 1)[None],
        lambda hidden, mask: hidden[mask],
        lambda hidden, mask: hidden[mask][None],
    ],
    ids=["(b·s, d)", "(1, b·s, d)", "(real, d)", "(1, real, d)"],
)
def test_padding_is_told_by_the_number_of_rows(give, skip_tokens):
    batch = tiny.batches()[0]
    plain = covariance_of_given(lambda hidden, mask: hidden, batch, skip_tokens=skip_tokens)
    assert torch.equal(covariance_of_given(give, batch, skip_tokens=skip_tokens), plain)


def test_padding_that_cannot_be_told_is_refused():
    """Until it is given as the message says."""
    batch = tiny.batches()[0]

    def twice(hidden, mask):
        return torch.cat([hidden, hidden], dim=1)

    for rows in (slice(3), slice(1)):  # several samples, and one with padding
        with pytest.raises(CordaError, match=r"padding cannot be told: give each sample in a batch of its own, cut"):
            covariance_of_given(twice, {key: x[rows] for key, x in batch.items()})
    length = int(batch["attention_mask"][0].sum())
    assert covariance_of_given(twice, {key: x[:1, :length] for key, x in batch.items()}).shape == (8, 8)


def test_deberta_calls_two_of_its_projections_twice():
    model = tiny.build("deberta_v2")
    C = tiny.covariances_of(model, find_targets(model, "all-linear"), tiny.batches())
    name = "deberta.encoder.layer.1.attention.self."
    assert C[name + "key_proj"] is C[name + "query_proj"]
    assert not torch.equal(C[name + "key_proj"], C[name + "value_proj"])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("family", ["deberta", "deberta_v2"])
def test_positions_count_the_same_however_samples_are_batched(family, per_sample):
    model = tiny.build(family)
    targets = find_targets(model, "all-linear")
    ids = tiny.padded([12] * 5, 12, seed=0)[0]  # of one length, on which the number of DeBERTa's positions depends
    means = []
    for batches in ([ids[:2], ids[2:]], ids.split(1)):  # 2 samples have as many tokens as there are positions: 2 × 12
        collector = Collector(model, targets, Context([{"input_ids": x} for x in batches]), per_sample)
        with collector.listening(), torch.no_grad():
            for i, x in enumerate(batches):
                collector.start(i)
                model(input_ids=x)
        means.append({n: group.covariances[0] for group in collector.take(list(targets)) for n in group.members})
    for name, C in means[0].items():
        assert (C - means[1][name]).norm() < 1e-4 * C.norm(), name
