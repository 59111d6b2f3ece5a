"""Commands drawn at random (rows, templates, options), and what each must come to: an adapter that is right, or one
sentence."""

import contextlib
import csv
import functools
import io
import json
import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import tiny
import torch
import transformers
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from corda_lora import cli
from corda_lora.adapters.lora import read_marks

# --- the strategy ----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["NA", "007", "a b", "1,5", " "]
)
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = CELLS | st.lists(CELLS, max_size=2) | st.dictionaries(st.sampled_from(["k", "text"]), CELLS, max_size=2)
ROLES = st.sampled_from(["system", "user", "assistant"])
CHATS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS | st.none()}), max_size=3)
NAMES = ["prompt", "response", "text", "messages", "q"]
PLAIN = st.fixed_dictionaries({"prompt": st.from_regex(r"[a-z]{1,6} \?", fullmatch=True), "response": st.just(" yes")})
ODD = st.fixed_dictionaries({}, optional={name: CHATS if name == "messages" else VALUES for name in NAMES})
TEMPLATES = st.lists(
    st.sampled_from([*(f"{{{n}}}" for n in NAMES), "{q[0]}", "{q[k]}", "\\n", "{{", "{", "{q.x}", "#", "- "]) | TEXTS,
    max_size=3,
).map("".join)
JUNK = st.sampled_from(["", "x", "null", "[]", "{}", "[", "-1", "0", "1.5", "nan", "inf", "1e400", "true", "é", "a: b"])
COUNTS = st.sampled_from([1, 2, 3, 5, 7, 100, 2**31 - 1, 2**31])
POSITIVE = st.sampled_from([1e-30, 1e-3, 0.5, 2.0, 1e30])
SHARES = st.sampled_from([0, 0.1, 0.999, 1])
SWITCH = st.sampled_from(["true", "false"])
LAYERS = ["all-linear", "[q_proj]", "[q_proj, v_proj]", "q_proj", ".*mlp.*", "[lm_head]", "[embed_tokens]", "[norm]"]
NO_LAYERS = ["[q_prj]", "[]", "((a+)+)+$", "(", "[q_proj, 1]", "{q_proj: 1}", "[[q_proj]]"]
TRAINER = ["{optim: sgd}", "{max_grad_norm: 0.5}", "{nonsense: 1}", "{output_dir: mine}", "{logging_steps: -1}", "[1]"]
DATA = {
    "prompt": TEMPLATES,
    "response": TEMPLATES,
    "chat": SWITCH,
    "turns": st.sampled_from(["all", "last"]),
    "rows": st.sampled_from(["train", "train[:2]", "train[50%:]", "test", "train[9:]", "train[", "train[2:1]"]),
    "name": st.sampled_from(["main", "../x"]),
    "samples": COUNTS,
    "seed": st.sampled_from([0, 7, 2**32 - 1, 2**32]),
    "max_length": st.sampled_from([1, 2, 6, 40, 2**31 - 1]),
    "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "int8"]),
    "revision": st.just("main"),
    "r": st.sampled_from([1, 2, 3, 16, 17, 64]),  # a plain LoRA may have any rank: 10**6 takes minutes
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARES,
    "target_modules": st.sampled_from(LAYERS) | st.sampled_from(NO_LAYERS),
    "exclude_modules": st.sampled_from(LAYERS) | st.sampled_from(NO_LAYERS),
    "layers_to_transform": st.sampled_from(["0", "[0]", "[0, 0]", "1", "[0, 1]", "-1"]),
    "modules_to_save": st.sampled_from(["[lm_head]", "[nothing]", "lm_head", "[embed_tokens]", "[norm]", "[]"]),
    "use_rslora": SWITCH,
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "keep": st.sampled_from([0, 1e-9, 10, 1e30, -1]),
    "trust_remote_code": SWITCH,
    "nonsense": JUNK,
}
OPTIONS = {
    "init": DATA
    | {
        "mode": st.sampled_from(["kpm", "ipm"]),
        "preset": st.sampled_from(["corda", "corda+", "corda++"]),
        "rounds": COUNTS,
        "min_rank": COUNTS,
        "max_rank": COUNTS,
        "budget": POSITIVE | COUNTS,
        "split": st.sampled_from(["anchored", "seeded", "balanced", "paper"]),
        "orientation": st.sampled_from(["covariance", "diagonal", "identity", "two_sided"]),
        "solver": st.sampled_from(["auto", "gram", "subspace", "svd"]),
        "damping": POSITIVE,
        "quantization": st.sampled_from(["nf4", "nf5", "none"]),  # the model's rows are no whole blocks
        "double_quantization": SWITCH,
        "fold": st.sampled_from([0, 1, -1]),
        "skip_tokens": st.sampled_from([0, 1, 5, 2**31 - 1]),
        "device": st.sampled_from(["cpu", "gpu", "meta", "cpu:7"]),
        "batch_tokens": COUNTS,
        "park": st.sampled_from(["auto", "device", "cpu", "disk"]),
        "keep_work": st.none(),  # it takes no value
    },
    "train": DATA
    | {
        "start": st.sampled_from(["anchored", "seeded", "paper", "nowhere", "data.jsonl"]),
        "learning_rate": POSITIVE,
        "epochs": st.sampled_from([1e-9, 0.5, 1, 2]),
        "max_steps": st.sampled_from([1, 2]),
        "batch_size": st.sampled_from([1, 2, 3, 32, 2**31 - 1]),
        "micro_batch_size": st.sampled_from([1, 2, 3]),
        "warmup": SHARES,
        "schedule": st.sampled_from(["cosine", "linear", "constant"]),
        "weight_decay": SHARES | POSITIVE,
        "precision": st.sampled_from(["bf16", "fp16", "fp32"]),
        "gradient_checkpointing": SWITCH,
        "checkpoints": st.sampled_from([0, 1, 2, 10**9]),
        "context": st.sampled_from(["data.jsonl", "mine/notes.txt", "nowhere.jsonl"]),
        "max_drift": POSITIVE,
        "eval_data": st.sampled_from(["data.jsonl", "mine/notes.txt", "nowhere.jsonl"]),
        "eval_rows": st.sampled_from(["train", "train[:1]", "test", "train["]),
        "eval_share": SHARES,
        "early_stopping": COUNTS,
        "trainer": st.sampled_from(TRAINER),
    },
}
OUTPUTS = [
    "deep/er/out",
    "mine",
    "mine/notes.txt",
    ".",
    "..",
    "",
    "n" * 300,
    "link",
    "/",
    "data.jsonl",
    "mine/out",
    "wörk",
]


