"""Supervised fine-tuning on prompts and responses, through TRL's `SFTTrainer`, and of classifiers on labels."""

import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..adapters.held import held_size, marks_of
from ..config import CordaError, LoraStart, TrainConfig
from ..data.batches import encode_all
from ..data.images import Shown, image_inputs
from ..data.overview import check_fit
from ..data.samples import Sample
from ..devices import has_bfloat16
from ..files import CHECKSUMS, check_checksums, write_checksums
from ..models.residual import check_whole
from ..models.targets import (
    check_saved_modules,
    find_targets,
    is_classifier,
    new_modules,
    require_causal,
    task_type,
)
from ..models.weights import is_4bit
from ..processes import number_of_processes
from ..progress import console, progress_bar
from .arguments import is_sharded, trainer_arguments, uses_deepspeed
from .classify import LabelTrainer, label_rows
from .keeping import Keeper, keepers_of
from .rates import LORA_RATE, rate_of
from .sampler import SimilarLengths


class DivergedError(RuntimeError):
    """Training stopped because its loss or its parameters were not finite. `step` is the optimizer step, from 1 on."""

    def __init__(self, what: str, step: int):
        super().__init__(f"{what} at step {step}: training stopped; a lower learning rate may help")
        self.step = step


def plain_lora(model: nn.Module, start: LoraStart, config: TrainConfig) -> PeftModel:
    """The model with a LoRA initialized as in PEFT: A random, B zero. Raises CordaError if the model is a residual (see
    `models.residual`), or has no such layers."""
    check_whole(model, remedy="train that adapter, or give the full model")
    targets = find_targets(model, start.target_modules, 1, start.exclude_modules, start.layers_to_transform)
    check_saved_modules(model, targets, start.modules_to_save)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=start.r,
        lora_alpha=start.lora_alpha or (start.r**0.5 if start.use_rslora else start.r),
        use_rslora=start.use_rslora,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        exclude_modules=start.exclude_modules,
        layers_to_transform=start.layers_to_transform,
        modules_to_save=[*(start.modules_to_save or ()), *new_modules(model)] or None,
        task_type=task_type(model),
    )
    return peft.get_peft_model(model, lora)


