"""`corda plan`: what `corda init` or `corda compare` will take."""

from dataclasses import replace
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from ..config import CompareConfig, ContextConfig, CordaConfig, CordaError, DataConfig, ModelConfig
from ..config.data import CONTEXT_SAMPLES
from ..config.init import check_together
from ..config.values import Count, Positive
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
    )
    parser.set_defaults({"samples": CONTEXT_SAMPLES})
    parser.add_argument(
        "--context",
        type=str | ContextConfig | list[str | ContextConfig] | None,
        help="DATA to count tokens of, several times as of init; else all samples have max_length",
    )
    parser.add_argument("--batch_tokens", type=Count, default=4096, help="tokens of the context a forward")
    parser.add_argument("--park", type=Literal["auto", "device", "cpu", "disk"], default="auto", help="as of init")
    _add_machine(parser)
    parser.add_argument("--gpus", type=Count | None, help="plan for so many GPUs in all: init, and a step of train")
    parser.add_argument("--hosts", type=Count, default=1, help="the hosts that these GPUs are in")
    parser = verb(PLAN_RECIPE, plan_recipe, "", ModelConfig, CompareConfig)
    parser.prog = parser.prog.replace(PLAN_RECIPE, "plan RECIPE")
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
    config.json alone: the weights are not needed."""
    config, source = take(CordaConfig, options), take(ModelConfig, options)
    contexts = contexts_of(options)
    datas = contexts if contexts and config.reads_context else [take(DataConfig, options, data="")]
    check_together(config, len(datas))
    _check_card(options)
    if options.hosts > 1 and options.gpus is None:
        raise CordaError("--hosts share out --gpus: give their number, too")
    from ..preprocess.plan import init_plan, planned_model, planned_tokens, what_fits
    from ..report.terminal import plan_lines

    model: Any = planned_model(source)
    machine = _machine(options, model, config.device)

    def count(rounds: int, batch_tokens: int) -> Any:
        return planned_tokens(source, datas, rounds, batch_tokens, model.config.is_encoder_decoder)

    assumed = (
        f"assumed, as no --context is given: {datas[0].samples or 1} samples of {datas[0].max_length} tokens "
        "(--samples, --max_length); shorter ones take less"
    )
    if options.gpus:
        from ..preprocess.plan import shapes_of
        from ..report.terminal import shared_plan_lines
        from ..training.plan import shared_plan

        sizes, tokens = shapes_of(model, config), count(config.rounds or 1, options.batch_tokens)
        shared = shared_plan(
            sizes,
            config,
            tokens,
            machine,
            options.gpus,
            options.hosts,
            options.park,
            options.batch_tokens,
            len(datas),
        )
        for line in shared_plan_lines(shared, config):
            out.print(line, highlight=False)
        if config.reads_context and not datas[0].data:
            out.print(assumed, highlight=False)
        return
    tokens = count(config.rounds or 1, options.batch_tokens)
    planned = init_plan(model, config, tokens, options.park, machine, len(datas))
    for line in plan_lines(planned, config):
        out.print(line, highlight=False)
    if config.reads_context and not datas[0].data:
        out.print(assumed, highlight=False)
    if not planned.fits:
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
    """Raises CordaError if the options describe a card without its memory."""
    if options.gpu is None and (options.tflops or options.tflops64):
        raise CordaError("--tflops and --tflops64 are of a card: give its memory with --gpu")


def _machine(options: Namespace, model: Any, device: str | None) -> Any:
    """The machine to plan for: the card that the options describe, or this machine.

    Raises CordaError if their memory is no size."""
    from ..devices import compute_device
    from ..preprocess.machine import described_machine, this_machine

    if options.gpu is not None:
        return described_machine(options.gpu, options.tflops, options.tflops64)
    return this_machine(compute_device(model, device), next(model.parameters()).dtype)
