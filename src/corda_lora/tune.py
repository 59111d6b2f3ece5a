"""Samples of a task and the start of an adapter → a trained adapter on disk: what `corda train` runs.

tuning = read_tuning(ModelConfig("HuggingFaceTB/SmolLM2-135M"), DataConfig("new.jsonl"), start=Path("start"))
tune(tuning, Path("tuned"))
"""

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import devices
from .adapters.card import TRAINING
from .adapters.held import gather_adapter
from .adapters.lora import RECORD, load_adapter, read_marks, read_record, renew_heads, save_adapter, with_labels_of
from .config import CordaError, DataConfig, KeepConfig, LoraStart, ModelConfig, TrainConfig
from .data.batches import encode_all
from .data.labels import check_labels, with_labels
from .data.overview import overview
from .data.samples import Sample, digest_of, hold_out, load_samples
from .evaluation.meter import KeptContext, encode_kept, generic_penalty, kept_digest, load_contexts, make_keepers
from .files import check_output, is_made, remove_folder, remove_work, sha256_of, work_folder
from .models.loading import checkpoint_digest, load_model, load_tokenizer
from .preprocess.work import open_work
from .processes import Processes
from .progress import console
from .training.arguments import check_engine, check_trainer, is_sharded, uses_deepspeed
from .training.keeping import Keepers
from .training.train import DivergedError, check_checkpoints, check_sharded, last_checkpoint, plain_lora, train
from .version import __version__


@dataclass(frozen=True)
class Tuning:
    """What is to be trained: the arguments of `read_tuning`, and what was read.

    Attributes:
        source: with the labels of the head, if the model is to be a classifier.
        samples: of the task.
        evaluated: samples whose loss is measured at each checkpoint.
        contexts: the abilities to keep.
        record: corda.json of the start; None if it has none.
        recipe: what tells this training from others, for training.json.
    """

    source: ModelConfig
    data: DataConfig
    config: TrainConfig
    start: Path | LoraStart
    held_out: DataConfig | float
    keep: KeepConfig
    samples: list[Sample]
    evaluated: list[Sample]
    contexts: list[KeptContext]
    record: dict[str, Any] | None
    recipe: dict[str, Any]


def read_tuning(
    source: ModelConfig,
    data: DataConfig,
    config: TrainConfig | None = None,
    start: Path | LoraStart | None = None,
    held_out: DataConfig | float = 0.0,
    keep: KeepConfig | None = None,
    samples: list[Sample] | None = None,
) -> Tuning:
    """Read the samples that a training needs, before any long work.

    Args:
        data: samples of the task.
        start: an adapter's directory, from `prepare` or from an earlier training; or a plain LoRA, the default.
        held_out: samples to measure the loss of, or the share of `data` that is held out for it.
        keep: what is kept of the model. Default: see `KeepConfig`.
        samples: those of the task, where they have been read already.

    Raises CordaError: samples that cannot be read; a start that is damaged; nothing says what to keep; labels that the
    start's head does not have.
    """
    config, start, keep = config or TrainConfig(), start or LoraStart(), keep or KeepConfig()
    folder = start if isinstance(start, Path) else None
    weights, record = None, None
    if folder:
        read_marks(folder)
        weights, record = folder / "adapter_model.safetensors", read_record(folder)
        source = with_labels_of(source, folder)
    source = with_labels(source, data)
    samples = load_samples(data) if samples is None else samples
    evaluated = load_samples(held_out) if isinstance(held_out, DataConfig) else []
    check_labels(data.data, samples, source.labels)
    check_labels(held_out.data if isinstance(held_out, DataConfig) else "", evaluated, source.labels)
    if source.labels is None:
        contexts = load_contexts(keep, folder, record)
    elif keep.keep or keep.keep_generic or keep.max_drift or keep.context:
        raise CordaError("the drift that keep holds down is that of a language model's answers: a classifier has none")
    else:
        contexts = []
    recipe = {
        "model": asdict(source),
        "start": asdict(start) if isinstance(start, LoraStart) else str(start),
        "data": asdict(data),
        "held_out": asdict(held_out) if isinstance(held_out, DataConfig) else held_out,
        "train": asdict(config),
        "keep": asdict(keep),
        "sha256": {
            "kept": kept_digest(contexts),
            "data": digest_of(samples),
            "held_out": digest_of(evaluated),
            "start": sha256_of(weights) if weights and weights.is_file() else None,
        },
    }
    if not isinstance(held_out, DataConfig):
        samples, evaluated = hold_out(samples, held_out, data.seed)
    return Tuning(source, data, config, start, held_out, keep, samples, evaluated, contexts, record, recipe)


def is_tuned(tuning: Tuning, output: Path) -> bool:
    """Whether the output is whole and was made by this training. What a killed run left beside it is tidied up."""
    if not is_made(output / TRAINING, {"recipe": tuning.recipe}):
        return False
    _keep_logs(output)
    remove_work(output, tuning.recipe)
    return True


