"""File contents to pixels: JPEG, PNG, WebP, TIFF, BMP and NPY, told apart by content, never by name.

What comes out is upright (EXIF applied), in display colours (palettes, CMYK and YCbCr become RGB) and
in the file's own precision: 16-bit stays uint16, where Pillow alone would drop 16-bit RGB to 8 bits.
Whatever is wrong with a file ends as one `BadImage` line that names it.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pretrain.errors import BadImage

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".npy")
MAX_PIXELS = 178_956_970
"""Larger images are refused; Pillow's own limit for a decompression bomb."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_TALKATIVE = ("PIL.TiffImagePlugin", "tifffile", "imagecodecs")


AtLeast = int | Callable[[int, int], int]
"""How small a JPEG may come back, see `decode`."""


class Picture(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """`[H, W, C]` uint8, uint16 or float32."""
    alpha: bool = False
    """The last channel is opacity."""


def decode(data: bytes, name: str, at_least: AtLeast = 0) -> Picture:
    """Pixels of an encoded image.

    Args:
        data: the whole file.
        name: how errors call it.
        at_least: a JPEG may come back 2, 4 or 8 times smaller (scaled while decoding, which is much
            faster) as long as no side falls below this many pixels; 0 always gives full size. May be
            a function of the image's height and width, upright.

    Raises:
        BadImage: empty, not an image, truncated, too large, not finite, or of a kind not supported.
    """
    if not data:
        raise BadImage(f"{name}: the file is empty")
    try:
        with _quiet():
            return check(_decode(data, at_least))
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from None
    except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, zlib.error, ...
        raise BadImage(f"{name}: {_reason(error)}") from None


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that looks the same to every reader: grey or RGB, not turned by its EXIF.

    None for everything else.
    """
    if not data.startswith(_JPEG):
        return None
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            check_size(*header.size, 3)
            plain = header.mode in ("L", "RGB") and _orientation(header) == 1
            return (header.height, header.width) if plain else None
    except Exception:  # damaged or too large: whoever decodes it will say how
        return None


def check(picture: Picture) -> Picture:
    """The same picture, if it has pixels and they are finite.

    Raises:
        BadImage: a side of 0 pixels, or NaN or infinite values.
    """
    if 0 in picture.pixels.shape:
        raise BadImage(f"no pixels (shape {picture.pixels.shape})")
    if picture.pixels.dtype.kind == "f" and not np.isfinite(picture.pixels).all():
        raise BadImage("holds NaN or infinite values")
    return picture


def check_size(*shape: int) -> None:
    """Refuse sizes that only a damaged or hostile header has, before memory is taken for them.

    Raises:
        BadImage: the shape holds more values than `MAX_PIXELS` RGB pixels.
    """
    if math.prod(shape) > 3 * MAX_PIXELS:
        size = " x ".join(map(str, shape))
        raise BadImage(f"{size} values are more than the limit of {3 * MAX_PIXELS} (a decompression bomb?)")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo a camera's rotation; `orientation` 1 to 8 as in the EXIF standard, section 4.6.4."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode(data: bytes, at_least: AtLeast) -> Picture:
    from pretrain.data import rasters

    if data.startswith(_NPY):
        return rasters.decode_npy(data)
    if data.startswith(_TIFF):
        return rasters.decode_tiff(data) or _decode_with_pillow(data, at_least)
    if data.startswith(_PNG) and data[24:25] == b"\x10":  # bit depth 16
        check_size(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), 3)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as header:
            orientation = _orientation(header)
        picture = rasters.decode_png16(data)
        return picture._replace(pixels=upright(picture.pixels, orientation))
    return _decode_with_pillow(data, at_least)


def _decode_with_pillow(data: bytes, at_least: AtLeast) -> Picture:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        check_size(*image.size, 3)
        is_jpeg = image.format == "JPEG"
        orientation = _orientation(image) if is_jpeg else 1
        if is_jpeg and at_least:
            width, height = image.size[::-1] if orientation >= 5 else image.size
            side = at_least(height, width) if callable(at_least) else at_least
            image.draft(None, (side, side))
        image.load()
        if not is_jpeg:  # load() already turns a TIFF and forgets the tag
            orientation = _orientation(image)
        transparent = image.has_transparency_data
        match image.mode:
            case "L" | "LA" | "RGB" | "RGBA" if not transparent or image.mode.endswith("A"):
                shown = image
            case "1" | "L" | "LA" | "La":
                shown = image.convert("LA" if transparent else "L")
            case _:
                shown = image.convert("RGBA" if transparent else "RGB")
        pixels = np.asarray(shown)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return Picture(upright(pixels, orientation), alpha=pixels.shape[2] in (2, 4))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the decoders' remarks about odd files away from the terminal: what matters is raised."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata does not make a good picture bad
        return 1
    return value if value in range(1, 9) else 1


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image (its content is not JPEG, PNG, WebP, TIFF, BMP or NPY)"
    text = " ".join(str(error).split())[:200]
    return f"does not decode ({text or type(error).__name__})"
