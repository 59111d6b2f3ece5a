"""A vision-language model through the command line, from files on disk, and the bad input that images bring."""

import json
import re
import shutil

import peft
import pytest
import tiny_vision
import torch
from safetensors.torch import load_file
from test_cli import refused, run
from transformers import AutoProcessor, LlavaForConditionalGeneration

from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data import images
from corda_lora.data.samples import as_samples, load_samples
from corda_lora.models.loading import load_model, load_tokenizer, open_model
from corda_lora.models.targets import find_targets
from corda_lora.models.weights import is_4bit
from corda_lora.preprocess.context import read_context
from corda_lora.preprocess.walk import Place, tensors_that_see, walk

ANSWERS = ["a cat", "a dog", "two"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_vision.save(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Files of rows with images beside them, and an empty working directory."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    (tmp_path / "pics").mkdir()
    number = 0
    for name, count in (("keep", 24), ("learn", 16), ("test", 6)):
        rows = []
        for _ in range(count):
            (tmp_path / "pics" / f"{number}.png").write_bytes(tiny_vision.png(number, (24 + 8 * (number % 3), 24)))
            row = {"image": f"pics/{number}.png", "prompt": f"What is it, {number % 5}?", "choices": ANSWERS}
            rows.append(row | {"response": ANSWERS[number % 3]})
            number += 1
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def trained_rows(data):
    return [json.loads(line) for line in (data / "learn.jsonl").read_text().splitlines()]


TRAIN = ["--precision", "fp32", "--batch_size", 8, "--epochs", 4]


def test_init_train_eval_and_export(llava, data, capsys):
    context, connector = ["--context", data / "keep.jsonl"], ["--modules_to_save", "[multi_modal_projector]"]
    run("plan", "--model", llava, *context, "--r", 4)
    planned = capsys.readouterr().out
    run("init", "--model", llava, *context, "--r", 4, *connector, "--output", "start")
    shown = capsys.readouterr()
    assert "<image> × 9What is it, 0?" in "".join(shown.err.split("\n"))
    assert "the whole model is loaded" not in shown.err
    record = json.loads((data / "work" / "start" / "corda.json").read_text())
    tokens = int(re.search(r"context: ([\d,]+) tokens", planned)[1].replace(",", ""))
    assert record["context"]["tokens"] <= tokens < 1.1 * record["context"]["tokens"]  # with padding
    assert len(record["layers"]) == 14
    assert all(name.startswith("model.language_model.layers.") for name in record["layers"])

    run("train", "--model", llava, "--start", "start", "--data", data / "learn.jsonl", *TRAIN, "--output", "tuned")
    log = json.loads((data / "work" / "tuned" / "training.json").read_text())
    assert log["loss"][-1][1] < log["loss"][0][1]
    assert log["drift"][-1][2] > 0  # the context's images go through, too
    before, after = (load_file(data / "work" / n / "adapter_model.safetensors") for n in ("start", "tuned"))
    trained = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.partition("multi_modal_projector.")[2] for name in trained if "projector" in name} == {
        f"linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")
    }
    assert not any("vision_tower" in name for name in after)

    measured = ["--keep", data / "keep.jsonl", "--learn", data / "test.jsonl", "--choices", data / "test.jsonl"]
    model = ["--model", llava, "--adapter", "tuned"]
    run("eval", *model, *measured, "--exact_match", "text", "--max_new_tokens", 4, "--output", "eval.json")
    results = json.loads((data / "work" / "eval.json").read_text())["results"]
    learned = results["learn"][str(data / "test.jsonl")]["tuned"]
    assert learned.keys() >= {"loss", "exact_match", "drift"}
    assert "accuracy" in results["choices"][str(data / "test.jsonl")]["tuned"]

    run("export", *model, "--as", "merged", "--output", "merged")
    inputs = published(llava, data)
    plain = LlavaForConditionalGeneration.from_pretrained(llava)
    expected = peft.PeftModel.from_pretrained(plain, "tuned").eval()(**inputs).logits
    merged = LlavaForConditionalGeneration.from_pretrained("merged").eval()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-4)
    assert published("merged", data)["pixel_values"].shape == inputs["pixel_values"].shape
    # The loss that `eval` gave is that of the model and processor alone.
    torch.testing.assert_close(loss_by_hand(merged, "merged", data), learned["loss"], rtol=0, atol=1e-4)


