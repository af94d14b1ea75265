"""Work on many images in parts, of which each is written whole, or not at all.

    FOLDER/request.json      what is computed, of which images; another request is refused
    FOLDER/part-000000.*     the results of the first images, and so on

The images are divided into parts of a fixed number, so a part is the same whoever computes it: one process,
one of torchrun's, or a task of a Ray cluster. A part that has its name is complete and on the disk. The same
command computes those that are missing, however it ended before.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from coma.atomic_io import write_json, write_whole
from coma.config.serialization import flat
from coma.config.settings_file import read_json
from coma.data.sources.base import Source
from coma.errors import BadInput, ComaError
from coma.messages import counted

_REQUEST = "request.json"


def listing_hash(source: Source) -> tuple[list[str], str]:
    """Returns the names of all images, and the SHA-256 of their names and sizes."""
    names, sizes = source.listing()
    return names, hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()


class Parts(ABC):
    """The parts of one result."""

    suffix: ClassVar[str]
    """Suffix of the files of parts."""
    command: ClassVar[str]
    """Command that writes them, for messages."""
    size: int
    """Number of images in a part."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Folder of the parts."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of all images."""

    @abstractmethod
    def request(self) -> dict[str, Any]:
        """Returns what has to be the same when the work is continued, as JSON holds it."""

    def __len__(self) -> int:
        """Returns the number of parts."""
        return -(-self.count // self.size)

    def images(self, number: int) -> range:
        """Returns the images of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def begun(self) -> bool:
        """Returns whether the folder has parts, or is ready for them."""
        return (self.folder / _REQUEST).exists()

    def make_folder(self) -> None:
        """Makes the folder, or finds the one of the same request.

        Raises:
            BadInput: the folder is of another request, or is something else.
        """
        if self.begun():
            saved = read_json(self.folder / _REQUEST, f"the folder of {self.command}")
            self.compare(self.folder, saved, "remove this folder")
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise BadInput(f"{self.folder}: has other files; remove them, or choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _REQUEST, self.request())

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are to be computed."""
        return [number for number in range(len(self)) if not self.path(number).is_file()]

    def done(self) -> int:
        """Returns the number of images whose part is there."""
        todo = sum(len(self.images(number)) for number in self.missing())
        return self.count - todo

    def path(self, number: int) -> Path:
        """Returns the file of a part."""
        return self.folder / f"part-{number:06d}{self.suffix}"

    def write(self, number: int, content: bytes) -> None:
        """Writes a part.

        Raises:
            ComaError: the disk is full or not writable; finished parts are kept.
        """
        with self.disk_errors():
            write_whole(self.path(number), lambda file: file.write(content))

    def disk_errors(self) -> Any:
        """Returns a context in which a full disk is an error that says how to go on."""
        return _DiskErrors(self)

    def compare(self, place: Path, there: Any, remedy: str) -> None:
        """Compares a request that was saved with this one.

        Raises:
            BadInput: they differ; the message names what, and ends with the remedy.
        """
        there, wanted = flat(there if isinstance(there, dict) else {}), flat(self.request())
        if there.get("precision") is None:  # written before it was part of the request
            wanted.pop("precision", None)
        names = [name for name in wanted if there.get(name) != wanted[name]]
        if not names:
            return
        if names == ["listing"]:
            reason = "names or sizes of the images have changed since"
        else:
            shown = (
                f"{name} {there.get(name)} there, {wanted[name]} now" for name in names if name != "listing"
            )
            reason = f"is of another request ({'; '.join(shown)})"
        raise BadInput(f"{place}: {reason}; {remedy}, or choose another --out")


class _DiskErrors:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            folder = self._parts.folder
            done = counted(sum(1 for _ in folder.glob(f"part-*{self._parts.suffix}")), "finished part")
            raise ComaError(
                f"{error.filename or folder}: {error.strerror}; {done} in {folder} stay; when this is "
                "solved, run the same command again"
            ) from None
