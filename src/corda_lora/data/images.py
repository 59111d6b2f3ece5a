"""Images of samples: found in rows, put into the text by the model's own processor, and into batches as pixels.

A picture is decoded once when its row is read, so that a broken one is known by its row before any long work, and again
for each batch that shows it: pixels are in memory only there. How many tokens stand for a picture hangs on its size
alone, so the processor is asked once for each size.
"""

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import CordaError
from ..config.values import short
from .templates import is_missing

if TYPE_CHECKING:  # torch is imported where pixels are: samples are read before long imports
    from torch import Tensor

COLUMNS = ("image", "images")
PLACE = re.compile(r"\n?<image>\n?")  # the place of an image in a text, as LLaVA's files write it
Size = tuple[int, int]  # width, height
Span = tuple[int, int]  # of characters


class BadImageError(CordaError):
    """An image that cannot be read."""


@dataclass(frozen=True)
class Picture:
    """An image that was read once.

    Attributes:
        name: for messages.
        source: its file, its bytes, or the decoded image.
        size: in pixels.
        sha256: of its bytes.
    """

    name: str
    source: Any
    size: Size
    sha256: str

    def open(self) -> Any:
        """The image in RGB, upright. Raises BadImageError if the file is gone or damaged by now."""
        return _decoded(self.name, self.source)[0]


class Shown(NamedTuple):
    """The pictures of a sample, in the order of their places, and the processor that makes pixels of them."""

    processor: Any
    pictures: tuple[Picture, ...]


def _decoded(name: str, source: Any) -> tuple[Any, bytes]:
    """The image in RGB, upright, and the bytes that tell it from others."""
    from PIL import Image, ImageOps

    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
        image = _in_8_bits(ImageOps.exif_transpose(image)).convert("RGB")  # decodes it whole
    except Exception as error:  # Pillow raises many kinds
        reason = _reason(error)
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else reason
        reason = "it is no image that Pillow reads" if "cannot identify" in reason else reason
        raise BadImageError(f"cannot read the image {name}: {reason}") from error
    return image, content if isinstance(content, bytes) else image.tobytes()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _in_8_bits(image: Any) -> Any:
    """The image; if it is one of 16 bits a pixel, as X-rays are, in 8, since `convert` would make all above 255 white.

    Raises ValueError if pixels have 32 bits: how much is white is not said.
    """
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of which none is known to be white: save it in 8 bits")
    return image


def read_picture(value: Any, folder: Path | None) -> Picture:
    """A picture from what a row has of it: a path relative to `folder`, a URL, a data URI, bytes, what `datasets` has
    of an image ({"bytes", "path"}, or the decoded image), or an array of numbers (h, w, 3).

    Raises:
        BadImageError: it cannot be read, or had.
        CordaError: it is none of these.
    """
    name, source = _source(value, folder)
    image, content = _decoded(name, source)
    return Picture(name, source, image.size, hashlib.sha256(content).hexdigest())


def _source(value: Any, folder: Path | None) -> tuple[str, Any]:
    """A name for an image, and its file, its bytes, or the image itself."""
    if isinstance(value, dict):
        path, content = value.get("path") or value.get("url"), value.get("bytes") or value.get("base64")
        if content is not None:
            name = str(path or "given as bytes")
            return name, content if isinstance(content, (bytes, bytearray)) else _base64(name, str(content))
        value = value if path is None else path
    if isinstance(value, (bytes, bytearray)):
        return "given as bytes", bytes(value)
    if isinstance(value, str) and value.startswith("data:"):
        return "given as bytes", _base64("given as bytes", value.partition(",")[2])
    if isinstance(value, str) and re.match("https?://", value):
        return short(value)[1:-1], _fetched(value)
    if isinstance(value, (str, Path)):
        path = Path(os.path.expanduser(str(value).removeprefix("file://")))  # a `~` of nobody's home is a name
        return str(value), path if folder is None else folder / path
    if hasattr(value, "convert"):
        return getattr(value, "filename", "") or "given as an image", value
    if hasattr(value, "__array__"):
        return "given as an array", _of_array(value)
    raise CordaError(f"an image is a path, a URL or bytes, and not {short(value)}")


