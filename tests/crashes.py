"""What a killed command leaves on disk: a copy of its folder at every place where it writes.

A process that is killed leaves the files as the kernel has them. So a run that is copied at each of its writes stands
for a kill there, in one process: what Python had not flushed is not in the copy, and a lock ends with its process.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
READS = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NONBLOCK | os.O_NOFOLLOW
watched: list["Crashes"] = []


class Crashes:
    """Copies of a folder, one for each state in which a kill can leave it.

    A state is new when the names, sizes or times of the files have changed. Of a file that was written since the last
    state there is also a copy that has its first half only: a kill while it is written, or before it is on the disk.
    """

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies, self.count, self.before = folder, copies, 0, files_in(folder)

    def look(self) -> None:
        now = files_in(self.folder)
        if now == self.before:
            return
        known = set(self.before.values())
        written = [name for name, state in now.items() if state[2] > 1 and state not in known]
        self.before = now
        self.copy()
        for name in written:
            os.truncate(self.copy() / name, now[name][2] // 2)

    def copy(self) -> Path:
        self.count += 1
        place = self.copies / f"{self.count:03}"
        shutil.copytree(self.folder, place, symlinks=True)
        return place


def files_in(folder: Path) -> dict[str, tuple[int, int, int]]:
    """(inode, time of the last change, size) by name; of a folder its inode alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        state = (stat.st_ino, 0, 0) if path.is_dir() else (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        found[str(path.relative_to(folder))] = state
    return found


@contextmanager
def crashes(folder: Path, copies: Path) -> Iterator[Crashes]:
    """Inside this context every write in `folder` puts copies of it into `copies`."""
    if not hasattr(sys, "_crashes"):  # a hook stays as long as the process
        sys._crashes = watched
        sys.addaudithook(_hook)
    watched.append(Crashes(folder, copies))
    try:
        yield watched[-1]
        watched[-1].look()
    finally:
        watched.pop()


def _hook(event: str, arguments: tuple) -> None:
    if event in WRITES and watched and not (event == "open" and not (arguments[2] or 0) & ~READS):
        crashes = watched.pop()  # its own writes are none of the command's
        try:
            crashes.look()
        finally:
            watched.append(crashes)
