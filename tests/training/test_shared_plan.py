"""`corda plan --gpus`: what the plan shares out, beside what the code that shares does."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch

from corda_lora.adapters.prepare import prepare
from corda_lora.cli import main
from corda_lora.config import CordaConfig, ModelConfig
from corda_lora.preprocess.context import Ability, Context
from corda_lora.preprocess.costs import group_seconds, groups_of
from corda_lora.preprocess.machine import H100
from corda_lora.preprocess.plan import Tokens, init_plan, planned_model, shapes_of
from corda_lora.preprocess.share import Share
from corda_lora.processes import Processes
from corda_lora.training.plan import NETWORK, NVLINK, TRAINED, busy_share, shared_plan

TOKENS = Tokens(5 * 64 * 256, 4096, 5 * 64 * 256 * 256)


def llama(blocks):
    return tiny.t.LlamaForCausalLM(tiny.t.LlamaConfig(**tiny.SIZE | {"num_hidden_layers": blocks}))


@pytest.fixture
def model():
    return tiny.build("llama")


@pytest.mark.parametrize("config", [CordaConfig(mode="kpm", r=4), CordaConfig(mode="kpm", preset="corda++", r=4)])
def test_one_gpu_takes_what_one_process_takes(model, config):
    shapes = shapes_of(model, config)
    one, plan = init_plan(shapes, config, TOKENS, "auto", H100), shared_plan(shapes, config, TOKENS, H100, 1)
    assert [stage.name for stage in plan.preparation] == [stage.name for stage in one.stages]
    for shared, stage in zip(plan.preparation, one.stages):
        assert shared.seconds == pytest.approx(stage.seconds, rel=1e-6)
        assert (shared.accelerator, shared.host, shared.traffic) == (stage.accelerator, stage.cpu, 0)


def test_the_page_names_the_stages_as_the_plan_does(model):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for preset in ("corda", "corda++"):
        config = CordaConfig(mode="kpm", preset=preset, r=4)
        plan = shared_plan(shapes_of(model, config), config, TOKENS, H100, 8)
        named = re.findall(rf"^\| `{re.escape(preset)}`: (.+?) \|", page, re.MULTILINE)
        assert named == 4 * [stage.name for stage in plan.preparation]  # four tables
        assert re.findall(r"^\| a step, (.+?) \|", page, re.MULTILINE) == 4 * [step.name for step in plan.steps]


@pytest.mark.parametrize("abilities", [1, 3])
@pytest.mark.parametrize("processes", [2, 3])
def test_layers_are_shared_out_as_they_will_be(processes, abilities):
    """5 blocks: whole ones to each process, then groups of layers. The longest of the loads that `Share` gives."""
    config = CordaConfig(mode="kpm", r=4, weights="given" if abilities == 1 else "compactness")
    model = llama(5)
    shapes = shapes_of(model, config)
    layers = {layer.name: layer for _, _, block in shapes.blocks for layer in block}
    targets = {name: model.get_submodule(name) for name in layers}
    share = Share(Processes(0, processes, None), model, targets, config, torch.device("cuda"))
    share.part(Context(abilities=[Ability(str(k), 1.0) for k in range(abilities)][abilities == 1 :]))
    for name, layer in layers.items():
        if layer.leader == name:
            share.owner([n for n, other in layers.items() if other.leader == name], True)
    planned = busy_share(shapes, config, H100, processes, abilities)
    assert planned == pytest.approx(max(share.loads) / sum(share.loads))
    alone = [group_seconds(group, config, False, H100) for group in groups_of(layers.values()).values()]
    assert (sum(share.loads) > 1.1 * sum(alone)) == (abilities > 1)  # weights by compactness take time, too


def test_what_is_sent(model):
    """In a preparation each process sends its sums of each round, and weights; in a step, gradients or weights."""
    config = CordaConfig(mode="kpm", preset="corda++", r=4)
    shapes = shapes_of(model, config)
    width, inner = tiny.SIZE["hidden_size"], tiny.SIZE["intermediate_size"]
    a_round = 4 * 2 * (3 * width**2 + inner**2)  # q = k = v, o, gate = up, down; two blocks
    plan = shared_plan(shapes, config, TOKENS, H100, 4, 2)
    read = init_plan(shapes, config, TOKENS, "auto", H100).read_bytes
    assert plan.preparation[0].traffic == (5 * a_round + read) * 3 / 4
    ddp, fsdp, zero = plan.steps
    assert ddp.traffic == 2 * 4 * shapes.budget * 3 / 4
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert fsdp.traffic == zero.traffic == (2 * weights + 4 * shapes.budget) * 3 / 4
    compute = 6 * shapes.parameters * 4096 / (TRAINED * H100.multiply)
    assert fsdp.seconds == pytest.approx(max(compute, fsdp.traffic / NETWORK))
    assert shared_plan(shapes, config, TOKENS, H100, 4).link == NVLINK
    alone = CordaConfig(mode="ipm", orientation="identity", r=4)
    read = init_plan(shapes, alone, TOKENS, "auto", H100).read_bytes
    assert sum(stage.traffic for stage in shared_plan(shapes, alone, TOKENS, H100, 4).preparation) == read * 3 / 4


def test_sums_of_each_ability_are_sent_and_wait(model):
    config = CordaConfig(mode="kpm", r=4)
    shapes = shapes_of(model, config)
    one, three = (shared_plan(shapes, config, TOKENS, H100, 4, abilities=k).preparation[0] for k in (1, 3))
    C = [4 * sum(g[0].n ** 2 for g in groups_of(layers).values()) for _, _, layers in shapes.blocks]
    assert three.traffic - one.traffic == pytest.approx(2 * sum(C) * 3 / 4)
    assert three.host - one.host == pytest.approx(
        4 * max(C)
    )  # each process collects two at most, and its block's third
    assert three.accelerator > one.accelerator


def test_memory_is_shared_under_fsdp_and_not_under_ddp():
    config = CordaConfig(mode="kpm", r=4)
    shapes = shapes_of(llama(3), config)
    eight, sixteen = (shared_plan(shapes, config, TOKENS, H100, gpus).steps for gpus in (8, 16))
    assert eight[0].accelerator == sixteen[0].accelerator
    whole = 4 * shapes.parameters + 16 * shapes.budget
    assert eight[1].accelerator - sixteen[1].accelerator == pytest.approx(whole / 16)
    assert all(math.isnan(step.host) for step in eight)


def test_modules_that_are_trained_whole_take_memory_and_traffic(model):
    def steps(**options):
        config = CordaConfig(mode="kpm", r=4, **options)
        return shared_plan(shapes_of(model, config), config, TOKENS, H100, 4).steps

    head = tiny.SIZE["vocab_size"] * tiny.SIZE["hidden_size"]
    for one, other in zip(steps(), steps(modules_to_save=["lm_head"])):
        assert other.accelerator - one.accelerator == pytest.approx(16 * head / (1 if one.name == "DDP" else 4))
        assert other.traffic - one.traffic == pytest.approx(4 * head * 3 / 4 * (2 if one.name == "DDP" else 1))


@pytest.mark.parametrize("double", [False, True])
def test_a_step_over_a_quantized_base_holds_the_base(double):
    """... that a start with the same options writes: 4.5 or 4.13 bits for a number in a block."""
    model = tiny.build("llama_for_nf4")
    config = CordaConfig(r=4, quantization="nf4", double_quantization=double)
    shapes = shapes_of(model, config)
    full, packed = (shared_plan(shapes, c, TOKENS, H100, 4).steps for c in (CordaConfig(r=4), config))
    base = init_plan(shapes, config, TOKENS, "auto", H100).base_bytes
    saved = 4 * shapes.parameters - base
    assert full[0].accelerator - packed[0].accelerator == saved
    assert full[1].traffic - packed[1].traffic == pytest.approx(2 * saved * 3 / 4)
    assert full[1].accelerator - packed[1].accelerator > saved / 4  # two blocks are gathered, too


def test_a_step_over_a_model_in_4_bits_holds_its_bytes(tmp_path, tokenizer):
    tiny.build("llama_for_nf4").save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    start = CordaConfig(mode="ipm", orientation="identity", quantization="nf4", fold=0)
    prepare(ModelConfig(str(tmp_path / "full")), start, None, tmp_path / "start", progress=False)
    config = CordaConfig(r=4)
    shapes = shapes_of(planned_model(ModelConfig(str(tmp_path / "start" / "base"))), config)
    bare = shapes._replace(loaded=0)
    held, expanded = (shared_plan(each, config, TOKENS, H100, 4).steps[0].accelerator for each in (shapes, bare))
    assert expanded - held == shapes.parameters * shapes.dtype.itemsize - shapes.loaded


def test_more_gpus_take_less_time_and_no_more_memory_each():
    config = CordaConfig(mode="kpm", preset="corda++", r=4)
    shapes = shapes_of(llama(8), config)
    plans = [shared_plan(shapes, config, TOKENS, H100, gpus) for gpus in (1, 2, 4, 8)]
    for fewer, more in pairwise(plans):
        for one, other in zip(fewer.preparation[:3], more.preparation[:3]):
            assert other.seconds < one.seconds or one.name == "forward"
            assert other.accelerator <= one.accelerator


def plan(checkpoint, *options):
    main(["plan", "--model", str(checkpoint), "--r", "4", "--samples", "1024", "--max_length", "32", *options])


def test_the_command(checkpoint, capsys):
    plan(checkpoint, "--gpu", "80GB", "--gpus", "8", "--hosts", "2")
    said = " ".join(capsys.readouterr().out.split())
    assert "on 8 GPUs in 2 hosts, each as of a GPU of 80GB" in said
    assert "a step, FSDP 2" in said
    assert "a step: 4,096 tokens on each GPU (--batch_tokens), with gradient checkpointing" in said
    assert "assumed: a GPU sends 25.0 GB a second" in said
    assert "assumed, as no --context is given: 1024 samples of 32 tokens" in said
    assert "price" not in said
    plan(checkpoint, "--gpu", "80GB", "--gpus", "1", "--keep", "10")
    said = " ".join(capsys.readouterr().out.split())
    assert "on 1 GPU, each" in said
    assert "not counted: what the price on drift adds to a step" in said
    plan(checkpoint, "--gpu", "80GB", "--gpus", "14", "--orientation", "identity", "--samples", "1")  # no context
    plan(checkpoint, "--gpu", "1MB", "--gpus", "2")
    assert "(too much)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "8"], "this machine has none: describe one with --gpu, such as --gpu 80GB"),
        (["--gpu", "80GB", "--gpus", "8", "--hosts", "3"], "3 hosts cannot have 8 GPUs in all with as many each"),
        (["--gpu", "80GB", "--gpus", "4", "--hosts", "8"], "8 hosts cannot have 4 GPUs in all with as many each"),
        (["--gpu", "80GB", "--gpus", "0"], "gpus is 0, but must be a whole number at least 1"),
        (["--gpu", "80GB", "--gpus", "4", "--hosts", "0"], "hosts is 0, but must be a whole number at least 1"),
        (["--gpu", "80GB", "--gpus", "1000"], "1000 processes, one on each GPU, cannot share 14 layers: --gpus 14 at"),
        (["--gpu", "80GB", "--gpus", "2147483647"], "cannot share 14 layers"),
        (
            ["--gpu", "80GB", "--gpus", "14"],
            "14 processes, one on each GPU, cannot share a context of 8 batches: --gpus 8 at most, or lower --batch_t",
        ),
        (["--gpu", "80GB", "--hosts", "2"], "--hosts share out --gpus: give their number, too"),
    ],
)
def test_bad_input(checkpoint, options, said, capsys):
    if torch.accelerator.is_available() and "--gpu" not in options:
        pytest.skip("this machine has an accelerator")
    with pytest.raises(SystemExit, match="2"):
        plan(checkpoint, *options)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
