"""The pictures of `benchmarks/vision.py`: their answers, read off their pixels; and its training, cut off and not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from corda_lora.config import DataConfig, ModelConfig
from corda_lora.data.batches import context_batches
from corda_lora.data.samples import load_samples
from corda_lora.models.loading import load_tokenizer

FOLDER = Path(__file__).parents[1] / "benchmarks"
FILES = {"train": 6, "context": 6, "test": 4, "charts": 4}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import pictures
    import vision

    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(vision, "accelerator", lambda: torch.device("cpu"))
    pictures._digits.cache_clear()
    return pictures, vision


def pixels_of(asked, colour):
    return (np.asarray(asked.image) == colour).all(-1)


def test_a_chart_says_what_its_pixels_say(scripts):
    pictures, _ = scripts
    seen = set()
    for i in range(60):
        asked = pictures.picture("train", i, "chart")
        heights = {name: round((pixels_of(asked, rgb).sum(0).max() - 1) / 9) for name, rgb in pictures.COLOURS.items()}
        axis = 9 if heights["black"] else 0
        bars = {name: h for name, h in heights.items() if h > 0 and name != "black"}
        if asked.key == "value":
            name = asked.question.split()[-2]
            expected = bars.get(name)
            if name != "black":
                assert asked.answer == str(expected), asked
        elif axis and "black" not in asked.answer:
            best = (max if "highest" in asked.question else min)(bars.values())
            assert bars[asked.answer] == best
        seen.add(asked.key)
    assert len(seen) == 3


def test_colours_counts_and_places_are_those_of_the_pixels(scripts):
    pictures, _ = scripts
    for i in range(40):
        asked = pictures.picture("train", i, "colour")
        assert pixels_of(asked, pictures.COLOURS[asked.answer]).sum() > 30
        asked = pictures.picture("train", i, "position")
        image = np.asarray(asked.image)
        column, row = pictures.PLACES[asked.answer]
        cell = image[32 * row : 32 * row + 32, 32 * column : 32 * column + 32].reshape(-1, 3)
        assert len(np.unique(cell, axis=0)) > 1  # something stands there
        asked = pictures.picture("train", i, "count")
        cells = [np.asarray(asked.image)[32 * r : 32 * r + 32, 32 * c : 32 * c + 32].reshape(-1, 3) for r in range(3)
                 for c in range(3)]  # fmt: skip
        assert sum(len(np.unique(cell, axis=0)) > 1 for cell in cells) >= int(asked.answer)


def test_facts_are_those_of_the_pixels(scripts):
    pictures, vision = scripts
    heads, known = vision.Heads(8), pictures.keys()
    for i in range(60):
        asked = pictures.picture("train", i, ["colour", "count", "position"][i % 3])
        cells = [np.asarray(asked.image)[32 * r : 32 * r + 32, 32 * c : 32 * c + 32].reshape(-1, 3) for r in range(3)
                 for c in range(3)]  # fmt: skip
        filled = sum(len(np.unique(cell, axis=0)) > 1 for cell in cells)
        assert sum(int(n) for key, n in asked.facts.items() if key.startswith("count")) == filled
        for key, answer in asked.facts.items():
            assert answer in known[key]
            if key.startswith("colour"):
                assert pixels_of(asked, pictures.COLOURS[answer]).any()
        assert asked.facts[asked.key] == asked.answer
        assert heads.places(asked)[0] == heads.place(asked.key, asked.answer)
        assert len(set(heads.places(asked))) == len(asked.facts)


def test_a_head_looks_at_the_answers_of_its_question_alone(scripts):
    _, vision = scripts
    heads = vision.Heads(8)
    places = torch.zeros(2, 2, 3, dtype=torch.long)
    places[0] = torch.tensor([heads.place("shape", "star"), heads.place("count star", "2")])
    places[1, 0] = torch.tensor(heads.place("digit", "7"))
    patches = torch.randn(2, 4, 8)
    loss, right = heads(patches, places)
    x = heads.norm(patches)
    logits = heads.linear(torch.cat([x.mean(1), x.amax(1)], 1))
    expected, firsts = [], []
    for sample, (first, last, answer) in ((0, places[0, 0]), (0, places[0, 1]), (1, places[1, 0])):
        part = logits[sample, first:last].log_softmax(0)
        expected.append(-part[answer - first])
        firsts.append(int(part.argmax()) == int(answer - first))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert right.tolist() == [firsts[0], firsts[2]]


def test_pictures_are_the_same_again_and_held_out_digits_are_others(scripts):
    pictures, _ = scripts
    for kind in pictures.OLD | pictures.NEW:
        first, again, other = (pictures.picture(s, i, kind) for s, i in (("test", 3), ("test", 3), ("train", 3)))
        assert first.image.tobytes() == again.image.tobytes()
        assert first[1:] == again[1:]
        assert first.image.tobytes() != other.image.tobytes()
        assert first.answer in first.answers
    keys = pictures.keys()
    for i in range(70):
        asked = pictures.picture("train", i)
        assert keys[asked.key] == asked.answers


def run(vision, monkeypatch, checkpoint, output, *more):
    options = {
        "language_model": checkpoint,
        "output": output,
        "size": "tiny",
        "batch_size": 4,
        "workers": 0,
        "steps": 5,
    }
    options |= {"minutes": 1000, "log_every": 1, "files": json.dumps(FILES), "results": output / "results"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/vision.py", *map(str, [*arguments, *more])])
    vision.main()


def test_a_training_that_is_cut_off_ends_as_one_that_is_not(scripts, checkpoint, tmp_path, monkeypatch):
    _, vision = scripts
    run(vision, monkeypatch, checkpoint, tmp_path / "whole")
    calls = 0
    while not (tmp_path / "cut" / "log.json").is_file():
        run(vision, monkeypatch, checkpoint, tmp_path / "cut", "--seconds", 1e-9)  # one step a call
        calls += 1
    assert calls == 11
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    log = json.loads((tmp_path / "whole" / "log.json").read_text())
    assert [entry["phase"] for entry in log] == ["tower"] * 5 + ["answers"] * 5
    [result] = (tmp_path / "whole" / "results").glob("vision_*.json")
    rows = json.loads(result.read_text())["rows"]
    assert rows.keys() == {*vision.pictures.OLD, "chart"}
    assert rows["number"]["chance"] == pytest.approx(1 / 90)


def test_what_is_trained_on_is_what_is_read_from_the_files(scripts, checkpoint, tmp_path, monkeypatch):
    """The batches of the script are those of `corda` on the same pictures."""
    pictures, vision = scripts
    run(vision, monkeypatch, checkpoint, tmp_path / "model")
    source = ModelConfig(str(tmp_path / "model"))
    tokenizer = load_tokenizer(source)
    asked = [pictures.picture("train", i) for i in range(4)]
    rows = [pictures.row(a, vision.pictures.random.Random(0)) for a in asked]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [batch], order = context_batches(tokenizer, load_samples(DataConfig(str(tmp_path / "rows.jsonl"))), 500)
    heads = vision.Heads(8)
    own = next(vision.Drawn(tokenizer.processor, heads, "train").batches(0, 4, 0))
    for i, number in enumerate(order):
        torch.testing.assert_close(vision.scaled(own["pixels"][number]), batch["pixel_values"][i], rtol=0, atol=1e-5)
        n = int(own["mask"][number].sum())
        assert torch.equal(own["ids"][number][:n], batch["input_ids"][i][:n])
        assert torch.equal(own["answers"][number][:n], batch["labels"][i][:n] != -100)
