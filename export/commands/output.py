"""Where results go: the folder is locked, a stop leaves nothing unfinished, disk errors take one line."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coma.errors import BadInput, ComaError

log = logging.getLogger(__name__)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder for this process; the lock ends with the process, also after kill -9.

    Raises:
        BadInput: another process holds it.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"--out {folder}: another coma export writes there; wait until it has ended, or give another "
                "folder with --out"
            ) from None
        except OSError as error:
            log.warning("%s: cannot be locked (%s); run no second export there", folder, error.strerror)
        yield
    finally:
        os.close(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Answers SIGTERM as Ctrl-C: what is unfinished is removed, and the exit code is 130."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough, the rest is clearing up
        raise KeyboardInterrupt("stopped by SIGTERM; unfinished files were removed")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def disk_errors(place: Path, flag: str = "--out") -> Iterator[None]:
    """Raises errors of disks as one line that names the file and the way out."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room there" if full else "see that it can be used"
        raise ComaError(
            f"{error.filename or place}: {error.strerror or error}; {way_out}, or give another {flag}. "
            "What was finished before is still valid"
        ) from error
