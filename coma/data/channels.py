"""Converts images to the number of channels that a model takes.

Only 1 and 3 channels are converted: grey is repeated, transparency is composed over white, colour becomes
luminance. All other numbers must match exactly (4 takes RGBA or four bands as stored).
"""

from __future__ import annotations

import numpy as np

from coma.data.decode_arrays import max_value
from coma.data.image import DecodedImage
from coma.errors import BadImage

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, section 2.5.1


def convert_channels(image: DecodedImage, channels: int, name: str) -> np.ndarray:
    """Returns pixels `[H, W, channels]` in the dtype of the image.

    Raises:
        BadImage: The image has another number of channels, and no conversion is defined.
    """
    pixels = image.pixels
    if pixels.shape[2] == channels:
        return pixels
    if channels in (1, 3):
        if image.alpha:
            pixels = _over_white(pixels)
        if pixels.shape[2] == channels:
            return pixels
        if pixels.shape[2] == 1:
            return np.repeat(pixels, channels, axis=2)
        if pixels.shape[2] == 3:
            red, green, blue = (pixels[:, :, c, None] * _LUMA[c] for c in range(3))
            return _as(pixels.dtype, red + green + blue)
    have = image.pixels.shape[2]
    raise BadImage(
        f"{name}: {have} channels, but the model takes {channels}; `coma pretrain --channels {have}` trains "
        "one that takes such images"
    )


def scale_to_unit(pixels: np.ndarray) -> np.ndarray:
    """Returns integer pixels as float32 in 0..1, and float pixels unchanged."""
    return pixels if pixels.dtype == np.float32 else pixels.astype(np.float32) / np.float32(max_value(pixels))


def _over_white(pixels: np.ndarray) -> np.ndarray:
    white = np.float32(max_value(pixels))
    colour, alpha = pixels[:, :, :-1].astype(np.float32), pixels[:, :, -1:].astype(np.float32) / white
    return _as(pixels.dtype, white - (white - colour) * alpha)


def _as(dtype: np.dtype, values: np.ndarray) -> np.ndarray:
    return values.astype(dtype) if dtype.kind == "f" else values.round().astype(dtype)
