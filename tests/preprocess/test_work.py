"""Larger than memory, and killed anywhere: blocks from the checkpoint, parked states, work that goes on."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from ranks import run_together
from safetensors import SafetensorError

from corda_lora import CordaConfig, CordaError
from corda_lora.cli import main
from corda_lora.config import ModelConfig
from corda_lora.models.loading import load_model, open_model
from corda_lora.models.lockstep import find_blocks, lockstep, parking, tensors_of
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.work import saving

CONFIG = CordaConfig(preset="corda++", r=4, rounds=3)
FAMILIES = ["llama", "llama_tied", "gemma3", "gpt2_conv1d", "bert", "t5"]


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model in shards."""

    def save(family: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "model"
        tiny.build(family, dtype).save_pretrained(folder, max_shard_size="20KB")
        return folder

    return save


def same(a, b):
    assert a.record == b.record
    for name in a.layers:
        assert torch.equal(a.layers[name].A, b.layers[name].A)
        assert torch.equal(a.layers[name].B, b.layers[name].B)


def bytes_held(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


# --- blocks from the checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:the smallest of", "ignore:1 layers got")
def test_a_model_on_disk_starts_as_one_in_memory(saved, family, dtype):
    source = ModelConfig(str(saved(family, dtype)))
    model, stored = open_model(source)
    assert stored
    assert bytes_held(model.parameters()) == sum(p.element_size() for p in model.parameters())
    from_disk = preprocess(model, CONFIG, tiny.batches(family), progress=False, stored=stored)
    same(from_disk, preprocess(load_model(source), CONFIG, tiny.batches(family), progress=False))
    assert bytes_held(model.parameters()) == sum(p.element_size() for p in model.parameters())


@pytest.mark.parametrize("orientation", ["covariance", "identity"])
def test_one_block_is_in_memory_at_a_time_and_read_once(saved, orientation):
    model, stored = open_model(ModelConfig(str(saved("llama"))))
    blocks = find_blocks(model, list(find_targets(model, "all-linear")))
    reads, most = [], []

    def counted(tensor, read):
        def count():
            reads.append(tensor)
            held = [bytes_held(block.parameters()) > 100 for block in blocks.values()]
            most.append(sum(held))
            return read()

        return count

    stored = {tensor: counted(tensor, read) for tensor, read in stored.items()}
    config = CordaConfig(r=4, orientation=orientation)
    preprocess(model, config, tiny.batches(), progress=False, stored=stored)
    assert max(most) == 1
    assert len(reads) == len({id(t) for t in reads})
    in_blocks = {id(t) for block in blocks.values() for t in tensors_of(block) if t in stored}
    assert in_blocks <= {id(t) for t in reads}
    assert id(model.lm_head.weight) not in {id(t) for t in reads}


@pytest.mark.parametrize("family", ["mixtral"])
def test_what_cannot_be_read_by_block_is_loaded_whole_and_said(saved, family):
    folder = saved(family)
    with pytest.warns(UserWarning, match="the whole model is loaded: .* block by block"):
        model, stored = open_model(ModelConfig(str(folder)))
    assert not stored
    assert torch.isfinite(model.model.layers[0].self_attn.q_proj.weight).all()


def test_a_missing_or_damaged_shard_is_named(saved):
    folder = saved("llama")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    whole = shards[2].read_bytes()
    shards[2].write_bytes(whole[:-10])
    with pytest.raises(CordaError, match=rf"{shards[2].name} is damaged"):
        open_model(ModelConfig(str(folder)))
    shards[2].unlink()
    with pytest.raises(CordaError, match=f"has no {shards[2].name}, which its index names"):
        open_model(ModelConfig(str(folder)))
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(CordaError, match=rf"{shards[2].name} has no .*, which the index says it has"):
        open_model(ModelConfig(str(folder)))
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CordaError, match=r"index\.json is damaged"):
        open_model(ModelConfig(str(folder)))


# --- where batches wait ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2_conv1d", "bert", "t5"])
def test_outputs_are_those_of_a_plain_forward_when_states_are_parked(tmp_path, family, place):
    model, batches, outputs = tiny.build(family), tiny.batches(family), []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    blocks = list(find_blocks(model, list(find_targets(model, "all-linear"))).values())
    parked, park = [], parking(place, tmp_path)

    def counted(x):
        parked.append(x.numel())
        return park(x)

    for _, run in lockstep(model, blocks, batches, to_end=True, park=counted):
        run()
    hook.remove()
    assert len(parked) >= len(batches) * len(blocks)
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        for batch, output in zip(batches, outputs, strict=True):
            assert torch.equal(output, model(**batch).logits)


def test_parked_on_disk_the_start_is_the_same():
    model = tiny.build("llama")
    starts = [preprocess(model, CONFIG, tiny.batches(), progress=False, park=place) for place in ("device", "disk")]
    same(*starts)


def test_where_states_wait_is_chosen_by_room_and_said(monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr("corda_lora.devices.accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr("corda_lora.preprocess.walk.psutil.virtual_memory", Little)
    with pytest.warns(UserWarning, match=r"hidden states of waiting samples \(0.0 GB\) are parked in files"):
        preprocess(tiny.build("llama"), CordaConfig(r=4), tiny.batches(), progress=False)


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_are_seen_apart_and_layers_choose_for_themselves():
    model, batches = tiny.build("llama"), tiny.batches()
    alone = [preprocess(model, CordaConfig(r=4), [batch], progress=False) for batch in batches]
    start = preprocess(model, CordaConfig(r=4, rounds=3), batches, progress=False)
    chosen = {name: layer.record.round for name, layer in start.layers.items()}
    assert len(set(chosen.values())) > 1
    for name, layer in start.layers.items():
        assert torch.equal(layer.A, alone[chosen[name]].layers[name].A)
        assert layer.record.scores.index(min(layer.record.scores)) == chosen[name]


def test_more_rounds_than_batches_are_refused():
    with pytest.raises(CordaError, match="rounds is 5, but the context has only 3 batches"):
        preprocess(tiny.build("llama"), CordaConfig(r=4, rounds=5), tiny.batches(), progress=False)


# --- killed, and gone on with ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory, tokenizer):
    """The arguments of a `corda init` on a model of six blocks, less --output."""
    folder = tmp_path_factory.mktemp("command")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZE | {"num_hidden_layers": 6}))
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"text": f"The capital of {a} is {b}, in the year {i}."} for i, (a, b) in enumerate(["xy", "uv", "pq"] * 20)
    ]
    (folder / "context.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--preset", "corda++", "--rounds", "3", "--samples", "16", "--r", "4", "--batch_tokens", "200"]
    return ["init", "--model", f"{folder}/model", "--context", f"{folder}/context.jsonl", *options]


