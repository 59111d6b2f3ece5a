"""Train a small vision-language model on pictures drawn here, and write what `recipes/vision.yaml` compares on.

    python benchmarks/vision.py --language_model model --output vision [--minutes 14] [--seconds 540]

The language model is SmolLM2-135M-Instruct (a directory), the vision tower a small CLIP from scratch. First the tower
learns by itself to tell the answers of seven kinds of questions (see `pictures.py`), a fifth of the time; then all of
the model learns to say them. A run that was cut off goes on from OUTPUT/state.pt when the same command is given again;
with --seconds it stops by itself after so many of them, to be called again. The clock of --minutes counts training
alone. When it is done, OUTPUT has the model and the files of the comparison, and the accuracy on held-out pictures of
each kind is written as a result.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pictures
import record
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from corda_lora.config import DataConfig, EvalConfig, ModelConfig
from corda_lora.data.batches import encode
from corda_lora.data.samples import as_samples
from corda_lora.devices import accelerator
from corda_lora.evaluation.evaluate import evaluate
from corda_lora.models.loading import load_model, load_tokenizer, with_processor

TOWERS = {  # width, layers, heads, pixels of a patch
    "small": (384, 8, 6, 8),
    "tiny": (64, 2, 2, 16),  # to try the script
}
TEMPLATE = (
    "{%% for m in messages %%}%s{{ m['role'] }}\n{%% for p in m['content'] %%}"
    "{%% if p['type'] == 'image' %%}<image>{%% else %%}{{ p['text'] }}{%% endif %%}{%% endfor %%}{{ eos_token }}\n"
    "{%% endfor %%}{%% if add_generation_prompt %%}%sassistant\n{%% endif %%}"
)
TOWER_SHARE = 0.2  # of the time, for the tower alone
SAVED_EVERY = 60.0  # seconds
WARMUP = 0.03


# --- the model -------------------------------------------------------------------------------------------------------


def build(language_model: Path, size: str) -> tuple[t.LlavaForConditionalGeneration, t.LlavaProcessor]:
    """The language model with an untrained tower and connector before it, and its processor."""
    width, layers, heads, patch = TOWERS[size]
    tokenizer = t.AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = t.AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    vision = t.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pictures.SIZE,
        patch_size=patch,
        projection_dim=width,
    )
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(pictures.SIZE // patch) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = t.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    side = {"height": pictures.SIZE, "width": pictures.SIZE}
    images = t.CLIPImageProcessorPil(
        size={"shortest_edge": pictures.SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    begin = "<|im_start|>" if "<|im_start|>" in tokenizer.get_vocab() else ""
    processor = t.LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE % (begin, begin),
    )
    return model, processor


class Heads(nn.Module):
    """From the mean and the largest numbers of the tower's patches to an answer of each question of the old kinds."""

    def __init__(self, width: int):
        super().__init__()
        self.known = pictures.keys()
        self.first, total = {}, 0
        for key, answers in self.known.items():
            self.first[key], total = total, total + len(answers)
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(2 * width, total)

    def place(self, key: str, answer: str) -> tuple[int, int, int]:
        """The first column of a question's answers, the column after the last, and the right one."""
        first, answers = self.first[key], self.known[key]
        return first, first + len(answers), first + answers.index(answer)

    def places(self, asked: pictures.Asked) -> list[tuple[int, int, int]]:
        """Those of the question, and of what else could be asked."""
        others = [self.place(key, answer) for key, answer in asked.facts.items() if key != asked.key]
        return [self.place(asked.key, asked.answer), *others]

    def forward(self, patches: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all facts (b, f, 3) that a picture shows, and which samples have the first right (b,). Places
        that begin and end at 0 are none."""
        patches = self.norm(patches)
        logits = self.linear(torch.cat([patches.mean(1), patches.amax(1)], 1)).float()
        known = places[:, :, 1] > 0  # (b, f)
        samples, facts = known.nonzero()[:, 0], places[known]  # (n,), (n, 3)
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits[samples].masked_fill((columns < facts[:, :1]) | (columns >= facts[:, 1:2]), -torch.inf)
        firsts = torch.cat([samples.new_zeros(1), known.sum(1).cumsum(0)[:-1]])
        right = logits.argmax(1) == facts[:, 2]
        return F.cross_entropy(logits, facts[:, 2]), right[firsts]


# --- the pictures ----------------------------------------------------------------------------------------------------


class Drawn(Dataset):
    """Pictures of the old kinds, drawn when they are asked for."""

    def __init__(self, processor: Any, heads: Heads, split: str):
        self.tokenizer, self.heads, self.split = with_processor(processor), heads, split
        blank = pictures.Image.new("RGB", (pictures.SIZE, pictures.SIZE))

        @cache
        def tokens(question: str, answer: str) -> tuple[list[int], list[bool]]:
            [sample] = as_samples([{"prompt": question, "response": answer, "image": blank}])
            encoded = encode(self.tokenizer, sample, 10**6)
            return encoded.ids, encoded.answer

        self.tokens = tokens

    def __getitem__(self, i: int) -> tuple[Tensor, list[tuple[int, int, int]], list[int], list[bool]]:
        asked = pictures.picture(self.split, i)
        flat = torch.frombuffer(bytearray(asked.image.tobytes()), dtype=torch.uint8)
        pixels = flat.view(pictures.SIZE, pictures.SIZE, 3).permute(2, 0, 1)
        return pixels, self.heads.places(asked), *self.tokens(asked.question, asked.answer)

    def batches(self, first: int, size: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """Batches from number `first` on, without end."""

        class Numbers:
            def __iter__(self) -> Iterator[list[int]]:
                number = first
                while True:
                    yield range(number * size, (number + 1) * size)  # type: ignore[misc]
                    number += 1

        pad = self.tokenizer.pad_token_id or 0

        def collate(rows: list[Any]) -> dict[str, Any]:
            longest = max(len(ids) for _, _, ids, _ in rows)
            ids = torch.full((len(rows), longest), pad)
            mask, answers = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
            for i, (_, _, own, answer) in enumerate(rows):
                ids[i, : len(own)], mask[i, : len(own)] = torch.tensor(own), 1
                answers[i, : len(own)] = torch.tensor(answer)
            pixels = torch.stack([row[0] for row in rows])
            places = torch.zeros(len(rows), max(len(row[1]) for row in rows), 3, dtype=torch.long)
            for i, row in enumerate(rows):
                places[i, : len(row[1])] = torch.tensor(row[1])
            batch = {"pixels": pixels, "places": places, "ids": ids, "mask": mask, "answers": answers}
            return {
                name: x.numpy() for name, x in batch.items()
            }  # tensors would go through /dev/shm, which may be small

        more = {"prefetch_factor": 3, "multiprocessing_context": "fork"} if workers else {}
        for batch in DataLoader(self, batch_sampler=Numbers(), collate_fn=collate, num_workers=workers, **more):
            yield {name: torch.from_numpy(x) for name, x in batch.items()}


def scaled(pixels: Tensor) -> Tensor:
    """As the processor gives them."""
    return pixels.float() / 127.5 - 1


# --- the training ----------------------------------------------------------------------------------------------------


def tower_loss(model: Any, heads: Heads, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    patches = model.model.vision_tower(scaled(batch["pixels"])).last_hidden_state[:, 1:]
    return heads(patches, batch["places"])


def answer_loss(model: Any, heads: Heads, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mean loss of the answers' tokens, and which samples have them all as first choices (b,)."""
    wanted = batch["answers"][:, 1:]
    columns = wanted.any(0).nonzero().flatten()
    logits = model(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        pixel_values=scaled(batch["pixels"]),
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    wanted, targets = wanted[:, columns], batch["ids"][:, 1:][:, columns]
    loss = F.cross_entropy(logits[wanted].float(), targets[wanted])
    return loss, ((logits.argmax(-1) == targets) | ~wanted).all(1)


PHASES = {"tower": tower_loss, "answers": answer_loss}


def optimizer_of(phase: str, model: Any, heads: Heads) -> torch.optim.Optimizer:
    tower, connector = model.model.vision_tower, model.model.multi_modal_projector
    if phase == "tower":
        groups = [{"params": [*tower.parameters(), *heads.parameters()], "peak": 1e-3}]
    else:
        seeing = {*tower.parameters(), *connector.parameters()}
        rest = [p for p in model.parameters() if p not in seeing]
        groups = [
            {"params": [*tower.parameters()], "peak": 2e-4},
            {"params": [*connector.parameters()], "peak": 1e-3},
            {"params": rest, "peak": 2e-4},
        ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(options: argparse.Namespace, model: Any, processor: Any) -> list[dict[str, Any]] | None:
    """Train to the end, and return the log; None if --seconds were over before."""
    device, since = accelerator(), time.perf_counter()
    heads = Heads(model.config.vision_config.hidden_size)
    model.to(device), heads.to(device)
    path, log, spent, done = options.output / "state.pt", [], dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)
    state = torch.load(path, map_location=device, weights_only=True) if path.is_file() else None
    if state:
        model.load_state_dict(state["model"]), heads.load_state_dict(state["heads"])
        log, spent, done = state["log"], state["spent"], state["done"]
    share = {"tower": TOWER_SHARE, "answers": 1 - TOWER_SHARE}
    for number, (phase, loss_of) in enumerate(PHASES.items()):
        seconds, steps = 60 * options.minutes * share[phase], options.steps
        if max(spent[phase] / seconds, done[phase] / steps) >= 1:
            continue
        optimizer = optimizer_of(phase, model, heads)
        if state and state["phase"] == phase:
            optimizer.load_state_dict(state["optimizer"])
        data = Drawn(processor, heads, "train")
        batches = data.batches(10**6 * number + done[phase], options.batch_size, options.workers)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        model.train()
        before, saved, sums = time.perf_counter(), time.perf_counter(), torch.zeros(3, device=device)
        while (progress := max(spent[phase] / seconds, done[phase] / steps)) < 1:
            batch = {name: x.to(device, non_blocking=True) for name, x in next(batches).items()}
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1, (done[phase] + 1) / (WARMUP * steps + 1), 1.05 - progress)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, right = loss_of(model, heads, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            done[phase] += 1
            sums += torch.stack([loss.detach(), right.float().mean(), torch.ones((), device=device)])
            last = done[phase] % options.log_every == 0
            now = time.perf_counter()
            spent[phase], before = spent[phase] + now - before, now
            stops = options.seconds and now - since > options.seconds
            if last or stops:
                total, correct, n = sums.tolist()
                log.append({"phase": phase, "step": done[phase], "loss": total / n, "right": correct / n})
                left = (1 - max(spent[phase] / seconds, done[phase] / steps)) * seconds
                print(f"{phase} {done[phase]}: loss {total / n:.4f}, right {correct / n:.1%}, {spent[phase]:.0f} s, "
                      f"at most {left:.0f} s left", flush=True)  # fmt: skip
                sums.zero_()
            if stops or now - saved > SAVED_EVERY or max(spent[phase] / seconds, done[phase] / steps) >= 1:
                save(path, {"model": model.state_dict(), "heads": heads.state_dict(), "log": log, "spent": spent,
                            "done": done, "phase": phase, "optimizer": optimizer.state_dict()})  # fmt: skip
                saved = before = time.perf_counter()
            if stops:
                print("stopped: the same command goes on", flush=True)
                return None
    return log


# --- the whole -------------------------------------------------------------------------------------------------------


def measure(folder: Path, per_kind: int) -> dict[str, Any]:
    """The accuracy of greedy answers and of choices, on held-out pictures of each kind."""
    source = ModelConfig(str(folder))
    model, tokenizer = load_model(source).to(accelerator()), load_tokenizer(source)
    files = {kind: folder / f"old_{kind}.jsonl" for kind in pictures.OLD} | {"chart": folder / "chart_test.jsonl"}
    data: list[Any] = [DataConfig(str(path), rows=f"train[:{per_kind}]") for path in files.values()]
    config = EvalConfig(learn=data, choices=data, exact_match="text", max_new_tokens=8, batch_tokens=2**16)
    results = evaluate(model, tokenizer, config, progress=False)
    rows = {}
    for kind, path in files.items():
        learned, chosen = (
            next(sides["base"] for name, sides in results[part].items() if name.startswith(str(path)))
            for part in ("learn", "choices")
        )
        answers = {len(pictures.picture("test", i, kind).answers) for i in range(30)}
        rows[kind] = {
            "exact_match": learned["exact_match"],
            "chance": 1 / min(answers),
            "loss": learned["loss"],
            "accuracy": chosen["accuracy"],
        }
    return rows


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--language_model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model, and of the comparison's files")
    parser.add_argument("--minutes", type=float, default=14, help="of training, at most")
    parser.add_argument("--steps", type=int, default=5000, help="of each of the two trainings, at most")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--seconds", type=float, help="stop this call after so many")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw")
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--size", choices=TOWERS, default="small")
    parser.add_argument("--files", default="{}", help="how many rows the files have, as JSON: see pictures.write_files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes that draw are forked
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    counts = json.loads(options.files)
    pictures.DIGITS = options.output / pictures.DIGITS.name
    if not (options.output / "old_word.jsonl").is_file():  # the last to be written
        pictures.write_files(options.output, **counts)
    model, processor = build(options.language_model, options.size)
    if not (options.output / "log.json").is_file():
        log = train(options, model, processor)
        if log is None:
            return
        model.to("cpu").save_pretrained(options.output)
        processor.save_pretrained(options.output)
        (options.output / "log.json").write_text(json.dumps(log, indent=1) + "\n")  # now the model is whole
    (options.output / "state.pt").unlink(missing_ok=True)
    rows = measure(options.output, counts.get("test", 100))
    lines = ["| kind | greedy answers right | by chance | of four choices |", "|---|---:|---:|---:|"]
    for kind, row in rows.items():
        lines.append(f"| {kind} | {row['exact_match']:.1%} | {row['chance']:.1%} | {row['accuracy']:.1%} |")
    log = json.loads((options.output / "log.json").read_text())
    record.write(options, rows, [*lines, "", f"`chart` was not trained. {log[-1]['step']:,} steps in the end."], None)


if __name__ == "__main__":
    main()
