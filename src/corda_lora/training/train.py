"""Supervised fine-tuning on prompt/response pairs, through TRL: from a start to a tuned adapter."""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import CordaError, LoraStart, TrainConfig
from ..data.batches import encode
from ..data.samples import Sample
from ..devices import has_bfloat16
from ..models.targets import find_targets, require_causal, task_type
from ..progress import progress_bar


def plain_lora(model: nn.Module, start: LoraStart, config: TrainConfig) -> PeftModel:
    """A LoRA as PEFT starts it: A random, B zero."""
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=start.r,
        lora_alpha=start.lora_alpha or start.r,
        lora_dropout=config.lora_dropout,
        target_modules=list(find_targets(model, start.target_modules)),
        task_type=task_type(model),
    )
    return peft.get_peft_model(model, lora)


def warn_without_bfloat16(config: TrainConfig, device: torch.device) -> None:
    if config.precision == "bf16" and not has_bfloat16(device):
        warnings.warn(
            "this processor has no instructions for bfloat16, and trains many times faster in float32: "
            "--dtype float32 --precision fp32 (in a recipe for `corda compare`, dtype: float32 and "
            "train: {precision: fp32})",
            stacklevel=3,
        )


def train(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    config: TrainConfig,
    max_length: int = 512,
    work: Path | None = None,
    progress: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a model in place, an adapted one or a whole one; the loss is on the response (and the end-of-text token)
    alone. With the same seed every model sees the same samples in the same order.

    Args:
        work: where checkpoints are written; if it holds some, training goes on from the last.
        optimizer: in the place of AdamW over all that is trainable.
        callbacks: what else happens at the trainer's steps.

    Returns:
        {"loss": [[step, loss], ...], "steps", "seconds", "train_loss"}.

    Raises:
        CordaError: no sample has a response.
    """
    encoded = [encode(tokenizer, s, max_length, end=True) for s in samples if s.response]
    rows = [
        {"input_ids": ids, "completion_mask": [int(i >= n) for i in range(len(ids))]}
        for ids, n in encoded
        if n < len(ids)
    ]
    require_causal(model)
    if not rows:
        raise CordaError("no sample has a response to learn: say with a template which columns are prompt and response")
    warn_without_bfloat16(config, next(model.parameters()).device)
    micro = config.micro_batch_size or config.batch_size
    steps = training_steps(config, len(rows))
    arguments = SFTConfig(
        output_dir=str(work or "."),
        learning_rate=config.learning_rate,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        warmup_steps=math.ceil(config.warmup * steps),
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        weight_decay=config.weight_decay,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        max_length=max_length,
        completion_only_loss=True,
        logging_steps=max(1, steps // 100),
        save_strategy="steps" if work and config.checkpoints else "no",
        save_steps=max(1, steps // max(1, config.checkpoints)),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
    )
    datasets.disable_progress_bars()
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    since = time.perf_counter()
    with compiled(model, config.compile), progress_bar("training", steps, progress) as advance:
        trainer.add_callback(_Steps(advance))
        result = trainer.train(resume_from_checkpoint=last_checkpoint(work) if work else None)
    # The forward that mixed precision was wrapped around: what is measured next is measured as the base model is.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return {
        "steps": steps,
        "samples": len(rows),
        "seconds": time.perf_counter() - since,
        "train_loss": result.training_loss,
        "loss": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
    }


@contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model's blocks, compiled for the time being: one graph serves them all, where one of the whole model would
    take minutes to make."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)] if wanted else []
    blocks = [block for children in lists for block in children]
    for block in blocks:
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def training_steps(config: TrainConfig, samples: int) -> int:
    """How many steps the recipe takes over this many samples."""
    return config.max_steps or max(1, round(config.epochs * samples / config.batch_size))


class _Trainer(SFTTrainer):
    """Goes through the samples in the order that it always had, but so that the micro-batches of a step hold samples of
    like length: the same gradient, and less padding."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        return _LikeLengths([len(ids) for ids in rows["input_ids"]], self.args)


class _LikeLengths(Sampler[int]):
    def __init__(self, lengths: Sequence[int], args: SFTConfig):
        self.lengths, self.seed, self.epoch = lengths, args.data_seed, 0
        self.batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as accelerate's sampler
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            yield from sorted(order[start : start + self.batch_size], key=lambda i: self.lengths[i])


class _Steps(TrainerCallback):
    """Moves a progress bar with the trainer's steps, also those a resumed run has behind it."""

    def __init__(self, advance: Callable[[], None]):
        self.advance, self.shown = advance, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(state.global_step - self.shown):
            self.advance()
        self.shown = state.global_step


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is whole (the trainer writes its state last); what was broken off is removed."""
    steps = {int(path.name.rpartition("-")[2]): path for path in work.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None
