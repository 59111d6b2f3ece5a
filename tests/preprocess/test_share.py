"""`corda init` by several processes: the adapter is that of one."""

import functools
import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
from ranks import run_together
from safetensors.torch import load_file

from corda_lora.algebra.second_order import Low, whole
from corda_lora.config import CordaConfig, CordaError
from corda_lora.models.targets import find_targets
from corda_lora.preprocess.context import Context
from corda_lora.preprocess.pipeline import preprocess
from corda_lora.preprocess.share import Share
from corda_lora.processes import Processes

ROWS = [{"prompt": f"The capital of country {i}?", "response": f" It is city {i}."} for i in range(120)]

HURRIED = "from corda_lora.cli import command; command.PATIENCE = 0"
IMPATIENT = "import corda_lora.processes; corda_lora.processes.MEETING = 1"


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer):
    """A model of three blocks, and data."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZE | {"num_hidden_layers": 3}))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def command(given, tmp_path):
    """command(output, *options) → the arguments of `corda init`."""

    def arguments(output, *options):
        data = ["--context", given / "known.jsonl", "--samples", 40, "--batch_tokens", 256]
        return ["init", "--model", given / "model", *data, "--r", 2, *options, "--output", tmp_path / output]

    return arguments


def ran(ended):
    assert ended.codes == [0] * len(ended.codes), ended.err
    return ended


def layers_of(folder):
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "corda.json").read_text())


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ["--orientation", "identity"]),  # nothing is summed up
        (2, ["--preset", "corda++", "--rounds", 2]),  # each sums up a round
        (3, ["--preset", "corda++", "--rounds", 3, "--mode", "ipm"]),
    ],
)
def test_the_same_bytes_where_each_sum_is_of_one_process(command, tmp_path, size, options):
    ran(run_together(1, command("one", *options), tmp_path / "log"))
    ended = ran(run_together(size, command("many", *options), tmp_path / "log"))
    one, many = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "many"))
    assert one == many
    assert "written to" in ended.out[0]
    assert f"next: torchrun --nproc-per-node {size} -m corda_lora -- train --model" in ended.out[0]
    assert ended.out[1:] == ended.err[1:] == [""] * (size - 1)
    for seconds in json.loads((tmp_path / "many" / "timing.json").read_text())["processes"]:
        assert 0 < seconds["waiting"] < seconds["all"]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, ["--mode", "ipm"]),
        (3, ["--mode", "ipm", "--keep", 10]),  # backward, too, with answers that are drawn
        (2, ["--mode", "ipm", "--orientation", "two_sided", "--preset", "corda+"]),
        (3, []),
    ],
)
def test_sums_over_processes_are_equal_to_rounding(command, tmp_path, size, options):
    ran(run_together(1, command("one", *options), tmp_path / "log"))
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}  # as accelerate says it
    ended = ran(run_together(size, command("many", *options), tmp_path / "log", **launched))
    assert "next: accelerate launch -m corda_lora train --model" in ended.out[0]
    (one, record), (many, shared) = (layers_of(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert record.keys() == shared.keys()
    for key in record.keys() - {"totals", "held_out", "layers"}:
        assert record[key] == shared[key]
    # The last components of kpm hang on the small eigenvalues of C, of which float32 knows less.
    same = functools.partial(pytest.approx, rel=1e-4 if "ipm" in options else 0.02)
    assert record["totals"].pop("ranks") == shared["totals"].pop("ranks")
    assert record["totals"] == same(shared["totals"])
    for name, layer in record["layers"].items():
        assert layer.keys() == shared["layers"][name].keys()
        for key in layer.keys() - {"shape"}:
            assert shared["layers"][name][key] == same(layer[key]), (name, key)
    if "ipm" in options:
        for name, A in one.items():
            signs = (A * many[name]).sum(1, keepdim=True).sign() if "lora_A" in name else 1
            assert torch.dist(A, signs * many[name]) <= 1e-4 * A.norm(), name
    if "--keep" in options:
        first, second = (load_file(tmp_path / name / "statistics.safetensors") for name in ("one", "many"))
        for name in {name.removesuffix(".diagonal") for name in first if name.endswith("diagonal")}:
            M, N = (whole(Low(s[f"{name}.factor"].float(), s[f"{name}.diagonal"].float())) for s in (first, second))
            assert torch.dist(M, N) < 0.01 * M.norm(), name  # they are kept in bfloat16


COUNTED = """
import json, os
import corda_lora.models.loading as loading
read = loading._read

