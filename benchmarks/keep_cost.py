"""What keeping costs on a model of LLaMA's shape with random bfloat16 weights, which are made on the device.

    python benchmarks/keep_cost.py [--size 7b] [--layers 32] [--parts equal collect train] [--r 128]
        [--batch 8] [--tokens 512] [--samples 64] [--steps 5]

- *equal*: on a small float32 model, C and D block by block are those of one backward, to 1e-4. Prints "equal".
- *collect*: seconds and memory of C alone and of C and D over `--samples` samples of `--tokens` tokens: block by block
  (as in `corda init`), and of the whole model at once (as in `corda train`); then what compact C and D take.
- *train*: the median of `--steps` training steps of `--batch` samples after two that do not count, of a LoRA and of an
  anchored one, without and with the penalty; and the operations that the penalty's time goes to. A step is forward,
  backward and AdamW, in bfloat16 with float32 factors.

Each line is printed when it is known, and the result is written after each part.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import record
import torch
from make_llama import SIZES
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from corda_lora.adapters.lora import lora_layers
from corda_lora.algebra.second_order import compact
from corda_lora.data.batches import Encoded
from corda_lora.devices import accelerator, peak_bytes, release_cache, restart_peak, synchronize
from corda_lora.models.lockstep import parking
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.backward import StepBack, run_back, walk_back
from corda_lora.preprocess.collect import Collector
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.statistics import DIRECTIONS, NAME, Statistics, answered_batches, collect_statistics
from corda_lora.preprocess.walk import Place, walk
from corda_lora.training.keeping import PredictedDrift

GIB = 2**30
SHOWN = 10  # operations of a profile
DEVICE = accelerator()


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="default: the size's")
    parser.add_argument("--parts", nargs="+", default=["equal", "collect", "train"])
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, and of a forward")
    parser.add_argument("--tokens", type=int, default=512, help="of a sample; a quarter of them is its answer")
    parser.add_argument("--samples", type=int, default=64, help="of the context")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    lines: list[str] = []
    rows: dict[str, Any] = {}
    began = time.perf_counter()

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    model: Any = None
    found: Statistics | None = None
    for part in options.parts:
        if part == "equal":
            rows[part] = equal(say)
        else:
            model = model or llama(*SIZES[options.size], layers=options.layers)
        if part == "collect":
            rows[part], found = collect(model, options, say)
        if part == "train":
            found = found or context_statistics(model, samples(16, options.tokens), options)
            rows[part] = train(model, found, options, say)
        say("")
        with contextlib.redirect_stdout(None):
            record.write(options, rows, lines)
    print(f"{time.perf_counter() - began:.0f} s in all")


def llama(hidden: int, inner: int, blocks: int, heads: int, key_heads: int, layers: int | None = None) -> Any:
    """A LLaMA with random weights on the device, scaled as in `make_llama`."""
    blocks = layers or blocks
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=key_heads, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with DEVICE:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * blocks) ** -0.5)
    return model.requires_grad_(False).eval()


def samples(count: int, tokens: int, shorter: int = 0) -> list[Encoded]:
    """Random tokens; the last quarter of a sample is its answer. Lengths fall by up to `shorter`."""
    draw, made = torch.Generator().manual_seed(1), []
    for i in range(count):
        length = tokens - (i % (shorter + 1))
        ids = torch.randint(3, 32000, (length,), generator=draw).tolist()
        made.append(Encoded(ids, [False] * (length - length // 4) + [True] * (length // 4)))
    return made


def equal(say: Callable[[str], None]) -> dict[str, float]:
    """The largest error of block by block, with states parked on the CPU, against one backward; relative to each
    matrix."""
    model = llama(256, 512, 4, 4, 2).float()
    targets, context = find_targets(model, "all-linear"), Context(answered_batches(samples(24, 96, shorter=40), 0))
    exact, result = matrices([run_back(model, targets, context)]), {}
    for where in ("device", "cpu"):
        found = matrices(walk_back(model, targets, context, Place(DEVICE, park=parking(where))))
        assert found.keys() == exact.keys()
        worst = max(float(torch.dist(M.to(exact[key]), exact[key]) / exact[key].norm()) for key, M in found.items())
        verdict = "equal" if worst < 1e-4 else "NOT EQUAL"
        say(f"block by block, states on the {where}: {verdict} to one backward (largest error {worst:.1e})")
        result[where] = worst
    return result


def matrices(steps: Iterable[StepBack]) -> dict[tuple[str, str], Tensor]:
    """C and D of each layer."""
    found = {}
    for step in steps:
        for names, (C,) in step.groups or []:
            for name in names:
                found |= {(name, "C"): C, (name, "D"): step.gradients[name]}
    return found


class Timed:
    """What a `with` block took: seconds, and the most memory on the device while it ran."""

    def __enter__(self) -> "Timed":
        synchronize(DEVICE)
        restart_peak(DEVICE)
        self.since = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        synchronize(DEVICE)
        self.seconds, self.gib = time.perf_counter() - self.since, peak_bytes(DEVICE) / GIB


def context_statistics(model: Any, encoded: Sequence[Encoded], options: Any) -> Statistics:
    targets = find_targets(model, "all-linear")
    return collect_statistics(model, targets, encoded, 0, options.batch * options.tokens, progress=False)


def collect(model: Any, options: Any, say: Callable[[str], None]) -> tuple[dict[str, Any], Statistics]:
    targets, place = find_targets(model, "all-linear"), Place(DEVICE)
    encoded = samples(options.samples, options.tokens)
    context = Context(answered_batches(encoded, 0, options.batch * options.tokens))
    small = Context(context.batches[:1])
    for _ in walk_back(model, targets, small, place):  # kernels are compiled, and libraries begin
        pass
    rows: dict[str, Any] = {}
    say(f"{options.samples} samples of {options.tokens} tokens, {len(context.batches)} batches\n")
    say("| | seconds | times C | peak memory, GiB |\n|---|---:|---:|---:|")

    def row(name: str, took: Timed, to: str | None = None) -> None:
        rows[name] = {"seconds": took.seconds, "peak_gib": took.gib}
        times = f"{took.seconds / rows[to]['seconds']:.2f}" if to else ""
        say(f"| {name} | {took.seconds:.2f} | {times} | {took.gib:.1f} |")

    for _ in range(2):  # the second counts
        release_cache(DEVICE)
        with Timed() as took:
            for _ in walk(model, targets, context, place):
                pass
    row("block by block: C", took)
    for _ in range(2):
        release_cache(DEVICE)
        with Timed() as took:
            for _ in walk_back(model, targets, context, place):
                pass
    row("block by block: C and D", took, "block by block: C")
    collector = Collector(model, targets, context)
    release_cache(DEVICE)
    with Timed() as took, torch.no_grad(), collector.listening():
        for number, batch in enumerate(context.batches):
            collector.start(number)
            model.model(batch["input_ids"].to(DEVICE), batch["attention_mask"].to(DEVICE))
    row("at once: C", took)
    rows["compact_seconds"] = {}
    for _, (C,) in collector.take([name for name in targets if ".layers.0." in name]):
        with Timed() as took:
            compact(C, DIRECTIONS)
        rows["compact_seconds"][len(C)] = took.seconds
    del collector, C
    release_cache(DEVICE)
    with Timed() as took:
        step = run_back(model, targets, context)
    row("at once: C and D", took, "at once: C")
    del step
    release_cache(DEVICE)
    with Timed() as took:
        found = context_statistics(model, encoded, options)
    row("as `corda train` does, made compact", took, "at once: C")
    with tempfile.TemporaryDirectory() as folder, Timed() as took:
        found.save(path := Path(folder) / NAME)
        rows["gib_on_disk"] = path.stat().st_size / GIB
    for n, seconds in rows["compact_seconds"].items():
        say(f"\none matrix of {n} x {n} is made compact in {1e3 * seconds:.0f} ms")
    say(f"\ncompact, on the disk: {rows['gib_on_disk']:.2f} GiB, written in {took.seconds:.1f} s")
    return rows, found


def train(model: Any, found: Statistics, options: Any, say: Callable[[str], None]) -> dict[str, Any]:
    ids = torch.randint(3, 32000, (options.batch, options.tokens), device=DEVICE)
    targets = list(find_targets(model, "all-linear"))
    rows: dict[str, Any] = {}
    say(f"a step of {options.batch} x {options.tokens} tokens, r = {options.r}; checkpointing is of gradients\n")
    say("| adapter | checkpointing | without, ms | with the penalty, ms | more | peak, GiB | peak with, GiB |")
    say("|---|---|---:|---:|---:|---:|---:|")
    for split in ("anchored", "lora"):
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=options.r, target_modules=targets))
        for layer in lora_layers(adapted).values():
            layer.lora_A["default"].weight.requires_grad_(split == "lora")
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-4)
        before = allocated()
        predicted = PredictedDrift(adapted, found)
        rows[split] = {"gib_of_statistics": allocated() - before}
        for checkpointing in ("off", "on"):
            if checkpointing == "on":
                adapted.gradient_checkpointing_enable({"use_reentrant": False})
            free, free_gib = steps(adapted, ids, None, options.steps)
            kept, kept_gib = steps(adapted, ids, predicted, options.steps)
            rows[split][checkpointing] = {"seconds": [free, kept], "peak_gib": [free_gib, kept_gib]}
            say(
                f"| {split} | {checkpointing} | {1e3 * free:.1f} | {1e3 * kept:.1f} | "
                f"{100 * (kept / free - 1):.1f} % | {free_gib:.1f} | {kept_gib:.1f} |"
            )
        rows[split]["profile"] = profiled(predicted)
        adapted.gradient_checkpointing_disable()
        model = adapted.unload()
        del predicted, adapted
    for split, row in rows.items():
        say(f"\n{split}: C and D take {row['gib_of_statistics']:.2f} GiB beside the model. The penalty by operation:\n")
        say("| operation | ms | calls |\n|---|---:|---:|")
        for name, seconds, calls in row["profile"]:
            say(f"| `{name}` | {1e3 * seconds:.2f} | {calls:.0f} |")
    return rows


def allocated() -> float:
    """GiB of tensors on a CUDA device; 0 on others."""
    return torch.cuda.memory_allocated() / GIB if DEVICE.type == "cuda" else 0.0


def steps(adapted: Any, ids: Tensor, term: PredictedDrift | None, count: int) -> tuple[float, float]:
    """The median seconds of a training step, and the peak memory in GiB."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-6, fused=True)
    adapted.train()
    release_cache(
        DEVICE
    )  # before all steps and not in between: memory that is asked for anew takes longer than the rest
    taken = []
    for _ in range(2 + count):
        with Timed() as took:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            if term is not None:
                (10 * term()).backward()
            optimizer.step()
            optimizer.zero_grad()
        taken.append(took)
    counted = taken[2:]
    return statistics.median(t.seconds for t in counted), max(t.gib for t in counted)


def profiled(term: PredictedDrift) -> list[tuple[str, float, float]]:
    """The penalty with its gradient: the operations that take longest, their seconds and how often they are called."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    (10 * term()).backward()
    synchronize(DEVICE)
    with profile(activities=activities) as run:
        for _ in range(3):
            (10 * term()).backward()
        synchronize(DEVICE)
    key = f"self_{'cpu' if DEVICE.type == 'cpu' else 'device'}_time_total"  # µs
    events = sorted(run.key_averages(), key=lambda event: -getattr(event, key))[:SHOWN]
    return [(event.key[:70], getattr(event, key) / 3e6, event.count / 3) for event in events]


if __name__ == "__main__":
    main()
