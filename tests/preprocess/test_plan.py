"""The plan against what really happens: adapters and work on disk, shared inputs, memory that PyTorch hands out; and
the verb on large models of which there is nothing but a config.json."""

import json
import re
import resource
import shutil
import warnings
from dataclasses import fields, replace

import pytest
import tiny
import torch
from helpers import allocated
from safetensors import safe_open
from transformers import LlamaConfig

from corda_lora.adapters.lora import install, save_adapter
from corda_lora.adapters.prepare import prepare
from corda_lora.adapters.quantize import write_base
from corda_lora.cli import main
from corda_lora.config import CordaConfig, CordaError, ModelConfig
from corda_lora.models.loading import empty_model
from corda_lora.models.lockstep import find_blocks
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import quantize
from corda_lora.preprocess.collect import Group
from corda_lora.preprocess.context import Ability, Context
from corda_lora.preprocess.costs import EIGH, EVENING, Layer, decomposing, mixing, quantizing, selecting
from corda_lora.preprocess.layer import (
    LayerRecord,
    choose_covariance,
    decompose_layer,
    extremes_of,
    input_factors,
    keep_components,
    quantize_layer,
    seen_from,
    start_layer,
)
from corda_lora.preprocess.machine import H100, described_machine
from corda_lora.preprocess.pipeline import _mix, preprocess
from corda_lora.preprocess.plan import (
    Tokens,
    check_room,
    count_tokens,
    init_plan,
    planned_model,
    shapes_of,
    shared_inputs,
    size_text,
)

SAMPLES = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(12)]
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
TOKENS = Tokens(131072, 4096, 131072 * 512)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tiny context has low rank
        yield


@pytest.fixture(scope="module")
def llama7b():
    """The shapes of a LLaMA-2-7B."""
    settings = LlamaConfig(**SEVEN | {"architectures": ["LlamaForCausalLM"]})
    return shapes_of(empty_model(settings, ModelConfig("", dtype="bfloat16")), CordaConfig(r=16))


def configuration(folder, **settings):
    """A directory with a config.json and nothing else."""
    LlamaConfig(
        **settings, vocab_size=32000, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    ).save_pretrained(folder)
    return folder


def planned(capsys, *arguments):
    capsys.readouterr()
    main(["plan", *(str(a) for a in arguments)])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *(str(a) for a in arguments)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# --- against runs ----------------------------------------------------------------------------------------------------


def tensor_bytes(path):
    with safe_open(path, framework="pt") as tensors:
        return sum(tensors.get_tensor(k).nbytes for k in tensors.keys())  # noqa: SIM118