def check_precision(model: nn.Module, precision: str) -> None:
    """Raises CordaError if a model in 4 bits would be trained in one half precision by autocast, but computes in the
    other: bitsandbytes' layers keep to theirs, and autocast takes no two."""
    names: dict[Any, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_4bit(module) and precision in names.values():
            own = names.get(module.compute_dtype, precision)
            if own != precision:
                dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
                raise CordaError(
                    f"the quantized model computes in {own}, which does not go with --precision {precision}: "
                    f"--precision {own} or fp32, or --dtype {dtype}"
                )


def choose_blocks(plugin: Any, model: nn.Module) -> None:
    """Have FSDP 2 split a model into the blocks that it names, if they are there (a vision tower brings names of a text
    tower) and do not hold the input embeddings, as BERT's first: accelerate splits these apart."""
    kinds = {type(module).__name__: module for module in model.modules()}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if plugin.transformer_cls_names_to_wrap is None:
        named: list[str] = list(getattr(model, "_no_split_modules", None) or ())
        blocks = [name for name in named if name in kinds and embeddings not in set(kinds[name].modules())]
        plugin.transformer_cls_names_to_wrap = blocks or None


def check_sharded(model: nn.Module) -> None:
    """Raises CordaError if FSDP 2 cannot split a model: a module that is trained as a copy of itself has a weight that
    it shares with another."""
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(
            shared[id(p)] > 1 for p in module.original_module.parameters()
        ):
            raise CordaError(
                f"FSDP splits a weight once, and {name.rpartition('.')[2]} shares its own with another module: leave "
                "it out of modules_to_save, or use DDP"
            )


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
    rehearsals: Mapping[str, Callable[[], Tensor]] | None = None,
    held_out: Sequence[Sample] = (),
) -> dict[str, Any]:
    """Train the trainable parameters of `model` in place. The model may carry an adapter.

    The loss covers only the response and the end-of-text token; a classifier's is that of the label (see
    `training.classify`). With the same seed, every model sees the same samples in the same order. Processes that
    torchrun or accelerate started share each step's samples. (Of a classifier an epoch's last step, if it is not full,
    is filled up with samples of the epoch's beginning until each has as many.)

    Args:
        work: folder for checkpoints, which all processes see. If it holds checkpoints already, training resumes from
            the newest.
        optimizer: used instead of that of `config` (AdamW) over all trainable parameters.
        callbacks: added to the trainer.
        penalties: terms of the loss by name, of the weights alone. Each function gives its weighted term, a scalar. It
            is called once in a step, whatever the micro-batches.
        rehearsals: terms of the loss over further samples, by name. Each is called in every micro-batch, and the mean
            of its values over a step's micro-batches is added once. Not where FSDP shards the model.
        held_out: samples whose loss is measured at each checkpoint, and at the end.

    Returns:
        {"loss": [[step, mean training loss since the last entry, further terms included], ...], "held_out_loss":
        [[step, loss], ...], "penalties": {name: [[step, mean of the term since the last entry], ...]}, "steps",
        "kept_step" (whose adapter the model has now), "samples", "seconds", "train_loss", "learning_rate"}.

    Raises:
        CordaError: the model is neither a causal language model nor a classifier, its output head carries an adapter or
            is more than a matrix, no sample has a response, the learning rate is not given and not known, packed
            samples would mix, or there are rehearsals under FSDP; and as `trainer_arguments` does.
        DivergedError: the loss of a step, or a trained parameter at the end, is NaN or infinite.
    """
    if rehearsals and is_sharded():  # its `compute_loss` adds nothing to the loss
        raise CordaError(f"FSDP trains on no further samples ({', '.join(rehearsals)}): use DDP, or one process")
    labelled = is_classifier(model)
    if not labelled:
        require_causal(model)
    if not labelled and isinstance(model.get_output_embeddings(), BaseTunerLayer):  # type: ignore[operator]
        raise CordaError(
            "the output head carries an adapter, which cannot be trained: TRL reads the head's weight past the adapter"
        )
    shown: list[Shown | None] = []  # the images of rows, by number
    encoded = label_rows if labelled else partial(encoded_rows, shown=shown)
    rows = encoded(model, tokenizer, samples, max_length)
    held_out_rows = encoded(model, tokenizer, held_out, max_length) if held_out else None
    collate = Illustrated(tokenizer.pad_token_id or 0, shown) if any(shown) else None
    device = next(model.parameters()).device
    check_precision(model, config.precision)
    warn_without_bfloat16(config, device)
    rate, whose = (config.learning_rate, "") if config.learning_rate else default_rate(model)
    packing = config.trainer.get("packing", False)
    if packing and collate:
        raise CordaError("trainer.packing puts several samples into one sequence, which images cannot be in")
    if packing and labelled:
        raise CordaError("trainer.packing puts several responses into one sequence: a classifier has none")
    if packing:
        check_packing(model, rows)
    steps = training_steps(config, len(pack_dataset(rows.select_columns("input_ids"), max_length) if packing else rows))
    arguments = trainer_arguments(config, rate, steps, max_length, device, work, held_out_rows is not None)
    arguments.remove_unused_columns = collate is None
    collating = {} if collate is None else {"data_collator": collate}
    stopping = [_EarlyStopping(config.early_stopping)] if config.early_stopping else []
    trainer: Any = (_LabelTrainer if labelled else _Trainer)(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out_rows,
        processing_class=tokenizer,
        **collating,
        optimizers=(optimizer, None),
        callbacks=[*callbacks, *stopping, _Checksums()],
    )
    trainer.penalties, trainer.rehearsals = penalties or {}, rehearsals or {}
    trainer.remove_callback(PrinterCallback)
    if is_sharded():
        choose_blocks(trainer.accelerator.state.fsdp_plugin, model)
    if progress:
        console.print(trained_share(model), highlight=False)
        if whose:
            console.print(f"learning rate {rate:g}: that of {whose} (see docs/training.md)", highlight=False)
    since = time.perf_counter()
    with compiled(model, config.compile), progress_bar("training", steps, progress) as advance:
        trainer.add_callback(_Steps(advance, progress, keepers_of(callbacks)))
        trainer.train(resume_from_checkpoint=trainer.last_checkpoint(work) if work else None)
    state = trainer.state
    trained = (local_part(p) for p in model.parameters() if p.requires_grad)
    if not trainer.everywhere(all(bool(p.isfinite().all()) for p in trained)):
        raise DivergedError("the trained parameters were not finite", state.global_step)
    logs = [log for log in state.log_history if "loss" in log]
    losses = [(log["step"], log["loss"]) for log in logs]
    terms = [*trainer.penalties, *trainer.rehearsals]
    # Remove the mixed-precision wrapper, so that the tuned model is measured in the same precision as the base model.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return {
        "steps": state.global_step,
        "kept_step": state.best_global_step if arguments.load_best_model_at_end else state.global_step,
        "samples": len(rows),
        "seconds": time.perf_counter() - since,
        "learning_rate": rate,
        "train_loss": mean_loss(losses),
        "loss": [list(pair) for pair in losses],
        "held_out_loss": [[log["step"], log["eval_loss"]] for log in state.log_history if "eval_loss" in log],
        "penalties": {name: [[log["step"], log[f"penalty/{name}"]] for log in logs] for name in terms},
    }


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def default_rate(model: nn.Module) -> tuple[float, str]:
    """The learning rate to start with for the adapter on a model, and whose rate it is in words.

    Raises CordaError if the model has no adapter of PEFT's.
    """
    if not isinstance(model, PeftModel):
        raise CordaError("the model carries no adapter whose learning rate is known: give a learning_rate")
    try:
        marks = marks_of(model)
    except CordaError:  # an adapter that is not CorDA's
        return LORA_RATE, "plain LoRA"
    mode = marks.get("mode", "ipm" if marks["split"] == "seeded" else "kpm")
    return rate_of(marks["split"], mode), f"the split {marks['split']} in {mode}"