def counted(path, name, dtype):
    with open(os.environ["READ"] + os.environ["RANK"], "a") as file:
        print(name, file=file)
    return read(path, name, dtype)

loading._read = counted
"""


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        (["--orientation", "identity"], 1),
        (["--mode", "ipm"], 1),
        (["--mode", "ipm", "--keep", 10], 2),  # and back
        (["--mode", "kpm"], 2),  # and other samples
    ],
)
def test_a_block_is_read_once_by_all_processes_together(command, tmp_path, options, forwards):
    ran(run_together(2, command("out", *options), tmp_path / "log", FIRST=COUNTED, READ=str(tmp_path / "read")))
    read = [[n for n in (tmp_path / f"read{rank}").read_text().split() if ".layers." in n] for rank in range(2)]
    matrices = [{name for name in names if "proj" in name} for names in read]
    assert not matrices[0] & matrices[1]
    assert len(matrices[0] | matrices[1]) == 3 * 7
    assert sorted(read[0] + read[1]) == sorted(forwards * list({*read[0], *read[1]}))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(command, tmp_path, killed):
    options = ["--preset", "corda++", "--rounds", 2]
    ran(run_together(2, command("whole", *options), tmp_path / "log"))
    event, ending = "os.rename", f"000{2 + killed}.safetensors"  # of the second window
    ended = run_together(2, command("out", *options), tmp_path / "log", kills={killed: (event, ending)})
    assert ended.codes[killed] == -signal.SIGKILL
    assert ended.codes[1 - killed] == 2
    [line] = [line for text in ended.err for line in text.splitlines() if line.startswith("corda init:")]
    assert "one of the 2 processes has ended without a word" in line
    assert "the same command goes on" in line
    assert len(json.loads((tmp_path / "out.work" / "finished.json").read_text())["files"]) == 2
    refused = run_together(1, command("out", *options), tmp_path / "log")  # its sums would be others
    assert refused.codes == [2]
    assert "processes was 2 there" in refused.err[0]
    ran(run_together(2, command("out", *options), tmp_path / "log"))
    one, many = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == many
    assert not (tmp_path / "out.work").exists()
    again = ran(run_together(2, command("out", *options), tmp_path / "log"))
    assert " ".join("".join(again.out).split()).count("is whole already") == 1


def test_torchrun_starts_it(command, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "corda_lora", "--"]
    done = subprocess.run([*launch, *map(str, command("out"))], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_process_that_never_comes_ends_the_others(command, tmp_path):
    there = command("out")
    elsewhere = in_process_1("os.environ['LOCAL_RANK'] = '0'")
    ended = run_together(3, [there, [*there, "--nonsense"], there], tmp_path / "log", FIRST=elsewhere)
    assert ended.codes == [2, 2, 2]
    assert "unrecognized arguments" in ended.err[1]
    lines = [line for text in ended.err for line in text.splitlines() if "have not come" in line]
    assert lines == [
        "corda init: of 3 processes these have not come within 1 seconds: 1; what ended them is said where they were "
        "started"
    ]


def in_process_1(code):
    """FIRST, by which none is patient, and process 1 runs some code, too."""
    return f"{IMPATIENT}\nimport os\nif os.environ['RANK'] == '1':\n    {code}"


def at_port(port):
    """FIRST, by which a process is the second of two that meet at a port."""
    lines = "corda_lora.processes.PATIENCE = 1; import os; os.environ.pop('TORCHELASTIC_USE_AGENT_STORE')"
    return f"{IMPATIENT}; {lines}; os.environ.update(WORLD_SIZE='2', RANK='1', MASTER_PORT='{port}')"


def test_a_port_where_something_else_listens_ends_a_process(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ended = run_together(1, command("out"), tmp_path / "log", FIRST=at_port(silent.getsockname()[1]))
    assert ended.codes == [2]
    assert "where the processes meet, does not answer: choose another MASTER_PORT" in ended.err[0]


def test_a_port_where_nobody_listens_ends_a_process(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    ended = run_together(1, command("out"), tmp_path / "log", FIRST=at_port(port))
    assert ended.codes == [2]
    [line] = [line for line in ended.err[0].splitlines() if line.startswith("corda init:")]
    assert f"nobody is to be reached at 127.0.0.1:{port}, where the processes meet (Connection refused)" in line


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--tokens", "answers"], 2, "tokens is answers, but must be one of all, text, image"),
        (["--help"], 0, "usage: corda [options] init"),
    ],
)
def test_what_all_processes_of_a_host_would_say_is_said_once(command, tmp_path, options, code, said):
    ended = run_together(3, command("out", *options), tmp_path / "log", FIRST=HURRIED)
    assert ended.codes == [code] * 3
    assert said in ended.out[0] + ended.err[0]
    assert ended.out[1:] == ended.err[1:] == [""] * 2


def test_a_process_that_ends_before_all_are_connected_ends_the_others(command, tmp_path):
    """It has come, and is gone, or cannot be reached, when the others connect."""
    first = in_process_1("import torch; torch.distributed.init_process_group = lambda *a, **k: os._exit(1)")
    ended = run_together(3, command("out"), tmp_path / "log", FIRST=first)
    assert ended.codes == [2, 1, 2]
    lines = [line for text in ended.err for line in text.splitlines() if line.startswith("corda init:")]
    assert lines == [
        "corda init: the 3 processes have come, but did not connect within 1 seconds: one has ended since, or cannot "
        "be reached from here (GLOO_SOCKET_IFNAME names the network to take)"
    ]


def test_one_that_lives_is_waited_for_when_all_are_connected(command, tmp_path):
    late = "import time; P = corda_lora.processes.Processes; meet = P.meet; "
    late += "P.meet = lambda self, say: (meet(self, say), time.sleep(3))"
    ran(run_together(2, command("out"), tmp_path / "log", FIRST=in_process_1(late)))


def test_what_cannot_be_shared_is_refused(given, command, tmp_path):
    ended = run_together(2, command("out", "--batch_tokens", 10**5), tmp_path / "log")
    assert ended.codes == [2, 2]
    lines = [line for line in "".join(ended.err).splitlines() if line.startswith("corda init:")]
    assert lines == [
        "corda init: 2 processes cannot share 1 batches of the context: start fewer, or lower --batch_tokens"
    ]
    few = command("out", "--orientation", "identity", "--target_modules", "lm_head")
    ended = run_together(3, few, tmp_path / "log")
    assert ended.codes == [2, 2, 2]
    assert "".join(ended.err).count("3 processes cannot share 1 layers: start fewer") == 1
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    there = command("out")
    differing = [str(other) if argument == given / "known.jsonl" else argument for argument in there]
    ended = run_together(2, [there, differing], tmp_path / "log")
    assert ended.codes == [2, 2]
    assert "process 1 on" in "".join(ended.err)
    assert "all need the same command, files and versions" in "".join(ended.err)
    ended = run_together(2, [there, command("elsewhere")], tmp_path / "log")
    assert ended.codes == [2, 2]
    assert "must be in a folder that all hosts share" in "".join(ended.err)
    export = ["export", "--model", "m", "--adapter", "a", "--output", tmp_path / "x"]
    ended = run_together(2, export, tmp_path / "log", FIRST=HURRIED)
    assert ended.codes == [2, 2]
    assert "".join(ended.err).count("export does not share its work among processes") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("changed", [{"vocab_size": 80}, {"intermediate_size": 64}, {}])
def test_processes_that_see_different_checkpoints_are_refused(given, tmp_path, changed):
    """By the same name, on hosts of their own. Each reads a part of a block, so they would mix the two, or wait."""
    shutil.copytree(given / "model", tmp_path / "0" / "model")
    shutil.copytree(given / "model", tmp_path / "1" / "model")
    config = transformers.LlamaConfig(**tiny.SIZE | {"num_hidden_layers": 3} | changed)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "1" / "model")
    here = f"import os; os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])"
    model, rows = ["--model", "model"], given / "known.jsonl"
    for verb in (
        ["init", *model, "--context", rows, "--batch_tokens", 256, "--samples", 40, "--r", 2],
        ["train", *model, "--data", rows, "--max_steps", 2, "--batch_size", 4, "--precision", "fp32"],
    ):
        ended = run_together(2, [*verb, "--output", tmp_path / "out"], tmp_path / "log", FIRST=here)
        assert ended.codes == [2, 2]
        assert "".join(ended.err).count("sees another checkpoint model than process 0") == 1, ended.err
        assert not list(tmp_path.glob("out*"))


def test_the_parts_of_a_context_are_in_order_and_alike():
    lengths = [12, 3, 3, 3, 3, 3, 3, 3, 3]
    batches = [{"input_ids": torch.ones(2, length)} for length in lengths]
    model = tiny.build("llama")
    targets = find_targets(model, "all-linear")
    for size in (2, 3, 9):
        parts = [
            Share(Processes(rank, size, None), model, targets, CordaConfig(r=1), torch.device("cpu")).part(
                Context(batches, list(range(9)))
            )
            for rank in range(size)
        ]
        assert [i for part in parts for i in part.rounds] == list(range(9))
        assert [i for part in parts for i in part.numbers] == list(range(18))
        assert [part.begin for part in parts] == [part.rounds[0] for part in parts]
        tokens = [sum(batch["input_ids"].numel() for batch in part.batches) for part in parts]
        assert max(tokens) <= sum(lengths) * 2 / size + 6 or size == 9
    with pytest.raises(CordaError, match="10 processes cannot share 9 batches"):
        Share(Processes(0, 10, None), model, targets, CordaConfig(r=1), torch.device("cpu")).part(Context(batches))


def test_a_batch_that_is_not_finite_has_its_number_among_all():
    """Where samples cannot be told apart: here the first token is left out, as routing to an expert leaves some out."""

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.expert = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)

        def forward(self, input_ids):
            return self.expert(self.embed(input_ids).flatten(0, 1)[1:])

    model = Routed()
    model.embed.weight.data[5] = torch.nan
    part = Context([{"input_ids": torch.full((2, 3), token)} for token in (1, 5)], begin=4)  # of a second process
    with pytest.raises(CordaError, match="input of expert, batch 5 of the context"):
        preprocess(model, CordaConfig(r=2, target_modules=["expert"]), part, progress=False)


def test_hosts_with_other_numbers_of_cores_share_the_work(command, tmp_path):
    """A process computes with its part of its host's cores."""
    threads = "import os, torch; torch.set_num_threads(1 + int(os.environ['RANK']))"
    ran(run_together(2, command("out"), tmp_path / "log", FIRST=threads))


