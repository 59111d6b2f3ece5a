"""The quantized base of an adapter: what is stored, what the two compute together, and what is in memory meanwhile."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import same
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_lora import CordaConfig, CordaError, get_corda_model, load_adapter
from corda_lora.adapters.export import export_for_original, export_lora, export_merged, export_residual
from corda_lora.adapters.lora import install, lora_layers
from corda_lora.adapters.prepare import prepare
from corda_lora.adapters.quantize import dequantize_in_place, quantize_in_place, write_base
from corda_lora.config import DataConfig, ModelConfig
from corda_lora.models.loading import load_model, open_model
from corda_lora.models.lockstep import find_blocks
from corda_lora.models.residual import is_residual
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import compute_as_stored, is_4bit, quantize, weight_of
from corda_lora.preprocess.pipeline import preprocess

pytestmark = pytest.mark.filterwarnings("ignore:the smallest of", "ignore:layers of up to", "ignore:.*low rank")

PAPER = {"mode": "ipm", "split": "paper", "fold": 0}
FOLDED = {"mode": "ipm"}
KINDS = {
    "paper": PAPER,
    "folded": FOLDED,
    "two-sided": {"mode": "ipm", "orientation": "two_sided", "fold": 1},
    "double": FOLDED | {"double_quantization": True, "fold": 2},
    "anchored": {"mode": "kpm"},
    "seeded, ranks of their own": {"mode": "ipm", "split": "seeded", "preset": "corda+"},
    "kpm, paper": {"mode": "kpm", "split": "paper"},
}


def config_of(**options) -> CordaConfig:
    return CordaConfig(**{"r": 4, "lora_alpha": 8, "quantization": "nf4"} | options)


def built(dtype=torch.float32, **size):
    return tiny.build("llama_for_nf4", dtype, **size)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "keep.jsonl"
    samples = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
    return DataConfig(str(path))


@pytest.fixture
def source(tmp_path, tokenizer):
    """A function that saves a model in shards."""

    def save(model, name="model") -> ModelConfig:
        model.save_pretrained(tmp_path / name, max_shard_size="50KB")
        tokenizer.save_pretrained(tmp_path / name)
        return ModelConfig(str(tmp_path / name))

    return save


def plain(folder, dtype="auto"):
    """What anybody does with the directory, in plain transformers and PEFT."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, device_map="cpu")
    return PeftModel.from_pretrained(base, str(folder))


@torch.no_grad()
def training_logits(model):
    """In training mode (there is no dropout) bitsandbytes computes with the scales as they are stored."""
    return tiny.logits(model.train())


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_the_weight_without_the_adapter(kind):
    model, config = built(), config_of(**KINDS[kind])
    start = preprocess(model, config, tiny.batches(), progress=False)
    for name, layer in start.layers.items():
        W, stored = weight_of(model.get_submodule(name)), start.quantized(name)
        BA = config.scale * layer.B @ layer.A
        if config.fold:  # the adapter is fitted to what was stored before it
            values = quantize(W, torch.float32)[1]
            assert layer.record.context_error < 0.95 * float((W - values).norm() / W.norm())
        else:
            expected, values = quantize(W - BA, torch.float32)
            assert all(torch.equal(stored[key], expected[key]) for key in expected)
            assert layer.record.error == pytest.approx(float((W - values - BA).norm() / W.norm()), rel=1e-4)
    assert config.has_residual == (kind not in ("anchored", "seeded, ranks of their own"))


