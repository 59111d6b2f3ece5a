"""Every stage as a command: `corda VERB`."""

# Options come from config.py's dataclasses. Heavy imports wait for the verb, so that --help is quick.

import argparse
import inspect
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_loader
from rich.console import Console
from rich.text import Text
from yaml import YAMLError

from .config import (
    CompareConfig,
    CordaConfig,
    CordaError,
    DataConfig,
    EvalConfig,
    InspectConfig,
    KeepConfig,
    LoraStart,
    MethodConfig,
    ModelConfig,
    TrainConfig,
)
from .config.data import CONTEXT_SAMPLES
from .config.lora import NOT_OURS, why_not
from .config.values import LARGEST, Count, CountOrZero, Positive, Seed, Share, check_value, misfit, short
from .evaluation.measures import KINDS
from .evaluation.tasks.registry import TASKS, named_tasks
from .files import (
    check_name,
    check_output,
    check_result,
    is_made,
    output_lock,
    read_json,
    remove_work,
    scratch_folder,
    sha256_of,
    whole_folder,
    write_json,
)
from .progress import console
from .recipes import load_recipe

T = TypeVar("T")
out = Console(markup=False, emoji=False)
LONGEST_MESSAGE = 480  # characters
PLAN_RECIPE = "plan_recipe"  # `corda plan RECIPE` has the options of a comparison
WITH_RESULT = ("init", "train", "eval", "export")  # verbs that return one, for --quiet and --json

SUMMARY = "Fine-tune language models without making them forget: CorDA for Hugging Face models."
EXAMPLES = """\
four commands for a model of your own:
  corda init  --model MODEL --context known.jsonl --mode kpm --r 32 --output start/
  corda train --model MODEL --start start/ --data new.jsonl --output tuned/
  corda eval  --model MODEL --adapter tuned/ --keep known_test.jsonl --learn new_test.jsonl
  corda export --model MODEL --adapter tuned/ --as merged --output merged/

DATA is a hub name or a .json, .jsonl, .csv, .tsv, .parquet or .txt file with the columns prompt and response, or text,
or any others with --prompt and --response templates such as "Question: {question}\\nAnswer:".
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits with 0, or with 2 and one sentence if there is something for the user to mend."""
    # One block after another of other sizes: without this the accelerator's memory is cut into pieces nobody can use.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of much that is in order here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns where there are no kernels to download
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log has no use for them
    arguments = [_underscored(a) for a in (sys.argv[1:] if argv is None else argv)]
    if arguments[:1] in (["eval"], ["train"], ["inspect"]):
        kinds = {"eval": KINDS, "train": ["context"], "inspect": ["context", "text"]}[arguments[0]]
        try:
            arguments = _with_data(arguments, kinds)
        except CordaError as error:
            _say(arguments[0], str(error))
            raise SystemExit(2) from error
    if arguments[:1] == ["compare"] and arguments[1:2] and not arguments[1].startswith("-"):
        arguments.insert(1, "--config")
    if arguments[:1] == ["plan"] and arguments[1:2] and not arguments[1].startswith("-"):
        arguments[:1] = [PLAN_RECIPE, "--config"]
    parser, verbs = build_parser()
    try:
        options = parser.parse_args(arguments)
    except UnicodeDecodeError as error:
        parser.error(f"the recipe is not UTF-8: it has the byte 0x{error.object[error.start]:02x}")
    if options.verb is None:
        parser.print_help()
        raise SystemExit(2)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_: console.print(
        Text.assemble(("note:", "yellow"), f" {message}"), highlight=False
    )
    try:
        with _sigterm_as_interrupt():
            options = _instantiate(parser, options)
            options[options.verb].command = list(sys.argv[1:] if argv is None else argv)
            verbs[options.verb](options[options.verb])
    except KeyboardInterrupt as interrupt:
        resumes = options.verb in ("init", "train", "compare")
        _say(options.verb, "stopped" + "; finished work is kept, and the same command goes on from it" * resumes)
        raise SystemExit(143 if isinstance(interrupt, _Terminated) else 130) from None
    except Exception as error:
        if sentence := _mendable(error):
            _say(options.verb, sentence)
            raise SystemExit(2) from error
        traceback.print_exc()
        _say(options.verb, "this is a bug of corda-lora: please report it with the lines above")
        raise SystemExit(1) from error


def _instantiate(parser: ArgumentParser, options: Namespace) -> Namespace:
    """The options with their dataclasses made. Raises CordaError as the dataclasses do."""
    try:
        return parser.instantiate(options)
    except CordaError:
        raise
    except TypeError as error:
        if "must be a mapping" not in str(error):
            raise
        raise CordaError(
            "a section of the recipe, such as train or eval, is no mapping of options to values"
        ) from error
    except ValueError as error:  # jsonargparse lists why each alternative of a union failed; a dataclass's own is ours
        reasons = re.findall(r"^\s*- (?!Expected a |Does not validate)(.*)", str(error), re.MULTILINE)
        raise CordaError(reasons[0] if reasons else _sentence(str(error))) from error


