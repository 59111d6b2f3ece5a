"""`corda demo`: see that it works."""

from pathlib import Path

from jsonargparse import Namespace

from .shared import AddVerb


def add_demo(verb: AddVerb) -> None:
    parser = verb("demo", demo, "learn without forgetting, on a small real model, in minutes")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where the table and the picture go")


def demo(options: Namespace) -> None:
    """SmolLM2-135M keeps its factual knowledge and learns word problems: CorDA and plain LoRA side by side, from the
    same samples in the same order. Ends with a table and a picture, all computed in this run."""
    from ..demo.run import run_demo

    run_demo(options.output)
