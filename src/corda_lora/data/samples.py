"""Samples: rows of a data set, as prompt and response or as a chat."""

import hashlib
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ..config import CordaError, DataConfig
from ..progress import track_if_slow
from .images import COLUMNS, BadImageError, Picture, has_place, row_images, with_images
from .rows import Row, load_rows
from .templates import Field, MissingValueError, is_missing, parse_template, render, short

Message = dict[str, Any]
UNCUT = 10**9  # a `max_length` that cuts nothing
SOURCES = ("image", "path", "url", "image_url", "base64", "bytes")  # what a part of a message calls its image
NAMED = 5  # rows that are left out and are named one by one
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Sample(NamedTuple):
    """What is asked and what is answered.

    Args:
        prompt: text before the response; empty in a chat, and where there is only text.
        response: text of the response, or of the assistant's last turn in a chat. Empty if there is none.
        row: the row of the data set.
        messages: the turns of a chat, each with a role and a content; none if the sample is no chat.
        first: in a chat, the first message that may carry the loss. All turns of the assistant from there on do.
        label: of a text to classify, which is the prompt; None of other samples.
        pair: a second text to classify with the first.
        images: in the order of their places in the messages.
    """

    prompt: str
    response: str
    row: Row
    messages: tuple[Message, ...] = ()
    first: int = 0
    label: str | None = None
    pair: str = ""
    images: tuple[Picture, ...] = ()

    def answered(self, response: str) -> "Sample":
        """The same question with another response."""
        if not self.messages:
            return Sample(self.prompt, response, {})
        before = self.question()
        turns = (*before, {"role": "assistant", "content": response})
        return Sample("", response, self.row, turns, len(before), images=self.images)

    def question(self) -> tuple[Message, ...]:
        """The turns of a chat before the assistant's last."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.messages[: turns[-1]] if turns else self.messages

    @property
    def shown(self) -> tuple[Any, ...]:
        """All that a model is shown: equal for samples that are the same."""
        return self.prompt, self.response, self.pair, repr(self.messages), tuple(p.sha256 for p in self.images)


def load_samples(config: DataConfig) -> list[Sample]:
    """Read, draw and render the samples that `config` names.

    Raises:
        CordaError: there is no such file or data set, a template does not fit the columns or a row, or there is no row.
    """
    return load_rounds(config, 1)[0]


def digest_of(samples: Iterable[Sample]) -> str:
    """The SHA-256 of what samples hold: a file may change and keep its name."""
    digest = hashlib.sha256()
    for s in samples:
        labelled = [s.label, s.pair] if s.label is not None else []
        images = [[picture.sha256 for picture in s.images]] if s.images else []
        parts = [s.prompt, s.response, s.messages, s.first, *labelled, *images]
        digest.update(json.dumps(parts, default=str).encode())
    return digest.hexdigest()


def load_others(config: DataConfig, shown: Sequence[Sample], count: int) -> list[Sample]:
    """Up to `count` samples that are not among those shown, nor any with the same text: to measure on what has not been
    seen. None if all the data is shown.

    Where samples have images, rows are read until there are as many, since to read all would take long. Rows that
    cannot be read are passed over, since nobody asked for these.

    Args:
        shown: what `load_samples` has drawn with the same configuration, or `load_rounds` in all rounds.

    Raises CordaError if the data cannot be read.
    """
    if config.samples is None or len(shown) < config.samples:
        return []  # there was no more to draw
    rows, columns = load_rows(config)
    if config.samples >= len(rows):
        return []
    read, drawn = _reader(config, columns, rows), {s.shown for s in shown}

    def others(numbers: Iterable[int]) -> Iterator[Sample]:
        for i in numbers:
            with suppress(MissingValueError, CordaError):
                if (sample := read(rows[i])).shown not in drawn:
                    yield sample

    generator = random.Random(config.seed)
    if any(s.images for s in shown):
        return list(islice(others(generator.sample(range(len(rows)), len(rows))), count))
    found = list(others(track_if_slow(range(len(rows)), "reading")))
    return generator.sample(found, min(count, len(found)))


def load_rounds(config: DataConfig, rounds: int) -> list[list[Sample]]:
    """Several independent draws of `config.samples` samples; the first is that of `load_samples`.

    Rows with a missing value are left out with a warning that counts them, and others are drawn in their place; so are
    rows with an image that cannot be read, where `config.bad_images` says so.

    Raises:
        CordaError: as `load_samples` does, and if the data has no more rows than one round takes, so that all rounds
            would be the same.
    """
    rows, columns = load_rows(config)
    if not len(rows):
        raise CordaError(f"{config.data} ({config.rows}) has no rows")
    read = _reader(config, columns, rows)
    everything = config.samples is None or config.samples >= len(rows)
    if everything and rounds > 1:
        raise CordaError(
            f"{rounds} rounds of {config.samples or 'all'} samples would all be the {len(rows)} rows of "
            f"{config.data}: give fewer samples, or one round"
        )
    generator = random.Random(config.seed)
    count = len(rows) if config.samples is None else min(config.samples, len(rows))
    result: list[list[Sample]] = []
    missing: dict[int, str] = {}  # row: what it is without
    unseen: dict[int, str] = {}  # row: why its image cannot be read
    for _ in range(rounds):
        drawn = list(range(len(rows))) if everything else generator.sample(range(len(rows)), count)
        samples: dict[int, Sample] = {}
        while True:
            for i in track_if_slow(drawn, "reading"):
                try:
                    samples[i] = read(rows[i])
                except MissingValueError as error:
                    missing[i] = f"without {short(str(error))}"
                except CordaError as error:
                    if isinstance(error, BadImageError) and config.bad_images == "skip":
                        missing[i], unseen[i] = "with an image that cannot be read", str(error)
                        continue
                    raise CordaError(f"row {i + 1} of {config.data} ({config.rows}): {error}") from error
            if len(samples) == count:
                break
            left = [i for i in range(len(rows)) if i not in samples and i not in missing]
            drawn = generator.sample(left, min(count - len(samples), len(left)))
            if not drawn:
                break
        result.append([samples[i] for i in sorted(samples)])
    for i, why in sorted(unseen.items())[:NAMED]:
        warnings.warn(f"row {i + 1} of {config.data} ({config.rows}) is left out: {why}", stacklevel=3)
    _report_missing(config, missing, looked_at=len(missing) + sum(map(len, result)))
    if any(column in columns for column in COLUMNS) and not config.label:
        _report_unillustrated(config, list(chain(*result)))
    if not any(s.messages or (s.prompt + s.response).strip() for samples in result for s in samples):
        raise CordaError(f"every sample of {config.data} is empty text")
    return result


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The samples without a share of them, and that share, drawn with the seed. Both are in the order of the samples.

    Raises CordaError if nothing would be left to learn.
    """
    count = max(1, round(share * len(samples))) if share else 0
    if count == len(samples) > 0:
        raise CordaError(f"of {len(samples)} samples all would be held out, and none is left to learn")
    drawn = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in drawn], [samples[i] for i in sorted(drawn)]


