"""Time and memory of `corda init` with everything on a large model: corda++ of rank 128, five rounds of 256 samples.

    python benchmarks/init_large.py --model DIR --context FILE [--work DIR] [-- corda init flags]

Model and context may come from make_llama.py. The seconds are from the command to the adapter on disk, in a process of
its own. The accelerator's memory is measured twice: what the tensors took (PyTorch's allocator) and what the driver saw
(nvidia-smi, with the CUDA context). Resident memory counts pages of the checkpoint that the system maps and may drop.
`fall of available memory` is that of the whole machine: it does not count these pages, and counts pinned memory. Flags
after `--` go to `corda init` and win over the script's. The result also has what `corda plan` says of the same run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import record

FLAGS = "--mode kpm --preset corda++ --r 128 --rounds 5 --samples 256 --max_length 512 --park cpu"
WIDE = {**os.environ, "COLUMNS": "120"}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--context", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for the adapter, which stays there; else a temporary one")
    parser.add_argument("--no_plan", action="store_true", help="leave `corda plan` out")
    parser.add_argument("flags", nargs="*", help="of `corda init`, after --")
    options = parser.parse_args()
    flags = [*FLAGS.split(), *options.flags]
    arguments = ["--model", str(options.model), "--context", str(options.context), *flags]
    with folder(options.work) as work:
        start, log = work / "start", work / "init.log"
        if start.exists() or start.with_name("start.work").exists():
            raise SystemExit(f"there is a start in {work} already, whole or unfinished: remove it")
        before = psutil.virtual_memory().available
        peaks = {"fall_of_available_bytes": 0, "work_bytes": 0}

        def sample(_: int) -> None:
            peaks["fall_of_available_bytes"] = max(
                peaks["fall_of_available_bytes"], before - psutil.virtual_memory().available
            )
            peaks["work_bytes"] = max(peaks["work_bytes"], size_of(start.with_name("start.work")))

        with driver_memory() as driver_bytes:
            run = measure(corda("init", *arguments, "--output", str(start)), log, sample, env=WIDE)
        if run["status"] != 0:
            raise SystemExit(f"corda init failed ({run['status']}):\n{log.read_text()[-3000:]}")
        print(log.read_text())
        timing, recorded = (json.loads((start / name).read_text()) for name in ("timing.json", "corda.json"))
        sizes = {"checkpoint": size_of(options.model), "adapter directory": size_of(start)}
        sizes |= {path.name: path.stat().st_size for path in sorted(start.iterdir())}
    plan = None if options.no_plan else plan_of(arguments)
    rows = {
        "seconds": {"command to adapter": run["seconds"], **timing["seconds"]},
        "peak_accelerator_bytes": timing.get("peak_accelerator_bytes"),
        "peak_accelerator_bytes_driver": max(driver_bytes, default=None),
        "peak_resident_bytes": run["peak_resident_bytes"],
        **peaks,
        "device": timing.get("device"),
        "totals": recorded.get("totals"),
        "context": recorded.get("context"),
        "sizes": sizes,
        "plan": plan,
    }
    memory = {
        **{
            f"accelerator, GiB: tensors, {stage}": (size, 2**30)
            for stage, size in (rows["peak_accelerator_bytes"] or {}).items()
        },
        "accelerator, GiB: as the driver sees it": (rows["peak_accelerator_bytes_driver"], 2**30),
        "CPU, GB: resident": (rows["peak_resident_bytes"], 1e9),
        "CPU, GB: fall of available memory": (rows["fall_of_available_bytes"], 1e9),
        "disk, GB: unfinished work": (rows["work_bytes"], 1e9),
    }
    lines = ["| stage | seconds |", "|---|---:|"]
    lines += [f"| {stage} | {seconds:.1f} |" for stage, seconds in rows["seconds"].items()]
    lines += ["", "`all` is the time in `preprocess`, and the stages after it are its parts.", ""]
    lines += ["| peak memory | |", "|---|---:|"]
    lines += [f"| {name} | {value / unit:.2f} |" for name, (value, unit) in memory.items() if value is not None]
    lines += ["", "| size | GB |", "|---|---:|"]
    lines += [f"| {name} | {size / 1e9:.3f} |" for name, size in sizes.items() if size > 5e5]
    lines += ["", "Totals: " + json.dumps(rows["totals"]), "", "Context: " + json.dumps(rows["context"])]
    if plan:
        lines += ["", "`corda plan` of the same run:", "", "```", plan, "```"]
    record.write(options, rows, lines, options.model, runs=f"corda init {' '.join(flags)}")


def corda(verb: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "corda_lora.cli", verb, *flags]


def plan_of(flags: Sequence[str]) -> str | None:
    """What `corda plan` prints of a `corda init`; None where there is no such verb, or it fails."""
    done = subprocess.run(corda("plan", *flags), capture_output=True, text=True, env=WIDE)
    if done.returncode != 0:
        print(f"no plan: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return done.stdout.strip()


def measure(command: Sequence[str], log: Path, sample: Callable[[int], None], **how: Any) -> dict[str, Any]:
    """Run a command whose output goes into `log`, and call `sample` with its process id now and then.

    Returns {"seconds", "peak_resident_bytes", "status"}; the status is negative if a signal ended it. (The peak that
    Linux tells is at least this process's own when it starts the command, so nothing large is imported before.)
    """
    done = threading.Event()
    since = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **how)

    def watch() -> None:
        while not done.wait(0.1):
            sample(process.pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - since
    done.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    return {"seconds": seconds, "peak_resident_bytes": usage.ru_maxrss * 1024, "status": process.returncode}


@contextmanager
def driver_memory() -> Iterator[list[int]]:
    """Bytes in use of the first GPU that may be used, twice a second, by its driver; none without nvidia-smi."""
    seen: list[int] = []
    if shutil.which("nvidia-smi") is None:
        yield seen
        return
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "500"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def read() -> None:
        assert process.stdout is not None
        seen.extend(int(line) * 2**20 for line in process.stdout if line.strip().isdigit())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield seen
    finally:
        process.terminate()
        process.wait()
        reader.join()


@contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """The folder to work in, or a temporary one."""
    if path is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path


def size_of(path: Path) -> int:
    """Bytes of a folder's files; files that go while they are counted do not count."""
    total = 0
    for file in path.iterdir() if path.is_dir() else ():
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


if __name__ == "__main__":
    main()
