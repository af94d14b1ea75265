"""Locks that end with their process, even after kill -9: a command works alone in its folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coma.errors import BadInput

log = logging.getLogger(__name__)

RUN_LOCK = ".lock"
"""File that the process which trains in a run directory keeps locked, and removes at the end."""


def lock(number: int, folder: Path, command: str) -> bool:
    """Locks an open file until it is closed, without waiting; warns where the file system has no locks.

    Args:
        number: Descriptor of the file.
        folder: What the lock protects, for the warning.
        command: What must run there only once at a time, for the warning.

    Returns:
        False where another process holds the lock.
    """
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(
            "%s: cannot be locked (%s); run only one %s there at a time",
            folder,
            error.strerror,
            command,
            extra={"once": True},
        )
    return True


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Lets no other process train in a run directory; the lock ends with this one, even after kill -9.

    Raises:
        BadInput: another process is training there.
        OSError: the directory cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    number = os.open(out / RUN_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock(number, out, "training") or not os.fstat(number).st_nlink:  # it was just removed
            raise BadInput(f"another process is training in {out}; end it or choose another --out")
        try:
            yield
        finally:
            with suppress(OSError):
                (out / RUN_LOCK).unlink()
    finally:
        os.close(number)
