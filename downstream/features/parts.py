"""The parts of a file of features while it is computed.

features.parquet.parts/request.json         what is computed, of which images
features.parquet.parts/part-000000.parquet  features of the first images, and so on
features.parquet                            all of them in order; the folder is removed then
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coma.errors import BadInput, ComaError
from downstream.features.files import FeaturesFile, FeaturesInfo, Rows, to_bytes, write_features
from downstream.parts import Parts


@dataclass(frozen=True)
class FeatureParts(Parts):
    """The parts of one file of features.

    Attributes:
        out: The file.
        info: Its description, without the images that could not be read.
        size: Number of images in a part.
    """

    out: Path
    info: FeaturesInfo
    size: int
    suffix = ".parquet"
    command = "coma embed"

    @property
    def folder(self) -> Path:
        """See `Parts`."""
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def count(self) -> int:
        """See `Parts`."""
        return self.info.count

    def request(self) -> dict[str, Any]:
        """See `Parts`."""
        return self._request(self.info)

    def prepare(self) -> bool:
        """Makes the folder, or finds the one of the same request; returns whether the file is there already.

        Raises:
            BadInput: the file or the folder is of another request, or is something else.
        """
        if self.out.exists():
            self.compare(self.out, self._request(FeaturesFile(self.out).info), "remove it")
            shutil.rmtree(self.folder, ignore_errors=True)  # killed after the last rename
            return True
        self.make_folder()
        return False

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
                f"{self.path(gone[0])}: this part is missing; all processes have to write to the same folder"
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

    def _groups(self) -> Iterator[Rows]:
        for number in range(len(self)):
            yield from self._open(number).groups()

    def _open(self, number: int) -> FeaturesFile:
        return FeaturesFile(self.path(number), may_be_empty=True)

    def _request(self, info: FeaturesInfo) -> dict[str, Any]:
        spec = asdict(info.spec)
        del spec["model"]  # known by its weights
        kept = {"images": info.location, "split": info.split, "count": info.count, "listing": info.listing}
        return json.loads(json.dumps({**spec, **kept, "part_images": self.size}))
