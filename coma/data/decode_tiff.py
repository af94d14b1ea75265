"""Decodes TIFF files of any depth and number of channels: whole, or only a window of them.

A window is read from the tiles or strips that it touches, so an image of any size takes little memory:

    uncompressed, in one block      the rows of the window are read from the file
    tiles or strips                 those that the window touches are decoded, one at a time
    one compressed strip            there is nothing smaller than the image to decode

Values that a GeoTIFF declares as nodata are marked as missing.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from coma.data.codestreams import check_codestream, codestream_size
from coma.data.decode_arrays import max_value, to_hwc, to_supported_dtype
from coma.data.image import (
    MAX_VALUES,
    Box,
    DecodedImage,
    apply_orientation,
    check_inside,
    check_size,
    planes_to_hwc,
)
from coma.errors import BadImage

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

_ASSOCIATED, _UNASSOCIATED = 1, 2  # TIFF 6.0, ExtraSamples: premultiplied and ordinary opacity
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6  # TIFF 6.0, PhotometricInterpretation
_OLD_JPEG, _JPEG = 6, 7  # TIFF 6.0 and its supplement 2, Compression
_JPEGS = (_OLD_JPEG, _JPEG, 33007, 34892)
_SIZED = (*_JPEGS, 33003, 33004, 33005, 34712, 34933, 50001, 34927)  # JPEG 2000, PNG, WebP
"""Compressions whose tiles and strips have a header with a size of their own."""
_GDAL_NODATA = 42113  # a number as text, for all channels
_LARGEST_SEGMENT = 1 << 27
"""Bytes of a decoded tile or strip from which on an image is not read by windows."""

Recall = Callable[[Any, int, Callable[[], np.ndarray]], np.ndarray]
"""Returns what was decoded before under a key, or decodes it; the second argument is its size in bytes."""


class TiffLayout(NamedTuple):
    """How windows of a TIFF can be read."""

    height: int
    """Height as stored if it is read by windows; otherwise that of the upright image."""
    width: int
    by_windows: bool
    """Whether a window can be read without decoding the whole image."""
    segment: tuple[int, int]
    """Height and width of a tile or strip; (1, 1) if single pixels can be read."""


def decode_tiff(data: bytes) -> DecodedImage | None:
    """Decodes a TIFF as stored: any depth, up to 16 channels in one page, in planes or in pages.

    Returns:
        None if Pillow should decode it: its colours need a conversion (palette, CMYK, YCbCr, 1 to 4 bits), or
        it is compressed as JPEG, whose own header only libtiff checks before it allocates memory.

    Raises:
        BadImage: The file is a stack of frames, or breaks the rules of `decode_arrays`.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, series = file.pages.first, file.series[0]
        jpeg = page.compression in (_OLD_JPEG, _JPEG) and page.samplesperpixel in (1, 3)
        if _needs_pillow(page):
            _check_one_page(series)
            return None
        if jpeg and len(series.pages) == 1:
            return None
        check_size(*series.shape)
        for each in series.pages:
            if each is not None and page.compression in _SIZED:
                for start, count in zip(each.dataoffsets, each.databytecounts, strict=False):
                    _check_segment(each, data[start : start + count])
        return _decoded(_by_axes(series.asarray(maxworkers=1), series.axes), page)


def tiff_layout(file: BinaryIO) -> TiffLayout:
    """Returns the size of a TIFF, and whether windows of it can be read.

    Raises:
        BadImage: The file is a stack of frames, breaks the rules of `decode_arrays`, or is too large to be
            decoded whole and cannot be read by windows.
    """
    import tifffile

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        return _layout(tiff)


def decode_tiff_window(file: BinaryIO, box: Box, recall: Recall) -> DecodedImage | None:
    """Decodes a window of a TIFF.

    Args:
        file: The file, on a disk.
        box: Top, left, height and width, in the image as stored; the result is upright.
        recall: Returns tiles and strips that were decoded before.

    Returns:
        None if the whole image has to be decoded.

    Raises:
        BadImage: A tile or strip is missing or does not decode, or the image does not have this window.
    """
    import tifffile

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        layout, page, series = _layout(tiff), tiff.pages.first, tiff.series[0]
        if not layout.by_windows:
            return None
        check_inside(box, layout.height, layout.width)
        if series.dataoffset is not None:
            dtype = np.dtype(tiff.byteorder + series.dtype.char)
            pixels = read_rows(file, dtype, _as_planes(series), series.dataoffset, box)
        else:
            pages = [each for each in series.pages if each is not None]
            parts = [_read_segments(file, each, number, box, recall) for number, each in enumerate(pages)]
            pixels = np.concatenate(parts)
        return _decoded(planes_to_hwc(pixels), page)


