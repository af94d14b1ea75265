"""Decodes image files: JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, NPY and DICOM, recognised by content, not name.

Pixels are upright (EXIF orientation is applied), in display colours (palettes, CMYK and YCbCr are converted
to RGB) and in the precision of the file: 16 bits remain uint16, where Pillow alone would reduce 16-bit RGB to
8 bits. HEIC needs the extra `heic`, DICOM `dicom`. Missing values (nodata, NaN, infinite) are filled
with the mean of their channel and marked. Every fault of a file raises one `BadImage` with a line that names
the file. Animations are refused unless the first frame is asked for, because nothing says which one is meant.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from coma.data.codestreams import PNG
from coma.data.decode_arrays import decode_npy, decode_png16
from coma.data.decode_dicom import DICOM_EXTENSIONS, INSTALL_DICOM, PREAMBLE, decode_dicom
from coma.data.decode_tiff import decode_tiff
from coma.data.image import DecodedImage, MinSide, apply_orientation, check_size
from coma.errors import BadImage

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".npy"),
)
INSTALL_HEIF = "pip install 'coma-dyvit[heic]'"

WITH_EXTRA = {
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif", INSTALL_HEIF)),
    **dict.fromkeys(DICOM_EXTENSIONS, ("pydicom", INSTALL_DICOM)),
}
"""The package that reads files with an extension, and the command that installs it."""

HEAD = PREAMBLE + 4
"""Number of bytes at the start of a file that identify its format."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
_ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")
_LARGEST = 1e37
"""Larger floats are missing values: nodata is usually about -3.4e38, the smallest float."""
_JPEG = b"\xff\xd8\xff"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY = b"\x93NUMPY"
_GIF = (b"GIF87a", b"GIF89a")
_DICOM = b"DICM"
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_LOGGERS = ("PIL.TiffImagePlugin", "tifffile", "imagecodecs", "pydicom", "pydicom.pixels.decoders.base")


def decode(data: bytes, name: str, min_side: MinSide = 0, *, first_frame: bool = False) -> DecodedImage:
    """Decodes an image file.

    Args:
        data: Content of the file.
        name: Name of the image, for errors.
        min_side: A JPEG may be decoded 2, 4 or 8 times smaller (which is much faster) as long as no side is
            below this many pixels; 0 always decodes the full size. May be a function of height and width of
            the upright image.
        first_frame: Decode the first frame of an animation; by default, animations are refused.

    Raises:
        BadImage: The file is empty, truncated, too large, animated or not an image, has no valid value, or is
            of an unsupported kind.
    """
    if not data:
        raise BadImage(f"{name}: the file is empty")
    with naming_errors(name), quiet():
        return fill_missing(decode_content(data, min_side, first_frame=first_frame))


