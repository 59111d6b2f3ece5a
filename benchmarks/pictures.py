"""Pictures to ask about, drawn by Pillow: shapes, colours, counts, positions, digits and words; and bar charts.

    python benchmarks/pictures.py OUTPUT

writes the files of the comparison that `recipes/vision.yaml` runs, and scikit-learn's digits, for a machine without it.
Picture number i of a split is always the same. What is asked has one short answer.
"""

import base64
import io
import json
import random
import sys
from collections.abc import Callable
from functools import cache
from math import cos, pi, sin
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 96  # pixels of a side
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
    "black": (20, 20, 20),
    "pink": (245, 140, 190),
}
PLACES = {"top left": (0, 0), "top right": (2, 0), "middle": (1, 1), "bottom left": (0, 2), "bottom right": (2, 2)}
# fmt: off
WORDS = (
    "apple", "bread", "chair", "dance", "eagle", "flame", "grape", "horse", "island", "jacket", "kettle", "lemon",
    "magnet", "needle", "ocean", "pencil", "queen", "river", "saddle", "table", "uncle", "violin", "window", "yellow",
    "zebra", "anchor", "bottle", "candle", "dragon", "engine", "forest", "garden", "hammer", "insect", "jungle",
    "kitten", "ladder", "mirror", "napkin", "orchid", "parrot", "quartz", "rabbit", "school", "ticket", "valley",
    "walnut", "spider", "copper", "button", "cactus", "guitar", "helmet", "marble", "planet", "rocket", "salmon",
    "tunnel", "velvet", "winter",
)
# fmt: on
BACKGROUNDS = ((250, 250, 250), (232, 236, 240), (240, 232, 222), (222, 238, 226))
HELD_OUT_DIGITS = 400  # of scikit-learn's 1,797


class Asked(NamedTuple):
    """A picture and what is asked about it.

    Attributes:
        key: of the question: what else is asked with this key has one of the same answers.
        facts: what else could be asked about it, by key, with the answer.
    """

    image: Image.Image
    key: str
    question: str
    answer: str
    answers: tuple[str, ...]
    facts: dict[str, str] = {}  # noqa: RUF012 (of a named tuple, never changed)


def _canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIZE, SIZE), rng.choice(BACKGROUNDS))
    return image, ImageDraw.Draw(image)


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: str) -> None:
    """A shape of radius r about (x, y)."""
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
    else:
        corners, radii = {"triangle": (3, (1.0,)), "diamond": (4, (1.0,)), "star": (10, (1.0, 0.42))}[shape]
        at = [(2 * pi * k / corners, radii[k % len(radii)] * r) for k in range(corners)]
        draw.polygon([(x + far * sin(a), y - far * cos(a)) for a, far in at], fill)


def _in_cells(
    rng: random.Random, draw: ImageDraw.ImageDraw, cells: list[tuple[int, int]], shapes: list[str]
) -> dict[str, str]:
    """A shape in each of some cells of a 3 × 3 grid; the facts about them."""
    colours: list[str] = []
    for (column, row), shape in zip(cells, shapes):
        colours.append(rng.choice([c for c in COLOURS if c not in colours] or list(COLOURS)))
        x, y = (SIZE / 6 * (2 * k + 1) + rng.uniform(-3, 3) for k in (column, row))
        _shape(draw, shape, x, y, rng.uniform(8, 12), colours[-1])
    facts = {f"count {shape}": str(shapes.count(shape)) for shape in shapes}
    for cell, shape, colour in zip(cells, shapes, colours):
        if shapes.count(shape) == 1:
            facts[f"colour {shape}"] = colour
            facts |= {f"position {shape}": place for place, where in PLACES.items() if where == cell}
    return facts


GRID = [(column, row) for column in range(3) for row in range(3)]


