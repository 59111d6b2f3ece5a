"""Turn a folder of public data sets into prompt/response files for the recipes here.

    python benchmarks/prepare_data.py DATA OUTPUT

DATA holds gsm8k/{train,test}.jsonl, nq_open/dev.jsonl, webquestions/{train,validation}.json,
wikitext2/{valid,test}.txt, mbpp/mbpp.jsonl, cola/{train,dev}.tsv, as published.

- `gsm8k_*` has the form of the questions to keep ("Question: ... Answer:"), `gsm8k_plain_*` has not.
  `gsm8k_alpaca_*` has the form that CorDA's authors train with, and keeps the calculator marks. `gsm8k_questions_*` has
  no answers.
- NQ-open: rows 0-1999 become `nq_context.jsonl` (for covariances), without the answers `nq_questions_context.jsonl`.
  Rows 2000-3609 become `nq_test.jsonl` (for measuring). `*_qa_*` and `*_bare_*` have other forms.
- WebQuestions: the training split becomes `webq_test.jsonl`, the validation split `webq_context.jsonl`.
- `union_context.jsonl` has 256 rows each of `nq_context`, `mbpp_train` and `wikitext2_context`; these are cut after
  their first word into prompt and response.
- `wikitext2_context.jsonl` (of the validation split) and `wikitext2_paragraphs.jsonl` (of the test split) have a
  paragraph in each row.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)

OTHER_FORMS = {"qa": "Q: {}\nA:", "bare": "{}\n"}


def main(data: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = _read(data / "gsm8k" / f"{split}.jsonl")
        _write(output / f"gsm8k_{split}.jsonl", [_pair(r["question"], _without_marks(r["answer"])) for r in rows])
        _write(output / f"gsm8k_questions_{split}.jsonl", [{"text": _pair(r["question"], "")["prompt"]} for r in rows])
        plain = [{"prompt": r["question"] + "\n", "response": _without_marks(r["answer"])} for r in rows]
        _write(output / f"gsm8k_plain_{split}.jsonl", plain)
        alpaca = [{"prompt": ALPACA.format(r["question"]), "response": " " + r["answer"]} for r in rows]
        _write(output / f"gsm8k_alpaca_{split}.jsonl", alpaca)
    nq = [_pair(r["question"] + "?", r["answer"][0]) for r in _read(data / "nq_open" / "dev.jsonl")]
    _write(output / "nq_context.jsonl", nq[:2000])
    _write(output / "nq_questions_context.jsonl", [{"text": row["prompt"]} for row in nq[:2000]])
    _write(output / "nq_test.jsonl", nq[2000:])
    web, more = (json.loads((data / "webquestions" / f"{name}.json").read_text()) for name in ("train", "validation"))
    _write(output / "webq_test.jsonl", [_pair(r["qText"], r["answers"][0]) for r in web])
    _write(output / "webq_context.jsonl", [_pair(r["qText"], r["answers"][0]) for r in more])
    for form, ask in OTHER_FORMS.items():
        for name, rows in (("nq_{}_context", nq[:2000]), ("nq_{}_test", nq[2000:])):
            asked = [row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:") for row in rows]
            pairs = [{"prompt": ask.format(q), "response": row["response"]} for q, row in zip(asked, rows)]
            _write(output / f"{name.format(form)}.jsonl", pairs)
        pairs = [{"prompt": ask.format(r["qText"]), "response": f" {r['answers'][0]}"} for r in web]
        _write(output / f"webq_{form}_test.jsonl", pairs)
    mbpp = _read(data / "mbpp" / "mbpp.jsonl")
    for split, first, last in (("train", 601, 974), ("test", 11, 510)):
        _write(output / f"mbpp_{split}.jsonl", [_program(r) for r in mbpp if first <= r["task_id"] <= last])
    for split, name in (("valid", "context"), ("test", "paragraphs")):
        lines = (data / "wikitext2" / f"{split}.txt").read_text().splitlines()
        paragraphs = [line.strip() for line in lines if len(line) > 200 and not line.startswith(" = ")]
        _write(output / f"wikitext2_{name}.jsonl", [{"text": paragraph} for paragraph in paragraphs])
    _write(output / "union_context.jsonl", _union(output))
    for split in ("train", "dev"):
        (output / f"cola_{split}.tsv").write_text((data / "cola" / f"{split}.tsv").read_text())
    (output / "wikitext2_test.txt").write_text((data / "wikitext2" / "test.txt").read_text())


def _union(output: Path) -> list[dict[str, str]]:
    """Rows of three abilities in one file."""
    drawn = {name: _read(output / f"{name}.jsonl") for name in ("nq_context", "mbpp_train", "wikitext2_context")}
    drawn = {name: random.Random(0).sample(rows, 256) for name, rows in drawn.items()}
    texts = [row.pop("text") for row in drawn["wikitext2_context"]]
    drawn["wikitext2_context"] = [
        {"prompt": text.partition(" ")[0], "response": text[text.index(" ") :]} for text in texts
    ]
    return [row for rows in drawn.values() for row in rows]


def _pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": f"Question: {question}\nAnswer:", "response": f" {answer}"}


def _program(row: dict[str, Any]) -> dict[str, str]:
    """A task with its tests, and the code."""
    tests, code = "\n".join(row["test_list"]), row["code"].replace("\r\n", "\n")
    return {"prompt": f"{row['text']}\n{tests}\n\n", "response": code}


def _without_marks(answer: str) -> str:
    """GSM8K's answers without the calculator marks <<...>>."""
    return re.sub(r"<<.*?>>", "", answer)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