def encoded_rows(
    model: nn.Module, tokenizer: Any, samples: Sequence[Sample], max_length: int, shown: list[Shown | None]
) -> datasets.Dataset:
    """The samples that have a response, as TRL takes them: token ids, and which of them carry the loss; and, if there
    are images, the number of the row in `shown`, to which its images are added.

    Raises CordaError if no sample has a response, or the model cannot read them.
    """
    datasets.disable_progress_bars()
    encoded = [e for e in encode_all(tokenizer, samples, max_length, end=True) if e.targets]
    if not encoded:
        raise CordaError("no sample has a response to learn: say with a template which columns are prompt and response")
    check_fit(model, (e.ids for e in encoded))
    columns: dict[str, list[Any]] = {
        "input_ids": [e.ids for e in encoded],
        "completion_mask": [[*map(int, e.answer)] for e in encoded],
    }
    if any(e.shown for e in encoded):
        columns["number"] = [*range(len(shown), len(shown) + len(encoded))]
        shown += [e.shown for e in encoded]
    return datasets.Dataset.from_dict(columns)


class Illustrated:
    """TRL's collator of token ids and labels, with the images of rows: their pixels are made here, batch by batch."""

    def __init__(self, pad_id: int, shown: Sequence[Shown | None]):
        self.collate, self.shown = DataCollatorForLanguageModeling(pad_id), shown

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collate([{k: v for k, v in row.items() if k != "number"} for row in rows]))
        return batch | self.images(rows, batch["input_ids"])

    def images(self, rows: Sequence[dict[str, Any]], ids: Tensor) -> dict[str, Tensor]:
        """What the forward takes beside the ids (b, s)."""
        return image_inputs([self.shown[row["number"]] if "number" in row else None for row in rows], ids)


