"""What the penalty on predicted drift hangs on, and how far the prediction is from the drift: one run an entry.

    python benchmarks/keeping_study.py MODEL DATA OUTPUT SECONDS [PROCESSES on each GPU]

MODEL is a directory of SmolLM2-135M-Instruct, DATA what `prepare_data.py` makes. GSM8K is learned, rank 32, 150 steps
of 32, and NQ-open is kept. An entry is a split (or `lora`), a learning rate, λ (`keep`), the number of samples that C
and D are of (`n`), the number of directions kept of them (`k`), the share of running text in C and D (`share`), and
`max_drift`. (The result has two more, of a draft, with C weighted by |g|² of each token: `weighted`.)

Columns: task loss; drift on 500 questions of NQ-open that nobody has seen, on other data, on 256 questions shown, and
on the 64 of the meter; the prediction, and the same with C and D of 256 questions that the training has not seen.
"""

import json
import multiprocessing
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from corda_lora.adapters.lora import install, lora_layers
from corda_lora.algebra.second_order import compact
from corda_lora.config import CordaConfig, DataConfig, LoraStart, ModelConfig, TrainConfig
from corda_lora.data.batches import context_batches, encode
from corda_lora.data.samples import load_samples
from corda_lora.evaluation.evaluate import loss_and_drift, text_windows
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import layer_digest
from corda_lora.preprocess.context import answer_mask, token_masks
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.statistics import Sides, Statistics, answered_batches, collect_sides
from corda_lora.training.keeping import Keeper, PredictedDrift
from corda_lora.training.train import plain_lora, train

WIDE = {"split": "anchored", "learning_rate": 2e-2}
ENTRIES: list[dict[str, Any]] = [
    *({"split": "lora", "learning_rate": rate} for rate in (1e-3, 2e-3, 5e-3)),
    {"split": "anchored", "learning_rate": 1e-2},
    *(WIDE | more for more in ({}, {"n": 2000})),
    *(WIDE | {"keep": keep} for keep in (10, 30, 100, 300)),
    *(WIDE | {"keep": 30, "n": n} for n in (1000, 2000)),
    WIDE | {"keep": 100, "n": 2000},
    {"split": "anchored", "learning_rate": 1e-2, "keep": 30, "n": 2000},
    {"split": "anchored", "learning_rate": 3e-2, "keep": 100, "n": 2000},
    *(WIDE | {"keep": 30, "n": 2000, "k": k} for k in (32, 4096)),
    *(WIDE | {"keep": 30, "share": share} for share in (0.1, 0.3)),
    *(WIDE | {"keep": 10, "n": 2000, "max_drift": drift} for drift in (0.02, 0.05)),
    {"split": "lora", "learning_rate": 5e-3, "keep": 10},
    *({"split": "lora", "learning_rate": 5e-3, "keep": keep, "n": 2000} for keep in (30, 100)),
    {"split": "paper", "learning_rate": 2e-4},
    *(
        {"split": split, "learning_rate": rate, "keep": 30, "n": 2000}
        for split, rate in (("paper", 2e-4), ("balanced", 2e-3), ("seeded", 5e-3))
    ),
]
COLUMNS = ("task", "nq", "webq", "mbpp", "wikitext", "shown", "meter", "predicted", "predicted_unseen", "seconds")


def dense_statistics(model: Any, targets: Any, encoded: Any) -> tuple[dict[str, Any], float]:
    """{layer: (C, D)}, whole, and tokens per answer token."""
    batches = answered_batches(encoded, 0, 8192)
    tokens, answers = (sum(int(mask(b).sum()) for b in batches) for mask in (lambda b: token_masks(b)[0], answer_mask))
    sides = collect_sides(model, targets, batches, progress=False)
    return {name: (C, Ds[name]) for members, C, Ds in sides for name in members}, tokens / answers


