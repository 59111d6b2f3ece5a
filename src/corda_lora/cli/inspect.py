"""`corda inspect`: a model seen through contexts, or what an adapter changed."""

import shlex
import time
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ..config import CordaError, InspectConfig, ModelConfig
from ..files import check_output, scratch_folder, whole_folder
from .shared import AddVerb, begin_imports, out, take


def add_inspect(verb: AddVerb) -> None:
    parser = verb(
        "inspect",
        look,
        "see which channels contexts light up in a model, and what an adapter changed",
        ModelConfig,
        InspectConfig,
        skip={"model"},
    )
    parser.add_argument("--model", type=str | None, help="a name on the hub, a directory, or a .gguf file")
    parser.add_argument("--adapter", type=Path | None, help="directory of any LoRA: what it changed")
    parser.add_argument("--output", type=Path, required=True, help="directory of the page, the figures and the numbers")


def look(options: Namespace) -> None:
    """Show a model through the samples of one or several contexts: spectra of its layers, covariances of their inputs,
    which contexts light up the same channels, how compact each layer is, and, with --levels, what is lost when the
    smallest components are discarded. Or, with --adapter, show what any LoRA changed: by its file alone, with --model
    beside the weights, with --context by how far it moves the outputs. OUTPUT has a page (report.html), its figures as
    PNG and SVG, and the numbers as JSON and safetensors. Weights are read from the checkpoint block by block."""
    config = take(InspectConfig, options)
    if options.adapter is None and not (options.model and config.contexts()):
        raise CordaError("give a --model and a --context: samples that show an ability; or an --adapter")
    if options.model is None and config.contexts():
        raise CordaError("the contexts are run through the adapter's base: give its --model")
    if options.adapter and (config.levels or config.layers):
        raise CordaError("levels and layers are of a model, and not of an adapter: leave them or --adapter out")
    source = take(ModelConfig, options) if options.model else None
    check_output(options.output)
    begin_imports(options)
    from ..inspection.adapter import inspect_adapter, read_adapter
    from ..inspection.contexts import inspect_model
    from ..models.loading import load_tokenizer, open_model
    from ..report.inspected import (
        about_run,
        adapter_sentences,
        check_page,
        context_sentences,
        write_adapter,
        write_contexts,
    )

    since, adapter = time.perf_counter(), None if options.adapter is None else read_adapter(options.adapter)
    model, stored = (None, {}) if source is None else open_model(source)
    tokenizer = load_tokenizer(source) if source and config.contexts() else None

    def about() -> dict[str, Any]:
        command, seconds = shlex.join(["corda", *options.command]), time.perf_counter() - since
        return about_run(options.adapter, source, config, command, seconds)

    with scratch_folder(options.output) as work:
        if adapter is not None:
            found, values = inspect_adapter(adapter, config, model, tokenizer, stored, work)
            record = about() | found
            sentences = adapter_sentences(record)
        else:
            assert model is not None
            seen = inspect_model(model, tokenizer, config, stored, work, check=check_page)
            record = about() | seen.record
            sentences = context_sentences(record)
    with whole_folder(options.output) as folder:
        if adapter is not None:
            write_adapter(folder, record, values)
        else:
            write_contexts(folder, record, seen.spectra, seen.maps)
    for sentence in sentences:
        out.print(sentence, highlight=False)
    out.print(f"written to {options.output / 'report.html'}")
