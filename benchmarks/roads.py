"""Is a CorDA adapter right wherever it is taken? Runs the roads (save and load, Trainer, TRL, accelerate, ...) for each
split on a tiny model on the CPU, and prints the table of docs/trainers.md.

    pip install lm-eval bitsandbytes deepspeed    # which three of the roads need
    python benchmarks/roads.py          # in a quarter of an hour, on two cores

A cell is *right* (the road's own check holds), *refused* with the sentence, or *wrong* with what was found.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import datasets
import peft
import record
import tiny
import torch
import torch.multiprocessing
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from corda_lora import CordaConfig, CordaError, HoldCallback, get_corda_model, hold, load_adapter
from corda_lora.adapters.export import export_lora, export_merged
from corda_lora.adapters.held import held_parts

SPLITS = {
    "anchored": {"split": "anchored"},
    "paper": {"split": "paper"},
    "balanced": {"split": "balanced"},
    "seeded": {"split": "seeded"},
    "corda++ (anchored)": {"split": "anchored", "preset": "corda++", "rounds": 2},
    "corda++ (paper)": {"split": "paper", "preset": "corda++", "rounds": 2},
}


CPU = torch.device("cpu")


class WrongError(Exception):
    """What a road's check found."""


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WrongError(otherwise)


@dataclass
class Case:
    """A split, and an adapter of it after a few steps, on disk as PEFT's own `save_pretrained` writes it."""

    options: dict[str, Any]
    folder: Path
    adapted: PeftModel = field(init=False)

    def __post_init__(self) -> None:
        self.adapted = plain_steps(self.fresh())
        self.adapted.save_pretrained(str(self.saved))

    @property
    def split(self) -> str:
        return str(self.options["split"])

    @property
    def saved(self) -> Path:
        return self.folder / "saved"

    @cached_property
    def logits(self) -> torch.Tensor:
        return tiny.logits(self.adapted.eval())

    def fresh(self, dtype: torch.dtype = torch.float32) -> PeftModel:
        config = CordaConfig(r=4, lora_alpha=8, **self.options)
        return get_corda_model(tiny.build("llama", dtype), config, tiny.batches()[:2], progress=False)

    def plain(self) -> PeftModel:
        """Loaded by plain PEFT to go on training, as most trainers do."""
        return PeftModel.from_pretrained(tiny.build("llama"), str(self.saved), is_trainable=True)

    def held(self, adapted: PeftModel) -> list[torch.Tensor]:
        weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        return [part.detach().clone() for part in held_parts(weights, self.split)]

    def check_held(self, adapted: PeftModel, before: list[torch.Tensor]) -> None:
        after = self.held(adapted)
        demand(all(map(torch.equal, before, after)), "the held part moved")
        start = get_peft_model_state_dict(self.adapted, save_embedding_layers=False)
        now = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        demand(any(not torch.equal(now[name], start[name]) for name in start), "nothing was trained")


