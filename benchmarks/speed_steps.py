"""Where the time of `corda_lora.peft.preprocess_corda` goes.

    python benchmarks/speed_steps.py --model DIR --context FILE --output NAME [--r 128] [--samples 64]
        [--max_length 2048] [--batch_tokens 16384] [--repeats 3] [--parts stages profile]

- *stages*: seconds and memory of the model's forward alone (its blocks: the output head is never computed), with
  covariances, and of all of it; medians of runs that alternate, after one of each that does not count. What a stage
  adds to the one before is what it costs. Beside it, the time that its products alone would take at the rate of large
  ones, as in `speed.py`, whose limit is their sum.
- *profile*: one run of each, by a GPU's kernels or a CPU's operators. (A CPU's profile does not tell products of the
  decomposition from the model's: compare it with the stage before.)
- *steps*: seconds and memory with one step taken back at a time. On a CPU only the steps that there are.

All is printed, and the tables written to NAME.md, as they are found. Memory is as in `speed.py`. Model and context may
come from make_llama.py (--size 7b --layers 2 --context FILE --words 2060).
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from machine import head, setup_of
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from speed import NAMES, clear, operations, parser_of_work, peak, rates, synchronize
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from corda_lora import peft
from corda_lora.algebra import covariance
from corda_lora.algebra.covariance import float32_products
from corda_lora.algebra.solvers import chosen_components
from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.lockstep import find_blocks, lockstep
from corda_lora.models.targets import find_targets

Batches = Sequence[Mapping[str, Tensor]]
Run = Callable[[], None]
MODES = ("ipm", "kpm")
SHOWN = 14  # of a profile


def main() -> None:
    parser = parser_of_work(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=["stages", "profile", "steps"], default=["stages", "profile"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    source = ModelConfig(options.model)
    tokenizer, model = load_tokenizer(source), load_model(source)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    samples = load_samples(DataConfig(options.context, samples=options.samples))

    def batches_of(tokens: int) -> Batches:
        batches, _ = context_batches(tokenizer, samples, options.max_length, tokens)
        return [{k: v.to(model.device) for k, v in batch.items()} for batch in batches]

    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.with_suffix(".md").open("w") as file:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        say(head(options, setup_of("speed_steps.py", options)).rstrip())
        singles, batches = batches_of(1), batches_of(options.batch_tokens)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in singles)
        say(f"\n{tokens} tokens, {len(singles)} samples, {len(batches)} batches, r = {options.r}")
        runs = {
            "the model's forward alone": partial(forward, model, batches),
            "with covariances": partial(covariances, model, batches),
            **{f"all of it, {mode}": partial(preprocess, model, batches, mode, options.r) for mode in MODES},
        }
        if "stages" in options.parts:
            show_stages(model, runs, operations(model, tokens, singles), options.repeats, say)
        if "profile" in options.parts:
            for name, run in runs.items():
                show_profile(model, name, run, say)
        if "steps" in options.parts:
            say("\n| one step taken back | seconds | peak memory (GiB) |\n|---|---:|---:|")
            for name, size, patched in steps(options.batch_tokens, model.device):
                given = batches_of(size)
                runs = {f"{name}, {mode}": partial(preprocess, model, given, mode, options.r) for mode in MODES}
                with patched:
                    found = medians(model, runs, options.repeats)
                for row, (seconds, highest) in found.items():
                    say(f"| {row} | {seconds:.3f} | {highest / 2**30:.2f} |")


def forward(model: PreTrainedModel, batches: Batches) -> None:
    """All batches through the blocks, one block at a time, as the drop-in does it; nothing is collected."""
    blocks = list(find_blocks(model, list(find_targets(model, NAMES))).values())
    for _, run_block in lockstep(model, blocks, [{**batch, "use_cache": False} for batch in batches]):
        run_block()


def covariances(model: PreTrainedModel, batches: Batches) -> None:
    """The drop-in without its decomposition."""

    def forget(names: Sequence[str], C: Tensor, samples: int) -> None:
        pass

    with float32_products("highest"):
        peft.collect(
            model, find_targets(model, NAMES), lambda: [model(**batch) for batch in batches], model.device, forget
        )


def preprocess(model: PreTrainedModel, batches: Batches, mode: str, r: int) -> None:
    settings = CordaConfig(corda_method=mode)
    config = LoraConfig(r=r, target_modules=NAMES, init_lora_weights="corda", corda_config=settings)
    peft.preprocess_corda(model, config, lambda: [model(**batch) for batch in batches])


def show_stages(
    model: PreTrainedModel, runs: Mapping[str, Run], work: Mapping[str, int], repeats: int, say: Callable[[str], None]
) -> None:
    """The table of stages. `work`: see `speed.operations`."""
    dtype = next(model.parameters()).dtype
    full = rates(dtype, model.device)
    alone = {stage: n / full["rate_float64" if stage == "decomposition" else "rate"] for stage, n in work.items()}
    found = medians(model, runs, repeats)
    say("\n| | seconds | what this stage adds | its products at full rate | peak memory (GiB) |")
    say("|---|---:|---:|---:|---:|")
    before = 0.0
    for (name, (seconds, size)), stage in zip(found.items(), [*work, "decomposition"]):  # that of either mode
        cells = [f"{seconds:.3f}", f"{seconds - before:.3f}", f"{alone[stage]:.3f}", f"{size / 2**30:.2f}"]
        say(f"| {name} | {' | '.join(cells)} |")
        before = before if stage == "decomposition" else seconds
    names = str(dtype).removeprefix("torch."), "float64"
    parts = [f"{full[key] / 1e12:.3g} TFLOP/s in {name}" for key, name in zip(("rate", "rate_float64"), names)]
    say(f"\nFull rate: {parts[0]} (forward, covariances), {parts[1]} (decomposition).")


def show_profile(model: PreTrainedModel, name: str, run: Run, say: Callable[[str], None]) -> None:
    """Where one run is, after one to warm up: a GPU's kernels, or a CPU's operators without those that they call."""
    on_gpu = model.device.type == "cuda"
    measure(model, run)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        seconds, _ = measure(model, run)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [e for e in profiled.key_averages() if e.device_type == kind]
    found = [((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6, e.count, e.key) for e in events]
    what = "the GPU is busy for" if on_gpu else "operators take"
    say(f"\n**{name}:** {seconds:.3f} s under the profiler; {what} {sum(s for s, *_ in found):.3f} s.")
    say(f"\n| {'kernel' if on_gpu else 'operator'} | calls | seconds |\n|---|---:|---:|")
    for own, count, key in sorted(found, reverse=True)[:SHOWN]:
        say(f"| `{key[:80]}` | {count} | {own:.4f} |")


def steps(batch_tokens: int, device: torch.device) -> Iterator[tuple[str, int, AbstractContextManager[Any]]]:
    """Name, tokens of a batch, and what takes the step back while it lasts."""
    yield "none", batch_tokens, nullcontext()
    for tokens in (batch_tokens // 8, batch_tokens // 2, batch_tokens * 2):
        yield f"batches of {tokens} tokens", tokens, nullcontext()
    gram = partial(chosen_components, solver="gram")
    yield "all components, by gram", batch_tokens, patch.object(peft, "chosen_components", gram)
    if device.type == "cuda":
        in_torch = patch.object(covariance, "add_gram", a_product_a_sample)
        yield "a product a sample, both triangles", batch_tokens, in_torch
        yield "float32 products, no kernel", batch_tokens, patch.object(covariance, "_kernel", lambda: None)


def a_product_a_sample(total: Any, x: Tensor, lengths: Sequence[int], scales: Tensor) -> Tensor:
    """What PyTorch alone can do without a wait for the device."""
    total = scales.new_zeros(x.shape[1], x.shape[1]) if total is None else total
    for rows, weight in zip(x.split(list(lengths)), scales.square()):
        total.addcmul_(torch.mm(rows.T, rows, out_dtype=torch.float32), weight)
    return total


def medians(model: PreTrainedModel, runs: Mapping[str, Run], repeats: int) -> dict[str, tuple[float, int]]:
    """Median of the seconds and largest peak of each, which take turns after a run that does not count."""
    for run in runs.values():
        measure(model, run)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(measure(model, run))
            print(f"{name}: {found[name][-1][0]:.3f} s, {found[name][-1][1] / 2**30:.2f} GiB", flush=True)
    return {name: (statistics.median(s for s, _ in all_), max(b for _, b in all_)) for name, all_ in found.items()}


def measure(model: PreTrainedModel, run: Run) -> tuple[float, int]:
    """Seconds and peak bytes of a run; what it left on the layers is taken off them."""
    synchronize(model.device)
    peak(model.device, begin=True)
    since = time.perf_counter()
    run()
    synchronize(model.device)
    found = time.perf_counter() - since, peak(model.device)
    clear(model)
    return found


if __name__ == "__main__":
    main()