def run(entry: dict[str, Any], source: ModelConfig, data: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(source)

    def read(name: str, end: bool = False, **options: Any) -> Any:
        samples = load_samples(DataConfig(f"{data}/{name}", **options))
        if name.startswith("wikitext"):
            samples = text_windows(tokenizer, samples, 256)
        return [encode(tokenizer, sample, 512, end=end) for sample in samples]

    began = time.perf_counter()
    model = load_model(source).to("cuda")
    targets = find_targets(model, "all-linear")
    drawn = random.Random(0).sample(load_samples(DataConfig(f"{data}/nq_context.jsonl")), entry.get("n", 256))
    shown, unseen = [encode(tokenizer, sample, 512) for sample in drawn], read("nq_test.jsonl")
    dense, ratio = dense_statistics(model, targets, shown)
    if share := entry.get("share"):
        text, _ = dense_statistics(model, targets, read("wikitext2_test.txt", rows="train[1500:2300]"))
        dense = {n: tuple((1 - share) * M + share * T for M, T in zip(dense[n], text[n])) for n in dense}
    layers = {name: Sides(*(compact(M, entry.get("k", 128)) for M in sides)) for name, sides in dense.items()}
    digests = {name: layer_digest(module) for name, module in targets.items()}
    statistics = Statistics(layers, len(shown), 1000, round(1000 * ratio), digests)
    config = TrainConfig(entry["learning_rate"], max_steps=150, batch_size=32, micro_batch_size=16)
    if entry["split"] == "lora":
        adapted = plain_lora(model, LoraStart(r=32), config)
    else:
        batches, _ = context_batches(tokenizer, drawn, 512)
        corda = CordaConfig(mode="kpm", r=32, split=entry["split"], lora_alpha=32)
        adapted = install(model, preprocess(model, corda, batches, progress=False)).to("cuda")

    def drift(encoded: Any) -> float:
        return loss_and_drift(adapted.eval(), tokenizer, encoded, 16384)["tuned"]["drift"]

    keeper = Keeper(PredictedDrift(adapted, statistics), entry.get("keep", 0.0), entry.get("max_drift"))
    keeper.measure = (lambda: drift(unseen[:64])) if "max_drift" in entry else None
    penalties = {"drift": keeper.penalty} if keeper.keep else None
    learn = load_samples(DataConfig(f"{data}/gsm8k_train.jsonl"))
    trained = train(adapted, tokenizer, learn, config, progress=False, callbacks=[keeper], penalties=penalties)
    test = read("gsm8k_test.jsonl", end=True, samples=500)
    result = {"entry": entry, "seconds": trained["seconds"], "predicted": float(keeper.predicted())}
    result |= {"task": loss_and_drift(adapted.eval(), tokenizer, test, 16384)["tuned"]["loss"]}
    result |= {"nq": drift(unseen[200:700]), "shown": drift(shown[:256]), "meter": drift(unseen[:64])}
    result |= {"webq": drift(read("webq_test.jsonl", samples=300)), "mbpp": drift(read("mbpp_test.jsonl", samples=150))}
    result |= {"wikitext": drift(read("wikitext2_test.txt", rows="train[:300]"))}
    with adapted.disable_adapter():
        others, ratio = dense_statistics(model, targets, unseen[700:956])
    changes = {name: layer.get_delta_weight("default").float() for name, layer in lora_layers(adapted).items()}
    traces = [float((others[name][1] @ change @ others[name][0] * change).sum()) for name, change in changes.items()]
    return result | {"predicted_unseen": 0.5 * ratio * sum(traces), "all_seconds": time.perf_counter() - began}


def work(gpu: int, arguments: Any, queue: Any, lock: Any, deadline: float) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    torch.set_num_threads(1)
    model, data, output = arguments
    while not queue.empty() and time.time() < deadline:
        entry = queue.get()
        try:
            result = run(entry, ModelConfig(model, dtype="bfloat16"), data)
        except Exception:
            result = {"entry": entry, "error": traceback.format_exc()[-1000:]}
        torch.cuda.empty_cache()
        with lock, open(f"{output}/results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")


def table(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [f"| entry | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for row in (row for row in rows if "error" not in row):
        name = ", ".join(f"{key} {value}" for key, value in row["entry"].items())
        lines.append(f"| {name} | {' | '.join(format(row[column], '.4g') for column in COLUMNS)} |")
    return "\n".join(lines)


def main() -> None:
    *paths, seconds, processes = [*sys.argv[1:], "8"][:5]
    Path(paths[2]).mkdir(parents=True, exist_ok=True)
    context, deadline = multiprocessing.get_context("spawn"), time.time() + float(seconds)
    manager = context.Manager()
    queue, lock = manager.Queue(), manager.Lock()
    for entry in ENTRIES:
        queue.put(entry)
    gpus = torch.cuda.device_count()
    workers = [
        context.Process(target=work, args=(i % gpus, paths, queue, lock, deadline - 110))
        for i in range(gpus * int(processes))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(1, deadline - time.time()))
        worker.kill()
    print(table(Path(paths[2]) / "results.jsonl"))


if __name__ == "__main__":
    main()