def _say(verb: str, message: str) -> None:
    """Print one sentence on stderr: one line, its middle left out if it is longer than three lines of a terminal."""
    print(f"corda {'plan' if verb == PLAN_RECIPE else verb}: {_shortened(message)}", file=sys.stderr)


def _shortened(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:300]} … {message[-150:]}"


def _mendable(error: Exception) -> str | None:
    """The sentence for an error that the user can mend; None for a bug."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, CordaError):
        return str(error)
    # "No space left" is in the messages of Python and safetensors, "inline_container.cc" in that of `torch.save`.
    if any(sign in str(error) for sign in ("No space left", "inline_container.cc")):
        return f"the disk is full or cannot be written ({text})"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
        return f"out of memory ({text})"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("corda_lora"):
        return f"the package {error.name} is needed: pip install {error.name}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {short(error.filename)}" if error.filename else error.strerror
    return text if isinstance(error, OSError) else None


class _Terminated(KeyboardInterrupt):
    """SIGTERM. It ends a run as Ctrl-C does."""


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Inside this context the first SIGTERM raises `_Terminated`; later ones do not disturb the cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _spoken(options: Namespace) -> Iterator[None]:
    """Inside this context, --json keeps the standard output free, and --quiet silences everything but errors."""
    quiet = bool(options.get("quiet"))
    out.quiet, console.quiet = quiet or bool(options.get("json")), quiet
    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        yield
    finally:
        out.quiet = console.quiet = False


class _Parser(ArgumentParser):
    """Says what is wrong with a command in a sentence, and not below thirty lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        if missing := re.fullmatch(r"the following arguments are required: (\w+)\..*", message):
            prog = f"{prog} {missing[1]}"
        sentence = _shortened(_sentence(message, parser._actions))
        self.exit(2, f"{prog}: {sentence} (all options: {prog} --help)\n")


def _sentence(message: str, actions: Sequence[argparse.Action] = ()) -> str:
    """What jsonargparse says of an error, in our words for types, and without what it tried before.

    Args:
        actions: the options of the command.
    """
    unknown = re.search(r"(?:unrecognized arguments|ambiguous option): --(\w+)|does not accept option '(\w+)'", message)
    option = (unknown[1] or unknown[2]) if unknown else ""
    if option in NOT_OURS:
        return why_not(option)
    key, _, reason = message.rpartition('Parser key "')[2].partition('":')
    typed = [action for action in actions if hasattr(action, "_typehint")]
    hints = {action.dest: action._typehint for action in typed}
    names = {action.dest: action.option_strings[0].lstrip("-") for action in typed}
    if option in get_type_hints(DataConfig) and (kind := next((k for k in ("learn", "context") if k in hints), "")):
        return f"--{option} is an option of data: after --{kind} DATA give --{kind}.{option}"
    inner = get_type_hints(MethodConfig, include_extras=True) | get_type_hints(DataConfig, include_extras=True)
    values = re.findall(r"(?:Got|Given) value: (.*)", reason)
    if innermost := re.search(r"Option '.*' is not accepted", reason):
        message = f"{key}: {innermost[0]}"
    elif needed := re.search("the following arguments are required: (.*)", reason):
        message = f"{key}: {needed[1]} is needed"
    elif values and key in hints | inner:  # of a value inside of others, the innermost comes first
        message = misfit(names.get(key, key), values[-1 if key in hints else 0], (inner | hints)[key])
    elif reason:
        message = f"{key}: {reason}"
    elif message.startswith("Unexpected config"):
        message = "the recipe is no mapping of options to values, such as `mode: kpm`"
    elif missing := re.fullmatch("the following arguments are required: (.*)", message):
        message = f"give {', '.join(f'--{name.rpartition(chr(46))[2]}' for name in missing[1].split(', '))}"
    return " ".join(re.sub(r"<class '(\w+)'>|typing\.", r"\1", message).split())


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of descriptions as they are, and shows a range as "int, at least 1"."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(
            rf"Annotated\[([^\[\]]*?)( and at most (?:{LARGEST:,}|1e\+30))?\]", r"\1", super()._expand_help(action)
        )
        return re.sub(r"Optional\[((?:int|float),[^\[\]]*)\]", r"\1, or null", text)


