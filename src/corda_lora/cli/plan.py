"""`corda plan`: what `corda init` or `corda compare` will take."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from ..config import CompareConfig, ContextConfig, CordaConfig, CordaError, DataConfig, ModelConfig
from ..config.data import CONTEXT_SAMPLES
from ..config.init import check_together
from ..config.values import Count, Positive
from ..data.rows import check_file
from ..evaluation.tasks.registry import named_tasks
from .arguments import PLAN_RECIPE
from .init import contexts_of
from .shared import AddVerb, out, take


def add_plan(verb: AddVerb) -> None:
    parser = verb(
        "plan",
        plan,
        "what init, or a comparison's RECIPE, will take",
        ModelConfig,
        CordaConfig,
        DataConfig,
        skip={"data"},
        writes=False,
    )
    parser.set_defaults({"samples": CONTEXT_SAMPLES})
    parser.add_argument(
        "--context",
        type=str | ContextConfig | list[str | ContextConfig] | None,
        help="DATA to count tokens of, several times as of init; else all samples have max_length",
    )
    parser.add_argument("--batch_tokens", type=Count, default=4096, help="tokens of the context a forward")
    parser.add_argument("--park", type=Literal["auto", "device", "cpu", "disk"], default="auto", help="as of init")
    parser.add_argument("--output", type=Path | None, help="as of init, to say whether its disk has room")
    parser.add_argument("--keep_work", action="store_true", help="as of init; no more is on the disk at once")
    _add_machine(parser)
    parser.add_argument("--gpus", type=Count | None, help="plan for so many GPUs in all: init, and a step of train")
    parser.add_argument("--hosts", type=Count, default=1, help="the hosts that these GPUs are in")
    parser = verb(PLAN_RECIPE, plan_recipe, "", ModelConfig, CompareConfig, writes=False)
    parser.prog = parser.prog.replace(PLAN_RECIPE, "plan RECIPE")
    parser.add_argument("--output", type=Path | None, help="as of compare; it changes nothing here")
    _add_machine(parser)


def _add_machine(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", type=str | None, help="plan for a card with this memory, such as 24GB; else this machine"
    )
    parser.add_argument("--tflops", type=Positive | None, help="of the card, dense in half precision; else an H100's")
    parser.add_argument("--tflops64", type=Positive | None, help="of the card, in double precision; else an H100's")


def plan(options: Namespace) -> None:
    """Say what `corda init` with the same options will take: memory and time of each stage, disk, and which options
    make it fit where it does not. With --gpus, what it takes when they share it, and a step of training after it. From
    config.json alone: the weights are not needed. --damping, --skip_tokens, --tokens, --seed, --lora_alpha,
    --use_rslora and --lora_dropout change nothing of it. What --original takes is not planned."""
    config, source = take(CordaConfig, options), take(ModelConfig, options)
    contexts = contexts_of(options)
    datas = contexts if contexts and config.reads_context else [take(DataConfig, options, data="", label="", pair="")]
    check_together(config, len(datas))
    _check_card(options)
    if options.hosts > 1 and options.gpus is None:
        raise CordaError("--hosts share out --gpus: give their number, too")
    if config.fold and not config.quantization:
        raise CordaError("fold puts what quantization lost into the adapter: --quantization nf4")
    for each in contexts if config.reads_context else ():
        check_file(each)
    from ..data.labels import with_labels
    from ..models.targets import choose_targets
    from ..preprocess.backward import targets_inside
    from ..preprocess.plan import check_room, init_plan, planned_model, planned_tokens, shapes_of, what_fits
    from ..report.terminal import plan_lines, shared_plan_lines
    from ..training.plan import shared_plan

    labelled = next((data for data in contexts if data.label), None)
    if options.label and labelled is None and source.labels is None:
        raise CordaError("label names a column of a context: give --context, or the labels themselves with --labels")
    model: Any = planned_model(with_labels(source, labelled))
    if config.runs_back:
        targets_inside(model, choose_targets(model, config))
    machine, shapes = _machine(options, model, config.device), shapes_of(model, config)

    def count(rounds: int, batch_tokens: int) -> Any:
        return planned_tokens(source, datas, rounds, batch_tokens, model.config.is_encoder_decoder)

    tokens = count(config.rounds or 1, options.batch_tokens)
    planned = init_plan(shapes, config, tokens, options.park, machine, len(datas))
    lines = plan_lines(planned, config)
    if options.gpus:
        shared = (options.gpus, options.hosts, options.park, options.batch_tokens, len(datas))
        lines = shared_plan_lines(shared_plan(shapes, config, tokens, machine, *shared), config)
    for line in lines:
        out.print(line, highlight=False)
    if config.reads_context and not datas[0].data:
        out.print(
            f"assumed, as no --context is given: {datas[0].samples or 1} samples of {datas[0].max_length} tokens "
            "(--samples, --max_length); shorter ones take less",
            highlight=False,
        )
    if config.mode == "kpm" and config.orientation != "identity" and config.rounds == 1 and len(datas) == 1:
        out.print(
            "not counted: measuring what other samples of the context leak, if it has others, for which the weights "
            "are read once more",
            highlight=False,
        )
    if options.output is not None:
        try:
            check_room(planned, options.output)
        except CordaError as error:
            out.print(f"does not fit: {error}", highlight=False)
    if not options.gpus and not planned.fits:
        fitting = what_fits(model, config, count, options.batch_tokens, options.park, machine, len(datas))
        advice = (
            f"; fits with {fitting[0]}" if fitting else ", nor with smaller batches, fewer rounds or another --park"
        )
        out.print(f"does not fit{advice}", highlight=False)


def plan_recipe(options: Namespace) -> None:
    """`corda plan RECIPE`: say what `corda compare` with the same recipe will take: memory and disk of each entry's
    start, memory of its training, and the time of what can be counted. From config.json alone: neither the weights nor
    data on the hub are needed. If the hub cannot be reached, --model may name a folder with the model's config.json."""
    source, config = take(ModelConfig, options), take(CompareConfig, options)
    named_tasks(replace(config.eval, data_dir=None))  # a plan needs no data
    _check_card(options)
    from ..compare.plan import plan_comparison
    from ..preprocess.plan import planned_model
    from ..report.terminal import comparison_plan_lines

    try:
        model: Any = planned_model(source)
    except CordaError as error:
        sentence = str(error).rstrip(".")
        raise CordaError(f"{sentence}; to plan, a --model FOLDER with the model's config.json is enough") from error
    for line in comparison_plan_lines(plan_comparison(model, source, config, _machine(options, model, None))):
        out.print(line, highlight=False)


def _check_card(options: Namespace) -> None:
    """Raises CordaError if the options describe a card without its memory, or one that is not to be used."""
    if options.gpu is None and (options.tflops or options.tflops64):
        raise CordaError("--tflops and --tflops64 are of a card: give its memory with --gpu")
    if options.gpu is not None and options.get("device") == "cpu":
        raise CordaError("--gpu describes a card, and with --device cpu it does nothing: leave one of them out")


def _machine(options: Namespace, model: Any, device: str | None) -> Any:
    """The machine to plan for: the card that the options describe, or this machine.

    Raises CordaError if their memory is no size."""
    from ..devices import compute_device
    from ..preprocess.machine import described_machine, this_machine

    if options.gpu is not None:
        return described_machine(options.gpu, options.tflops, options.tflops64)
    return this_machine(compute_device(model, device), next(model.parameters()).dtype)