# Where one run after another is killed, each going on from what the last one left: the file, the moment, and how many
# blocks are finished then. A file is `written` under a partial name and `placed` under its own.
PLACES = [
    ("run.json", "before it is placed", 0),
    ("0000.safetensors", "half written", 0),
    ("0001.safetensors", "before it is placed", 1),
    ("0001.safetensors", "after it is placed", 1),
    ("finished.json", "before it is placed", 1),
    ("finished.json", "after it is placed", 2),
    ("corda.json", "half written", 6),
    ("killed", "before it is placed", 6),
    ("killed", "after it is placed", 6),
]

# Kills the process at the place that the variable PLACE names.
KILLER = """
import json, os, signal
from pathlib import Path
from corda_lora.preprocess import work

file, moment = json.loads(os.environ["PLACE"])

def die(name, now):
    if Path(name).name == file and moment == now:
        os.kill(os.getpid(), signal.SIGKILL)

def placing(place):
    def placed(source, target, **options):
        die(target, "before it is placed")
        place(source, target, **options)
        die(target, "after it is placed")
    return placed

def name_of(partial):
    return Path(partial).name.split(".corda-")[0].removeprefix(".")

def save_file(tensors, path, **options):
    save(tensors, path, **options)
    os.truncate(path, os.path.getsize(path) // 2) if name_of(path) == file else None
    die(name_of(path), "half written")

def write_text(path, text, *options, **more):
    write(path, text[: len(text) // 2] if path.name == file == "corda.json" else text, *options, **more)
    die(path, "half written")

save, write = work.save_file, Path.write_text
work.save_file, Path.write_text = save_file, write_text
os.replace, os.rename = placing(os.replace), placing(os.rename)
"""


