"""One or more files of features that are searched together, with the pictures of their images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coma.contact_sheet import Cell
from coma.data import open_source
from coma.errors import BadInput
from coma.messages import counted, printable
from coma.paths import Address, Location, parse_location
from downstream.features.files import FeaturesFile
from downstream.search.pictures import Album
from downstream.search.vectors import open_files

SIDE = 160
"""Longer side of a picture on a contact sheet in pixels."""


@dataclass(frozen=True)
class Collection:
    """Files of features of the same model.

    Attributes:
        files: The files.
        albums: Readers of the images of each file.
    """

    files: list[FeaturesFile]
    albums: list[Album]

    def __len__(self) -> int:
        """Returns the number of images."""
        return sum(map(len, self.files))

    @property
    def title(self) -> str:
        """Returns what is searched, for people."""
        where = str(self.files[0].path) if len(self.files) == 1 else counted(len(self.files), "file")
        return f"{printable(where)}: {counted(len(self), 'image')}"

    @property
    def model(self) -> str:
        """Returns a short name of the model."""
        parts = Path(self.files[0].info.spec.model).parts
        return printable("/".join(parts[-2:]))

    def row(self, number: int, path: str) -> dict[str, str]:
        """Returns the columns that name an image; its file too, where there are several."""
        return {"path": path, **({"features": str(self.files[number].path)} if len(self.files) > 1 else {})}

    def cell(self, number: int, path: str, value: float) -> Cell:
        """Returns an image for a contact sheet, with a value and its name below it."""
        return Cell(self.albums[number].thumbnail(path, SIDE), f"{value:.3f}\n{short_name(path)}")


def open_collection(features: Sequence[Path], images: Sequence[Location] = ()) -> Collection:
    """Opens files of features.

    Args:
        features: The files.
        images: Where the images of each file are now; by default where they were embedded from.

    Raises:
        BadInput: a file or images that cannot be used, or features of different models.
    """
    files = open_files(features)
    for place in images:
        if isinstance(place, Address) or not place.is_dir():
            open_source(place)  # says what is wrong with it
        elif not any(place.iterdir()):
            raise BadInput(f"--images {place}: the folder is empty; give the folder of the images")
    places = images or [None] * len(files)
    return Collection(files, [_album(file, place) for file, place in zip(files, places, strict=True)])


def short_name(path: str) -> str:
    """Returns the last part of a path, printable."""
    return printable(path.rpartition("/")[2] or path)


def _album(file: FeaturesFile, place: Location | None) -> Album:
    """Returns a reader of the images; a file of features does not decide which remote storage is read."""
    split = file.info.split
    if place is None and isinstance(parse_location(file.info.images), Address):
        there = BadInput(f"{file.path}: its images are remote; give --images {file.info.images} to read them")
        return Album(Path(), Path(), split, _source=there)
    images, location = Path(file.info.images), Path(file.info.location)
    if isinstance(place, Address):
        return Album(place, Path(), split)
    if place is None:
        return Album(images, location, split)
    inside = os.path.relpath(location, images)
    return Album(place, place / inside if place.is_dir() else place, split)
