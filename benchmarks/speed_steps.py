"""Where the time of `corda_lora.peft.preprocess_corda` goes.

    python benchmarks/speed_steps.py --model DIR --context FILE [--r 128] [--samples 64]
        [--max_length 2048] [--batch_tokens 16384] [--repeats 3] [--parts stages profile]

- *stages*: seconds and memory of the model's forward pass alone (its blocks: the output head is never computed), then
  with covariances, then of everything. They are medians of runs that alternate, after one of each that does not count.
  A stage costs what it adds to the one before. Beside it is the time that its products alone would take at the rate of
  large products, as in `speed.py`, whose limit is their sum.
- *profile*: one run of each, by a GPU's kernels or a CPU's operators. (A CPU's profile does not tell products of the
  decomposition from the model's: compare it with the stage before.)
- *steps*: seconds and memory with one step taken back at a time. On a CPU only the steps that it has.

Memory is measured as in `speed.py`. Model and context may come from make_llama.py (--size 7b --layers 2 --context FILE
--words 2060).
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import record
import torch
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

    singles, batches = batches_of(1), batches_of(options.batch_tokens)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in singles)
    lines = [f"{tokens} tokens, {len(singles)} samples, {len(batches)} batches, r = {options.r}"]
    rows: dict[str, Any] = {"tokens": tokens}
    runs = {
        "the model's forward alone": partial(forward, model, batches),
        "with covariances": partial(covariances, model, batches),
        **{f"all of it, {mode}": partial(preprocess, model, batches, mode, options.r) for mode in MODES},
    }
    if "stages" in options.parts:
        rows["stages"] = medians(model, runs, options.repeats)
        lines += stages_table(model, rows["stages"], operations(model, tokens, singles))
    if "profile" in options.parts:
        for name, run in runs.items():
            lines += profile_table(model, name, run)
    if "steps" in options.parts:
        rows["steps"] = {}
        for name, size, step_back in steps(options.batch_tokens, model.device):
            sized = batches_of(size)
            runs = {f"{name}, {mode}": partial(preprocess, model, sized, mode, options.r) for mode in MODES}
            with step_back:
                rows["steps"] |= medians(model, runs, options.repeats)
        lines += ["", "| one step taken back | seconds | peak memory (GiB) |", "|---|---:|---:|"]
        lines += [f"| {name} | {s:.3f} | {size / 2**30:.2f} |" for name, (s, size) in rows["steps"].items()]
    record.write(options, rows, lines, options.model)


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


def stages_table(model: PreTrainedModel, times: Mapping[str, tuple[float, int]], work: Mapping[str, int]) -> list[str]:
    """The table of stages. `times`: seconds and bytes of each run; `work`: see `speed.operations`."""
    dtype = next(model.parameters()).dtype
    full = rates(dtype, model.device)
    alone = {stage: n / full["rate_float64" if stage == "decomposition" else "rate"] for stage, n in work.items()}
    lines = ["", "| | seconds | what this stage adds | its products at full rate | peak memory (GiB) |"]
    lines += ["|---|---:|---:|---:|---:|"]
    before = 0.0
    for (name, (seconds, size)), stage in zip(times.items(), [*work, "decomposition"]):  # that of either mode
        cells = [f"{seconds:.3f}", f"{seconds - before:.3f}", f"{alone[stage]:.3f}", f"{size / 2**30:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        before = before if stage == "decomposition" else seconds
    names = str(dtype).removeprefix("torch."), "float64"
    parts = [f"{full[key] / 1e12:.3g} TFLOP/s in {name}" for key, name in zip(("rate", "rate_float64"), names)]
    return [*lines, "", f"Full rate: {parts[0]} (forward, covariances), {parts[1]} (decomposition)."]


def profile_table(model: PreTrainedModel, name: str, run: Run) -> list[str]:
    """Where one run spends its time, after one to warm up: a GPU's kernels, or a CPU's operators without those that
    they call."""
    on_gpu = model.device.type == "cuda"
    measure(model, run)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        seconds, _ = measure(model, run)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [e for e in profiled.key_averages() if e.device_type == kind]
    times = [((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6, e.count, e.key) for e in events]
    busy = f"{'the GPU is busy for' if on_gpu else 'operators take'} {sum(own for own, *_ in times):.3f} s"
    lines = ["", f"**{name}:** {seconds:.3f} s under the profiler; {busy}.", ""]
    lines += [f"| {'kernel' if on_gpu else 'operator'} | calls | seconds |", "|---|---:|---:|"]
    return lines + [
        f"| `{key[:80]}` | {count} | {own:.4f} |" for own, count, key in sorted(times, reverse=True)[:SHOWN]
    ]


def steps(batch_tokens: int, device: torch.device) -> Iterator[tuple[str, int, AbstractContextManager[Any]]]:
    """Name, tokens of a batch, and a context manager that takes the step back."""
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
    """The sum as PyTorch alone can do it without waiting for the device."""
    total = scales.new_zeros(x.shape[1], x.shape[1]) if total is None else total
    for rows, weight in zip(x.split(list(lengths)), scales.square()):
        total.addcmul_(torch.mm(rows.T, rows, out_dtype=torch.float32), weight)
    return total


def medians(model: PreTrainedModel, runs: Mapping[str, Run], repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds and largest peak of each run; they take turns, after one of each that does not count."""
    for run in runs.values():
        measure(model, run)
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            measured[name].append(measure(model, run))
            print(f"{name}: {measured[name][-1][0]:.3f} s, {measured[name][-1][1] / 2**30:.2f} GiB", flush=True)
    return {
        name: (statistics.median(seconds for seconds, _ in pairs), max(size for _, size in pairs))
        for name, pairs in measured.items()
    }


def measure(model: PreTrainedModel, run: Run) -> tuple[float, int]:
    """Seconds and peak bytes of a run. The fields that it left on the layers are removed."""
    synchronize(model.device)
    peak(model.device, begin=True)
    since = time.perf_counter()
    run()
    synchronize(model.device)
    seconds, size = time.perf_counter() - since, peak(model.device)
    clear(model)
    return seconds, size


if __name__ == "__main__":
    main()