def check_tuning(tuning: Tuning, output: Path) -> None:
    """Raises CordaError if something is in the way of the output, or the trainer's options do not go together."""
    check_output(output, TRAINING, {"recipe": tuning.recipe})
    marks = read_marks(tuning.start) if isinstance(tuning.start, Path) else None
    keeps = bool(tuning.contexts or tuning.keep.keep_generic)
    check_engine(tuning.config, (marks or {}).get("split"), keeps)
    if (is_sharded() or uses_deepspeed()) and len({bool(s.images) for s in (*tuning.samples, *tuning.evaluated)}) > 1:
        raise CordaError(
            "FSDP and DeepSpeed split the vision tower among processes that all come to it, and one whose samples have "
            "no image does not: give all rows an image, or use DDP"
        )
    check_trainer(tuning.config, devices.accelerator(), evaluates=bool(tuning.held_out))


def tune(tuning: Tuning, output: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Train, and write the adapter's directory, with training.json. A training that was broken off goes on from its
    last checkpoint, in the folder OUTPUT.work, when it is called again with the same arguments.

    Args:
        processes: those that share the samples of each step. Each calls this with the same arguments, and the first one
            writes the output.

    Returns what is in training.json: what `train` returns, the recipe, and, where something is kept, "drift": the
    meter's history (see `training.keeping.Keeper`), and "predicted_drift": that of each layer at the end; of several
    abilities one for each by its name.

    Raises:
        CordaError: see `check_tuning`, `load_model`, `load_adapter`, `make_keepers`, `train`; OUTPUT.work belongs to
            another training. Processes that see different files or versions, or no common folder.
        DivergedError: as `train` does.
    """
    check_tuning(tuning, output)
    if processes:
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")}
        versions |= {"corda-lora": __version__}
        versions |= {f"checkpoint {tuning.source.model}": checkpoint_digest(tuning.source)}
        processes.check_same(tuning.recipe | versions)
    work = open_work(output, tuning.recipe, lambda folder: last_checkpoint(folder) is not None, processes)
    follows = processes is not None and not processes.first
    check_checkpoints(work)
    try:
        tokenizer, length = load_tokenizer(tuning.source), tuning.data.max_length
        where = tuning.held_out.data if isinstance(tuning.held_out, DataConfig) else "held out"
        for name, samples in ((tuning.data.data, tuning.samples), (where, tuning.evaluated)):
            if samples:
                encoded = encode_all(tokenizer, samples, length, end=True)
                console.print(overview(name, tokenizer, samples, encoded, length, end=True))
        kept = encode_kept(tokenizer, tuning.keep, tuning.contexts)
        peft_model = _adapted(tuning)
        keepers, lines = make_keepers(peft_model, tokenizer, tuning.keep, tuning.contexts, kept)
        penalties = {f"drift {keeper.name}".strip(): keeper.penalty for keeper in keepers}
        if price := tuning.keep.keep_generic:
            penalties["generic"] = generic_penalty(peft_model, tokenizer, price)
            lines.append(f"keeps what the model says of its own accord, at a price of {price:g}")
        for line in lines:
            console.print(line, highlight=False)
        result = train(
            peft_model,
            tokenizer,
            tuning.samples,
            tuning.config,
            length,
            work,
            callbacks=[Keepers(keepers, even=tuning.keep.weights == "validation")] if len(keepers) > 1 else keepers,
            penalties=penalties,
            held_out=tuning.evaluated,
        )
    except DivergedError:
        if not follows:
            remove_folder(work)  # resuming from its checkpoints would end the same way
        raise
    except Exception:
        if not follows and last_checkpoint(work) is None:  # the work folder holds nothing to resume from
            remove_folder(work)
        raise
    training = {"recipe": tuning.recipe, **result}
    for keeper in keepers:
        if keeper.history[-1][0] != result["kept_step"]:  # early stopping went back to an earlier adapter
            keeper.look(result["kept_step"])
    if keepers:
        histories = {keeper.name: keeper.history for keeper in keepers}
        training["drift"] = histories.get("", histories)
        with torch.no_grad():
            of_layers = {k.name: {name: float(x) for name, x in k.predicted.by_layer().items()} for k in keepers}
        training["predicted_drift"] = of_layers.get("", of_layers)  # for `inspect`, which has no C and D
    gather_adapter(peft_model)
    if follows:
        return training
    save_adapter(peft_model, output, {TRAINING: training} | ({RECORD: tuning.record} if tuning.record else {}))
    _keep_logs(output)
    remove_folder(work)
    return training


def _adapted(tuning: Tuning) -> Any:
    """The model with the adapter to train."""
    torch.manual_seed(tuning.config.seed)  # of a classifier's new head
    # In FSDP's own way to load, which this turns off, all but the first process would have weights of no value.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    model, device = load_model(tuning.source), devices.accelerator()
    room = devices.free_bytes(device)
    # What FSDP or DeepSpeed is to split, and no device holds whole, is moved to the devices by them, in pieces.
    if not (is_sharded() or uses_deepspeed()) or room is None or 1.2 * sum(p.nbytes for p in model.parameters()) < room:
        model = model.to(device)
    adapted: Any
    if isinstance(tuning.start, LoraStart):
        adapted = plain_lora(model, tuning.start, tuning.config)
    else:
        adapted = load_adapter(model, tuning.start, trainable=True, lora_dropout=tuning.config.lora_dropout or None)
        if tuning.record and not (tuning.start / TRAINING).is_file():
            renew_heads(adapted)
    if is_sharded():
        check_sharded(adapted)
    return adapted


def _keep_logs(output: Path) -> None:
    """Move a tracker's logs out of the folder of work."""
    logs = work_folder(output) / "runs"
    if logs.is_dir():
        shutil.move(logs, output)