@pytest.mark.filterwarnings("ignore:the smallest of")
@pytest.mark.slow
def test_killed_at_every_write_it_goes_on_to_the_same_bytes(command, tmp_path):
    ended = run_together(1, [*command, "--output", tmp_path / "whole"], tmp_path / "log")
    assert ended.codes == [0], ended.err
    for file, moment, blocks in PLACES:
        place = {"FIRST": KILLER, "PLACE": json.dumps([file, moment])}
        ended = run_together(1, [*command, "--output", tmp_path / "killed"], tmp_path / "log", **place)
        assert ended.codes == [-signal.SIGKILL], (file, moment, ended.err)
        finished = tmp_path / "killed.work" / "finished.json"
        assert (len(json.loads(finished.read_text())["blocks"]) if finished.exists() else 0) == blocks, (file, moment)
        assert (tmp_path / "killed").exists() == ((file, moment, blocks) == PLACES[-1])
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir() if p.name != "timing.json"}
    assert set(expected) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "corda.json",
        "sha256.json",
        "spectra.safetensors",
    }
    for name, content in expected.items():
        assert (tmp_path / "killed" / name).read_bytes() == content, name
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def unfinished(command, tmp_path, monkeypatch):
    """Arguments of a run that was stopped in its fourth block, and its folder of work."""
    from corda_lora.preprocess.work import LayerStore

    save = LayerStore.save

    def stop(self, layers):
        if len(self.files) == 3:
            raise KeyboardInterrupt
        save(self, layers)

    monkeypatch.setattr(LayerStore, "save", stop)
    arguments = [*command, "--output", str(tmp_path / "start")]
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    monkeypatch.setattr(LayerStore, "save", save)
    return arguments, tmp_path / "start.work"