def test_layers_are_shared_out_by_blocks_and_the_rest_by_cost():
    model = tiny.build("llama_for_nf4", num_hidden_layers=5)
    targets = find_targets(model, "all-linear")
    share = Share(Processes(0, 3, None), model, targets, CordaConfig(r=4), torch.device("cpu"))
    owners = {}
    for name in targets:
        owners.setdefault(name.split(".")[2], set()).add(share.owner([name], seen=True))
    assert [owners[str(i)] for i in range(3)] == [{0}, {1}, {2}]
    assert max(share.loads) < 1.3 * min(share.loads)
    assert len(owners["3"] | owners["4"]) == 3


STUCK = """
import datetime, os, sys
from corda_lora import cli, processes
from torch.distributed import TCPStore
gather = processes.Processes.gather
def stuck(self, value):
    if self.rank == 1:
        os.kill(os.getpid(), 9)
    other = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    other.wait(["nothing"], datetime.timedelta(seconds=200))  # as on a GPU: Python does not hear of signals
processes.Processes.gather = stuck
processes.PATIENCE = 1
cli.main(sys.argv[1:])
"""


def test_a_process_that_waits_for_one_that_was_killed_ends_when_the_launcher_asks(command, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "stuck.py"), "--"]
    done = subprocess.run([*launch, *map(str, command("out"))], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("one of the 2 processes has ended without a word") == 1, done.stderr
