"""The folder of uploads and results, the only files that visitors can reach.

Files are opened by walking down from the folder without following links, and checked after they are open, so
that nothing can change between the check and the reading. Anything but a regular file below the folder gets
the same answer as a missing file. Files are deleted when they are old and when the server stops.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from coma.errors import BadImage

GONE = "This file no longer exists; please upload it again."
"""The answer for every file that cannot be opened, whatever the reason."""
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
        """Deletes files that were written longer ago, except the examples."""
        limit = time.time() - seconds
        for place, _, names in os.walk(self.folder, topdown=False):
            folder = Path(place)
            if self.folder / EXAMPLES in (folder, *folder.parents):
                continue
            for name in names:
                with suppress(OSError):
                    if (folder / name).lstat().st_mtime < limit:
                        (folder / name).unlink()
            with suppress(OSError):  # it is not empty
                if folder != self.folder and folder.lstat().st_mtime < limit:
                    folder.rmdir()


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
