"""What quantization to NF4 costs before any training, by the start of the adapter beside it.

    python benchmarks/quantization_error.py --model MODEL --data DATA

MODEL is a directory of SmolLM2-135M-Instruct, DATA the folder that `prepare_data.py` makes. Every linear layer but the
output head is in bitsandbytes' NF4, with an adapter of rank r in full precision beside it. C and D are of samples of
GSM8K's training split.

The error of a layer is ‖W − (Q + B A)‖_F / ‖W‖_F: plain, in C_λ^½, and in D_λ^½ · C_λ^½. KL(full‖quantized) and the
loss are means over the tokens of held-out answers: of GSM8K, whose training split C and D are of, and of NQ-open
questions and WikiText-2, which are not of the context.

What is done is kept in --work, so that several calls can share it, one for each rank, say; the first makes C and D. A
call that finds all done writes the tables.
"""

import argparse
import copy
import json
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import parser, write
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corda_lora.algebra.decomposition import regularize
from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data.batches import encode
from corda_lora.data.samples import load_samples
from corda_lora.devices import accelerator
from corda_lora.evaluation.answers import TUNED
from corda_lora.evaluation.base_outputs import BaseOutputs, record_base
from corda_lora.evaluation.evaluate import loss_and_drift, measured_samples
from corda_lora.files import whole_file, write_json
from corda_lora.methods import quantized as q
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import quantized_layer, weight_of
from corda_lora.preprocess.statistics import answered_batches, collect_sides

STARTS: dict[str, q.Start] = {
    "QLoRA": lambda layer, r: (layer.quantize(layer.W)[0], *layer.zero(r)),
    "QPiSSA": q.qpissa,
    "LoftQ": q.loftq,
    "QERA": q.qera,
    "CLoQ": q.cloq,
    "QCorDA, as published": q.qcorda,
    "folded in C, once": partial(q.folded, rounds=1),
    "folded in C, 5 times": partial(q.folded, rounds=5),
    "folded two-sided, once": partial(q.folded, rounds=1, two_sided=True),
    "folded two-sided, 5 times": partial(q.folded, rounds=5, two_sided=True),
    "folded in C, 5 times, to the nearest": partial(q.folded, rounds=5, by_columns=False),
    "folded two-sided, 5 times, to the nearest": partial(q.folded, rounds=5, two_sided=True, by_columns=False),
}
RIVALS = ("QLoRA", "QPiSSA", "LoftQ")
METRICS = ("plain", "in C", "two-sided")
MEASURED = {  # the kind of data, its file, how many samples, and their greatest length
    "GSM8K": ("learn", "gsm8k_test.jsonl", 24, 512),
    "NQ-open": ("keep", "nq_test.jsonl", 96, 512),
    "WikiText-2": ("text", "wikitext2_test.txt", 12, 128),
}
BATCH_TOKENS = 2048
SIDES = "sides.safetensors"


def main() -> None:
    args = arguments()
    began = time.perf_counter()
    source = ModelConfig(str(args.model), dtype="float32")
    model, tokenizer = load_model(source).to(accelerator()), load_tokenizer(source)
    targets = find_targets(model, "all-linear")
    if not (args.work / SIDES).is_file():
        collect(model, tokenizer, targets, args)
    sides = safe_open(args.work / SIDES, framework="pt", device=str(accelerator()))
    measured = Measured(model, tokenizer, args.data, args.work)
    copied = copy.deepcopy(model)
    for r in args.ranks:
        for name in args.starts:
            path = path_of(name, r, args)
            if path.is_file():
                continue
            torch.manual_seed(0)
            errors = {}
            for n, target in targets.items():
                layer = q.Layer(
                    weight_of(target), torch.float32, sides.get_tensor(f"{n}.C"), sides.get_tensor(f"{n}.D")
                )
                errors[n] = put(STARTS[name], r, layer, copied.get_submodule(n))
            row = {"errors": errors, "measured": measured(copied), "seconds": round(time.perf_counter() - began)}
            write_json(path, row)
            print(f"r {r}, {name}: {json.dumps(row['measured'])} {row['seconds']} s", flush=True)
    paths = {(n, r): path_of(n, r, args) for n in args.all_starts for r in args.all_ranks}
    if all(path.is_file() for path in paths.values()):
        rows = [{"start": n, "r": r, **json.loads(path.read_text())} for (n, r), path in paths.items()]
        full = {name: numbers["loss"] for name, numbers in measured(model).items()}
        facts = {"bitsandbytes": version("bitsandbytes")}
        write(args, {"full": full, "starts": rows}, tables(full, rows), args.model, **facts)


