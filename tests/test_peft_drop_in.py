"""`corda_lora.peft.preprocess_corda` in place of PEFT's own: beside the original, and where it does more."""

import copy
import weakref
from pathlib import Path

import peft
import pytest
import tiny
import torch
from helpers import pefts_damping
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig as PeftCorda
from peft.tuners.lora.corda import preprocess_corda as pefts_preprocess
from peft.tuners.lora.corda import target_modules
from torch import nn
from transformers import AlbertConfig, AlbertModel, BartConfig, BartModel, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corda_lora.algebra.covariance import Covariance
from corda_lora.config import CordaError
from corda_lora.peft import preprocess_corda

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "gpt2_conv1d": ["c_attn", "c_fc"],
    "bert": ["query", "value", "intermediate.dense"],
    "t5": ["q", "k", "v", "wi", "wo"],
    "mlp": ["0", "2"],
}


def config(family="llama", method="kpm", r=8, target_modules=None, rank_pattern=None, **options):
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        init_lora_weights="corda",
        target_modules=target_modules or TARGETS[family],
        rank_pattern=rank_pattern or {},
        fan_in_fan_out=family == "gpt2_conv1d",
        corda_config=PeftCorda(corda_method=method, **options),
    )


def build(family, dtype=torch.float32):
    if family != "mlp":
        return tiny.build(family, dtype)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 16))


def one_by_one(batches):
    """Every sample alone, without its padding: what PEFT can be given."""
    for batch in batches:
        for i, mask in enumerate(batch["attention_mask"].bool()):
            sample = {"input_ids": batch["input_ids"][i : i + 1, mask]}
            if "labels" in batch:
                sample["labels"] = batch["labels"][i : i + 1, batch["labels"][i] != -100]
            yield sample