def plain_steps(adapted: PeftModel, steps: int = 3, weight_decay: float = 0.0) -> PeftModel:
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=weight_decay)
    for step in range(steps):
        batch = tiny.batches()[step % 3]
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, 96 at most, as the tiny model has."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?+=\n"
    raw = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}, "<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def arguments(folder: Path, kind: type = TrainingArguments, **more: Any) -> Any:
    common = {
        "output_dir": str(folder / "work"),
        "max_steps": 2,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return kind(**(common | more))


# --- roads -----------------------------------------------------------------------------------------------------------

ROADS: dict[str, tuple[str, Callable[[Case], None]]] = {}


def road(title: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def enter(run: Callable[[Case], None]) -> Callable[[Case], None]:
        ROADS[run.__name__] = (title, run)
        return run

    return enter


@road("saved by PEFT, loaded by plain PEFT: the same function")
def plain_peft(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(tiny.build("llama"), str(case.saved))
    change = float((tiny.logits(loaded) - case.logits).abs().max())
    demand(change < 1e-4, f"logits off by {change:.1e}")


@road("`AutoModelForCausalLM.from_pretrained(ADAPTER)` of transformers, as its `pipeline` does")
def transformers_alone(case: Case) -> None:
    tiny.build("llama").save_pretrained(case.folder / "base")
    config = json.loads((case.saved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(case.folder / "base")
    (case.saved / "adapter_config.json").write_text(json.dumps(config))
    change = float((tiny.logits(AutoModelForCausalLM.from_pretrained(case.saved)) - case.logits).abs().max())
    demand(change < 1e-4, f"logits off by {change:.1e}")


@road("`load_adapter(..., trainable=True)`: goes on as if never saved")
def goes_on(case: Case) -> None:
    loaded = load_adapter(tiny.build("llama"), case.saved, trainable=True)
    straight = plain_steps(copy.deepcopy(case.adapted)).eval()
    plain_steps(loaded).eval()
    demand(torch.equal(tiny.logits(loaded), tiny.logits(straight)), "not as if it had not been saved")


@road("`PeftModel.from_pretrained(is_trainable=True)`, then `hold` (as with axolotl, LLaMA-Factory)")
def held_by_hand(case: Case) -> None:
    loaded = case.plain()
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_("lora_" in name)
    hold(loaded)
    before = case.held(loaded)
    plain_steps(loaded, weight_decay=0.1)
    case.check_held(loaded, before)


@road("the same without `hold`: it is said when the adapter is next loaded")
def without_hold(case: Case) -> None:
    loaded = plain_steps(case.plain())
    if case.split == "seeded":
        return
    loaded.save_pretrained(str(case.folder / "loose"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_adapter(tiny.build("llama"), case.folder / "loose")
    demand(any("did not hold" in str(w.message) for w in said), "nobody said that the held part was trained")


ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8


@road("Trainer with `HoldCallback`, weight decay; its checkpoint resumed on a plain-PEFT model")
def trainer(case: Case) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    for steps, resume in ((2, False), (4, True)):
        loaded = case.plain()
        before = case.held(loaded)
        args = arguments(case.folder, max_steps=steps, save_strategy="steps", save_steps=2, weight_decay=0.1)
        Trainer(loaded, args, train_dataset=rows, callbacks=[HoldCallback()]).train(resume_from_checkpoint=resume)
        case.check_held(loaded, before)


def _trl(case: Case, kind: str, rows: list[dict[str, Any]], **options: Any) -> tuple[PeftModel, Any]:
    import trl

    adapted = case.fresh() if kind == "SFT" else copy.deepcopy(case.adapted)
    before = case.held(adapted)
    options = {"processing_class": tokenizer()} | options
    args = arguments(case.folder, getattr(trl, f"{kind}Config"), **options.pop("args", {}))
    made = getattr(trl, f"{kind}Trainer")(
        adapted, args=args, train_dataset=datasets.Dataset.from_list(rows), callbacks=[HoldCallback()], **options
    )
    if "ref" in adapted.peft_config:
        made.model.eval()
        made.model.set_adapter("ref")
        reference = tiny.logits(made.model)
        made.model.set_adapter("default")
        change = float((reference - tiny.logits(made.model)).abs().max())
        demand(change < 1e-4, f"the reference is not the policy: logits off by {change:.1e}")
        made.model.train()
    made.train()
    made.model.set_adapter("default")
    case.check_held(adapted, before)
    return adapted, made


@road("TRL SFT, then generate")
def trl_sft(case: Case) -> None:
    adapted, _ = _trl(case, "SFT", [{"prompt": "1 + 1 =", "completion": " 2"}] * 8, args={"max_length": 32})
    adapted.eval().generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=2)


PAIRS = [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}] * 8


@road("TRL DPO after SFT: the first loss is log 2")
def trl_dpo(case: Case) -> None:
    _, made = _trl(case, "DPO", PAIRS, args={"max_length": 32})
    first = next(log["loss"] for log in made.state.log_history if "loss" in log)
    demand(abs(first - 0.6931) < 2e-4, f"first loss {first:.4f}")


@road("TRL KTO after SFT: the reference is the policy at the start")
def trl_kto(case: Case) -> None:
    rows = [{"prompt": "1 + 1 =", "completion": f" {2 + i % 2}", "label": i % 2 == 0} for i in range(8)]
    _trl(case, "KTO", rows, args={"max_length": 32})


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@road("TRL GRPO with β > 0 after SFT: the reference is the policy at the start")
def trl_grpo(case: Case) -> None:
    args = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4, "learning_rate": 1e-2}
    _trl(case, "GRPO", [{"prompt": "1 + 1 ="}] * 8, reward_funcs=_reward, args=args)


@road("TRL RLOO with β > 0 after SFT: the reference is the policy at the start")
def trl_rloo(case: Case) -> None:
    args = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4, "learning_rate": 1e-2}
    _trl(case, "RLOO", [{"prompt": "1 + 1 ="}] * 8, reward_funcs=_reward, args=args)


def _distributed(case: Case, worker: Callable[..., None]) -> dict[str, torch.Tensor]:
    """What rank 0 of two processes saved."""
    (case.folder / "store").unlink(missing_ok=True)
    target = case.folder / "distributed"
    arguments = (case.saved, case.folder / "store", target)
    torch.multiprocessing.start_processes(worker, arguments, nprocs=2, start_method="forkserver")  # imports once
    return load_file(target / "adapter_model.safetensors")


def _start(rank: int, store: Path) -> None:
    """One of two processes, for torch and for accelerate."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # that accelerate asks for, and nobody uses


def _two_steps(model: Any, adapted: PeftModel, ranks: Sequence[int]) -> None:
    """Two steps; the gradient is the mean over the batches of two ranks, of which this process has some."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for _ in range(2):
        for rank in ranks:
            batch = tiny.batches()[rank]
            (model(**batch, labels=batch["input_ids"]).loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _worker(rank: int, saved: Path, store: Path, target: Path, kind: str) -> None:
    _start(rank, store)
    adapted = load_adapter(tiny.build("llama"), saved, trainable=True)
    model: Any = adapted
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for block in adapted.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(adapted, mesh=mesh)
    elif kind == "fsdp1":
        policy = ModuleWrapPolicy({type(adapted.get_base_model().model.layers[0])})
        model = FullyShardedDataParallel(adapted, auto_wrap_policy=policy, use_orig_params=True, device_id=CPU)
    else:
        model = torch.nn.parallel.DistributedDataParallel(adapted)
    _two_steps(model, adapted, [rank])
    if kind == "fsdp1":  # of such a model PEFT itself saves nothing
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            weights = {n.replace(".default", ""): w for n, w in model.state_dict().items() if "lora_" in n}
        if rank == 0:
            target.mkdir()
            save_file(weights, target / "adapter_model.safetensors")
    else:
        weights = {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in adapted.state_dict().items()}
        if rank == 0:
            adapted.save_pretrained(str(target), state_dict=weights)
    torch.distributed.destroy_process_group()


def _in_one_process(case: Case) -> Path:
    folder = case.folder / "one"
    loaded = load_adapter(tiny.build("llama"), case.saved, trainable=True)
    _two_steps(loaded, loaded, [0, 1])
    loaded.save_pretrained(str(folder))
    return folder


@road("DDP, two processes (gloo): `save_pretrained` writes the same bytes as one process")
def ddp(case: Case) -> None:
    _distributed(case, partial(_worker, kind="ddp"))
    files = (folder / "adapter_model.safetensors" for folder in (_in_one_process(case), case.folder / "distributed"))
    demand(len({file.read_bytes() for file in files}) == 1, "not the same bytes as one process")


def _sharded(case: Case, worker: Callable[..., None]) -> None:
    weights = _distributed(case, worker)
    expected = load_file(_in_one_process(case) / "adapter_model.safetensors")
    demand(weights.keys() == expected.keys(), f"{len(weights)} tensors saved of {len(expected)}")
    change = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    demand(change < 1e-5, f"weights off by {change:.1e}")
    parts = (held_parts(w, case.split) for w in (weights, expected))
    demand(all(map(torch.equal, *parts)), "the held part moved")


@road("FSDP2 (`fully_shard`, two processes, gloo): saved, and equal to one process")
def fsdp2(case: Case) -> None:
    _sharded(case, partial(_worker, kind="fsdp2"))


@road("FSDP1 (`use_orig_params`, two processes, gloo), saved from its full state: equal to one process")
def fsdp1(case: Case) -> None:
    _sharded(case, partial(_worker, kind="fsdp1"))


def _deepspeed_worker(rank: int, saved: Path, store: Path, target: Path, stage: int) -> None:
    _start(rank, store)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    for decay in (0.1, 0.0):
        adapted = load_adapter(tiny.build("llama"), saved, trainable=True)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,  # by default it is 1
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": decay, "torch_adam": True}},
        }
        trained = [p for p in adapted.parameters() if p.requires_grad]
        engine = deepspeed.initialize(model=adapted, config=config, model_parameters=trained)[0]
        try:
            for _ in range(2):
                batch = tiny.batches()[rank]
                engine.backward(engine(**batch, labels=batch["input_ids"]).loss)
                engine.step()
        except CordaError:  # that weight decay is refused, where half of a factor is held
            continue
    with deepspeed.zero.GatheredParameters(list(adapted.parameters()), enabled=stage == 3):
        if rank == 0:
            adapted.save_pretrained(str(target))
        torch.distributed.barrier()


@road("DeepSpeed, ZeRO 2 and 3 (two processes, CPU, gloo): saved, and equal to one process; weight decay refused")
def deepspeed(case: Case) -> None:
    importlib.import_module("deepspeed")
    for stage in (2, 3):
        _sharded(case, partial(_deepspeed_worker, stage=stage))


def _trainer_worker(rank: int, saved: Path, store: Path, target: Path, options: dict[str, Any]) -> None:
    _start(rank, store)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), str(saved), is_trainable=True)
    args = arguments(store.parent, ddp_find_unused_parameters=False, per_device_train_batch_size=1, **options)
    rows = datasets.Dataset.from_list(ROWS)
    trainer = Trainer(loaded, args, train_dataset=rows, callbacks=[HoldCallback()])
    trainer.train()
    trainer.save_model(str(target))
    torch.distributed.destroy_process_group()


def _by_trainer(case: Case, **options: Any) -> None:
    weights, start = _distributed(case, partial(_trainer_worker, options=options)), case.adapted
    before = get_peft_model_state_dict(start, save_embedding_layers=False)
    demand(weights.keys() == before.keys(), f"{len(weights)} tensors saved of {len(before)}")
    demand(all(map(torch.equal, held_parts(weights, case.split), case.held(start))), "the held part moved")
    demand(any(not torch.equal(weights[name], before[name]) for name in before), "nothing was trained")


@road("Trainer under DDP, two processes (gloo), `HoldCallback`, weight decay, on a plain-PEFT model")
def trainer_ddp(case: Case) -> None:
    _by_trainer(case, weight_decay=0.1)


@road("Trainer under FSDP2, two processes (gloo), `HoldCallback`, on a plain-PEFT model: saved by the Trainer")
def trainer_fsdp2(case: Case) -> None:
    _by_trainer(case, fsdp=True)


@road("Trainer under FSDP1, two processes (gloo), `HoldCallback`, on a plain-PEFT model: saved by the Trainer")
def trainer_fsdp1(case: Case) -> None:
    _by_trainer(case, fsdp=True, fsdp_config={"version": 1, "use_orig_params": True, "sync_module_states": False})


@road("`hotswap_adapter` into a live model")
def hotswap(case: Case) -> None:
    live = case.fresh().eval()
    hotswap_adapter(live, str(case.saved), "default")
    demand(torch.equal(tiny.logits(live), case.logits), "the output is another")


@road("over a bfloat16 base, trainable parameters cast to bfloat16 (as TRL does over NF4), then generate")
def cast(case: Case) -> None:
    adapted = case.fresh(torch.bfloat16)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    plain_steps(adapted, 1)
    adapted.eval().generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=2)