def published(folder, data):
    processor = AutoProcessor.from_pretrained(folder)
    image = tiny_vision.picture(3, (24, 24))
    return processor(text=["<s>#user\n<image>What?$\n"], images=[image], add_special_tokens=False, return_tensors="pt")


@torch.no_grad()
def loss_by_hand(model, folder, data):
    """−log p of each token of the answers, and of the end-of-text after them."""
    processor, total, count = AutoProcessor.from_pretrained(folder), 0.0, 0
    for i in range(40, 46):
        row = {"prompt": f"What is it, {i % 5}?", "response": ANSWERS[i % 3]}
        asked, answer = f"<s>#user\n<image>{row['prompt']}$\n#assistant\n", f"{row['response']}$"
        image = tiny_vision.picture(i, (24 + 8 * (i % 3), 24))
        inputs = processor(text=[asked + answer], images=[image], add_special_tokens=False, return_tensors="pt")
        log_probs = model(**inputs).logits[0, :-1].log_softmax(-1)
        targets = inputs["input_ids"][0, 1:]
        total -= float(log_probs.gather(1, targets[:, None])[-len(answer) :].sum())
        count += len(answer)
    return total / count


def test_training_is_that_of_the_models_own_loss(llava, data):
    """One step of plain SGD on one batch, by the command and by hand."""
    rows = trained_rows(data)[:4]
    (data / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sgd = ["--trainer", "{optim: sgd, max_grad_norm: 0}", "--schedule", "constant", "--warmup", 0]
    run("train", "--model", llava, "--data", data / "learn.jsonl", "--r", 2, "--target_modules", "[o_proj]", *sgd,
        "--batch_size", 4, "--micro_batch_size", 2, "--learning_rate", 0.5, "--precision", "fp32", "--output", "tuned",
        "--max_steps", 1)  # fmt: skip
    found = load_file(data / "work" / "tuned" / "adapter_model.safetensors")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(llava).requires_grad_(False)
    lora = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=list(find_targets(model, ["o_proj"])), task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, lora)
    processor, total, count = AutoProcessor.from_pretrained(llava), 0.0, 0
    for i, row in enumerate(rows, 24):
        asked, answer = f"<s>#user\n<image>{row['prompt']}$\n#assistant\n", f"{row['response']}$"
        image = tiny_vision.picture(i, (24 + 8 * (i % 3), 24))
        inputs = processor(text=[asked + answer], images=[image], add_special_tokens=False, return_tensors="pt")
        log_probs = adapted(**inputs).logits[0, :-1].log_softmax(-1)
        total = total - log_probs.gather(1, inputs["input_ids"][0, 1:, None])[-len(answer) :].sum()
        count += len(answer)
    (total / count).backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            stepped = parameter.detach() - 0.5 * parameter.grad
            torch.testing.assert_close(found[name.replace(".default", "")], stepped, rtol=1e-4, atol=1e-6)


RECIPE = """
data: {data}/learn.jsonl
context: {data}/keep.jsonl
context_samples: 16
r: 4
modules_to_save: [multi_modal_projector]
seeds: 1
curve_points: 1
train: {{batch_size: 8, max_steps: 2, precision: fp32}}
methods:
  full: {{learning_rates: [0.0001, 0.0003]}}
  lora: {{learning_rates: [0.001, 0.003]}}
  distill: {{learning_rates: [0.001, 0.003], options: {{size: 4}}}}
  ours: {{method: corda-kpm-anchored, learning_rates: [0.001, 0.003], options: {{keep: 10}}}}
eval: {{keep: {data}/keep.jsonl, learn: {data}/test.jsonl, choices: {data}/test.jsonl, exact_match: text}}
"""