def trained_share(model: nn.Module) -> str:
    """How many of a model's parameters are trained, in a line."""
    trained, of_all = PeftModel.get_nb_trainable_parameters(model)
    trained -= held_size(model)
    return f"trains {_millions(trained)} of {_millions(of_all)} parameters ({100 * trained / of_all:.2g} %)"


def _millions(n: int) -> str:
    return f"{n:,}" if n < 1e5 else f"{n / 1e6:,.1f} M" if n < 1e8 else f"{n / 1e6:,.0f} M"


@torch.no_grad()
def check_packing(model: nn.Module, rows: datasets.Dataset) -> None:
    """Raises CordaError if samples that are packed into one sequence attend to one another in this model: then the
    first tokens of a sample depend on the sample before it."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    before, sample = (row["input_ids"][:8] for row in (rows[0], rows[-1]))
    device = next(model.parameters()).device
    model.eval()  # the trainer turns dropout on again
    firsts = []
    for ids in ([sample], [before, sample]):
        batch = collate([{"input_ids": part} for part in ids])
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        firsts.append(model(**batch, use_cache=False).logits[0, -len(sample) :][:2])
    apart, packed = firsts
    if not torch.dist(apart, packed) < 0.25 * torch.finfo(apart.dtype).eps ** 0.5 * apart.norm():
        raise CordaError(f"in {type(model).__name__} packed samples attend to one another: train without packing")


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


class _Terms(Trainer):
    """Part of a trainer: our order of samples, and further terms in the loss (see `train`). It stops at a loss that is
    NaN or infinite."""

    penalties: Mapping[str, Callable[[], Tensor]] = {}
    rehearsals: Mapping[str, Callable[[], Tensor]] = {}
    has_blank = False  # whether the last row is none of the samples, and carries no loss

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):  # FSDP 2's
            # As in one process: gradients are added up in float32, and log-probabilities in float32 are not rounded.
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """The loss of a micro-batch, with its share of the rehearsals; that of a step's last one has the penalties.

        TRL computes the loss from log-probabilities: whatever a model or a hook adds to `outputs.loss` is ignored."""
        loss = super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        if not self.model.training or is_sharded():  # where FSDP shards, `training_step` adds the penalties
            return loss
        parts = self.current_gradient_accumulation_steps
        # Where the loss counts the tokens of the whole step, transformers adds up the micro-batches; else it averages.
        adds_up = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        penalties = self.penalties if self.accelerator.sync_gradients else {}
        for terms, share in ((penalties, 1 if adds_up else parts), (self.rehearsals, 1 / parts if adds_up else 1)):
            for name, term in terms.items():
                value = term()
                self._metrics["train"][f"penalty/{name}"].append(value.item())
                loss = loss + share * value
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if is_sharded() and self.accelerator.sync_gradients:
            # FSDP adds the gradients of a forward up on a stream of its own: these come after them. All processes have
            # the same ones, of which each keeps its shard.
            for name, term in self.penalties.items():
                value = term()
                self._metrics["train"][f"penalty/{name}"].append(value.item())
                self.accelerator.backward(value)
                loss = loss + value.detach()
        if not self.everywhere(bool(loss.isfinite())):
            raise DivergedError(f"the loss was {float(loss):g}", self.state.global_step + 1)
        return loss

    def everywhere(self, fine: bool) -> bool:
        """Whether something is so in every process."""
        if self.args.world_size == 1:
            return fine
        return bool(self.accelerator.gather(torch.tensor([fine], device=self.args.device)).all())

    def last_checkpoint(self, work: Path) -> str | None:
        """See `last_checkpoint`, which the first process calls."""
        found = [last_checkpoint(work) if self.args.process_index == 0 else None]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        return found[0]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Micro-batches of a step. None where what is resumed had ended: the trainer looks for that after a step."""
        if self.control.should_training_stop:
            return [], None
        # Where a resume skips batches in several processes, accelerate does not tell our sampler which epoch it is in.
        self.order.set_epoch(int(self.state.epoch or 0))  # it asks for that at an epoch's first step
        return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # a data loader draws a number: the training is the same without it
            return dict(super().evaluate(*args, **kwargs))

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengths:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        at_once = self.args.per_device_train_batch_size * self.args.world_size
        lengths = [len(ids) for ids in rows["input_ids"]][: -1 if self.has_blank else None]
        step_size = at_once * self.args.gradient_accumulation_steps
        self.order = SimilarLengths(lengths, step_size, self.args.data_seed, at_once if self.has_blank else 1)
        return self.order