def _text(rng: random.Random, image: Image.Image, draw: ImageDraw.ImageDraw, text: str, sizes: tuple[int, int]) -> None:
    font = ImageFont.load_default(rng.randint(*sizes))
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    x = rng.uniform(1, max(1, SIZE - 1 - (right - left))) - left
    y = rng.uniform(1, max(1, SIZE - 1 - (bottom - top))) - top
    draw.text((x, y), text, COLOURS[rng.choice(["red", "green", "blue", "purple", "black"])], font)


# --- the kinds -------------------------------------------------------------------------------------------------------


def shape(rng: random.Random, held_out: bool) -> Asked:
    image, draw = _canvas(rng)
    [name] = rng.choices(SHAPES)
    r = rng.uniform(10, 30)
    tint = rng.choice(list(COLOURS))
    _shape(draw, name, rng.uniform(r, SIZE - r), rng.uniform(r, SIZE - r), r, tint)
    question = rng.choice(["What shape is this?", "Which shape is shown?"])
    return Asked(image, "shape", question, name, SHAPES, {f"colour {name}": tint, f"count {name}": "1"})


def colour(rng: random.Random, held_out: bool) -> Asked:
    image, draw = _canvas(rng)
    names = rng.sample(SHAPES, 2)
    facts = _in_cells(rng, draw, rng.sample(GRID, 2), names)
    key = f"colour {names[0]}"
    return Asked(image, key, f"What colour is the {names[0]}?", facts[key], tuple(COLOURS), facts)


def count(rng: random.Random, held_out: bool) -> Asked:
    image, draw = _canvas(rng)
    name, other = rng.sample(SHAPES, 2)
    n = rng.randint(1, 6)
    shapes = [name] * n + [other] * rng.randint(0, 3)
    facts = _in_cells(rng, draw, rng.sample(GRID, len(shapes)), shapes)
    plural = {"cross": "crosses"}.get(name, f"{name}s")
    return Asked(image, f"count {name}", f"How many {plural} are there?", str(n), tuple("123456"), facts)


def position(rng: random.Random, held_out: bool) -> Asked:
    image, draw = _canvas(rng)
    name, other = rng.sample(SHAPES, 2)
    place = rng.choice(list(PLACES))
    elsewhere = rng.choice([cell for cell in GRID if cell != PLACES[place]])
    facts = _in_cells(rng, draw, [PLACES[place], elsewhere], [name, other])
    return Asked(image, f"position {name}", f"Where is the {name}?", place, tuple(PLACES), facts)


DIGITS = Path("digits.npz")  # read where it is there; `write_files` writes it


@cache
def _digits() -> dict[str, np.ndarray]:
    """Images (n, 8, 8) uint8 and which digits they are (n,)."""
    if DIGITS.is_file():
        return dict(np.load(DIGITS))
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"images": (digits.images * (255 / 16)).astype(np.uint8), "digits": digits.target.astype(np.uint8)}


def digit(rng: random.Random, held_out: bool) -> Asked:
    """Written by hand: of scikit-learn's digits, those of held-out pictures are by themselves."""
    image, _ = _canvas(rng)
    written = _digits()
    first = len(written["digits"]) - HELD_OUT_DIGITS
    i = rng.randrange(first, len(written["digits"])) if held_out else rng.randrange(first)
    ink = Image.fromarray(written["images"][i])
    side = rng.randint(48, 80)
    ink = ink.resize((side, side), Image.Resampling.BICUBIC)
    at = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    image.paste(Image.new("RGB", ink.size, COLOURS[rng.choice(["black", "blue", "purple"])]), at, ink)
    answer = str(written["digits"][i])
    return Asked(image, "digit", "Which digit is written by hand?", answer, tuple("0123456789"))


def number(rng: random.Random, held_out: bool) -> Asked:
    image, draw = _canvas(rng)
    answer = str(rng.randint(10, 99))
    _text(rng, image, draw, answer, (26, 48))
    return Asked(image, "number", "Which number is printed?", answer, tuple(map(str, range(10, 100))))


