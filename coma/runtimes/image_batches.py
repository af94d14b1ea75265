"""The images of a source as batches of a model's input, read and resized by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from coma.data.image import MinSide
from coma.data.pixel_values import check_pixels
from coma.data.sources.base import Source
from coma.data.worker_pool import map_ordered
from coma.errors import BadInput
from coma.runtimes.model_spec import ModelSpec, Preprocessing
from coma.runtimes.preprocessing import fit_within, resize_image


@dataclass(frozen=True)
class ImageBatch:
    """Images that a model can be given, and those that cannot be read.

    Attributes:
        images: Tensors `[c, h, w]`, resized and not normalised: what `preprocessing.to_input` takes.
        indices: Position of each image in the source.
        failures: One line for each image that was skipped.
    """

    images: list[Tensor]
    indices: list[int]
    failures: list[str]


@dataclass(frozen=True)
class Resize:
    """Resizes pixels `[H, W, c]` as a model's specification says, to `size` (height, width) where given."""

    preprocessing: Preprocessing
    size: tuple[int, int] | None = None

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Returns `[c, h, w]` uint8, or float32 for images of more than 8 bits."""
        return resize_image(pixels, self.preprocessing, self.size)

    def min_side(self, height: int, width: int) -> int:
        """Returns the smallest side to which a JPEG may be reduced while it is decoded."""
        size = self.size or self.preprocessing.size
        if size is None:
            return 0
        if self.preprocessing.resize == "keep-ratio" and not self.size:
            size = fit_within(height, width, size)
        return max(size)


def image_batches(
    source: Source,
    parts: Iterable[range],
    *,
    channels: int,
    resize: Callable[[np.ndarray], Tensor],
    preprocessing: Preprocessing,
    min_side: MinSide = 0,
    workers: int | None = None,
) -> Generator[ImageBatch, None, None]:
    """Yields one batch for every range of images of a source, in order; unreadable images are skipped.

    Close the iterator to stop its workers early.

    Args:
        source: Images.
        parts: Positions in the source; images of different sizes need ranges of one image.
        channels: Number of channels that the model takes; see `convert_channels`.
        resize: Returns what the model is shown of pixels `[H, W, c]`; picklable, such as `Resize`.
        preprocessing: Mean and standard deviation, which have to fit the pixels.
        min_side: Smallest side to which a JPEG may be reduced while it is decoded; see `decode`.
        workers: Number of processes; 0 reads in this process, None chooses by the number of cores.
    """
    return map_ordered(_Reader(source, channels, resize, preprocessing, min_side), parts, workers)


def channels_of(spec: ModelSpec) -> int:
    """Returns the number of channels of the images that a model takes."""
    return int(spec.inputs[0].axes[1])


@dataclass(frozen=True)
class _Reader:
    source: Source
    channels: int
    resize: Callable[[np.ndarray], Tensor]
    preprocessing: Preprocessing
    min_side: MinSide

    def __call__(self, part: range) -> ImageBatch:
        mean, std = self.preprocessing.mean, self.preprocessing.std
        images, indices, failures = [], [], []
        self.source.prefetch(part)
        for i in part:
            try:
                pixels = self.source.read(i, self.channels, self.min_side)
                check_pixels(pixels, mean, std, lambda i=i: self.source.describe(i), fixed=True)
            except BadInput as error:
                failures.append(str(error))
                continue
            images.append(self.resize(pixels))
            indices.append(i)
        return ImageBatch(images, indices, failures)
