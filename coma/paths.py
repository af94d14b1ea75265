"""Local paths as users write them, with clear errors for remote ones."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from coma.errors import BadInput

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://?")


def local_path(text: str) -> Path:
    """Returns a path as a user wrote it.

    Raises:
        BadInput: it is empty, no file system can have it, its links lead in a circle, or it is the address of
            something remote.
    """
    if not text.strip():
        raise BadInput(f"{text!r} names no file or folder")
    if "\0" in text:
        raise BadInput(f"{text!r}: a path cannot contain a NUL byte")
    try:
        os.stat(text)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadInput(f"{text}: its symbolic links lead in a circle") from None
    if _REMOTE.match(text) and not Path(text).exists():
        way = "hf download" if text.startswith("hf:") else "rclone copy, or the tool of that storage"
        raise BadInput(f"{text}: remote storage is not read; copy it to a local disk first ({way})")
    return Path(text)


def exports_beside(artifact: Path) -> Path:
    """Returns the folder that `coma export` writes the files of an artifact into by default."""
    return artifact.resolve().parent / "export"