def word(rng: random.Random, held_out: bool) -> Asked:
    image, draw = _canvas(rng)
    answer = rng.choice(WORDS)
    _text(rng, image, draw, answer, (16, 22))
    return Asked(image, "word", "Which word is printed?", answer, tuple(WORDS))


def chart(rng: random.Random, held_out: bool) -> Asked:
    """Bars of 1 to 9 units, with a line for each unit: the kind to learn."""
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    bars = dict(zip(rng.sample(list(COLOURS), 4), rng.sample(range(1, 10), 4)))
    for unit in range(1, 10):
        draw.line((8, 90 - 9 * unit, 92, 90 - 9 * unit), (150, 150, 150) if unit == 5 else (215, 215, 215))
    for i, (name, height) in enumerate(bars.items()):
        draw.rectangle((12 + 20 * i, 90 - 9 * height, 25 + 20 * i, 90), COLOURS[name])
    draw.line((8, 5, 8, 90, 92, 90), (0, 0, 0), width=2)
    asked = rng.randrange(3)
    if asked == 2:
        name = rng.choice(list(bars))
        return Asked(image, "value", f"What is the value of the {name} bar?", str(bars[name]), tuple("123456789"))
    question, best = (("Which bar is the highest?", max), ("Which bar is the lowest?", min))[asked]
    return Asked(image, question, question, best(bars, key=bars.__getitem__), tuple(COLOURS))


OLD: dict[str, Callable[[random.Random, bool], Asked]] = {
    "shape": shape,
    "colour": colour,
    "count": count,
    "position": position,
    "digit": digit,
    "number": number,
    "word": word,
}
NEW = {"chart": chart}


def picture(split: str, i: int, kind: str | None = None) -> Asked:
    """Picture i of a split, of a kind, or of the old kinds in turn."""
    kind = kind or [*OLD][i % len(OLD)]
    return (OLD | NEW)[kind](random.Random(f"{split} {kind} {i}"), split != "train")


def keys() -> dict[str, tuple[str, ...]]:
    """The answers to each question of the old kinds, by its key."""
    found = {"shape": SHAPES, "digit": tuple("0123456789"), "word": tuple(WORDS)}
    found["number"] = tuple(map(str, range(10, 100)))
    for name in SHAPES:
        found |= {f"colour {name}": tuple(COLOURS), f"count {name}": tuple("123456"), f"position {name}": tuple(PLACES)}
    return found


def row(asked: Asked, rng: random.Random) -> dict[str, Any]:
    """A row as `corda` reads it, with four answers to choose from."""
    buffer = io.BytesIO()
    asked.image.save(buffer, "png")
    others = rng.sample([answer for answer in asked.answers if answer != asked.answer], 3)
    choices = rng.sample([asked.answer, *others], 4)
    image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"image": image, "prompt": asked.question, "response": asked.answer, "choices": choices}


def write_files(folder: Path, train: int = 4800, context: int = 2100, test: int = 100, charts: int = 500) -> None:
    """The samples of the comparison: charts to learn and to measure, a context of the old kinds, and `test` pictures of
    each old kind, together and apart."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / DIGITS.name, **_digits())
    kept = {kind: [picture("test", i, kind) for i in range(test)] for kind in OLD}
    files = {
        "chart_train": [picture("train", i, "chart") for i in range(train)],
        "chart_test": [picture("test", i, "chart") for i in range(charts)],
        "old_context": [picture("context", i) for i in range(context)],
        "old_test": [asked for of_kind in kept.values() for asked in of_kind],
    } | {f"old_{kind}": of_kind for kind, of_kind in kept.items()}
    for name, pictures in files.items():
        rng = random.Random(name)
        text = "".join(json.dumps(row(asked, rng)) + "\n" for asked in pictures)
        partial = folder / f"{name}.jsonl.partial"
        partial.write_text(text)
        partial.replace(folder / f"{name}.jsonl")
        print(f"{folder / name}.jsonl: {len(pictures):,} rows, {len(text) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
