"""Thumbnails of the images that a file of features names, contact sheets and maps of them.

A file of features may come from anywhere, so its paths are data and not orders: only regular files below the
folder of the images are opened, whose first bytes are those of an image, and only as images. What cannot be
shown is left blank and counted.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from coma.contact_sheet import with_title
from coma.data import Source, open_source
from coma.data.channels import scale_to_unit
from coma.data.decode import HEAD, decode, looks_like_image
from coma.data.transforms import centre_crop
from coma.data.windows import Recent, decode_window, parse_window
from coma.errors import BadImage, BadInput
from coma.messages import abridged, counted, printable
from coma.paths import Location
from downstream.features.files import storable
from downstream.search.layout import grid_cells

log = logging.getLogger(__name__)

_LARGEST = 1 << 30
"""Bytes of an image file that are read at most."""
_NAMED = 3
_SMALLEST, _THUMBNAIL = 24, 128
"""Smallest and largest side of a thumbnail on a map in pixels."""
_SPREAD = 1.4
"""Side of a map over that of all its thumbnails without a gap."""


@dataclass
class Album:
    """Reads the images of one file of features.

    Attributes:
        images: Folder, `.npz` pack, shards or parquet files that hold them, or their address.
        location: Folder that the paths are relative to.
        split: Split of the images.
        failures: One line for each image that could not be read so far.
    """

    images: Location
    location: Path
    split: str | None = None
    failures: list[str] = field(default_factory=list)
    _source: Source | BadInput | None = field(default=None, repr=False)
    _places: dict[str, int] = field(default_factory=dict, repr=False)
    _recent: Recent = field(default_factory=Recent, repr=False)

    def pixels(self, name: str, side: int) -> np.ndarray:
        """Returns an image of at least `side` pixels, if it has as many: `[H, W, C]`.

        Raises:
            BadImage: there is no such image, or it cannot be read.
        """
        stored = (".tar/" in name or ".parquet/" in name) and not (self.location / name).exists()
        folder = self._source is None and isinstance(self.images, Path) and self.images.is_dir()
        if folder and not stored:
            if (cut := parse_window(name)) and not (self.location / name).exists():
                with _open_image_file(self.location, cut[0]) as file:
                    return decode_window(file, cut[1], printable(name), self._recent).pixels
            return decode(read_image_file(self.location, name), printable(name), side).pixels
        return self._from_source(name, side)

    def thumbnail(self, name: str, side: int) -> Image.Image | None:
        """Returns a picture of at most `side` pixels; None, and a line in `failures`, if there is none."""
        try:
            return picture_of(self.pixels(name, side), side)
        except BadInput as error:
            self.failures.append(str(error))
            return None

    def _from_source(self, name: str, side: int) -> np.ndarray:
        if self._source is None:
            try:
                self._source = open_source(self.images, self.split)
                self._places = {storable(each): i for i, each in enumerate(self._source.listing()[0])}
            except BadInput as error:
                self._source = error
        if isinstance(self._source, BadInput):
            raise self._source
        if name not in self._places:
            raise BadImage(f"{printable(name)}: is no longer in {printable(str(self.images))}")
        return self._source.read(self._places[name], min_side=side)


def read_image_file(folder: Path, name: str) -> bytes:
    """Returns the content of an image below a folder; nothing else is read.

    Raises:
        BadImage: it lies elsewhere, is missing, not a regular file, not an image, or too large.
    """
    with _open_image_file(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST:
            raise BadImage(f"{printable(name)}: {size} bytes are too many for an image")
        return file.read(_LARGEST)


@contextmanager
def _open_image_file(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Opens an image below a folder; nothing else is opened.

    Raises:
        BadImage: it lies elsewhere, is missing, not a regular file, or not an image.
    """
    shown = printable(name)
    place = os.path.normpath(name)
    if os.path.isabs(name) or place.startswith("..") or "\0" in name:
        raise BadImage(f"{shown}: does not lie in the folder of the images")
    try:
        number = os.open(folder / place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never waits for a pipe
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            os.close(number)
            raise BadImage(f"{shown}: is not a regular file")
        with open(folder / place, "rb", opener=lambda *_: number) as file:  # tifffile asks for its name
            if not looks_like_image(file.read(HEAD)):
                raise BadImage(f"{shown}: is not an image")
            file.seek(0)
            yield file
    except FileNotFoundError:
        raise BadImage(f"{shown}: no longer exists in {printable(str(folder))}") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{shown}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def picture_of(pixels: np.ndarray, side: int) -> Image.Image:
    """Returns a picture whose longer side is at most `side` pixels: RGB, or the mean of other channels."""
    if pixels.dtype != np.uint8:
        scaled = scale_to_unit(pixels)
        low, high = float(scaled.min()), float(scaled.max())
        if low < 0 or high > 1:  # floats in a unit of their own
            scaled = (scaled - low) / max(high - low, 1e-12)
        pixels = (scaled * 255).round().astype(np.uint8)
    if pixels.shape[2] == 4:
        pixels = pixels[:, :, :3]
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=None)
    return picture


def warn_of_blanks(albums: Sequence[Album]) -> None:
    """Logs one line if images were left blank."""
    failures = [failure for album in albums for failure in dict.fromkeys(album.failures)]
    if failures:
        log.warning(
            "left blank %s: %s; --images names the folder if it was moved",
            counted(len(failures), "picture"),
            abridged(failures, _NAMED, "; "),
        )


def draw_map(
    albums: Sequence[Album], images: Sequence[tuple[int, str]], positions: np.ndarray, size: int, title: str
) -> Image.Image:
    """Returns a map of thumbnails; an image whose place is taken goes to a free one nearby.

    Args:
        albums: Readers of the images of each file.
        images: File and path of every image.
        positions: Places in the unit square `[n, 2]`.
        size: Side of the map in pixels, about.
        title: Line above the map.
    """
    side = int(np.clip(size / (_SPREAD * len(images) ** 0.5), _SMALLEST, _THUMBNAIL))
    across = max(size // side, 1)
    cells = grid_cells(positions, across)
    sheet = Image.new("RGB", (across * side, across * side), (255, 255, 255))
    for (number, name), (right, down) in zip(images, cells.tolist(), strict=True):
        if right < 0:
            continue
        corner = (right * side, down * side)
        picture = albums[number].thumbnail(name, 2 * side)
        if picture is None:
            sheet.paste((222, 222, 228), (*corner, corner[0] + side - 1, corner[1] + side - 1))
            continue
        top, left, height, width = centre_crop(picture.height, picture.width)
        square = picture.crop((left, top, left + width, top + height))
        sheet.paste(square.resize((side - 1, side - 1), Image.Resampling.BICUBIC), corner)
    if without := int((cells[:, 0] < 0).sum()):
        title += f"; {without} of them found no place here"
    return with_title(sheet, title)