def calls(family):
    """Of a model, one sample each: keyword arguments, or one for the first parameter."""
    if family == "mlp":
        return [{"input": torch.randn(30, 24, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    return list(one_by_one(tiny.batches(family)))


def runner(model, calls):
    return lambda: [model(**call) for call in calls] and None


def covariances(preprocess, model, run_model, folder, family="llama", **options):
    """What it writes into `covariance_file`."""
    file = folder / f"{preprocess.__module__}.pt"
    file.unlink(missing_ok=True)
    preprocess(model, config(family, covariance_file=file, **options), run_model)
    return torch.load(file, weights_only=True)


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, C in expected.items():
        assert (actual[name] - C).norm() <= tolerance * C.norm(), name


def exact_product(W, C, method, r):
    """The adapter's BA of a weight (m, n), from float64 SVD and inverse, at PEFT's λ."""
    C = C.double()
    C = C + pefts_damping(C.float()) * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(W.double() @ C, full_matrices=False)
    S = slice(0, r) if method == "ipm" else slice(len(sigma) - r, len(sigma))
    return (U[:, S] * sigma[S]) @ Vh[S] @ torch.linalg.inv(C)


def weight(module):
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


# Beside PEFT's own


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "mlp"])
def test_covariances_adapter_and_residual_are_pefts(family, method, tmp_path):
    base, made, files = build(family), {}, {}
    for name, preprocess in (("peft", pefts_preprocess), ("ours", preprocess_corda)):
        model = copy.deepcopy(base)
        start = config(family, method, covariance_file=tmp_path / f"{name}.pt")
        preprocess(model, start, runner(model, calls(family)))
        made[name] = get_peft_model(model, start)
        files[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert_close(files["ours"], files["peft"])
    for name, C in files["peft"].items():
        W = weight(base.get_submodule(name))
        assert pefts_damping(C) == 0.01
        errors, residuals = {}, {}
        for who, model in made.items():
            layer = model.base_model.model.get_submodule(name)
            product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            residuals[who] = weight(layer.base_layer)
            assert torch.allclose(residuals[who] + product, W, atol=1e-6)
            errors[who] = float((product - exact_product(W, files[who][name], method, 8)).norm())
        assert errors["ours"] <= errors["peft"] + 1e-6 * W.norm()
        assert (residuals["ours"] - residuals["peft"]).norm() <= 2 * errors["peft"] + 1e-5 * W.norm()


def test_activations_in_half_precision_are_not_rounded_again(tmp_path):
    model = tiny.build("llama", torch.bfloat16)
    run = runner(model, calls("llama"))
    ours = covariances(preprocess_corda, model, run, tmp_path)
    assert_close(ours, covariances(pefts_preprocess, model, run, tmp_path), 1e-6)
    assert ours["model.layers.0.mlp.down_proj"].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2_conv1d", "bert", "t5"])
def test_padded_batches_count_as_samples_alone(family, tmp_path):
    model, batches = tiny.build(family), tiny.batches(family)
    alone = covariances(pefts_preprocess, model, runner(model, one_by_one(batches)), tmp_path, family)
    together = covariances(preprocess_corda, model, runner(model, batches), tmp_path, family)
    assert_close(together, alone, 1e-4 if family == "t5" else 1e-5)


def test_a_decoder_that_is_given_the_encoders_tokens(tmp_path):
    torch.manual_seed(0)
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in {"layers": 1, "ffn_dim": 48}.items()}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
    model = BartModel(BartConfig(vocab_size=96, d_model=32, pad_token_id=0, eos_token_id=2, **sizes)).eval()
    options = {"target_modules": ["q_proj", "v_proj", "fc2"]}
    alone = covariances(pefts_preprocess, model, runner(model, calls("llama")), tmp_path, **options)
    assert_close(covariances(preprocess_corda, model, runner(model, tiny.batches()), tmp_path, **options), alone)


def test_a_sample_that_is_all_padding_is_none(tmp_path):
    model, batches = tiny.build("llama"), tiny.batches()
    empty = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "attention_mask": torch.zeros(1, 6, dtype=torch.long)}
    expected = covariances(preprocess_corda, model, runner(model, batches), tmp_path)
    assert_close(covariances(preprocess_corda, model, runner(model, [empty, *batches]), tmp_path), expected, 0)


def test_weights_of_low_rank():
    model = build("mlp")
    model[0].weight.data[6:] = 0
    model[2].weight.data.zero_()
    x = calls("mlp")[0]["input"]
    before = model(x)
    preprocess_corda(model, config("mlp"), runner(model, calls("mlp")))
    assert torch.allclose(get_peft_model(model, config("mlp"))(x), before, atol=1e-6)


def test_what_stays_on_the_layers_and_what_does_not():
    model, batches = tiny.build("llama"), tiny.batches()
    layer = model.model.layers[1].mlp.down_proj
    preprocess_corda(model, config(prune_temporary_fields=False, rank_pattern={"down_proj": 3}), runner(model, batches))
    assert (layer.sample_count, layer.rank, layer.corda_method) == (9, 3, "kpm")
    assert layer.covariance_matrix.shape == (48, 48)
    assert [part.shape for part in (layer.eigens.S_WC, layer.eigens.U_WC, layer.eigens.V_WC)] == [
        (3,),
        (32, 3),
        (48, 3),
    ]

    model = tiny.build("llama")
    before = set(vars(layer := model.model.layers[1].mlp.down_proj))
    preprocess_corda(model, config(), runner(model, batches))
    assert set(vars(layer)) == before | {"eigens"}
    adapted = get_peft_model(model, config())
    assert not hasattr(adapted.base_model.model.model.layers[1].mlp.down_proj.base_layer, "eigens")