def as_samples(items: Iterable[Any]) -> list[Sample]:
    """Samples from Python: texts, chats (lists of messages), or rows with the columns that files have, such as those of
    a `datasets.Dataset`.

    Raises:
        CordaError: an item is none of these, or no row is complete.
    """
    rows: list[Row] = []
    for i, item in enumerate(items):
        row = {"text": item} if isinstance(item, str) else {"messages": item} if isinstance(item, list) else item
        if not isinstance(row, Mapping):
            raise CordaError(
                f"item {i} of the context is of type {type(item).__name__}: give batches (dicts of tensors), texts, "
                "chats, or rows with the columns prompt and response, text, or messages"
            )
        rows.append(dict(row))
    config = DataConfig("the context")
    read = _reader(config, list(dict.fromkeys(column for row in rows for column in row)), rows)
    samples: list[Sample] = []
    missing: dict[int, str] = {}
    for i, row in enumerate(rows):
        try:
            samples.append(read(row))
        except MissingValueError as error:
            missing[i] = f"without {short(str(error))}"
        except CordaError as error:
            raise CordaError(f"item {i} of the context: {error}") from error
    _report_missing(config, missing, len(rows))
    return samples


def _report_unillustrated(config: DataConfig, samples: Sequence[Sample]) -> None:
    if without := sum(not s.images for s in samples):
        warnings.warn(f"{config.data}: {without:,} of {len(samples):,} rows have no image: words alone", stacklevel=4)


