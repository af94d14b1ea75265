"""Images as the exported files take them: read, resized as the file says, normalised or left as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coma.data.sources.base import EncodedSource, Source, read_at
from coma.data.transforms import centre_square, normalize, resize, stack
from coma.runtimes.model_spec import Preprocessing

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
"""Files of scikit-image's data folder."""


class Photographs(EncodedSource):
    """Photographs that came with an ordinary dependency: what is verified on where no images are given."""

    def __init__(self) -> None:
        import skimage

        super().__init__(Path(skimage.__file__).parent / "data")

    def __len__(self) -> int:
        """Number of photographs."""
        return len(PHOTOGRAPHS)

    def describe(self, i: int) -> str:
        """The file."""
        return str(self.location / PHOTOGRAPHS[i])

    def read_bytes(self, i: int) -> bytes:
        """The file's content."""
        path = self.location / PHOTOGRAPHS[i]
        return read_at(path, 0, path.stat().st_size, path.name)


def open_images(place: Path | None, *, held_out: bool = False) -> Source:
    """The images at `place` (a folder, one with a folder for each class, .npz, .tar), or the photographs.

    Of a folder with splits they are the training images, or, if `held_out`, those of test or val.

    Raises:
        BadInput: nothing there that can be read.
    """
    from coma.data.sources.open import open_source

    return Photographs() if place is None else open_source(place, held_out=held_out)


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `count`, evenly spaced, the first and the last among them."""
    most = min(most, count)
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def resized(pixels: np.ndarray, preprocessing: Preprocessing, size: tuple[int, int] | None = None) -> Tensor:
    """Pixels `[H, W, c]` at the size that the rule gives, or at `size` (height, width) pixels.

    Returns:
        `[c, h, w]` uint8, or float32 in 0..1 of images with more than 8 bits.
    """
    height, width = pixels.shape[:2]
    whole = (0, 0, height, width)
    if preprocessing.resize == "centre-square":
        side = size or preprocessing.size or (height, width)
        box = centre_square(height, width) if side[0] == side[1] else whole
        return resize(pixels, box, *side)
    image = resize(pixels, whole, height, width)
    limits = preprocessing.size if preprocessing.resize == "keep-ratio" else None
    return _bilinear(image, *(size or (fit_within(height, width, limits) if limits else (height, width))))


def fit_within(height: int, width: int, sides: tuple[int, int]) -> tuple[int, int]:
    """The largest size in proportion whose shorter and longer side are at most `sides`, in pixels."""
    short, long = sides
    scale = min(long / max(height, width), short / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _bilinear(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    out = F.interpolate(image[None].float(), (height, width), mode="bilinear", align_corners=False)[0]
    return out.round().to(torch.uint8) if image.dtype == torch.uint8 else out


def as_input(images: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Images `[c, h, w]` of one size, as read, to the input `images` `[b, c, h, w]`."""
    if preprocessing.normalize_in_graph:
        return torch.stack([i if i.dtype == torch.uint8 else (i * 255).round().byte() for i in images])
    return normalize(stack(images), preprocessing.mean, preprocessing.std)
