"""Where `corda init` spends its time, alone and in several processes, step by step: what timing.json sums up.

    python benchmarks/share_profile.py WORK [--mode ipm] [--runs 2]
    torchrun --nproc-per-node 2 benchmarks/share_profile.py WORK ...

WORK has the model and the data that `two_gpus.py --work WORK` has made there. The start is prepared `--runs` times in
the same process, so the second run shows what the first pays once. A line is one kind of step: how often, seconds of
the host in all, at first and at most; and of the GPU, where it has something to do.
"""

import argparse
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from corda_lora.adapters.prepare import prepare
from corda_lora.config import CordaConfig, DataConfig, ModelConfig
from corda_lora.models import lockstep
from corda_lora.preprocess import collect, pipeline, share, walk, warm
from corda_lora.processes import Processes, joined, number_of_processes

host: dict[str, list[float]] = defaultdict(list)
device: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
laps: dict[str, list[float]] = defaultdict(list)


@contextmanager
def timed(label: str, on_gpu: bool = False) -> Iterator[None]:
    """Note the seconds of a `with` block, and those between its ends on the GPU's stream."""
    events = None
    if on_gpu and torch.cuda.is_available() and threading.current_thread() is threading.main_thread():
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
    since = time.perf_counter()
    yield
    host[label].append(time.perf_counter() - since)
    if events:
        events[1].record()
        device[label].append(events)


def watch(owner: Any, name: str, label: str, on_gpu: bool = False) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any, **options: Any) -> Any:
        with timed(label, on_gpu):
            return inner(*args, **options)

    setattr(owner, name, outer)


def watch_entering(owner: Any, name: str, label: str) -> None:
    """The seconds that a context manager takes to be entered."""
    inner = getattr(owner, name)

    @contextmanager
    def outer(*args: Any, **options: Any) -> Iterator[Any]:
        manager = inner(*args, **options)
        with timed(label, on_gpu=True):
            entered = manager.__enter__()
        try:
            yield entered
        finally:
            manager.__exit__(None, None, None)

    setattr(owner, name, outer)


def watch_blocks() -> None:
    """The seconds until all batches stand at the first block, and of launching all batches through each."""
    inner = walk.lockstep

    def timed_run(run: Callable[[], None]) -> Callable[[], None]:
        def outer() -> None:
            with timed("run: launch all batches", on_gpu=True):
                run()

        return outer

    def outer(*args: Any, **options: Any) -> Iterator[Any]:
        steps = inner(*args, **options)
        with timed("embeddings: all batches to block 0", on_gpu=True):
            first = next(steps)
        yield first[0], timed_run(first[1])
        for block, run in steps:
            yield block, timed_run(run)

    walk.lockstep = outer  # type: ignore[assignment]


def watch_laps() -> None:
    inner = pipeline._Clock.lap

    def outer(clock: Any, stage: str) -> None:
        since = clock.since
        inner(clock, stage)
        laps[stage].append(clock.since - since)

    pipeline._Clock.lap = outer  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mode", default="ipm")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    watch(Processes, "gather", "gather")
    watch(Processes, "hand_on", "hand_on", on_gpu=True)
    watch(share.Share, "sum_to", "sum_to", on_gpu=True)
    watch(collect.Collector, "_check_finite", "check_finite (waits for the forward)")
    watch(collect.Collector, "take", "take, all of it")
    watch(collect.Covariance, "mean", "mean", on_gpu=True)
    watch(pipeline, "synchronize", "lap: synchronize")
    watch(pipeline, "release_cache", "lap: release_cache")
    watch(warm, "_work", "thread: make warm")
    watch(warm, "_run_first_blocks", "thread: run the first blocks")
    watch(pipeline, "choose_targets", "in no stage: choose_targets")
    watch(pipeline, "check_context", "in no stage: check_context")
    watch(pipeline, "_digests", "in no stage: _digests")
    watch(pipeline, "_ranks_of_all", "factors: _ranks_of_all")
    watch(pipeline, "_start", "factors: _start")
    watch(torch.Tensor, "pin_memory", "thread: read and pin")
    watch_entering(walk, "on_device", "what is beside the blocks, to device")
    watch_entering(lockstep, "on_device", "block to device (wait for reading, copy, hand on)")
    watch_blocks()
    watch_laps()
    if number_of_processes() == 1:
        profile(options, None)
        return
    with joined() as processes:
        processes.meet(print)
        profile(options, processes)
    os._exit(0)  # tensors may be on their way


def profile(options: argparse.Namespace, processes: Processes | None) -> None:
    rank, size = (processes.rank, processes.size) if processes else (0, 1)
    config = CordaConfig(mode=options.mode, r=options.rank)
    data = DataConfig(str(options.work / "long.jsonl"), samples=options.samples, max_length=512)
    for run in range(options.runs):
        for notes in (host, device, laps):
            notes.clear()
        output = options.work / f"profiled-{run}"
        if rank == 0:
            for folder in (output, output.with_name(f"{output.name}.work")):
                shutil.rmtree(folder, ignore_errors=True)
        if processes:
            processes.waited = 0.0
            processes.gather(None)
        since, model = time.perf_counter(), ModelConfig(str(options.work / "model"))
        start = prepare(model, config, data, output, batch_tokens=16384, progress=False, processes=processes)
        whole = time.perf_counter() - since
        for turn in range(size):
            if turn == rank:
                say(f"run {run}, process {rank}: {whole:.2f} s", start.took["seconds"])
            if processes:
                processes.gather(None)


def say(title: str, seconds: dict[str, float]) -> None:
    rest = seconds["all"] - sum(took for stage, took in seconds.items() if stage not in ("all", "waiting"))
    spent = seconds | {"in no stage": rest}
    print(f"\n=== {title}; " + ", ".join(f"{stage} {took:.2f}" for stage, took in spent.items()))
    for label, took in host.items():
        line = f"  {label}: {len(took)} x, {sum(took):.2f} s, first {took[0]:.3f}, max {max(took):.3f}"
        on_gpu = [first.elapsed_time(last) / 1e3 for first, last in device.get(label, [])]
        print(line + (f"; GPU {sum(on_gpu):.2f}, first {on_gpu[0]:.3f}" if on_gpu else ""))
    for stage, took in laps.items():
        first = " ".join(f"{lap:.3f}" for lap in took[:6])
        print(f"  laps of {stage}: {len(took)}; {first} ... sum {sum(took):.2f}", flush=True)


if __name__ == "__main__":
    main()
