"""Files are written whole or not at all, also where the power fails; no file of the user's is overwritten.

A file that is being written is in a folder of its own, `.NAME.corda-PID.partial`, beside its place: safetensors writes
under a name of its own beside the file that it is given. It takes its place when it is complete and on the disk. A
process that is killed leaves its partial folder behind; the next process that writes the same file removes it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from .config import CordaError
from .config.recorded import difference
from .config.values import short

CHECKSUMS = "sha256.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
# What there is no room for, by what is in the messages of Python and safetensors.
NO_ROOM = {
    "No space left": "the disk is full",
    "Disk quota exceeded": "the quota of this disk is used up",
    "File too large": "a file may not be as large here (ulimit -f)",
}
LONGEST_NAME = 255  # bytes, on every common file system


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a partial file to write; it replaces `path` when the block ends without an error.

    Raises CordaError if the disk is full: then `path` is as it was.
    """
    folder = _partial_of(path)
    partial = folder / path.name
    try:
        with _full_disk(path):
            folder.mkdir()
            yield partial
            _share(partial, folder)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(directory: Path) -> Iterator[Path]:
    """Yield a new folder to fill; it becomes `directory` when the block ends without an error.

    Raises CordaError if `directory` holds anything (see `check_output`), or the disk is full.
    """
    check_output(directory)
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_of(directory)
    try:
        with _full_disk(directory):
            partial.mkdir()
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _share(path, partial)
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
            _sync_folder(directory.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder beside an output, for what is needed while that is made. It is removed at the end. What a
    killed process left is removed first."""
    folder = _partial_of(work_folder(output.absolute()))
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_folder(directory: Path) -> None:
    """Remove a folder whole or not at all: what a killed process left of it under a partial name is removed, too."""
    partial = _partial_of(directory)
    if directory.is_dir():
        directory.rename(partial)
        shutil.rmtree(partial)


def remove_work(output: Path, run: Mapping[str, Any]) -> None:
    """Remove the unfinished work of a run whose output is whole: the run was killed before it did so itself.

    Args:
        run: settings of the run; the work of another one is left alone.
    """
    work = work_folder(output)
    if is_made(work / "run.json", run) or not work.exists():  # then only a part of it, under a partial name
        remove_folder(work)


def work_folder(output: Path) -> Path:
    """The place for the unfinished work of a run (see `preprocess.work`)."""
    return output.with_name(output.name + ".work")


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises CordaError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CordaError(f"{path} is damaged: it is no whole JSON") from error


def write_checksums(folder: Path, *patterns: str) -> None:
    """Write the checksum of every file in `folder`, or of those that match one of the patterns, beside them."""
    found = {path for pattern in patterns or ("*",) for path in folder.rglob(pattern)}
    paths = sorted(path for path in found if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {str(path.relative_to(folder)): sha256_of(path) for path in paths})


def check_checksums(folder: Path, remedy: str, all_but: Collection[str] = ()) -> None:
    """Raises CordaError if a file in `folder` is missing or has changed since `write_checksums`.

    Args:
        remedy: says in the message what to do.
        all_but: entries that are not compared.
    """
    if not (folder / CHECKSUMS).is_file():
        raise CordaError(f"{folder / CHECKSUMS} is missing: {remedy}")
    try:
        checksums = read_json(folder / CHECKSUMS)
        checksums.keys()
    except (CordaError, AttributeError) as error:
        raise CordaError(f"{folder / CHECKSUMS} is damaged: {remedy}") from error
    for name in checksums.keys() - set(all_but):
        if not (folder / name).is_file():
            raise CordaError(f"{folder / name} is missing: {remedy}")
        if sha256_of(folder / name) != checksums[name]:
            raise CordaError(f"{folder / name} is damaged: {remedy}")


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Inside this context no other process writes `output`. The lock ends when the process dies.

    Raises CordaError if another process holds the lock.
    """
    check_writable(output)
    place = Path(os.path.realpath(output))
    if not place.name:
        raise CordaError(f"the output {output} is the root of the file system")
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    path = _hidden(place, "corda.lock")
    try:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
            except BlockingIOError:
                same = False
            if not same:  # or the other process has just ended, and removed the file
                raise CordaError(f"another run is writing {output} now: wait for its end, or choose another output")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # the first that is not empty ends it
            for folder in made:
                folder.rmdir()


def check_name(output: Path) -> None:
    """Raises CordaError if `output` can be no output's name: it is a symbolic link, `.` or `..`, or too long."""
    if output.name in ("", ".."):
        raise CordaError(f"the output {output} is a folder in use: give the name of a new one")
    _check_length(output)
    if output.is_symlink():
        raise CordaError(f"the output {output} is a symbolic link: remove it, or name the place it points to")


def check_adapter(directory: Path) -> None:
    """Raises CordaError if there is no adapter in the directory. For use before long imports."""
    if not (directory / ADAPTER_CONFIG).is_file():
        raise CordaError(f"{directory} is not an adapter directory: it has no {ADAPTER_CONFIG}")


def check_model(name: str) -> None:
    """Raises CordaError if a model's name can only be that of a place here, and there is no model. For use before long
    imports."""
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise CordaError(f"there is no file {name}")
        if find_spec("gguf") is None:
            raise CordaError(f"to read {name}, the package gguf is needed: pip install gguf")
        return
    local = path.exists() or name.startswith((".", "/")) or name.count("/") > 1 or name.endswith("/")
    if local and not (path / "config.json").is_file():
        is_adapter = (path / ADAPTER_CONFIG).is_file()
        what = "it is an adapter, which goes with its model" if is_adapter else "it has no config.json"
        raise CordaError(f"there is no model in {name}: {what}")


def check_output(directory: Path, record: str = "", recipe: Mapping[str, Any] | None = None) -> None:
    """Raises CordaError if an output directory cannot be written or holds something. For use before long work.

    Args:
        record: the name of the file that holds the recipe of an output (see `is_made`).
        recipe: of the output to make.
    """
    check_name(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        known = recipe is not None and (directory / record).is_file()
        differs = _difference(directory / record, recipe or {}) if known else ""
        made = f", made by another command ({differs})" if differs else ""
        raise CordaError(f"the output {directory} has something in it already{made}: remove it, or choose another")
    check_writable(directory)


def check_result(path: Path) -> None:
    """Raises CordaError if a file of results cannot be written, or if it is there and holds anything but results."""
    check_name(path)
    if not path.absolute().parent.is_dir():
        raise CordaError(f"the output {path} cannot be written: there is no folder {path.parent}")
    check_writable(path)
    if path.exists():
        try:
            earlier = path.is_file() and "results" in dict(read_json(path))
        except (CordaError, TypeError, ValueError):
            earlier = False
        if not earlier:
            raise CordaError(f"the output {path} is there and holds no results of corda eval: choose another name")


def is_made(record: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether an output is whole and was made by this recipe: `record` is its JSON file, which holds the recipe."""
    return record.is_file() and not _difference(record, recipe)


def _difference(record: Path, recipe: Mapping[str, Any]) -> str:
    stored = read_json(record)
    made = {key: stored.get(key) for key in recipe} if isinstance(stored, dict) else {}
    return difference(made, json.loads(json.dumps(recipe)))


def _check_length(path: Path) -> None:
    if any(len(os.fsencode(part + ".work")) > LONGEST_NAME for part in path.parts):
        raise CordaError(f"the output's name is too long: {LONGEST_NAME - len('.work')} bytes at most")
    if "\0" in str(path):
        raise CordaError(f"the output {short(str(path))} has a null character in its name")


def check_writable(path: Path) -> None:
    """Raises CordaError if there can be no output of this name: it is too long, a link that leads nowhere, or not to
    be written to."""
    _check_length(path)
    if path.is_symlink() and not path.exists():
        raise CordaError(
            f"the output {path} is a symbolic link that leads nowhere: remove it, or choose another output"
        )
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise CordaError(f"the output {path} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise CordaError(f"the output {path} cannot be written: no permission in {parent}")


def is_partial(path: Path) -> bool:
    """Whether a path has the name of a partial file of ours."""
    return re.fullmatch(r"\..+\.corda-\d+\.partial", path.name) is not None


def _hidden(path: Path, ending: str) -> Path:
    """The hidden path `.NAME.ENDING` beside a path; of a long name the checksum stands for it."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{ending}")


def _partial_of(path: Path) -> Path:
    """The partial name of a path. Partial files that dead processes left are removed."""
    partial = _hidden(path, f"corda-{os.getpid()}.partial")
    pattern = re.escape(_hidden(path, "corda-").name) + r"(\d+)\.partial"
    for left in path.absolute().parent.glob(".*.partial"):
        match = re.fullmatch(pattern, left.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return partial


def _share(path: Path, folder: Path) -> None:
    """Let those read and write a file who may do so in its new folder, as umask says: safetensors writes for the owner
    alone."""
    with suppress(PermissionError):  # not every file system has such rights
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o7777 | folder.stat().st_mode & 0o666)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into one sentence."""
    try:
        yield
    except Exception as error:  # safetensors has an error type of its own
        for sign, reason in NO_ROOM.items():
            if sign in str(error):
                raise CordaError(f"{reason}: {path} could not be written, and nothing is left of it") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
