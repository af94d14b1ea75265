"""File contents to pixels: JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP and NPY, told apart by content, not by name.

What comes out is upright (EXIF applied), in display colours (palettes, CMYK and YCbCr become RGB) and
in the file's own precision: 16-bit stays uint16, where Pillow alone would drop 16-bit RGB to 8 bits.
HEIC is read where the extra `heic` is installed. Values that are missing (nodata, NaN, infinite) are filled
with the mean of their channel and marked. Whatever is wrong with a file ends as one `BadImage` line that
names it; animations are refused, because nothing says which of their frames is meant.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from coma.data import decode_arrays
from coma.data.image import DecodedImage, MinSide, apply_orientation, check_size
from coma.errors import BadImage

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".npy"),
)
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
INSTALL_HEIF = "pip install 'coma-dyvit[heic]'"

HEAD = 32
"""Bytes at the start of a file that tell whether it is an image."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")
_LARGEST = 1e37
"""Floats beyond this are no measurements: the usual mark for nodata is about -3.4e38, the smallest float."""
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_GIF = (b"GIF87a", b"GIF89a")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TALKATIVE = ("PIL.TiffImagePlugin", "tifffile", "imagecodecs")


def decode(data: bytes, name: str, min_side: MinSide = 0) -> DecodedImage:
    """Pixels of an encoded image.

    Args:
        data: the whole file.
        name: how errors call it.
        min_side: a JPEG may come back 2, 4 or 8 times smaller (scaled while decoding, which is much
            faster) as long as no side falls below this many pixels; 0 always gives full size. May be
            a function of the image's height and width, upright.

    Raises:
        BadImage: empty, not an image, truncated, too large, animated, without any value, or of a kind that is
            not supported.
    """
    if not data:
        raise BadImage(f"{name}: the file is empty")
    try:
        with _quiet():
            return fill_missing(_decode(data, min_side))
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


def fill_missing(picture: DecodedImage) -> DecodedImage:
    """Returns the picture with its missing values filled with the mean of their channel.

    Missing are the values that `picture.missing` marks and floats that are NaN, infinite or beyond 1e37.

    Raises:
        BadImage: a side of 0 pixels, or a channel without any value.
    """
    pixels, missing = picture.pixels, picture.missing
    if 0 in pixels.shape:
        raise BadImage("the image has no pixels")
    if pixels.dtype == np.float32:
        usable = np.abs(pixels) <= _LARGEST
        if not usable.all():
            missing = ~usable if missing is None else missing | ~usable
    if missing is None or not missing.any():
        return picture._replace(missing=None)
    empty = [str(channel + 1) for channel in np.flatnonzero(missing.all(axis=(0, 1)))]
    if empty:
        where = "" if len(empty) == pixels.shape[2] else f" of channel {', '.join(empty)}"
        raise BadImage(f"every value{where} is nodata, NaN or infinite")
    means = pixels.mean(axis=(0, 1), where=~missing, dtype=np.float64)
    if pixels.dtype != np.float32:
        means = means.round()
    return picture._replace(pixels=np.where(missing, means.astype(pixels.dtype), pixels), missing=missing)


def looks_like_image(head: bytes) -> bool:
    """Returns whether the first `HEAD` bytes of a file are those of a format that is read here."""
    if head.startswith((_JPEG, _PNG, *_TIFF, _NPY, *_GIF)):
        return True
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4)  # reserved, BITMAPFILEHEADER
    return bool(_brands(head))


def _brands(data: bytes) -> tuple[bytes, ...]:
    """Brands of an AVIF or HEIF file (ISO/IEC 14496-12, FileTypeBox); none of any other file."""
    if data[4:8] != b"ftyp":
        return ()
    box = data[8 : min(int.from_bytes(data[:4]), 256)]
    brands = tuple(box[at : at + 4] for at in range(0, len(box), 4))
    return brands if brands and brands[0] in (*_AVIF_BRANDS, *_HEIF_BRANDS) else ()


def _decode(data: bytes, min_side: MinSide) -> DecodedImage:
    if data.startswith(_NPY):
        return decode_arrays.decode_npy(data)
    if data.startswith(_TIFF):
        return decode_arrays.decode_tiff(data) or _decode_with_pillow(data, min_side)
    if data.startswith(_PNG) and data[24:25] == b"\x10":  # bit depth 16
        check_size(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), 3)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as header:
            orientation = _orientation(header)
        picture = decode_arrays.decode_png16(data)
        return picture._replace(pixels=apply_orientation(picture.pixels, orientation))
    return _decode_with_pillow(data, min_side)


def _open(data: bytes) -> Image.Image:
    brands = _brands(data)
    if not brands or set(brands) & set(_AVIF_BRANDS):
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise BadImage(f"HEIC images need an extra: {INSTALL_HEIF}") from None
    return HeifImageFile(io.BytesIO(data))


def _decode_with_pillow(data: bytes, min_side: MinSide) -> DecodedImage:
    with _open(data) as image:
        check_size(*image.size, 3)
        if image.format in _ANIMATED and getattr(image, "is_animated", False):
            raise BadImage("is an animation; save the frame that is meant as a still image")
        is_jpeg = image.format == "JPEG"
        orientation = _orientation(image) if is_jpeg else 1
        if is_jpeg and min_side:
            width, height = image.size[::-1] if orientation >= 5 else image.size
            side = min_side(height, width) if callable(min_side) else min_side
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
    return DecodedImage(apply_orientation(pixels, orientation), alpha=pixels.shape[2] in (2, 4))


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
        return "not an image (its content is not JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP or NPY)"
    text = " ".join(str(error).split())[:200]
    return f"does not decode ({text or type(error).__name__})"