@contextmanager
def naming_errors(name: str, fault: str = "does not decode") -> Iterator[None]:
    """Turns every error of a decoder or encoder into one `BadImage`: name of the image, fault and reason."""
    try:
        yield
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from None
    except Exception as error:  # decoders fail with OSError, SyntaxError, struct.error, zlib.error, ...
        raise BadImage(f"{name}: {_reason(error, fault)}") from None


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns height and width of a JPEG that all decoders read alike: grey or RGB, without EXIF rotation.

    Returns None for all other files.
    """
    if not data.startswith(_JPEG):
        return None
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            check_size(*header.size, 3)
            plain = header.mode in ("L", "RGB") and _orientation(header) == 1
            return (header.height, header.width) if plain else None
    except Exception:  # damaged or too large: `decode` says how
        return None


def image_size(file: BinaryIO) -> tuple[int, int]:
    """Returns height and width of the upright image in a file that only Pillow reads, without its pixels.

    Raises:
        Exception: It is not such an image: see `naming_errors`.
    """
    head = file.read(HEAD)
    late = head.startswith(PNG) and _metadata_follow_pixels(file)
    file.seek(0)
    with _open(head, file) as image:
        check_size(*image.size, 3)
        width, height = image.size
        if late:
            image.load()
        elif image.format == "PNG":
            image.info.setdefault("exif")  # else Pillow would decode the pixels to look behind them
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _metadata_follow_pixels(png: BinaryIO) -> bool:
    """Returns whether a PNG has chunks behind its pixels that may hold its orientation."""
    png.seek(len(PNG))
    pixels = False
    while len(head := png.read(8)) == 8:  # length and type of a chunk; its content and a checksum follow
        kind = head[4:]
        if pixels and kind in _PNG_METADATA:
            return True
        pixels = pixels or kind == b"IDAT"
        png.seek(int.from_bytes(head[:4]) + 4, io.SEEK_CUR)
    return False


def fill_missing(image: DecodedImage) -> DecodedImage:
    """Returns the image with its missing values filled with the mean of their channel.

    Missing are the values that `image.missing` marks, and floats that are NaN, infinite or beyond 1e37.

    Raises:
        BadImage: A side has 0 pixels, or a channel has no valid value.
    """
    pixels, missing = image.pixels, image.missing
    if 0 in pixels.shape:
        raise BadImage("the image has no pixels")
    if pixels.dtype == np.float32:
        usable = np.abs(pixels) <= _LARGEST
        if not usable.all():
            missing = ~usable if missing is None else missing | ~usable
    if missing is None or not missing.any():
        return image._replace(missing=None)
    empty = [str(channel + 1) for channel in np.flatnonzero(missing.all(axis=(0, 1)))]
    if empty:
        where = "" if len(empty) == pixels.shape[2] else f" of channel {', '.join(empty)}"
        raise BadImage(f"every value{where} is nodata, NaN or infinite")
    means = pixels.mean(axis=(0, 1), where=~missing, dtype=np.float64)
    if pixels.dtype != np.float32:
        means = means.round()
    return image._replace(pixels=np.where(missing, means.astype(pixels.dtype), pixels), missing=missing)


def looks_like_image(head: bytes) -> bool:
    """Returns whether a file with these first `HEAD` bytes is in a supported format."""
    if is_tiff(head) or is_npy(head) or head.startswith((_JPEG, PNG, *_GIF)):
        return True
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    if head.startswith(b"BM"):
        return head[6:10] == bytes(4)  # reserved, BITMAPFILEHEADER
    return is_dicom(head) or bool(_brands(head))


def is_npy(head: bytes) -> bool:
    """Returns whether a file with these first bytes is an NPY file."""
    return head.startswith(_NPY)


def is_tiff(head: bytes) -> bool:
    """Returns whether a file with these first bytes is a TIFF or BigTIFF file."""
    return head.startswith(_TIFF)


def is_heif(head: bytes) -> bool:
    """Returns whether a file with these first bytes is a HEIC or HEIF file, but no AVIF file."""
    brands = _brands(head)
    return bool(brands) and not set(brands) & set(_AVIF_BRANDS)


def is_dicom(head: bytes) -> bool:
    """Returns whether a file with these first `HEAD` bytes is a DICOM file."""
    return head[PREAMBLE:HEAD] == _DICOM


def _brands(data: bytes) -> tuple[bytes, ...]:
    """Returns the brands of an AVIF or HEIF file (ISO/IEC 14496-12, FileTypeBox); empty for other files."""
    if data[4:8] != b"ftyp":
        return ()
    box = data[8 : min(int.from_bytes(data[:4]), 256)]
    brands = tuple(box[at : at + 4] for at in range(0, len(box), 4))
    return brands if brands and brands[0] in (*_AVIF_BRANDS, *_HEIF_BRANDS) else ()


def decode_content(data: bytes, min_side: MinSide = 0, *, first_frame: bool = False) -> DecodedImage:
    """Decodes an image file as `decode` does, but without filling missing values and naming errors."""
    if is_dicom(data):  # first, since its preamble may be that of a TIFF
        return decode_dicom(io.BytesIO(data))
    if is_npy(data):
        return decode_npy(data)
    if is_tiff(data):
        return decode_tiff(data) or _decode_with_pillow(data, min_side, first_frame)
    if data.startswith(PNG) and data[24:25] == b"\x10":  # bit depth 16
        check_size(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), 3)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as header:
            orientation = _orientation(header)
        picture = decode_png16(data)
        return picture._replace(pixels=apply_orientation(picture.pixels, orientation))
    return _decode_with_pillow(data, min_side, first_frame)


def _open(head: bytes, file: BinaryIO) -> Image.Image:
    if not is_heif(head):
        return Image.open(file, formats=_FORMATS)
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise BadImage(f"HEIC images need an extra: {INSTALL_HEIF}") from None
    return HeifImageFile(file)


def _decode_with_pillow(data: bytes, min_side: MinSide, first_frame: bool) -> DecodedImage:
    with _open(data, io.BytesIO(data)) as image:
        check_size(*image.size, 3)
        if not first_frame and image.format in _ANIMATED and getattr(image, "is_animated", False):
            raise BadImage("is an animation; save one frame as a still image")
        is_jpeg = image.format == "JPEG"
        orientation = _orientation(image) if is_jpeg else 1
        if is_jpeg and min_side:
            width, height = image.size[::-1] if orientation >= 5 else image.size
            side = min_side(height, width) if callable(min_side) else min_side
            image.draft(None, (side, side))
        image.load()
        if not is_jpeg:  # load() already rotates a TIFF and removes the tag
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
def quiet() -> Iterator[None]:
    """Hides the decoders' warnings about unusual files, in all threads; faults that matter are raised."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
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
    except Exception:  # damaged metadata do not spoil the pixels
        return 1
    return value if value in range(1, 9) else 1


def _reason(error: Exception, fault: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image (its content is not JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, NPY or DICOM)"
    text = " ".join(str(error).split())[:200]
    return f"{fault} ({text or type(error).__name__})"