def path_of(start: str, r: int, args: argparse.Namespace) -> Path:
    """Where a result is kept. QLoRA's B is zero: its result is the same at every rank."""
    return args.work / f"{start}, {0 if start == 'QLoRA' else r}.json"


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--work", type=Path, required=True, help="a folder for what is done")
    made.add_argument("--ranks", type=int, nargs="*", default=[8, 32, 128], help="that this call does")
    made.add_argument("--starts", nargs="*", default=list(STARTS), choices=STARTS, help="that this call does")
    made.add_argument("--all_ranks", type=int, nargs="+", default=[8, 32, 128], help="of the tables")
    made.add_argument("--all_starts", nargs="+", default=list(STARTS), choices=STARTS, help="of the tables")
    made.add_argument("--samples", type=int, default=96, help="of GSM8K's training split, for C and D")
    args = made.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def collect(model: nn.Module, tokenizer: Any, targets: dict[str, nn.Module], args: argparse.Namespace) -> None:
    """Write C and D of all layers."""
    samples = load_samples(DataConfig(str(args.data / "gsm8k_train.jsonl"), samples=args.samples))
    encoded = [encode(tokenizer, sample, 512) for sample in samples]
    batches = answered_batches(encoded, tokenizer.pad_token_id)
    tensors = {}
    for members, C, Ds in collect_sides(model, targets, batches):
        for name in members:
            tensors |= {f"{name}.C": C.cpu().clone(), f"{name}.D": Ds[name].cpu()}
    with whole_file(args.work / SIDES) as path:
        save_file(tensors, path)


@torch.no_grad()
def put(start: q.Start, r: int, layer: q.Layer, linear: nn.Module) -> list[float]:
    """Give a linear layer the weight Q + B A of a start. Returns the relative errors, in the order of `METRICS`."""
    stored, A, B = start(layer, r)
    Q = weight_of(quantized_layer(linear, stored, layer.dtype))
    W = (Q.double() + B.double() @ A.double()).float()
    linear.weight = nn.Parameter(W, requires_grad=False)
    return [(lost / whole) ** 0.5 for lost, whole in zip(energies(layer.W - W, layer), energies(layer.W, layer))]


def energies(X: Tensor, layer: q.Layer) -> list[float]:
    """tr(X Xᵀ), tr(X C Xᵀ) and tr(D X C Xᵀ): sums of so many numbers that float32 gives them to 1e-5."""
    assert layer.C is not None
    assert layer.D is not None
    XC = X @ regularize(layer.C).float()
    DX = regularize(layer.D / layer.D.diagonal().mean()).float() @ X
    return [float((left * right).sum()) for left, right in ((X, X), (X, XC), (DX, XC))]


