"""Images of rows: where they come from, where they stand in a chat, which tokens are theirs, what cannot be read."""

import base64
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import httpx
import numpy as np
import pytest
import tiny
import tiny_vision
import torch
from PIL import Image

from corda_lora.config import CordaError, DataConfig
from corda_lora.data.batches import CutImageError, context_batches, encode, encode_all, encode_question
from corda_lora.data.images import image_tokens, read_picture, with_images
from corda_lora.data.samples import as_samples, digest_of, load_others, load_samples
from corda_lora.evaluation.generation import generate
from corda_lora.models.loading import with_processor

ASKED = {"prompt": "What is it?", "response": "a cat"}


@pytest.fixture(scope="module")
def llava():
    model, processor = tiny_vision.build("llava")
    return model, with_processor(processor)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of images, beside which nobody stands."""
    (tmp_path / "pics").mkdir()
    for i in range(6):
        (tmp_path / "pics" / f"{i}.png").write_bytes(tiny_vision.png(i))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(str(folder / "rows.jsonl"))


def pixels(picture):
    return torch.tensor(list(picture.open().get_flattened_data()))


@pytest.fixture(scope="module")
def url():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/1.png" else 404)
            self.end_headers()
            self.wfile.write(tiny_vision.png(1))

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/1.png"
    server.shutdown()


def test_an_image_is_the_same_wherever_it_comes_from(folder, url):
    content = (folder / "pics" / "1.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    values = [
        "pics/1.png",
        str(folder / "pics" / "1.png"),
        url,
        f"data:image/png;base64,{encoded}",
        {"bytes": encoded, "path": None},
        {"bytes": None, "path": "pics/1.png"},
    ]
    samples = load_samples(write(folder, [{**ASKED, "image": value} for value in values]))
    found = [sample.images[0] for sample in samples]
    found += [
        as_samples([{**ASKED, "image": value}])[0].images[0] for value in (content, Image.open(io.BytesIO(content)))
    ]
    expected = torch.tensor(list(tiny_vision.picture(1).get_flattened_data()))
    assert len(found) == 8
    for picture in found:
        assert torch.equal(pixels(picture), expected)
    assert len({picture.sha256 for picture in found[:7]}) == 1


def test_images_of_datasets(folder, tmp_path):
    rows = {
        "prompt": ["a?", "b?"],
        "response": ["c", "d"],
        "images": [[tiny_vision.png(0)], [tiny_vision.png(1), tiny_vision.png(2)]],
    }
    features = datasets.Features(
        prompt=datasets.Value("string"), response=datasets.Value("string"), images=datasets.List(datasets.Image())
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        samples = load_samples(DataConfig(str(tmp_path / name)))
        assert [len(sample.images) for sample in samples] == [1, 2]
        expected = torch.tensor(list(tiny_vision.picture(2).get_flattened_data()))
        assert torch.equal(pixels(samples[1].images[1]), expected)
    one = made.remove_columns("images").add_column("image", [tiny_vision.png(i) for i in (3, 4)])
    one.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "one.parquet"))
    assert [len(s.images) for s in load_samples(DataConfig(str(tmp_path / "one.parquet")))] == [1, 1]


CHATS = {
    "before the first words": ([{"role": "user", "content": "what?"}], ["image", "what?"]),
    "where a part says so": (
        [{"role": "user", "content": [{"type": "text", "text": "this"}, {"type": "image"}]}],
        ["this", "image"],
    ),
    "which may bring its own": (
        [{"role": "user", "content": [{"type": "image", "path": "pics/5.png"}, {"type": "text", "text": "this"}]}],
        ["image", "this"],
    ),
    "as LLaVA's files write it": (
        [{"from": "human", "value": "<image>\nWhat? And <image> too"}],
        ["image", "What? And ", "image", " too"],
    ),
    "in a later turn": (
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
            {"role": "user", "content": "and <image>?"},
        ],
        ["and ", "image", "?"],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_where_an_image_stands(name, folder):
    chat, expected = CHATS[name]
    key = "conversations" if "from" in chat[0] else "messages"
    own = "path" in json.dumps(chat)
    images = {} if own else {"images": [f"pics/{i}.png" for i in range(expected.count("image"))]}
    [sample] = load_samples(write(folder, [{key: [*chat, turn(chat, "fine")], **images}]))
    parts = sample.question()[-1]["content"]
    assert [part.get("text", "image") for part in parts] == expected
    assert len(sample.images) == expected.count("image")
    assert sample.response == "fine"
    if own:
        assert torch.equal(pixels(sample.images[0]), torch.tensor(list(tiny_vision.picture(5).get_flattened_data())))


def turn(chat, text):
    keys = ("from", "value") if "from" in chat[0] else ("role", "content")
    return dict(zip(keys, ("gpt" if "from" in chat[0] else "assistant", text)))


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_tokens_are_those_of_the_processor_and_answers_are_found(family):
    model, processor = tiny_vision.build(family)
    tokenizer = with_processor(processor)
    rows = [
        {**ASKED, "image": tiny_vision.picture(0, (40, 24))},
        {"messages": many_turns(), "images": [tiny_vision.picture(i, (24, 24 + 16 * i)) for i in range(2)]},
    ]
    for row in rows:
        [sample] = as_samples([row])
        encoded = encode(tokenizer, sample, 500)
        messages = [m if isinstance(m["content"], list) else as_parts(m) for m in sample.messages]
        text = processor.apply_chat_template(messages, tokenize=False)
        text = text if text.startswith("<s>") else f"<s>{text}"
        own = processor(text=[text], images=[[p.open() for p in sample.images]], add_special_tokens=False)
        assert encoded.ids == list(own["input_ids"][0])
        answers = "".join(tokenizer.decode(i) if a else "|" for i, a in zip(encoded.ids, encoded.answer))
        assert [a for a in answers.split("|") if a] == [
            f"{m['content']}$" for m in sample.messages if m["role"] == "assistant"
        ]
        assert not {*image_tokens(processor)} & {i for i, a in zip(encoded.ids, encoded.answer) if a}
        batches, _ = context_batches(tokenizer, [sample], 500)
        ours = {k: v for k, v in batches[0].items() if k not in ("labels",)}
        theirs = processor(
            text=[text], images=[[p.open() for p in sample.images]], add_special_tokens=False, return_tensors="pt"
        )
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
        assert (batches[0]["labels"][batches[0]["input_ids"] == model.config.image_token_id] == -100).all()


def many_turns():
    return [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "And\n<image>\n?"},
        {"role": "assistant", "content": "a dog"},
    ]


def as_parts(message):
    return message | {"content": [{"type": "text", "text": message["content"]}]}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_answers_of_a_batch_are_those_of_each_sample_alone(family):
    model, processor = tiny_vision.build(family)
    tokenizer = with_processor(processor)
    sizes = [(24, 24), (64, 32), (32, 64)]
    samples = as_samples([{**ASKED, "prompt": "hi " * (i + 1), "image": tiny_vision.picture(i, size)}
                          for i, size in enumerate(sizes)])  # fmt: skip
    prompts = [encode_question(tokenizer, sample) for sample in samples]
    together = generate(model, tokenizer, prompts, 8)
    assert together == [generate(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    other = as_samples([{**ASKED, "prompt": "hi ", "image": tiny_vision.picture(9)}])[0]
    assert len({*together, generate(model, tokenizer, [encode_question(tokenizer, other)], 8)[0]}) > 1


def test_an_image_counts_in_what_tells_samples_apart(folder):
    config = write(folder, [{**ASKED, "image": f"pics/{i}.png"} for i in range(4)])
    first = digest_of(load_samples(config))
    two = replace(config, samples=2)
    assert len(load_others(two, load_samples(two), 9)) == 2  # all have one text
    (folder / "pics" / "0.png").write_bytes(tiny_vision.png(99))
    assert digest_of(load_samples(config)) != first


def test_an_unreadable_image_is_named_by_its_row(folder):
    (folder / "pics" / "2.png").write_bytes((folder / "pics" / "2.png").read_bytes()[:200])
    (folder / "pics" / "4.png").write_text("no image")
    config = write(folder, [{**ASKED, "image": f"pics/{i}.png"} for i in range(8)])
    with pytest.raises(CordaError, match=r"row 3 of .*rows.jsonl .*cannot read the image pics/2.png: "):
        load_samples(config)
    with pytest.warns(UserWarning, match="is left out: cannot read") as warned:
        samples = load_samples(replace(config, bad_images="skip"))
    assert [s.images[0].name for s in samples] == [f"pics/{i}.png" for i in (0, 1, 3, 5)]
    said = "\n".join(str(w.message) for w in warned)
    assert "4 of 8 rows left out: 4 with an image that cannot be read" in said
    for number, reason in ((3, ""), (5, "it is no image"), (7, "there is no such file"), (8, "there is no such file")):
        assert f"row {number} of {config.data} (train) is left out: cannot read the image pics/{number - 1}" in said
        assert reason in said
    with pytest.warns(UserWarning, match="left out"):  # others are drawn in their place
        drawn = load_samples(replace(config, bad_images="skip", samples=4))
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": many_turns(), "image": "pics/0.png"}, "row 1 of .* the row has 1 image, and .* places for 2"),
        ({**ASKED, "prompt": "<image>", "images": ["pics/0.png"] * 2}, "has 2 images, and its text has places for 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has 0 images, and .* places for 1"),
        ({**ASKED, "image": 7}, "cannot read the image 7: there is no such file"),  # numbers of JSON are texts
        ({**ASKED, "image": {"x": 1}}, "an image is a path, a URL or bytes, and not"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}], "image": "pics/0.png"}, "assistant's"),
        ({**ASKED, "image": True}, "an image is a path, a URL or bytes, and not"),
        ({**ASKED, "image": "data:image/png;base64,@@"}, "it is no base64"),
        ({**ASKED, "image": "http://127.0.0.1:9/x.png"}, "cannot fetch the image"),
        ({**ASKED, "image": "~nobody-has-this-name/x.png"}, "cannot read the image ~nobody.*: there is no such file"),
        ({**ASKED, "image": "~$x.png"}, r"cannot read the image ~\$x.png: there is no such file"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}]},
            r"messages\[0\] is no text",
        ),
    ],
)
def test_rows_that_do_not_fit_their_images_are_refused(folder, row, sentence):
    with pytest.raises(CordaError, match=sentence):
        load_samples(write(folder, [row]))


def test_rows_without_an_image_are_counted_and_asked_as_the_others_are(folder, llava):
    config = write(folder, [ASKED, {**ASKED, "image": "pics/0.png"}, {**ASKED, "image": None}])
    with pytest.warns(UserWarning, match="2 of 3 rows have no image: words alone"):
        samples = load_samples(config)
    assert [len(s.images) for s in samples] == [0, 1, 0]
    assert all(s.response == "a cat" for s in samples)
    _, tokenizer = llava
    texts = [tokenizer.decode(encode(tokenizer, s, 100).ids).replace("<image>", "") for s in samples]
    assert texts == ["<s>#user\nWhat is it?$\n#assistant\na cat$\n"] * 3
    with pytest.warns(UserWarning, match="have no image"):  # one that is drawn alone, and one from Python
        assert load_samples(replace(config, rows="train[:2]", samples=1, seed=1))[0].messages
    assert as_samples([ASKED, {**ASKED, "image": tiny_vision.picture(0)}])[0].messages
    (text,) = as_samples([ASKED])
    assert text.prompt == "What is it?"
    with pytest.warns(UserWarning, match="1 of 2 rows have no image"):  # no question is asked of running text
        assert load_samples(write(folder, [{"text": "It rained."}, {"text": "A cat.", "image": "pics/0.png"}]))[0][
            :2
        ] == (
            "",
            "It rained.",
        )


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_place_without_an_image_is_named_by_its_row(folder, column):
    texts = ["<image>What?", "Who?", "<image>Why?"]
    rows = [{column: text if column == "prompt" else [{"role": "user", "content": text}]} for text in texts]
    rows[0]["image"] = "pics/0.png"
    with pytest.raises(CordaError, match=r"row 3 of .* the row has 0 images, and its text has places for 1"):
        load_samples(write(folder, rows))


def test_when_no_image_can_be_read_a_row_is_named(folder):
    config = replace(write(folder, [{**ASKED, "image": "pics/9.png"}]), bad_images="skip")
    with (
        pytest.warns(UserWarning, match=r"row 1 of .* is left out: cannot read the image pics/9.png: there is no such"),
        pytest.raises(CordaError, match=r"no row .* is complete: of 1 rows, 1 with an image that cannot be read"),
    ):
        load_samples(config)


def test_what_holds_no_image(folder):
    empty = [None, "", " ", {"bytes": None, "path": None}, [], [None], {"bytes": None, "path": ""}]
    config = write(folder, [{**ASKED, "image": "pics/0.png"}, *({**ASKED, "image": value} for value in empty)])
    with pytest.warns(UserWarning, match=f"{len(empty)} of {len(empty) + 1} rows have no image: words alone"):
        assert [len(s.images) for s in load_samples(config)] == [1, *(0 for _ in empty)]
    assert as_samples([{**ASKED, "image": float("nan")}])[0].images == ()


def test_the_column_of_an_image_in_a_template(folder):
    config = write(folder, [{**ASKED, "image": "pics/0.png"}])
    for template in ("{image} What?", "{image[path]} What?"):
        with pytest.raises(CordaError, match=r"a template has \{image.*the column image holds images"):
            load_samples(replace(config, prompt=template))
    [sample] = load_samples(replace(config, prompt="Which? <image> This?", response="{response}"))
    assert [part.get("text", "image") for part in sample.messages[0]["content"]] == ["Which? ", "image", " This?"]


def test_others_are_read_one_by_one(folder, monkeypatch):
    """Nor does an image that nobody asked for end a long run."""
    for i in range(60):
        (folder / "pics" / f"{i}.png").write_bytes(tiny_vision.png(i))
    config = replace(write(folder, [{**ASKED, "image": f"pics/{i}.png"} for i in range(60)]), samples=8)
    drawn = load_samples(config)
    shown = [s.images[0] for s in drawn]
    broken = [name for i in range(60) if (name := f"pics/{i}.png") not in {picture.name for picture in shown}][:40]
    for name in broken:
        (folder / name).write_text("no image")
    others = load_others(config, drawn, 5)
    assert len(others) == 5
    assert others == load_others(config, drawn, 5)
    assert not {s.images[0].name for s in others} & {*broken, *(picture.name for picture in shown)}
    assert len(load_others(config, drawn, 100)) == 12

    for name in broken:
        (folder / name).write_bytes(tiny_vision.png(100 + int(name[5:-4])))
    read = []
    monkeypatch.setattr("corda_lora.data.samples.with_images", counting(read))
    assert len(load_others(config, drawn, 5)) == 5
    assert len(read) <= 8 + 5  # those shown may come again
    for every in (replace(config, samples=None), replace(config, samples=9)):  # there is nothing to read
        assert load_others(replace(every, data="gone.jsonl"), drawn, 5) == []


def counting(read):
    def counted(messages, values, folder):
        read.append(values)
        return with_images(messages, values, folder)

    return counted


def test_a_bar_is_shown_if_reading_is_slow(folder, monkeypatch, capsys):
    config = write(folder, [{**ASKED, "image": f"pics/{i}.png"} for i in range(6)])
    load_samples(config)
    assert "reading" not in capsys.readouterr().err
    monkeypatch.setattr("corda_lora.progress.PATIENCE", 0.0)
    load_samples(config)
    said = capsys.readouterr().err
    assert "reading" in said
    assert "6/6" in said


def test_tokens_of_an_image_are_not_cut(llava):
    _, tokenizer = llava
    rows = [{**ASKED, "images": [tiny_vision.picture(i) for i in range(n)]} for n in (1, 3, 2)]
    samples = as_samples(rows)
    lengths = [last_image_token(tokenizer, encode(tokenizer, s, 500)) + 1 for s in samples]
    with pytest.raises(CutImageError, match=f"max_length 10 cuts the tokens of images.*samples need {max(lengths)}"):
        encode_all(tokenizer, samples, 10)
    assert encode_all(tokenizer, samples, max(lengths))[1].cut > 0  # words may be
    with pytest.raises(CutImageError):
        encode_all(tokenizer, samples, max(lengths) - 1)


def last_image_token(tokenizer, encoded):
    return max(i for i, token in enumerate(encoded.ids) if token in image_tokens(tokenizer.processor))


def test_a_model_of_text_alone_is_refused(tokenizer):
    tokenizer.chat_template = tiny_vision.TEMPLATE % "<image>"
    [sample] = as_samples([{**ASKED, "image": tiny_vision.picture(0)}])
    with pytest.raises(CordaError, match="the samples have images, and the model reads text alone"):
        encode(tokenizer, sample, 100)
    tokenizer.chat_template = None


def test_a_template_that_leaves_out_an_image_is_refused(llava):
    _, tokenizer = llava
    one = tiny.character_tokenizer()
    one.add_tokens("<image>", special_tokens=True)
    one.processor = tokenizer.processor
    one.chat_template = "{% for m in messages %}#{{ m['role'] }}\n<image>{{ m['content'][-1]['text'] }}$\n{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "two?"}], "images": [tiny_vision.picture(i) for i in range(2)]}]
    with pytest.raises(CordaError, match="the model takes 1 of the 2 images of the sample with given as an image"):
        encode(one, as_samples(rows)[0], 100)


def test_a_place_without_an_image_is_refused(llava):
    _, tokenizer = llava
    sample = as_samples([{"messages": [{"role": "user", "content": "an <image> in words"}]}])[0]
    with pytest.raises(CordaError, match=r"the model's token of an image in its text, .*: 'an <image> in words'"):
        encode(tokenizer, sample, 100)


def test_an_image_that_the_processor_refuses(llava):
    _, processor = tiny_vision.build("qwen2_vl")
    thin = Image.new("RGB", (2000, 2))  # Qwen2-VL's takes an aspect ratio of up to 200
    [sample] = as_samples([{**ASKED, "image": thin}])
    with pytest.raises(CordaError, match="the model's processor refuses an image of 2000 × 2: "):
        encode(with_processor(processor), sample, 100)


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": None}])
def test_a_part_without_its_text_is_a_missing_value(folder, part):
    chat = [{"role": "user", "content": [{"type": "image", "path": "pics/0.png"}, part]}]
    whole = [{"role": "user", "content": [{"type": "image", "path": "pics/1.png"}, {"type": "text", "text": "What?"}]}]
    config = write(folder, [{"messages": chat}, {"messages": whole}])
    with pytest.warns(UserWarning, match=r"1 of 2 rows left out: 1 without 'messages\[0\]\[content\]'"):
        [sample] = load_samples(config)
    assert sample.images[0].name == "pics/1.png"


def test_a_fetch_that_fails_without_a_word(folder, monkeypatch):
    def fail(*_, **__):
        raise httpx.ReadError("")

    monkeypatch.setattr(httpx, "get", fail)
    with pytest.raises(CordaError, match=r"cannot fetch the image 'http://a/x\.png': ReadError"):
        load_samples(write(folder, [{**ASKED, "image": "http://a/x.png"}]))


@pytest.mark.parametrize(
    "array", [torch.zeros(3, 9, 9), np.zeros((9, 9, 3), np.float32), np.zeros((3, 9, 9), np.uint8)]
)
def test_an_array_that_is_no_image(array):
    with pytest.raises(CordaError, match=r"has the shape \(h, w, 3\) and the type uint8, and not \("):
        as_samples([{**ASKED, "image": array}])


def test_an_image_as_an_array(folder):
    pixels_of_it = torch.tensor(list(tiny_vision.picture(1).get_flattened_data())).view(24, 24, 3)
    array = pixels_of_it.to(torch.uint8)
    for value in (array, array.numpy()):
        [sample] = as_samples([{**ASKED, "image": value}])
        assert torch.equal(pixels(sample.images[0]), pixels_of_it.view(-1, 3))


def test_an_upright_image(folder):
    image = tiny_vision.picture(0, (24, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(folder / "turned.jpg", exif=exif)
    assert read_picture("turned.jpg", folder).size == (40, 24)


@pytest.mark.parametrize("row", [{**ASKED, "response": "an <image>"}, {"text": "<image> A cat."}])
def test_an_answer_that_says_image(llava, row):
    _, tokenizer = llava
    [sample] = as_samples([{**row, "image": tiny_vision.picture(0)}])
    with pytest.raises(CordaError, match=r"the sample with given as an image says <image> in words, as in an answer"):
        encode(tokenizer, sample, 100)


def test_shades_of_16_bits_stay_shades(folder):
    """As X-rays have them: `convert` makes all above 255 white."""
    shades = torch.arange(0, 65536, 64).view(32, 32)
    Image.fromarray(shades.to(torch.uint16).numpy()).save(folder / "shades.png")
    shown = torch.tensor(list(read_picture("shades.png", folder).open().get_flattened_data())).view(32, 32, 3)
    assert torch.equal(shown, (shades // 256)[..., None].expand(32, 32, 3))
    Image.fromarray((shades / 65536).numpy()).save(folder / "numbers.tiff")
    with pytest.raises(CordaError, match=r"cannot read the image numbers\.tiff: its pixels are numbers of 32 bits"):
        read_picture("numbers.tiff", folder)
