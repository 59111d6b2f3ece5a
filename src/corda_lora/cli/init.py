"""`corda init`: an adapter's start."""

import shlex
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from ..config import CordaConfig, CordaError, DataConfig, ModelConfig
from ..config.data import CONTEXT_SAMPLES
from ..config.values import Count
from ..files import is_made, read_json, remove_work
from .shared import AddVerb, add_push, follows, hub_repo, out, push, take


def add_init(verb: AddVerb) -> None:
    parser = verb(
        "init",
        init,
        "cut an adapter's start out of a model",
        ModelConfig,
        CordaConfig,
        DataConfig,
        skip={"data"},
        result=True,
    )
    parser.set_defaults({"samples": CONTEXT_SAMPLES})
    parser.add_argument(
        "--context", type=str | None, help="DATA that shows the ability to keep (kpm) or to learn (ipm)"
    )
    parser.add_argument("--original", type=str | None, help="the full weights of a MODEL that is in 4 bits already")
    parser.add_argument("--batch_tokens", type=Count, default=4096, help="tokens of the context a forward")
    parser.add_argument(
        "--park",
        type=Literal["auto", "device", "cpu", "disk"],
        default="auto",
        help="where hidden states of samples wait for the next block: auto is the first of the others with room",
    )
    parser.add_argument("--keep_work", action="store_true", help="keep OUTPUT.work, the decomposed layers, when done")
    parser.add_argument("--output", type=Path, required=True, help="the adapter directory to write")
    add_push(parser)


def init(options: Namespace) -> dict[str, Any]:
    """Collect the covariances of a context, cut the adapter's start out of the model's weights, and write it as an
    adapter directory that plain PEFT loads, with `corda.json` (what was run) and `spectra.safetensors`. The weights are
    read from the checkpoint block by block: the whole model is never in memory. A run that was broken off goes on
    after its last finished block when the same command is given again."""
    config, source = take(CordaConfig, options), take(ModelConfig, options)
    data = None if options.context is None else take(DataConfig, options, data=options.context)
    if data is None and config.reads_context:
        raise CordaError("give a --context: samples of the ability to keep (kpm) or to learn (ipm)")
    if data and data.label:
        from ..data.labels import with_labels

        source = with_labels(source, data)
    original = None if options.original is None else replace(source, model=options.original, revision=None)
    recipe = _recipe(options, config, source, data)
    is_there = is_made(options.output / "corda.json", recipe) and not (options.output / "training.json").is_file()
    if options.processes:
        options.processes.check_same({"output": is_there})
    if is_there and follows(options):
        return {}
    if is_there:
        if not options.keep_work:
            remove_work(options.output, recipe)
        out.print(f"{options.output} is whole already: the same command made it")
        push(options, hub_repo(options))
        return _made(options.output, config)
    from ..adapters.prepare import prepare
    from ..report.terminal import start_cost, start_table

    repo = hub_repo(options)
    start = prepare(
        source,
        config,
        data,
        options.output,
        batch_tokens=options.batch_tokens,
        park=options.park,
        keep_work=options.keep_work,
        original=original,
        processes=options.processes,
    )
    if follows(options):
        return {}
    made = _made(options.output, config)
    out.print(start_table(start))
    for sentence in made["verdicts"]:
        out.print(sentence, highlight=False)
    ranks = {len(layer.A) for layer in start.layers.values()}
    if len(ranks) > 1:
        out.print(
            f"ranks differ by layer, up to {max(ranks) * (1 if config.from_zero else 2)} in the adapter: vLLM's "
            "--max-lora-rank must allow it, and llama.cpp needs `corda export --as lora --uniform`"
        )
    out.print(start_cost(start))
    out.print(f"written to {options.output}")
    push(options, repo)
    out.print(_next(options.output, config, source, data, made["learning_rate"]), highlight=False, soft_wrap=True)
    return made


def _recipe(options: Namespace, config: CordaConfig, source: ModelConfig, data: DataConfig | None) -> dict[str, Any]:
    """What makes the starts of two commands the same. The samples are read only if there is a start to compare with."""
    recipe: dict[str, Any] = {"model": source.model, "revision": source.revision, "dtype": source.dtype}
    recipe |= {"config": asdict(config), "batch_tokens": options.batch_tokens}
    recipe |= {} if options.original is None else {"original": options.original}
    recipe |= {"labels": source.labels} if source.labels else {}
    recipe |= {"data": asdict(data) if data and config.reads_context else None}
    if data and config.reads_context and (options.output / "corda.json").is_file():
        from ..data.samples import digest_of, load_rounds

        assert config.rounds is not None
        recipe |= {"samples_sha256": digest_of(chain(*load_rounds(data, config.rounds)))}
    return recipe


def _next(output: Path, config: CordaConfig, source: ModelConfig, data: DataConfig | None, rate: float) -> str:
    """The command that trains the start."""
    model = str(output / "base") if config.quantization else source.model
    following = shlex.join(["corda", "train", "--model", model, "--start", str(output)])
    following += f" --data {'NEW.jsonl' if config.mode == 'kpm' else 'TASK.jsonl'}"
    following += f" --label {data.label} --output tuned/" if data and data.label else " --output tuned/"
    return f"next: {following}  (its learning rate: {rate:g})"


def _made(output: Path, config: CordaConfig) -> dict[str, Any]:
    """What is known of an adapter's start on disk: corda.json, what its figures mean, and the rate to train it with."""
    from ..report.verdicts import start_verdicts
    from ..training.rates import rate_of

    record = read_json(output / "corda.json")
    rate = rate_of("residual" if config.has_residual else str(config.split), config.mode)
    return {"output": str(output), **record, "verdicts": start_verdicts(record), "learning_rate": rate}
