"""Several comparisons at a time on the GPUs of one machine, each on one GPU, from a queue.

    python benchmarks/sweeps.py --output OUTPUT --slots 0:4 0:4 1:6 -- quantized ablations mixture

A slot GPU:JOBS takes the next recipe (a name in `recipes/`, or a file) and runs its comparison on that GPU, JOBS runs
at a time, then the one after. OUTPUT has a folder and a log for each. Run it from a folder with `data/` and `model/`.
What is committed of a comparison is restored first and not run again (see `restore_runs.py`); --without COMMIT leaves
out the runs of a commit. The same command goes on where it was broken off.

As many processes fit a GPU as its memory holds: SmolLM2 takes some 10 GB at a micro_batch_size of 16, and 15 GB at 32.
The slots share the GPUs through CUDA's MPS, whose daemon is started if it is there. There, a process that finds no
memory left can end all the others on its GPU: leave a tenth free, and let nothing else compute there that grows
(decoding_ranks.py takes 43 GB). A process computes with one thread.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import restore_runs

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--slots", nargs="+", required=True, metavar="GPU:JOBS")
    parser.add_argument("--without", nargs="*", default=[], metavar="COMMIT", help="whose runs are not restored")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **shared_gpus(options.output)}
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for name in options.recipes:
        waiting.put(Path(name) if name.endswith(".yaml") else HERE / "recipes" / f"{name}.yaml")

    def serve(gpu: str, jobs: str) -> None:
        while True:
            try:
                recipe = waiting.get_nowait()
            except queue.Empty:
                return
            compare(recipe, options.output / recipe.stem, gpu, jobs, environment, options.without)

    threads = [threading.Thread(target=serve, args=slot.split(":")) for slot in options.slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shared_gpus(output: Path) -> dict[str, str]:
    """Start the daemon of MPS: what its clients have to know."""
    daemon = shutil.which("nvidia-cuda-mps-control")
    if daemon is None:
        return {}
    known = {"CUDA_MPS_PIPE_DIRECTORY": str((output / "mps").resolve())}
    Path(known["CUDA_MPS_PIPE_DIRECTORY"]).mkdir(exist_ok=True)
    alone = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}  # it would renumber
    subprocess.run([daemon, "-d"], env={**alone, **known, "CUDA_MPS_LOG_DIRECTORY": str(output.resolve())})
    return known


def compare(recipe: Path, output: Path, gpu: str, jobs: str, environment: dict[str, str], without: list[str]) -> None:
    command = [sys.executable, "-m", "corda_lora", "compare", str(recipe), "--output", str(output), "--gpus", gpu]
    with open(output.with_suffix(".log"), "a") as log:
        done = sorted((HERE / "results").glob(f"{recipe.stem}_20*/comparison.json"))
        if done and not output.exists():
            # The recipe is written by the command, as its form may be newer than that of the runs.
            subprocess.run([*command, "--jobs", "0"], env=environment, stdout=log, stderr=subprocess.STDOUT)
            entries = json.loads((output / "recipe.json").read_text())["entries"]
            restore_runs.restore_runs(done[-1], output, without, entries)
        print(f"{time.strftime('%X')} {recipe.stem} begins on GPU {gpu}, {jobs} at a time", flush=True)
        status = subprocess.run([*command, "--jobs", jobs], env=environment, stdout=log, stderr=subprocess.STDOUT)
    print(f"{time.strftime('%X')} {recipe.stem} ends with exit code {status.returncode}", flush=True)


if __name__ == "__main__":
    main()
