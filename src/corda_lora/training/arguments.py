"""Our options and those of TRL's own that are passed through → the `SFTConfig` of a run."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser
from transformers import get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import SFTConfig, SFTTrainer

from ..config import CordaError, TrainConfig
from ..config.values import short
from ..processes import number_of_processes

_MIXED = "ACCELERATE_MIXED_PRECISION"  # `accelerate launch` sets it, from its configuration

# What cannot be passed through, and why.
_DATA = "the samples come prepared: see --prompt, --response and --max_length"
_DEVICE = "accelerate's own configuration says it: start with `accelerate launch`"
_RESUME = "the same command given again goes on by itself"
_UPLOAD = "--push and --hub_private_repo send the output to the hub when it is done"
_CHECKPOINTS = "--checkpoints says it"
_REFUSED = {
    "output_dir": "--output says it",
    "learning_rate": "--learning_rate says it",
    "max_steps": "--max_steps says it",
    "num_train_epochs": "--epochs says it",
    "per_device_train_batch_size": "--batch_size and --micro_batch_size say it",
    "gradient_accumulation_steps": "--batch_size and --micro_batch_size say it",
    "auto_find_batch_size": "--micro_batch_size says it",
    "warmup_steps": "--warmup says it",
    "warmup_ratio": "--warmup says it",
    "lr_scheduler_type": "--schedule says it",
    "weight_decay": "--weight_decay says it",
    "bf16": "--precision says it",
    "fp16": "--precision says it",
    "gradient_checkpointing": "--gradient_checkpointing says it",
    "torch_compile": "--compile says it",
    "torch_compile_backend": "--compile says it",
    "torch_compile_mode": "--compile says it",
    "seed": "--seed says it",
    "data_seed": "--seed says it",
    "trust_remote_code": "--trust_remote_code says it",
    "max_length": "--max_length says it",
    "use_cpu": "the model's device says it",
    "completion_only_loss": "the loss is on the responses",
    "assistant_only_loss": "the loss is on the responses (--turns says on which)",
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "disable_tqdm": "the progress bar is corda's own",
    "train_sampling_strategy": "each step's samples are dealt out by length",
    "length_column_name": "each step's samples are dealt out by length",
    "padding_free": "packing says it",
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    **dict.fromkeys(["save_strategy", "save_steps", "save_total_limit", "save_only_model"], _CHECKPOINTS),
    **dict.fromkeys(["do_train", "do_eval", "do_predict"], "--data and --eval_data say it"),
    **dict.fromkeys(["deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank"], _DEVICE),
    **dict.fromkeys(["model_init_kwargs", "chat_template_path", "dataset_text_field", "dataset_kwargs"], _DATA),
    **dict.fromkeys(["dataset_num_proc", "eos_token", "pad_token", "truncation_mode", "shuffle_dataset"], _DATA),
    **dict.fromkeys(["remove_unused_columns", "label_names"], _DATA),
    **dict.fromkeys([f.name for f in fields(SFTConfig) if "hub" in f.name], _UPLOAD),
}


def trainer_arguments(
    config: TrainConfig,
    learning_rate: float,
    steps: int,
    max_length: int,
    device: torch.device,
    work: Path | None = None,
    evaluates: bool = False,
) -> SFTConfig:
    """The settings of TRL's trainer for a run.

    Args:
        steps: the number of optimizer steps.
        max_length: tokens of the longest sample.
        work: the folder of checkpoints. Without it there are none.
        evaluates: whether there are held-out samples to measure.

    Raises:
        CordaError: an option in `config.trainer` is none of SFTConfig's, is ours to set, has a wrong value or needs a
            package that is missing; or something needs held-out samples, and there are none.
    """
    micro, parts = shared_batch(config)
    each = max(1, steps // max(1, config.checkpoints))  # steps from one checkpoint to the next
    options: dict[str, Any] = {
        "logging_steps": max(1, steps // 100),
        "report_to": "none",
        "dataloader_pin_memory": False,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": each if evaluates else None,
        "eval_packing": False,
        "per_device_eval_batch_size": micro,
        "load_best_model_at_end": config.early_stopping is not None,
        **_checked(config.trainer),
    }
    if not evaluates and (options["eval_strategy"] != "no" or options["load_best_model_at_end"]):
        name = "early_stopping" if config.early_stopping else "trainer.eval_strategy or load_best_model_at_end"
        raise CordaError(f"{name} needs held-out samples: give --eval_data or --eval_share")
    saves = "steps" if work and config.checkpoints else "no"
    if options["load_best_model_at_end"]:  # the best is a checkpoint: there is one for each measurement
        if work is None:
            raise CordaError("to keep the best adapter, the training needs a folder for checkpoints: give `work`")
        saves, each = options["eval_strategy"], options["eval_steps"]
    if options.get("packing_strategy", "bfd") == "wrapped":
        raise CordaError("trainer.packing_strategy wrapped cuts samples in two and mixes them: bfd keeps them whole")
    if _MIXED in os.environ:  # where neither bf16 nor fp16 is asked for, transformers would do as it says
        os.environ[_MIXED] = "no" if config.precision == "fp32" else config.precision
    try:
        arguments = SFTConfig(
            **options,
            output_dir=str(work.absolute() if work else "."),
            learning_rate=learning_rate,
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=parts,
            warmup_steps=min(math.ceil(config.warmup * steps), steps - 1),  # it begins at a rate of 0
            lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
            weight_decay=config.weight_decay,
            bf16=config.precision == "bf16",
            fp16=config.precision == "fp16",
            gradient_checkpointing=config.gradient_checkpointing,
            seed=config.seed,
            data_seed=config.seed,
            max_length=max_length,
            completion_only_loss=True,
            logging_nan_inf_filter=False,  # it would replace such losses by the mean of the others
            save_strategy=saves,
            save_steps=each,
            # Until the newest has its checksums, the one before is the last complete one; the best is kept beside them.
            save_total_limit=3 if options["load_best_model_at_end"] else 2,
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise _refusal(error) from error
    if arguments.n_gpu > 1:  # transformers would spread the model by DataParallel, which TRL refuses
        arguments._n_gpu = 1
    if arguments.device.type == "cpu":  # of several processes it has a number, at which torch.load takes offence
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments


def shared_batch(config: TrainConfig) -> tuple[int, int]:
    """The samples of a forward, and the forwards of a step, in each of the processes that share a batch.

    Raises CordaError if these cannot share it evenly."""
    processes = number_of_processes()
    each, over = divmod(config.batch_size, processes)
    micro = min(config.micro_batch_size or each, each)
    if over or each % micro:
        raise CordaError(
            f"{processes} processes cannot share a batch_size of {config.batch_size} evenly"
            + (f" in forwards of {micro} samples" if micro and not over else "")
            + f": give {processes} times a multiple of micro_batch_size"
        )
    return micro, each // micro


def check_engine(config: TrainConfig, split: str | None, keeps: bool) -> None:
    """Raises CordaError if accelerate is set to an engine that cannot train this.

    Args:
        split: of the CorDA adapter; None of another one.
        keeps: whether a price is put on the drift.
    """
    if not is_sharded() and not uses_deepspeed():
        return
    if is_sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise CordaError("FSDP 1 flattens the adapter's factors: set fsdp_version to 2 in accelerate's configuration")
    engine = "FSDP" if is_sharded() else "DeepSpeed"
    if config.weight_decay and split in ("paper", "balanced"):
        raise CordaError(
            f"in {engine} weight decay would shrink the half of a {split} adapter that is held: give --weight_decay 0"
        )
    if config.early_stopping:
        raise CordaError(f"{engine} does not go back to the best adapter: leave early_stopping out")
    if keeps and uses_deepspeed():
        raise CordaError(
            "DeepSpeed shows no whole factor between two layers, so the drift cannot be predicted: use FSDP 2, or give "
            "--keep 0"
        )


def is_sharded() -> bool:
    """Whether accelerate is set to FSDP."""
    return number_of_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def uses_deepspeed() -> bool:
    return number_of_processes() > 1 and os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def check_trainer(config: TrainConfig, device: torch.device, evaluates: bool = False) -> None:
    """Make everything that `config.trainer` asks for once, before long work. Raises CordaError as `trainer_arguments`
    does, or if an optimizer, a schedule or a tracker cannot be made."""
    arguments = trainer_arguments(config, 1e-3, 100, 512, device, Path("work"), evaluates)
    try:
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        schedule, more = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {}
        get_scheduler(schedule, optimizer, 1, 100, scheduler_specific_kwargs=more)
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> CordaError:
    return CordaError(f"trainer: {(str(error).strip() or type(error).__name__).splitlines()[0]}")


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are passed through, with the types that SFTConfig says. Raises CordaError for what it has not,
    what is ours, and values of other types."""
    hints = get_type_hints(SFTConfig)
    names = {f.name for f in fields(SFTConfig)}
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name in _REFUSED:
            raise CordaError(f"trainer.{name} cannot be given: {_REFUSED[name]}")
        if name not in names:
            nearest = difflib.get_close_matches(name, names - _REFUSED.keys(), n=3, cutoff=0.5)
            advice = f"; nearest names: {', '.join(nearest)}" if nearest else ""
            raise CordaError(f"TRL's SFTConfig has no option {short(name)}{advice}")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{name}", type=hints[name])
        try:
            checked[name] = parser.parse_object({name: value})[name]
        except ArgumentError as error:
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise CordaError(f"trainer.{name} is {short(value)}, but must be of type {kind}") from error
    return checked