class Measured:
    """Loss and KL(full‖quantized) on held-out data."""

    def __init__(self, full: nn.Module, tokenizer: Any, data: Path, folder: Path):
        self.tokenizer, self.encoded, record = tokenizer, {}, {}
        for name, (kind, file, samples, length) in MEASURED.items():
            if kind == "text":
                loaded = load_samples(DataConfig(str(data / file), rows="train[:400]"))
                loaded = measured_samples(kind, tokenizer, loaded, length)[0][:samples]
            else:
                loaded = load_samples(DataConfig(str(data / file), samples=samples))
            self.encoded[name] = [encode(tokenizer, s, length, end=kind == "learn") for s in loaded]
            record |= record_base(full, tokenizer, self.encoded[name], BATCH_TOKENS, False, name)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            BaseOutputs.save(Path(own), record)
            self.base = BaseOutputs(Path(own), full)

    def __call__(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """{data: {"loss", "kl", "tokens"}}."""
        results = {}
        for name, encoded in self.encoded.items():
            reference = partial(self.base.log_probs, name)
            numbers = loss_and_drift(model, self.tokenizer, encoded, BATCH_TOKENS, compared=TUNED, reference=reference)[
                "tuned"
            ]
            results[name] = {"loss": numbers["loss"], "kl": numbers["drift"], "tokens": numbers["tokens"]}
        return results


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(full: dict[str, float], rows: list[dict[str, Any]]) -> list[str]:
    ranks = sorted({row["r"] for row in rows})
    by = {(row["start"], row["r"]): row for row in rows}
    starts = list(dict.fromkeys(row["start"] for row in rows))
    head = ["| | " + " | ".join(f"r = {r}" for r in ranks) + " |", "|---|" + "---:|" * len(ranks)]
    lines = []
    for i, metric in enumerate(METRICS):
        lines += [f"Relative error of a layer, {metric}: mean over all layers.", "", *head]
        lines += [table_row(name, [f"{mean_error(by[name, r], i):.4f}" for r in ranks]) for name in starts]
        lines += [""]
    for data in MEASURED:
        tokens = next(iter(rows))["measured"][data]["tokens"]
        lines += [f"KL(full‖quantized) on {data}, nats per token ({tokens:.0f} tokens), and the loss in brackets.", ""]
        lines += [f"The full model's loss is {full[data]:.4f}.", "", *head]
        for name in starts:
            cells = [by[name, r]["measured"][data] for r in ranks]
            lines += [table_row(name, [f"{cell['kl']:.4f} ({cell['loss']:.4f})" for cell in cells])]
        lines += [""]
    folded = [name for name in starts if name.startswith("folded")]
    others = {"QLoRA, QPiSSA and LoftQ": RIVALS, "QERA and CLoQ, too": (*RIVALS, "QERA", "CLoQ")}
    for title, rivals in others.items():
        if not set(rivals) <= set(starts):
            continue
        for i, metric in enumerate(METRICS[1:], 1):
            lines += [f"Layers on which the error {metric} is below that of {title}, and its share of the best's.", ""]
            lines += head
            for name in folded:
                lines += [table_row(name, [against(by, name, rivals, r, i) for r in ranks])]
            lines += [""]
    lines += ["KL on GSM8K as a share of the best of QLoRA, QPiSSA and LoftQ; how much of what QLoRA loses in loss is"]
    lines += ["back.", "", *head]
    for name in [name for name in starts if name not in RIVALS]:
        cells = []
        for r in ranks:
            got = by[name, r]["measured"]["GSM8K"]
            best = min(by[rival, r]["measured"]["GSM8K"]["kl"] for rival in RIVALS)
            lost = by["QLoRA", r]["measured"]["GSM8K"]["loss"]
            cells.append(f"{got['kl'] / best:.3f}, {(lost - got['loss']) / (lost - full['GSM8K']):.0%}")
        lines += [table_row(name, cells)]
    return lines


def table_row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def mean_error(row: dict[str, Any], metric: int) -> float:
    return sum(errors[metric] for errors in row["errors"].values()) / len(row["errors"])


def against(by: dict[tuple[str, int], dict[str, Any]], name: str, rivals: tuple[str, ...], r: int, metric: int) -> str:
    """The share of layers on which a start has the smaller error than all rivals, and the mean over layers of its error
    divided by the best rival's."""
    mine = by[name, r]["errors"]
    shares = [mine[n][metric] / min(by[rival, r]["errors"][n][metric] for rival in rivals) for n in mine]
    return f"{sum(share < 1 for share in shares) / len(shares):.1%}, {sum(shares) / len(shares):.3f}"


if __name__ == "__main__":
    main()
