"""The folder of uploads and results: the only files that a visitor can reach, and none of them for long.

Every file of a request is opened here, by walking down from the folder without following a link, and what
was opened is looked at afterwards: nothing can change between the check and the reading. Whatever is not a
regular file below the folder gets the same answer as a file that does not exist.
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

GONE = "This picture is not there any more; please send it again."
"""The one answer for everything that cannot be had, whatever the reason."""
PREFIX = "coma-demo-"
EXAMPLES = "examples"
"""Subfolder of pictures that stay as long as the server does."""
_LOCK = "lock"
_DAY = 24 * 3600


class Storage:
    """Files below one folder.

    Args:
        folder: It is made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()

    def contains(self, path: str) -> bool:
        """Whether a path names a place below the folder; nothing is asked of the disk."""
        parts = Path(path).parts
        below = parts[: len(self.folder.parts)] == self.folder.parts and len(parts) > len(self.folder.parts)
        return below and ".." not in parts

    def open(self, path: str) -> BinaryIO:
        """Open a regular file below the folder.

        Raises:
            BadImage: `GONE`, for everything else: links, pipes, directories, files elsewhere or nowhere.
        """
        with suppress(OSError, ValueError):  # ValueError: a path with a NUL, or that no file name encodes
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
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # 2: a link from elsewhere
                    return os.fdopen(number, "rb")
                os.close(number)
        raise BadImage(GONE)

    def delete_older(self, seconds: float) -> None:
        """Delete what was written longer ago; the examples stay."""
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
    """A new folder that is deleted at the end; a lock says to other servers that this one lives."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with (folder / f"{_LOCK}.new").open("x") as lock:
            with suppress(OSError):  # a file system without locks: nobody else will get this one either
                fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)  # nobody sees it before it is locked
            yield Storage(folder / "files")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)  # what a last thread may have written


def delete_leftovers() -> int:
    """Delete the folders of servers that were killed, and return how many there were."""
    count = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # BlockingIOError: its server lives
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            try:
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:  # it is being made at this moment, or an older version made it
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