def test_more_rounds_of_folding_and_more_rank_lose_less():
    def lost(**options):
        start = preprocess(built(), config_of(mode="ipm", **options), tiny.batches(), progress=False)
        return sum(layer.record.context_error for layer in start.layers.values())

    errors = [lost(fold=0), lost(fold=1), lost(fold=5), lost(fold=5, r=16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]


@pytest.mark.parametrize("kind", ["folded", "two-sided", "double"])
def test_folding_rounds_for_the_context_and_the_adapter(kind, monkeypatch):
    def lost():
        start = preprocess(built(), config_of(**KINDS[kind]), tiny.batches(), progress=False)
        return sum(layer.record.context_error for layer in start.layers.values())

    ours = lost()
    monkeypatch.setattr(
        "corda_lora.preprocess.pipeline.quantize", lambda W, dtype, double, _: quantize(W, dtype, double)
    )
    assert ours < 0.8 * lost()


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["paper", "folded", "double", "anchored"])
def test_plain_peft_on_plain_transformers(kind, dtype, source, rows, tmp_path):
    model = built(dtype, tie_word_embeddings=True)
    config = config_of(**KINDS[kind])
    start = prepare(source(model), config, rows, tmp_path / "start", progress=False)
    loaded = plain(tmp_path / "start")
    assert loaded.get_base_model().config.quantization_config.bnb_4bit_use_double_quant == config.double_quantization
    assert loaded.get_base_model().lm_head.weight is loaded.get_base_model().model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "start" / "base").pad_token_id is not None
    for name, layer in lora_layers(loaded).items():
        assert is_4bit(layer.get_base_layer())
        W = weight_of(model.get_submodule(name)).float()
        now = weight_of(layer.get_base_layer()).float() + layer.get_delta_weight("default").float()
        assert (W - now).norm() / W.norm() == pytest.approx(start.layers[name].record.error, abs=2e-3)
    ours = load_adapter(load_model(ModelConfig(str(tmp_path / "start" / "base"))), tmp_path / "start")
    assert torch.equal(training_logits(loaded), training_logits(ours))
    assert torch.equal(tiny.logits(ours.eval()), training_logits(ours))
    # In memory, the same weights and the same context give the same.
    in_memory = preprocess(model, config, tiny.batches(), progress=False)
    quantize_in_place(model, in_memory)
    assert model.is_loaded_in_4bit
    model.save_pretrained(tmp_path / "again")
    adapted = install(model, in_memory)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    tolerance = 1e-4 if dtype == torch.float32 else 0.03  # `tiny` rounded its rotary tables
    torch.testing.assert_close(training_logits(loaded), training_logits(adapted), rtol=0, atol=tolerance)


def test_quantized_in_memory_both_are_saved_and_the_adapter_names_no_other_model(source, rows, tmp_path):
    full = source(built()).model
    model = AutoModelForCausalLM.from_pretrained(full)
    adapted = get_corda_model(model, config_of(**PAPER), tiny.batches(), progress=False)
    expected = training_logits(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    adapted.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    loaded = load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(training_logits(loaded), expected, rtol=0, atol=1e-4)
    with pytest.raises(OSError, match="without what this adapter holds"):  # as `pipeline` would load it
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(CordaError, match=r"its base was .* in 4 bits without what this adapter holds"):
        load_adapter(AutoModelForCausalLM.from_pretrained(full), tmp_path / "adapter")


def test_another_dtype_is_computed_in(source, rows, tmp_path):
    model = built(torch.bfloat16)
    prepare(source(model), config_of(**PAPER), rows, tmp_path / "start", progress=False)
    base = str(tmp_path / "start" / "base")
    loaded = load_model(ModelConfig(base, dtype="float32"))
    full = copy.deepcopy(loaded)
    dequantize_in_place(full)
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(full.float()), rtol=0, atol=1e-4)
    assert (tiny.logits(load_model(ModelConfig(base))) - tiny.logits(loaded)).abs().max() > 1e-3


def test_a_conv1d(source, rows, tmp_path):
    torch.manual_seed(0)
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 128}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCABULARY, **sizes)).eval()
    prepare(source(model), config_of(mode="ipm", fold=1, r=32), rows, tmp_path / "start", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = plain(tmp_path / "start")
    compute_as_stored(loaded)
    before, after = tiny.logits(model), tiny.logits(loaded.eval())
    assert (after - before).norm() < 0.05 * before.norm()
    merged = load_model(ModelConfig(str(tmp_path / "start" / "base")))
    export_merged(merged, tmp_path / "start", tmp_path / "merged")
    same(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), after)


def test_no_more_than_a_block_is_in_memory(source, rows, tmp_path):
    original = source(built(num_hidden_layers=4))
    model, stored = open_model(original)
    blocks = find_blocks(model, list(find_targets(model, "all-linear"))).values()
    most, reads = [], []

    def counted(tensor, read):
        def count():
            reads.append(tensor)
            held = [sum(p.untyped_storage().nbytes() for p in block.parameters()) for block in blocks]
            most.append(sum(size > 200 for size in held))
            return read()

        return count

    stored = {tensor: counted(tensor, read) for tensor, read in stored.items()}
    (tmp_path / "work").mkdir()
    config = config_of(mode="ipm", target_modules=["q_proj", "down_proj"])  # the others are quantized as they are
    start = preprocess(model, config, tiny.batches(), progress=False, stored=stored, work=tmp_path / "work")
    assert len(reads) == len(set(reads))
    decomposed = len(reads)
    write_base(model, start, tmp_path / "base", stored)
    assert max(most) == 1
    written = [id(t) for t in reads[decomposed:]]
    assert len(written) == len(set(written))
    assert id(model.model.layers[0].mlp.down_proj.weight) not in written
    sizes = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    assert len(sizes) == 5  # a file for each block, and one for the rest


