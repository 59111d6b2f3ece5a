"""Supervised fine-tuning on prompts and responses, through TRL's `SFTTrainer`."""

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import CordaError, LoraStart, TrainConfig
from ..data.batches import encode
from ..data.overview import check_fit
from ..data.samples import Sample
from ..devices import has_bfloat16
from ..files import CHECKSUMS, check_checksums, write_checksums
from ..models.targets import find_targets, require_causal, task_type
from ..progress import progress_bar
from .sampler import SimilarLengths


class DivergedError(RuntimeError):
    """Training stopped because its loss or its parameters were not finite. `step` is the optimizer step, from 1 on."""

    def __init__(self, what: str, step: int):
        super().__init__(f"{what} at step {step}: training stopped; a lower learning rate may help")
        self.step = step


def plain_lora(model: nn.Module, start: LoraStart, config: TrainConfig) -> PeftModel:
    """The model with a LoRA initialized as in PEFT: A random, B zero."""
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
    """Warn if the training would emulate bfloat16, which is many times slower than float32."""
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
    penalties: Mapping[str, Callable[[], Tensor]] | None = None,
) -> dict[str, Any]:
    """Train the trainable parameters of `model` in place. The model may carry an adapter.

    The loss covers only the response and the end-of-text token. With the same seed, every model sees the same samples
    in the same order.

    Args:
        work: folder for checkpoints. If it holds checkpoints already, training resumes from the newest.
        optimizer: used instead of AdamW over all trainable parameters.
        callbacks: added to the trainer.
        penalties: terms of the loss by name, added once per optimizer step. Each function computes its weighted term, a
            scalar, from the model's current weights.

    Returns:
        {"loss": [[step, mean training loss since the last entry, penalties included], ...], "penalties": {name: [[step,
        mean penalty since the last entry], ...]}, "steps", "samples", "seconds", "train_loss"}.

    Raises:
        CordaError: the model is no causal language model, its output head carries an adapter, or no sample has a
            response.
        DivergedError: the loss of a step, or a trained parameter at the end, is NaN or infinite.
    """
    require_causal(model)  # SFTTrainer trains the next-token loss of responses; a classifier has no such loss
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):  # type: ignore[operator]
        raise CordaError(
            "the output head carries an adapter, which cannot be trained: TRL reads the head's weight past the adapter"
        )
    encoded = [encode(tokenizer, s, max_length, end=True) for s in samples]
    rows = [{"input_ids": e.ids, "completion_mask": list(map(int, e.answer))} for e in encoded if e.targets]
    if not rows:
        raise CordaError("no sample has a response to learn: say with a template which columns are prompt and response")
    check_fit(model, (row["input_ids"] for row in rows))
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
        logging_nan_inf_filter=False,  # it would replace such losses by the mean of the others
        save_strategy="steps" if work and config.checkpoints else "no",
        save_steps=max(1, steps // max(1, config.checkpoints)),
        save_total_limit=2,  # until the newest has its checksums, the one before is the last complete one
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
        callbacks=[*callbacks, _Checksums()],
    )
    trainer.penalties = penalties or {}
    trainer.remove_callback(PrinterCallback)
    since = time.perf_counter()
    with compiled(model, config.compile), progress_bar("training", steps, progress) as advance:
        trainer.add_callback(_Steps(advance))
        trainer.train(resume_from_checkpoint=last_checkpoint(work) if work else None)
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise DivergedError("the trained parameters were not finite", steps)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    losses = [(log["step"], log["loss"]) for log in logs]
    # Remove the mixed-precision wrapper, so that the tuned model is measured in the same precision as the base model.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return {
        "steps": steps,
        "samples": len(rows),
        "seconds": time.perf_counter() - since,
        "train_loss": mean_loss(losses),
        "loss": [list(pair) for pair in losses],
        "penalties": {name: [[log["step"], log[f"penalty/{name}"]] for log in logs] for name in trainer.penalties},
    }


def mean_loss(losses: Sequence[tuple[int, float]]) -> float:
    """The mean over all steps of [(step, mean loss of the steps since the last entry), ...]."""
    begins = [0, *(step for step, _ in losses)]
    return sum((step - begin) * loss for begin, (step, loss) in zip(begins, losses)) / begins[-1]


@contextmanager
def compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside this context the model's blocks are compiled, if `wanted`.

    All blocks share one graph. Compiling the whole model as one graph would take minutes."""
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
    """The number of optimizer steps that `config` takes with this many samples."""
    return config.max_steps or max(1, round(config.epochs * samples / config.batch_size))


class _Trainer(SFTTrainer):
    """TRL's trainer with our order of samples, and with penalties in its loss. It stops at a loss that is NaN or
    infinite."""

    penalties: Mapping[str, Callable[[], Tensor]] = {}

    def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """The loss of a micro-batch, with its share of the penalties.

        TRL computes the loss from log-probabilities: whatever a model or a hook adds to `outputs.loss` is ignored."""
        loss = super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        values = {name: penalty() for name, penalty in self.penalties.items()}
        for name, value in values.items():
            self._metrics["train"][f"penalty/{name}"].append(value.item())
        # Where the loss counts the tokens of the whole step, transformers adds up the micro-batches; else it averages.
        adds_up = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return loss + sum(values.values()) / (self.current_gradient_accumulation_steps if adds_up else 1)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise DivergedError(f"the loss was {float(loss):g}", self.state.global_step + 1)
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengths:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        step_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return SimilarLengths([len(ids) for ids in rows["input_ids"]], step_size, self.args.data_seed)


class _Steps(TrainerCallback):
    """Advances a progress bar by the trainer's steps. The first call also advances it by the steps before a resume.

    It also has the loss logged with every checkpoint and at the end, so that the log covers all steps, also those
    before a resume."""

    def __init__(self, advance: Callable[[], None]):
        self.advance, self.shown = advance, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(state.global_step - self.shown):
            self.advance()
        self.shown = state.global_step
        control.should_log |= control.should_save or state.global_step == state.max_steps


class _Checksums(TrainerCallback):
    """Writes the checksums of each checkpoint when the trainer has saved it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def last_checkpoint(work: Path) -> str | None:
    """The path of the newest complete checkpoint in `work`, or None; incomplete checkpoints are deleted.

    The checksums are written last, so a checkpoint that has them is complete.

    Raises CordaError if a file of that checkpoint has changed since.
    """
    steps = {int(path.name.rpartition("-")[2]): path for path in work.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        if (path / CHECKSUMS).is_file():
            check_checksums(path, f"remove {path} to go on from an earlier checkpoint or from the beginning")
            return str(path)
        shutil.rmtree(path)
    return None
