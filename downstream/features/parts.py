"""The parts of a file of features while it is computed: each is written whole, or not at all.

    features.parquet.parts/request.json         what is computed, of which images; another request is refused
    features.parquet.parts/part-000000.parquet  features of the first images, and so on
    features.parquet                            all of them in order; the folder is removed then

The images are divided into parts of a fixed number, so a part is the same whoever computes it: one process,
one of torchrun's, or a task of a Ray cluster. A part that has its name is complete and on the disk. The same
command computes those that are missing, however it ended before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coma.atomic_io import write_json, write_whole
from coma.config.serialization import flat
from coma.config.settings_file import read_json
from coma.data.sources.base import Source
from coma.errors import BadInput, ComaError
from coma.messages import counted
from downstream.features.files import FeaturesFile, FeaturesInfo, Rows, to_bytes, write_features

_REQUEST = "request.json"


def listing_hash(source: Source) -> tuple[list[str], str]:
    """Returns the names of all images, and the SHA-256 of their names and sizes."""
    names, sizes = source.listing()
    return names, hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()


@dataclass(frozen=True)
class Parts:
    """The parts of one file of features.

    Attributes:
        out: The file.
        info: Its description, without the images that could not be read.
        size: Number of images in a part.
    """

    out: Path
    info: FeaturesInfo
    size: int

    @property
    def folder(self) -> Path:
        """Returns the folder of the parts."""
        return self.out.with_name(f"{self.out.name}.parts")

    def __len__(self) -> int:
        """Returns the number of parts."""
        return -(-self.info.count // self.size)

    def images(self, number: int) -> range:
        """Returns the images of a part."""
        return range(number * self.size, min((number + 1) * self.size, self.info.count))

    def prepare(self) -> bool:
        """Makes the folder, or finds the one of the same request; returns whether the file is there already.

        Raises:
            BadInput: the file or the folder is of another request, or is something else.
        """
        wanted = self._request()
        if self.out.exists():
            there = FeaturesFile(self.out).info
            self._compare(self.out, _request(there, self.size), wanted)
            shutil.rmtree(self.folder, ignore_errors=True)  # killed after the last rename
            return True
        if (self.folder / _REQUEST).exists():
            self._compare(self.folder, read_json(self.folder / _REQUEST, "the folder of coma embed"), wanted)
            return False
        if self.folder.exists() and any(self.folder.iterdir()):
            raise BadInput(f"{self.folder}: has other files; remove them, or choose another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _REQUEST, wanted)
        return False

    def missing(self) -> list[int]:
        """Returns the numbers of the parts that are to be computed."""
        return [number for number in range(len(self)) if not self._path(number).is_file()]

    def done(self) -> int:
        """Returns the number of images whose part is there."""
        todo = sum(len(self.images(number)) for number in self.missing())
        return self.info.count - todo

    def write(self, number: int, content: bytes) -> None:
        """Writes a part as `encode` returned it.

        Raises:
            ComaError: the disk is full or not writable; finished parts are kept.
        """
        with self.disk_errors():
            write_whole(self._path(number), lambda file: file.write(content))

    def encode(self, rows: Rows, failures: Sequence[str]) -> bytes:
        """Returns the content of a part."""
        return to_bytes(rows, replace(self.info, skipped=tuple(failures)))

    def merge(self) -> FeaturesInfo:
        """Writes the file from all parts, removes the parts, and returns the description.

        Raises:
            BadInput: no image could be read, or a part is damaged.
            ComaError: a part is missing, or the disk is full; the parts are kept.
        """
        if gone := self.missing():
            raise ComaError(
                f"{self._path(gone[0])}: this part is missing; all processes have to write to the same folder"
            )
        skipped: list[str] = []
        rows = 0
        for number in range(len(self)):
            part = self._open(number)
            skipped += part.info.skipped
            rows += len(part)
        if not rows:
            shutil.rmtree(self.folder)
            raise BadInput(f"{self.info.images}: no image could be read; the first: {skipped[0]}")
        info = replace(self.info, skipped=tuple(skipped))
        with self.disk_errors():
            write_features(self.out, info, self._groups(), rows)
        shutil.rmtree(self.folder)
        return info

    def disk_errors(self) -> Any:
        """Returns a context in which a full disk is an error that says how to go on."""
        return _DiskErrors(self.folder)

    def _groups(self) -> Iterator[Rows]:
        for number in range(len(self)):
            yield from self._open(number).groups()

    def _open(self, number: int) -> FeaturesFile:
        return FeaturesFile(self._path(number), may_be_empty=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _request(self) -> dict[str, Any]:
        return _request(self.info, self.size)

    def _compare(self, place: Path, there: Any, wanted: dict[str, Any]) -> None:
        there, wanted = flat(there if isinstance(there, dict) else {}), flat(wanted)
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
        remedy = "remove it" if place == self.out else "remove this folder"
        raise BadInput(f"{place}: {reason}; {remedy}, or choose another --out")


def _request(info: FeaturesInfo, size: int) -> dict[str, Any]:
    """Returns what has to be the same when the work is continued, as JSON holds it."""
    spec = asdict(info.spec)
    del spec["model"]  # known by its weights
    kept = {"images": info.location, "split": info.split, "count": info.count, "listing": info.listing}
    return json.loads(json.dumps({**spec, **kept, "part_images": size}))


class _DiskErrors:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            where = error.filename or self._folder
            done = counted(sum(1 for _ in self._folder.glob("part-*.parquet")), "finished part")
            raise ComaError(
                f"{where}: {error.strerror}; {done} in {self._folder} stay; when this is solved, run the "
                "same command again"
            ) from None
