"""`corda eval`: what was learned and what was kept."""

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ..config import CordaError, EvalConfig, ModelConfig
from ..data.rows import check_file
from ..evaluation.measures import KINDS
from ..evaluation.tasks.registry import TASKS, checked_tasks
from ..files import check_output, check_result, read_json, whole_folder, write_json
from .shared import AddVerb, begin_imports, out, take

if TYPE_CHECKING:
    from ..evaluation.evaluate import BothSides


def add_eval(verb: AddVerb) -> None:
    parser = verb(
        "eval",
        evaluate,
        "measure what was learned and what was kept",
        ModelConfig,
        EvalConfig,
        skip={"model"},
        check=_check,
        result=True,
    )
    parser.add_argument("--model", type=str | None, help="a name on the hub, a directory, or a .gguf file")
    known = ", ".join(f"{task.name} ({task.meaning})" for task in TASKS.values())
    next(action for action in parser._actions if action.dest == "tasks").help += f" There are {known}."
    parser.add_argument("--adapter", type=Path | None, help="adapter directory; without it, the base model alone")
    parser.add_argument(
        "--original", type=str | None, help="the full model, to measure a quantized MODEL and its adapter against"
    )
    parser.add_argument("--before", type=str | None, help="the model as it was: what --after gained and lost is said")
    parser.add_argument("--after", type=str | None, help="the model as it is now, or the directory of an adapter on it")
    parser.add_argument(
        "--output",
        type=Path | None,
        help="NAME.json, for the numbers; any other name is a directory, for the numbers, the answers to benchmarks "
        "and the page of before and after",
    )


def _check(output: Path) -> None:
    """Raises CordaError if the output cannot be written."""
    if output.suffix == ".json" or output.is_file():
        check_result(output)
    else:
        check_output(output)


def evaluate(options: Namespace) -> dict[str, Any]:
    """Measure the base model and the tuned one in one run: loss, drift (mean KL(base‖tuned) per answer token),
    perplexity, multiple-choice accuracy, exact match, benchmarks. Results are printed, and written to --output if it is
    given. With --before and --after it also says what was gained and lost, with intervals."""
    config = take(EvalConfig, options)
    for data in (data for kind in KINDS for data in config.data(kind)):
        check_file(data)
    _name_models(options)
    source = take(ModelConfig, options)
    begin_imports(options)
    from ..models.loading import is_quantized
    from ..report.before_after import write_evaluation
    from ..report.terminal import results_table
    from ..report.verdicts import verdicts

    original = _original(options)
    checked_tasks(config)
    scores: BothSides | None = {} if options.before or config.tasks else None
    results = _measured(options, source, config, original, scores)
    if (table := results_table(results)).row_count:  # none if all that was asked for waits for a judge
        out.print(table)
    sentences = verdicts(results, quantized=original is not None and is_quantized(source))
    for sentence in sentences:
        out.print(sentence, highlight=False)
    if options.adapter is not None and (drift := _drift_in_training(options.adapter)):
        out.print(drift, highlight=False)
    measured: dict[str, Any] = {"model": source.model, "adapter": options.adapter and str(options.adapter)}
    measured["results"] = results
    if options.before:
        measured |= {"before": options.before, "after": options.after, **_changes(scores or {})}
    if options.output is not None and options.output.suffix == ".json":
        write_json(options.output, measured)
    elif options.output is not None:
        with whole_folder(options.output) as folder:
            write_evaluation(folder, measured, scores or {}, shlex.join(["corda", *options.command]))
        out.print(f"written to {options.output}")
    return {**measured, "verdicts": sentences, **_unjudged(results, config, options.output)}


def _unjudged(results: Any, config: EvalConfig, output: Path | None) -> dict[str, str]:
    """The sentence under "missing" if a judge was asked, and gave no score to one of the sides."""
    by_side = results.get("tasks", {}).get("mt_bench", {})
    sides = [side for side, values in by_side.items() if "score" not in values]
    if not config.judge.url or not sides:
        return {}
    again = "another --output" if output is not None and output.suffix != ".json" else "the same command"
    return {
        "missing": f"mt_bench has no score for the {' and the '.join(sides)} model, as {config.judge.model} at "
        f"{config.judge.url} rated none of its answers: they are kept in {config.judge.folder}, and {again} asks again"
    }


