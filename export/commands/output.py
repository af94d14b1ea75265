"""Where results go: made, and found to be writable, before any work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import BadInput


def make_folder(folder: Path, flag: str = "--out") -> None:
    """Make a folder that files can be written into.

    Raises:
        BadInput: a file of that name, or a place that cannot be written to.
    """
    with _refusing(flag, folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def make_room(file: Path, flag: str = "--out") -> None:
    """Make the folder of a file that is to be written.

    Raises:
        BadInput: the file is a directory, or its folder cannot be written to.
    """
    with _refusing(flag, file):
        if file.is_dir():
            raise BadInput(f"{flag} {file}: is a directory; give a file name")
        make_folder(file.parent, flag)


@contextmanager
def _refusing(flag: str, place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{flag} {place}: cannot be written to ({error.strerror or error})") from None
