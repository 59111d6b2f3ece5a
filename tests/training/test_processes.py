"""`corda train` by several processes: the adapter is that of one."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_vision
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from ranks import run_together
from safetensors.torch import load_file
from transformers.integrations import deepspeed

from corda_lora.config import CordaError
from corda_lora.training.train import _before_zero, check_checkpoints

KNOWN = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(60)]
NEW = [{"prompt": f"{i} + {i + 1} =", "response": f" {2 * i + 1}"} for i in range(50)]  # no whole number of steps

# accelerate's own configuration, as `accelerate launch` hands it over. It knows FSDP on GPUs alone.
ON_CPU = """
import accelerate.state as state
from accelerate import DistributedType
init = state.AcceleratorState.__init__
def patched(self, *args, fsdp_plugin=None, **options):
    init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
state.AcceleratorState.__init__ = patched
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": 2,
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FIRST": ON_CPU,
}
MIXED = {"ACCELERATE_MIXED_PRECISION": "bf16"}
BFLOAT16 = ["--dtype", "bfloat16", "--precision", "bf16"]

ZERO_3 = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 2
mixed_precision: 'no'
deepspeed_config:
  zero_stage: 3
  gradient_accumulation_steps: 1
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer):
    """A model, data, and the starts anchored, paper and seeded, and head, with which the output head is trained;
    anchored and paper of the model in bfloat16, too."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZE)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (("known", KNOWN), ("new", NEW)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = ["--context", folder / "known.jsonl", "--samples", 40, "--r", 2]
    starts = [(split, "float32") for split in ("anchored", "paper", "seeded")]
    for split, dtype in [*starts, ("anchored", "bfloat16"), ("paper", "bfloat16")]:
        output = folder / (split if dtype == "float32" else f"{split}-{dtype}")
        options = ["--split", split, "--dtype", dtype, "--output", output]
        ran(run_together(1, ["init", "--model", folder / "model", *context, *options], folder / "log"))
    head = ["--modules_to_save", "[lm_head]", "--output", folder / "head"]
    ran(run_together(1, ["init", "--model", folder / "model", *context, *head], folder / "log"))
    return folder


@pytest.fixture
def command(given, tmp_path):
    """command(output, *options) → the arguments of `corda train`."""

    def arguments(output, *options, start="anchored"):
        recipe = ["--max_steps", 6, "--batch_size", 12, "--precision", "fp32", "--checkpoints", 2]
        start = ["--start", given / start] if start else []
        data = ["--model", given / "model", "--data", given / "new.jsonl"]
        return ["train", *data, *start, *recipe, *options, "--output", tmp_path / output]

    return arguments


def ran(ended):
    assert ended.codes == [0] * len(ended.codes), ended.err
    return ended


def same_end(one, many):
    """Two adapters are equal to rounding, as are their losses and their drift."""
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, many))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.dist(weight, others[name]) < 2e-4 * weight.norm(), name
    first, second = (json.loads((folder / "training.json").read_text()) for folder in (one, many))
    assert first["recipe"] == second["recipe"]
    assert first["samples"] == second["samples"]
    assert first["steps"] == second["steps"] == 6
    for key in {"loss", "held_out_loss", "drift"} & first.keys():
        assert torch.allclose(torch.tensor(first[key]), torch.tensor(second[key]), rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize(
    ("size", "start", "options", "environment"),
    [
        (2, "anchored", [], {}),  # with the price on drift
        (3, "paper", ["--micro_batch_size", 2], {}),
        (2, None, ["--trainer", "{packing: true}", "--max_length", 64], MIXED),  # --precision says it, not accelerate
        (2, "seeded", ["--keep", 0, "--eval_share", 0.28, "--early_stopping", 2], {}),
        (2, "anchored", [], FSDP),
        (3, "paper", ["--micro_batch_size", 2], FSDP),
        (2, "seeded", ["--keep", 0, "--weight_decay", 0.1], FSDP),
        (2, "anchored", [], FSDP | MIXED),
        (2, "head", ["--checkpoints", 0], FSDP),  # the meter's last forward leaves the head gathered
        (3, "head", ["--micro_batch_size", 2, "--keep", 0], FSDP),
    ],
)
def test_the_adapter_of_one_process(given, command, tmp_path, size, start, options, environment):
    ran(run_together(1, command("one", *options, start=start), tmp_path / "log"))
    ended = ran(run_together(size, command("many", *options, start=start), tmp_path / "log", **environment))
    same_end(tmp_path / "one", tmp_path / "many")
    if start:
        before, after = (load_file(d / "adapter_model.safetensors") for d in (given / start, tmp_path / "many"))
        assert any(torch.dist(before[name], after[name]) > 1e-3 for name in before)  # it was trained
    assert "written to" in ended.out[0]
    assert ended.out[1:] == [""] * (size - 1)
    assert not (tmp_path / "many.work").exists()


@pytest.mark.parametrize("environment", [{}, FSDP])
def test_the_classifier_of_one_process(tmp_path, tokenizer, environment):
    """BERT, whose input embeddings are in a block, and FSDP splits them apart from it."""
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.ENCODER | still))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the number {i}", "kind": "abc"[i % 3]} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--label", "kind"]
    train += ["--max_steps", 6, "--batch_size", 12, "--precision", "fp32", "--r", 2, "--output"]
    ran(run_together(1, [*train, tmp_path / "one"], tmp_path / "log"))
    ran(run_together(2, [*train, tmp_path / "many"], tmp_path / "log", **environment))
    same_end(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("pictures", [24, 12])
def test_fsdp_trains_a_model_that_sees_images_where_all_rows_have_one(tmp_path, pictures):
    """Its processes would not come to the parts of the vision tower together."""
    model = tiny_vision.save(tmp_path)
    (tmp_path / "cat.png").write_bytes(tiny_vision.png(1))
    row = {"prompt": "What?", "response": " a cat"}
    seen = {"image": str(tmp_path / "cat.png")}
    rows = [row | (seen if i < pictures else {}) for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--model", model, "--data", tmp_path / "rows.jsonl", "--max_steps", 6, "--batch_size", 12]
    train += ["--precision", "fp32", "--r", 2, "--output"]
    ended = run_together(2, [*train, tmp_path / "many"], tmp_path / "log", **FSDP)
    if pictures < len(rows):
        assert ended.codes == [2, 2]
        assert " ".join("".join(ended.err).split()).count("give all rows an image, or use DDP") == 1
        return
    ran(run_together(1, [*train, tmp_path / "one"], tmp_path / "log"))
    same_end(tmp_path / "one", tmp_path / "many")


def test_fsdp_refuses_a_copy_of_a_module_that_shares_its_weight(command, tokenizer, tmp_path):
    tiny.build("llama_tied").save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    whole = command("out", "--model", tmp_path / "tied", "--modules_to_save", "[lm_head]", start=None)
    ended = run_together(2, whole, tmp_path / "log", **FSDP)
    assert ended.codes == [2, 2]
    assert " ".join("".join(ended.err).split()).count("lm_head shares its own with another module") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("size", "start", "options", "more"),
    [
        (2, "anchored", ["--keep", 1e4], {}),
        (2, "anchored", ["--keep", 1e4], {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
        (3, "paper", ["--keep", 1e4, "--micro_batch_size", 2], {}),
    ],
)
def test_the_adapter_of_one_process_in_bfloat16(given, command, tmp_path, size, start, options, more):
    start = f"{start}-bfloat16"
    one, free, many = (tmp_path / name for name in ("one", "free", "many"))
    ran(run_together(1, command("one", *BFLOAT16, *options, start=start), tmp_path / "log"))
    ran(run_together(1, command("free", *BFLOAT16, "--keep", 0, start=start), tmp_path / "log"))
    environment = FSDP | MIXED | more
    ran(run_together(size, command("many", *BFLOAT16, *options, start=start), tmp_path / "log", **environment))

    def apart(first, second):
        ends = [load_file(folder / "adapter_model.safetensors") for folder in (first, second)]
        return sum(float(torch.dist(*(end[name] for end in ends))) ** 2 for name in ends[0]) ** 0.5

    way = apart(given / start, one)
    assert apart(one, many) < 0.02 * way
    assert apart(one, free) > 0.03 * way  # the price on drift tells
    weights = load_file(many / "adapter_model.safetensors")
    assert all(torch.dist(w, w.bfloat16().float()) > 0 for name, w in weights.items() if ".lora_B." in name)
    first, second = (json.loads((folder / "training.json").read_text()) for folder in (one, many))
    assert first["recipe"] == second["recipe"]
    # Log-probabilities that are rounded to bfloat16 change the loss by a part in 300.
    assert torch.allclose(torch.tensor(first["loss"]), torch.tensor(second["loss"]), rtol=5e-4)
    predicted = [[row[1] for row in made["drift"]] for made in (first, second)]
    assert torch.allclose(*map(torch.tensor, predicted), rtol=0.02, atol=0)


def test_the_page_of_torchrun_has_no_line_of_torch(command, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "corda_lora", "--"]
    done = subprocess.run([*launch, *map(str, command("out", "--max_steps", 2))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # such as DDP's, in each process, of how it looks for parameters
    assert done.stdout.count("written to") == 1
    [bar] = [line for line in done.stderr.splitlines() if line.startswith("training ")]
    assert " 2/2 " in bar


def test_the_engine_of_the_page_is_the_one_tested_here(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    [text] = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "engine.yaml").write_text(text)
    command = ["--config_file", str(tmp_path / "engine.yaml"), "-m", "corda_lora", "train"]
    options, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    assert options.num_processes == 8
    environment = prepare_multi_gpu_env(options)
    assert environment.items() >= {key: str(value) for key, value in FSDP.items() if key != "FIRST"}.items()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = FullyShardedDataParallelPlugin()
    assert (engine.fsdp_version, engine.reshard_after_forward) == (2, True)


@pytest.mark.parametrize(("environment", "options"), [({}, []), (FSDP, []), ({}, ["--samples", 23])])
def test_a_killed_training_goes_on_with_another_number_of_processes(command, tmp_path, environment, options):
    """Of 23 samples, in the midst of the second epoch."""
    ran(run_together(1, command("one", *options), tmp_path / "log"))
    kills = {0: ("open", "checkpoint-6/trainer_state.json")}
    ended = run_together(2, command("many", *options), tmp_path / "log", kills=kills, **environment)
    assert ended.codes[0] == -signal.SIGKILL
    assert ended.codes[1] == 2
    [line] = [line for line in ended.err[1].splitlines() if line.startswith("corda train:")]
    assert "the same command goes on" in line
    left = {path.name for path in (tmp_path / "many.work" / "checkpoint-3").iterdir()}
    assert ("pytorch_model_fsdp_0" in left) == bool(environment)  # it was sharded
    again = ran(run_together(3, command("many", *options), tmp_path / "log", **environment))
    same_end(tmp_path / "one", tmp_path / "many")
    assert "6/6" in again.err[0]


def test_checkpoints_of_another_engine_are_refused(command, tmp_path):
    kills = {0: ("open", "checkpoint-6/trainer_state.json")}
    run_together(2, command("out"), tmp_path / "log", kills=kills, **FSDP)
    before = sorted((tmp_path / "out.work" / "checkpoint-3").rglob("*"))
    [refused] = run_together(1, command("out"), tmp_path / "log").err
    sentence = "checkpoint-3 was saved with FSDP, and this training has neither FSDP nor DeepSpeed"
    assert sentence in " ".join(refused.split())
    assert "Loading weights" not in refused
    assert sorted((tmp_path / "out.work" / "checkpoint-3").rglob("*")) == before


def test_deepspeed_goes_on_with_as_many_processes_alone(tmp_path, monkeypatch):
    saved = tmp_path / "checkpoint-3"
    (saved / "global_step3").mkdir(parents=True)
    for rank in range(2):
        (saved / f"rng_state_{rank}.pth").touch()
    with pytest.raises(CordaError, match="saved with DeepSpeed, and this training has neither"):
        check_checkpoints(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_checkpoints(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(CordaError, match="is of 2 processes, and DeepSpeed goes on with as many alone: start 2"):
        check_checkpoints(tmp_path)


def test_before_zero_3_splits_the_model_nothing_asks_for_its_parts():
    class Plugin:  # accelerate's, and its configuration, which transformers finds
        def set_deepspeed_weakref(self):
            deepspeed.set_hf_deepspeed_config(self)

        def is_zero3(self):
            return True

    plugin = Plugin()
    plugin.set_deepspeed_weakref()
    try:
        with _before_zero(SimpleNamespace(deepspeed_plugin=plugin)):
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
        with _before_zero(SimpleNamespace(deepspeed_plugin=None)):
            assert deepspeed.is_deepspeed_zero3_enabled()  # nothing of this training's
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.mark.cluster  # DeepSpeed is no dependency
def test_deepspeed_trains_the_adapter_of_one_process(command, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "engine.yaml").write_text(ZERO_3)
    ran(run_together(1, command("one", "--keep", 0, start="seeded"), tmp_path / "log"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "engine.yaml"]
    arguments = command("many", "--keep", 0, start="seeded")
    done = subprocess.run([*launcher, "-m", "corda_lora", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_end(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize(
    ("size", "options", "start", "environment", "sentence"),
    [
        (2, ["--batch_size", 7], "anchored", {}, "2 processes cannot share a batch_size of 7 evenly"),
        (2, ["--micro_batch_size", 4], "anchored", {}, "in forwards of 4 samples"),
        (2, ["--weight_decay", 0.1], "paper", FSDP, "give --weight_decay 0"),
        (2, [], "anchored", FSDP | {"FSDP_VERSION": 1}, "set fsdp_version to 2"),
        (2, [], "anchored", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed shows no whole factor"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_before_work(
    command, tmp_path, size, options, start, environment, sentence
):
    ended = run_together(size, command("out", *options, start=start), tmp_path / "log", **environment)
    assert ended.codes == [2] * size
    printed = " ".join("".join(ended.err).split())
    assert printed.count("corda train:") == 1
    assert sentence in printed
    assert not list(tmp_path.glob("out*"))


def test_processes_that_were_started_otherwise_are_refused_before_the_model_is_loaded(command, tmp_path):
    for other, sentence in (
        (command("out", "--learning_rate", 0.5), "sees another train.learning_rate than process 0 on"),
        (command("elsewhere"), "the output must be in a folder that all hosts share"),
    ):
        ended = run_together(2, [command("out"), other], tmp_path / "log")
        assert ended.codes == [2, 2]
        printed = " ".join("".join(ended.err).split())
        assert printed.count("corda train:") == 1
        assert sentence in printed
        assert "Loading weights" not in printed
        assert not list(tmp_path.glob("out*"))


def test_a_loss_that_is_not_finite_in_one_process_ends_all(command, tmp_path):
    ended = run_together(2, command("out", "--learning_rate", 1e30), tmp_path / "log")
    assert ended.codes == [1, 1]
    assert "".join(ended.err).count("corda train: ") == 1
    assert not list(tmp_path.glob("out*"))
