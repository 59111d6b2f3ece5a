"""`corda train`: an adapter, trained."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ..config import CordaError, DataConfig, KeepConfig, LoraStart, ModelConfig, TrainConfig
from ..config.values import Seed, Share
from ..data.rows import check_file
from ..data.samples import load_samples
from ..files import read_json
from .shared import AddVerb, add_push, begin_imports, follows, hub_repo, out, push, take


def add_train(verb: AddVerb) -> None:
    parser = verb(
        "train",
        train,
        "train an adapter",
        *(ModelConfig, LoraStart, TrainConfig, KeepConfig, DataConfig),
        skip={"data", "seed"},
        result=True,
    )
    parser.add_argument("--data", type=str, required=True, help="DATA to learn")
    parser.add_argument("--start", type=Path | None, help="directory from `corda init`; without it, a plain LoRA")
    parser.add_argument("--eval_data", type=str | None, help="DATA whose loss is measured at each checkpoint")
    parser.add_argument("--eval_rows", type=str, default="train", help="as --rows, of --eval_data")
    parser.add_argument("--eval_share", type=Share, default=0.0, help="hold out this share of --data, to measure it")
    parser.add_argument("--seed", type=Seed, default=0, help="the seed of the draw of samples, their order and dropout")
    parser.add_argument("--output", type=Path, required=True, help="the adapter directory to write")
    add_push(parser)


def train(options: Namespace) -> dict[str, Any]:
    """Train an adapter through TRL, from the start that `corda init` wrote or from a plain LoRA. The loss covers only
    the responses. With --label the model is a classifier, whose head is trained, too. If a run is interrupted, the same
    command resumes it from its last checkpoint."""
    tuning = _tuning(options)
    from ..training.train import DivergedError
    from ..tune import check_tuning, is_tuned, tune

    is_there = not follows(options) and is_tuned(tuning, options.output)
    if options.processes:
        is_there = options.processes.gather(is_there)[0]
    if is_there and follows(options):
        return {}
    if is_there:
        out.print(f"{options.output} is whole already: the same command made it")
        push(options, hub_repo(options))
        return _made(options.output)
    check_tuning(tuning, options.output)
    repo = hub_repo(options)
    try:
        result = tune(tuning, options.output, options.processes)
    except DivergedError as error:
        if not follows(options):
            print(f"corda train: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    if follows(options):
        return {}
    _say(result, options.max_drift)
    out.print(f"written to {options.output}")
    push(options, repo)
    return _made(options.output)


def _tuning(options: Namespace) -> Any:
    """What the options ask for: a `tune.Tuning`. Raises CordaError if they do not go together."""
    source, config, lora = take(ModelConfig, options), take(TrainConfig, options), take(LoraStart, options)
    keep, data = take(KeepConfig, options), take(DataConfig, options, data=options.data)
    own = [f.name for f in fields(lora) if getattr(lora, f.name) != getattr(LoraStart(), f.name)]
    if options.start and own:
        raise CordaError(f"--{own[0]} is of a plain LoRA: leave it out, as the adapter in --start has its own")
    if options.eval_data is None and options.eval_rows != "train":
        raise CordaError("--eval_rows is of --eval_data: give it, or leave --eval_rows out")
    held_out: DataConfig | float = options.eval_share
    if options.eval_data is not None:
        if options.eval_share:
            raise CordaError("--eval_share holds out samples of --data: leave it or --eval_data out")
        held_out = replace(data, data=options.eval_data, rows=options.eval_rows, samples=None)
    for each in (data, held_out):
        if isinstance(each, DataConfig):
            check_file(each)
    samples = load_samples(data)  # what is wrong with them is said before the long imports
    begin_imports(options)
    from ..tune import read_tuning

    return read_tuning(source, data, config, options.start or lora, held_out, keep, samples)


def _say(result: dict[str, Any], max_drift: float | None) -> None:
    """Print what a training came to."""
    from ..report.verdicts import kept

    out.print(f"loss {result['train_loss']:.4f} over {result['steps']} steps, {result['seconds']:.0f} s")
    for step, loss in result["held_out_loss"]:
        if step == result["kept_step"]:
            out.print(f"held-out loss {loss:.4f} at step {step}, whose adapter is kept")
    drifts = result.get("drift", {})
    for name, history in drifts.items() if isinstance(drifts, dict) else [("the context", drifts)]:
        drift = history[-1][2] or 0.0
        asked = f" ({max_drift:g} was asked for)" if max_drift else ""
        out.print(f"drift {drift:.3g} nats per answer token of {name}{asked}: {kept(drift)}", highlight=False)


def _made(output: Path) -> dict[str, Any]:
    """What is known of a trained adapter on disk."""
    return {"output": str(output), **read_json(output / "training.json")}