@pytest.mark.parametrize("split", ["anchored", "seeded", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_files_are_those_of_a_run(split, dtype, tmp_path):
    model, config = tiny.build("llama", dtype), CordaConfig(r=3, split=split, device="cpu")
    plan = init_plan(model, config, tiny.batches())
    work = tmp_path / "work"
    work.mkdir()
    start = preprocess(model, config, tiny.batches(), progress=False, work=work)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.adapter_parameters == start.record["totals"]["parameters"]
    assert plan.work_bytes == sum(tensor_bytes(path) for path in work.glob("*.safetensors"))
    save_adapter(install(model, start), tmp_path / "start", {})
    assert plan.adapter_bytes == tensor_bytes(tmp_path / "start" / "adapter_model.safetensors")
    assert plan.disk_bytes == plan.work_bytes + plan.adapter_bytes
    assert plan.seconds != plan.seconds  # not measured, not guessed


@pytest.mark.parametrize("options", [{"keep": 10}, {"keep": 10, "orientation": "two_sided", "split": "balanced"}])
def test_what_runs_backward_leaves_files_of_the_planned_size(options, tmp_path):
    model, config, batches = tiny.build("llama"), CordaConfig(r=3, device="cpu", **options), tiny.batches() * 2
    plan = init_plan(model, config, batches)
    work = tmp_path / "work"
    work.mkdir()
    start = preprocess(model, config, batches, progress=False, work=work)
    assert plan.work_bytes == sum(tensor_bytes(path) for path in work.glob("*.safetensors"))
    start.statistics.save(tmp_path / "statistics.safetensors")
    assert plan.statistics_bytes == tensor_bytes(tmp_path / "statistics.safetensors")
    assert plan.disk_bytes == plan.work_bytes + plan.adapter_bytes + plan.statistics_bytes


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens", "norm"]}),
        ("bert", {}),  # a classifier's head is saved whole
        ("roberta", {"modules_to_save": ["word_embeddings"]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_that_are_saved_whole_are_in_the_planned_file(family, options, dtype, tmp_path):
    model, config = tiny.build(family, dtype), CordaConfig(r=3, device="cpu", **options)
    plan = init_plan(model, config, tiny.batches(family))
    start = preprocess(model, config, tiny.batches(family), progress=False)
    save_adapter(install(model, start), tmp_path / "start", {})
    assert plan.adapter_bytes == tensor_bytes(tmp_path / "start" / "adapter_model.safetensors")


@pytest.mark.parametrize("options", [{"fold": 0, "split": "paper"}, {"fold": 2}, {"double_quantization": True}])
def test_a_quantized_base_has_the_planned_size(options, tmp_path):
    model = tiny.build("llama_for_nf4")
    config = CordaConfig(r=3, device="cpu", mode="ipm", quantization="nf4", **options)
    plan = init_plan(model, config, tiny.batches())
    (work := tmp_path / "work").mkdir()
    start = preprocess(model, config, tiny.batches(), progress=False, work=work)
    written = sum(tensor_bytes(path) for path in work.glob("*.safetensors"))
    assert plan.work_bytes == pytest.approx(written, rel=0.1)  # beside how it is quantized, in JSON
    write_base(model, start, tmp_path / "base", {})
    base = sum(tensor_bytes(path) for path in (tmp_path / "base").glob("*.safetensors"))
    assert plan.base_bytes == pytest.approx(base, rel=0.3)  # of such small layers the tables are much
    assert plan.disk_bytes == plan.work_bytes + plan.adapter_bytes + plan.base_bytes
    save_adapter(install(model, start), tmp_path / "start", {})
    assert plan.adapter_bytes == tensor_bytes(tmp_path / "start" / "adapter_model.safetensors")


def test_allocation_keeps_more_on_the_disk_and_no_larger_adapter(tmp_path):
    model, config = tiny.build("llama"), CordaConfig(r=3, preset="corda+", device="cpu")
    plan = init_plan(model, config, tiny.batches())
    start = preprocess(model, config, tiny.batches(), progress=False, work=tmp_path)
    assert 0.95 * plan.adapter_parameters < start.record["totals"]["parameters"] <= plan.adapter_parameters
    assert plan.work_bytes > 1.5 * init_plan(model, CordaConfig(r=3), tiny.batches()).work_bytes
    assert plan.work_bytes == pytest.approx(sum(tensor_bytes(p) for p in tmp_path.glob("*.safetensors")), rel=0.3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_layers_that_share_inputs_are_those_that_a_run_finds(family):
    model = tiny.build(family)
    targets = find_targets(model, "all-linear")
    leaders = {}
    for _, groups in tiny.steps(model, targets, tiny.batches(family, equal=True)):
        leaders |= {name: members[0] for members, Cs in groups or [] if Cs for name in members}
    assert shared_inputs(model, targets, find_blocks(model, list(targets))) == leaders


def test_a_llama_shares_between_qkv_and_between_gate_and_up():
    model = tiny.build("llama")
    targets = find_targets(model, "all-linear")
    groups = {}
    for name, leader in shared_inputs(model, targets, find_blocks(model, list(targets))).items():
        groups.setdefault(leader, []).append(name.rpartition(".")[2])
    each = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(groups.values()) == 2 * each


def test_a_model_that_cannot_be_run_without_numbers_shares_nothing():
    model = tiny.build("llama")
    model.config = None
    targets = find_targets(model, "all-linear")
    assert shared_inputs(model, targets, []) == {name: name for name in targets}


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
@pytest.mark.parametrize(
    ("mode", "solver"), [("kpm", "gram"), ("kpm", "subspace"), ("ipm", "subspace"), ("kpm", "svd")]
)
def test_memory_of_a_decomposition_is_what_is_allocated(shape, mode, solver):
    torch.manual_seed(0)
    m, n = shape
    config, W, X = (
        CordaConfig(mode=mode, r=8, solver=solver),
        torch.randn(m, n),
        torch.randn(2 * n, n) * torch.logspace(0, -4, n),
    )
    C = X.T @ X
    most, (U, sigma) = allocated(lambda: decompose_layer(W, C, config))
    kept, _ = allocated(lambda: keep_components(W, C, U, sigma, 8, config, LayerRecord()))
    planned = decomposing(Layer("", m, n, ""), 8, True, config, on_cpu=True)
    assert 0.95 < 8 * planned[1] / max(most, kept + U.nbytes) < 1.4


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
@pytest.mark.parametrize("options", [{"fold": 0}, {"fold": 2}, {"fold": 1, "orientation": "two_sided"}])
def test_memory_of_quantizing_is_what_is_allocated(shape, options):
    torch.manual_seed(0)
    m, n = shape
    config = CordaConfig(mode="ipm", r=8, quantization="nf4", **options)
    W, X, G = torch.randn(m, n), torch.randn(2 * n, n), torch.randn(2 * m, m)
    C, D = X.T @ X, G.T @ G if config.orientation == "two_sided" else None
    U, sigma = decompose_layer(W, C, replace(config, orientation="covariance"))
    kept = keep_components(W, C, U, sigma, 8, config, LayerRecord())

    def store(X, metric):
        return quantize(X, torch.float32, metric=metric)

    most, _ = allocated(lambda: quantize_layer(W, kept, 8, config, store, C, D))
    assert 0.95 < 8 * quantizing(Layer("", m, n, ""), True, config)[1] / most < 1.3


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
@pytest.mark.parametrize("split", ["anchored", "balanced", "paper"])
def test_a_start_takes_its_factors_or_a_float64_copy_of_its_components_and_of_them(shape, split):
    torch.manual_seed(0)
    (m, n), r = shape, 64
    W, C = torch.randn(m, n), torch.eye(n)
    for preset in ("corda", "corda+"):
        config = CordaConfig(mode="ipm", r=r, split=split, preset=preset)
        kept = keep_components(W, C, *decompose_layer(W, C, config), r, config, LayerRecord())
        most, start = allocated(lambda: start_layer(kept, r, config))  # noqa: B023
        components = [x for x in (kept.rows, kept.U) if x is not None]
        assert bool(components) == (preset == "corda+")
        factors = start.A.numel() + start.B.numel() * (kept.U is not None)
        doubles = 8 * (sum(x.numel() for x in components) + factors * bool(components))
        assert most <= doubles + start.A.nbytes + start.B.nbytes + 8 * min(m, n) + 64 * r


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
@pytest.mark.parametrize(
    ("mode", "solver"), [("kpm", "gram"), ("kpm", "subspace"), ("ipm", "subspace"), ("kpm", "svd")]
)
def test_memory_of_a_two_sided_decomposition_is_what_is_allocated(shape, mode, solver):
    torch.manual_seed(0)
    m, n = shape
    config = CordaConfig(mode=mode, r=8, solver=solver, orientation="two_sided")
    W, X, G = torch.randn(m, n), torch.randn(2 * n, n) * torch.logspace(0, -4, n), torch.randn(2 * m, m)
    C, D = X.T @ X, G.T @ G

    def decompose():
        seen = seen_from(W, D, config)
        factors = input_factors([C], config, W.device)
        U, sigma = decompose_layer(seen.Z, C, config, T=factors(0))
        return keep_components(W, C, U, sigma, 8, config, LayerRecord(), seen)

    planned = decomposing(Layer("", m, n, ""), 8, True, config, on_cpu=True)
    assert 0.95 < 8 * planned[1] / allocated(decompose)[0] < 1.2


@pytest.mark.parametrize("orientation", ["covariance", "two_sided"])
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
def test_memory_of_a_selection_is_what_is_allocated(shape, on_cpu, orientation, monkeypatch):
    torch.manual_seed(0)
    m, n = shape
    config = CordaConfig(preset="corda++", r=8, rounds=3, orientation=orientation)
    W, X, D = torch.randn(m, n), torch.randn(2 * n, n), torch.eye(m)
    Cs = [X.T @ X] * 3
    monkeypatch.setattr("corda_lora.preprocess.layer.factors_slowly", lambda device: not on_cpu)

    def select():
        extremes, factors = extremes_of(Cs, config, W.device), input_factors(Cs, config, W.device)
        seen = seen_from(W, D, config)
        first = choose_covariance(W, Cs, extremes, config, seen)
        factors(first.round)
        return choose_covariance(W, Cs, extremes, config, seen)

    most, _ = allocated(select)
    assert 0.95 < 8 * selecting([Layer("", m, n, "")] * 2, config, on_cpu)[1] / most < 1.4


@pytest.mark.parametrize("orientation", ["covariance", "two_sided"])
@pytest.mark.parametrize("weights", ["given", "compactness"])
@pytest.mark.parametrize("abilities", [2, 4])
@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
def test_memory_of_mixing_is_what_is_allocated(shape, abilities, weights, orientation, monkeypatch):
    """... and the eigendecompositions of even weights are about as many as are counted."""
    torch.manual_seed(0)
    m, n = shape
    config = CordaConfig(r=8, weights=weights, orientation=orientation)
    inputs = [torch.randn(2 * n, n) * torch.logspace(0, -1 - k, n) for k in range(abilities)]
    context = Context(abilities=[Ability(str(k), 1.0) for k in range(abilities)])
    runs, eigh = [], torch.linalg.eigh
    monkeypatch.setattr("torch.linalg.eigh", lambda C: runs.append(len(C)) or eigh(C))
    group = Group(["up"], [X.T @ X for X in inputs])

    def mix():
        gradients = {"up": torch.eye(m).repeat(abilities, 1, 1)} if config.runs_back else {}
        return _mix(group, gradients, config, context, torch.device("cpu"))

    most, alpha = allocated(mix)
    work, numbers = mixing([Layer("up", m, n, "up")], abilities, config)
    Ds = 4 * abilities * m * m * config.runs_back
    assert 0.95 < (8 * numbers + Ds) / most < 1.4
    assert (len(set(alpha)) > 1) == (weights == "compactness")
    expected = EIGH * sum(size**3 for size in runs)
    assert expected / 2 <= work.get("eigen", 0) <= 2 * expected


def test_layers_that_share_their_input_share_the_factor_of_its_covariance():
    """... of one round: of several, each layer may be oriented by another."""

    def factoring(leader, **options):
        layer, config = Layer("up", 192, 512, leader), CordaConfig(r=8, orientation="two_sided", **options)
        return decomposing(layer, 8, True, config, on_cpu=True)[0]["factor"]

    assert factoring("up") - factoring("gate") == 512**3 // 3
    assert factoring("up", preset="corda++") == factoring("gate", preset="corda++")


# --- what depends on what --------------------------------------------------------------------------------------------


def test_more_work_costs_more(llama7b):
    def plan(tokens=TOKENS, park="device", machine=H100, **options):
        return init_plan(llama7b, CordaConfig(r=16, **options), tokens, park, machine)

    one, five = plan(), plan(Tokens(*(5 * x for x in TOKENS)), preset="corda++")
    assert five.seconds > 2 * one.seconds
    assert five.peaks[0] > one.peaks[0]
    assert five.flops > one.flops
    assert [stage.name for stage in five.stages] == ["forward", "selection", "decomposition", "state", "factors"]
    assert plan(split="balanced").disk_bytes > one.disk_bytes
    assert plan(orientation="identity").flops < one.flops
    assert plan(orientation="identity").seconds > 10e9 / H100.read  # the weights are read all the same
    assert plan(solver="svd").seconds > one.seconds
    kept, two_sided = plan(keep=10), plan(orientation="two_sided")
    assert 2.5 * one.flops < kept.flops < 4 * one.flops  # forward twice, backward once; C and D
    assert kept.peaks[0] > one.peaks[0]
    assert kept.parked_bytes > 16 * one.parked_bytes  # the input of each of 32 blocks
    assert 0 == two_sided.statistics_bytes == one.statistics_bytes < kept.statistics_bytes < 1e9
    assert two_sided.seconds > one.seconds
    assert plan(keep=10, orientation="identity").flops > plan(orientation="identity").flops
    in_cpu, on_disk = plan(park="cpu"), plan(park="disk")
    assert in_cpu.peaks[0] < one.peaks[0]
    assert in_cpu.peaks[1] > one.peaks[1]
    assert on_disk.disk_bytes > in_cpu.disk_bytes == one.disk_bytes
    assert plan(machine=replace(H100, accelerator=None)).peaks[0] == 0
    # 6.5e9 parameters in blocks, of which each of 131072 tokens takes two operations
    assert 2 * 6.4e9 * 131072 < one.flops < 5 * 6.4e9 * 131072


# Options of `corda init` with what else they need to change a plan, by the option.
CHANGES = {
    "mode": {"mode": "ipm"},
    "preset": {"preset": "corda+"},
    "r": {"r": 20},
    "rounds": {"rounds": 2},
    "min_rank": {"preset": "corda+", "min_rank": 4},
    "max_rank": {"preset": "corda+", "max_rank": 17},
    "budget": {"preset": "corda+", "budget": 1e5},
    "split": {"split": "balanced"},
    "orientation": {"orientation": "two_sided"},
    "solver": {"solver": "svd"},
    "weights": {"weights": "compactness"},
    "target_modules": {"target_modules": ["q_proj"]},
    "quantization": {"quantization": "nf4"},
    "double_quantization": {"quantization": "nf4", "double_quantization": True},
    "fold": {"quantization": "nf4", "split": "balanced", "fold": 2},
    "keep": {"keep": 10.0},
    "exclude_modules": {"exclude_modules": ["q_proj"]},
    "layers_to_transform": {"layers_to_transform": [0]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def test_every_option_changes_the_plan_or_the_help_says_that_it_does_not(capsys):
    model = empty_model(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            architectures=["LlamaForCausalLM"],
        ),
        ModelConfig("", dtype="bfloat16"),
    )

    def figures(options):
        abilities = 3 if "weights" in options else 1
        plan = init_plan(model, CordaConfig(**{"r": 16} | options), TOKENS, "auto", H100, abilities)
        return plan.flops, plan.seconds, plan.peaks, plan.disk_bytes, plan.adapter_bytes, plan.base_bytes

    for option, options in CHANGES.items():
        others = {key: value for key, value in options.items() if key != option}
        without = figures({"weights": "given"} if option == "weights" else others)
        assert figures(options) != without, option
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = capsys.readouterr().out.partition("options:")[0]
    unchanging = {
        option.removeprefix("--") for option in re.findall(r"--\w+", said.partition("weights are not needed.")[2])
    }
    elsewhere = {"bias", "device"}  # one value alone; the machine
    assert CHANGES.keys() | unchanging | elsewhere >= {f.name for f in fields(CordaConfig)}
    assert not CHANGES.keys() & unchanging


def test_each_ability_of_a_mixture_has_sums_of_its_own(llama7b):
    """... which wait until they are mixed: C of each, and D of each where the context runs backward."""

    def plan(abilities, orientation="covariance", park="cpu"):
        return init_plan(llama7b, CordaConfig(r=16, orientation=orientation), TOKENS, park, H100, abilities)

    C = 4 * (3 * 4096**2 + 11008**2)  # of one block: what q, k and v, what o, what gate and up, what down is given
    D = 4 * (5 * 4096**2 + 2 * 11008**2)
    one, three = plan(1), plan(3)
    assert three.parked_bytes - one.parked_bytes == 2 * C
    assert three.peaks[1] - one.peaks[1] == pytest.approx(2 * C)
    assert plan(3, "two_sided").parked_bytes - plan(1, "two_sided").parked_bytes == 2 * (C + D)
    assert plan(3, park="device").peaks[0] > plan(1, park="device").peaks[0]
    assert plan(3).disk_bytes == one.disk_bytes


@pytest.mark.parametrize("park", ["device", "cpu"])
def test_weights_by_compactness_take_time_and_memory(llama7b, park):
    """In the stage of the selection, as in a run: of each input, eigendecompositions and a C of each ability."""

    def plan(abilities, weights):
        return init_plan(llama7b, CordaConfig(r=16, weights=weights), TOKENS, park, H100, abilities)

    given, even, more = plan(3, "given"), plan(3, "compactness"), plan(5, "compactness")
    inputs = 32 * [4096, 4096, 4096, 11008]
    assert even.flops - given.flops == sum(EVENING * (EIGH * n**3 + 3 * 2 * n * n * 16) for n in inputs)
    assert [stage.name for stage in even.stages][:2] == ["forward", "selection"]
    assert "selection" not in [stage.name for stage in given.stages]
    assert even.stages[1].seconds > EVENING * H100.eigen * sum(n**3 for n in inputs)
    at_once = 8 * (3 + 5) * 11008**2
    assert even.stages[1].accelerator > at_once + 3 * 4 * 11008**2
    assert more.stages[1].accelerator - even.stages[1].accelerator >= 2 * (8 + 4) * 11008**2
    # What is decomposed is the mixture: no C of another ability is beside it.
    one = init_plan(llama7b, CordaConfig(r=16), TOKENS, "cpu", H100)
    assert plan(3, "given").stages[1].accelerator == one.stages[1].accelerator or park == "device"


def test_tokens_are_counted_with_their_padding():
    assert count_tokens(tiny.batches()) == (3 * 12 + 2 * 10 + 4 * 8, 36, 3 * 144 + 2 * 100 + 4 * 64, 3)
    assert count_tokens([]) == (0, 0, 0, 0)


def test_a_described_card():
    card = described_machine("24GB", 165, 1.3)
    assert (card.accelerator, card.multiply, card.double) == (24e9, 165e12, 1.3e12)
    assert card.eigen > H100.eigen
    assert described_machine("24 GiB").accelerator == 24 * 2**30
    assert described_machine("24gb").multiply == H100.multiply


# --- room on the disk ------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_said_before_the_run(tmp_path, monkeypatch):
    plan = init_plan(tiny.build("llama"), CordaConfig(r=3), tiny.batches())
    output = tmp_path / "not" / "yet"
    check_room(plan, output)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=plan.disk_bytes - 1))
    with pytest.raises(CordaError, match=r"the disk of .*yet has .* free, but .* needed"):
        check_room(plan, output)
    finished = tmp_path / "not" / "yet.work"  # what a broken-off run has written need not be written again
    finished.mkdir(parents=True)
    (finished / "0000.safetensors").write_bytes(b"12")
    check_room(plan, output)


# --- the verb --------------------------------------------------------------------------------------------------------


def test_the_verb_names_options_that_fit(tmp_path, capsys):
    model = configuration(tmp_path / "llama", **SEVEN)
    shown = planned(capsys, "--model", model, "--gpu", "80GB", "--samples", 256)
    assert "6,738,415,616 parameters" in shown
    assert "adapter: 39,976,960 parameters" in shown
    assert "131,072 tokens" in shown
    assert "fit" not in shown
    shown = planned(capsys, "--model", model, "--gpu", "5.5GB", "--park", "device")
    assert re.search(r"does not fit; fits with --park cpu\n", shown)
    shown = planned(capsys, "--model", model, "--gpu", "5.5GB", "--rounds", 5, "--tflops", 100)
    assert re.search(r"does not fit; fits with --rounds 1\n", shown)
    assert "100 TFLOP/s" in shown
    assert "does not fit, nor with" in planned(capsys, "--model", model, "--gpu", "1GB")


def test_the_verb_on_70b_takes_little_memory(tmp_path, capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shown = planned(
        capsys, "--model", configuration(tmp_path / "llama", **SEVENTY, num_key_value_heads=8), "--gpu", "80GB"
    )
    assert "68,976,648,192 parameters" in shown
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e6  # kB


def test_the_verb_with_a_context_on_this_machine(checkpoint, tmp_path, capsys):
    path = tmp_path / "keep.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    flags = ["--model", checkpoint, "--r", 4, "--device", "cpu", "--mode", "ipm"]
    shown = planned(capsys, *flags, "--context", path)
    tokens = int(re.search(r"context: ([\d,]+) tokens", shown)[1].replace(",", ""))
    assert 12 * 30 < tokens < 12 * 50
    assert "this machine (CPU" in shown
    assert "nan" not in shown


def test_the_verb_counts_all_contexts_of_a_mixture(checkpoint, tmp_path, capsys):
    rows = [json.dumps(row) + "\n" for row in SAMPLES]
    (one := tmp_path / "one.jsonl").write_text("".join(rows))
    (two := tmp_path / "two.jsonl").write_text("".join(rows[:5]))
    flags, on_card = ["--model", checkpoint, "--r", 4, "--samples", 10], ["--gpu", "80GB"]

    def tokens(*arguments):
        shown = planned(capsys, *flags, *(arguments if "--gpu" in arguments else [*arguments, "--device", "cpu"]))
        assert "assumed, as no" not in shown
        return int(re.search(r"context: ([\d,]+) tokens", shown)[1].replace(",", ""))

    first, second = tokens("--context", one), tokens("--context", two)
    assert first > second > 0
    assert tokens("--context", one, "--context", two, "--context.weight", 3) == first + second
    assert tokens("--context", one, "--context.samples", 5, "--context", two) < first + second
    assert tokens("--context", one, "--context", two, "--gpus", 1, *on_card) == first + second
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"context:\n- {one}\n- {{data: {two}, weight: 3}}\n")
    assert tokens("--config", recipe) == first + second


def test_the_verb_refuses_several_contexts_where_init_does(checkpoint, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    both = ["--model", checkpoint, "--context", tmp_path / "one.jsonl", "--context", tmp_path / "two.jsonl", "--r", 4]
    for gpus in ([], ["--gpu", "80GB", "--gpus", 2]):
        said = refused(capsys, *both, *gpus, "--keep", 10)
        assert said.startswith("corda plan: keep is the price of one context")
        assert "5 rounds are of one context, but there are 2" in refused(capsys, *both, *gpus, "--preset", "corda++")
    for alone in ([], both[:4], ["--orientation", "identity"]):
        said = refused(capsys, "--model", checkpoint, "--r", 4, *alone, "--weights", "compactness")
        assert said == "corda plan: weights by compactness are of several contexts: give two or more"
    twice = [*both, "--context", tmp_path / "one.jsonl", "--context.ability", "again"]
    assert "names the same samples" in refused(capsys, *twice)


def test_the_verb_names_the_orientation(tmp_path, capsys):
    flags = ["--model", configuration(tmp_path / "llama", **SEVEN), "--gpu", "80GB", "--samples", 256]
    for several in ([], ["--gpus", 2]):
        assert "start: corda, kpm, anchored, covariance\n" in planned(capsys, *flags, *several)
        assert "start: corda, kpm, anchored, two_sided\n" in planned(capsys, *flags, *several, "--keep", 10)
        assert "start: corda, ipm, seeded, covariance\n" in planned(capsys, *flags, *several, "--mode", "ipm")


def test_the_verb_tells_the_output_from_what_is_on_the_disk_at_once(tmp_path, capsys):
    model = configuration(tmp_path / "llama", **SEVEN)
    shown = planned(capsys, "--model", model, "--gpu", "80GB", "--samples", 256, "--keep", 10)
    config = CordaConfig(keep=10)
    plan = init_plan(planned_model(ModelConfig(str(model))), config, TOKENS, machine=described_machine("80GB"))
    output = plan.adapter_bytes + plan.statistics_bytes
    assert plan.disk_bytes == output + plan.work_bytes
    said = f"output: {size_text(output)}; on the disk at once, with OUTPUT.work: {size_text(plan.disk_bytes)}\n"
    assert said in shown


def test_the_verb_takes_a_recipe_of_init_and_says_whether_its_disk_has_room(tmp_path, capsys, monkeypatch):
    model, output = configuration(tmp_path / "llama", **SEVEN), tmp_path / "not" / "yet"
    (recipe := tmp_path / "recipe.yaml").write_text(f"model: {model}\noutput: {output}\nkeep_work: true\nr: 8\n")
    shown = planned(capsys, "--config", recipe, "--gpu", "80GB", "--samples", 256)
    assert "fit" not in shown
    assert not output.parent.exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1e6))
    for gpus in ([], ["--gpus", 2]):
        shown = planned(capsys, "--config", recipe, "--gpu", "80GB", "--samples", 256, *gpus)
        assert re.search(r"does not fit: the disk of .*yet has 1.0 MB free, but", " ".join(shown.split()))


def test_the_verb_counts_the_head_of_a_classifier_that_the_context_makes(checkpoint, tmp_path, capsys):
    rows = [{"text": f"number {i}", "label": ["odd", "even"][i % 2]} for i in range(20)]
    (path := tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", checkpoint, "--r", 4, "--device", "cpu"]
    parameters = re.compile(r"model: ([\d,]+) parameters")
    whole = planned(capsys, *flags, "--labels", "odd,even")
    made = planned(capsys, *flags, "--context", path, "--context.label", "label")
    assert parameters.search(made)[1] == parameters.search(whole)[1] != parameters.search(planned(capsys, *flags))[1]
    assert "label names a column of a context: give --context, or" in refused(capsys, *flags, "--label", "label")


def test_the_verb_refuses_what_init_refuses_of_a_model(checkpoint, tmp_path, capsys):
    flags = ["--model", checkpoint, "--r", 4]
    said = refused(capsys, *flags, "--gpu", "80GB", "--device", "cpu")
    assert said == "corda plan: --gpu describes a card, and with --device cpu it does nothing: leave one of them out"
    assert "what quantization lost" in refused(capsys, *flags, "--mode", "ipm", "--split", "balanced", "--fold", 2)
    outside = [*flags, "--keep", 10, "--target_modules", "lm_head"]
    assert "lm_head is outside of the model's blocks" in refused(capsys, *outside)
    tiny.build("bert").save_pretrained(tmp_path)
    said = refused(capsys, "--model", tmp_path, "--r", 4, "--orientation", "two_sided")
    assert "BertForSequenceClassification is no causal language model: a context runs backward (keep" in said


def test_the_verb_says_that_other_samples_are_not_counted(checkpoint, capsys):
    """Those whose leak a start in kpm is compared with (see `prepare`)."""
    flags = ["--model", checkpoint, "--r", 4, "--gpu", "80GB", "--samples", 64]
    for several in ([], ["--gpus", 2]):
        assert "not counted: measuring what other samples" in planned(capsys, *flags, *several)
        for others in (["--mode", "ipm"], ["--preset", "corda++"], ["--orientation", "identity"]):
            assert "not counted: measuring" not in planned(capsys, *flags, *several, *others)


@pytest.mark.parametrize("size", ["24 bananas", "GB", "0GB", "-1GB"])
def test_a_size_that_is_none_is_refused(size, tmp_path, capsys):
    model = configuration(tmp_path / "llama", **SEVEN)
    assert "such as 24GB" in refused(capsys, "--model", model, f"--gpu={size}")


def test_what_cannot_be_planned_is_refused(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert "config.json" in refused(capsys, "--model", tmp_path / "model.gguf", "--gpu", "8GB")
    assert "no config.json" in refused(capsys, "--model", tmp_path / "nothing", "--gpu", "8GB")
    model = configuration(tmp_path / "llama", **SEVEN)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"architectures": None}))
    assert "cannot be planned" in refused(capsys, "--model", model, "--gpu", "8GB")
    assert "at least 1e-09" in refused(capsys, "--model", model, "--gpu", "8GB", "--tflops=-1")
    assert "--gpu" in refused(capsys, "--model", model, "--tflops", 100)


@pytest.mark.parametrize("options", [{}, {"double_quantization": True}])
def test_a_model_in_4_bits(options, tmp_path, capsys, tokenizer):
    """Its blocks have the bytes that they are stored in, and it is in memory whole."""
    base = tmp_path / "start" / "base"
    tiny.build("llama_for_nf4", torch.bfloat16).save_pretrained(tmp_path / "full")
    config = CordaConfig(mode="ipm", orientation="identity", quantization="nf4", fold=0, **options)
    tokenizer.save_pretrained(tmp_path / "full")
    prepare(ModelConfig(str(tmp_path / "full")), config, None, tmp_path / "start", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = planned_model(ModelConfig(str(base)))
    shapes = shapes_of(model, CordaConfig(r=4))
    stored = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # but for the tables of levels, and how it is quantized, in JSON
            names = [n for n in file.keys() if not re.search(r"quant_map|quant_state", n)]  # noqa: SIM118
            stored += sum(file.get_tensor(n).nbytes for n in names)
    assert shapes.loaded == pytest.approx(stored, rel=0.01)
    full = shapes_of(empty_model(model.config, ModelConfig("", dtype="float32")), CordaConfig(r=4))
    assert shapes.blocks[0][1] < 0.16 * sum(4 * m * n for _, m, n, _ in full.blocks[0][2])
    for machine in (described_machine("1GB", None, None), None):
        plan = init_plan(model, CordaConfig(r=4, device="cpu"), TOKENS, machine=machine)
        assert min(stage.cpu for stage in plan.stages) > 1e9 + shapes.loaded
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        planned(capsys, "--model", base, "--quantization", "nf4", "--orientation", "identity")
    assert stopped.value.code == 2
    assert "the model is quantized already" in capsys.readouterr().err


def test_rows_that_cannot_be_quantized_are_refused(tmp_path, capsys):
    folder = configuration(tmp_path, hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(SystemExit):
        planned(capsys, "--model", folder, "--quantization", "nf4", "--orientation", "identity")
    assert "cannot be quantized in blocks of 64" in capsys.readouterr().err