class Command(NamedTuple):
    verb: str
    rows: list
    suffix: str
    options: dict
    output: str


@st.composite
def commands(draw):
    verb = draw(st.sampled_from(["init", "train"]))
    rows = draw(st.lists(PLAIN, min_size=1, max_size=5) | st.lists(PLAIN | ODD, max_size=4))
    suffix = draw(st.sampled_from([".jsonl"] * 9 + [".json", ".csv", ".tsv", ".txt", ".parquet", ""]))
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS[verb])), max_size=4, unique=True))
    odd = draw(st.integers(0, 9)) == 0  # one of ten commands has a value that belongs to no option
    options = {name: draw(JUNK if odd and name == names[0] else OPTIONS[verb][name]) for name in names}
    output = draw(st.sampled_from(OUTPUTS)) if draw(st.integers(0, 9)) == 0 else "out"
    return Command(verb, rows, suffix, options, output)


# --- the outcome -----------------------------------------------------------------------------------------------------


@functools.cache
def given(tokenizer_source) -> Path:
    """A folder with a model of one block, and the starts of adapters on it."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    size = tiny.SIZE | {"num_hidden_layers": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).save_pretrained(folder / "model")
    tokenizer_source().save_pretrained(folder / "model")
    (folder / "keep.jsonl").write_text("".join(json.dumps({"text": f"The number {i}."}) + "\n" for i in range(8)))
    for split in ("anchored", "seeded", "paper"):
        context = ["--model", folder / "model", "--context", folder / "keep.jsonl"]
        run(["init", *context, "--split", split, "--r", 2, "--output", folder / split])
    return folder


def run(arguments) -> tuple[int, str]:
    """The exit code of a command, and what it says on stderr."""
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), warnings.catch_warnings():
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as stopped:
            code = stopped.code
    return code, said.getvalue()


def write(path: Path, rows: list) -> None:
    if path.suffix in (".csv", ".tsv"):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([columns, *([row.get(name) for name in columns] for row in rows)])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row.get('prompt')}\n" for row in rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def outcome(command: Command, given: Path) -> str:
    """Run a command in a folder with files of a user's. Returns "right", or the sentence with which it was refused.

    Raises AssertionError if the outcome is neither, or a file of the user's was touched."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return _outcome(command, given, Path(folder))


