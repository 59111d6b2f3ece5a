"""PEFT's `preprocess_corda` and ours, on the same model, samples and device, in one run: time, memory, error.

    python benchmarks/speed.py --model DIR --context FILE [--r 128] [--samples 64] [--max_length 2048]
        [--batch_tokens 16384] [--modes ipm kpm] [--repeats 3]

- The whole preprocessing is timed, covariances and decomposition, with the model loaded. The methods alternate, after
  one run of each that does not count (for PEFT, a run of one layer). The table has medians. PEFT gets one sample at a
  time, as it demands. On a GPU, ours also runs with the model on the CPU, whose blocks visit the GPU.
- Memory is the peak that PyTorch allocated on the GPU, model included; on a CPU it is the peak of the process.
- The error of a layer is ‖B A − U_S U_Sᵀ W‖ / ‖U_S U_Sᵀ W‖. The answer is computed in float64, for the covariance and
  the λ that the method itself had.
- The limit is the time that the products alone would take at the rate of large products: the forward pass, half of each
  XᵀX (it is symmetric), and for each W the product with C and half of its Gram matrix in float64. Beside it is the time
  to move weights, activations and covariances once each, at the rate of a large copy.
"""

import argparse
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft.tuners.lora.corda as original
import record
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import Tensor, nn

from corda_lora.algebra.decomposition import orient, select
from corda_lora.algebra.solvers import components
from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_of, weight_shape
from corda_lora.peft import preprocess_corda

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT, OURS, VISITING = "PEFT", "corda_lora.peft", "corda_lora.peft, model on the CPU"


