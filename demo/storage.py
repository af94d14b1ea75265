"""The folder of uploads and results, the only files that visitors can reach.

Files are opened by walking down from the folder without following links, and checked after they are open, so
that nothing can change between the check and the reading. Anything but a regular file below the folder gets
the same answer as a missing file. Files are deleted when they are old and when the server stops; no more are
accepted than `MOST_BYTES`, or than leave `LEAST_FREE` on the disk.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from coma.errors import BadImage

GONE = "This file no longer exists; please upload it again."
"""The answer for every file that cannot be opened, whatever the reason."""
FULL = "The server's storage is full; please try again in some minutes."
"""The answer while files are refused for want of space."""
MOST_BYTES, LEAST_FREE = 4 * 2**30, 2**29
"""Most bytes of all uploads and results together, and the bytes that stay free on their disk."""
PREFIX = "coma-demo-"
EXAMPLES = "examples"
"""Subfolder of the example pictures, which are never deleted while the server runs."""
_LOCK = "lock"
_DAY = 24 * 3600


class Storage:
    """Files below one folder.

    Args:
        folder: Folder; it is created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._found, self._accepted = 0, 0  # bytes: found by the last sweep, and accepted since it began
        self._lock = threading.Lock()

    def accept(self, size: int = 0) -> None:
        """Counts bytes that are about to be written, and refuses them when there is no space.

        Raises:
            BadImage: `FULL`.
        """
        disk = os.statvfs(self.folder)
        with self._lock:
            held = self._found + self._accepted + size
            if held > MOST_BYTES or disk.f_bavail * disk.f_frsize - size < LEAST_FREE:
                raise BadImage(FULL)
            self._accepted += size

    def contains(self, path: str) -> bool:
        """Returns whether a path lies below the folder, by its text only."""
        parts = Path(path).parts
        below = parts[: len(self.folder.parts)] == self.folder.parts and len(parts) > len(self.folder.parts)
        return below and ".." not in parts

    def open(self, path: str) -> BinaryIO:
        """Opens a regular file below the folder.

        Raises:
            BadImage: `GONE` for links, pipes, directories, files outside and missing files.
        """
        with suppress(OSError, ValueError):  # ValueError: a NUL, or characters that file names cannot hold
            if self.contains(path):
                *folders, name = Path(path).parts[len(self.folder.parts) :]
                here = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    for each in folders:
                        above = here
                        here = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
                        os.close(above)
                    number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
                finally:
                    os.close(here)
                status = os.fstat(number)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # 2: a hard link
                    return os.fdopen(number, "rb")
                os.close(number)
        raise BadImage(GONE)

    def delete_older(self, seconds: float) -> None:
        """Deletes files that were written longer ago, except the examples, and measures the others."""
        limit, before, found = time.time() - seconds, self._accepted, 0
        for place, _, names in os.walk(self.folder, topdown=False):
            folder = Path(place)
            if self.folder / EXAMPLES in (folder, *folder.parents):
                continue
            for name in names:
                with suppress(OSError):
                    about = (folder / name).lstat()
                    found += about.st_size
                    if about.st_mtime < limit:
                        (folder / name).unlink()
                        found -= about.st_size
            with suppress(OSError):  # it is not empty
                if folder != self.folder and folder.lstat().st_mtime < limit:
                    folder.rmdir()
        with self._lock:
            self._found, self._accepted = found, self._accepted - before


@contextmanager
def temporary_storage() -> Iterator[Storage]:
    """Creates a folder that is deleted at the end; a lock tells other servers that this one is running."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with (folder / f"{_LOCK}.new").open("x") as lock:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)  # it appears only once it is locked
            yield Storage(folder / "files")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # files that a last thread may write


def delete_leftovers() -> int:
    """Deletes the folders of servers that were killed; returns their number."""
    count = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # BlockingIOError: its server is running
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:  # it is being created
                if status.st_mtime > time.time() - _DAY:
                    continue
                lock = None
            try:
                if lock is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                count += 1
            finally:
                if lock is not None:
                    os.close(lock)
    return count
