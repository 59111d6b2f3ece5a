"""Progress bars with the time left. They go to standard error, so that a command's output can be piped."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
PATIENCE = 3.0  # seconds of silence
console = Console(stderr=True, markup=False, emoji=False)  # names of data may have brackets


@contextmanager
def progress_bar(label: str, total: int, show: bool = True) -> Iterator[Callable[..., None]]:
    """Show a bar. Yields the function that advances it by `steps`; it can also change the bar's `total` and `note`."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not show) as bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda steps=1, **changes: bar.update(task, advance=steps, **changes)


def track(items: Sequence[T], label: str, show: bool = True) -> Iterable[T]:
    """Iterate over `items` and show a bar."""
    with progress_bar(label, len(items), show) as advance:
        for item in items:
            yield item
            advance()


def track_if_slow(items: Sequence[T], label: str) -> Iterable[T]:
    """Iterate over `items`, and show a bar if that takes more than `PATIENCE`: most that is read is read at once."""
    begun, advance = time.monotonic(), None
    with ExitStack() as stack:
        for done, item in enumerate(items):
            if advance is None and time.monotonic() - begun > PATIENCE:
                advance = stack.enter_context(progress_bar(label, len(items)))
                advance(done)
            yield item
            if advance is not None:
                advance()


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Inside this context nothing is shown, if `silent`."""
    before = console.quiet
    console.quiet = before or silent
    try:
        yield
    finally:
        console.quiet = before
