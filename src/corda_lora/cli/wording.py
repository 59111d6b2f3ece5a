"""How the parser speaks: its errors in a sentence, its help with ranges in words."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ..config import CordaConfig, DataConfig, MethodConfig
from ..config.lora import NOT_OURS, why_not
from ..config.values import LARGEST, misfit
from .arguments import PLAN_RECIPE

LONGEST_MESSAGE = 480  # characters


class Parser(ArgumentParser):
    """Says what is wrong with a command in a sentence, and not below thirty lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        if missing := re.fullmatch(r"the following arguments are required: (\w+)\..*", message):
            prog = f"{prog} {missing[1]}"
        message = message.replace(f"'{PLAN_RECIPE}', ", "")  # among the verbs that there are
        sentence = shortened(in_our_words(message, parser._actions))
        self.exit(2, f"{prog}: {sentence} (all options: {prog} --help)\n")


def in_our_words(message: str, actions: Sequence[argparse.Action] = ()) -> str:
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
    kind = next((k for k in ("learn", "context", "data") if k in hints), "")
    if kind and option in get_type_hints(DataConfig):
        return f"--{option} is an option of data: after --{kind} DATA give --{kind}.{option}"
    if "methods" in hints and option in get_type_hints(CordaConfig):
        return (
            f"{option} is an option of init, or of a method under `methods`: a recipe of init is planned by corda plan "
            "--config RECIPE"
        )
    if recipe := re.fullmatch(r"unrecognized arguments: ([^-].*\.ya?ml)", message):
        return f"a recipe is given as --config {recipe[1]}"
    inner = get_type_hints(MethodConfig, include_extras=True) | get_type_hints(DataConfig, include_extras=True)
    values = re.findall(r"(?:Got|Given) value: (.*)", reason)
    if innermost := re.search(r"Option '(.*)' is not accepted", reason):
        known = MethodConfig if "MethodConfig':" in reason[: innermost.start()] else DataConfig
        near = nearest(innermost[1], get_type_hints(known), 0.0)
        message = f"{key}{_entry(reason[innermost.end() :])}: {innermost[0]}{near}"
    elif refused := re.search(r"does not accept option '(.*)'", message):
        message += nearest(refused[1], [a.dest for a in actions if not a.dest.endswith("help")], 0.6)
    elif inside := re.search(r"NestedArg\(key='(.*?)'", reason):
        meant = f": give --{inside[1]}" if key == "data" and inside[1] in names.values() else ""
        message = f"--{names.get(key, key)}.{inside[1]} is no option of this command{meant}"
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


def _entry(rest: str) -> str:
    """The name of the entry in which an option is wrong, after a dot, or "" if there are no entries. jsonargparse gives
    the entry's value after the option, and that of the whole mapping last."""
    values = re.findall("Given value: (.*)", rest)
    found = re.search(rf"'([^']*)': {re.escape(values[0])}", values[-1]) if values else None
    return f".{found[1]}" if found else ""


def nearest(name: str, names: Iterable[str], cutoff: float) -> str:
    """The names, at most three, that are nearest to one that is none of them, as the end of a sentence."""
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=cutoff)
    return f"; nearest names: {', '.join(near)}" if near else ""


def shortened(message: str) -> str:
    """One line, its middle left out if it is longer than three lines of a terminal."""
    message = " ".join(message.split())
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:300]} … {message[-150:]}"


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of descriptions as they are, and shows a range as "int, at least 1"."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(
            rf"Annotated\[([^\[\]]*?)( and at most (?:{LARGEST:,}|1e\+30))?\]", r"\1", super()._expand_help(action)
        )
        return re.sub(r"Optional\[((?:int|float),[^\[\]]*)\]", r"\1, or null", text)
