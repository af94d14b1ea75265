"""A decoded image: its pixels, the limit of its size, and its orientation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from coma.errors import BadImage

MAX_PIXELS = 178_956_970
"""Larger images are refused; this is Pillow's own limit for decompression bombs."""

MAX_VALUES = 3 * MAX_PIXELS
"""Images of more values are refused."""

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

MinSide = int | Callable[[int, int], int]
"""The smallest side to which a JPEG may be reduced while decoding; see `decode.decode`."""


class DecodedImage(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """`[H, W, C]` uint8, uint16 or float32."""
    alpha: bool = False
    """Whether the last channel is opacity."""
    missing: np.ndarray | None = None
    """bool `[H, W, C]`: values that the file marks as missing; None if there are none."""


def check_size(*shape: int) -> None:
    """Refuses sizes of damaged or hostile headers before memory is allocated for them.

    Raises:
        BadImage: The shape has more than `MAX_VALUES` values.
    """
    if math.prod(shape) > MAX_VALUES:
        size = " x ".join(map(str, shape))
        raise BadImage(f"{size} values are more than the limit of {MAX_VALUES} (a decompression bomb?)")


def check_inside(box: Box, height: int, width: int) -> None:
    """Refuses a window that an image of this size does not have.

    Raises:
        BadImage: The window ends outside.
    """
    top, left, h, w = box
    if top + h > height or left + w > width:
        raise BadImage(f"the image has {height} x {width} pixels now; it has changed since it was listed")


def planes_to_hwc(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels `[P, H, W, C]`, where P or C is 1, as `[H, W, P * C]`."""
    _, height, width, _ = pixels.shape
    return np.moveaxis(pixels, 0, 2).reshape(height, width, -1)


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns upright pixels; `orientation` is 1 to 8 as in the EXIF standard, section 4.6.4."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