def refused(arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err.strip().split("\n")[-1]


def test_finished_blocks_are_run_but_not_decomposed_again(unfinished, monkeypatch, tmp_path):
    from corda_lora.preprocess import pipeline as module

    arguments, work = unfinished
    assert len(list(work.glob("*.safetensors"))) == 3
    decomposed = []
    original = module.decompose_layer
    monkeypatch.setattr(module, "decompose_layer", lambda *args: decomposed.append(1) or original(*args))
    main([*arguments, "--keep_work"])
    assert len(decomposed) == 3 * 7
    assert len(list(work.glob("*.safetensors"))) == 6
    assert (tmp_path / "start" / "adapter_model.safetensors").is_file()


def test_finished_work_is_removed(unfinished):
    arguments, work = unfinished
    main(arguments)
    assert not work.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--r", "5"], "another run (config.r was 4 there and is 5 here)"),
        (["--samples", "15"], "another run (data.samples was 16 there and is 15 here)"),
        (["--dtype", "bfloat16"], "another run (dtype was 'auto' there and is 'bfloat16' here)"),
    ],
)
def test_work_of_another_run_is_refused_and_kept(unfinished, capsys, change, message):
    arguments, work = unfinished
    assert message in refused([*arguments, *change], capsys)
    assert len(list(work.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("run", [None, "{}"])
def test_a_folder_with_a_file_of_the_users_is_left_alone(run, command, capsys, tmp_path):
    work = tmp_path / "start.work"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    if run is not None:
        (work / "run.json").write_text(run)
    said = refused([*command, "--output", str(tmp_path / "start")], capsys)
    assert "holds mine.txt, which is not of this program" in said
    assert (work / "mine.txt").read_text() == "mine"


def test_a_disk_that_is_full_while_the_next_block_computes(command, capsys, tmp_path, monkeypatch):
    """As it is written beside an accelerator: the error comes a block later, and what was written before is kept."""
    from corda_lora.preprocess import work as module

    monkeypatch.setattr(
        "corda_lora.preprocess.pipeline.saving", lambda store, device, _: module.saving(store, torch.device("cuda"))
    )
    written, write = [], module.save_file

    def fills(*args, **kwargs):
        written.append(threading.current_thread())
        if len(written) == 3:
            raise SafetensorError("No space left on device (os error 28)")
        write(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", fills)
    arguments, work = [*command, "--output", str(tmp_path / "start")], tmp_path / "start.work"
    assert refused(arguments, capsys).startswith("corda init: the disk is full: ")
    assert threading.main_thread() not in written
    assert len(written) == 3
    assert len(json.loads((work / "finished.json").read_text())["blocks"]) == 2
    assert not (tmp_path / "start").exists()
    main(arguments)  # there is room again
    assert len(written) == 3 + 4
    monkeypatch.undo()
    main([*command, "--output", str(tmp_path / "whole")])
    for name in ("adapter_model.safetensors", "corda.json"):
        assert (tmp_path / "start" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_last_blocks_error_comes_up_at_the_end_and_one_block_waits_at_most():
    class Store:
        begun, ended = 0, 0

        def save(self, layers):
            self.begun += 1
            time.sleep(0.05)
            self.ended += 1
            if "bad" in layers:
                raise OSError(28, "No space left on device")

    store = Store()
    with saving(store, torch.device("cuda")) as save:
        for i in range(4):
            save({f"good{i}": None})
            assert store.ended >= i
    assert store.ended == 4
    with pytest.raises(OSError, match="No space left"), saving(store, torch.device("cuda")) as save:
        save({"bad": None})


def test_work_of_another_version_is_refused(unfinished, capsys, monkeypatch):
    monkeypatch.setattr("corda_lora.adapters.prepare.__version__", "0.0.9")
    assert "another run (corda-lora was '0.1.0' there and is '0.0.9' here)" in refused(unfinished[0], capsys)


def test_work_on_another_context_is_refused(unfinished, capsys):
    arguments, _ = unfinished
    path = Path(arguments[arguments.index("--context") + 1])
    text = path.read_text()
    try:
        path.write_text(text.replace("capital", "Capital"))
        assert "holds unfinished work of another run (" in refused(arguments, capsys)
    finally:
        path.write_text(text)


def test_work_on_other_weights_is_refused(unfinished, capsys, command, tmp_path):
    arguments, work = unfinished
    folder = Path(command[command.index("--model") + 1])
    shard = next(p for p in sorted(folder.glob("*.safetensors")) if b"layers.1.mlp.up_proj" in p.read_bytes())
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-20000] + bytes(20000))
        assert "was made from other weights (model.layers." in refused(arguments, capsys)
    finally:
        shard.write_bytes(whole)
    assert len(list(work.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_damaged_work_is_refused(unfinished, capsys, damage):
    arguments, work = unfinished
    path = work / "0001.safetensors"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        path.unlink()
    else:
        path = work / "finished.json"
        path.write_text(path.read_text()[:-5])
    message = refused(arguments, capsys)
    assert str(path) in message
    assert ("is missing" if damage == "missing" else "is damaged") in message
    assert "remove" in message


def test_more_rounds_than_the_data_can_give(command, capsys, tmp_path):
    arguments = [*command, "--samples", "60", "--output", str(tmp_path / "start")]
    assert "3 rounds of 60 samples would all be the 60 rows of" in refused(arguments, capsys)
    assert not (tmp_path / "start.work").exists()