@road("over a real NF4 base (bitsandbytes, CPU): TRL SFT, generate, save, load")
def nf4(case: Case) -> None:
    import trl
    from transformers import BitsAndBytesConfig

    folder = case.folder / "base"
    size = tiny.SIZE | {"hidden_size": 64, "intermediate_size": 128}  # NF4's blocks are of 64 numbers
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
        for module in model.modules():
            # On a CPU with AVX512-BF16 bitsandbytes 0.50 rounds the scales in the first forward: other weights then.
            module.support_avx512bf16_for_cpu = False
        return model

    config = CordaConfig(r=4, lora_alpha=8, **case.options)
    adapted = get_corda_model(base(), config, tiny.batches()[:2], progress=False)
    rows = datasets.Dataset.from_list([{"prompt": "1 + 1 =", "completion": " 2"}] * 8)
    args = arguments(case.folder, trl.SFTConfig, max_length=32, bf16=True)
    made = trl.SFTTrainer(
        adapted, args=args, train_dataset=rows, processing_class=tokenizer(), callbacks=[HoldCallback()]
    )
    before = case.held(adapted)
    made.train()
    case.check_held(adapted, before)
    adapted.eval().generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=2)
    adapted.save_pretrained(str(case.folder / "nf4"))
    loaded = load_adapter(base(), case.folder / "nf4", trainable=True)
    change = float((tiny.logits(loaded.eval()) - tiny.logits(adapted)).abs().max())
    demand(change < 0.1, f"logits off by {change:.1e}")


