"""Decodes scientific rasters: TIFF of any depth and number of channels, NPY arrays, 16-bit PNG.

Arrays follow two rules; everything else is refused:

    axes    2-D is `[H, W]`. In 3-D the axis of at most 16 is the channels: last (HWC) or first (CHW).
            If both or neither are that short, the shape is ambiguous.
    values  uint8 and uint16 are counts up to white; bool is black and white; floats are used as they
            are, in any range (the measured mean and std bring them to scale).

Values that a GeoTIFF declares as nodata are marked as missing.
"""

from __future__ import annotations

import io

import numpy as np

from coma.data.image import DecodedImage, apply_orientation, check_size
from coma.errors import BadImage

MAX_CHANNELS = 16

_ASSOCIATED, _UNASSOCIATED = 1, 2  # TIFF 6.0, ExtraSamples: premultiplied and ordinary opacity
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # TIFF 6.0, PhotometricInterpretation
_JPEG = (6, 7)  # TIFF 6.0, Compression
_GDAL_NODATA = 42113  # a number as text, for all channels


def decode_npy(data: bytes) -> DecodedImage:
    """Decodes an image saved with `numpy.save`.

    Raises:
        BadImage: The array has Python objects, or breaks the rules above.
    """
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return DecodedImage(to_supported_dtype(to_hwc(array)))


def decode_png16(data: bytes) -> DecodedImage:
    """Decodes a PNG of 16 bits per channel to uint16 `[H, W, C]`."""
    import imagecodecs

    array = imagecodecs.png_decode(data)
    pixels = array[:, :, None] if array.ndim == 2 else array
    return DecodedImage(pixels, alpha=pixels.shape[2] in (2, 4))


def decode_tiff(data: bytes) -> DecodedImage | None:
    """Decodes a TIFF as stored: any depth, up to 16 channels in one page, in planes or in pages.

    Returns:
        None if Pillow should decode it: its colours need a conversion (palette, CMYK, YCbCr, 1 to 4 bits), or
        it is compressed as JPEG, whose own header only libtiff checks before it allocates memory.

    Raises:
        BadImage: The file is a stack of frames, or breaks the rules above.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        photometric = int(page.photometric)
        plain = photometric in (_BLACK_IS_ZERO, _RGB)
        if page.bitspersample < 8 or (page.bitspersample == 8 and not plain):
            return None
        if page.compression in _JPEG and page.samplesperpixel in (1, 3):
            return None
        if not plain and photometric != _WHITE_IS_ZERO:
            raise BadImage(f"{page.bitspersample}-bit TIFF with photometric {photometric} is not supported")
        series = file.series[0]
        check_size(*series.shape)
        array = series.asarray(maxworkers=1)
        axes, extras = series.axes, tuple(page.extrasamples)
        tag, nodata = page.tags.get("Orientation"), page.tags.get(_GDAL_NODATA)
    pixels = to_supported_dtype(_by_axes(array, axes))
    alpha = pixels.shape[2] in (2, 4) and extras[-1:] in ((_ASSOCIATED,), (_UNASSOCIATED,))
    missing = None if nodata is None else _nodata_mask(pixels, str(nodata.value), alpha)
    if photometric == _WHITE_IS_ZERO:
        pixels = max_value(pixels) - pixels
    if alpha and extras[-1] == _ASSOCIATED:
        pixels = _unmultiply(pixels)
    turned = int(tag.value) if tag is not None else 1
    return DecodedImage(
        apply_orientation(pixels, turned),
        alpha,
        None if missing is None else apply_orientation(missing, turned),
    )


def to_hwc(array: np.ndarray) -> np.ndarray:
    """Returns an array `[H, W]`, `[H, W, C]` or `[C, H, W]` as `[H, W, C]`.

    Raises:
        BadImage: The shape is ambiguous.
    """
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise BadImage(f"shape {array.shape} is not that of one image: [H, W], [H, W, C] or [C, H, W]")
    first, last = array.shape[0] <= MAX_CHANNELS, array.shape[2] <= MAX_CHANNELS
    if first == last:
        raise BadImage(
            f"shape {array.shape} does not say which axis is the channels: "
            f"exactly one of the first and the last must be at most {MAX_CHANNELS}"
        )
    return array if last else np.moveaxis(array, 0, 2)


def to_supported_dtype(array: np.ndarray) -> np.ndarray:
    """Returns the same values as uint8, uint16 or float32.

    Raises:
        BadImage: The values are complex, or signed or wider integers, whose white is unknown.
    """
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(">u2")):
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)
    raise BadImage(f"{array.dtype} pixels are not supported: save them as uint8, uint16 or float32")


def max_value(pixels: np.ndarray) -> int:
    """Returns the value that means 1.0: 255, 65535, or 1 for floats."""
    return 1 if pixels.dtype.kind == "f" else int(np.iinfo(pixels.dtype).max)


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
    raise BadImage(f"axes {axes} of shape {array.shape} are not one image: save one file per frame")


def _unmultiply(pixels: np.ndarray) -> np.ndarray:
    colour, alpha = pixels[:, :, :-1], pixels[:, :, -1:]
    white = max_value(pixels)
    plain = np.divide(colour, alpha, out=np.zeros(colour.shape, np.float32), where=alpha > 0) * white
    plain = plain if pixels.dtype.kind == "f" else plain.round().clip(0, white)
    return np.concatenate([plain.astype(pixels.dtype), alpha], axis=2)
