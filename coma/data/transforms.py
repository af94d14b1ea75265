"""Crops, resizes, stacks and normalises images.

All kinds of images use one resampler: torch's antialiased bicubic, which has a fast integer path for uint8
(six times Pillow's speed on one core) and takes any number of channels. Results are clamped to the range of
the source pixels, so 16-bit and float data do not ring below black.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coma.data.channels import scale_to_unit
from coma.data.image import Box

RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop, over that of the size it is resized to (Szegedy et al. 2015, "Going
deeper with convolutions", section 6)."""


def random_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    draws: Iterator[float],
    size: tuple[int, int] = (1, 1),
) -> Box:
    """Returns a random crop: `scale` limits its share of the area, `RATIO` its shape.

    After ten failed tries it is the largest centred box of an allowed shape, the usual completion of the
    sampling of Szegedy et al. 2015, section 6. Less of an image fits into elongated crops; their shares are
    smaller by as much as the largest of them is smaller than the largest square (this project's own), or few
    tries would succeed.

    Args:
        height: Height of the image.
        width: Width of the image.
        scale: Smallest and largest share of the image's area.
        draws: Random numbers between 0 and 1.
        size: Height and width that crops are resized to.
    """
    shape = size[1] / size[0]
    low, high = (ratio * shape for ratio in RATIO)
    square, fitting = min(height, width) ** 2, min(height, width / shape) * min(width, height * shape)
    whole = height * width * min(fitting / square, 1)
    for _ in range(10):
        area = whole * (scale[0] + (scale[1] - scale[0]) * next(draws))
        ratio = math.exp(math.log(low) + (math.log(high) - math.log(low)) * next(draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = next(draws), next(draws)
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    ratio = min(max(width / height, low), high)
    w = max(min(width, round(height * ratio)), 1)
    h = max(min(height, round(width / ratio)), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def scaled_box(box: Box, full: Sequence[int], reduced: Sequence[int]) -> Box:
    """Returns the box for an image that was reduced from height and width `full` to `reduced`."""
    if full[0] == reduced[0] and full[1] == reduced[1]:
        return box
    (top, bottom), (left, right) = (
        (round(start * small / large), round((start + length) * small / large))
        for start, length, large, small in zip(box[:2], box[2:], full, reduced, strict=False)
    )
    return top, left, max(bottom - top, 1), max(right - left, 1)


def centre_crop(height: int, width: int, size: tuple[int, int] = (1, 1)) -> Box:
    """Returns the largest centred box whose sides are as `size`, height and width: by default a square."""
    rows, cols = size
    h = max(min(height, round(width * rows / cols)), 1)
    w = max(min(width, round(height * cols / rows)), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, box: Box, height: int, width: int) -> Tensor:
    """Crops `box` from `[H, W, C]` and resizes it to uint8 or float32 (16-bit scaled to 0..1) `[C, h, w]`."""
    top, left, h, w = box
    part = pixels[top : top + h, left : left + w]
    part = np.array(part, order="C") if part.dtype == np.uint8 else scale_to_unit(np.ascontiguousarray(part))
    image = torch.from_numpy(part).permute(2, 0, 1)
    if (h, w) == (height, width):
        return image
    out = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    if out.dtype == torch.uint8:
        return out
    return out.clamp_(image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True))


def stack(images: Sequence[Tensor]) -> Tensor:
    """Stacks images `[C, h, w]` into one batch; uint8 among floats is scaled to 0..1."""
    if all(image.dtype == torch.uint8 for image in images):
        return torch.stack(tuple(images))
    return torch.stack([image.div(255) if image.dtype == torch.uint8 else image for image in images])


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Returns float32 `[B, C, H, W]` of zero mean and unit standard deviation, on the images' device.

    Args:
        images: uint8, or floats that are already scaled to 0..1.
        mean: Mean per channel, of pixels scaled to 0..1.
        std: Standard deviation per channel, of pixels scaled to 0..1.
    """
    shape = (-1, 1, 1)
    scaled = images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.to(torch.float32)
    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    return (scaled - mean) / torch.as_tensor(std, dtype=torch.float32, device=images.device).view(shape)