class _Trainer(_Terms, SFTTrainer):
    """TRL's trainer."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model, *args, **kwargs)
        for parameter, data in trained:  # TRL rounds what is trained on a 4-bit or 8-bit model to bfloat16
            parameter.data = data.to(parameter.device)
        with _before_zero(self.args):
            self._check_head()
        if self.args.world_size > 1:  # for the places that samples leave where an epoch ends
            rows: datasets.Dataset = self.train_dataset  # type: ignore[has-type]
            self.train_dataset, self.has_blank = datasets.concatenate_datasets([rows, _blank(rows)]), True
            held_out: datasets.Dataset | None = self.eval_dataset  # type: ignore[has-type]
            if held_out is not None:  # else accelerate would fill the last batches with samples, once more
                missing = -len(held_out) % (self.args.per_device_eval_batch_size * self.args.world_size)
                self.eval_dataset = datasets.concatenate_datasets([held_out, *[_blank(held_out)] * missing])
        self.held_out = [0.0, 0]  # the sum of the losses of held-out tokens, and their number

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        if head.weight.requires_grad and isinstance(head, FSDPModule):
            # TRL reads it past its forward, for which FSDP would gather it, and gathers it without adding up gradients.
            head.unshard()
        return super().training_step(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if tokens := int((inputs["labels"][:, 1:] != -100).sum()):
            self.held_out = [self.held_out[0] + float(found[0]) * tokens, self.held_out[1] + tokens]
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The held-out loss is a mean over tokens, as the training loss is. Transformers' is a mean over samples of the
        mean of their batch, which depends on the batches."""
        self.held_out = [0.0, 0]
        output = super().evaluation_loop(*args, **kwargs)
        sums = torch.tensor([self.held_out], dtype=torch.float64)
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device)).cpu()
        total, tokens = sums.sum(0).tolist()
        output.metrics["eval_loss"] = total / tokens
        return output

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raises CordaError if the log-probabilities that TRL trains with are not the model's own. TRL multiplies the
        last hidden states by the head's weight: what else a model, or a hook, does before the logits is passed by."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        row, device = self.train_dataset[0], self.args.device
        ids, images = torch.tensor([row["input_ids"]]), {}
        if isinstance(self.data_collator, Illustrated):
            images = {name: x.to(device) for name, x in self.data_collator.images([row], ids).items()}
        ids = ids.to(device)
        self.model.eval()  # training turns dropout on again
        own = model.forward(input_ids=ids, **images, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        own = own.gather(1, ids[0, 1:, None])[:, 0]
        with suppress(RuntimeError):  # of shapes that do not go together
            fused = model.forward(input_ids=ids, **images, labels=ids, fused_lm_head=True).log_probs[0]
            if (own - fused).abs().mean() < 0.1:  # bfloat16 alone makes a few hundredths
                return
        raise CordaError(
            f"{type(model).__name__} does more before its logits than TRL's trainer knows, which multiplies the "
            "last hidden states by the head's weight: this model cannot be trained here"
        )


def _blank(rows: datasets.Dataset) -> datasets.Dataset:
    """A row without a label."""
    return rows.select([0]).map(lambda row: {"labels": [-100] * len(row["labels"])}, features=rows.features)


@contextmanager
def _before_zero(args: Any) -> Iterator[None]:
    """For a `with` block TRL knows nothing of DeepSpeed's ZeRO-3, which splits the parameters when training begins:
    before that, TRL would ask them in vain for their parts."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


class _LabelTrainer(_Terms, LabelTrainer):
    """That of classifiers."""


class _Steps(TrainerCallback):
    """Advances a progress bar by the trainer's steps, and by those before a resume. What was killed after its last step
    takes no further one.

    It also has the loss logged with every checkpoint and at the end, so that the log covers all steps, also those
    before a resume, and says the loss of held-out samples when it is measured; in a log, the drift, too."""

    def __init__(self, advance: Callable[..., None], show: bool, keepers: Sequence[Keeper]):
        self.advance, self.show, self.shown, self.keepers = advance, show, 0, keepers

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= state.max_steps
        self._advance_to(state.global_step)

    def _advance_to(self, step: int) -> None:
        note = {"note": f"drift ≈ {meter(self.keepers)}"} if self.keepers else {}
        self.advance(step - self.shown, **note)
        self.shown = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance_to(state.global_step)
        for keeper in self.keepers if self.show and not console.is_terminal else ():  # a log has the bar at the end
            step, _, measured, _ = keeper.history[-1]
            if step == state.global_step and measured is not None:
                of = f" of {keeper.name}" if keeper.name else ""
                console.print(f"step {step}: drift{of} {measured:.2g}", highlight=False)
        control.should_log |= control.should_save or state.global_step == state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.show:
            console.print(f"step {state.global_step}: held-out loss {metrics['eval_loss']:.4f}", highlight=False)


def meter(keepers: Sequence[Keeper]) -> str:
    """The drift now; of several abilities a bar for each, beside the largest."""
    if len(keepers) == 1:
        return f"{keepers[0].estimate:.2g}"
    most = max(keeper.estimate for keeper in keepers) or 1.0
    return ", ".join(f"{k.name} {'█' * round(6 * k.estimate / most):░<6} {k.estimate:.2g}" for k in keepers)


class _EarlyStopping(EarlyStoppingCallback):
    """transformers' own, which also knows after a resume how many measurements were no better than the best."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        measured = [log["step"] for log in state.log_history if "eval_loss" in log]
        self.early_stopping_patience_counter = sum(step > (state.best_global_step or 0) for step in measured)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class _Checksums(TrainerCallback):
    """Writes the checksums of each checkpoint when the trainer has saved it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            PartialState().wait_for_everyone()  # each writes a part
        if args.process_index == 0:
            write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def check_checkpoints(work: Path) -> None:
    """Raises CordaError if checkpoints in `work` were saved by another engine, or by another number of DeepSpeed's
    processes: the optimizer would not go on from them."""
    marks, neither = {"DeepSpeed": "global_step*", "FSDP": "pytorch_model_fsdp*"}, "neither FSDP nor DeepSpeed"
    now = "DeepSpeed" if uses_deepspeed() else "FSDP" if is_sharded() else neither
    for path in work.glob("checkpoint-*"):
        saved = next((name for name, mark in marks.items() if any(path.glob(mark))), neither)
        if saved != now:
            raise CordaError(
                f"{path} was saved with {saved}, and this training has {now}: start it as it was begun, or remove "
                f"{work} to begin anew"
            )
        processes = len(list(path.glob("rng_state*.pth")))
        if saved == "DeepSpeed" and processes != number_of_processes():
            raise CordaError(
                f"{path} is of {processes} processes, and DeepSpeed goes on with as many alone: start {processes}, or "
                f"remove {work} to begin anew"
            )


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
