"""Mean and standard deviation per channel, measured on a sample of the images.

Every image has the same weight, whatever its size, as in training, where all crops have one size. Filled
missing values are not counted. Sums are in float64 and added in a fixed order, so the result is the same for
any number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coma.data.channels import convert_channels, scale_to_unit
from coma.data.pixel_values import PixelRange, check_pixels, check_same_unit, log_filled, pixel_range
from coma.data.shuffle import sample_indices
from coma.data.sources.base import Source
from coma.data.worker_pool import map_ordered
from coma.errors import BadImage, BadInput
from coma.ranges import STD

_CHUNK = 16
_MIN_SIDE = 256  # large JPEGs may be measured at a reduced scale


def compute_mean_std(
    source: Source, channels: int, limit: int = 1000, workers: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel, of integer pixels scaled to 0..1 or of float pixels.

    The number of images with missing values is logged.

    Args:
        source: Images; those that do not decode are skipped.
        channels: Number of channels of the model's input.
        limit: Number of images to measure, spread over the source; always the same ones.
        workers: Processes that decode; by default as in training.

    Raises:
        BadInput: No image decodes, images are in different units, or a channel is constant, so that it cannot
            be normalised.
    """
    chosen = sample_indices(len(source), limit, source.blocks)
    chunks = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
    sums = _Sums(channels)
    for each in map_ordered(_Measure(source, channels), chunks, workers):
        sums.add(each)
    used = len(sums.ranges)
    if not used:
        raise BadInput(
            f"{source.location}: none of {len(chosen)} images could be used; the first: {sums.failure}"
        )
    check_same_unit(source.location, sums.ranges)
    log_filled(source, sums.filled, used, sums.missing / used)
    mean, squares = sums.total / used, sums.squares
    variance = squares / used - mean**2
    constant = [c + 1 for c in range(channels) if variance[c] <= max(1e-12 * mean[c] ** 2, STD.low**2)]
    if constant:
        which = f"channel {', '.join(map(str, constant))} of {channels}"
        raise BadInput(
            f"{source.location}: {which} has the same value in all pixels of {used} images, so there is "
            "nothing to learn from it (give --mean and --std to train anyway)"
        )
    return tuple(mean.tolist()), tuple(math.sqrt(v) for v in variance.tolist())


class _Sums:
    def __init__(self, channels: int) -> None:
        self.total, self.squares = np.zeros(channels), np.zeros(channels)
        self.ranges: list[PixelRange] = []  # of each image that could be used
        self.filled, self.missing = 0, 0.0  # images with missing values, and the sum of their shares
        self.failure = ""

    def add(self, other: _Sums) -> None:
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.ranges += other.ranges
        self.filled, self.missing = self.filled + other.filled, self.missing + other.missing
        self.failure = self.failure or other.failure


@dataclass(frozen=True)
class _Measure:
    source: Source
    channels: int

    def __call__(self, indices: list[int]) -> _Sums:
        sums = _Sums(self.channels)
        self.source.prefetch(indices)
        for index in indices:
            name = self.source.describe(index)
            try:
                image = self.source.decode(index, min_side=_MIN_SIDE)
                pixels = convert_channels(image, self.channels, name)
            except BadImage as error:
                sums.failure = sums.failure or str(error)
                continue
            check_pixels(pixels, None, None, lambda name=name: name)
            values = scale_to_unit(pixels).reshape(-1, self.channels).astype(np.float64)
            present = np.ones((1, 1), bool)
            if image.missing is not None:
                sums.filled, sums.missing = sums.filled + 1, sums.missing + float(image.missing.mean())
                present = ~image.missing.reshape(len(values), -1)
                if present.shape[1] != self.channels:  # converted from other channels
                    present = present.all(axis=1, keepdims=True)
                present = present | ~present.any(
                    axis=0
                )  # a channel without any present value uses the filled ones
            mean, square = (each.mean(axis=0, where=present) for each in (values, np.square(values)))
            contrast = math.sqrt(max((square - mean**2).max(), 0))
            sums.ranges.append(pixel_range(pixels, name, contrast))
            sums.total, sums.squares = sums.total + mean, sums.squares + square
        return sums
