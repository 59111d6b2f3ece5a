"""Rows as they stand in their files."""

import json
import warnings

import datasets
import pytest

from corda_lora import CordaError
from corda_lora.config import DataConfig
from corda_lora.data.samples import load_rounds, load_samples

CELLS = ["None", "NA", "null", "007", "1.50", "true", "2024-01-01 00:00:00", "1e5", 'a "quoted" word', "ä\u2028ö\x0b"]


def samples_of(path, **options):
    return load_samples(DataConfig(str(path), **options))


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_cells_stay_text(suffix, delimiter, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_text(f"response{delimiter}n\n" + "".join(f"{cell}{delimiter}{i}\n" for i, cell in enumerate(CELLS)))
    found = samples_of(path)
    assert [s.response for s in found] == CELLS
    assert found[3].row == {"response": "007", "n": "3"}


def test_cells_of_several_lines(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,response\r\n"one\ntwo","a, ""b"""\r\n\r\nthree,c\r\n')
    assert [s[:2] for s in samples_of(path)] == [("one\ntwo", 'a, "b"'), ("three", "c")]


def test_numbers_of_json_stay_as_they_are_written(tmp_path):
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_text('{"response": 1.50, "b": true, "c": 12345678901234567890123}\n')
        found = samples_of(tmp_path / name, prompt="{b} {c}", response="{response}")
        assert found[0][:2] == ("true 12345678901234567890123", "1.50")


def test_rows_of_other_types_and_columns(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "response": 1}\n\n{"response": "2024-01-01T00:00:00", "prompt": "b", "c": [1]}\n')
    assert [s[:2] for s in samples_of(path)] == [("a", "1"), ("b", "2024-01-01T00:00:00")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "prompt,response\na,b\nWhy, then?,c\n", "line 3 has 3 cells for 2 columns.*double quotes"),
        ("data.csv", 'prompt,response\n"a\nb",c\nd,"e" f\n', "line 4 is not CSV"),
        ("data.csv", 'prompt,response\na,"b\n', "line 2 is not CSV"),
        ("data.csv", "a,a\n1,2\n", "two columns named 'a'"),
        ("data.csv", "prompt,response\n", "no rows"),
        ("data.jsonl", '{"text": "a"}\n{"text": \n', "line 2 cannot be read as JSON"),
        ("data.jsonl", '{"text": "a"}\n["b"]\n', "line 2 is not a row"),
        ("data.jsonl", '{"text": "\\ud800"}\n', "line 1 cannot be read as JSON"),
        ("data.json", '[{"text": "a"}, 3]', "item 2 of .* is not a row"),
        ("data.json", "[" * 100_000, "nested too deeply"),
        ("data.jsonl", "text".encode("utf-16"), "is UTF-16.*iconv -f UTF-16"),
        ("data.jsonl", '{"text": "a"}\n{"text": "é"}\n'.encode("latin-1"), r"line 2 has the byte 0xe9.*LATIN1"),
        ("data.csv", "text\né\n".encode("latin-1"), r"is not UTF-8 .*line 2.*LATIN1"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CordaError, match=message) as raised:
        samples_of(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_missing_values_are_left_out_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": str(i), "response": "x"} for i in range(6)]
    rows += [{"prompt": "p", "response": None}, {"prompt": "p"}, {"prompt": "p", "response": " "}, {"response": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="4 of 10 rows left out: 3 without 'response', 1 without 'prompt'"):
        assert len(samples_of(path)) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(samples_of(path, samples=5)) == 5  # others take their place
        assert [len(samples) for samples in load_rounds(DataConfig(str(path), samples=6), 3)] == [6, 6, 6]
    path.write_text('{"prompt": "p", "response": null}\n{"prompt": "p", "response": ""}\n')
    with pytest.raises(CordaError, match=r"no row of .* is complete: of 2 rows, 2 without 'response'"):
        samples_of(path)


def test_empty_lines_of_running_text_stay(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one\n\ntwo\r\n")
    assert [s.response for s in samples_of(path)] == ["one", "", "two"]


def test_folders_that_datasets_saved(tmp_path):
    one = datasets.Dataset.from_list([{"prompt": f"p{i}", "response": f"r{i}"} for i in range(10)])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(4))}).save_to_disk(tmp_path / "both")
    assert len(samples_of(tmp_path / "one")) == 10
    assert [s.prompt for s in samples_of(tmp_path / "both", rows="test[2:]+train[:10%]")] == ["p2", "p3", "p0"]
    with pytest.raises(CordaError, match=r"cannot load data .*other"):
        samples_of(tmp_path / "both", rows="other")


def test_slices_of_a_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "t{i}"}}\n' for i in range(10)))
    for rows, expected in {"train[:20%]": "t0 t1", "train[-1:]": "t9", "train[3:4]+train[:1]": "t3 t0"}.items():
        assert " ".join(s.response for s in samples_of(path, rows=rows)) == expected
    for rows in ("validation", "train[", "train[a:]"):
        with pytest.raises(CordaError, match="cannot load data"):
            samples_of(path, rows=rows)
