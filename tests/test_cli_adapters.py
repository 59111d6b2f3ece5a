"""Adapter directories at the command line: which are refused, and what is written and sent."""

import json
import re
import shutil
from types import SimpleNamespace

import httpx
import peft
import pytest
import tiny
import torch
from helpers import saved, start
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from corda_lora import CordaConfig, get_corda_model, load_adapter
from corda_lora.adapters.lora import install, lora_layers
from corda_lora.cli import main

ROWS = [{"prompt": f"{i} + {i} =", "response": f" {i + i}"} for i in range(1, 9)]


@pytest.fixture
def work(checkpoint, tmp_path, monkeypatch):
    """A working directory with samples, and two adapters for the model in `checkpoint`: CorDA's and a plain LoRA."""
    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    saved(install(*(made := start(split="anchored"))), made[1], tmp_path / "corda")
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.build("llama"), plain).save_pretrained(tmp_path / "plain")
    return tmp_path


def run(verb, checkpoint, *arguments):
    main([verb, "--model", str(checkpoint), *map(str, arguments)])


def refused(capsys, verb, checkpoint, *arguments):
    """Run a command that must exit with 2; the sentence it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(verb, checkpoint, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", ["train", "eval", "export"])
@pytest.mark.parametrize("adapter", ["corda", "plain"])
def test_a_damaged_adapter_is_refused_by_the_name_of_its_file(adapter, verb, checkpoint, work, capsys):
    path = work / adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path)
    arguments = {
        "train": ["--start", adapter, "--data", "rows.jsonl", "--output", "out"],
        "eval": ["--adapter", adapter, "--keep", "rows.jsonl"],
        "export": ["--adapter", adapter, "--output", "out"],
    }
    sentence = refused(capsys, verb, checkpoint, *arguments[verb])
    assert f"{adapter}/adapter_model.safetensors is damaged: " in sentence
    assert not (work / "out").exists()


# --- PEFT's options --------------------------------------------------------------------------------------------------

OPTIONS = ["--exclude_modules", "[q_proj,lm_head]", "--layers_to_transform", "[1]", "--modules_to_save", "[lm_head]"]
OPTIONS += ["--use_rslora", "true", "--lora_alpha", "8", "--r", "4", "--bias", "none"]


@pytest.mark.parametrize("verb", ["init", "train"])
def test_pefts_options_end_in_the_saved_file(verb, checkpoint, work):
    data = (
        ["--data", "rows.jsonl", "--precision", "fp32", "--warmup", 0]
        if verb == "train"
        else ["--context", "rows.jsonl"]
    )
    run(verb, checkpoint, *data, *OPTIONS, "--output", "out")
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    assert config["exclude_modules"] == ["lm_head", "q_proj"]
    assert config["layers_to_transform"] == [1]
    assert config["modules_to_save"] == ["lm_head"]
    assert config["bias"] == "none"
    loaded = load_adapter(tiny.build("llama"), work / "out")
    assert {layer.scaling["default"] for layer in lora_layers(loaded).values()} == {4.0}  # 8 / √4
    assert len(lora_layers(loaded)) == 6
    tensors = load_file(work / "out" / "adapter_model.safetensors")
    head = tensors["base_model.model.lm_head.weight"]
    if verb == "train":
        assert all(tensor.norm() > 0 for tensor in tensors.values())
        assert (head - tiny.build("llama").lm_head.weight).norm() > 0


@pytest.mark.parametrize("verb", ["init", "plan", "train"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--use_dora true",
            "use_dora is an option of PEFT's that corda-lora does not have: with it, the adapter would",
        ),
        ("--rank-pattern {}", "rank_pattern is an option of PEFT's that corda-lora does not have: presets corda+ and"),
        ("--bias lora_only", "bias lora_only trains biases of the base model itself"),
        ("--exclude_modules [", "exclude_modules '[' is no regular expression"),
    ],
)
def test_other_options_of_pefts_are_refused_by_name(arguments, said, verb, checkpoint, capsys):
    data = {"init": ["--context", "x", "--output", "out"], "plan": [], "train": ["--data", "x", "--output", "out"]}
    assert refused(capsys, verb, checkpoint, *data[verb], *arguments.split()).startswith(f"corda {verb}: {said}")


def test_an_adapter_that_trained_biases_is_not_compared_with_the_base(checkpoint, work, capsys):
    plain = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only")
    peft.get_peft_model(tiny.build("llama"), plain).save_pretrained(work / "biased")
    sentence = refused(capsys, "eval", checkpoint, "--adapter", "biased", "--keep", "rows.jsonl")
    assert "trained biases of the base model (bias lora_only), which stay when it is taken off" in sentence


# --- model cards and the hub -----------------------------------------------------------------------------------------


class Hub:
    """Stands for `HfApi`: keeps what is sent. `denies`, `breaks`: errors of its two calls."""

    denies = breaks = None

    def __init__(self, folder):
        self.folder, self.made = folder, []

    def create_repo(self, name, private, exist_ok):
        assert exist_ok
        if self.denies:
            raise self.denies
        self.made.append((name, private))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        if self.breaks:
            raise self.breaks
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (self.folder / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.folder / repo_id / name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    api = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return api


def cells(card):
    """The rows of a card's tables."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card.text, flags=re.MULTILINE))