def _layout(tiff: TiffFile) -> TiffLayout:
    page, series = tiff.pages.first, tiff.series[0]
    if not _needs_pillow(page, by_windows=True):
        height, width, channels = _by_axes(np.broadcast_to(np.uint8(0), series.shape), series.axes).shape
        if series.dataoffset is not None:
            return TiffLayout(height, width, True, (1, 1))
        if len(page.dataoffsets) < math.prod(page.chunked):
            raise BadImage("is damaged: tiles or strips are missing")
        rows, columns = _segment_shape(page)
        stored = rows * columns * page.shaped[-1] * series.dtype.itemsize
        if stored <= _LARGEST_SEGMENT and page.shaped[1] == 1:
            return TiffLayout(height, width, True, (rows, columns))
        if height * width * channels > MAX_VALUES:
            raise BadImage(
                f"{height} x {width} pixels are stored in pieces of {stored / 2**20:,.0f} MiB, which is too "
                "much for reading windows; store it in tiles: gdal_translate -co TILED=YES -co "
                "COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER IN.tif OUT.tif"
            )
    else:
        _check_one_page(series)
    height, width = page.imagelength, page.imagewidth
    check_size(height, width, page.samplesperpixel)
    if _orientation(page) >= 5:
        height, width = width, height
    return TiffLayout(height, width, False, (height, width))


def read_rows(
    file: BinaryIO, dtype: np.dtype, shape: tuple[int, int, int, int], offset: int, box: Box
) -> np.ndarray:
    """Reads a window `[P, h, w, C]` of an uncompressed array `[P, H, W, C]` that begins at `offset`.

    Raises:
        BadImage: The file is shorter than the array.
    """
    planes, height, width, samples = shape
    top, left, h, w = box
    pixel = samples * dtype.itemsize
    rows = []
    for plane in range(planes):
        for row in range(plane * height + top, plane * height + top + h):
            rows.append(os.pread(file.fileno(), w * pixel, offset + (row * width + left) * pixel))
            if len(rows[-1]) != w * pixel:
                raise BadImage("is truncated: the file ends before its pixels do")
    return np.frombuffer(b"".join(rows), dtype).reshape(planes, h, w, samples)