@road("`corda export --as merged`: an ordinary model")
def merged(case: Case) -> None:
    export_merged(tiny.build("llama"), case.saved, case.folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(case.folder / "merged")
    change = float((tiny.logits(model) - case.logits).abs().max())
    demand(change < 1e-4, f"logits off by {change:.1e}")


@road("`corda export --as lora --uniform`, cast to bfloat16: each update within 1 % (llama.cpp, vLLM)")
def uniform(case: Case) -> None:
    export_lora(tiny.build("llama"), case.saved, case.folder / "uniform", uniform=True)
    loaded = PeftModel.from_pretrained(tiny.build("llama"), str(case.folder / "uniform"))
    config = loaded.peft_config["default"]
    demand(not config.rank_pattern and not config.alpha_pattern, "not one rank")
    for name, module in loaded.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            exact = case.adapted.get_submodule(name).get_delta_weight("default").double()
            A, B = (getattr(module, key)["default"].weight.bfloat16().double() for key in ("lora_A", "lora_B"))
            error = float((config.lora_alpha / len(A) * B @ A - exact).norm() / exact.norm())
            demand(error < 0.01, f"{name}: {error:.1%} off")


QUESTIONS = [{"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a * b + 1}"]} for a in (1, 2) for b in (1, 3)]


