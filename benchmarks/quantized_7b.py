"""Time and memory of `corda init --quantization nf4` on a large model, and of a training step over what it made.

    python benchmarks/quantized_7b.py --model DIR --context FILE [--parts init step] [--r 128] [--tokens 512]
        [--steps 5] [--work DIR] [-- corda init flags]

Model and context may come from make_llama.py. *init* runs in a process of its own, and is measured as in init_large.py.
*step* takes a training step with one sample of `--tokens` tokens over the base that init wrote: of the start's adapter,
and of a LoRA of the same rank (QLoRA, whose base would be the NF4 of the whole weight: as large, and as fast). Forward,
backward and AdamW, the median of `--steps` steps after two that do not count, without and with gradient checkpointing.
Memory is what the tensors took (PyTorch's allocator), and what the driver saw of init. The result is written after each
part. (Heavy imports wait for *step*: the peak of init's process would count them.)
"""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
from init_large import WIDE, corda, driver_memory, folder, measure, size_of

FLAGS = "--quantization nf4 --mode ipm --samples 256 --max_length 512 --park cpu"
GIB = 2**30


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--context", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["init", "step"], choices=["init", "step"])
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512, help="of a training step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the start, which stays there; else a temporary one")
    parser.add_argument("flags", nargs="*", help="of `corda init`, after --")
    options = parser.parse_args()
    flags = [*FLAGS.split(), "--r", str(options.r), *options.flags]
    lines: list[str] = []
    rows: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def write() -> None:
        with contextlib.redirect_stdout(None):
            record.write(options, rows, lines, options.model, runs=f"corda init {' '.join(flags)}")

    with folder(options.work) as work:
        if "init" in options.parts:
            rows["init"] = init(options, flags, work, say)
            write()
        if "step" in options.parts:
            rows["step"] = steps(options, work / "start", say)
            write()


def init(options: Any, flags: list[str], work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run `corda init`; what it took."""
    start, log = work / "start", work / "init.log"
    arguments = ["--model", str(options.model), "--context", str(options.context), *flags, "--output", str(start)]
    held = {"work_bytes": 0}

    def sample(_: int) -> None:
        held["work_bytes"] = max(held["work_bytes"], size_of(start.with_name("start.work")))

    with driver_memory() as driver_bytes:
        run = measure(corda("init", *arguments), log, sample, env=WIDE)
    if run["status"] != 0:
        raise SystemExit(f"corda init failed ({run['status']}):\n{log.read_text()[-3000:]}")
    print(log.read_text()[-1500:], flush=True)
    timing, made = (json.loads((start / name).read_text()) for name in ("timing.json", "corda.json"))
    errors = [layer["context_error"] for layer in made["layers"].values()]
    result = {
        "seconds": {"command to adapter": run["seconds"], **timing["seconds"]},
        "peak_accelerator_bytes": timing.get("peak_accelerator_bytes", {}),
        "peak_accelerator_bytes_driver": max(driver_bytes, default=None),
        "peak_resident_bytes": run["peak_resident_bytes"],
        **held,
        "sizes": {"checkpoint": size_of(options.model), "base": size_of(start / "base"), "adapter": size_of(start)},
        "context_error": statistics.median(errors),
    }
    say("| init: stage | seconds |\n|---|---:|")
    for stage, seconds in result["seconds"].items():
        say(f"| {stage} | {seconds:.1f} |")
    say("\n| init: peak memory | GiB |\n|---|---:|")
    for stage, size in result["peak_accelerator_bytes"].items():
        say(f"| accelerator: tensors, {stage} | {size / GIB:.2f} |")
    if driver_bytes:
        say(f"| accelerator: as the driver sees it | {max(driver_bytes) / GIB:.2f} |")
    say(f"| CPU: resident, pages of the checkpoint among it | {run['peak_resident_bytes'] / GIB:.2f} |")
    say("\n| size | GB |\n|---|---:|")
    for name, size in {**result["sizes"], "unfinished work": held["work_bytes"]}.items():
        say(f"| {name} | {size / 1e9:.2f} |")
    say("")
    return result


def steps(options: Any, start: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Training steps over the quantized base: of the start, and of a LoRA."""
    say("| training step over the NF4 base | checkpointing | seconds | peak, GiB |\n|---|---|---:|---:|")
    result: dict[str, Any] = {}
    for name in ("QLoRA", "QCorDA"):
        for checkpointing in (False, True):
            taken = step(options, start, name, checkpointing)
            result[f"{name}{', checkpointing' * checkpointing}"] = taken
            say(
                f"| {name} | {'yes' if checkpointing else 'no'} | {taken['seconds']:.3f} | {taken['bytes'] / GIB:.2f} |"
            )
    return result


def step(options: Any, start: Path, name: str, checkpointing: bool) -> dict[str, float]:
    import peft
    import torch

    from corda_lora import load_adapter
    from corda_lora.config import ModelConfig
    from corda_lora.devices import accelerator, peak_bytes, release_cache, restart_peak, synchronize
    from corda_lora.models.loading import load_model

    device = accelerator()
    gc.collect()  # the model before
    release_cache(device)
    model: Any = load_model(ModelConfig(str(start / "base"))).to(device)
    if name == "QCorDA":
        adapted: Any = load_adapter(model, start, trainable=True)
    else:
        config = peft.LoraConfig(r=options.r, lora_alpha=options.r, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
    adapted.train()
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(3, 32000, (1, options.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    seconds = []
    for number in range(options.steps + 2):
        if number == 2:
            restart_peak(device)
        synchronize(device)
        since = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - since)
    return {"seconds": statistics.median(seconds[2:]), "bytes": float(peak_bytes(device))}


if __name__ == "__main__":
    main()
