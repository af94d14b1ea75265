"""Resizes pictures to the size that a model expects, and describes how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coma.data.transforms import centre_crop, resize

ResizeMode = Literal["crop", "letterbox", "whole"]
RESIZE_MODES: dict[ResizeMode, str] = {
    "crop": "Centre crop",
    "letterbox": "Letter-box",
    "whole": "Whole picture",
}
LONGEST = 3
"""Longest side of a whole picture, as a multiple of the model's."""


@dataclass(frozen=True)
class Resized:
    """A picture at the model's size.

    Attributes:
        pixels: `[c, H, W]`, float32 in 0..1.
        content: Top, left, height and width of the picture; the rest is letter-box.
        note: Description of the resizing.
    """

    pixels: Tensor
    content: tuple[int, int, int, int]
    note: str

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Returns `image`, `[H, W, ...]`, without its letter-box."""
        top, left, height, width = self.content
        return image[top : top + height, left : left + width]


def resize_picture(
    pixels: np.ndarray, size: tuple[int, int], how: ResizeMode, fill: tuple[float, ...], unit: int = 1
) -> Resized:
    """Resizes a picture for a model.

    Args:
        pixels: `[H, W, c]`, uint8, or float32 in 0..1.
        size: Height and width of the images that the model was trained on.
        how: crop takes the largest centre crop of that shape; letterbox takes the whole picture and adds
            bars; whole keeps the aspect ratio, and the picture is at least as large as `size`.
        fill: Colour of the bars, per channel, in 0..1: the model's mean.
        unit: Side of a mask unit; no side of a whole picture is smaller.
    """
    height, width = pixels.shape[:2]
    if how == "crop":
        image = _scaled(pixels, centre_crop(height, width, size), *size)
        return Resized(image, (0, 0, *size), f"centre crop, resized to {size[1]} x {size[0]} px")
    everything = (0, 0, height, width)
    if how == "whole":
        least, most = max(size[0] / height, size[1] / width), LONGEST * max(size) / max(height, width)
        scale = min(least, most)
        h, w = (max(round(length * scale), unit) for length in (height, width))
        return Resized(_scaled(pixels, everything, h, w), (0, 0, h, w), f"resized to {w} x {h} px")
    scale = min(size[0] / height, size[1] / width)
    h, w = (max(round(length * scale), 1) for length in (height, width))
    image = _scaled(pixels, everything, h, w)
    down, across = size[0] - h, size[1] - w
    top, left = down // 2, across // 2
    colour = torch.tensor(fill).view(-1, 1, 1)
    boxed = F.pad(image - colour, (left, across - left, top, down - top)) + colour
    note = f"resized to {w} x {h} px and letter-boxed to {size[1]} x {size[0]} px (bars are not measured)"
    return Resized(boxed, (top, left, h, w), note)


def _scaled(pixels: np.ndarray, box: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    image = resize(pixels, box, height, width)
    return image.float() / 255 if image.dtype == torch.uint8 else image.clamp(0, 1)
