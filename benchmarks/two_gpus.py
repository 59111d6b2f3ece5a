"""`corda init` and `corda train` on one GPU and on two of one host, one after the other, on a model of LLaMA's shape.

    python benchmarks/two_gpus.py [--parts corda++ ipm kpm train] [--size 7b] [--layers 32] [--work DIR] [--gpus 2]

Each part but *train* is at most 5 minutes on two H200s; the result is written after each run, so a part that is cut off
loses one run. Parts that are run by several calls need a --name each: a result replaces one of its name and day. The
first run on a fresh machine is slower than later ones. Model and data are made first, if they are not in `--work`
already (random bfloat16 weights, see make_llama.py).

- *corda++*, *ipm*, *kpm*: seconds from the command to the adapter, by torchrun where there are several processes; where
  they go, in the process that took longest; how near the adapters are. The stages and their sum, `all`, are those of
  `preprocess`; `waiting`, for the other processes, is in them.
- *train*: `--steps` steps with the penalty, FSDP 2 by `accelerate launch` against one GPU, in float32 and in bfloat16:
  how near the adapters are, and, for a yardstick, those of one GPU that takes a step at once and in parts (rounding
  alone); how long the training takes, with what the meter measures.

Without a GPU processes stand for GPUs, and DDP for FSDP: to try the script with `--size tiny`.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import record
import torch
from init_large import folder, measure
from make_llama import SIZES, WORDS
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PARTS = {
    "corda++": "--mode kpm --preset corda++ --r 128 --rounds 5 --samples 256 --max_length 512 --park cpu",
    "ipm": "--mode ipm --r 128 --samples 256 --max_length 512 --batch_tokens 16384",
    "kpm": "--mode kpm --r 128 --samples 256 --max_length 512 --batch_tokens 16384",
}
START = "--mode kpm --r 32 --keep 10 --orientation covariance --samples 64 --max_length 256"  # as in the results
BATCH = 8
TRAIN = (
    f"--learning_rate 1e-3 --batch_size {BATCH} --max_length 256 --checkpoints 0"  # small steps: rounding stays small
)
ENGINE = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: {gpus}
machine_rank: 0
mixed_precision: {precision}
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
  fsdp_offload_params: false
"""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # of `corda train`, by the dtype of the model
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "train"], default=[*PARTS, "train"])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="default: the size's")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], help="of the part train")
    parser.add_argument("--work", type=Path, help="folder for the model and the adapters; else a temporary one")
    options = parser.parse_args()
    if torch.cuda.is_available() and torch.cuda.device_count() < options.gpus:
        raise SystemExit(f"{options.gpus} GPUs are needed, and there are {torch.cuda.device_count()}")
    lines: list[str] = []
    rows: dict[str, Any] = {}

    def say(line: str, **row: Any) -> None:
        print(line, flush=True)
        lines.append(line)
        if row:
            rows.update(row)
            with redirect_stdout(StringIO()):  # of all that was printed before
                record.write(options, rows, lines, model)

    with folder(options.work) as work:
        model = made(work, options)
        for part in options.parts:
            (train if part == "train" else init)(part, work, options, say)


