"""Features as unit vectors: read from one or more files, a part at a time or all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coma.errors import BadInput
from downstream.features.files import FeaturesFile, Rows


@dataclass(frozen=True)
class Vectors:
    """Features of length 1, whose products are cosine similarities.

    Attributes:
        paths: Paths of the images, inside the images of their file.
        files: Position of the file of each row, int32 `[n]`.
        values: float32 `[n, c]`.
    """

    paths: list[str]
    files: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.paths)


def open_files(paths: Sequence[Path]) -> list[FeaturesFile]:
    """Opens files of features that can be compared with each other.

    Raises:
        BadInput: a file that cannot be used, maps of features, or features of different models.
    """
    files = [FeaturesFile(path) for path in paths]
    first = files[0]
    for file in files:
        if len(file.info.spec.shape) != 1:
            shape = " x ".join(map(str, file.info.spec.shape))
            raise BadInput(
                f"{file.path}: holds maps of features ({shape} per image), which are not searched; run coma "
                "embed with --pooling mean"
            )
        if reason := first.info.spec.difference(file.info.spec):
            raise BadInput(
                f"{first.path} and {file.path}: features of {reason}; run coma embed alike for both"
            )
    return files


def unit_parts(files: Sequence[FeaturesFile]) -> Iterator[tuple[int, Rows]]:
    """Yields the position of a file and some of its rows, as unit vectors.

    Raises:
        BadInput: while iterating: a file is damaged.
    """
    for number, file in enumerate(files):
        for rows in file.groups():
            yield number, Rows(rows.paths, unit(rows.values, file.path))


def read_vectors(files: Sequence[FeaturesFile]) -> Vectors:
    """Returns all features in memory.

    Raises:
        BadInput: a file is damaged.
    """
    count, width = sum(map(len, files)), files[0].info.spec.shape[0]
    values = np.empty((count, width), np.float32)
    numbers = np.empty(count, np.int32)
    paths: list[str] = []
    for number, rows in unit_parts(files):
        place = slice(len(paths), len(paths) + len(rows.paths))
        values[place], numbers[place] = rows.values, number
        paths += rows.paths
    return Vectors(paths, numbers, values)


def unit(values: np.ndarray, source: Path | str) -> np.ndarray:
    """Returns vectors of length 1, float32 `[n, c]`; a zero vector stays one.

    Raises:
        BadInput: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise BadInput(f"{source}: damaged (a feature is not finite); make it again with coma embed")
    largest = np.abs(values).max(axis=1, keepdims=True)  # no square of a large value overflows
    scaled = values / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.ascontiguousarray(scaled / np.where(lengths > 0, lengths, 1), np.float32)
