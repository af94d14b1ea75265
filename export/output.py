"""The output folder of an export: one process at a time, and disk errors as one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coma.errors import BadInput, ComaError
from coma.locks import lock


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder for this process; the lock ends with the process, even after kill -9.

    Raises:
        BadInput: another process holds the lock.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        if not lock(number, folder, "export"):
            raise BadInput(
                f"--out {folder}: another coma export writes to this folder; wait until it has ended, or "
                "give another folder with --out"
            )
        yield
    finally:
        os.close(number)


@contextmanager
def disk_errors(place: Path, flag: str = "--out") -> Iterator[None]:
    """Raises disk errors as one line that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space there" if full else "check that it is writable"
        raise ComaError(
            f"{error.filename or place}: {error.strerror or error}; {remedy}, or give another {flag}. "
            "Files that were already finished are still valid"
        ) from error
