"""Every file is written whole or not at all, also where the power fails; no file of the user's is overwritten.

What is being written has a name of its own beside its place, `.NAME.corda-PID.partial`, and takes its place when it is
complete and on the disk. A process that was killed leaves such a partial file behind; the next one to write there
removes it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .config import CordaError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a partial file to write; it replaces `path` when the block ends without an error.

    Raises CordaError if the disk is full: then `path` is as it was.
    """
    partial = _partial_of(path)
    try:
        with _full_disk(path):
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


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
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
            _sync_folder(directory.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def check_output(directory: Path) -> None:
    """Raises CordaError if something is in the way of an output directory. To be called before long work starts."""
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise CordaError(f"the output {directory} has something in it already: remove it, or choose another")
    parent = next(p for p in directory.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise CordaError(f"the output {directory} cannot be written: no permission in {parent}")


def _partial_of(path: Path) -> Path:
    """The partial name of a path; what dead processes left of theirs is removed."""
    for left in path.absolute().parent.glob(".*.partial"):
        found = re.fullmatch(re.escape(f".{path.name}.corda-") + r"(\d+)\.partial", left.name)
        if found and (int(found[1]) == os.getpid() or not psutil.pid_exists(int(found[1]))):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.corda-{os.getpid()}.partial")


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Make one sentence of the error that a full disk gives."""
    try:
        yield
    except Exception as error:  # safetensors has an error type of its own
        if "No space left" in str(error):
            raise CordaError(f"the disk is full: {path} could not be written, and nothing is left of it") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
