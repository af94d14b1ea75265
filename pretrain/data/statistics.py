"""Per-channel mean and deviation of a data set, from a sample of its images.

Every image counts the same, whatever its size, as it does in training, where all crops have one size.
Sums are kept in float64 and added in a fixed order: the same numbers for any number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pretrain.data.channels import unit_scale
from pretrain.data.order import shuffled
from pretrain.data.source import Source
from pretrain.data.workers import in_workers
from pretrain.errors import BadImage, BadInput

_CHUNK = 16
_AT_LEAST = 256  # large JPEGs may be measured on a reduced image


def measure(
    source: Source, channels: int, limit: int = 1000, workers: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels scaled to 0..1 (float data: as they are).

    Args:
        source: the images; those that will not decode are passed over.
        channels: as the model takes them.
        limit: number of images looked at, spread over the source, the same ones every time.
        workers: processes that decode; default as in training.

    Raises:
        BadInput: no image decodes, or a channel is constant and could not be normalised.
    """
    count = min(limit, len(source))
    chosen = shuffled(0, np.zeros(count, np.int64), np.arange(count), len(source)).tolist()
    chunks = [chosen[i : i + _CHUNK] for i in range(0, count, _CHUNK)]
    used, total, squares, failure = 0, np.zeros(channels), np.zeros(channels), ""
    for each, sums, sums_of_squares, failed in in_workers(_Sums(source, channels), chunks, workers):
        used, total, squares = used + each, total + sums, squares + sums_of_squares
        failure = failure or failed
    if not used:
        raise BadInput(f"{source.location}: none of {count} images could be used; the first: {failure}")
    mean = total / used
    variance = squares / used - mean**2
    constant = [c + 1 for c in range(channels) if variance[c] <= 1e-12 * mean[c] ** 2]
    if constant:
        which = f"channel {', '.join(map(str, constant))} of {channels}"
        raise BadInput(
            f"{source.location}: {which} has the same value in all pixels of {used} images, so there is "
            "nothing to learn from it (give --mean and --std to train nevertheless)"
        )
    return tuple(mean.tolist()), tuple(math.sqrt(v) for v in variance.tolist())


@dataclass(frozen=True)
class _Sums:
    source: Source
    channels: int

    def __call__(self, indices: list[int]) -> tuple[int, np.ndarray, np.ndarray, str]:
        used, total, squares, failure = 0, np.zeros(self.channels), np.zeros(self.channels), ""
        for index in indices:
            try:
                pixels = unit_scale(self.source.read(index, self.channels, at_least=_AT_LEAST))
            except BadImage as error:
                failure = failure or str(error)
                continue
            values = pixels.reshape(-1, self.channels).astype(np.float64)
            used += 1
            total += values.mean(axis=0)
            squares += np.square(values).mean(axis=0)
        return used, total, squares, failure