def _original(options: Namespace) -> dict[str, Any] | None:
    """The full model, by its name and revision, where MODEL is a quantized one to measure beside it.

    Raises CordaError if it is needed and nobody names it."""
    from ..adapters.lora import read_marks

    marks = read_marks(options.adapter) if options.adapter is not None else None
    original = (marks or {}).get("original") if options.original is None else {"model": options.original}
    if original is None and marks and marks["split"] == "residual":
        raise CordaError(
            "without its adapter the quantized residual is no model to compare with: give --original, the full model"
        )
    return original


def _measured(
    options: Namespace,
    source: ModelConfig,
    config: EvalConfig,
    original: dict[str, Any] | None,
    scores: "BothSides | None",
) -> Any:
    """The results of the base model and the tuned one; `scores` gets those of each sample of the benchmarks."""
    from ..adapters.lora import check_base, load_adapter, with_labels_of
    from ..devices import accelerator
    from ..evaluation.evaluate import evaluate, evaluate_beside, read_measured
    from ..models.loading import check_original, check_same_model, load_model, load_tokenizer
    from ..models.targets import has_new_head

    if options.adapter is not None:
        source = with_labels_of(source, options.adapter)
    tokenizer = load_tokenizer(source)
    data = read_measured(config, tokenizer, labels=source.labels)  # before the model is loaded

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

    if original is None:
        return evaluate(load_tuned(), tokenizer, config, scores=scores, data=data)
    full = replace(source, **{"revision": None, **original})
    if not options.before:
        check_original(full)
    if options.adapter is not None or not options.before:  # before the full model runs
        quantized = load_model(source)
        if options.adapter is not None:
            check_base(quantized, options.adapter)
        if not options.before:
            check_same_model(quantized, full)
        del quantized  # it is loaded again when the full one is gone
    if not options.before:
        out.print(f"measured beside the full model, {full.model}", highlight=False)
    elif load_tokenizer(full).get_vocab() != tokenizer.get_vocab():
        raise CordaError(f"{options.after} has another vocabulary than {options.before}, so nothing is comparable")
    return evaluate_beside(
        lambda: load_model(full).to(accelerator()), load_tuned, tokenizer, config, scores=scores, data=data
    )


def _changes(scores: "BothSides") -> dict[str, Any]:
    """Print what was gained and lost. Returns it."""
    from ..evaluation.before_after import changes
    from ..report.before_after import changes_table, gained_and_lost

    found = changes(scores)
    gained = gained_and_lost(found)
    out.print(changes_table(found))
    for sentence in gained:
        out.print(sentence, highlight=False)
    return {"gained_and_lost": gained, "changes": [asdict(change) for change in found]}


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
    begin_imports(options)
    from ..adapters.lora import CONFIG, read_marks

    if not (Path(after) / CONFIG).is_file():
        options.model, options.original = after, before
        return
    options.model, options.adapter = before, Path(after)
    if original := (read_marks(options.adapter) or {}).get("original"):  # the adapter is on a quantized model
        if original["model"] != before:
            raise CordaError(f"the adapter in {after} is on weights in 4 bits: give --before {original['model']}")
        options.model = read_json(options.adapter / CONFIG)["base_model_name_or_path"]
        if not Path(options.model).exists() and Path(before).exists():
            raise CordaError(
                f"the quantized base of the adapter in {after} is not in {options.model}: give --model BASE --adapter "
                f"{after} --original {before}"
            )


def _drift_in_training(adapter: Path) -> str | None:
    """What the meter said at the end of the adapter's training, in a line for each ability; None if it was trained
    without."""
    path = adapter / "training.json"
    histories = read_json(path).get("drift") if path.is_file() else None
    if not histories:
        return None
    lines = []
    for name, history in histories.items() if isinstance(histories, dict) else [("the context", histories)]:
        try:
            _, predicted, measured, price = map(float, history[-1])
        except (TypeError, ValueError, LookupError) as error:
            raise CordaError(f"{path} is damaged: its drift is no list of measurements") from error
        lines.append(
            f"When it was trained: drift {measured:.3g} on samples of {name}, {predicted:.3g} predicted from its "
            f"statistics, at a price of {price:.3g} nats a nat."
        )
    return "\n".join(lines)
