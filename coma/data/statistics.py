"""Per-channel mean and deviation of a data set, from a sample of its images.

Every image counts the same, whatever its size, as it does in training, where all crops have one size.
Values that were missing and filled do not count.
Sums are kept in float64 and added in a fixed order: the same numbers for any number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coma.data.channels import convert_channels, scale_to_unit
from coma.data.pixel_values import Values, check_mixture, check_pixels, say_filled, values_of
from coma.data.shuffle import sample_indices
from coma.data.sources.base import Source
from coma.data.worker_pool import map_ordered
from coma.errors import BadImage, BadInput

_CHUNK = 16
_AT_LEAST = 256  # large JPEGs may be measured on a reduced image


def compute_mean_std(
    source: Source, channels: int, limit: int = 1000, workers: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels scaled to 0..1 (float data: as they are).

    How many images hold missing values is logged.

    Args:
        source: the images; those that will not decode are passed over.
        channels: as the model takes them.
        limit: number of images looked at, spread over the source, the same ones every time.
        workers: processes that decode; default as in training.

    Raises:
        BadInput: no image decodes, images are of units that do not go together, or a channel is constant and
            could not be normalised.
    """
    chosen = sample_indices(len(source), limit)
    chunks = [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]
    sums = _Sums(channels)
    for each in map_ordered(_Measure(source, channels), chunks, workers):
        sums.add(each)
    used = len(sums.ranges)
    if not used:
        raise BadInput(
            f"{source.location}: none of {len(chosen)} images could be used; the first: {sums.failure}"
        )
    check_mixture(source.location, sums.ranges)
    say_filled(source, sums.filled, used, sums.missing / used)
    mean, squares = sums.total / used, sums.squares
    variance = squares / used - mean**2
    constant = [c + 1 for c in range(channels) if variance[c] <= 1e-12 * mean[c] ** 2]
    if constant:
        which = f"channel {', '.join(map(str, constant))} of {channels}"
        raise BadInput(
            f"{source.location}: {which} has the same value in all pixels of {used} images, so there is "
            "nothing to learn from it (give --mean and --std to train nevertheless)"
        )
    return tuple(mean.tolist()), tuple(math.sqrt(v) for v in variance.tolist())


class _Sums:
    def __init__(self, channels: int) -> None:
        self.total, self.squares = np.zeros(channels), np.zeros(channels)
        self.ranges: list[Values] = []  # one for each image that could be used
        self.filled, self.missing = 0, 0.0  # images with missing values, and the shares of those added up
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
        for index in indices:
            name = self.source.describe(index)
            try:
                picture = self.source.decode(index, min_side=_AT_LEAST)
                pixels = convert_channels(picture, self.channels, name)
            except BadImage as error:
                sums.failure = sums.failure or str(error)
                continue
            check_pixels(pixels, None, None, lambda name=name: name)
            values = scale_to_unit(pixels).reshape(-1, self.channels).astype(np.float64)
            there = np.ones((1, 1), bool)
            if picture.missing is not None:
                sums.filled, sums.missing = sums.filled + 1, sums.missing + float(picture.missing.mean())
                there = ~picture.missing.reshape(len(values), -1)
                if there.shape[1] != self.channels:  # converted from other channels
                    there = there.all(axis=1, keepdims=True)
                there = there | ~there.any(axis=0)  # where nothing is left, what was filled
            mean, square = (each.mean(axis=0, where=there) for each in (values, np.square(values)))
            contrast = math.sqrt(max((square - mean**2).max(), 0))
            sums.ranges.append(values_of(pixels, name, contrast))
            sums.total, sums.squares = sums.total + mean, sums.squares + square
        return sums
