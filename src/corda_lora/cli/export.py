"""`corda export`: a tuned adapter in another form."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from ..config import CordaError, DataConfig, ModelConfig
from ..config.data import CONTEXT_SAMPLES
from ..config.values import Count
from ..files import check_output, is_made, read_json, sha256_of
from .shared import AddVerb, add_push, begin_imports, hub_repo, out, push, take


def add_export(verb: AddVerb) -> None:
    parser = verb(
        "export",
        export,
        "turn a tuned adapter into a plain LoRA, a merged or a residual model",
        ModelConfig,
        result=True,
    )
    parser.add_argument("--adapter", type=Path, required=True, help="directory from `corda train`")
    parser.add_argument(
        "--as", dest="form", type=Literal["lora", "merged", "residual", "ordered"], default="lora", help="what to write"
    )
    parser.add_argument(
        "--r",
        type=Count | None,
        help="compress the LoRA to this rank; the error is printed. Of components in order: those that this mean rank "
        "pays for",
    )
    parser.add_argument(
        "--data", type=str | DataConfig | None, help="DATA of the task, whose samples say what each component gains"
    )
    parser.add_argument(
        "--original", type=str | None, help="write the LoRA for the full model that a quantized MODEL was made from"
    )
    parser.add_argument(
        "--uniform", action="store_true", help="pad the LoRA's layers to one rank with zeros, for llama.cpp"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    add_push(parser)


def export(options: Namespace) -> dict[str, Any]:
    """Turn an adapter into (lora) a plain LoRA on the original model, exact or compressed to a rank; (merged) the whole
    model with it merged in; (residual) the residual model and the rank-r adapter for it; (ordered) a plain LoRA of the
    same function whose components are in the order of what they gain on samples of the task: every prefix of them is
    the best adapter of its size."""
    source = take(ModelConfig, options)
    if options.r is not None and options.form != "lora":
        raise CordaError("--r goes with --as lora only")
    if options.uniform and options.form != "lora":
        raise CordaError("--uniform goes with --as lora only: a merged model has no ranks")
    if options.original is not None and options.form != "lora":
        raise CordaError("--original goes with --as lora only: the others are of MODEL itself")
    if (options.form == "ordered") != (options.data is not None):
        raise CordaError("--as ordered goes with --data, samples of the task that the adapter was trained for")
    begin_imports(options)
    from ..adapters.export import (
        RECORD,
        export_for_original,
        export_lora,
        export_merged,
        export_ordered,
        export_residual,
    )
    from ..adapters.lora import BASE, CONFIG, WEIGHTS, read_marks, with_labels_of
    from ..adapters.order import NAME as ORDER
    from ..adapters.order import read_order
    from ..data.batches import cut_away, encode_all
    from ..data.overview import overview
    from ..data.samples import digest_of, load_samples
    from ..devices import compute_device
    from ..models.loading import is_quantized, load_model, load_tokenizer
    from ..preprocess.statistics import check_samples
    from ..report.terminal import order_table
    from ..report.verdicts import another_function

    read_marks(options.adapter)
    source = with_labels_of(source, options.adapter)
    # Of a GGUF file the numbers are expanded; an exported residual lacks a part of the model, too.
    lacks = source.model.endswith(".gguf") or BASE in (read_json(options.adapter / CONFIG).get("auto_mapping") or {})
    if options.original is not None and not lacks and not is_quantized(source):
        raise CordaError(
            f"--original is the full model that a quantized MODEL was made from, and {source.model} is not quantized: "
            "leave --original out"
        )
    recipe = {"model": asdict(source), "as": options.form, "r": options.r, "uniform": options.uniform}
    recipe |= {"original": options.original}
    original = None if options.original is None else replace(source, model=options.original, revision=None)
    files = [name for name in ("adapter_config.json", WEIGHTS, ORDER) if (options.adapter / name).is_file()]
    recipe |= {name: sha256_of(options.adapter / name) for name in files}
    data = DataConfig(options.data) if isinstance(options.data, str) else options.data
    if data is not None:
        data = replace(data, samples=data.samples or CONTEXT_SAMPLES)
        samples = load_samples(data)
        recipe |= {"data": asdict(data), "samples_sha256": digest_of(samples)}
    if is_made(options.output / RECORD, recipe):
        out.print(f"{options.output} is whole already: the same command made it")
        push(options, hub_repo(options))
        return {"output": str(options.output), "form": options.form}
    check_output(options.output, RECORD, recipe)
    if data is not None:  # before the model is loaded
        tokenizer = load_tokenizer(source)
        encoded = encode_all(tokenizer, samples, data.max_length, end=True)
        out.print(overview(data.data, tokenizer, samples, encoded, data.max_length, end=True))
        check_samples(sum(e.targets > 0 for e in encoded), cut_away(samples, encoded, data.max_length))
    repo = hub_repo(options)
    model = load_model(source)
    result: dict[str, Any] = {"output": str(options.output), "form": options.form, "relative_error": 0.0}
    if options.form == "lora":
        arguments = (options.adapter, options.output, options.r, options.uniform, recipe)
        if original:
            result["relative_error"], result["differs"] = export_for_original(model, original, *arguments)
            out.print(another_function(result["differs"]), highlight=False)
        else:
            result["relative_error"] = export_lora(model, *arguments)
        if options.r is not None:
            out.print(f"compressed to rank {options.r}: relative error {result['relative_error']:.3e}")
        elif not original:
            out.print("exact")
    elif options.form == "merged":
        quantized = getattr(model, "is_quantized", False)
        error = export_merged(model, options.adapter, options.output, load_tokenizer(source), recipe)
        result["relative_error"] = error
        if quantized:
            out.print(f"dequantized, and merged: rounding changed the weights by {error:.1e} of their length")
    elif data is not None:
        model = model.to(compute_device(model, None))
        found = (options.adapter, options.output, encoded, tokenizer.pad_token_id or 0)
        gains = export_ordered(model, *found, record=recipe)
        result["gain"] = float(sum(gain.sum() for gain in gains.values()))
        out.print(order_table(read_order(options.output), gains))
    else:
        export_residual(model, options.adapter, options.output, load_tokenizer(source), recipe)
    out.print(f"written to {options.output}")
    push(options, repo)
    return result