def test_compare(llava, data, undrawn):
    recipe = RECIPE.format(data=data)
    (data / "recipe.yaml").write_text(recipe)
    run("plan", data / "recipe.yaml", "--model", llava)
    run("compare", data / "recipe.yaml", "--model", llava, "--output", "compared")
    runs = json.loads((data / "work" / "compared" / "comparison.json").read_text())["runs"]
    assert {run["status"] for run in runs} == {"done"}, runs
    assert len(runs) == 8
    assert all(run["results"]["keep"]["keep"]["drift"] > 0 for run in runs)
    assert all("accuracy" in run["results"]["choices"]["test"] for run in runs)
    connector = sum(p.numel() for p in load_model(ModelConfig(str(llava))).model.multi_modal_projector.parameters())
    trained = {run["method"]: run["parameters"]["trainable"] for run in runs}
    assert trained["lora"] == 3712 + connector
    assert trained["ours"] == 1792 + connector
    tower = sum(p.numel() for p in load_model(ModelConfig(str(llava))).model.vision_tower.parameters())
    assert trained["full"] == sum(p.numel() for p in load_model(ModelConfig(str(llava))).parameters()) - tower


def test_in_4_bits_the_language_model_alone_is_rounded(data, monkeypatch, capsys):
    for sizes in (tiny_vision.TEXT, tiny_vision.VISION):
        monkeypatch.setitem(sizes, "hidden_size", 64)
        monkeypatch.setitem(sizes, "intermediate_size", 128)
    model = tiny_vision.save(data / "wide")
    run("init", "--model", model, "--context", data / "keep.jsonl", "--r", 4, "--quantization", "nf4", "--output", "q")
    full, rounded = load_model(ModelConfig(str(model))), load_model(ModelConfig("q/base"))
    in_4_bits = {n for n, m in rounded.named_modules() if isinstance(m, torch.nn.Linear) and is_4bit(m)}
    assert in_4_bits == find_targets(full, "all-linear").keys()
    others = {name: p for name, p in full.named_parameters() if name.removesuffix(".weight") not in in_4_bits}
    kept = dict(rounded.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in others.items())
    assert any("vision_tower" in name for name in others)
    run("train", "--model", "q/base", "--start", "q", "--data", data / "learn.jsonl", *TRAIN, "--output", "tuned")
    assert load_tokenizer(ModelConfig("q/base")).processor is not None


