"""Locks that end with their process, even after kill -9: a command works alone in its folder."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path

log = logging.getLogger(__name__)


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