def test_every_output_has_a_filled_in_card_and_is_sent(checkpoint, work, hub, capsys):
    """The figures are those of the records, and what was sent is loaded."""
    run("init", checkpoint, "--context", "rows.jsonl", "--r", 4, "--output", "start", "--push", "me/start")
    tune = ["--start", "start", "--data", "rows.jsonl", "--precision", "fp32", "--batch_size", 4, "--warmup", 0]
    run("train", checkpoint, *tune, "--output", "tuned", "--push", "me/tuned", "--hub_private_repo", "true")
    run("export", checkpoint, "--adapter", "tuned", "--r", 2, "--output", "small", "--push", "small")
    run("export", checkpoint, "--adapter", "tuned", "--as", "merged", "--output", "merged", "--push", "me/merged")
    assert hub.made == [("me/start", None), ("me/tuned", True), ("small", None), ("me/merged", None)]
    assert "sent to https://hub/me/small/commit/1" in " ".join(capsys.readouterr().out.split())
    start, training = (json.loads((work / f).read_text()) for f in ("start/corda.json", "tuned/training.json"))
    cards = {
        name: ModelCard.load(hub.folder / "me" / name / "README.md") for name in ("start", "tuned", "small", "merged")
    }
    for name, card in cards.items():
        rows = cells(card)
        assert rows["base model"] == f"`{checkpoint.name}`"
        assert rows["method"] == "corda, mode kpm, split anchored, orientation covariance"
        context = start["context"]
        assert rows["context (what is to be kept)"] == f"`rows.jsonl`, 8 samples, {context['tokens']} tokens"
        assert rows["rank of the adapter"] == ("2" if name == "small" else "4")
        shares = [layer["leak"] / layer["output_energy"] for layer in start["layers"].values()]
        [leak] = (value for key, value in rows.items() if key.startswith("leak"))
        assert float(leak) == pytest.approx(sum(shares) / len(shares), rel=1e-2)
        losses = [value for key, value in rows.items() if key.startswith("training loss")]
        assert losses == ([] if name == "start" else [f"{training['train_loss']:.4f}"])
        assert card.data.library_name == ("transformers" if name == "merged" else "peft")
        assert "corda" in card.data.tags
        assert card.data.base_model is None  # a path is no name that the hub takes
        assert str(checkpoint) not in card.content
        assert card.data.license is None
    assert re.search(r"Compressed to rank 2: the update differs by \d\.\d\de-\d\d of its length", cards["small"].text)
    assert "AutoModelForCausalLM.from_pretrained" in cards["tuned"].text
    sent = {path.name for path in (hub.folder / "me" / "tuned").iterdir()}
    assert sent == {"README.md", "adapter_config.json", "adapter_model.safetensors", "corda.json", "training.json"}
    for name in ("start", "tuned", "small"):
        load_adapter(tiny.build("llama"), hub.folder / "me" / name)
    assert (hub.folder / "me" / "merged" / "config.json").is_file()


def test_a_plain_lora_has_a_card_too(checkpoint, work):
    run("train", checkpoint, "--data", "rows.jsonl", "--precision", "fp32", "--output", "out")
    card = ModelCard.load(work / "out" / "README.md")
    rows = cells(card)
    assert rows["trained on"] == "`rows.jsonl`, 8 samples"
    assert "method" not in rows
    assert card.text.strip().startswith(f"# LoRA adapter for `{checkpoint.name}`")