def test_converted_to_a_plain_lora_as_pefts(tmp_path):
    """`path_initial_model_for_weight_conversion` gives an adapter of the original weights, of twice the rank."""
    base, batches = tiny.build("llama"), tiny.batches()
    model, start = copy.deepcopy(base), config()
    preprocess_corda(model, start, runner(model, batches))
    adapted = get_peft_model(model, start)
    start.init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    start.init_lora_weights = "corda"
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2  # trained
    adapted.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "initial")
    converted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    assert converted.peft_config["default"].r == 16
    trained = tiny.logits(adapted.eval())
    assert not torch.allclose(trained, tiny.logits(base), atol=1e-2)
    assert torch.allclose(tiny.logits(converted), trained, atol=1e-4)


# How the model is run


def live_sums(monkeypatch):
    """A list of how many covariances were alive each time one was added to."""
    sums, alive, add = [], [], Covariance.add_samples

    def counting(self, x, lengths):
        new = self.total is None
        add(self, x, lengths)
        if new:
            sums.append(weakref.ref(self.total))
        alive.append(sum(ref() is not None for ref in sums))

    monkeypatch.setattr(Covariance, "add_samples", counting)
    return alive


def test_covariances_of_one_block_exist_at_a_time(monkeypatch):
    model, alive = tiny.build("llama"), live_sums(monkeypatch)
    preprocess_corda(model, config(), runner(model, tiny.batches()))
    assert max(alive) == 4  # of q, k and v; o; up and gate; down
    alive.clear()
    preprocess_corda(model, config(), lambda: [model(**batch).logits for batch in tiny.batches()])
    assert max(alive) == 8


def test_ignored_outputs_are_never_computed():
    model, runs = tiny.build("llama"), []
    model.lm_head.register_forward_pre_hook(lambda *_: runs.append("head"))
    preprocess_corda(model, config(), runner(model, tiny.batches()))
    assert not runs


