"""Arrays to pictures for people: what a view sees, errors in colour, and a size that can be looked at."""

from __future__ import annotations

import numpy as np
from PIL import Image

SHOWN = 512
"""Pixels that the longer side of a small picture is enlarged to."""
HIDDEN = (128, 134, 148)
"""Colour of what a view does not see."""
WORST = 0.5
"""Error, in 0..1, from which on the heat map does not get brighter."""


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Pixels `[H, W, c]` in 0..1 to uint8 `[H, W, 3]`: the first three channels, or the first as grey."""
    colours = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    return (colours.clip(0, 1) * 255).round().astype(np.uint8)


def cover(picture: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """A picture uint8 `[H, W, 3]` whose `hidden` pixels, bool `[H, W]`, are blank."""
    return np.where(hidden[..., None], np.array(HIDDEN, np.uint8), picture)


def heat_map(error: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Errors `[H, W]` in 0..1 as colours from black over red to yellow; blank outside of `where`."""
    from matplotlib import colormaps

    colours = colormaps["inferno"](np.clip(error / WORST, 0, 1))[..., :3]
    return cover((colours * 255).round().astype(np.uint8), ~where)


def overlay(picture: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """A picture with a map `[h, w]` of values from 0 laid over it, the largest one brightest."""
    from matplotlib import colormaps

    height, width = picture.shape[:2]
    scaled = (strength / max(float(strength.max()), 1e-12)).astype(np.float32)
    large = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.NEAREST))
    colours = colormaps["inferno"](large)[..., :3] * 255
    share = 0.25 + 0.6 * large[..., None]
    return (picture * 0.75 * (1 - share) + colours * share).round().clip(0, 255).astype(np.uint8)


def enlarge(picture: np.ndarray, to: int = SHOWN, *, blocks: bool = False) -> np.ndarray:
    """Bring the longer side of uint8 `[H, W, 3]` to at least `to` pixels.

    Args:
        picture: Any size; a larger one is left alone.
        to: Pixels.
        blocks: Keep hard edges, as masks and maps have them.
    """
    height, width = picture.shape[:2]
    scale = to / max(height, width)
    if scale <= 1:
        return picture
    how = Image.Resampling.NEAREST if blocks else Image.Resampling.BICUBIC
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(picture).resize(size, how))


def colour_indices(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Whole numbers `[H, W]` as the colours, uint8 `[n, 3]`, of the same numbers."""
    return colours[values % len(colours)]