def _read_segments(file: BinaryIO, page: Any, number: int, box: Box, recall: Recall) -> np.ndarray:
    """Reads a window `[P, h, w, C]` of page `number` from its tiles or strips."""
    form = page.keyframe  # later pages have offsets of their own, and all else of the first one
    planes, _, height, width, samples = form.shaped
    rows, columns = _segment_shape(form)
    down, across = math.ceil(height / rows), math.ceil(width / columns)
    top, left, h, w = box
    window = np.empty((planes, h, w, samples), form.dtype)
    size = rows * columns * samples * form.dtype.itemsize
    for plane in range(planes):
        for r in range(top // rows, (top + h - 1) // rows + 1):
            for c in range(left // columns, (left + w - 1) // columns + 1):
                index = (plane * down + r) * across + c
                segment = recall((number, index), size, lambda i=index: _decode_segment(file, page, i, size))
                y, x = r * rows, c * columns  # of the segment in the image
                y0, y1 = max(y, top), min(y + segment.shape[0], top + h)
                x0, x1 = max(x, left), min(x + segment.shape[1], left + w)
                window[plane, y0 - top : y1 - top, x0 - left : x1 - left] = segment[
                    y0 - y : y1 - y, x0 - x : x1 - x
                ]
    return window


def _decode_segment(file: BinaryIO, page: Any, index: int, size: int) -> np.ndarray:
    """Decodes a tile or strip `[h, w, C]`; one that the file leaves out has the value of nodata, or 0."""
    if index >= len(page.dataoffsets):
        raise BadImage(f"is damaged: tile or strip {index} is missing")
    start, count = page.dataoffsets[index], page.databytecounts[index]
    if count > 2 * size + 2**20:
        raise BadImage(f"is damaged: tile or strip {index} has {count} bytes for {size}")
    data = os.pread(file.fileno(), count, start) if count else None
    if data is not None and len(data) != count:
        raise BadImage("is truncated: the file ends before its pixels do")
    form, options = page.keyframe, {}
    if form.compression == _JPEG:
        options = {"jpegtables": page.jpegtables, "jpegheader": form.jpegheader}
    if data is not None:
        _check_segment(page, data)
    pixels, _, shape = form.decode(data, index, **options)
    return np.full(shape[1:], form.nodata, form.dtype) if pixels is None else pixels[0]


def _check_segment(page: Any, data: bytes) -> None:
    """Refuses a tile or strip whose own header has another size than the page, before memory is allocated.

    Raises:
        BadImage: The size is larger, or is not found where the decoder might find one.
    """
    form = page.keyframe
    if not data or form.compression not in _SIZED:
        return
    stream = (form.jpegheader or b"") + data if form.compression in _JPEGS else data
    if codestream_size(stream) is None:
        raise BadImage("is damaged: a tile or strip does not say its size")
    check_codestream(stream, *_segment_shape(form))


def _segment_shape(page: Any) -> tuple[int, int]:
    """Returns height and width of a tile or strip."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def _as_planes(series: TiffPageSeries) -> tuple[int, int, int, int]:
    """Returns the shape of a series as planes, height, width and samples."""
    match series.axes, series.shape:
        case "YX", (height, width):
            return 1, height, width, 1
        case "YXS" | "YXC", (height, width, samples):
            return 1, height, width, samples
        case _, (planes, height, width):
            return planes, height, width, 1
    raise BadImage(f"axes {series.axes} of shape {series.shape} are not one image")


def _needs_pillow(page: TiffPage, *, by_windows: bool = False) -> bool:
    """Returns whether Pillow has to decode a TIFF.

    Args:
        page: The first page.
        by_windows: Whether the tiles of JPEGs are decoded on their own, as `check_codestream` makes safe.

    Raises:
        BadImage: Nothing decodes it.
    """
    photometric, bits = int(page.photometric), page.bitspersample
    plain = photometric in (_BLACK_IS_ZERO, _RGB)
    if by_windows and page.compression == _JPEG and page.samplesperpixel in (1, 3) and bits == 8:
        return not plain and photometric != _YCBCR
    if bits < 8 or (bits == 8 and not plain):
        return True
    if not plain and photometric != _WHITE_IS_ZERO:
        raise BadImage(f"{bits}-bit TIFF with photometric {photometric} is not supported")
    return page.compression == _OLD_JPEG and page.samplesperpixel in (1, 3)


def _check_one_page(series: TiffPageSeries) -> None:
    """Refuses a stack of frames of which Pillow would decode the first; reduced images are other series.

    Raises:
        BadImage: It has several pages.
    """
    if len(series.pages) > 1:
        raise _frames(series.axes, series.shape)


def _frames(axes: str, shape: tuple[int, ...]) -> BadImage:
    return BadImage(f"axes {axes} of shape {shape} are not one image: save one file per frame")


def _decoded(array: np.ndarray, page: TiffPage) -> DecodedImage:
    """Returns stored pixels `[H, W, C]` as an image: upright, with missing values and opacity marked."""
    pixels = to_supported_dtype(array)
    extras, nodata = tuple(page.extrasamples), page.tags.get(_GDAL_NODATA)
    alpha = pixels.shape[2] in (2, 4) and extras[-1:] in ((_ASSOCIATED,), (_UNASSOCIATED,))
    missing = None if nodata is None else _nodata_mask(pixels, str(nodata.value), alpha)
    if int(page.photometric) == _WHITE_IS_ZERO:
        pixels = max_value(pixels) - pixels
    if alpha and extras[-1] == _ASSOCIATED:
        pixels = _unmultiply(pixels)
    turned = _orientation(page)
    return DecodedImage(
        apply_orientation(pixels, turned),
        alpha,
        None if missing is None else apply_orientation(missing, turned),
    )


def _orientation(page: TiffPage) -> int:
    tag = page.tags.get("Orientation")
    return 1 if tag is None else int(tag.value)


def _nodata_mask(pixels: np.ndarray, nodata: str, alpha: bool) -> np.ndarray | None:
    """Returns which values are nodata, bool `[H, W, C]`; None if the declared value is not a number.

    Floats are compared one by one. In integer images nodata is often 0, which is also a valid value of one
    channel, so a pixel is missing only if all of its channels are nodata.
    """
    try:
        value = float(nodata.strip("\0 "))
    except ValueError:
        return None
    if pixels.dtype == np.float32:
        if abs(value) > np.finfo(np.float32).max:  # is infinite here, which is missing without being declared
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            return np.abs(pixels - np.float32(value)) <= np.float32(1e-6 * abs(value))
    same = pixels == value
    everywhere = same[:, :, : same.shape[2] - alpha].all(axis=2, keepdims=True)
    return np.repeat(everywhere, same.shape[2], axis=2)


def _by_axes(array: np.ndarray, axes: str) -> np.ndarray:
    match axes:
        case "YX":
            return array[:, :, None]
        case "YXS" | "YXC":
            return array
        case "SYX" | "CYX":
            return np.moveaxis(array, 0, 2)
        case "QYX" | "IYX":  # pages without a stated meaning
            return to_hwc(array)
    raise _frames(axes, array.shape)


def _unmultiply(pixels: np.ndarray) -> np.ndarray:
    colour, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
    white = max_value(pixels)
    plain = np.divide(colour, alpha, out=np.zeros(colour.shape, np.float32), where=alpha > 0) * white
    plain = plain if pixels.dtype.kind == "f" else plain.round().clip(0, white)
    return np.concatenate([plain.astype(pixels.dtype), alpha], axis=2)
