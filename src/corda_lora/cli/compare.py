"""`corda compare`: methods beside each other."""

import multiprocessing
import os
import re
import shlex
from pathlib import Path

from jsonargparse import Namespace

from ..config import CompareConfig, CordaError, ModelConfig
from ..config.values import CountOrZero
from .shared import AddVerb, begin_imports, out, take


def add_compare(verb: AddVerb) -> None:
    parser = verb(
        "compare",
        compare,
        "which method learns how much at what cost in forgetting",
        ModelConfig,
        CompareConfig,
        check=None,  # its folder may be a link to another disk
    )
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs and the report")
    parser.add_argument("--jobs", type=CountOrZero, default=1, help="runs at a time, on each GPU; 0: only report")
    parser.add_argument("--gpus", type=str, default="", help="numbers of the GPUs to use, such as 0,1; else all")
    parser.add_argument(
        "--ray", type=str, default="", metavar="ADDRESS", help="run on the nodes of this Ray cluster; auto: this host's"
    )


def compare(options: Namespace) -> None:
    """`corda compare RECIPE --output DIR`: run methods × learning rates × seeds on one model and task, and write
    DIR/report.html: what each method learned, and what it cost of the abilities to keep. A comparison that was broken
    off goes on when the same command is given again; entries, rates and seeds may be added to it."""
    source, config = take(ModelConfig, options), take(CompareConfig, options)
    if options.jobs and not options.ray and "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        # Processes are forked from a server with the same imports (see `compare.preload`): it imports them meanwhile.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        multiprocessing.get_context("forkserver").set_forkserver_preload(["corda_lora.compare.preload"])
        forkserver.ensure_running()
    begin_imports(options)
    from ..compare.runner import compare as run_comparison
    from ..report.report import write_report

    command = shlex.join(["corda", *options.command])
    if not options.jobs:  # a report of what is done: to run it again, it takes the rest
        command = re.sub(r" --jobs[ =]0\b", "", command)
    gpus = [gpu for gpu in options.gpus.split(",") if gpu]
    comparison = run_comparison(source, config, options.output, options.jobs, gpus, command, options.ray)
    write_report(options.output, comparison)
    out.print(f"written to {options.output / 'report.html'}, and report.md, runs.csv, comparison.json beside it")
    runs = comparison["runs"]
    if all(run["status"] in ("failed", "does not fit") for run in runs):
        raise CordaError(f"no run could be done; of {runs[0]['method']}: {runs[0]['why']}")
