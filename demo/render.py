"""Turns arrays into pictures: masked views, error maps, overlays."""

from __future__ import annotations

import numpy as np
from PIL import Image

SHOWN = 512
"""Longer side, in pixels, that small pictures are enlarged to."""
HIDDEN = (128, 134, 148)
"""Colour of masked pixels."""
WORST = 0.5
"""Error, in 0..1, at which the heat map saturates."""


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Converts `[H, W, c]` in 0..1 to uint8 `[H, W, 3]`: the first three channels, or the first as grey."""
    colours = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    return (colours.clip(0, 1) * 255).round().astype(np.uint8)


def cover(picture: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Returns the picture, uint8 `[H, W, 3]`, with its `hidden` pixels, bool `[H, W]`, blank."""
    return np.where(hidden[..., None], np.array(HIDDEN, np.uint8), picture)


def heat_map(error: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Returns errors, `[H, W]` in 0..1, as colours from black to yellow; blank outside `where`."""
    from matplotlib import colormaps

    colours = colormaps["inferno"](np.clip(error / WORST, 0, 1))[..., :3]
    return cover((colours * 255).round().astype(np.uint8), ~where)


def overlay(picture: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Returns the picture with a non-negative map `[h, w]` overlaid; the largest value is brightest."""
    from matplotlib import colormaps

    height, width = picture.shape[:2]
    scaled = (strength / max(float(strength.max()), 1e-12)).astype(np.float32)
    large = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.NEAREST))
    colours = colormaps["inferno"](large)[..., :3] * 255
    share = 0.25 + 0.6 * large[..., None]
    return (picture * 0.75 * (1 - share) + colours * share).round().clip(0, 255).astype(np.uint8)


def enlarge(picture: np.ndarray, to: int = SHOWN, *, blocks: bool = False) -> np.ndarray:
    """Enlarges a picture until its longer side has at least `to` pixels.

    Args:
        picture: uint8 `[H, W, 3]`; larger pictures are returned unchanged.
        to: Longer side in pixels.
        blocks: Keep the hard edges of masks and feature maps.
    """
    height, width = picture.shape[:2]
    scale = to / max(height, width)
    if scale <= 1:
        return picture
    how = Image.Resampling.NEAREST if blocks else Image.Resampling.BICUBIC
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(picture).resize(size, how))


def colour_indices(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Returns the colours, uint8 `[n, 3]`, of the indices `[H, W]`."""
    return colours[values % len(colours)]
