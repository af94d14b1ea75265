"""From decoded pixels to the input of a model: resizing as its specification says, and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coma.data.transforms import centre_crop, normalize, resize, stack
from coma.runtimes.model_spec import Preprocessing


def resize_image(
    pixels: np.ndarray, preprocessing: Preprocessing, size: tuple[int, int] | None = None
) -> Tensor:
    """Resizes pixels `[H, W, c]` to `size` (height, width), or as the preprocessing specifies.

    Returns:
        `[c, h, w]` uint8, or float32 in 0..1 for images with more than 8 bits.
    """
    height, width = pixels.shape[:2]
    whole = (0, 0, height, width)
    if preprocessing.crops:
        shown = size or preprocessing.size or (height, width)
        return resize(pixels, centre_crop(height, width, shown), *shown)
    image = resize(pixels, whole, height, width)
    limits = preprocessing.size if preprocessing.resize == "keep-ratio" else None
    return _bilinear(image, *(size or (fit_within(height, width, limits) if limits else (height, width))))


def fit_within(height: int, width: int, sides: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size of the same ratio whose shorter and longer side are at most `sides` pixels.

    No side is below 1 pixel.
    """
    short, long = sides
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def _bilinear(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    out = F.interpolate(image[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
    return out.round().to(torch.uint8) if image.dtype == torch.uint8 else out


def to_input(images: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Returns the input `images` `[b, c, h, w]` made from images `[c, h, w]` of one size."""
    if preprocessing.normalize_in_graph:
        return torch.stack([i if i.dtype == torch.uint8 else (i * 255).round().byte() for i in images])
    return normalize(stack(images), preprocessing.mean, preprocessing.std)
