"""The files of predictions, and their parts while they are computed.

    OUT/predictions.parts/request.json       what is computed, of which images
    OUT/predictions.parts/part-000000.jsonl  a line for each of the first images, and so on
    OUT/predictions.csv, predictions.json    all of them in order

A line of a part is JSON: `index` (position in the source), `path`, `classes`, and `labels` if an image may
have any number of classes; or `failure` of an image that could not be read. However many images there are,
no more than a part is in memory.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from coma.atomic_io import Descriptor, write_whole
from coma.data import Source
from coma.errors import ComaError
from downstream.parts import Parts

Entry = dict[str, Any]
"""An image: `path`, `classes` (name and score, most probable first), and perhaps `labels`."""
_END = "]}"


@dataclass(frozen=True)
class Predictions:
    """Predictions that were written; iterating reads them from predictions.json, one image at a time.

        for each in predictions:
            print(each["path"], each["classes"][0]["name"])

    Attributes:
        out: Folder of predictions.csv, predictions.json and contact_sheet.png.
        images: Number of images that have predictions.
        skipped: One line for each image that could not be read.
        top_k: Number of classes of each image.
        names: Class names of the classifier.
        multi_label: Whether an image may have any number of classes; its `labels` are those that it has.
    """

    out: Path
    images: int
    skipped: tuple[str, ...]
    top_k: int
    names: tuple[str, ...]
    multi_label: bool

    def __len__(self) -> int:
        """Returns the number of images that have predictions."""
        return self.images

    def __iter__(self) -> Iterator[Entry]:
        """Yields path, classes and perhaps labels of every image."""
        with (self.out / "predictions.json").open(encoding="utf-8") as file:
            next(file)
            for line in file:
                if line.strip() != _END:
                    yield json.loads(line.rstrip().removesuffix(","))


@dataclass(frozen=True)
class PredictionParts(Parts):
    """The parts of the predictions of one folder.

    Attributes:
        out: Folder of the results.
        source: All images.
        about: What the predictions are of: the model, the classes of each image, and the images.
        size: Number of images in a part.
    """

    out: Path
    source: Source
    about: dict[str, Any]
    size: int
    suffix = ".jsonl"
    command = "coma classify predict"

    @property
    def folder(self) -> Path:
        """See `Parts`."""
        return parts_folder(self.out)

    @property
    def count(self) -> int:
        """See `Parts`."""
        return len(self.source)

    def request(self) -> dict[str, Any]:
        """See `Parts`."""
        return {**self.about, "count": self.count, "part_images": self.size}

    def entries(self, number: int) -> Iterator[Entry]:
        """Yields the lines of a part.

        Raises:
            ComaError: the part is damaged.
        """
        path = self.path(number)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            yield from map(json.loads, lines)
        except (OSError, ValueError) as error:
            raise ComaError(f"{path}: damaged ({error}); remove it, and run the same command again") from None

    def all_entries(self) -> Iterator[Entry]:
        """Yields the lines of all parts, in the order of the images."""
        for number in range(len(self)):
            yield from self.entries(number)

    def write_results(self, found: Predictions, about: dict[str, Any]) -> None:
        """Writes predictions.csv and predictions.json from all parts, which are kept.

        Args:
            found: Description of the predictions.
            about: What predictions.json says before them.

        Raises:
            ComaError: the disk is full; the parts are kept.
        """
        with self.disk_errors():
            _write_lines(self.out / "predictions.csv", lambda text: self._write_csv(text, found))
            _write_lines(self.out / "predictions.json", lambda text: self._write_json(text, about))

    def remove(self) -> None:
        """Removes the parts, and the folder of the results if it is empty."""
        for path in self.folder.glob(f"part-*{self.suffix}"):
            path.unlink()  # before the request: if this is stopped, the same command goes on
        shutil.rmtree(self.folder)
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def _images(self) -> Iterator[Entry]:
        for entry in self.all_entries():
            if "failure" not in entry:
                del entry["index"]
                yield entry

    def _write_csv(self, text: TextIO, found: Predictions) -> None:
        """Writes a line for each image: path, labels (any number of classes only), classes and scores."""
        writer = csv.writer(text, lineterminator="\n")
        labels = ["labels"] * found.multi_label
        numbers = range(1, found.top_k + 1)
        writer.writerow(["path", *labels, *(f"{what}_{i}" for i in numbers for what in ("class", "score"))])
        for entry in self._images():
            labels = [";".join(entry["labels"])] if found.multi_label else []
            cells = [cell for each in entry["classes"] for cell in (each["name"], f"{each['score']:.6f}")]
            writer.writerow([entry["path"], *labels, *cells])

    def _write_json(self, text: TextIO, about: dict[str, Any]) -> None:
        text.write(json.dumps(about)[:-1] + ', "predictions": [')
        for row, entry in enumerate(self._images()):
            text.write(("," if row else "") + "\n" + json.dumps(entry))
        text.write(f"\n{_END}\n")


def parts_folder(out: Path) -> Path:
    """Returns the folder of the parts of predictions."""
    return out / "predictions.parts"


def _write_lines(path: Path, write: Callable[[TextIO], None]) -> None:
    def through_buffer(file: Descriptor) -> None:
        text = io.TextIOWrapper(io.BufferedWriter(cast(Any, file), 1 << 20), "utf-8", newline="")
        write(text)
        text.flush()
        text.detach()

    write_whole(path, through_buffer)