def test_inspect(llava, data, undrawn):
    context = ["--context", data / "keep.jsonl", "--samples", 16, "--levels", "[1]", "--held_out", 8]
    run("inspect", "--model", llava, *context, "--output", "seen")
    cut = json.loads((data / "work" / "seen" / "inspect.json").read_text())["truncation"]
    [whole] = cut["base"].values()
    rows = [json.loads(line) for line in (data / "keep.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(data / row["image"])
    (data / "work" / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("eval", "--model", llava, "--keep", "others.jsonl", "--output", "eval.json")
    [results] = json.loads((data / "work" / "eval.json").read_text())["results"]["keep"].values()
    assert abs(whole - results["base"]["loss"]) < 0.3  # of a part of the same rows
    for curve in cut["curves"]:
        [[loss]] = curve["loss"].values()
        assert 0 < abs(loss - whole) < 1


def test_init_decodes_an_image_to_read_it_and_to_show_it(llava, data, monkeypatch):
    decoded, decode = [], images._decoded
    monkeypatch.setattr(images, "_decoded", lambda name, source: decoded.append(name) or decode(name, source))
    run("init", "--model", llava, "--context", data / "keep.jsonl", "--r", 4, "--output", "start")
    assert sorted(decoded) == sorted(2 * [f"pics/{i}.png" for i in range(24)])


def test_the_weights_of_a_block_alone_are_read(llava):
    """Also those of a checkpoint whose names are older than the model's, as LLaVA's are."""
    model, stored = open_model(ModelConfig(str(llava)))
    assert stored
    whole = load_model(ModelConfig(str(llava)))
    tokenizer = load_tokenizer(ModelConfig(str(llava)))
    rows = [{"prompt": "What?", "response": "it", "image": tiny_vision.picture(i)} for i in range(6)]
    context = read_context(tokenizer, [as_samples(rows)], 100, 100)
    place = Place(torch.device("cpu"))
    expected = {
        name: C
        for _, groups in walk(whole, find_targets(whole, "all-linear"), context, place)
        for members, (C,) in groups
        for name in members
    }
    blocks, seeing = list(model.model.language_model.layers), tensors_that_see(model)
    assert len(seeing) > 30
    found = {}
    for _, groups in walk(model, find_targets(model, "all-linear"), context, Place(place.device, stored)):
        loaded = [i for i, block in enumerate(blocks) if not any(p.isnan().any() for p in block.parameters())]
        assert len(loaded) == 1
        assert all(p.isnan().all() for p in seeing if p in stored)  # the vision tower has gone
        found |= {name: C for members, (C,) in groups for name in members}
    assert found.keys() == expected.keys()
    for name, C in found.items():
        torch.testing.assert_close(C, expected[name])


# --- bad input -------------------------------------------------------------------------------------------------------


def test_an_unreadable_image(llava, data, capsys):
    (data / "pics" / "3.png").write_text("no image")
    init = ["init", "--model", llava, "--context", data / "keep.jsonl", "--r", 4, "--output", "start"]
    said = refused(capsys, *init)
    assert "row 4 of" in said
    assert "cannot read the image pics/3.png: it is no image that Pillow reads" in said
    run(*init, "--bad_images", "skip")
    assert "row 4 of" in " ".join(capsys.readouterr().err.split())
    assert json.loads((data / "work" / "start" / "corda.json").read_text())["context"]["samples"] == 23


def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(llava, data, capsys, no_model_is_loaded):
    (data / "pics" / "43.png").write_text("no image")
    assert "row 4 of" in refused(capsys, "eval", "--model", llava, "--learn", data / "test.jsonl")
    cut = ["--keep", data / "keep.jsonl", "--keep.max_length", 12]
    assert "the samples need 16" in refused(capsys, "eval", "--model", llava, *cut)
    (data / "asked.jsonl").write_text(json.dumps({"prompt": "What?"}) + "\n")
    assert "has a response" in refused(capsys, "eval", "--model", llava, "--keep", data / "asked.jsonl")
    assert "needs a column `choices`" in refused(capsys, "eval", "--model", llava, "--choices", text_rows(data))


def test_an_unreadable_image_of_a_row_that_is_not_drawn(llava, data):
    context = DataConfig(str(data / "keep.jsonl"), samples=8)
    drawn = {sample.images[0].name for sample in load_samples(context)}
    names = [json.loads(line)["image"] for line in (data / "keep.jsonl").read_text().splitlines()]
    for name in sorted({*names} - drawn)[:4]:
        (data / name).write_text("no image")
    run("init", "--model", llava, "--context", data / "keep.jsonl", "--samples", 8, "--r", 4, "--output", "start")
    assert json.loads((data / "work" / "start" / "corda.json").read_text())["context"]["samples"] == 8


def test_rows_that_are_not_drawn_are_not_refused_when_the_work_is_done(llava, data):
    """They are only measured on. Here max_length cuts their images, or their images have no place."""
    rows = [{"image": f"pics/{i % 24}.png", "prompt": f"What is it, {i}?", "response": "a cat"} for i in range(80)]
    write = lambda: (data / "keep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write()
    drawn = {
        sample.messages[0]["content"][1]["text"]
        for sample in load_samples(DataConfig(str(data / "keep.jsonl"), samples=20))
    }
    for i, row in enumerate(rows):
        if row["prompt"] not in drawn:
            row["prompt"] = f"{'So ' * 30}<image>?" if i % 2 else "<image> or <image>?"
    write()
    few = ["--samples", 20, "--max_length", 60]
    run("init", "--model", llava, "--context", data / "keep.jsonl", *few, "--r", 4, "--output", "start")
    run("train", "--model", llava, "--start", "start", "--data", data / "learn.jsonl", *TRAIN[:4], "--max_steps", 1,
        "--output", "tuned")  # fmt: skip


def test_a_max_length_that_cuts_images(llava, data, capsys):
    for verb in (
        ["init", "--context", data / "keep.jsonl", "--r", 4, "--output", "out"],
        ["train", "--data", data / "learn.jsonl", "--output", "out"],
        ["plan", "--context", data / "keep.jsonl", "--r", 4],
    ):
        said = refused(capsys, verb[0], "--model", llava, *verb[1:], "--max_length", 12)
        assert "max_length 12 cuts the tokens of images" in said
        assert "the samples need 16" in said
    said = refused(capsys, "eval", "--model", llava, "--learn", data / "test.jsonl", "--learn.max_length", 12)
    assert "the samples need 16" in said
    run("init", "--model", llava, "--context", data / "keep.jsonl", "--r", 4, "--output", "out", "--max_length", 16)


def test_a_model_of_text_alone(checkpoint, data, capsys):
    said = refused(capsys, "init", "--model", checkpoint, "--context", data / "keep.jsonl", "--output", "out")
    assert "the samples have images, and the model reads text alone: take a vision-language model" in said
    said = refused(capsys, "init", "--model", checkpoint, "--context", text_rows(data), "--tokens", "image", "--r", 4,
                   "--output", "out")  # fmt: skip
    assert "tokens is image, but LlamaForCausalLM reads no images" in said


def text_rows(data):
    (data / "text.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    return data / "text.jsonl"


def test_a_model_whose_processor_is_missing(llava, data, capsys):
    shutil.copytree(llava, data / "without")
    (data / "without" / "processor_config.json").unlink()
    init = ["init", "--model", data / "without", "--r", 4, "--output", "out"]
    said = refused(capsys, *init, "--context", data / "keep.jsonl")
    assert "the samples have images, and cannot load the processor of" in said
    run(*init, "--context", text_rows(data))  # a text is read without


def test_other_refusals(llava, data, capsys):
    init = ["init", "--model", llava, "--context", data / "keep.jsonl", "--r", 4, "--output", "out"]
    assert "vision tower or the connector" in refused(capsys, *init, "--target_modules", ".*q_proj")
    assert "modules_to_save trains the connector" in refused(capsys, *init, "--target_modules", "[linear_1]")
    train = ["train", "--model", llava, "--data", data / "learn.jsonl", "--output", "out"]
    assert "images cannot be in" in refused(capsys, *train, "--trainer", "{packing: true}")
    (data / "two.jsonl").write_text(json.dumps({"images": ["pics/0.png"], "messages": two_places()}))
    said = refused(capsys, "init", "--model", llava, "--context", data / "two.jsonl", "--r", 4, "--output", "out")
    assert "row 1 of" in said
    assert "the row has 1 image, and its text has places for 2" in said


def test_an_adapter_in_the_vision_tower_has_no_order(llava, data, capsys):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")  # by PEFT: the tower's, too
    peft.get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), lora).save_pretrained("tower")
    said = refused(capsys, "export", "--model", llava, "--adapter", "tower", "--as", "ordered", "--data",
                   data / "keep.jsonl", "--output", "out")  # fmt: skip
    assert "self_attn.q_proj is outside of the language model" in said
    assert "--as lora --r R" in said


def two_places():
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": "both"}]