def _of_array(value: Any) -> Any:
    import numpy as np
    from PIL import Image

    try:
        return Image.fromarray(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise CordaError(
            "an image as an array has the shape (h, w, 3) and the type uint8, and not "
            f"{tuple(value.shape)} and {value.dtype}"
        ) from error


def _base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError(f"cannot read the image {name}: it is no base64") from error


def _fetched(url: str) -> bytes:
    import httpx

    try:
        response = httpx.get(url, follow_redirects=True, timeout=30)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise BadImageError(f"cannot fetch the image {short(url)}: {_reason(error)}") from error
    return response.content


# --- in rows ---------------------------------------------------------------------------------------------------------


def row_images(row: dict[str, Any]) -> list[Any]:
    """What the columns `image` and `images` of a row hold."""
    values: list[Any] = []
    for column in COLUMNS:
        value = row.get(column)
        values += value if isinstance(value, (list, tuple)) else [value]
    return [value for value in values if not _is_nothing(value)]


def _is_nothing(value: Any) -> bool:
    """Whether a cell has no image: it is missing, or says so in each of its fields."""
    if isinstance(value, dict):
        return all(_is_nothing(field) for field in value.values())
    return value is None or (isinstance(value, (str, float)) and is_missing(value))


def has_place(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether a chat has a part that is an image."""
    return any(part["type"] == "image" for m in messages for part in parts_of(m))


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message: texts and places of images."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def words_of(message: dict[str, Any]) -> str:
    """The text of a message, or the last of its texts."""
    return next((part["text"] for part in reversed(parts_of(message)) if part["type"] == "text"), "")


def with_images(
    messages: Sequence[dict[str, Any]], values: Sequence[Any], folder: Path | None
) -> tuple[tuple[dict[str, Any], ...], tuple[Picture, ...]]:
    """A chat with the places of its images, and the pictures in that order.

    An image is where a part of the content says so (`{"type": "image"}`, which may bring its own), or where the text
    says `<image>`. Without any such place all images come before the first words of the user.

    Raises:
        BadImageError: an image cannot be read.
        CordaError: there are more places than images, or more images.
    """
    placed = [_placed(message) for message in messages]
    if values and not has_place(placed):
        turn = next((i for i, message in enumerate(placed) if message["role"] == "user"), None)
        if turn is None:
            raise CordaError("the row has an image, and no turn of a user that it could belong to")
        parts = [{"type": "image"} for _ in values] + parts_of(placed[turn])
        placed[turn] = placed[turn] | {"content": parts}
    waiting, found, result = list(values), [], []
    places = sum(part["type"] == "image" and "image" not in part for m in placed for part in parts_of(m))
    if places != len(waiting):
        images = "1 image" if len(waiting) == 1 else f"{len(waiting)} images"
        raise CordaError(f"the row has {images}, and its text has places for {places}")
    for message in placed:
        parts = []
        for part in parts_of(message):
            if part["type"] == "image":
                if message["role"] == "assistant":
                    raise CordaError("an assistant's turn has an image: models answer in words")
                found.append(read_picture(part["image"] if "image" in part else waiting.pop(0), folder))
                part = {"type": "image"}
            parts.append(part)
        only_words = message["role"] != "user" and len(parts) == 1
        result.append(message | {"content": words_of(message) if only_words else parts})
    return tuple(result), tuple(found)


def _placed(message: dict[str, Any]) -> dict[str, Any]:
    """The message with each `<image>` in its text as a part."""
    parts: list[dict[str, Any]] = []
    for part in parts_of(message):
        texts = PLACE.split(part["text"]) if part["type"] == "text" and message["role"] != "assistant" else None
        for i, text in enumerate(texts or ()):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": text}] if text or len(texts or ()) == 1 else []
        parts += [part] if texts is None else []
    return message | {"content": parts}


# --- in texts --------------------------------------------------------------------------------------------------------


def processor_of(tokenizer: Any) -> Any:
    """The processor of a vision-language model, which `load_tokenizer` puts on its tokenizer; None of another."""
    return getattr(tokenizer, "processor", None)


def require_processor(tokenizer: Any) -> Any:
    """Raises CordaError if the tokenizer is that of a model which reads no images."""
    if (processor := processor_of(tokenizer)) is None:
        why = getattr(tokenizer, "no_processor", "") or "the model reads text alone: take a vision-language model"
        raise CordaError(f"the samples have images, and {why}")
    return processor


@lru_cache(maxsize=4096)
def _written(processor: Any, size: Size) -> tuple[str, tuple[str, ...]]:
    """The text that stands for an image of this size, and the names of what else the model is given for each token."""
    from PIL import Image

    image = Image.new("RGB", size)
    try:
        written = processor(images=[[image]], text=[processor.image_token], return_text_replacement_offsets=True)
        replaced = written["text_replacement_offsets"][0]
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        shown = f"{size[0]} × {size[1]}"
        raise CordaError(f"the model's processor refuses an image of {shown}: {_reason(error)}") from error
    return replaced[0]["replacement"], tuple(k for k in ("mm_token_type_ids", "token_type_ids") if k in written)


def expanded(
    tokenizer: Any, text: str, spans: Sequence[Span], pictures: Sequence[Picture]
) -> tuple[str, list[Span], Shown]:
    """A rendered chat with all tokens of its images, and where its spans are then.

    Raises CordaError: the model reads no images, its processor does not take one, or its chat template has not as many
    places as there are images.
    """
    processor = require_processor(tokenizer)
    places = [match.span() for match in re.finditer(re.escape(processor.image_token), text)]
    if len(places) > len(pictures):
        raise CordaError(
            f"the sample with {pictures[0].name} says {processor.image_token} in words, as in an answer, and that is "
            "the model's token of an image: it would be shown one more than there are"
        )
    if len(places) < len(pictures):
        raise CordaError(
            f"the model takes {len(places)} of the {len(pictures)} images of the sample with {pictures[0].name}: "
            f"its chat template writes so many places ({short(processor.image_token)})"
        )
    pieces, moved, end = [], [0] * (len(text) + 1), 0
    for (a, b), picture in zip(places, pictures):
        instead, _ = _written(processor, picture.size)
        pieces += [text[end:a], instead]
        moved[b] += len(instead) - (b - a)
        end = b
    for i in range(1, len(moved)):
        moved[i] += moved[i - 1]
    shown = Shown(processor, tuple(pictures))
    return "".join([*pieces, text[end:]]), [(a + moved[a], b + moved[b]) for a, b in spans], shown


def image_tokens(processor: Any) -> list[int]:
    """The ids of tokens that stand for parts of an image."""
    return [i for i in processor.image_token_ids if i is not None]


# --- in batches ------------------------------------------------------------------------------------------------------

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def image_inputs(shown: Sequence[Shown | None], ids: "Tensor") -> dict[str, "Tensor"]:
    """What a model's forward takes beside the ids (b, s) of a batch: pixels, sizes, and which tokens are of images.
    Nothing if no sample has an image.

    Raises BadImageError if an image cannot be read any more.
    """
    seen = [s for s in shown if s is not None]
    if not seen:
        return {}
    import torch

    processor = seen[0].processor
    images = [[picture.open() for picture in s.pictures] for s in seen]
    inputs = {k: v for k, v in processor(images=images, padding=True, return_tensors="pt").items() if k not in OF_TEXT}
    _, names = _written(processor, seen[0].pictures[0].size)
    kinds = torch.isin(ids, torch.tensor(image_tokens(processor))).long()  # (b, s), padding included
    return inputs | dict.fromkeys(names, kinds)
