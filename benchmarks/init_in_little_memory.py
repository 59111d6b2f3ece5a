"""`corda init` of a checkpoint larger than the memory it may use, on the CPU.

    python benchmarks/init_in_little_memory.py --model DIR --context FILE --limit_gb 1.0
        [--samples 32] [--max_length 512] [--threads 2] [-- corda init flags]

The limit is the kernel's, on the private writable memory of a process (RLIMIT_DATA): above it the process gets no
memory, and the run ends with an error. The limit also counts memory that is reserved and never touched, such as the
stacks of threads, and each open shard of the checkpoint, whole. So write the checkpoint with small shards
(make_llama.py --shard_gb 0.005). Pages of files are in the resident memory, but not in the limit: the system can drop
them. The limited memory is sampled ten times a second, so its true peak may be a little higher.
Exits with 1 if `corda init` fails; the result is written all the same.
"""

import resource
import subprocess
import sys
from pathlib import Path

import record
from init_large import WIDE, corda, folder, measure, size_of

FLAGS = "--mode kpm --preset corda++ --rounds 2 --r 32"
# Allocators that reserve little more than they give out (Arrow's own reserves 1 GB when it is imported), and no GPU.
ALLOCATORS = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144", "ARROW_DEFAULT_MEMORY_POOL": "system"}
ENVIRONMENT = {**ALLOCATORS, "CUDA_VISIBLE_DEVICES": ""}
BARE = """
import datasets, corda_lora.cli, corda_lora.adapters.lora
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")])
"""


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--context", type=Path, required=True)
    parser.add_argument("--limit_gb", type=float, required=True)
    parser.add_argument("--samples", type=int, default=32, help="of each of the two rounds")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("flags", nargs="*", help="of `corda init`, after --")
    options = parser.parse_args()
    limit = int(options.limit_gb * 1e9)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(options.threads))
    environment = {**WIDE, **ENVIRONMENT, **threads}
    bare = int(subprocess.check_output([sys.executable, "-c", BARE], env=environment, text=True)) * 1024
    flags = [*FLAGS.split(), "--samples", str(options.samples), "--max_length", str(options.max_length), *options.flags]
    peaks = {"VmData": 0, "RssAnon": 0}

    def sample(process: int) -> None:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:  # it has ended
            return
        for line in status.splitlines():
            key, _, value = line.partition(":")
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)

    with folder(None) as work:
        command = ["--model", str(options.model), "--context", str(options.context), *flags]
        run = measure(
            corda("init", *command, "--output", str(work / "start")),
            work / "init.log",
            sample,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        log = (work / "init.log").read_text().strip()
        finished = run["status"] == 0 and (work / "start" / "adapter_model.safetensors").is_file()
    print(log[-3000:])
    rows = {
        "checkpoint_bytes": size_of(options.model),
        "limit_bytes": limit,
        "bare_bytes": bare,
        "finished": finished,
        "peak_limited_bytes": peaks["VmData"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        **run,
        "why": "" if finished else reason(run["status"], log),
    }
    table = {
        "checkpoint": "checkpoint_bytes",
        "limit": "limit_bytes",
        "peak of the limited memory": "peak_limited_bytes",
        "the same of a process that only imports the packages": "bare_bytes",
        "peak resident, without pages of files": "peak_anonymous_bytes",
        "peak resident": "peak_resident_bytes",
    }
    lines = ["| | GB |", "|---|---:|"]
    lines += [f"| {name} | {rows[key] / 1e9:.2f} |" for name, key in table.items()]
    end = "Finished" if finished else f"Did not finish ({rows['why']})"
    lines += ["", f"{end}, {run['seconds']:.0f} s."]
    record.write(options, rows, lines, options.model, runs=f"corda init {' '.join(flags)}")
    raise SystemExit(0 if finished else 1)


def reason(status: int, log: str) -> str:
    """Why a run ended early: the signal, or the last line that it wrote."""
    return f"ended by signal {-status}" if status < 0 else (log.splitlines() or ["it printed nothing"])[-1]


if __name__ == "__main__":
    main()
