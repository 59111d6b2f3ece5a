"""The code blocks of README.md and docs/ run as printed, with tiny models and files of the names that they use.

A block after `<!-- not run: why -->` is left out.
"""

import json
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_vision
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from corda_lora.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/*.md"))
    if "```" in page.read_text(encoding="utf-8")
]
BLOCK = re.compile(r"(<!-- not run: .*? -->\s*)?^```(\w*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FILES = ("yaml", "json", "jsonl", "csv", "txt")  # languages of blocks that are files
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '$' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Block(NamedTuple):
    language: str
    code: str
    file_name: str  # of a recipe or data: the last `NAME.LANGUAGE` before the block


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if not match[1]:
            names = re.findall(rf"`(\w[\w.]*\.{match[2]})`", text[: match.start()])
            yield Block(match[2], match[3], names[-1] if names else "")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with everything that the blocks name: models, data, adapters."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=192,
        intermediate_size=192,  # rows of whole blocks of 64, for NF4
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    shutil.copytree(folder / "MODEL", folder / MODEL_NAME)
    shutil.copytree(folder / "MODEL", folder / "CHAT_MODEL")
    (folder / "CHAT_MODEL" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    pairs = [{"prompt": f"What is {i} plus 1?", "response": f" It is {i + 1}."} for i in range(16)]
    for name in ("known", "known_test", "new", "new_test", "unseen_test"):
        write_rows(folder / f"{name}.jsonl", pairs)
    (folder / "text.txt").write_text("One plus one is two.\n" * 8)
    (folder / "questions.csv").write_text("question,answer\n" + "What is 1 plus 1?,2\n" * 8)
    tiny_vision.save(folder / "VISION_MODEL")
    (folder / "pictures").mkdir()
    for name, first in (("seen", 0), ("seen_test", 16), ("charts", 24), ("charts_test", 40)):
        rows = [
            {"image": f"pictures/{i}.png", "prompt": "What is it?", "response": "a cat"}
            for i in range(first, first + 16)
        ]
        for i in range(first, first + 16):
            (folder / "pictures" / f"{i}.png").write_bytes(tiny_vision.png(i))
        write_rows(folder / f"{name}.jsonl", [row | {"choices": ["a cat", "a dog"]} for row in rows])
    hub = {"google-research-datasets/nq_open": "default", "openai/gsm8k": "main"}
    for name, configuration in hub.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {configuration}\n  data_files: train.jsonl\n---\n"
        )
    questions = [{"question": f"what is {i} plus 1", "answer": [str(i + 1)]} for i in range(300)]
    write_rows(folder / "google-research-datasets/nq_open/train.jsonl", questions)
    write_rows(folder / "openai/gsm8k/train.jsonl", [{**row, "answer": row["answer"][0]} for row in questions])
    source = ["--model", str(folder / "MODEL"), "--output"]
    main(["init", *source, str(folder / "start"), "--context", str(folder / "known.jsonl"), "--r", "32"])
    trained = ["--start", str(folder / "start"), "--data", str(folder / "new.jsonl"), "--precision", "fp32"]
    main(["train", *source, str(folder / "tuned"), *trained])
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run_as_printed(page, inputs, tmp_path, monkeypatch, capsys, undrawn):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` replaces it
    made_here = re.findall(r"--output ([\w-]+)", page.read_text(encoding="utf-8"))
    folder = tmp_path / "folder"
    shutil.copytree(inputs, folder, ignore=shutil.ignore_patterns(*made_here))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.code, str(page), "exec"), names)
        elif block.language in FILES and block.file_name:
            Path(block.file_name).write_text(block.code)
        elif block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                run_command(shlex.split(line, comments=True), capsys)
    if page.name == "README.md" and page.parent == ROOT:
        assert_ordinary_lora(names["peft_model"], names["known"][0], folder)


def run_command(words: list[str], capsys: Any) -> None:
    """`corda` runs here. Of other commands, what they name must exist."""
    if words[:2] == [
        "corda",
        "compare",
    ]:  # its runs take minutes; with nothing to run it checks the recipe all the same
        with pytest.raises(SystemExit):
            main([*words[1:], "--jobs", "0"])
        assert "no results of the base model yet" in capsys.readouterr().err
    elif words[:1] == ["corda"]:
        main(words[1:])
    elif words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), words
    elif words and Path(words[0]).name == "python":
        for word in words[1:]:
            path, _, test = word.partition("::")
            assert "/" not in word or (ROOT / path).exists(), words
            assert f"def {test}(" in (ROOT / path).read_text() if test else True, words
    elif words:
        assert words[0] in ("pip", "git"), f"nothing is known of the command {shlex.join(words)}"


@torch.no_grad()
def assert_ordinary_lora(peft_model: PeftModel, known: str, folder: Path) -> None:
    """What the README's Python saved is loaded by plain PEFT, and the base model is as it was."""
    base = AutoModelForCausalLM.from_pretrained(folder / MODEL_NAME)
    batch = AutoTokenizer.from_pretrained(folder / MODEL_NAME)(known, return_tensors="pt")
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    before = base(**batch).logits
    tuned = peft_model.eval()(**batch).logits
    assert (tuned - before).abs().max() > 1e-6  # it learned something
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()(**batch).logits
    torch.testing.assert_close(loaded, tuned, atol=1e-4, rtol=0)
    for name, tensor in peft_model.unload().state_dict().items():
        assert torch.equal(tensor, original[name])
