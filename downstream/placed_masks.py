"""Masks of objects that take no more memory than the objects, however large the picture is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from downstream.datasets.drawn import mask_box


class PlacedMask(NamedTuple):
    """A mask cut to the box of its object.

    Attributes:
        left: First column of the box.
        top: First row of the box.
        pixels: The mask inside the box, bool `[h, w]`.
    """

    left: int
    top: int
    pixels: np.ndarray

    def moved(self, left: int, top: int) -> PlacedMask:
        """Returns the mask moved `left` columns to the right and `top` rows down."""
        return PlacedMask(self.left + left, self.top + top, self.pixels)

    def whole(self, height: int, width: int) -> np.ndarray:
        """Returns the mask of the whole picture, bool `[height, width]`."""
        mask = np.zeros((height, width), dtype=bool)
        bottom, right = self.top + self.pixels.shape[0], self.left + self.pixels.shape[1]
        mask[self.top : bottom, self.left : right] = self.pixels
        return mask


def cut(mask: np.ndarray) -> PlacedMask:
    """Returns a mask, bool `[H, W]`, cut to the box of its true pixels."""
    left, top, right, bottom = mask_box(mask)
    return PlacedMask(left, top, mask[top:bottom, left:right].copy())
