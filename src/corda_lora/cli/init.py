"""`corda init`: an adapter's start."""

import shlex
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from ..config import ContextConfig, CordaConfig, CordaError, DataConfig, ModelConfig
from ..config.data import CONTEXT_SAMPLES, named_contexts
from ..config.init import check_together
from ..config.values import Count
from ..data.rows import check_file
from ..data.samples import digest_of, load_rounds
from ..files import ADAPTER_CONFIG, check_output, is_made, read_json, remove_work
from ..processes import launched
from .shared import AddVerb, add_push, begin_imports, follows, hub_repo, out, push, take


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
        "--context",
        type=str | ContextConfig | list[str | ContextConfig] | None,
        help="DATA that shows the ability to keep (kpm) or to learn (ipm). Give --context several times for several "
        "abilities; options of one follow it: --context.weight 2, --context.ability NAME, --context.prompt TEMPLATE",
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
    datas = contexts_of(options)
    if not datas and config.reads_context:
        raise CordaError("give a --context: samples of the ability to keep (kpm) or to learn (ipm)")
    labelled = next((data for data in datas if data.label), None)
    datas = datas if config.reads_context else []
    check_together(config, len(datas))
    for each in datas:
        check_file(each)
    if labelled:
        from ..data.labels import with_labels

        source = with_labels(source, labelled)
    data: Any = datas if len(datas) > 1 else datas[0] if datas else None
    original = None if options.original is None else replace(source, model=options.original, revision=None)
    recipe = _recipe(options, config, source, datas)
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
    check_output(options.output, "corda.json", recipe)
    assert config.rounds is not None
    # What is wrong with the samples is said before the long imports.
    shown = [load_rounds(each, config.rounds) for each in datas]
    begin_imports(options)
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
        shown=shown,
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
    out.print(_next(options.output, config, source, labelled, made["learning_rate"]), highlight=False, soft_wrap=True)
    return made


def _recipe(options: Namespace, config: CordaConfig, source: ModelConfig, datas: list[DataConfig]) -> dict[str, Any]:
    """What makes the starts of two commands the same. The samples are read only if there is a start to compare with."""
    recipe: dict[str, Any] = {"model": source.model, "revision": source.revision, "dtype": source.dtype}
    recipe |= {"config": asdict(config), "batch_tokens": options.batch_tokens}
    recipe |= {"original": options.original, "labels": source.labels}
    recipe |= {"data": asdict(datas[0]) if len(datas) == 1 else None}
    recipe |= {"contexts": [asdict(each) for each in datas]} if len(datas) > 1 else {}
    if datas and (options.output / "corda.json").is_file():
        assert config.rounds is not None
        shown = [load_rounds(each, config.rounds) for each in datas]
        recipe |= {"samples_sha256": digest_of(chain(*chain(*shown)))}
    return recipe


def _next(output: Path, config: CordaConfig, source: ModelConfig, labelled: DataConfig | None, rate: float) -> str:
    """The command that trains the start, by as many processes as have made it; or who does, if not `train`."""
    task, start = read_json(output / ADAPTER_CONFIG)["task_type"], launched()
    if task not in ("CAUSAL_LM", "SEQ_CLS"):
        return (
            "next: a trainer of your own (docs/trainers.md): corda train takes causal language models, and "
            "classifiers whose context has a --label"
        )
    model = str(output / "base") if config.quantization else source.model
    words = [*start, "train", "--model", model, *_as_loaded(source, config), "--start", str(output)]
    words += ["--data", "NEW.jsonl" if config.mode == "kpm" else "TASK.jsonl"]
    if task == "SEQ_CLS":
        words += ["--label", labelled.label if labelled else "COLUMN"]
    options = "" if start == ["corda"] else f"; {start[0]}'s other options as for this command"
    return f"next: {shlex.join(words)} --output tuned/  (its learning rate: {rate:g}{options})"


def _as_loaded(source: ModelConfig, config: CordaConfig) -> list[str]:
    """The options with which the model was loaded, without which it may be another, or none. (A quantized base has its
    own dtype and no revision.)"""
    given = {} if config.quantization else {"revision": source.revision, "dtype": source.dtype}
    given |= {"trust_remote_code": "true" if source.trust_remote_code else None}
    options = [(f"--{name}", value) for name, value in given.items() if value not in (None, "auto")]
    return [word for option in options for word in option]


def contexts_of(options: Namespace) -> list[DataConfig]:
    """The contexts, however they were given. What one does not set itself is as the options of data say.

    Raises CordaError as `named_contexts` does.
    """
    shared = {f.name: options[f.name] for f in fields(DataConfig) if f.name != "data"}
    given = options.context if isinstance(options.context, list) else [options.context]
    if given == [None]:
        return []
    contexts = [ContextConfig(each, **shared) if isinstance(each, str) else _completed(each, shared) for each in given]
    return list(named_contexts(contexts))


def _completed(context: ContextConfig, shared: dict[str, Any]) -> ContextConfig:
    """A context with the shared options in place of those that it leaves at their defaults."""
    defaults = {f.name: f.default for f in fields(DataConfig)}
    return replace(context, **{k: v for k, v in shared.items() if getattr(context, k) == defaults[k]})


def _made(output: Path, config: CordaConfig) -> dict[str, Any]:
    """What is known of an adapter's start on disk: corda.json, what its figures mean, and the rate to train it with."""
    from ..report.verdicts import start_verdicts
    from ..training.rates import rate_of

    record = read_json(output / "corda.json")
    rate = rate_of("residual" if config.has_residual else str(config.split), config.mode)
    return {"output": str(output), **record, "verdicts": start_verdicts(record), "learning_rate": rate}
