"""Names on the Hugging Face hub, as a user gives them: a model and data, from a hub on this machine that answers as the
real one does, through the libraries' own download and cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest

from corda_lora.cli import main

pytestmark = pytest.mark.slow
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """\
---
configs:
- {config_name: main, data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]}
- {config_name: other, data_files: [{split: train, path: other/train.jsonl}]}
---
"""


class Hub(BaseHTTPRequestHandler):
    """GET, HEAD and POST of what huggingface_hub asks for, of `folder`/{models,datasets}/ORG/NAME."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder, asked, *args):
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlparse(self.path).path).strip("/")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = path.split("/")
        api = parts[0] == "api"
        kind = parts[1] if api else "datasets" if parts[0] == "datasets" else "models"
        org, name, *rest = parts[2:] if api else parts[1:] if kind == "datasets" else parts
        repo = self.folder / kind / org / name
        self.asked.append(path)
        if not repo.is_dir():
            return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = {str(f.relative_to(repo)): f for f in sorted(repo.rglob("*")) if f.is_file()}
        if not api:  # resolve/REVISION/FILE
            file = files.get("/".join(rest[2:]))
            if file is None:
                return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = file.read_bytes()
            return self.send(data, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        entries = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()]
        folders = {str(Path(n).parent) for n in files} - {"."}
        entries += [{"type": "directory", "path": n, "oid": "0" * 40} for n in folders]
        if rest[:1] == ["tree"]:
            inside = "/".join(rest[2:])
            if inside and inside not in folders:
                return self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.send([e for e in entries if e["path"].startswith(inside) and e["path"] != inside])
        if rest[:1] == ["paths-info"]:
            wanted = json.loads(body)["paths"]
            return self.send([e for e in entries if e["path"] in wanted])
        siblings = [{"rfilename": n} for n in files]
        return self.send(
            {"_id": "0", "id": f"{org}/{name}", "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
        )

    do_GET = do_HEAD = do_POST = answer

    def send(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """The hub's folder is filled; `call` runs commands of `corda` in a process that knows no other hub."""
    folder, asked = tmp_path / "hub", []
    (folder / "models" / "org").mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "models" / "org" / "tiny")
    (folder / "models" / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"the same again")
    for file, rows in {
        "main/train.jsonl": [{"question": f"What is {i} + {i}?", "answer": [f"{2 * i}", "no idea"]} for i in range(40)],
        "main/test.jsonl": [{"question": f"What is {i} + 1?", "answer": [f"{i + 1}"]} for i in range(8)],
        "other/train.jsonl": [{"prompt": "none", "response": "none"}],
    }.items():
        path = folder / "datasets" / "org" / "sums" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "datasets" / "org" / "sums" / "README.md").write_text(CARD)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NO_PROXY": "127.0.0.1",
    }

    def call(*commands, **more):
        words = json.dumps([[str(word) for word in command] for command in commands])
        command = [sys.executable, "-c", IN_ONE_PROCESS, words]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=200)

    yield call, asked
    server.shutdown()


SUMS = ["--name", "main", "--prompt", "{question}", "--response", " {answer[0]}"]
INIT = ["init", "--r", 4, "--device", "cpu", "--samples", 24]


def weights(folder):
    return Path(folder, "adapter_model.safetensors").read_bytes()


def test_model_and_data_are_names_on_the_hub(hub, checkpoint, tmp_path):
    call, asked = hub
    init = [*INIT, "--model", "org/tiny", "--context", "org/sums", *SUMS]
    recipe = ["--max_steps", 2, "--batch_size", 4, "--precision", "fp32", "--output", "tuned"]
    train = ["train", "--model", "org/tiny", "--start", "start", "--data", "org/sums", *SUMS, *recipe]
    learn = {"data": "org/sums", "name": "main", "rows": "test", "prompt": "{question}", "response": " {answer[0]}"}
    evaluated = {"model": "org/tiny", "adapter": "tuned", "learn": learn, "output": "found.json"}
    Path("eval.yaml").write_text(json.dumps(evaluated))
    done(call([*init, "--output", "start"], train, ["eval", "--config", "eval.yaml"]))
    assert json.loads(Path("start/corda.json").read_text())["data"]["name"] == "main"
    assert "sums" in Path("found.json").read_text()
    assert not [path for path in asked if path.endswith((".bin", "other/train.jsonl"))], "more than it needs"
    files = [
        "--model",
        checkpoint,
        "--context",
        tmp_path / "hub" / "datasets" / "org" / "sums" / "main" / "train.jsonl",
    ]
    main([*map(str, [*INIT, *files, *SUMS[2:]]), "--output", "from_files"])
    assert weights("start") == weights("from_files")

    del asked[:]
    done(call([*init, "--output", "again"], HF_HUB_OFFLINE="1"))
    assert not asked
    assert weights("again") == weights("start")


IN_ONE_PROCESS = """
import json, sys
from corda_lora.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stopped:
        print(f"exit {stopped.code}", file=sys.stderr)
"""
WRONG = {
    "cannot load the model 'org/none'": ["--model", "org/none"],
    "Dataset 'org/none' doesn't exist on the Hub": ["--context", "org/none"],
    "'nope' not found. Available: ['main', 'other']": ["--name", "nope"],
    "Should be one of ['train', 'test']": ["--rows", "valid"],
    "org/sums: no column 'reply'": ["--response", "{reply}"],
    "Please pick one among the available configs: ['main', 'other']": [],
}


def test_what_is_not_on_the_hub(hub):
    call, _ = hub
    init = [*INIT, "--model", "org/tiny", "--context", "org/sums", "--output", "start"]
    commands = [[*init, *(SUMS if more else SUMS[2:]), *more] for more in WRONG.values()]
    ended = call(*commands)
    lines = ended.stderr.strip().splitlines()
    sentences = [line for line, after in pairwise(lines) if after == "exit 2"]
    assert len(sentences) == len(WRONG), ended.stderr
    for said, sentence in zip(WRONG, sentences):
        assert said in sentence
        assert sentence.startswith("corda init: ")
    assert not list(Path().glob("start*"))


def done(ended):
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\nexit " not in ended.stderr, ended.stderr
