"""Decodes arrays: NPY files and 16-bit PNG; and the rules for all arrays, which TIFF and DICOM follow too.

Arrays follow two rules; everything else is refused:

    axes    2-D is `[H, W]`. In 3-D the axis of at most 16 is the channels: last (HWC) or first (CHW).
            If both or neither are that short, the shape is ambiguous.
    values  uint8 and uint16 are counts up to white; bool is black and white; floats are used as they
            are, in any range (the measured mean and std bring them to scale).
"""

from __future__ import annotations

import io
import math
from typing import BinaryIO

import numpy as np

from coma.data.image import DecodedImage
from coma.errors import BadImage

MAX_CHANNELS = 16


def decode_npy(data: bytes) -> DecodedImage:
    """Decodes an image saved with `numpy.save`.

    Raises:
        BadImage: The array has Python objects, or breaks the rules above.
    """
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return DecodedImage(to_supported_dtype(to_hwc(array)))


def npy_layout(file: BinaryIO) -> tuple[tuple[int, int, int, int], np.dtype, bool]:
    """Returns the form of an array: planes, height, width and samples; its dtype; whether it lies in rows.

    The file is left at the first value.

    Raises:
        BadImage: The array breaks the rules above.
        ValueError: The file is damaged.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    height, width, channels = to_hwc(np.broadcast_to(np.uint8(0), shape)).shape
    to_supported_dtype(np.empty(0, dtype))
    start = file.tell()
    if file.seek(0, 2) - start < math.prod(shape) * dtype.itemsize:
        raise BadImage("is truncated: the file ends before its pixels do")
    file.seek(start)
    planar = len(shape) == 3 and shape[2] != channels
    planes = (channels, height, width, 1) if planar else (1, height, width, channels)
    return planes, dtype, not by_columns


def decode_png16(data: bytes) -> DecodedImage:
    """Decodes a PNG of 16 bits per channel to uint16 `[H, W, C]`."""
    import imagecodecs

    array = imagecodecs.png_decode(data)
    pixels = array[:, :, None] if array.ndim == 2 else array
    return DecodedImage(pixels, alpha=pixels.shape[2] in (2, 4))


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
