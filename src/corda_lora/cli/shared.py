"""What the verbs share."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from ..files import check_model
from ..processes import Processes
from ..progress import console

T = TypeVar("T")
AddVerb = Callable[..., Any]  # see `parser.build_parser`
out = Console(markup=False, emoji=False)


@contextmanager
def spoken(options: Namespace) -> Iterator[None]:
    """Inside this context, --json keeps the standard output free, and --quiet silences everything but errors. Of
    several processes the first one alone speaks."""
    quiet = bool(options.get("quiet")) or follows(options)
    out.quiet, console.quiet = quiet or bool(options.get("json")), quiet
    if quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        yield
    finally:
        out.quiet = console.quiet = False


def follows(options: Namespace) -> bool:
    """Whether another process of the same run prints, and writes the output."""
    processes: Processes | None = options.get("processes")
    return processes is not None and not processes.first


def begin_imports(options: Namespace) -> None:
    """Say that the long imports begin: on a busy machine they take half a minute. Raises CordaError first if a model
    that is to be here is not."""
    for name in ("model", "original", "before"):
        if options.get(name):
            check_model(options[name])
    if "torch" not in sys.modules:
        console.print("loading PyTorch and Transformers")


def take(kind: type[T], options: Namespace, **set_here: Any) -> T:
    """The dataclass `kind` out of the parsed options."""
    values = {f.name: options[f.name] for f in fields(kind) if f.name not in set_here}  # type: ignore[arg-type]
    return kind(**values, **set_here)


def add_push(parser: ArgumentParser) -> None:
    parser.add_argument("--push", type=str, default="", help="repository on the hub to send the output to, with a card")
    parser.add_argument(
        "--hub_private_repo", type=bool | None, help="whether a new repository is private; else the hub's"
    )


def hub_repo(options: Namespace) -> str:
    """The repository on the hub that is made for the output before the work begins; "" without --push."""
    if not options.push or follows(options):
        return ""
    from ..adapters.hub import make_repo

    return make_repo(options.push, options.hub_private_repo)


def push(options: Namespace, repo: str) -> None:
    """Send the output to the hub, if --push says so."""
    if repo:
        from ..adapters import hub

        out.print(f"sent to {hub.push(options.output, repo)}")