def parser_of_work(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of what is preprocessed."""
    parser = record.parser(description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", required=True)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--batch_tokens", type=int, default=16384, help="of a batch of ours")
    return parser


def main() -> None:
    parser = parser_of_work(__doc__)
    parser.add_argument("--modes", nargs="+", default=["ipm", "kpm"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = ModelConfig(options.model)
    tokenizer, model = load_tokenizer(source), load_model(source).to(device)
    samples = load_samples(DataConfig(options.context, samples=options.samples))
    singles, _ = context_batches(tokenizer, samples, options.max_length, batch_tokens=1)
    batches, _ = context_batches(tokenizer, samples, options.max_length, batch_tokens=options.batch_tokens)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in singles)

    def run(name: str, mode: str, keep: bool = False, names: Any = NAMES) -> tuple[float, int]:
        settings = PeftCordaConfig(corda_method=mode, prune_temporary_fields=not keep)
        config = LoraConfig(
            r=options.r, target_modules=names, init_lora_weights="corda", corda_config=settings, lora_alpha=options.r
        )
        preprocess = original.preprocess_corda if name == PEFT else preprocess_corda
        model.to("cpu" if name == VISITING else device)

        def run_model() -> None:
            for batch in singles if name == PEFT else batches:
                if len(batch["input_ids"]) == 1:  # PEFT's users give no mask
                    model(input_ids=batch["input_ids"].to(model.device))
                else:
                    model(**{k: v.to(model.device) for k, v in batch.items()})

        synchronize(device)
        peak(device, begin=True)
        since = time.perf_counter()
        preprocess(model, config, run_model)
        synchronize(device)
        return time.perf_counter() - since, peak(device)

    rows: dict[str, Any] = {"tokens": tokens}
    names = [PEFT, OURS] + [VISITING] * (device.type == "cuda")
    print(f"{tokens} tokens in {len(singles)} samples, {len(batches)} batches of ours", flush=True)
    for mode in options.modes:
        for name in names:  # PEFT's in one layer: its libraries are loaded
            run(name, mode, names=r".*layers\.0\.self_attn\.q_proj" if name == PEFT else NAMES)
            clear(model)
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        accuracy: dict[str, Any] = {}
        for last in [False] * (options.repeats - 1) + [True]:
            for name in names:
                runs[name].append(run(name, mode, keep=last and name == PEFT))  # it holds all covariances anyway
                print(f"{mode} {name}: {runs[name][-1][0]:.2f} s, {runs[name][-1][1] / 2**30:.2f} GiB", flush=True)
                if last and name == PEFT:
                    accuracy[name] = errors(model, mode, options.r, name)
                clear(model)
        run(OURS, mode, keep=True)
        accuracy[OURS] = errors(model, mode, options.r, OURS)
        clear(model)
        rows[mode] = {
            name: {
                "seconds": statistics.median(seconds for seconds, _ in measured),
                "bytes": max(size for _, size in measured),
                "runs": measured,
            }
            for name, measured in runs.items()
        }
        for name in accuracy:
            rows[mode][name] |= accuracy[name]
    rows["limit"] = limit(model.to(device), tokens, singles, device)
    record.write(options, rows, tables(options, rows, names), options.model)


def errors(model: nn.Module, mode: str, r: int, name: str) -> dict[str, Any]:
    """The error of each layer's B A, from its `eigens`; and the λ that the method ended with."""
    relative, dampings = {}, []
    for layer, module in find_targets(model, NAMES).items():
        W, C = weight_of(module), module.covariance_matrix
        dampings.append(damping_of(C) if name == PEFT else 0.01)
        U, sigma = components(W, partial(orient, C=C, orientation="covariance", damping=dampings[-1]))
        U = U[:, select(mode, len(sigma), r)]
        exact = U @ (U.T @ W.double())
        e = module.eigens
        BA = (e.U_WC.double() * e.S_WC.double()) @ e.V_WC.double().T
        relative[layer] = float((BA - exact).norm() / exact.norm())
    values = sorted(relative.values())
    return {
        "error": {"median": statistics.median(values), "worst": values[-1]},
        "damping": max(dampings),
        "errors": relative,
    }


def damping_of(C: Tensor) -> float:
    """λ that PEFT ends with: doubled from 0.01 while its inverse is inaccurate."""
    damping, C = 0.01, C.float()
    while True:
        fixed = C + torch.diag(torch.ones_like(C.diagonal()) * C.diagonal().mean() * damping)
        if torch.dist(fixed @ torch.linalg.inv(fixed), torch.eye(len(C), device=C.device)).item() < 0.05:
            return damping
        damping *= 2


def clear(model: nn.Module) -> None:
    for module in model.modules():
        for field in ("eigens", "covariance_matrix", "sample_count", "corda_method", "rank"):
            module.__dict__.pop(field, None)


def limit(model: nn.Module, tokens: int, singles: list[dict[str, Tensor]], device: torch.device) -> dict[str, float]:
    """Operations of the work's products, and seconds that they take at the rate of large ones."""
    work, on_gpu = operations(model, tokens, singles), device.type == "cuda"
    low, double = work["forward"] + work["covariances"], work["decomposition"]
    shapes, shared = shapes_of(model)
    dtype = next(model.parameters()).dtype
    moved = (sum(m * n for m, n in shapes) + sum(shared) * tokens) * dtype.itemsize + 4 * sum(n * n for n in shared)
    limits = {"operations": low, "operations_float64": double, "bytes": moved}
    limits |= rates(dtype, device) | {"bandwidth": bandwidth(2**31 if on_gpu else 2**29, device)}
    seconds = low / limits["rate"] + double / limits["rate_float64"]
    return limits | {"seconds": seconds, "seconds_moving": moved / limits["bandwidth"]}


def operations(model: nn.Module, tokens: int, singles: list[dict[str, Tensor]]) -> dict[str, int]:
    """Operations of each stage's products: forward and covariances in the model's dtype, decomposition in float64."""
    shapes, shared = shapes_of(model)
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    pairs = sum(batch["input_ids"].shape[1] ** 2 for batch in singles)
    return {
        "forward": 2 * sum(m * n for m, n in shapes) * tokens + 2 * depth * width * pairs,
        "covariances": sum(n * n for n in shared) * tokens,
        "decomposition": sum(
            2 * min(m, n) * n * n + min(m, n) ** 2 * n + (m * n * n if m > n else 0) for m, n in shapes
        ),
    }


def shapes_of(model: nn.Module) -> tuple[list[tuple[int, int]], list[int]]:
    """(m, n) of every layer, and n of every covariance."""
    targets = find_targets(model, NAMES)
    leaders = [m for n, m in targets.items() if n.rpartition(".")[2] not in ("k_proj", "v_proj", "up_proj")]
    return [weight_shape(module) for module in targets.values()], [weight_shape(module)[1] for module in leaders]


def rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """FLOP/s of large products in a dtype and in float64."""
    on_gpu = device.type == "cuda"
    return {
        "rate": rate(8192 if on_gpu else 2048, dtype, device),
        "rate_float64": rate(4096 if on_gpu else 1024, torch.float64, device),
    }


def bandwidth(size: int, device: torch.device) -> float:
    """Bytes a second of a copy, read and written."""
    x = torch.ones(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    synchronize(device)
    since = time.perf_counter()
    for _ in range(5):
        y.copy_(x)
    synchronize(device)
    return 10 * size / (time.perf_counter() - since)


def rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of an (n, n) product."""
    x = torch.randn(n, n, dtype=dtype, device=device)
    for _ in range(3):
        x @ x
    synchronize(device)
    since = time.perf_counter()
    for _ in range(5):
        x @ x
    synchronize(device)
    return 10 * n**3 / (time.perf_counter() - since)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device, begin: bool = False) -> int:
    """Peak bytes since the last call with `begin`."""
    if device.type == "cuda":
        if begin:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if "VmHWM" in line).split()[1])


def tables(options: argparse.Namespace, rows: dict[str, Any], names: list[str]) -> list[str]:
    limit = rows["limit"]
    lines = [f"{rows['tokens']} tokens, {options.samples} samples, r = {options.r}", ""]
    lines += [
        "| mode | | seconds | PEFT / this | peak memory (GiB) | error: median | worst |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for mode in options.modes:
        for name in names:
            row = rows[mode][name]
            ratio = rows[mode][PEFT]["seconds"] / row["seconds"]
            error = [f"{row['error'][k]:.1e}" if "error" in row else "" for k in ("median", "worst")]
            cells = [mode, name, f"{row['seconds']:.2f}", f"{ratio:.1f}", f"{row['bytes'] / 2**30:.2f}", *error]
            lines.append(f"| {' | '.join(cells)} |")
    dampings = {rows[mode][PEFT].get("damping") for mode in options.modes} - {None}
    lines += ["", f"λ: 0.01; PEFT's at most {max(dampings)}" if dampings else ""]
    lines.append(
        f"Limit: {limit['seconds']:.2f} s, for {limit['operations']:.2e} operations at "
        f"{limit['rate'] / 1e12:.3g} TFLOP/s and {limit['operations_float64']:.2e} in float64 at "
        f"{limit['rate_float64'] / 1e12:.3g} TFLOP/s; {limit['seconds_moving']:.3f} s for "
        f"{limit['bytes'] / 1e9:.3g} GB at {limit['bandwidth'] / 1e9:.0f} GB/s"
    )
    return lines


if __name__ == "__main__":
    main()
