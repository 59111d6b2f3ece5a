"""Unfinished work on disk, from which a run that was killed goes on."""

import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..algebra.second_order import Low
from ..config import CordaError
from ..config.recorded import difference
from ..files import is_partial, remove_folder, sha256_of, whole_file, work_folder, write_text
from ..models.weights import Quantized
from ..processes import Processes
from .layer import Decomposed, LayerRecord
from .statistics import Sides

MANIFEST = "finished.json"
# What runs leave in a folder of work: settings, finished blocks, a quantized base, parked hidden states, checkpoints,
# the trainer's page, a tracker's logs.
OURS = re.compile(rf"run\.json|{re.escape(MANIFEST)}|\d{{4,}}\.safetensors|base|checkpoint-\d+|README\.md|tmp\w+|runs")
STORED = "stored."
KEYS = ("sigma", "A", "B", "rows", "U", "energy")
SIDES = ("C.factor", "C.diagonal", "D.factor", "D.diagonal")


def open_work(
    output: Path, run: Mapping[str, Any], begun: Callable[[Path], bool], processes: Processes | None = None
) -> Path:
    """The folder beside `output` for the unfinished work of a run. It is new, or was left by the same run broken off.

    Args:
        run: identifies the run: model, configuration, data, versions.
        begun: tells whether a folder holds anything worth keeping.
        processes: of which the first one opens the folder.

    Raises CordaError if the folder holds work of another run, or files that are none of ours, or if another process
    does not see it.
    """
    folder = work_folder(output)
    if processes is None or processes.first:
        _open(folder, run, begun)
    if processes is None:
        return folder
    processes.gather(None)
    path = folder / "run.json"
    seen = processes.gather((socket.gethostname(), path.read_text() if path.is_file() else None))
    for number, (host, text) in enumerate(seen):
        if text != seen[0][1]:
            if processes.first and not begun(folder):
                remove_folder(folder)
            raise CordaError(
                f"process {number} on {host} does not see {folder}: the output must be in a folder that all hosts share"
            )
    return folder