def build_parser() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], None]]]:
    """The parser and the function of each verb."""
    set_loader("yaml", load_recipe, exceptions=(YAMLError,))
    parser = _Parser(prog="corda", description=SUMMARY, epilog=EXAMPLES, formatter_class=_Help)
    parser._optionals.title = "options"
    subcommands = parser.add_subcommands(required=False, dest="verb", metavar="VERB")
    verbs: dict[str, Callable[[Namespace], None]] = {}

    def verb(
        name: str, run: Callable[[Namespace], Any], summary: str, *configs: type, skip: set[str] | None = None
    ) -> Any:
        sub = _Parser(description=inspect.getdoc(run), formatter_class=_Help)
        sub.add_argument("--config", action=ActionConfigFile, help="YAML recipe; flags after it win over it")
        for config in configs:
            names = {f.name for f in fields(config)}
            sub.add_class_arguments(config, skip=names & (skip or set()))
        if name in WITH_RESULT:
            sub.add_argument("--quiet", action="store_true", help="print nothing but errors and the output's path")
            sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        subcommands.add_subcommand(name, sub, help=summary)

        def checked(options: Namespace) -> None:
            for action in (a for a in sub._actions if a.dest in options):
                check_value(action.dest, options[action.dest], getattr(action, "_typehint", Any))
            output = options.get("output")
            if name == "eval" and output is not None and (output.suffix == ".json" or output.is_file()):
                check_result(output)
            elif name == "eval" and output is not None:
                check_output(output)
            elif output is not None and name != "compare":  # a comparison's folder may be a link to another disk
                check_name(output)
            reports = name == "compare" and options.jobs == 0  # also of a comparison that goes on
            with nullcontext() if output is None or reports else output_lock(output), _spoken(options):
                result = run(options)
            if options.get("json"):
                print(json.dumps(result, indent=1))
            elif options.get("quiet") and output is not None:
                print(output)

        verbs[name] = checked
        return sub

    sub = verb("demo", demo, "learn without forgetting, on a small real model, in minutes")
    sub.add_argument("--output", type=Path, default=Path("demo"), help="where the table and the picture go")

    sub = verb(
        "init", init, "cut an adapter's start out of a model", ModelConfig, CordaConfig, DataConfig, skip={"data"}
    )
    sub.set_defaults({"samples": CONTEXT_SAMPLES})
    sub.add_argument("--context", type=str | None, help="DATA that shows the ability to keep (kpm) or to learn (ipm)")
    sub.add_argument("--original", type=str | None, help="the full weights of a MODEL that is in 4 bits already")
    sub.add_argument("--batch_tokens", type=Count, default=4096, help="tokens of the context a forward")
    sub.add_argument(
        "--park",
        type=Literal["auto", "device", "cpu", "disk"],
        default="auto",
        help="where hidden states of samples wait for the next block: auto is the first of the others with room",
    )
    sub.add_argument("--keep_work", action="store_true", help="keep OUTPUT.work, the decomposed layers, when done")
    sub.add_argument("--output", type=Path, required=True, help="the adapter directory to write")
    _add_push(sub)

    sub = verb(
        "plan",
        plan,
        "what init, or a comparison's RECIPE, will take",
        ModelConfig,
        CordaConfig,
        DataConfig,
        skip={"data"},
    )
    sub.set_defaults({"samples": CONTEXT_SAMPLES})
    sub.add_argument("--context", type=str | None, help="DATA to count tokens of; else all samples have max_length")
    sub.add_argument("--batch_tokens", type=Count, default=4096, help="tokens of the context a forward")
    sub.add_argument("--park", type=Literal["auto", "device", "cpu", "disk"], default="auto", help="as of init")
    _add_machine(sub)
    sub = verb(PLAN_RECIPE, plan_recipe, "", ModelConfig, CompareConfig)
    subcommands._choices_actions.pop()  # it is not listed
    sub.prog = sub.prog.replace(PLAN_RECIPE, "plan RECIPE")
    _add_machine(sub)

    sub = verb(
        "train",
        train,
        "train an adapter",
        *(ModelConfig, LoraStart, TrainConfig, KeepConfig, DataConfig),
        skip={"data", "seed"},
    )
    sub.add_argument("--data", type=str, required=True, help="DATA to learn")
    sub.add_argument("--start", type=Path | None, help="directory from `corda init`; without it, a plain LoRA")
    sub.add_argument("--eval_data", type=str | None, help="DATA whose loss is measured at each checkpoint")
    sub.add_argument("--eval_rows", type=str, default="train", help="as --rows, of --eval_data")
    sub.add_argument("--eval_share", type=Share, default=0.0, help="hold out this share of --data, to measure it")
    sub.add_argument("--seed", type=Seed, default=0, help="the seed of the draw of samples, their order and dropout")
    sub.add_argument("--output", type=Path, required=True, help="the adapter directory to write")
    _add_push(sub)

    sub = verb("eval", evaluate, "measure what was learned and what was kept", ModelConfig, EvalConfig, skip={"model"})
    sub.add_argument("--model", type=str | None, help="a name on the hub, a directory, or a .gguf file")
    known = ", ".join(f"{task.name} ({task.meaning})" for task in TASKS.values())
    next(action for action in sub._actions if action.dest == "tasks").help += f" There are {known}."
    sub.add_argument("--adapter", type=Path | None, help="adapter directory; without it, the base model alone")
    sub.add_argument(
        "--original", type=str | None, help="the full model, to measure a quantized MODEL and its adapter against"
    )
    sub.add_argument("--before", type=str | None, help="the model as it was: what --after gained and lost is said")
    sub.add_argument("--after", type=str | None, help="the model as it is now, or the directory of an adapter on it")
    sub.add_argument(
        "--output",
        type=Path | None,
        help="NAME.json, for the numbers; any other name is a directory, for the numbers, the answers to benchmarks "
        "and the page of before and after",
    )

    sub = verb(
        "compare", compare, "which method learns how much at what cost in forgetting", ModelConfig, CompareConfig
    )
    sub.add_argument("--output", type=Path, required=True, help="directory of the runs and the report")
    sub.add_argument("--jobs", type=CountOrZero, default=1, help="runs at a time, on each GPU; 0: only report")
    sub.add_argument("--gpus", type=str, default="", help="numbers of the GPUs to use, such as 0,1; else all")

    sub = verb(
        "inspect",
        look,
        "see which channels contexts light up in a model, and what an adapter changed",
        ModelConfig,
        InspectConfig,
        skip={"model"},
    )
    sub.add_argument("--model", type=str | None, help="a name on the hub, a directory, or a .gguf file")
    sub.add_argument("--adapter", type=Path | None, help="directory of any LoRA: what it changed")
    sub.add_argument("--output", type=Path, required=True, help="directory of the page, the figures and the numbers")

    sub = verb("export", export, "turn a tuned adapter into a plain LoRA, a merged or a residual model", ModelConfig)
    sub.add_argument("--adapter", type=Path, required=True, help="directory from `corda train`")
    sub.add_argument(
        "--as", dest="form", type=Literal["lora", "merged", "residual"], default="lora", help="what to write"
    )
    sub.add_argument("--r", type=Count | None, help="compress the LoRA to this rank; the error is printed")
    sub.add_argument(
        "--original", type=str | None, help="write the LoRA for the full model that a quantized MODEL was made from"
    )
    sub.add_argument(
        "--uniform", action="store_true", help="pad the LoRA's layers to one rank with zeros, for llama.cpp"
    )
    sub.add_argument("--output", type=Path, required=True, help="directory to write")
    _add_push(sub)
    return parser, verbs