USES = {
    "attribute": lambda model, batch: model(**batch).logits,
    "item": lambda model, batch: model(**batch)["logits"],
    "index": lambda model, batch: model(**batch)[0],
    "unpacked": lambda model, batch: next(iter(model(**batch, return_dict=False))),
    "length": lambda model, batch: (out := model(**batch), len(out) == 1 and "logits" in out)[0].logits,
    "mapping": lambda model, batch: dict(**model(**batch))["logits"],
    "type": lambda model, batch: out["logits"] if isinstance(out := model(**batch), dict) else None,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("first_used", [0, 2])
def test_outputs_that_are_used_are_there(use, first_used, tmp_path):
    model, batches = tiny.build("llama"), [{**batch, "use_cache": False} for batch in tiny.batches()]
    expected = [model(**batch).logits for batch in batches]
    outputs = []

    def run():
        for i, batch in enumerate(batches):
            outputs.append(USES[use](model, batch) if i >= first_used else model(**batch))

    covariance = covariances(preprocess_corda, model, run, tmp_path)
    for output, logits in list(zip(outputs, expected))[first_used:]:
        assert type(output) is torch.Tensor
        assert torch.equal(output, logits)
    for output, logits in list(zip(outputs, expected))[:first_used]:  # also when all is done
        assert torch.equal(output.logits, logits)
    assert_close(covariance, covariances(preprocess_corda, model, runner(model, batches), tmp_path))


def test_generation(tmp_path):
    model = tiny.build("llama")
    ids, mask = tiny.padded([6, 9, 4], 9, seed=1, left=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    samples = [ids[i : i + 1, row.bool()] for i, row in enumerate(mask)]
    alone = lambda: [model.generate(sample, **options) for sample in samples]  # noqa: E731
    expected = covariances(pefts_preprocess, model, alone, tmp_path)
    assert_close(covariances(preprocess_corda, model, alone, tmp_path), expected)
    together = lambda: model.generate(ids, attention_mask=mask, **options)  # noqa: E731
    assert_close(covariances(preprocess_corda, model, together, tmp_path), expected)


def test_arguments_may_be_positional_and_their_memory_used_again(tmp_path):
    model, samples = tiny.build("llama"), calls("llama")
    expected = covariances(preprocess_corda, model, runner(model, samples), tmp_path)
    buffers = {n: torch.zeros(1, n, dtype=torch.long) for n in range(1, 13)}

    def run():
        for sample in samples:
            ids = sample["input_ids"]
            model(buffers[ids.shape[1]].copy_(ids), torch.ones_like(ids))

    assert_close(covariances(preprocess_corda, model, run, tmp_path), expected, 0)


def test_a_cache_makes_calls_depend_on_their_order(tmp_path):
    model = tiny.build("llama")

    def run():
        cache, (ids, _) = DynamicCache(config=model.config), tiny.padded([12], 12, seed=1)
        for chunk in ids.split(4, dim=1):
            model(chunk, past_key_values=cache, use_cache=True)

    expected = covariances(pefts_preprocess, model, run, tmp_path)
    assert_close(covariances(preprocess_corda, model, run, tmp_path), expected)


def test_autocast_holds_for_the_calls_in_it(tmp_path):
    model = tiny.build("llama")

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            runner(model, calls("llama"))()

    rounded, ours = (covariances(f, model, run, tmp_path) for f in (pefts_preprocess, preprocess_corda))
    assert {C.dtype for C in rounded.values()} == {torch.bfloat16}  # autocast took PEFT's sums, too
    assert {C.dtype for C in ours.values()} == {torch.float32}
    assert_close(ours, rounded, tolerance=1e-2)


def test_a_part_of_the_model_may_be_called(tmp_path):
    model, batches = tiny.build("llama"), tiny.batches()
    run = lambda: [model.model(sample["input_ids"]) for sample in calls("llama")]  # noqa: E731
    expected = covariances(pefts_preprocess, model, run, tmp_path)
    assert_close(covariances(preprocess_corda, model, run, tmp_path), expected)
    with pytest.raises(CordaError, match=r"layers.0.self_attn.q_proj is given 3 samples in a call whose padding"):
        preprocess_corda(model, config(), lambda: [model.model(**batch) for batch in batches])

    def both():
        assert model(**batches[0]).logits.isfinite().all()
        model.model.layers[0].mlp(torch.ones(1, 5, 32))

    preprocess_corda(model, config(target_modules=["up_proj"], prune_temporary_fields=False), both)
    assert [layer.mlp.up_proj.sample_count for layer in model.model.layers] == [4, 3]


class Plain(nn.Module):
    """No transformers model: its output is a tensor."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_that_returns_a_tensor(tmp_path):
    torch.manual_seed(0)
    model, losses = Plain(), []
    options = {"target_modules": r"blocks.*0"}
    run = lambda: [losses.append(float(torch.relu(model(**call)).sum())) for call in calls("llama")]  # noqa: E731
    expected = covariances(pefts_preprocess, model, run, tmp_path, **options)
    assert_close(covariances(preprocess_corda, model, run, tmp_path, **options), expected)
    assert losses[:9] == losses[9:]
    assert_close(covariances(preprocess_corda, model, runner(model, tiny.batches()), tmp_path, **options), expected)


def test_blocks_that_share_their_weights(tmp_path):
    torch.manual_seed(0)
    model = AlbertModel(
        AlbertConfig(vocab_size=96, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    )
    options = {"target_modules": ["query", "key", "ffn"]}
    run = runner(model, calls("llama"))
    expected = covariances(pefts_preprocess, model, run, tmp_path, **options)
    assert_close(covariances(preprocess_corda, model, run, tmp_path, **options), expected)
    assert_close(covariances(preprocess_corda, model, runner(model, tiny.batches()), tmp_path, **options), expected)


class Skipping(PreTrainedModel):
    """Short inputs do not run its first block."""

    config_class = LlamaConfig

    def __init__(self):
        super().__init__(LlamaConfig())
        self.embedding, self.blocks = Plain().children()

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks[int(input_ids.shape[1] < 9) :]:
            x = block(x)
        return (x,)


def test_calls_that_run_other_blocks_than_others(tmp_path):
    torch.manual_seed(0)
    model = Skipping()
    run = runner(model, calls("llama"))
    options = {"target_modules": r"blocks.*0"}
    expected = covariances(pefts_preprocess, model, run, tmp_path, **options)
    assert_close(covariances(preprocess_corda, model, run, tmp_path, **options), expected)


def test_another_model_is_hooked():
    model, batches = tiny.build("llama"), tiny.batches()
    hooked = copy.deepcopy(model).train()
    del model.model.layers[1]
    preprocess_corda(model, config(prune_temporary_fields=False), runner(hooked, batches), hooked_model=hooked)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.sample_count == 9
    assert not hasattr(hooked.model.layers[0].mlp.up_proj, "eigens")
    assert not hooked.training
    alone = copy.deepcopy(tiny.build("llama"))
    preprocess_corda(alone, config(), runner(alone, batches))
    assert torch.equal(alone.model.layers[0].mlp.up_proj.eigens.V_WC, layer.eigens.V_WC)


@pytest.mark.parametrize("family", ["llama", "mlp"])
def test_nothing_is_left_of_a_run_that_failed(family):
    model = build(family)

    def run():
        runner(model, calls(family))()
        raise KeyboardInterrupt

    for own in (False, True):  # accelerate puts its own forward on the instance
        if own:
            model.forward = model.forward
        before = vars(model).get("forward")
        with pytest.raises(KeyboardInterrupt):
            preprocess_corda(model, config(family), run)
        assert vars(model).get("forward") is before
        assert ("forward" in vars(model)) is own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(hasattr(m, "eigens") for m in model.modules())


def test_the_users_own_hooks_run_once_a_call_and_stay():
    model, runs = build("mlp"), []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    preprocess_corda(model, config("mlp"), runner(model, calls("mlp")))
    assert len(runs) == 4
    model(**calls("mlp")[0])
    assert len(runs) == 5


# Files


@pytest.mark.parametrize(
    ("writer", "reader"), [(pefts_preprocess, preprocess_corda), (preprocess_corda, pefts_preprocess)]
)
def test_files_are_pefts(writer, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pefts").mkdir()  # the original makes no file without a folder
    model, samples = tiny.build("llama"), calls("llama")
    files = {"cache_file": "pefts/cache.pt", "covariance_file": "pefts/covariance.pt"}
    writer(model, config(**files), runner(model, samples))
    eigens = {name: module.eigens for name, module in target_modules(model, config())}
    for file in files:
        again = tiny.build("llama")
        reader(again, config(**{file: files[file]}))
        for name, module in target_modules(again, config()):
            expected, actual = ((e.U_WC * e.S_WC) @ e.V_WC.T for e in (eigens[name], module.eigens))
            error = 0 if file == "cache_file" else 1e-2 if name.endswith("v_proj") else 1e-3
            assert (actual - expected).norm() <= error * expected.norm()


def test_files_of_our_own_give_the_same_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, samples = tiny.build("llama"), calls("llama")
    files = {"cache_file": "cache.pt", "covariance_file": tmp_path / "new" / "folder" / "covariance.pt"}
    Path("cache.pt").touch()  # an empty file is none
    preprocess_corda(model, config(**files), runner(model, samples))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["cache.pt", "covariance.pt"]
    for file in files:
        again = tiny.build("llama")
        preprocess_corda(again, config(**{file: files[file]}, prune_temporary_fields=False))
        for (name, module), (_, other) in zip(target_modules(model, config()), target_modules(again, config())):
            for part in ("S_WC", "U_WC", "V_WC"):
                assert torch.equal(getattr(module.eigens, part), getattr(other.eigens, part)), name
    assert not hasattr(other, "sample_count")  # as in PEFT: a file does not say


def test_a_covariance_may_be_kept_in_half_precision(tmp_path):
    model, samples = tiny.build("llama", torch.float16), calls("llama")
    ours = covariances(preprocess_corda, model, runner(model, samples), tmp_path, use_float16_for_covariance=True)
    eigens = model.model.layers[1].mlp.up_proj.eigens
    whole = covariances(preprocess_corda, model, runner(model, samples), tmp_path)
    assert {C.dtype for C in ours.values()} == {torch.float16}
    assert_close({name: C.float() for name, C in ours.items()}, whole, 1e-3)
    assert torch.equal(eigens.U_WC, model.model.layers[1].mlp.up_proj.eigens.U_WC)


def test_a_covariance_in_half_precision_may_have_a_sum_beyond_its_range(tmp_path):
    model, file = build("mlp").half(), tmp_path / "covariances.pt"
    given = {name: torch.full((n, n), 1e4).half() for name, n in (("0", 24), ("2", 40))}
    assert all(torch.isinf(C.sum()) for C in given.values())
    torch.save(given, file)
    preprocess_corda(model, config("mlp", covariance_file=str(file)))
    assert torch.isfinite(model[0].eigens.S_WC).all()


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    def fails(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    model = tiny.build("llama")
    with pytest.raises(OSError, match="no space"):
        preprocess_corda(model, config(covariance_file=tmp_path / "c.pt"), runner(model, calls("llama")))
    assert not list(tmp_path.iterdir())


# What is refused


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text", "c.pt is not a file of tensors"),
        ({"model.layers.0.mlp.up_proj": Code()}, "c.pt is not a file of tensors"),
        ([torch.eye(3)], "c.pt holds no tensor model.layers.0.mlp.up_proj"),
        ({"other": torch.eye(3)}, "c.pt holds no tensor model.layers.0.mlp.up_proj"),
        ({f"model.layers.{i}.mlp.up_proj": torch.eye(3) for i in range(2)}, "of another model: model.layers.0.mlp.up"),
    ],
)
def test_files_that_hold_something_else(content, said, tmp_path, capsys):
    file = tmp_path / "c.pt"
    file.write_text(content) if isinstance(content, str) else torch.save(content, file)
    with pytest.raises(CordaError, match=said):
        preprocess_corda(tiny.build("llama"), config(target_modules=["up_proj"], covariance_file=file))
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": None}, "corda_method is required when cache_file is not provided"),
        ({"method": "svd"}, "Invalid corda_method found: svd, it should be 'ipm' or 'kpm'"),
        ({"r": 33}, "rank mismatch: 32 vs. 33: model.layers.0.self_attn.q_proj"),
        ({"rank_pattern": {"up_proj": 50}}, "rank mismatch: 32 vs. 50: model.layers.0.mlp.up_proj"),
        ({"target_modules": ["nothing"]}, r"target_modules \{'nothing'\} matches no linear layer of Llama"),
    ],
)
def test_what_can_be_told_is_told_before_the_model_runs(options, said):
    model = tiny.build("llama")
    with pytest.raises(ValueError, match=said):
        preprocess_corda(model, config(**options), lambda: pytest.fail("the model was run"))


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
        {"exclude_modules": r".*layers\.0.*", "use_rslora": True, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_pefts_options_mean_what_they_mean_there(options):
    model = tiny.build("llama")
    start = config()
    for name, value in options.items():
        setattr(start, name, value)
    before = tiny.logits(model)
    preprocess_corda(model, start, runner(model, calls("llama")))
    decomposed = {name for name, module in model.named_modules() if hasattr(module, "eigens")}
    adapted = get_peft_model(model, start).eval()
    layers = {name for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert decomposed == layers
    assert 0 < len(layers) < 14
    torch.testing.assert_close(tiny.logits(adapted), before, atol=1e-3, rtol=0)


@pytest.mark.parametrize("option", ["cache_file", "covariance_file"])
def test_a_file_that_cannot_be_written_is_refused_before_the_model_runs(option, tmp_path):
    (tmp_path / "taken").write_text("mine")
    start = config(**{option: tmp_path / "taken" / "c.pt"})
    with pytest.raises(CordaError, match="cannot be written"):
        preprocess_corda(tiny.build("llama"), start, lambda: pytest.fail("the model was run"))


def test_without_corda_config():
    with pytest.raises(CordaError, match="lora_config has no corda_config"):
        preprocess_corda(tiny.build("llama"), peft.LoraConfig(target_modules=["up_proj"]))


def test_covariances_that_are_no_numbers(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    torch.save({name: torch.full((32, 32), float("nan")) for name in names}, tmp_path / "c.pt")
    with pytest.raises(CordaError, match=r"Invalid value found in covariance of .*: the file is broken"):
        preprocess_corda(tiny.build("llama"), config(target_modules=["up_proj"], covariance_file=tmp_path / "c.pt"))


def test_a_file_in_the_format_of_before_torch_1_6(tmp_path):
    torch.save({"0": torch.eye(24)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    model = build("mlp")
    preprocess_corda(model, config("mlp", target_modules=["0"], covariance_file=tmp_path / "c.pt"))
    assert torch.isfinite(model[0].eigens.S_WC).all()


def test_layers_that_the_solver_gave_up_on_are_said_once_each_run(monkeypatch):
    monkeypatch.setattr("corda_lora.algebra.solvers._subspace", lambda *_: None)
    for _ in range(2):
        model = tiny.build("llama")
        with pytest.warns(UserWarning, match="did not converge on 10 layers") as said:
            preprocess_corda(model, config(r=4), runner(model, calls("llama")))
        assert sum("did not converge" in str(warning.message) for warning in said) == 1


def test_decomposed_where_float64_is(monkeypatch):
    """As on a GPU without it: weights and covariances go to another device than the model's."""

    class StopError(Exception):
        pass

    def eigens(W, times, *_):
        raise StopError(f"{W.device.type} {times.keywords['C'].device.type}")

    monkeypatch.setattr("corda_lora.peft.double_device", lambda device: torch.device("meta"))
    monkeypatch.setattr("corda_lora.peft.corda_eigens", eigens)
    model = tiny.build("llama")
    with pytest.raises(StopError, match="meta meta"):
        preprocess_corda(model, config(), runner(model, calls("llama")))


def test_nothing_to_run():
    with pytest.raises(ValueError, match="run_model must be specified when covariance file and cache file"):
        preprocess_corda(tiny.build("llama"), config())


@pytest.mark.parametrize("run", [lambda model: None, lambda model: model.lm_head(torch.ones(2, 32))])
def test_layers_that_were_not_run(run):
    model = tiny.build("llama")
    with pytest.raises(CordaError, match=r"layers.0.self_attn.q_proj \(14 of 15 target|\(15 of 15 target"):
        preprocess_corda(model, config(target_modules=[*TARGETS["llama"], "lm_head"]), lambda: run(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad):
    model = tiny.build("llama")
    model.model.embed_tokens.weight.data[95] = bad
    samples = calls("llama")
    samples[5]["input_ids"][0, 2] = 95
    for call in samples[:5]:
        call["input_ids"].clamp_(max=94)
    with pytest.raises(
        ValueError, match=r"Invalid value found in input of .*layers.0.self_attn.q_proj, sample 5 .*: NaN or Inf"
    ):
        preprocess_corda(model, config(), runner(model, samples))


def test_a_sample_whose_largest_number_is_zero():
    model = build("mlp")
    with pytest.raises(ValueError, match="Invalid value found in covariance of 0"):
        preprocess_corda(model, config("mlp"), lambda: model(-torch.rand(30, 24) * torch.arange(24)))


def test_all_linear(tmp_path):
    model, samples = tiny.build("llama"), calls("llama")
    start = config(target_modules="all-linear")
    preprocess_corda(model, start, runner(model, samples))
    assert isinstance(get_peft_model(model, start), peft.PeftModel)