def test_what_python_made_and_peft_saved_names_its_settings(checkpoint, work):
    """It has no corda.json: the marks in adapter_config.json travel with every save, and the cards are made of them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = CordaConfig(r=4, orientation="diagonal", device="cpu")
    get_corda_model(model, config, tiny.batches(), progress=False).save_pretrained("start")
    marks = json.loads((work / "start" / "adapter_config.json").read_text())["auto_mapping"]["corda"]
    assert [marks[key] for key in ("mode", "split", "orientation")] == ["kpm", "anchored", "diagonal"]
    run("train", checkpoint, "--start", "start", "--data", "rows.jsonl", "--precision", "fp32", "--output", "tuned")
    run("export", checkpoint, "--adapter", "tuned", "--as", "merged", "--output", "merged")
    for name, ending in (("tuned", ""), ("merged", " merged in")):
        card = ModelCard.load(work / name / "README.md")
        assert cells(card)["method"] == "mode kpm, split anchored, orientation diagonal"
        assert re.match(rf"# .*CorDA adapter.*{ending}\n", card.text.strip())


def test_a_base_on_the_hub_is_in_the_cards_metadata_also_after_pefts_save(tmp_path):
    model, found = start(split="anchored")
    model.name_or_path = model.config._name_or_path = "org/base"
    adapted = install(model, found)
    for _ in range(2):
        card = ModelCard.load(saved_once(adapted, found, tmp_path / "a") / "README.md")
        assert card.data.base_model == "org/base"
        assert {"base_model:adapter:org/base", "lora"} <= set(card.data.tags)
        assert 'AutoModelForCausalLM.from_pretrained("org/base")' in card.text
        assert cells(card)["method"] == "corda, mode kpm, split anchored, orientation covariance"
        assert card.text.count("- PEFT ") == 1
        adapted.save_pretrained(tmp_path / "a")


def saved_once(adapted, found, folder):
    return folder if folder.exists() else saved(adapted, found, folder)


FORBIDDEN = HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=httpx.Request("POST", "https://hub")))


@pytest.mark.parametrize("verb", ["init", "train", "export"])
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("offline", "--push needs the hub, but HF_HUB_OFFLINE is set"),
        ("no token", "--push needs a token of the hub: run `hf auth login`, or set HF_TOKEN"),
        (FORBIDDEN, "the hub does not let us write to me/x: 403 Forbidden"),
        (httpx.ConnectError("no route"), "the hub does not let us write to me/x: the hub cannot be reached (no route)"),
        (HFValidationError("Repo id must be"), "--push: Repo id must be"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_work(trouble, said, verb, checkpoint, work, hub, monkeypatch, capsys):
    arguments = {
        "init": ["--context", "rows.jsonl"],
        "train": ["--data", "rows.jsonl", "--precision", "fp32"],
        "export": ["--adapter", "corda"],
    }
    if trouble == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif trouble == "no token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    else:
        hub.denies = trouble
    before = sorted(path.name for path in work.iterdir())
    assert said in refused(capsys, verb, checkpoint, *arguments[verb], "--output", "out", "--push", "me/x")
    assert sorted(path.name for path in work.iterdir()) == before


def test_what_was_not_sent_is_sent_by_the_same_command(checkpoint, work, hub, capsys):
    command = ["init", checkpoint, "--context", "rows.jsonl", "--r", 4, "--output", "start", "--push", "me/start"]
    hub.breaks = httpx.ReadTimeout("slow")
    sentence = refused(capsys, *command)
    assert "start is written, but not sent to the hub (`hf upload me/start start` does it)" in sentence
    assert "the hub cannot be reached (slow)" in sentence
    assert (work / "start" / "README.md").is_file()
    hub.breaks = None
    run(*command)
    assert (hub.folder / "me" / "start" / "adapter_model.safetensors").is_file()


NO_SKETCH = {"held": {"sha256": "", "norm": 1, "sketch": []}}


@pytest.mark.parametrize("edit", [{"fingerprint": None}, {"scale": None}, NO_SKETCH])
def test_edited_marks_are_a_sentence(edit, checkpoint, work, capsys):
    path = work / "corda" / "adapter_config.json"
    config = json.loads(path.read_text())
    marks = config["auto_mapping"]["corda"] | edit
    config["auto_mapping"]["corda"] = {key: value for key, value in marks.items() if value is not None}
    path.write_text(json.dumps(config))
    (work / "corda" / "sha256.json").unlink()
    said = refused(capsys, "export", checkpoint, "--adapter", "corda", "--output", "out")
    assert "adapter_config.json is damaged" in said
