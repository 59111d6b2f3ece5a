"""`corda export`: a tuned adapter in another form."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from ..config import CordaError, ModelConfig
from ..config.values import Count
from ..files import check_output, is_made, sha256_of
from .shared import AddVerb, add_push, hub_repo, out, push, take


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
        "--as", dest="form", type=Literal["lora", "merged", "residual"], default="lora", help="what to write"
    )
    parser.add_argument("--r", type=Count | None, help="compress the LoRA to this rank; the error is printed")
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
    model with it merged in; (residual) the residual model and the rank-r adapter for it."""
    source = take(ModelConfig, options)
    if options.r is not None and options.form != "lora":
        raise CordaError("--r goes with --as lora only")
    if options.uniform and options.form != "lora":
        raise CordaError("--uniform goes with --as lora only: a merged model has no ranks")
    if options.original is not None and options.form != "lora":
        raise CordaError("--original goes with --as lora only: the others are of MODEL itself")
    from ..adapters.export import RECORD, export_for_original, export_lora, export_merged, export_residual
    from ..adapters.lora import WEIGHTS, read_marks, with_labels_of
    from ..models.loading import load_model, load_tokenizer
    from ..report.verdicts import another_function

    read_marks(options.adapter)
    source = with_labels_of(source, options.adapter)
    recipe = {"model": asdict(source), "as": options.form, "r": options.r, "uniform": options.uniform}
    original = None if options.original is None else replace(source, model=options.original, revision=None)
    recipe |= {"original": original.model} if original else {}
    recipe |= {name: sha256_of(options.adapter / name) for name in ("adapter_config.json", WEIGHTS)}
    if is_made(options.output / RECORD, recipe):
        out.print(f"{options.output} is whole already: the same command made it")
        push(options, hub_repo(options))
        return {"output": str(options.output), "form": options.form}
    check_output(options.output)
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
    else:
        export_residual(model, options.adapter, options.output, load_tokenizer(source), recipe)
    out.print(f"written to {options.output}")
    push(options, repo)
    return result