def _report_missing(config: DataConfig, missing: dict[int, str], looked_at: int) -> None:
    if not missing:
        return
    fields = ", ".join(f"{count} {lack}" for lack, count in Counter(missing.values()).most_common(5))
    if looked_at == len(missing):
        raise CordaError(f"no row of {config.data} is complete: of {looked_at:,} rows, {fields}")
    warnings.warn(f"{config.data}: {len(missing):,} of {looked_at:,} rows left out: {fields}", stacklevel=4)


def _reader(config: DataConfig, columns: Sequence[str], rows: Iterable[Row]) -> Callable[[Row], Sample]:
    """The function from a row to a sample that the options and the columns ask for. Where any of the rows has an image,
    all prompts are turns of a user: a model is asked in one form.

    Raises:
        CordaError: the columns do not allow any.
    """
    if config.label:
        return _label_reader(config, columns)
    read, path = _text_reader(config, columns), Path(config.data)
    folder = path if path.is_dir() else path.parent if path.is_file() else None

    illustrated = any(column in columns for column in COLUMNS) and any(map(row_images, rows))  # ends at the first

    def read_shown(row: Row) -> Sample:
        sample, values = read(row), row_images(row)
        asks = illustrated and (sample.messages or sample.prompt.strip())  # running text does not
        return _with_images(sample, values, folder, config) if values or asks or has_place(sample.messages) else sample

    return read_shown


def _with_images(sample: Sample, values: Sequence[Any], folder: Path | None, config: DataConfig) -> Sample:
    """The sample with the images of its row, which makes a chat of a prompt and a response: the model's chat template
    knows where images stand."""
    if not sample.messages:
        turns = [{"role": "user", "content": sample.prompt}]
        turns += [{"role": "assistant", "content": sample.response}] * bool(sample.response.strip())
        sample = _chat(turns, 0, sample.row, config)
    messages, pictures = with_images(sample.messages, values, folder)
    row = {name: value for name, value in sample.row.items() if name not in COLUMNS}  # decoded images are large
    return sample._replace(messages=messages, images=pictures, row=row)


def _text_reader(config: DataConfig, columns: Sequence[str]) -> Callable[[Row], Sample]:
    """The same, of the texts of a row."""
    if not config.prompt and not config.response:
        for column in ("messages", "conversations"):
            if column in columns:
                return lambda row: _chat(_messages(row.get(column), column), 0, row, config)
    prompt, response = _templates(config, columns)
    try:
        asked, answer = parse_template(prompt, columns), parse_template(response, columns)
    except CordaError as error:
        raise CordaError(f"{config.data}: {error}") from error
    for field in (*asked, *answer):
        if isinstance(field, Field) and field.column in COLUMNS:
            raise CordaError(
                f"{config.data}: a template has {{{field}}}, and the column {field.column} holds images: where one "
                "stands a template says <image>; if it holds words, give it another name"
            )
    running_text = not prompt and response == "{text}"
    if config.chat and not (prompt and response):
        raise CordaError(f"{config.data}: chat needs a prompt and a response: say with templates what they are")

    def read(row: Row) -> Sample:
        if not config.prompt and isinstance(row.get("prompt"), list) and prompt:
            return _prompt_and_completion(row, config, response)
        if running_text and isinstance(row.get("text"), str):
            return Sample("", row["text"], row)  # an empty line is a part of running text
        sample = Sample(render(asked, row), render(answer, row), row)
        if not config.chat:
            return sample
        turns = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.response}]
        return _chat(turns, 0, row, config)

    return read


def _templates(config: DataConfig, columns: Sequence[str]) -> tuple[str, str]:
    """The templates of the prompt and the response; what is not given is a column of that name, if there is one."""
    prompt, response = config.prompt, config.response
    if not response:
        answers = [column for column in ("response", "completion") if column in columns]
        if answers:
            response = "{" + answers[0] + "}"
        elif not prompt and "text" in columns:
            return "", "{text}"
        prompt = prompt or ("{prompt}" if "prompt" in columns else "")
    if not prompt + response:
        raise CordaError(
            f"{config.data} has none of the columns text, prompt, response, completion, messages, conversations: "
            "say with --prompt and --response what of a row is used, or with label what labels a text; it has "
            f"{short(', '.join(columns), 200, quoted=False)}"
        )
    return prompt, response


