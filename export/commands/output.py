"""Where results go: made, found to be writable and locked before any work; disk errors in one line."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import BadInput, ComaError

log = logging.getLogger(__name__)


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
        if file.exists() and not file.is_file():
            raise BadInput(f"{flag} {file}: is not a regular file; give another name")
        make_folder(file.parent, flag)


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


@contextmanager
def _refusing(flag: str, place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{flag} {place}: cannot be written to ({error.strerror or error})") from None
