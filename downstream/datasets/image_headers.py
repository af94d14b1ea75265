"""Reads the size of images from their headers, including the EXIF rotation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")


class Header(NamedTuple):
    """Size and orientation of an image file."""

    width: int
    height: int
    orientation: int
    """EXIF orientation, 1 (upright) to 8; from 5 on, width and height are swapped for display."""

    @property
    def shown(self) -> tuple[int, int]:
        """Returns width and height of the upright picture."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(path: Path | str) -> Header | str:
    """Returns the header, or a short description of the error."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a regular file"  # opening a pipe would block
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return Header(*image.size, _orientation(image))
    except FileNotFoundError:
        return "missing"
    except UnidentifiedImageError:
        return _decoded(Path(path)) if Path(path).stat().st_size else "empty file"
    except Exception as error:  # OSError, SyntaxError, struct.error, DecompressionBombError, ...
        return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:100]


def _decoded(path: Path) -> Header | str:
    """Decodes the file as training does, for formats that Pillow cannot read, such as multi-channel TIFF."""
    from coma.data.decode import decode  # imports torch: only where it is needed
    from coma.errors import BadImage

    try:
        height, width = decode(path.read_bytes(), str(path)).pixels.shape[:2]
    except BadImage:
        return "not an image"
    return Header(width, height, 1)


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the file to look for EXIF after the pixels
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata does not matter
        return 1
    return value if value in range(1, 9) else 1