def _add_machine(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", type=str | None, help="plan for a card with this memory, such as 24GB; else this machine"
    )
    parser.add_argument("--tflops", type=Positive | None, help="of the card, dense in half precision; else an H100's")
    parser.add_argument("--tflops64", type=Positive | None, help="of the card, in double precision; else an H100's")


def _add_push(parser: ArgumentParser) -> None:
    parser.add_argument("--push", type=str, default="", help="repository on the hub to send the output to, with a card")
    parser.add_argument(
        "--hub_private_repo", type=bool | None, help="whether a new repository is private; else the hub's"
    )


def init(options: Namespace) -> dict[str, Any]:
    """Collect the covariances of a context, cut the adapter's start out of the model's weights, and write it as an
    adapter directory that plain PEFT loads, with `corda.json` (what was run) and `spectra.safetensors`. The weights are
    read from the checkpoint block by block: the whole model is never in memory. A run that was broken off goes on
    after its last finished block when the same command is given again."""
    config, source = _take(CordaConfig, options), _take(ModelConfig, options)
    data = None if options.context is None else _take(DataConfig, options, data=options.context)
    if data is None and config.reads_context:
        raise CordaError("give a --context: samples of the ability to keep (kpm) or to learn (ipm)")
    if data and data.label:
        from .data.labels import with_labels

        source = with_labels(source, data)
    recipe: dict[str, Any] = {"model": source.model, "revision": source.revision, "dtype": source.dtype}
    recipe["config"] = asdict(config)
    original = None if options.original is None else replace(source, model=options.original, revision=None)
    recipe |= {"batch_tokens": options.batch_tokens} | ({"original": original.model} if original else {})
    recipe |= {"labels": source.labels} if source.labels else {}
    recipe |= {"data": asdict(data) if data and config.reads_context else None}
    if data and config.reads_context and (options.output / "corda.json").is_file():
        from .data.samples import digest_of, load_rounds

        assert config.rounds is not None
        recipe |= {"samples_sha256": digest_of(chain(*load_rounds(data, config.rounds)))}
    if is_made(options.output / "corda.json", recipe) and not (options.output / "training.json").is_file():
        if not options.keep_work:
            remove_work(options.output, recipe)
        out.print(f"{options.output} is whole already: the same command made it")
        _push(options, _repo(options))
        return _start_made(options.output, config)
    from .adapters.prepare import prepare
    from .report.terminal import start_cost, start_table

    repo = _repo(options)
    start = prepare(
        source,
        config,
        data,
        options.output,
        batch_tokens=options.batch_tokens,
        park=options.park,
        keep_work=options.keep_work,
        original=original,
    )
    made = _start_made(options.output, config)
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
    _push(options, repo)
    model = str(options.output / "base") if config.quantization else source.model
    following = shlex.join(["corda", "train", "--model", model, "--start", str(options.output)])
    following += f" --data {'NEW.jsonl' if config.mode == 'kpm' else 'TASK.jsonl'}"
    following += f" --label {data.label} --output tuned/" if data and data.label else " --output tuned/"
    rate = f"(its learning rate: {made['learning_rate']:g})"
    out.print(f"next: {following}  {rate}", highlight=False, soft_wrap=True)
    return made


