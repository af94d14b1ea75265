"""Atomic file writes: after kill -9 or on a full disk, the last good file stays whole.

A file is written under a temporary name in its own folder, forced to the disk, renamed, and the folder's
entry forced too. Whatever goes wrong on the way, the temporary file is removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any

Write = Callable[["Descriptor"], object]


class Descriptor(RawIOBase):
    """A file to write to that keeps the first error in mind instead of raising it.

    torch.save writes from C++, where an error of the disk would come out as another one ("unexpected pos"),
    without its cause. `check()` raises it as it was.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._error: OSError | None = None

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override]
        """Write all of `data`, or note why not."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._error is None:
                rest = rest[os.write(self._number, rest) :]
        except OSError as error:
            self._error = error
        return size

    def check(self) -> None:
        """Raise the first error, if there was one.

        Raises:
            OSError: what `write` met.
        """
        if self._error is not None:
            raise self._error


def write_whole(path: Path, write: Write) -> None:
    """Writes a file atomically: afterwards `path` holds all that `write(file)` wrote, or what it held before.

    Raises:
        OSError: the disk is full, or not to be written, or `path` is a device or folder; nothing has changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # /dev/null would become a file, for every program
        raise OSError(errno.EPERM, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.part")
    try:
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            file = Descriptor(number)
            write(file)
            file.check()
            os.fsync(number)
        finally:
            os.close(number)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8; names that are not UTF-8 become escapes; see `write_whole`."""
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, plain: Any, indent: int | None = 2) -> None:
    """Writes plain data as JSON, atomically; see `write_whole`."""
    write_text(path, json.dumps(plain, indent=indent) + "\n")


def lies_among(out: Path, images: object, flag: str = "--out") -> str | None:
    """Returns a warning if results are written among the images, which may be remote, else None."""
    if not isinstance(images, Path) or images.resolve() not in out.resolve().parents:
        return None
    return (
        f"{flag} {out} lies among the images of {images}: what is written there never becomes one of them; "
        f"to keep them apart, choose another {flag}"
    )


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class LineFile:
    """A text file that only grows by whole lines; lines that the disk refuses wait for the next chance.

    Args:
        path: The file; created if absent, continued if there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting = b""

    def add(self, data: bytes) -> None:
        """Append `data` and all that waits.

        Raises:
            OSError: the disk is full; the file ends with a whole line, and `data` waits.
        """
        self._waiting += data
        good = os.fstat(self._number).st_size
        file = Descriptor(self._number)
        file.write(self._waiting)
        try:
            file.check()
        except OSError as error:
            os.ftruncate(self._number, good)
            error.filename = str(self._path)
            raise
        self._waiting = b""

    def sync(self) -> None:
        """Write what waits and force everything to the disk.

        Raises:
            OSError: the disk is full.
        """
        self.add(b"")
        os.fsync(self._number)

    def close(self) -> None:
        """Close the file; what still waits is lost."""
        os.close(self._number)


_SEAL = b"\nsha256 %64b\n"


_LENGTH = len(_SEAL % b"")


def sha256_of(path: Path, size: int | None = None) -> str:
    """Returns the SHA-256 of a file's content, or of its first `size` bytes, in hexadecimal."""
    with path.open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size and (piece := file.read(min(size, 1 << 20))):
            digest.update(piece)
            size -= len(piece)
        return digest.hexdigest()


class Sealed(RawIOBase):
    """Passes on to `file` what is written; `seal` appends the last line."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def writable(self) -> bool:
        """Returns that it can be written to."""
        return True

    def write(self, data: Any, /) -> int:
        """Writes all of `data`."""
        self._digest.update(data)
        return self._file.write(data)

    def seal(self) -> None:
        """Writes the last line."""
        self._file.write(_SEAL % self._digest.hexdigest().encode())


def seal(path: Path) -> None:
    """Seals a file that is written already."""
    digest = sha256_of(path)
    with path.open("ab") as file:
        file.write(_SEAL % digest.encode())


def seal_holds(path: Path) -> bool | None:
    """Returns whether a file is what it was when it was sealed; None: it was never sealed."""
    with path.open("rb") as file:
        size = max(file.seek(0, 2) - _LENGTH, 0)
        file.seek(size)
        last = file.read()
    digest = last[len(b"\nsha256 ") : -1]
    if last != _SEAL % digest:
        return None
    return digest == sha256_of(path, size).encode()
