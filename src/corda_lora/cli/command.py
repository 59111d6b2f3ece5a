"""The command: from a command line to an exit code."""

import atexit
import gc
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from rich.text import Text

from ..config import CordaError
from ..config.values import short
from ..files import NO_ROOM
from ..processes import PATIENCE, Processes, is_first_of_host, is_lost_connection, joined, number_of_processes
from ..progress import console
from .arguments import PLAN_RECIPE, for_parser
from .parser import build_parser
from .wording import in_our_words, shortened

SHARED = ("init", "train")  # verbs whose work several processes share


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits with 0, or with 2 and one sentence if there is something for the user to mend."""
    # One block after another of other sizes: without this the accelerator's memory is cut into pieces nobody can use.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of much that is in order here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns where there are no kernels to download
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log has no use for them
    atexit.register(gc.freeze)  # else the interpreter's end looks through all objects of torch, which takes seconds
    given = list(sys.argv[1:] if argv is None else argv)
    given = given[1:] if given[:1] == ["--"] else given  # torchrun -m corda_lora -- VERB, which some versions leave
    parser, verbs, options = _parse(given)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT, at each checkpoint, of whether embeddings were resized. They never are.
    warnings.filterwarnings("ignore", message="Could not find a config file in ")
    warnings.showwarning = lambda message, *_: console.print(
        Text.assemble(("note:", "yellow"), f" {message}"), highlight=False
    )
    processes: Processes | None = None
    try:
        with _sigterm_as_interrupt(), _processes() as processes:
            if processes:
                processes.meet(partial(_say, options.verb))
            options = instantiate(parser, options)
            options[options.verb].command = given
            options[options.verb].processes = processes
            verbs[options.verb](options[options.verb])
    except KeyboardInterrupt as interrupt:
        resumes = options.verb in ("init", "train", "compare")
        stopped = "stopped" + "; finished work is kept, and the same command goes on from it" * resumes
        _end(options.verb, 143 if isinstance(interrupt, _Terminated) else 130, stopped, processes)
    except Exception as error:
        lost = processes is not None and is_lost_connection(error)
        if sentence := processes.ended if processes and lost else _mendable(error):
            _end(options.verb, 2, sentence, processes, error)
        traceback.print_exc()
        _end(options.verb, 1, "this is a bug of corda-lora: please report it with the lines above", processes, error)


def _parse(given: Sequence[str]) -> tuple[ArgumentParser, dict[str, Any], Namespace]:
    """The parser, the functions of the verbs, and what a command line says. Exits where that is wrong, or help is asked
    for: of the processes that a launcher started with it on this host, the first alone prints why."""
    if is_first_of_host():
        return _parsed(given)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            return _parsed(given)
        except SystemExit as end:
            if end.code:
                time.sleep(PATIENCE)  # or the launcher might end the first one before it has printed
            raise


def _parsed(given: Sequence[str]) -> tuple[ArgumentParser, dict[str, Any], Namespace]:
    try:
        arguments = for_parser(given)
        parser, verbs = build_parser()
        options = parser.parse_args(arguments)
        if options.verb not in (*SHARED, None) and number_of_processes() > 1:
            raise CordaError(
                f"{given[0]} does not share its work among processes: start it by itself, not by a launcher"
            )
    except CordaError as error:
        _say(given[0], str(error))
        raise SystemExit(2) from error
    except UnicodeDecodeError as error:
        parser.error(f"the recipe is not UTF-8: it has the byte 0x{error.object[error.start]:02x}")
    if options.verb is None:
        parser.print_help()
        raise SystemExit(2)
    return parser, verbs, options


@contextmanager
def _processes() -> Iterator[Processes | None]:
    """The processes that torchrun or accelerate started for a command, if they are several."""
    if number_of_processes() == 1:
        yield None
        return
    # Each process would print what torch warns of in C++: how DDP looks for parameters, stacks of lost connections.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with joined() as processes:
        yield processes


def _end(
    verb: str, code: int, sentence: str, processes: Processes | None, error: BaseException | None = None
) -> NoReturn:
    """Print a sentence, unless another of several processes has said it all, and exit."""
    if processes is None:
        _say(verb, sentence)
        raise SystemExit(code) from error
    if sentence := processes.last_word(sentence):
        _say(verb, sentence)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end would wait for tensors that are on their way between GPUs


def instantiate(parser: ArgumentParser, options: Namespace) -> Namespace:
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
        raise CordaError(reasons[0] if reasons else in_our_words(str(error))) from error


def _say(verb: str, message: str) -> None:
    """Print one sentence on stderr."""
    print(f"corda {'plan' if verb == PLAN_RECIPE else verb}: {shortened(message)}", file=sys.stderr)


def _mendable(error: Exception) -> str | None:
    """The sentence for an error that the user can mend; None for a bug."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, CordaError):
        return str(error)
    if any(sign in str(error) for sign in (*NO_ROOM, "inline_container.cc")):  # the last one is of `torch.save`
        return f"the disk is full or cannot be written ({text})"
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
        return f"out of memory ({text})"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("corda_lora"):
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
