"""Outputs: whole or not at all, one writer at a time, and nothing of the user's overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corda_lora.config import CordaError
from corda_lora.files import (
    check_checksums,
    check_output,
    check_result,
    is_made,
    is_partial,
    output_lock,
    read_json,
    scratch_folder,
    whole_file,
    whole_folder,
    write_checksums,
    write_text,
)
from corda_lora.preprocess.work import open_work


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_second_of_two_runs_is_refused(here):
    hold = "import sys; from corda_lora.files import *\nwith output_lock(Path('out')): print(1, flush=True); input()"
    first = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"1\n"
    with pytest.raises(CordaError, match="another run is writing out now"), output_lock(Path("out")):
        pass
    first.kill()  # the lock ends with the process
    first.communicate()
    with output_lock(Path("out")):
        pass
    assert not list(here.iterdir())


@pytest.mark.parametrize("check", [check_output, check_result])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "is a folder in use"),
        ("..", "is a folder in use"),
        ("dangling", "is a symbolic link"),
        ("link", "is a symbolic link"),
        ("n" * 251, "the output's name is too long: 250 bytes at most"),
        ("é" * 126, "the output's name is too long"),
        ("file/out", "cannot be written: .*file is a file|there is no folder file"),
    ],
)
def test_names_that_are_no_outputs(check, name, message, here):
    (here / "dangling").symlink_to("nowhere")
    (here / "real").mkdir()
    (here / "link").symlink_to("real")
    (here / "file").write_text("mine")
    with pytest.raises(CordaError, match=message):
        check(Path(name))
    assert sorted(path.name for path in here.iterdir()) == ["dangling", "file", "link", "real"]


@pytest.mark.parametrize("name", ["n" * 250, "é" * 125])
def test_a_long_name_is_written(name, here):
    with output_lock(Path(name)), whole_folder(Path(name)) as folder:
        (folder / "x").write_text("x")
    write_text(Path(name + ".txt"), "y")
    assert sorted(path.name for path in here.iterdir()) == [name, name + ".txt"]


def test_what_a_dead_process_left_is_removed_and_nothing_else(here):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".out.corda-{dead.pid}.partial", ".out.partial", f".other.corda-{dead.pid}.partial"):
        (here / name).write_text("x")
    write_text(here / "out", "new")
    assert {path.name for path in here.iterdir()} == {"out", ".out.partial", f".other.corda-{dead.pid}.partial"}


def test_what_a_library_wrote_beside_a_file_when_it_was_killed_is_removed(here):
    """As safetensors does, which renames it when it is whole."""
    killed = (
        "import os, pathlib\nfrom corda_lora.files import whole_file\n"
        "with whole_file(pathlib.Path('out')) as partial:\n"
        "    partial.with_name('.tmpXmkA3f').write_text('x')\n    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    left = list(here.iterdir())
    assert left
    assert all(is_partial(path) for path in left)
    write_text(here / "out", "new")
    assert [path.name for path in here.iterdir()] == ["out"]


def test_what_is_needed_on_the_way_is_removed_also_after_a_kill(here):
    killed = (
        "import os, pathlib\nfrom corda_lora.files import scratch_folder\n"
        "with scratch_folder(pathlib.Path('out')) as folder:\n"
        "    (folder / 'states').write_text('x')\n    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    (left,) = here.iterdir()
    with scratch_folder(Path("out")) as folder:
        assert not left.exists()
        assert not any(folder.iterdir())
    assert not any(here.iterdir())


@pytest.mark.parametrize("private", [True, False])
def test_files_have_the_rights_that_umask_says(private, here):
    """safetensors writes a file for its owner alone."""
    before = os.umask(0o077 if private else 0o022)
    try:
        with whole_file(here / "file") as partial:
            partial.touch(0o600)
        with whole_folder(here / "folder") as folder:
            (folder / "file").touch(0o600)
    finally:
        os.umask(before)
    for path in (here / "file", here / "folder" / "file"):
        assert path.stat().st_mode & 0o777 == (0o600 if private else 0o644)


@pytest.mark.parametrize("make", ["folder", "file", "link"])
def test_a_work_folder_that_is_not_ours_is_left_alone(make, here):
    work = here / "out.work"
    if make == "folder":
        work.mkdir()
        (work / "mine").write_text("mine")
    elif make == "file":
        work.write_text("mine")
    else:
        (here / "elsewhere").mkdir()
        work.symlink_to("elsewhere")
    before = sorted(here.rglob("*"))
    with pytest.raises(CordaError, match=r"out.work is needed for unfinished work, but is there"):
        open_work(here / "out", {"run": 1}, lambda folder: False)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("content", ["mine", '{"mine": 1}', "[1]", '{"results": '])
def test_a_file_of_results_replaces_only_results(content, here):
    (here / "eval.json").write_text(content)
    with pytest.raises(CordaError, match=r"eval.json is there and holds no results of corda eval"):
        check_result(here / "eval.json")
    (here / "eval.json").write_text('{"results": {}}')
    check_result(here / "eval.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(here):
    (here / "locked").mkdir(mode=0o500)
    with pytest.raises(CordaError, match="no permission"):
        check_result(here / "locked" / "eval.json")


def test_checksums(here):
    (here / "sub").mkdir()
    (here / "a").write_text("a")
    (here / "sub" / "b").write_text("b")
    with pytest.raises(CordaError, match=r"sha256.json is missing: start again"):
        check_checksums(here, "start again")
    write_checksums(here)
    check_checksums(here, "start again")
    (here / "a").write_text("c")
    with pytest.raises(CordaError, match=r"a is damaged: start again"):
        check_checksums(here, "start again")
    (here / "a").unlink()
    with pytest.raises(CordaError, match=r"a is missing: start again"):
        check_checksums(here, "start again")
    for damaged in ('{"a"', "[]", "null"):
        (here / "sha256.json").write_text(damaged)
        with pytest.raises(CordaError, match=r"sha256.json is damaged: start again"):
            check_checksums(here, "start again")


def test_whether_an_output_was_made_by_a_recipe(here):
    path = here / "record.json"
    assert not is_made(path, {"a": 1})
    path.write_text(json.dumps({"a": {"b": [1]}, "more": 2}))
    assert is_made(path, {"a": {"b": (1,)}})
    assert not is_made(path, {"a": {"b": [2]}})
    assert not is_made(path, {"c": None, "a": 1})
    path.write_text('{"a": ')
    with pytest.raises(CordaError, match=r"record.json is damaged"):
        is_made(path, {"a": 1})
    path.write_text("[" * 100_000)
    with pytest.raises(CordaError, match=r"record.json is damaged"):
        read_json(path)


def test_a_file_that_fails_leaves_the_old_one(here):
    write_text(here / "out", "old")
    with pytest.raises(FileNotFoundError), whole_file(here / "out") as partial:
        partial.with_name("nothing").rename(partial)
    assert (here / "out").read_text() == "old"
    assert [path.name for path in here.iterdir()] == ["out"]


def test_a_lock_leaves_no_folder_behind(here):
    (here / "mine").mkdir()
    with output_lock(Path("mine/deep/er/out")):
        pass
    assert [str(path) for path in Path().rglob("*")] == ["mine"]
    with output_lock(Path("mine/deep/er/out")):
        write_text(Path("mine/deep/mine"), "x")
    assert sorted(map(str, Path().rglob("*"))) == ["mine", "mine/deep", "mine/deep/mine"]