def _start_made(output: Path, config: CordaConfig) -> dict[str, Any]:
    """What is known of an adapter's start on disk: corda.json, what its figures mean, and the rate to train it with."""
    from .report.verdicts import start_verdicts
    from .training.rates import rate_of

    record = read_json(output / "corda.json")
    rate = rate_of("residual" if config.has_residual else str(config.split), config.mode)
    return {"output": str(output), **record, "verdicts": start_verdicts(record), "learning_rate": rate}


def plan(options: Namespace) -> None:
    """Say what `corda init` with the same options will take: memory and time of each stage, disk, and which options
    make it fit where it does not. From config.json alone: the weights are not needed."""
    config, source = _take(CordaConfig, options), _take(ModelConfig, options)
    data = _take(DataConfig, options, data=options.context or "")
    _check_card(options)
    from .preprocess.plan import init_plan, planned_model, planned_tokens, what_fits
    from .report.terminal import plan_lines

    model: Any = planned_model(source)
    machine = _machine(options, model, config.device)

    def count(rounds: int, batch_tokens: int) -> Any:
        return planned_tokens(source, data, rounds, batch_tokens, model.config.is_encoder_decoder)

    planned = init_plan(model, config, count(config.rounds or 1, options.batch_tokens), options.park, machine)
    for line in plan_lines(planned):
        out.print(line, highlight=False)
    if config.reads_context and not data.data:
        out.print(
            f"assumed, as no --context is given: {data.samples or 1} samples of {data.max_length} tokens (--samples, "
            "--max_length); shorter ones take less",
            highlight=False,
        )
    if not planned.fits:
        fitting = what_fits(model, config, count, options.batch_tokens, options.park, machine)
        advice = (
            f"; fits with {fitting[0]}" if fitting else ", nor with smaller batches, fewer rounds or another --park"
        )
        out.print(f"does not fit{advice}", highlight=False)


def plan_recipe(options: Namespace) -> None:
    """`corda plan RECIPE`: say what `corda compare` with the same recipe will take: memory and disk of each entry's
    start, memory of its training, and the time of what can be counted. From config.json alone: neither the weights nor
    data on the hub are needed. If the hub cannot be reached, --model may name a folder with the model's config.json."""
    source, config = _take(ModelConfig, options), _take(CompareConfig, options)
    named_tasks(replace(config.eval, data_dir=None))  # a plan needs no data
    _check_card(options)
    from .compare.plan import plan_comparison
    from .preprocess.plan import planned_model
    from .report.terminal import comparison_plan_lines

    try:
        model: Any = planned_model(source)
    except CordaError as error:
        sentence = str(error).rstrip(".")
        raise CordaError(f"{sentence}; to plan, a --model FOLDER with the model's config.json is enough") from error
    for line in comparison_plan_lines(plan_comparison(model, source, config, _machine(options, model, None))):
        out.print(line, highlight=False)


def _check_card(options: Namespace) -> None:
    """Raises CordaError if the options describe a card without its memory."""
    if options.gpu is None and (options.tflops or options.tflops64):
        raise CordaError("--tflops and --tflops64 are of a card: give its memory with --gpu")


def _machine(options: Namespace, model: Any, device: str | None) -> Any:
    """The machine to plan for: the card that the options describe, or this machine.

    Raises CordaError if their memory is no size."""
    from .devices import compute_device
    from .preprocess.machine import described_machine, this_machine

    if options.gpu is not None:
        return described_machine(options.gpu, options.tflops, options.tflops64)
    return this_machine(compute_device(model, device), next(model.parameters()).dtype)