# Columns of the texts to classify, and of pairs of them, that stand for a prompt that is not given.
TEXTS = ("prompt", "text", "sentence")
PAIRS = (("sentence1", "sentence2"), ("question", "sentence"), ("premise", "hypothesis"))


def _label_reader(config: DataConfig, columns: Sequence[str]) -> Callable[[Row], Sample]:
    """The function from a row to a text, or two, with a label."""
    prompt, pair = config.prompt, config.pair
    if not prompt and not pair:
        found = next((names for names in (*PAIRS, *((name,) for name in TEXTS)) if {*names} <= {*columns}), ())
        if not found:
            raise CordaError(
                f"{config.data} has none of the columns {', '.join(TEXTS)}: say with --prompt what the text to "
                f"classify is; it has {short(', '.join(columns), 200, quoted=False)}"
            )
        prompt, pair = (["{" + name + "}" for name in found] + [""])[:2]
    try:
        texts = [parse_template(template, columns) for template in (prompt, pair)]
        [label] = parse_template("{" + config.label + "}", columns)
    except CordaError as error:
        raise CordaError(f"{config.data}: {error}") from error

    def read(row: Row) -> Sample:
        first, second, name = (render(parts, row) for parts in (*texts, [label]))
        return Sample(first, "", row, label=name.strip(), pair=second)

    return read


# --- chats -----------------------------------------------------------------------------------------------------------


def _prompt_and_completion(row: Row, config: DataConfig, response: str) -> Sample:
    """A prompt that is a list of messages, with a completion that is one, too, or a text."""
    prompt = _messages(row["prompt"], "prompt")
    column = response.strip("{}")
    completion = row.get(column) if column else []
    if isinstance(completion, str) and completion.strip():
        completion = [{"role": "assistant", "content": completion}]
    return _chat([*prompt, *(_messages(completion, column) if column else [])], len(prompt), row, config)


def _messages(value: Any, column: str) -> list[Message]:
    """Messages in the form {"role": ..., "content": ...}, from that form or ShareGPT's {"from": ..., "value": ...}.

    Raises:
        MissingValueError: there are none, or one without a content.
        CordaError: they have another form.
    """
    if is_missing(value):
        raise MissingValueError(column)
    if not isinstance(value, list):
        raise CordaError(f"{column!r} holds no list of messages: {short(value)}")
    messages = []
    for i, message in enumerate(value):
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise CordaError(f"{column}[{i}] has no role and content (or from and value): {short(message)}")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = _parts(content)
        calls = not is_missing(message.get("tool_calls"))
        if (is_missing(content) and not calls) or _lacks_text(content):
            raise MissingValueError(f"{column}[{i}][content]")
        if not isinstance(content, str) and not calls and not _is_shown(content):
            raise CordaError(f"the content of {column}[{i}] is no text: {short(content)}")
        others = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
        messages.append({"role": ROLES.get(role, role), "content": content or "", **others})
    return messages


def _lacks_text(content: Any) -> bool:
    """Whether a content is of parts, one of which is to be a text and has none."""
    return isinstance(content, list) and any(
        isinstance(p, dict) and p.get("type") == "text" and p.get("text") is None for p in content
    )


def _is_shown(content: Any) -> bool:
    """Whether a content is of texts and images, as `_parts` writes it."""
    return isinstance(content, list) and all(
        isinstance(p, dict) and (p.get("type") == "image" or (p.get("type") == "text" and isinstance(p["text"], str)))
        for p in content
    )


def _parts(content: list[Any]) -> Any:
    """The parts of a message's content: one text, if all are texts; or texts and images, each `{"type": "image"}` with
    its own `image`, or without one. What is neither is left as it is."""
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            key = next((key for key in SOURCES if not is_missing(part.get(key))), None)
            own = {} if key is None else {"image": {"bytes": part[key]} if key in ("base64", "bytes") else part[key]}
            parts.append({"type": "image", **own})
        else:
            return content
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _chat(messages: list[Message], first: int, row: Row, config: DataConfig) -> Sample:
    """A sample of messages; `first` is the first that may carry the loss."""
    turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if config.turns == "last" and turns:
        first = turns[-1]
    return Sample("", messages[turns[-1]]["content"] if turns else "", row, tuple(messages), first)