def made(work: Path, options: Any) -> Path:
    """The model's folder, with a tokenizer of letters, and files of data beside it."""
    model, since = work / "model", time.perf_counter()
    if not (model / "tokenizer.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        script = Path(__file__).with_name("make_llama.py")
        flags = ["--output", str(model), "--size", options.size]
        flags += ["--layers", str(options.layers)] if options.layers else []
        subprocess.run([sys.executable, str(script), *flags], check=True)
        raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?", *LETTERS])}, unk_token="?"))
        raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        draw = random.Random(0)
        words = ["".join(draw.choices(LETTERS[:-1], k=draw.randint(3, 9))) for _ in range(WORDS // 100)]
        for name, (prompt, response) in {"long": (70, 20), "known": (20, 10), "new": (20, 10)}.items():
            texts = ({"prompt": prompt, "response": response} for _ in range(2000))
            made = [{key: " ".join(draw.choices(words, k=k)) for key, k in text.items()} for text in texts]
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", eos_token="?").save_pretrained(model)
    for file in model.iterdir():  # into the system's cache, for the first run as for the others
        with open(file, "rb") as opened:
            while opened.read(1 << 26):
                pass
    print(f"model and data: {time.perf_counter() - since:.0f} s", flush=True)
    return model


def init(part: str, work: Path, options: Any, say: Callable[..., None]) -> None:
    seconds, prepared = dict[int, float](), dict[int, float]()
    for gpus in (1, options.gpus):
        output = work / f"start-{gpus}"
        data = ["--model", str(work / "model"), "--context", str(work / "long.jsonl")]
        seconds[gpus] = ran(["init", *data, *PARTS[part].split()], output, gpus, torchrun)
        timing = json.loads((output / "timing.json").read_text())
        each = timing.get("processes", [timing["seconds"]])
        prepared[gpus] = timing["seconds"]["all"]
        longest = max(each, key=lambda stages: stages["all"] - stages.get("waiting", 0))
        spent = ", ".join(f"{stage} {took:.1f}" for stage, took in longest.items())
        row = {"seconds": seconds[gpus], "processes": each, "peaks": timing.get("peak_accelerator_bytes")}
        say(f"- {part}, {gpus} GPU: {seconds[gpus]:.1f} s; {spent}", **{f"{part} {gpus}": row})
    records = [json.loads((work / f"start-{gpus}" / "corda.json").read_text()) for gpus in seconds]
    first, second = (sorted(layer["leak"] for layer in made["layers"].values()) for made in records)
    apart = max(abs(a - b) / abs(a) for a, b in zip(first, second))
    shares = [made["totals"]["energy_share"] for made in records]
    ratio, of_all = (took[1] / took[options.gpus] for took in (prepared, seconds))
    say(f"- {part}: prepared {ratio:.2f} times as fast, and {of_all:.2f} times from command to adapter")
    say(
        f"- {part}: leaks of layers differ by {apart:.1e} at most, energy shares {shares}\n",
        **{f"{part} times as fast": ratio, f"{part} from command to adapter": of_all, f"{part} apart": apart},
    )


def train(part: str, work: Path, options: Any, say: Callable[..., None]) -> None:
    model = ["--model", str(work / "model")]
    for dtype in options.dtypes:
        precision, start = PRECISIONS[dtype], work / f"start-{dtype}"
        context = ["--context", str(work / "known.jsonl"), "--dtype", dtype]
        took = ran(["init", *model, *context, *START.split()], start, options.gpus, torchrun)
        say(f"- the start in {dtype}, with D, on {options.gpus} GPUs: {took:.1f} s")
        flags = [*TRAIN.split(), "--max_steps", str(options.steps), "--dtype", dtype, "--precision", precision]
        flags += ["--start", str(start), "--data", str(work / "new.jsonl")]
        outputs = {gpus: work / f"tuned-{dtype}-{gpus}" for gpus in (1, options.gpus)}
        for gpus, output in outputs.items():
            command = ran(
                ["train", *model, *flags], output, gpus, accelerate if torch.cuda.is_available() else torchrun
            )
            made = json.loads((output / "training.json").read_text())
            say(
                f"- {options.steps} steps in {dtype}, {gpus} GPU: {made['seconds']:.1f} s of training, {command:.1f} s "
                f"in all; loss {made['train_loss']:.6f}, drift {made['drift'][-1][1]:.4e} predicted",
                **{f"train {dtype} {gpus}": {"seconds": command, **made}},
            )
        one, many = outputs.values()
        apart = distance(start, one, many)
        say(f"- the adapters in {dtype} are {apart:.1e} of their way from the start apart", **{f"apart {dtype}": apart})
        halves = work / f"tuned-{dtype}-halves"
        half = max(1, BATCH // options.gpus)  # samples of a forward, as in each process above
        ran(["train", *model, *flags, "--micro_batch_size", str(half)], halves, 1, torchrun)
        apart = distance(start, one, halves)
        say(f"- by rounding alone (1 GPU, {half} samples a forward): {apart:.1e}", **{f"rounding {dtype}": apart})


def distance(start: Path, one: Path, other: Path) -> float:
    """How far two adapters from one start are apart, as a share of the way of the first."""
    before, here, there = (load_file(folder / "adapter_model.safetensors") for folder in (start, one, other))
    way = sum(float((here[name] - before[name]).square().sum()) for name in here) ** 0.5
    return sum(float((here[name] - there[name]).square().sum()) for name in here) ** 0.5 / way


def ran(arguments: Sequence[str], output: Path, gpus: int, launch: Callable[[int, Path, str], list[str]]) -> float:
    """The seconds that `corda` took with the arguments, in as many processes as GPUs. A failure ends the benchmark."""
    for place in (output, output.with_name(output.name + ".work")):
        shutil.rmtree(place, ignore_errors=True)
    precision = "bf16" if "bf16" in arguments else "no"
    launcher = launch(gpus, output.parent, precision) if gpus > 1 else [sys.executable, "-m", "corda_lora"]
    environment = {**os.environ, "COLUMNS": "120"} | ({"CUDA_VISIBLE_DEVICES": "0"} if gpus == 1 else {})
    log = output.with_suffix(".log")
    run = measure([*launcher, *arguments, "--output", str(output)], log, lambda _: None, env=environment)
    if run["status"] != 0:
        raise SystemExit(f"{' '.join(arguments)} failed ({run['status']}):\n{log.read_text()[-4000:]}")
    return float(run["seconds"])


def torchrun(gpus: int, *_: Any) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    return [*command, "-m", "corda_lora", "--"]


def accelerate(gpus: int, work: Path, precision: str) -> list[str]:
    config = work / "engine.yaml"
    config.write_text(ENGINE.format(gpus=gpus, precision=f"'{precision}'"))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "corda_lora"]


if __name__ == "__main__":
    main()
