"""SHA-256 of files, and files that carry their own.

A sealed file ends with a line that holds the SHA-256 of everything before it. Readers of archives find the
end of theirs before that line, so a sealed state is still what `torch.load` takes.
"""

from __future__ import annotations

import hashlib
from io import RawIOBase
from pathlib import Path
from typing import Any

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
