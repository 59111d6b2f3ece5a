"""`corda compare --ray` on a cluster of two nodes, which are on this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from corda_lora.cli import main
from corda_lora.compare import remote
from corda_lora.compare.comparison import Comparison
from corda_lora.compare.remote import ATTEMPTS, Actor, Nodes, cluster, shares
from corda_lora.compare.schedule import Job
from corda_lora.compare.work import LOG
from corda_lora.config import CompareConfig, CordaError, EvalConfig, ModelConfig

TWO = {"lora": "[1.0e-3, 1.0e-2]", "corda-kpm-anchored": "[1.0e-2, 3.0e-2]"}
# A comparison that is killed in its first run.
KILLED = """
import os, signal, sys, time
import ray
from corda_lora.cli import main
from corda_lora.compare.remote import Actor
from corda_lora.compare.work import LOG
begin = Actor.begin
def begin_and_die(self, job):
    pid = ray.get(self.actor.__ray_call__.remote(lambda actor: os.getpid()))
    begin(self, job)
    if job.is_run:
        while not (self.pool.comparison.folder(job) / LOG).exists():
            time.sleep(0.01)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
Actor.begin = begin_and_die
main(["compare", "recipe.yaml", "--output", "out", "--ray", sys.argv[1]])
"""
# A dead node is seen at its next check, and not after the fifth in three seconds each.
CHECKS = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
NODE = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def ray_cluster():
    """A cluster with one node. Its processes end with this one, even if it is killed (see Ray's `fate_share`)."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # not deep in the tests' own: the paths of sockets are short
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setenv("RAY_TMPDIR", folder)
    Path(folder, "ray").mkdir()  # where Ray notes the cluster: it does not make the folder
    nodes = Cluster(initialize_head=True, head_node_args=NODE | {"temp_dir": folder, "_system_config": CHECKS})
    try:
        yield nodes
    finally:
        nodes.shutdown()
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


def ended(pid, seconds=120):
    """Whether a process ends within a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def results(output):
    return {str(path.parent.relative_to(output)): path for path in Path(output).glob("runs/*/*/result.json")}


def numbers(output):
    runs = {name: json.loads(path.read_text()) for name, path in results(output).items()}
    return {name: [run[key] for key in ("status", "results", "loss", "parameters")] for name, run in runs.items()}


@pytest.mark.cluster
def test_a_killed_command_and_a_killed_node_lose_nothing(ray_cluster, recipe, capfd, monkeypatch):
    import ray

    file, address = recipe(TWO, seeds=1), ray_cluster.address
    killed = subprocess.run([sys.executable, "-c", KILLED, address], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert ended(int(killed.stdout.split()[-1])), "a run went on alone"
    assert Path("out/base/result.json").is_file()
    base = Path("out/base/result.json").stat().st_mtime_ns

    second, handler = ray_cluster.add_node(**NODE), signal.getsignal(signal.SIGTERM)
    begin, lost = Actor.begin, []

    def begin_and_kill(self, job):
        """Stop a run on the second node in its midst, and then kill it and its node, as if the host had died."""

        def where(actor):
            return ray.get_runtime_context().get_node_id(), os.getpid()

        if lost:  # there may be no room for this process yet
            begin(self, job)
            return
        node, pid = ray.get(self.actor.__ray_call__.remote(where))
        begin(self, job)
        if job.is_run and node == second.node_id:
            folder = self.pool.comparison.folder(job)
            while not (folder / LOG).exists():
                assert psutil.pid_exists(pid), "another than this test has ended it"
                time.sleep(0.01)
            os.kill(pid, signal.SIGSTOP)
            if (folder / "result.json").exists():  # too late: at the next run
                os.kill(pid, signal.SIGCONT)
                return
            ray_cluster.remove_node(second, allow_graceful=False)
            os.kill(pid, signal.SIGKILL)
            lost.append(str(job))

    monkeypatch.setattr(Actor, "begin", begin_and_kill)
    main(["compare", file, "--output", "out", "--ray", address])
    assert lost
    said = " ".join(capfd.readouterr().err.split())
    assert f"{lost[0]}: its process died" in said
    assert "it is begun again" in said
    assert re.search(r" (\d+)/\1 ", said), "the bar counts the steps of all nodes, and those that were lost once"
    assert Path("out/base/result.json").stat().st_mtime_ns == base, "what was finished was done again"
    assert signal.getsignal(signal.SIGTERM) is handler
    runs = [json.loads(path.read_text()) for path in results("out").values()]
    assert [(run["status"], run["why"]) for run in runs] == [("done", "")] * 4
    assert all(run["host"] and run["commit"] for run in runs)
    comparison = json.loads(Path("out/comparison.json").read_text())
    assert comparison["command"] == f"corda compare {file} --output out --ray {address}"

    main(["compare", file, "--output", "here"])
    assert numbers("out") == numbers("here"), "one thread each: the same numbers"


def test_each_process_has_its_gpu_before_anything_starts_cuda(ray_cluster, comparison, monkeypatch):
    import ray

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # two that are not there
    node = ray_cluster.add_node(**NODE, num_gpus=2)
    try:
        with cluster(ray_cluster.address) as has_gpus:
            assert has_gpus
            pool = Nodes(comparison, 2, None)
            assert pool.room() == 4
            workers = [pool.start() for _ in range(4)]
            assert pool.room() == 0

            def seen(actor):
                return os.environ["CUDA_VISIBLE_DEVICES"], {"torch", "peft"} & sys.modules.keys()

            found = ray.get([worker.actor.__ray_call__.remote(seen) for worker in workers])
            assert sorted(found) == [("0", set()), ("0", set()), ("1", set()), ("1", set())]
            pool.close(workers)
            assert pool.room() == 4
    finally:
        ray_cluster.remove_node(node)


@pytest.fixture
def comparison(checkpoint, folder):
    config = CompareConfig(["lora"], "learn.jsonl", EvalConfig(learn="learn.jsonl"))
    comparison = Comparison(ModelConfig(str(checkpoint)), config, Path("out"))
    comparison.open()
    return comparison


def test_nodes_that_see_other_files_are_refused(ray_cluster, comparison, monkeypatch):
    with cluster(ray_cluster.address):
        assert {path.name for path in comparison.files} == {"recipe.json", "config.json", "learn.jsonl"}
        monkeypatch.setattr(Comparison, "files", [Path("/proc/self/stat")])
        with pytest.raises(CordaError, match=r"the node .* sees another /proc/self/stat than this host"):
            Nodes(comparison, 1, None)
        monkeypatch.setattr(remote, "__version__", "0.0")
        with pytest.raises(CordaError, match="sees another version of corda-lora than this host"):
            Nodes(comparison, 1, None)


@pytest.mark.cluster
def test_a_run_that_ends_its_process_every_time_has_failed(ray_cluster, comparison):
    import ray

    def deadly(actor):
        from corda_lora.compare import work

        def end(*_):
            with open("begun", "a") as begun:
                begun.write("once more\n")
            os._exit(1)

        work.do_job = end

    job, again = Job("lora", 1e-3), []
    comparison.folder(job).mkdir(parents=True)
    with cluster(ray_cluster.address):
        pool = Nodes(comparison, 1, None)
        for _ in range(ATTEMPTS):
            worker = pool.start()
            ray.get(worker.actor.__ray_call__.remote(deadly))
            worker.begin(job)
            while not pool.wait([worker], 1):
                pass
            assert worker.take() is None
            assert "process died" in worker.death
            again.append(worker.again)
            worker.end()
    assert again == [True, True, False]
    assert len(Path("begun").read_text().splitlines()) == ATTEMPTS


@pytest.mark.parametrize(
    ("jobs", "nodes", "resource", "share", "threads"),
    [
        (1, [{"GPU": 8, "CPU": 64}], "GPU", 1.0, 8),
        (7, [{"GPU": 1, "CPU": 4}], "GPU", 0.1428, 1),  # seven of them are no more than the GPU
        (2, [{"GPU": 1, "CPU": 32}, {"GPU": 4, "CPU": 16}], "GPU", 0.5, 2),
        (1, [{"CPU": 2}], "CPU", 2.0, 2),
        (2, [{"CPU": 5}, {"CPU": 8}], "CPU", 2.0, 2),
        (3, [{"CPU": 2}], "CPU", 0.6666, 1),
    ],
)
def test_shares(jobs, nodes, resource, share, threads):
    assert shares(nodes, resource, jobs) == (share, threads)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "nonsense"], "--ray is 'nonsense', but must be auto, or the HOST:PORT"),
        (["--ray", "ray://host:10001"], "but must be auto, or the HOST:PORT"),
        (
            ["--ray", "127.0.0.1:1"],
            "there is no Ray cluster at 127.0.0.1:1 ([Errno 111] Connection refused): start one",
        ),
        (["--ray", "auto", "--gpus", "0"], "--ray shares out the GPUs of its cluster: leave one of them out"),
    ],
)
def test_bad_addresses(options, said, recipe, capsys):
    pytest.importorskip("ray")
    with pytest.raises(SystemExit, match="2"):
        main(["compare", recipe(TWO), "--output", "out", *options])
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


def test_ray_is_not_installed(recipe, capsys, monkeypatch):
    monkeypatch.setattr(remote, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", recipe(TWO), "--output", "out", "--ray", "auto"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "corda compare: --ray needs Ray, which is not installed: pip install 'corda-lora[ray]'"