def _outcome(command: Command, given: Path, folder: Path) -> str:
    data = f"data{command.suffix}"
    write(folder / data, command.rows)
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("mine")
    before = contents(folder)
    named = {"context" if command.verb == "init" else "data": data, "model": given / "model"} | command.options
    if named.get("start") in ("anchored", "seeded", "paper"):
        named["start"] = given / named["start"]
    arguments = [
        command.verb,
        *(f"--{name}" if value is None else f"--{name}={value}" for name, value in named.items()),
    ]
    arguments.append(f"--output={command.output}")
    code, said = run(arguments)
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before, "a file of the user's was touched"
    new = sorted(set(after) - set(before))
    assert "Traceback" not in said, said
    if code != 0:
        sentence = said.strip().splitlines()[-1]
        diverged = re.match(r"corda train: the (loss was|trained parameters were)", sentence)
        assert code == (1 if diverged else 2), (code, sentence)
        assert sentence.startswith(f"corda {command.verb}: "), said
        assert len(sentence) <= 3 * 170, sentence
        assert len(re.findall("^corda ", said, re.MULTILINE)) == 1, said
        assert not new, f"left behind: {new}"
        return sentence
    output = Path(command.output)
    work = [f"{output}.work"] if "keep_work" in named else []
    places = [str(output), *map(str, output.parents), *work]
    assert not [name for name in new if name not in places and not name.startswith((f"{output}/", *work))], new
    check(command, given, output)
    again, said = run(arguments)
    assert again == 0, said
    assert contents(folder) == after
    return "right"


def check(command: Command, given: Path, output: Path) -> None:
    """Whether an adapter is whole, and plain PEFT loads it; a start leaves the model's function as it was."""
    assert read_marks(output) is not None or command.verb == "train"
    weights = load_file(output / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(given / "model", dtype=torch.float32)
    base = tiny.logits(model)
    adapted = PeftModel.from_pretrained(model, output)
    if command.verb == "init":
        torch.testing.assert_close(tiny.logits(adapted), base, rtol=0, atol=1e-3)
        record = json.loads((output / "corda.json").read_text())
        assert all(math.isfinite(x) for x in _numbers(record))
        count = record["context"]["samples"] if "context" in record else None
    else:
        record = json.loads((output / "training.json").read_text())
        assert math.isfinite(record["train_loss"])
        assert record["loss"][-1][0] == record["steps"] >= 1
        count = record["samples"]
        start = command.options.get("start")
        if start == "anchored":
            held = load_file(given / start / "adapter_model.safetensors")
            assert all(torch.equal(weights[name], held[name]) for name in held if "lora_A" in name)
    free = {
        "prompt",
        "response",
        "rows",
        "samples",
        "rounds",
        "preset",
        "orientation",
        "max_length",
        "chat",
        "eval_share",
    }
    if not free & set(command.options) and all(row.get("response") == " yes" for row in command.rows):
        assert count == len(command.rows), "samples were lost"


def _numbers(value):
    if isinstance(value, float):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers(item)
