"""The parser: the verbs and their options."""

# Options come from the dataclasses of config/. Heavy imports wait for the verb, so that --help is quick.

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from inspect import getdoc
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader
from yaml import YAMLError

from ..config.values import CordaError, check_value
from ..files import check_adapter, check_name, output_lock
from ..recipes import load_recipe
from .compare import add_compare
from .demo import add_demo
from .eval import add_eval
from .export import add_export
from .init import add_init
from .inspect import add_inspect
from .plan import add_plan
from .shared import follows, spoken
from .train import add_train
from .wording import Help, Parser

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


def build_parser() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], None]]]:
    """The parser and the function of each verb."""
    set_loader("yaml", load_recipe, exceptions=(YAMLError,))
    parser = Parser(prog="corda", description=SUMMARY, epilog=EXAMPLES, formatter_class=Help)
    parser._optionals.title = "options"
    subcommands = parser.add_subcommands(required=False, dest="verb", metavar="VERB")
    verbs: dict[str, Callable[[Namespace], None]] = {}

    def verb(
        name: str,
        run: Callable[[Namespace], Any],
        summary: str,
        *configs: type,
        skip: set[str] | None = None,
        check: Callable[[Path], None] | None = check_name,
        result: bool = False,
        writes: bool = True,
    ) -> Any:
        """Add a verb. Returns its parser, for options of its own.

        Args:
            run: what it does; its docstring is the verb's help.
            summary: its line in `corda --help`; without one it is not listed.
            configs: the dataclasses whose fields are its options,
            skip: but for these.
            check: raises CordaError if the output cannot be written.
            result: whether `run` returns something to print: with --quiet and --json.
            writes: whether it writes the output that is named.
        """
        sub = Parser(description=getdoc(run), formatter_class=Help)
        sub.add_argument("--config", action=ActionConfigFile, help="YAML recipe; flags after it win over it")
        for config in configs:
            names = {f.name for f in fields(config)}
            sub.add_class_arguments(config, skip=names & (skip or set()))
        if result:
            sub.add_argument("--quiet", action="store_true", help="print nothing but errors and the output's path")
            sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        subcommands.add_subcommand(name, sub, help=summary)
        if not summary:
            subcommands._choices_actions.pop()
        verbs[name] = partial(_run_checked, sub, run, check, writes)
        return sub

    for add in (add_demo, add_init, add_plan, add_train, add_eval, add_compare, add_inspect, add_export):
        add(verb)
    return parser, verbs


def _run_checked(
    parser: ArgumentParser,
    run: Callable[[Namespace], Any],
    check: Callable[[Path], None] | None,
    writes: bool,
    options: Namespace,
) -> None:
    """Run a verb when its options and its output are found in order, and print its result where --json asks for it.
    Raises CordaError after that with what the result says is "missing"."""
    for action in (a for a in parser._actions if a.dest in options):
        check_value(action.dest, options[action.dest], getattr(action, "_typehint", Any))
    output = options.get("output")
    if output is not None and check is not None:
        check(output)
    reports = options.get("jobs") == 0  # also of a comparison that goes on
    locks = output is not None and writes and not reports and not follows(options)
    with output_lock(output) if locks else nullcontext(), spoken(options):
        for name in ("adapter", "start"):
            if options.get(name) is not None:
                check_adapter(options[name])
        result = run(options)
    if follows(options):
        return
    if options.get("json"):
        print(json.dumps(result, indent=1))
    elif options.get("quiet") and output is not None:
        print(output)
    if result and "missing" in result:
        raise CordaError(result["missing"])