@road("lm-eval, `--model hf --model_args pretrained=MODEL,peft=ADAPTER`: the log-likelihoods are PEFT's")
def lm_eval(case: Case) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    encode = tokenizer()
    # Where there is an adapter, lm-eval cuts the head to the tokenizer's length.
    encode.add_tokens([f"<{i}>" for i in range(len(encode), tiny.VOCABULARY)])
    tiny.build("llama").save_pretrained(case.folder / "base")
    encode.save_pretrained(case.folder / "base")
    (case.folder / "sums.json").write_text(json.dumps(QUESTIONS))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(case.folder / "sums.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "target_delimiter": "",
    }
    (case.folder / "sums.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = {"pretrained": str(case.folder / "base"), "peft": str(case.saved), "dtype": "float32"}
    tasks = TaskManager(include_path=str(case.folder), include_defaults=False)
    found = simple_evaluate(
        "hf", arguments, ["sums"], task_manager=tasks, device="cpu", batch_size=2, bootstrap_iters=0
    )
    for sample in found["samples"]["sums"]:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        for choice, [(theirs, _)] in zip(choices, sample["resps"], strict=True):
            ids = torch.tensor([encode(question + choice)["input_ids"]])
            with torch.no_grad():
                logp = case.adapted(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            ours = float(logp[-len(encode(choice)["input_ids"]) :].sum())
            demand(abs(theirs - ours) < 1e-4, f"log-likelihood of {choice!r} {theirs:.4f}, ours {ours:.4f}")


# --- the table -------------------------------------------------------------------------------------------------------


def cell(run: Callable[[Case], None], case: Case) -> str:
    try:
        with _quiet() as heard:
            run(case)
    except CordaError as error:
        return f"refused: {error}"
    except WrongError as error:
        return f"WRONG: {error}"
    except ImportError as error:
        return f"not run: {error}"
    except Exception as error:
        print(heard.getvalue()[-2000:], traceback.format_exc(), file=sys.stderr)
        return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return "right"


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield heard


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--roads", nargs="*", default=list(ROADS), choices=list(ROADS))
    parser.add_argument("--splits", nargs="*", default=list(SPLITS), choices=list(SPLITS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, str]] = {ROADS[name][0]: {} for name in options.roads}
    for split in options.splits:
        for name in options.roads:
            with tempfile.TemporaryDirectory() as folder:
                title, run = ROADS[name]
                table[title][split] = cell(run, Case(SPLITS[split], Path(folder)))
                print(f"{split}: {name}: {table[title][split]}", file=sys.stderr, flush=True)
    lines = ["| road | " + " | ".join(options.splits) + " |", "|---|" + "---|" * len(options.splits)]
    lines += [f"| {title} | " + " | ".join(cells.values()) + " |" for title, cells in table.items()]
    record.write(options, table, lines)


if __name__ == "__main__":
    main()