# --- a model that is in 4 bits already -------------------------------------------------------------------------------


@pytest.fixture
def in_4bit(source, rows, tmp_path):
    """A model in 4 bits, and its original."""
    original = source(built())
    prepare(original, config_of(r=1), rows, tmp_path / "some", progress=False)
    return ModelConfig(str(tmp_path / "some" / "base")), original


def test_full_weights_are_read_from_the_original(in_4bit, rows, tmp_path):
    quantized, original = in_4bit
    alone = prepare(quantized, CordaConfig(r=4), rows, tmp_path / "alone", progress=False)
    beside = prepare(quantized, CordaConfig(r=4), rows, tmp_path / "beside", progress=False, original=original)
    full = prepare(original, CordaConfig(r=4), rows, tmp_path / "full", progress=False)
    for name, layer in full.layers.items():
        assert torch.equal(layer.A, beside.layers[name].A)
        assert not torch.allclose(layer.A, alone.layers[name].A, atol=1e-3)
    for folder in ("alone", "beside"):
        model = load_adapter(load_model(quantized), tmp_path / folder)
        assert torch.equal(tiny.logits(model), tiny.logits(load_model(quantized)))


def test_what_a_4bit_copy_lost_is_folded_into_the_adapter(in_4bit, rows, tmp_path):
    quantized, original = in_4bit
    with pytest.raises(CordaError, match="the full weights are needed: --original MODEL"):
        prepare(quantized, CordaConfig(mode="ipm", fold=1), rows, tmp_path / "start", progress=False)
    with pytest.raises(CordaError, match="the full weights are needed: --quantization nf4"):
        prepare(original, CordaConfig(mode="ipm", fold=1), rows, tmp_path / "start", progress=False)
    with pytest.raises(CordaError, match="original is for a model that is quantized already"):
        prepare(original, CordaConfig(mode="ipm"), rows, tmp_path / "start", progress=False, original=original)
    with pytest.raises(CordaError, match="the model is quantized already"):
        prepare(quantized, config_of(), rows, tmp_path / "start", progress=False)
    config = CordaConfig(mode="ipm", fold=1, r=16)
    prepare(quantized, config, rows, tmp_path / "start", progress=False, original=original)
    assert not (tmp_path / "start" / "base").exists()
    base, full = load_model(quantized), tiny.logits(load_model(original))
    before = (tiny.logits(base) - full).norm()
    assert (tiny.logits(load_adapter(base, tmp_path / "start")) - full).norm() < 0.7 * before


def test_another_model_is_no_original(in_4bit, source, rows, tmp_path):
    other = source(built(intermediate_size=192), "other")
    with pytest.raises(CordaError, match=r"other has no .*gate_proj of shape .*: it is another model"):
        prepare(in_4bit[0], CordaConfig(), rows, tmp_path / "start", progress=False, original=other)
    same_shapes = source(tiny.build("llama_for_nf4", seed=5), "seed 5")
    with pytest.raises(CordaError, match="seed 5 have nothing in common with these: it is another model"):
        prepare(in_4bit[0], CordaConfig(), rows, tmp_path / "start", progress=False, original=same_shapes)
    assert not (tmp_path / "start").exists()


def test_an_adapter_on_another_residual(source, rows, tmp_path):
    model = source(built())
    for name, options in (("a", PAPER), ("b", FOLDED)):
        prepare(model, config_of(**options), rows, tmp_path / name, progress=False)
    with pytest.raises(CordaError, match="was made for other weights than these"):
        load_adapter(load_model(ModelConfig(str(tmp_path / "b" / "base"))), tmp_path / "a")
    with pytest.raises(CordaError, match="was made for other weights than these"):
        load_adapter(load_model(model), tmp_path / "a")


