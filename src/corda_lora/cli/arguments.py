"""A command line as the parser takes it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from yaml import YAMLError

from ..config import ContextConfig, CordaError, DataConfig, NamedConfig
from ..config.values import check_value
from ..evaluation.measures import KINDS
from ..recipes import load_recipe

PLAN_RECIPE = "plan_recipe"  # `corda plan RECIPE` has the options of a comparison
# The options that are data, by verb, and the dataclass of their own options.
OF_DATA: dict[str, dict[str, type]] = {
    "eval": dict.fromkeys(KINDS, DataConfig),
    "init": {"context": ContextConfig},
    "plan": {"context": ContextConfig},
    "train": {"context": ContextConfig},
    "inspect": {"context": NamedConfig, "text": DataConfig},
    "export": {"data": DataConfig},
}


def for_parser(given: Sequence[str]) -> list[str]:
    """A command line with underscores in its options, with each option of data and what belongs to it in one argument,
    and with a recipe as --config.

    Raises CordaError as `with_data` does, for a comparison's recipe as --config of another verb, and for two recipes.
    """
    arguments = [_underscored(argument) for argument in given]
    verb = arguments[0] if arguments else ""
    compares = verb in ("compare", "plan") and arguments[1:] and not arguments[1].startswith("-")
    if verb != "compare" and not compares:
        for recipe in filter(_is_of_a_comparison, _recipes(arguments)):
            other = "plan" if verb == "plan" else "compare"
            raise CordaError(f"{recipe} is a recipe of a comparison: type corda {other} {recipe}")
    if compares:
        if len(arguments) > 2 and all(re.search(r"\.ya?ml$", argument) for argument in arguments[1:3]):
            one, other = arguments[1:3]
            raise CordaError(f"one recipe at a time: type corda {verb} {one}, and then corda {verb} {other}")
        return [verb if verb == "compare" else PLAN_RECIPE, "--config", *arguments[1:]]
    return with_data(arguments, OF_DATA[verb]) if verb in OF_DATA else arguments


def with_data(arguments: Sequence[str], kinds: Mapping[str, type]) -> list[str]:
    """`--keep FILE --keep.prompt TEMPLATE` as one argument, `--keep {"data": FILE, "prompt": TEMPLATE}`; `--keep` given
    several times as a list of these.

    The parser would read each nested value as YAML, and take `{answer}` for a mapping and a `#` for a comment. Numbers
    and switches are read as YAML here.

    Args:
        kinds: the options that are data, each with the dataclass of what belongs to it.

    Raises CordaError if nothing names the data, or a value does not fit: the parser would take all of the argument for
    a name of data.
    """
    hints_of = {kind: get_type_hints(config, include_extras=True) for kind, config in kinds.items()}
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
            hints = hints_of[kind]
            if name not in hints:
                raise CordaError(f"{kind}.{name} is no option: there are {', '.join(f'{kind}.{n}' for n in hints)}")
            value = value if hints[name] in (str, str | None) else _yaml(value)
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
        elif not any(re.match("--config(=|$)", other) for other in others):
            raise CordaError(f"--{kind}.{next(iter(values))} goes with data: give --{kind} DATA, too")
        else:  # a recipe may name the data
            others += [f"--{kind}.{name}={json.dumps(value)}" for name, value in values.items()]
    return others


def _recipes(arguments: Sequence[str]) -> Iterator[str]:
    """What stands after --config."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if option := re.fullmatch("--config(?:=(.*))?", argument, re.DOTALL):
            yield following if option[1] is None else option[1]


def _is_of_a_comparison(recipe: str) -> bool:
    """Whether a file is a comparison's recipe. What is no recipe at all is for the parser to say."""
    try:
        found = load_recipe(Path(recipe).read_text("utf-8")) if Path(recipe).is_file() else None
    except (OSError, ValueError, YAMLError):
        return False
    return isinstance(found, dict) and "methods" in found


def _yaml(text: str) -> Any:
    """The value of a YAML text, 1e3 a number as elsewhere; the text itself if it is no YAML."""
    try:
        return load_recipe(text)
    except YAMLError:
        return text


def _underscored(argument: str) -> str:
    """`--learning-rate` means `--learning_rate`."""
    flag, equals, value = argument.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument
