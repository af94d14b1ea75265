"""Checks before the first long step of a command: packages, places to write to, free space."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coma.errors import BadInput


def require_packages(*names: str) -> None:
    """Checks that packages are installed, without importing them.

    Raises:
        ModuleNotFoundError: naming the first one; `coma.cli` says what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def require_folder(folder: Path, flag: str = "--out") -> None:
    """Refuses a folder that cannot be made or written into; nothing is left behind.

    Raises:
        BadInput: naming the flag, the folder and the reason.
    """
    with _refusing(flag, folder):
        there = folder
        while not there.exists():
            if there.is_symlink():
                raise BadInput(f"{flag} {folder}: {there} is a link that leads nowhere; choose another place")
            there = there.parent
        if not there.is_dir():
            where = "" if there == folder else f"{there} "
            raise BadInput(f"{flag} {folder}: {where}is a file; give a folder")
        tempfile.TemporaryFile(dir=there).close()


def require_file(file: Path, flag: str = "--out") -> None:
    """Refuses a file that cannot be written; its folder is made, for writers that expect it.

    Raises:
        BadInput: naming the flag, the file and the reason.
    """
    require_folder(file.parent, flag)
    with _refusing(flag, file):
        if file.is_dir():
            raise BadInput(f"{flag} {file}: is a directory; give a file name")
        if file.exists() and not file.is_file():
            raise BadInput(f"{flag} {file}: is not a regular file; give another name")
        if file.exists() and not os.access(file, os.W_OK):
            raise BadInput(f"{flag} {file}: cannot be written to; choose another name")
        file.parent.mkdir(parents=True, exist_ok=True)


def check_regular_file(path: Path, advice: str = "", *, must_exist: bool = True) -> None:
    """Refuses what is not a regular file: reading a pipe would wait for ever.

    Args:
        path: File to be read.
        advice: What to do, for the message.
        must_exist: Whether a missing file is refused too.

    Raises:
        BadInput: The path is a folder, pipe or device, or does not exist.
    """
    if not path.is_file() and (must_exist or path.exists()):
        what = "is not a regular file" if path.exists() else "no such file"
        raise BadInput(f"{path}: {what}" + (f"; {advice}" if advice else ""))


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuses a disk that has too little room.

    Args:
        folder: Where files will be written; it need not exist yet.
        needed: Number of bytes.
        what: What takes them, for the message.

    Raises:
        BadInput: naming what is needed and what is free.
    """
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise BadInput(
            f"{folder}: {what} needs {needed / 1e6:,.1f} MB of disk, and {free / 1e6:,.1f} MB are free; make "
            "room, or choose another place"
        )


@contextmanager
def _refusing(flag: str, place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{flag} {place}: cannot be written to ({error.strerror or error})") from None
