"""Templates over the columns of a row: what they may hold, and how values get into them."""

import json
import subprocess
import sys

import pytest

from corda_lora import CordaError
from corda_lora.config import DataConfig
from corda_lora.data.samples import load_samples
from corda_lora.data.templates import MissingValueError, parse_template, render

ROW = {"q": "Why?", "n": 7, "list": ["a", ["b"]], "map": {"k": "v", "1": "one"}, "yes": True, "a b.c": "odd"}


def rendered(template, row=ROW):
    return render(parse_template(template, list(row)), row)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r"Q: {q}\nA:\t{n}", "Q: Why?\nA:\t7"),
        (r"\\nabla \frac{{1}}{{2}}\\", "\\nabla \\frac{1}{2}\\"),
        ("{list[0]} {list[-2]} {list[1][0]}", "a a b"),
        ("{map[k]} {map[1]} {yes} {a b.c}", "v one true odd"),
        ("", ""),
    ],
)
def test_what_a_template_gives(template, expected):
    assert rendered(template) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{q.__class__}",
        "{q!r}",
        "{q:1000000000}",
        "{map[k].x}",
        "{}",
        "{0}",
        "{q[}",
        "{q]}",
        "{q[]}",
        "{",
        "}",
        "{q",
        "{{q}",
    ],
)
def test_nothing_else_is_allowed(template):
    with pytest.raises(CordaError) as raised:
        rendered(template)
    assert "template" in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{list}", r"is a list.*\{list\[0\]\}"),
        ("{map}", r"is a mapping.*\{map\[k\]\}"),
        ("{list[k]}", "asks for 'k' of a list"),
        ("{q[0]}", r"of a text or a number.*write \{q\}"),
    ],
)
def test_values_that_do_not_fit(template, message):
    with pytest.raises(CordaError, match=message):
        rendered(template)


@pytest.mark.parametrize("value", [None, "", "  \n", [], {}, float("nan")])
def test_missing_values(value):
    for template, row in (("{q}", {"q": value}), ("{q[0]}", {"q": [value]}), ("{q[k]}", {"q": {"k": value}})):
        with pytest.raises(MissingValueError):
            rendered(template, row)
    for template in ("{q[5]}", "{q[-5]}"):
        with pytest.raises(MissingValueError):
            rendered(template, {"q": ["a"]})


def test_a_refused_row_is_quoted_short(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "fine"}) + "\n" + json.dumps({"response": ["x" * 10_000]}))
    with pytest.raises(CordaError, match=r"row 2 of .*data\.jsonl") as raised:
        load_samples(DataConfig(str(path), response="{response}"))
    assert len(str(raised.value).replace(str(path), "")) < 250


def test_a_template_from_a_shell(tmp_path):
    """What a shell passes for \\n is a backslash and an n."""
    (tmp_path / "data.csv").write_text("question,answer\nWhat?,this\n")
    code = (
        "import sys; from corda_lora.config import DataConfig; from corda_lora.data.samples import load_samples; "
        "sys.stdout.write(load_samples(DataConfig('data.csv', *sys.argv[1:]))[0].prompt)"
    )
    command = rf"""{sys.executable} -c "{code}" "Question: {{question}}\nAnswer:" "{{answer}}" """
    found = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "Question: What?\nAnswer:"
