"""A model and samples of an ability → the start of an adapter on disk: what `corda init` runs."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ContextConfig, CordaConfig, CordaError, DataConfig, ModelConfig
from ..config.init import check_together
from ..data.batches import cut_away, encode_all
from ..data.overview import check_fit, overview, unseen_samples
from ..data.samples import Sample, digest_of, load_rounds
from ..devices import compute_device
from ..files import check_output, remove_folder
from ..models.loading import (
    check_original,
    check_same_model,
    checkpoint_digest,
    is_quantized,
    load_model,
    load_tokenizer,
    open_model,
)
from ..models.lockstep import Stored, on_device, tensors_of
from ..models.targets import modules_named
from ..preprocess.context import Ability, Context, has_decoder, read_context, together
from ..preprocess.held_out import enough_samples, held_out_leaks, times_as_much
from ..preprocess.pipeline import Start, preprocess
from ..preprocess.plan import check_room, init_plan
from ..preprocess.statistics import FewAnswersError
from ..preprocess.walk import Place
from ..preprocess.warm import warming
from ..preprocess.work import MANIFEST, open_work
from ..processes import Processes
from ..progress import console
from ..version import __version__
from .lora import BASE_FOLDER, RECORD, TIMING, install, save_adapter
from .quantize import write_base

OTHERS = 64  # samples beside those shown whose leak is measured


def prepare(
    source: ModelConfig | nn.Module,
    config: CordaConfig,
    data: DataConfig | Sequence[ContextConfig] | None,
    output: Path,
    tokenizer: Any = None,
    batch_tokens: int = 4096,
    park: str = "auto",
    keep_work: bool = False,
    progress: bool = True,
    original: ModelConfig | None = None,
    processes: Processes | None = None,
    shown: Sequence[Sequence[Sequence[Sample]]] | None = None,
) -> Start:
    """Cut an adapter's start out of a model, and write it as an adapter directory that plain PEFT loads on that model.

        prepare(ModelConfig("HuggingFaceTB/SmolLM2-135M"), CordaConfig(r=32), DataConfig("known.jsonl"), Path("start"))

    Finished blocks are kept in the folder OUTPUT.work until the adapter is written. A run that was broken off goes on
    from there when it is called again with the same arguments.

    Args:
        source: a checkpoint, which is read block by block, so that the whole model is never in memory; or a loaded
            model, which is left as it was.
        data: samples of the ability to keep (kpm) or to learn (ipm). Not needed with orientation `identity`, unless
            `keep` is above 0. Or those of several abilities (see `named_contexts`), whose covariances are mixed.
        output: the directory to write, with corda.json (what was run), timing.json, spectra.safetensors and, if `keep`
            is above 0, statistics.safetensors. With `quantization`, the quantized base of the adapter is in its folder
            `base`.
        tokenizer: Default: that of the checkpoint.
        batch_tokens: tokens of the context a forward.
        park: see `preprocess`.
        keep_work: do not remove OUTPUT.work in the end.
        progress: show a progress bar.
        original: where `source` is in 4 bits already, the checkpoint of its full weights: the context runs through
            them, and the components are theirs. Default: the values that the quantized weights stand for.
        processes: those that share the work (see `preprocess.share`), each of which calls this with the same arguments.
            The first one writes the output.
        shown: what `load_rounds` gives for each of the data, where they have been read already.

    Raises:
        CordaError: see `preprocess`, `load_rounds` and `open_model`; something is in the way of the output, or its disk
            has too little room; OUTPUT.work belongs to another run; a loaded model has no tokenizer. Processes that
            see different files or versions, or no common folder.
    """
    if not config.reads_context:
        data = None
    elif data is None:
        raise CordaError("give a context: samples of the ability to keep (kpm) or to learn (ipm)")
    check_output(output)
    assert config.rounds is not None
    datas = [data] if isinstance(data, DataConfig) else list(data or ())
    check_together(config, len(datas))
    with warming(config, source if isinstance(source, nn.Module) else None, processes) as warm:
        shown = [load_rounds(each, config.rounds) for each in datas] if shown is None else shown
        base: nn.Module | None = None
        if isinstance(source, ModelConfig):
            if original is not None:
                check_original(original)
                if not is_quantized(source):
                    raise CordaError(f"original is for a model that is quantized already, but {source.model} is not")
                base = load_model(source)
            torch.manual_seed(0)  # of a classifier's new head
            model, stored = open_model(source) if base is None or original is None else check_same_model(base, original)
            if stored:
                warm(model, batch_tokens)
            tokenizer = load_tokenizer(source) if (datas or config.quantization) and tokenizer is None else tokenizer
        else:
            model, stored = source, {}
        contexts = []
        for each, rounds in zip(datas, shown):
            if tokenizer is None:
                raise CordaError("give the tokenizer of the loaded model, which the context is encoded by")
            if progress:
                name = each.ability if isinstance(each, ContextConfig) else each.data
                encoded = encode_all(tokenizer, rounds[0], each.max_length)
                console.print(overview(name, tokenizer, rounds[0], encoded, each.max_length, learned=False))
            context = read_context(tokenizer, rounds, each.max_length, batch_tokens, has_decoder(model))
            check_fit(model, (ids for batch in context.batches for ids in batch["input_ids"].tolist()))
            contexts.append(context)
        context = contexts[0] if contexts else Context()
        if len(contexts) > 1:
            abilities = [Ability(each.ability, each.weight) for each in datas if isinstance(each, ContextConfig)]
            context = together(contexts, abilities)
    check_room(init_plan(model, config, context.batches, park, abilities=max(1, len(contexts))), output)

    record = data_record(datas)
    if datas:
        record |= {"samples_sha256": digest_of(chain(*chain(*shown)))}
    dtype = str(next(model.parameters()).dtype)
    if isinstance(source, ModelConfig):
        dtype = source.dtype
        record |= {"model": source.model, "revision": source.revision, "dtype": dtype, "batch_tokens": batch_tokens}
        record |= {"original": original.model} if original else {}
        record |= {"labels": source.labels} if source.labels else {}
    tokens = b"".join(batch["input_ids"].numpy().tobytes() for batch in context.batches)
    run = {**record, "config": asdict(config), "dtype": dtype, "batch_tokens": batch_tokens}
    run |= {"tokens": hashlib.sha256(tokens).hexdigest(), "corda-lora": __version__}
    run |= {"torch": torch.__version__}
    if processes:
        versions = {name: version(name) for name in ("transformers", "peft", "safetensors")}
        sources = [each for each in (source, original) if isinstance(each, ModelConfig)]
        versions |= {f"checkpoint {each.model}": checkpoint_digest(each) for each in sources}
        processes.check_same({**run, **versions, "context": record.get("samples_sha256")})
        run |= {"processes": processes.size}
    run |= {"threads": torch.get_num_threads()}  # of the first process: not all hosts have as many cores
    work = open_work(output, run, lambda folder: (folder / MANIFEST).is_file(), processes)
    try:
        start = preprocess(model, config, context, progress, stored, work, park, base, processes)
    except CordaError as error:
        if not (work / MANIFEST).is_file() and (processes is None or processes.first):  # nothing was finished
            remove_folder(work)
        if isinstance(error, FewAnswersError):
            raise CordaError(f"{error}{_all_cut_away(tokenizer, datas, shown)}") from error
        raise
    if len(datas) == 1 and config.mode == "kpm" and config.orientation != "identity" and config.rounds == 1:
        _add_held_out(start, model, stored, tokenizer, datas[0], shown[0][0], batch_tokens, processes, progress)
    if processes and not processes.first:
        return start
    quantized = work / BASE_FOLDER if config.quantization else None
    if quantized:
        write_base(model, start, quantized, stored, tokenizer)
    spectra = {name: layer.spectrum for name, layer in start.layers.items()}
    whole = [m for ending in config.modules_to_save or () for m in modules_named(model, ending).values()]
    with on_device([t for m in whole for t in tensors_of(m) if t in stored], torch.device("cpu"), stored):
        adapted = install(model if base is None else base, start)
        marks = adapted.peft_config["default"].auto_mapping["corda"]
        full = original or source
        if "original" in marks and isinstance(full, ModelConfig):
            marks["original"] = {"model": full.model, "revision": full.revision}
        records = {RECORD: record | start.record, TIMING: start.took}
        save_adapter(adapted, output, records, spectra, start.statistics, quantized)
        adapted.unload()
    if not keep_work:
        remove_folder(work)
    return start


def data_record(datas: Sequence[DataConfig]) -> dict[str, Any]:
    """What corda.json says of where the samples are from."""
    if len(datas) > 1:
        return {"data": None, "contexts": [asdict(each) for each in datas]}
    return {"data": asdict(datas[0]) if datas else None}


def _all_cut_away(tokenizer: Any, datas: Sequence[DataConfig], shown: Sequence[Sequence[Sequence[Sample]]]) -> str:
    """`cut_away` of all samples shown."""
    said = ""
    for data, rounds in zip(datas, shown):
        samples = list(chain(*rounds))
        said += cut_away(samples, encode_all(tokenizer, samples, data.max_length), data.max_length)
    return said


def _add_held_out(
    start: Start,
    model: nn.Module,
    stored: Stored,
    tokenizer: Any,
    data: DataConfig,
    shown: Sequence[Sample],
    batch_tokens: int,
    processes: Processes | None,
    progress: bool,
) -> None:
    """Add to the record how much other samples of the data leak, if there are others: of each layer, how many times as
    much as those shown, and how many samples would be enough."""
    others = unseen_samples(model, tokenizer, data, shown, OTHERS)
    if len(others) < OTHERS // 4:
        return
    config, record = start.config, start.record
    context = read_context(tokenizer, [others], data.max_length, batch_tokens, has_decoder(model))
    place = Place(compute_device(model, config.device), stored, processes=processes)
    context = replace(context, skip_tokens=config.skip_tokens, tokens=config.tokens)
    leaks = held_out_leaks(model, start, context, place, processes, progress)
    for name, leak in leaks.items():
        record["layers"][name]["held_out_leak"] = leak
    leaked = {name: layer.record.leak for name, layer in start.layers.items() if layer.record.leak is not None}
    times, samples = times_as_much(leaked, leaks), record["context"]["samples"]
    if times is not None:
        record["held_out"] = {"samples": len(others), "times": times, "enough": enough_samples(samples, times)}