def test_a_residual_in_4_bits_is_told_by_a_layer_that_has_lost_something(source, rows, tmp_path):
    """The tail of a weight of low rank is zero: without it the layer is as before, and so it is when it is merged."""
    model = built()
    first = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        first.copy_(first[:, :4] @ first[:4])
    prepare(source(model), config_of(**KINDS["kpm, paper"], fold=0), rows, tmp_path / "a", progress=False)
    in_memory = get_corda_model(model, config_of(**KINDS["kpm, paper"], fold=0), tiny.batches(), progress=False)
    for adapted in (plain(tmp_path / "a"), in_memory):
        assert is_residual(adapted.get_base_model())
        assert not is_residual(adapted.merge_and_unload())


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["paper", "folded", "anchored"])
def test_exports(kind, source, rows, tmp_path, capsys, monkeypatch):
    original = source(built())
    prepare(original, config_of(**KINDS[kind]), rows, tmp_path / "start", progress=False)

    def base():
        return load_model(ModelConfig(str(tmp_path / "start" / "base")))

    adapted = load_adapter(base(), tmp_path / "start", trainable=True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(tmp_path / "tuned"))
    expected = tiny.logits(adapted.eval())
    assert export_lora(base(), tmp_path / "tuned", tmp_path / "lora") == 0
    same(tiny.logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora")).eval()), expected)
    assert export_merged(base(), tmp_path / "tuned", tmp_path / "merged") < 1e-7
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    same(tiny.logits(merged), expected)
    with pytest.raises(CordaError, match=r"there is (no residual|nothing) to export"):
        export_residual(base(), tmp_path / "tuned", tmp_path / "residual")
    monkeypatch.setattr("corda_lora.progress.PATIENCE", 0.0)  # of large layers it takes a minute each
    _, differs = export_for_original(base(), original, tmp_path / "tuned", tmp_path / "onto")
    assert "what is lost" in capsys.readouterr().err
    loaded = PeftModel.from_pretrained(load_model(original), str(tmp_path / "onto"))
    assert loaded.peft_config["default"].base_model_name_or_path == original.model
    quantized = dict(lora_layers(adapted))
    for name, layer in lora_layers(loaded).items():
        W, q = weight_of(layer.get_base_layer()), quantized[name]
        full = W + layer.get_delta_weight("default")
        there = weight_of(q.get_base_layer()) + q.get_delta_weight("default")
        assert differs[name] == pytest.approx(float((full - there).norm() / W.norm()), rel=1e-3)
        assert differs[name] < 0.12


@pytest.mark.filterwarnings("ignore:the model is a residual")
@pytest.mark.parametrize("whose", ["its own", "another"])
def test_a_residual_in_4_bits_is_whole_with_its_own_adapter_alone(whose, source, rows, tmp_path):
    prepare(source(built()), config_of(**PAPER), rows, tmp_path / "start", progress=False)
    if whose == "another":
        loras = get_peft_model(load_model(ModelConfig(str(tmp_path / "start" / "base"))), LoraConfig(r=2))
        loras.save_pretrained(tmp_path / "lora")
    folder = tmp_path / ("start" if whose == "its own" else "lora")
    export_merged(load_model(ModelConfig(str(tmp_path / "start" / "base"))), folder, tmp_path / "merged")
    assert is_residual(load_model(ModelConfig(str(tmp_path / "merged")))) == (whose == "another")


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"double_quantization": True, "quantization": None}, "double_quantization goes with a quantization"),
        ({"fold": 2}, "split anchored starts with B = 0"),
        ({"mode": "ipm", "preset": "corda+"}, "gives it its rank when all are done"),
        ({"mode": "ipm", "keep": 1.0}, "the base is quantized without a part of W"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(CordaError, match=said):
        config_of(**options)


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(CordaError, match=r"down_proj \(64 × 96\) cannot be quantized"):
        get_corda_model(built(intermediate_size=96), config_of(), tiny.batches(), progress=False)


def test_drift_from_a_residual_cannot_be_predicted():
    model = built()
    statistics = get_corda_model(copy.deepcopy(model), CordaConfig(keep=1), tiny.batches() * 6, progress=False)
    adapted = get_corda_model(model, config_of(**FOLDED), tiny.batches(), progress=False)
    from corda_lora.training.keeping import PredictedDrift

    with pytest.raises(CordaError, match="a part of the model is in the adapter"):
        PredictedDrift(adapted, replace(statistics.statistics))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["paper", "two-sided", "double", "anchored"])
def test_on_a_gpu(kind, source, rows, tmp_path):
    full = source(built(torch.bfloat16))
    for device in ("cpu", "cuda"):
        prepare(full, config_of(**KINDS[kind], device=device), rows, tmp_path / device, progress=False)
    config = ModelConfig(str(tmp_path / "cuda" / "base"))
    loaded = load_adapter(load_model(config), tmp_path / "cuda", trainable=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    batch = {key: value.cuda() for key, value in tiny.batches()[0].items()}
    logits = loaded(**batch).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "cuda" / "base", device_map="cpu")
    compute_as_stored(base)
    on_cpu = load_adapter(base, tmp_path / "cuda")  # the fingerprint is that of the CPU's
    assert (logits.cpu() - tiny.logits(on_cpu)).norm() < 0.02 * logits.norm()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad)
    errors = [json.loads((tmp_path / d / "corda.json").read_text())["layers"] for d in ("cpu", "cuda")]
    for name in errors[0]:
        assert errors[0][name]["context_error"] == pytest.approx(errors[1][name]["context_error"], rel=0.2)