def train(options: Namespace) -> dict[str, Any]:
    """Train an adapter through TRL, from the start that `corda init` wrote or from a plain LoRA. The loss covers only
    the responses. With --label the model is a classifier, whose head is trained, too. If a run is interrupted, the same
    command resumes it from its last checkpoint."""
    source, config, lora = _take(ModelConfig, options), _take(TrainConfig, options), _take(LoraStart, options)
    keep, data = _take(KeepConfig, options), _take(DataConfig, options, data=options.data)
    own = [f.name for f in fields(lora) if getattr(lora, f.name) != getattr(LoraStart(), f.name)]
    if options.start and own:
        raise CordaError(f"--{own[0]} is of a plain LoRA: leave it out, as the adapter in --start has its own")
    held_out: DataConfig | float = options.eval_share
    if options.eval_data is not None:
        if options.eval_share:
            raise CordaError("--eval_share holds out samples of --data: leave it or --eval_data out")
        held_out = replace(data, data=options.eval_data, rows=options.eval_rows, samples=None)
    from .report.verdicts import kept
    from .training.train import DivergedError
    from .tune import check_tuning, is_tuned, read_tuning, tune

    tuning = read_tuning(source, data, config, options.start or lora, held_out, keep)
    if is_tuned(tuning, options.output):
        out.print(f"{options.output} is whole already: the same command made it")
        _push(options, _repo(options))
        return {"output": str(options.output), **read_json(options.output / "training.json")}
    check_tuning(tuning, options.output)
    repo = _repo(options)
    try:
        result = tune(tuning, options.output)
    except DivergedError as error:
        print(f"corda train: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    out.print(f"loss {result['train_loss']:.4f} over {result['steps']} steps, {result['seconds']:.0f} s")
    for step, loss in result["held_out_loss"]:
        if step == result["kept_step"]:
            out.print(f"held-out loss {loss:.4f} at step {step}, whose adapter is kept")
    if "drift" in result:
        drift = result["drift"][-1][2] or 0.0
        asked = f" ({keep.max_drift:g} was asked for)" if keep.max_drift else ""
        out.print(f"drift {drift:.3g} nats per answer token of the context{asked}: {kept(drift)}", highlight=False)
    out.print(f"written to {options.output}")
    _push(options, repo)
    return {"output": str(options.output), **read_json(options.output / "training.json")}


def evaluate(options: Namespace) -> dict[str, Any]:
    """Measure the base model and the tuned one in one run: loss, drift (mean KL(base‖tuned) per answer token),
    perplexity, multiple-choice accuracy, exact match, benchmarks. Results are printed, and written to --output if it is
    given. With --before and --after it also says what was gained and lost, with intervals."""
    _name_models(options)
    source, config = _take(ModelConfig, options), _take(EvalConfig, options)
    from .adapters.lora import check_base, load_adapter, read_marks, with_labels_of
    from .devices import accelerator
    from .evaluation.before_after import changes
    from .evaluation.evaluate import evaluate as measure
    from .evaluation.evaluate import evaluate_beside
    from .evaluation.tasks.registry import checked_tasks
    from .models.loading import check_original, load_model, load_tokenizer
    from .models.targets import has_new_head
    from .report.before_after import changes_table, gained_and_lost, write_evaluation
    from .report.terminal import results_table
    from .report.verdicts import verdicts

    marks = read_marks(options.adapter) if options.adapter is not None else None
    original = (marks or {}).get("original") if options.original is None else {"model": options.original}
    if original is None and marks and marks["split"] == "residual":
        raise CordaError(
            "without its adapter the quantized residual is no model to compare with: give --original, the full model"
        )
    checked_tasks(config)
    if options.adapter is not None:
        source = with_labels_of(source, options.adapter)
    tokenizer = load_tokenizer(source)

    def load_tuned() -> Any:
        model = load_model(source).to(accelerator())
        if has_new_head(model) and options.before and options.adapter is not None:
            raise CordaError(
                f"{source.model} has no head for these labels, so there is no before to compare with: measure the "
                "adapter alone, with --model and --adapter"
            )
        if has_new_head(model) and options.adapter is None:
            raise CordaError(f"{source.model} has no head for these labels: give --model and --adapter, a trained one")
        return model if options.adapter is None else load_adapter(model, options.adapter).eval()

    scores: dict[tuple[str, str], dict[str, Any]] | None = {} if options.before or config.tasks else None
    if original is None:
        results = measure(load_tuned(), tokenizer, config, scores=scores)
    else:
        full = replace(source, **{"revision": None, **original})
        if options.adapter is not None:  # before the full model runs
            check_base(load_model(source), options.adapter)
        if not options.before:
            check_original(full)
            out.print(f"measured beside the full model, {full.model}", highlight=False)
        elif load_tokenizer(full).get_vocab() != tokenizer.get_vocab():
            raise CordaError(f"{options.after} has another vocabulary than {options.before}, so nothing is comparable")
        results = evaluate_beside(
            lambda: load_model(full).to(accelerator()), load_tuned, tokenizer, config, scores=scores
        )
    if (table := results_table(results)).row_count:  # none if all that was asked for waits for a judge
        out.print(table)
    sentences = verdicts(results)
    for sentence in sentences:
        out.print(sentence, highlight=False)
    if options.adapter is not None and (drift := _drift_in_training(options.adapter)):
        out.print(drift, highlight=False)
    measured: dict[str, Any] = {"model": source.model, "adapter": options.adapter and str(options.adapter)}
    measured["results"] = results
    if options.before:
        found = changes(scores or {})
        gained = gained_and_lost(found)
        out.print(changes_table(found))
        for sentence in gained:
            out.print(sentence, highlight=False)
        measured |= {"before": options.before, "after": options.after, "gained_and_lost": gained}
        measured["changes"] = [asdict(change) for change in found]
    if options.output is not None and options.output.suffix == ".json":
        write_json(options.output, measured)
    elif options.output is not None:
        with whole_folder(options.output) as folder:
            write_evaluation(folder, measured, scores or {}, shlex.join(["corda", *options.command]))
        out.print(f"written to {options.output}")
    return {**measured, "verdicts": sentences}


def _name_models(options: Namespace) -> None:
    """Set --model, --adapter and --original to what --before and --after name. Raises CordaError if models are missing,
    or named twice."""
    before, after = options.before, options.after
    if before is None and after is None:
        if options.model is None:
            raise CordaError("give --model, or --before and --after")
        return
    if before is None or after is None:
        raise CordaError("give both --before and --after: the model as it was, and as it is now")
    if options.model or options.adapter or options.original:
        raise CordaError("--before and --after name the models: leave --model, --adapter and --original out")
    from .adapters.lora import CONFIG, read_marks

    if not (Path(after) / CONFIG).is_file():
        options.model, options.original = after, before
        return
    options.model, options.adapter = before, Path(after)
    if original := (read_marks(options.adapter) or {}).get("original"):  # the adapter is on a quantized model
        if original["model"] != before:
            raise CordaError(f"the adapter in {after} is on weights in 4 bits: give --before {original['model']}")
        options.model = read_json(options.adapter / CONFIG)["base_model_name_or_path"]


def _drift_in_training(adapter: Path) -> str | None:
    """What the meter said at the end of the adapter's training, in a line; None if it was trained without."""
    path = adapter / "training.json"
    history = read_json(path).get("drift") if path.is_file() else None
    if not history:
        return None
    try:
        _, predicted, measured, price = map(float, history[-1])
    except (TypeError, ValueError, LookupError) as error:
        raise CordaError(f"{path} is damaged: its drift is no list of measurements") from error
    return (
        f"When it was trained: drift {measured:.3g} on samples of the context, {predicted:.3g} predicted from its "
        f"statistics, at a price of {price:.3g} nats a nat."
    )


def compare(options: Namespace) -> None:
    """`corda compare RECIPE --output DIR`: run methods × learning rates × seeds on one model and task, and write
    DIR/report.html: what each method learned, and what it cost of the abilities to keep. A comparison that was broken
    off goes on when the same command is given again; entries, rates and seeds may be added to it."""
    source, config = _take(ModelConfig, options), _take(CompareConfig, options)
    if options.jobs and "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        # Processes are forked from a server with the same imports (see `compare.preload`): it imports them meanwhile.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        multiprocessing.get_context("forkserver").set_forkserver_preload(["corda_lora.compare.preload"])
        forkserver.ensure_running()
    from .compare.runner import compare as run_comparison
    from .report.report import write_report

    command = shlex.join(["corda", *options.command])
    if not options.jobs:  # a report of what is done: to run it again, it takes the rest
        command = re.sub(r" --jobs[ =]0\b", "", command)
    gpus = [gpu for gpu in options.gpus.split(",") if gpu]
    comparison = run_comparison(source, config, options.output, options.jobs, gpus, command)
    write_report(options.output, comparison)
    out.print(f"written to {options.output / 'report.html'}, and report.md, runs.csv, comparison.json beside it")
    runs = comparison["runs"]
    if all(run["status"] in ("failed", "does not fit") for run in runs):
        raise CordaError(f"no run could be done; of {runs[0]['method']}: {runs[0]['why']}")


def look(options: Namespace) -> None:
    """Show a model through the samples of one or several contexts: spectra of its layers, covariances of their inputs,
    which contexts light up the same channels, how compact each layer is, and, with --levels, what is lost when the
    smallest components are discarded. Or, with --adapter, show what any LoRA changed: by its file alone, with --model
    beside the weights, with --context by how far it moves the outputs. OUTPUT has a page (report.html), its figures as
    PNG and SVG, and the numbers as JSON and safetensors. Weights are read from the checkpoint block by block."""
    config = _take(InspectConfig, options)
    if options.adapter is None and not (options.model and config.contexts()):
        raise CordaError("give a --model and a --context: samples that show an ability; or an --adapter")
    if options.model is None and config.contexts():
        raise CordaError("the contexts are run through the adapter's base: give its --model")
    if options.adapter and (config.levels or config.layers):
        raise CordaError("levels and layers are of a model, and not of an adapter: leave them or --adapter out")
    source = _take(ModelConfig, options) if options.model else None
    check_output(options.output)
    from .inspection.adapter import inspect_adapter, read_adapter
    from .inspection.contexts import inspect_model
    from .models.loading import load_tokenizer, open_model
    from .report.inspected import (
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


def export(options: Namespace) -> dict[str, Any]:
    """Turn an adapter into (lora) a plain LoRA on the original model, exact or compressed to a rank; (merged) the whole
    model with it merged in; (residual) the residual model and the rank-r adapter for it."""
    source = _take(ModelConfig, options)
    if options.r is not None and options.form != "lora":
        raise CordaError("--r goes with --as lora only")
    if options.uniform and options.form != "lora":
        raise CordaError("--uniform goes with --as lora only: a merged model has no ranks")
    if options.original is not None and options.form != "lora":
        raise CordaError("--original goes with --as lora only: the others are of MODEL itself")
    from .adapters.export import RECORD, export_for_original, export_lora, export_merged, export_residual
    from .adapters.lora import WEIGHTS, read_marks, with_labels_of
    from .models.loading import load_model, load_tokenizer
    from .report.verdicts import another_function

    read_marks(options.adapter)
    source = with_labels_of(source, options.adapter)
    recipe = {"model": asdict(source), "as": options.form, "r": options.r, "uniform": options.uniform}
    original = None if options.original is None else replace(source, model=options.original, revision=None)
    recipe |= {"original": original.model} if original else {}
    recipe |= {name: sha256_of(options.adapter / name) for name in ("adapter_config.json", WEIGHTS)}
    if is_made(options.output / RECORD, recipe):
        out.print(f"{options.output} is whole already: the same command made it")
        _push(options, _repo(options))
        return {"output": str(options.output), "form": options.form}
    check_output(options.output)
    repo = _repo(options)
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
    _push(options, repo)
    return result


def demo(options: Namespace) -> None:
    """SmolLM2-135M keeps its factual knowledge and learns word problems: CorDA and plain LoRA side by side, from the
    same samples in the same order. Ends with a table and a picture, all computed in this run."""
    from .demo.run import run_demo

    run_demo(options.output)


def _repo(options: Namespace) -> str:
    """The repository on the hub that is made for the output before the work begins; "" without --push."""
    if not options.push:
        return ""
    from .adapters.hub import make_repo

    return make_repo(options.push, options.hub_private_repo)


def _push(options: Namespace, repo: str) -> None:
    """Send the output to the hub, if --push says so."""
    if repo:
        from .adapters.hub import push

        out.print(f"sent to {push(options.output, repo)}")


def _take(kind: type[T], options: Namespace, **set_here: Any) -> T:
    """The dataclass `kind` out of the parsed options."""
    values = {f.name: options[f.name] for f in fields(kind) if f.name not in set_here}  # type: ignore[arg-type]
    return kind(**values, **set_here)


def _with_data(arguments: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """`--keep FILE --keep.prompt TEMPLATE` as one argument, `--keep {"data": FILE, "prompt": TEMPLATE}`; `--keep` given
    several times as a list of these.

    The parser would read each nested value as YAML, and take `{answer}` for a mapping and a `#` for a comment. Numbers
    and switches are read as YAML here.

    Raises CordaError if a value does not fit: the parser would take all of the argument for a name of data.
    """
    hints = get_type_hints(DataConfig, include_extras=True)
    texts = {name for name, hint in hints.items() if hint in (str, str | None)}
    others: list[str] = []
    data: dict[str, list[dict[str, Any]]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option = re.fullmatch(rf"--({'|'.join(kinds)})(?:\.(\w+))?(?:=(.*))?", argument, re.DOTALL)
        if option is None or (option[3] is None and not rest):
            others.append(argument)
            continue
        kind, name, value = option[1], option[2] or "data", option[3] if option[3] is not None else rest.pop(0)
        if name == "data" and (option[2] is None and value[:1] in "[{"):  # a list or a mapping: the parser reads it
            others += [f"--{kind}", value]
        else:
            if name not in hints:
                raise CordaError(f"{kind}.{name} is no option: there are {', '.join(f'{kind}.{n}' for n in hints)}")
            value = value if name in texts else _yaml(value)
            check_value(f"{kind}.{name}", value, hints[name])
            items = data.setdefault(kind, [{}])
            if name == "data" and "data" in items[-1]:
                items.append({})
            items[-1][name] = value
    for kind, items in data.items():
        values = items[0]
        if len(items) > 1:
            others += [f"--{kind}", json.dumps(items)]
        elif "data" in values:
            others += [f"--{kind}", values["data"] if len(values) == 1 else json.dumps(values)]
        else:  # a recipe may name the data
            others += [f"--{kind}.{name}={json.dumps(value)}" for name, value in values.items()]
    return others


def _yaml(text: str) -> Any:
    """The value of a YAML text; the text itself if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except YAMLError:
        return text


def _underscored(argument: str) -> str:
    """`--learning-rate` means `--learning_rate`."""
    flag, equals, value = argument.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument


if __name__ == "__main__":
    main()