def _open(folder: Path, run: Mapping[str, Any], begun: Callable[[Path], bool]) -> None:
    path = folder / "run.json"
    files = [file for file in folder.iterdir() if not is_partial(file)] if folder.is_dir() else []
    foreign = [file for file in files if not OURS.fullmatch(file.name)]
    if folder.is_symlink() or folder.is_file() or foreign or (files and not path.is_file()):
        why = f"holds {foreign[0].name}, which is not" if foreign else "has no run.json"
        raise CordaError(
            f"{folder} is needed for unfinished work, but is there and {why} of this program: move it away, or choose "
            "another output"
        )
    text = json.dumps(run, indent=1, default=str)
    if path.is_file() and begun(folder):
        try:
            differs = difference(json.loads(path.read_text()), json.loads(text))
        except ValueError:
            differs = "its run.json is damaged"
        if differs:
            raise CordaError(
                f"{folder} holds unfinished work of another run ({differs}): remove it, or finish that run"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


class LayerStore:
    """Decomposed layers on disk: a safetensors file for each block of the model, and a manifest with their checksums.
    A block that was begun but not finished leaves no trace.

    Attributes:
        blocks: names of the layers of each finished block, in order.

    Raises CordaError, when it is opened, if a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = folder / MANIFEST
        self.files: dict[str, str] = {}  # name -> sha256
        self.blocks: list[list[str]] = []
        if not self.manifest.is_file():
            return
        try:
            manifest = json.loads(self.manifest.read_text())
            self.files, self.blocks = manifest["files"], manifest["blocks"]
        except (ValueError, KeyError, TypeError) as error:
            raise CordaError(f"{self.manifest} is damaged: remove {folder} and start again") from error
        for name, checksum in self.files.items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != checksum:
                state = "damaged" if path.is_file() else "missing"
                raise CordaError(f"{path} is {state}: remove {folder} and start again")

    def save(self, layers: Mapping[str, Decomposed]) -> None:
        """Add a block. It is on the disk when this returns."""
        self.add([self.write(layers)])

    def write(self, layers: Mapping[str, Decomposed], number: int = 0) -> tuple[str, str, list[str]]:
        """Write the file of a block, the `number`-th to come. Returns its name and checksum and the layers in it, to
        `add`."""
        name = f"{len(self.files) + number:04}.safetensors"
        tensors = {f"{name}|{key}": x for name, layer in layers.items() for key, x in _parts(name, layer).items()}
        records = json.dumps({layer: asdict(decomposed.record) for layer, decomposed in layers.items()})
        with whole_file(self.folder / name) as path:
            save_file(tensors, path, metadata={"records": records})
            checksum = sha256_of(path)
        return name, checksum, list(layers)

    def add(self, written: Iterable[tuple[str, str, list[str]]], note: bool = True) -> None:
        """Blocks whose files have been written are finished: `note` it in the manifest."""
        for name, checksum, layers in written:
            self.files[name] = checksum
            self.blocks.append(layers)
        if note:
            write_text(self.manifest, json.dumps({"files": self.files, "blocks": self.blocks}))

    def load(self, spectra_only: bool = False) -> Iterator[tuple[str, Decomposed]]:
        """The layers, in the order they were saved, read one at a time. `spectra_only` leaves out the large tensors."""
        for file in self.files:
            yield from self.load_block(file, spectra_only)

    def load_block(self, file: str, spectra_only: bool = False) -> Iterator[tuple[str, Decomposed]]:
        """`load` of the layers in one of the `files`."""
        with safe_open(self.folder / file, framework="pt") as tensors:
            names, inputs = set(tensors.keys()), dict[str, Low]()
            for layer, fields in json.loads(tensors.metadata()["records"]).items():
                wanted = KEYS[:1] if spectra_only else (*KEYS, *SIDES)
                keys = [k for k in wanted if f"{layer}|{k}" in names]
                parts = {key: tensors.get_tensor(f"{layer}|{key}") for key in keys}
                record, sides = LayerRecord(**fields), None
                if "C.factor" in parts:
                    inputs[layer] = Low(parts["C.factor"], parts["C.diagonal"])
                if "D.factor" in parts:
                    assert record.input is not None
                    sides = Sides(inputs[record.input], Low(parts["D.factor"], parts["D.diagonal"]))
                of_layer = {key: x for key, x in parts.items() if key in KEYS}
                yield layer, Decomposed(record=record, sides=sides, **of_layer)

    def quantized(self, layer: str) -> Quantized | None:
        """The quantized weight of a layer; None if it was not quantized with the decomposition."""
        file = next(file for file, layers in zip(self.files, self.blocks) if layer in layers)
        prefix = f"{layer}|{STORED}"
        with safe_open(self.folder / file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): tensors.get_tensor(name) for name in names} or None


def _parts(name: str, layer: Decomposed) -> dict[str, Tensor]:
    """The tensors of a layer by their `KEYS`. C is only among those of the first layer that was given the input."""
    parts = {key: getattr(layer, key) for key in KEYS}
    for side, low in layer.sides._asdict().items() if layer.sides else ():
        if side == "D" or layer.record.input == name:
            parts |= {f"{side}.{key}": x for key, x in low._asdict().items()}
    parts |= {f"{STORED}{key}": x for key, x in (layer.stored or {}).items()}
    return {key: x.contiguous() for key, x in parts.items() if x is not None}


@contextmanager
def saving(
    store: LayerStore, device: torch.device, processes: Processes | None = None
) -> Iterator[Callable[[Mapping[str, Decomposed]], None]]:
    """Yield `store.save`. Where a device other than the CPU computes, yield a function that writes a block while the
    next is computed: at most one block waits, and an error is raised at the next block, or at the end.

    Several processes, which must save equally often, write a file each. The first process notes them all together.
    """
    write: Callable[[Mapping[str, Decomposed]], Any] = store.save
    if processes is not None:
        write = partial(store.write, number=processes.rank)

    def finish(written: Any) -> None:
        if processes is not None:
            store.add(processes.gather(written), note=processes.first)

    if device.type == "cpu":
        yield lambda layers: finish(write(layers))
        return
    with ThreadPoolExecutor(1) as writer:
        last: list[Future[Any]] = []

        def save(layers: Mapping[str, Decomposed]) -> None:
            if last:
                finish(last.pop().result())
            last.append(writer.submit(write, layers))

        yield save
        if last:
            finish(last.pop().result())
