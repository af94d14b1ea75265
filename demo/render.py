"""Turns arrays into pictures: masked views, error maps, overlays."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

SHOWN = 512
"""Longer side, in pixels, that small pictures are enlarged to."""
HIDDEN = (128, 134, 148)
"""Colour of masked pixels."""
PALETTE = np.array(
    [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
     (86, 180, 233), (213, 94, 0), (240, 228, 66), (153, 153, 153)], np.uint8,
)  # fmt: skip
"""Okabe and Ito's palette, which is safe for colour-blind people."""
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


def ring(picture: np.ndarray, row: float, col: float) -> np.ndarray:
    """Returns the picture with a ring around a position, 0 to 1 from the top and from the left."""
    image = Image.fromarray(picture)
    y, x = row * picture.shape[0], col * picture.shape[1]
    draw = ImageDraw.Draw(image)
    for radius, colour in ((11, (0, 0, 0)), (9, (255, 255, 255)), (7, (0, 0, 0))):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
    return np.asarray(image)


def colour_indices(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Returns the colours, uint8 `[n, 3]`, of the indices `[H, W]`."""
    return colours[values % len(colours)]
