"""The order of the images and the seed of every sample: pure functions of (run seed, stream position).

The stream is infinite: epoch after epoch, each a permutation of the n images. Position s of the stream is
image `permuted_indices(seed, s // n, s % n, n)` with the seed `sample_seeds(seed, s)`; with r augmented
repeats, s // r selects the image. There is no generator state and no stored permutation, so every process can
start anywhere: the state of the loader is one integer, and an epoch over a billion images costs no memory.

Images that are read together (those of a parquet file's row group) are shuffled in two steps, see `Blocks`.

Random numbers are those of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", figure 17): value i of a key is `splitmix64(splitmix64(key) + (i + 1) * GOLDEN)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ORDER, _CROP = 0x6F72646572, 0x63726F70  # purposes of a key: independent numbers for each
_WORD = (1 << 64) - 1
_ROUNDS = 8
_WINDOW = 1024
"""Minimum number of images of a window of `Blocks`."""
_SAMPLED_BLOCKS = 8
"""Blocks that a sample of the images is taken from."""


def sample_seeds(seed: int, positions: np.ndarray) -> np.ndarray:
    """Returns the seeds of the samples at `positions [b]` of a run's stream, int64 `[b]`."""
    return _values(splitmix64(seed & _WORD), positions).view(np.int64)


def permuted_indices(seed: int, epoch: np.ndarray, rank: np.ndarray, n: int) -> np.ndarray:
    """Returns the image at position `rank [b]` (0..n-1) of each `epoch [b]`: int64 `[b]`.

    Each epoch is a permutation: a balanced Feistel network over the smallest power of 4 that is at least n,
    applied repeatedly until the result is below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", sections 4 and 3). It has at least 64 values, because networks over 16 values do not give all
    orders of 4 images equally often.
    """
    half = np.uint64(max((n - 1).bit_length() + 1, 6) // 2)
    low = np.uint64((1 << int(half)) - 1)
    epoch_keys = _values(splitmix64((seed ^ _ORDER) & _WORD), epoch)
    place = rank.astype(np.uint64)
    todo = np.arange(len(place))
    while len(todo):
        left, right = place[todo] >> half, place[todo] & low
        for step in range(_ROUNDS):
            key = epoch_keys[todo] + np.uint64(GOLDEN * step & _WORD)
            left, right = right, left ^ (_mix(_mix(key) + right * np.uint64(GOLDEN)) & low)
        place[todo] = left << half | right
        todo = todo[place[todo] >= n]
    return place.astype(np.int64)


class _Epoch(NamedTuple):
    """The order of blocks in one epoch."""

    blocks: np.ndarray
    """Block at each place, int64 `[g]`."""
    ends: np.ndarray
    """Number of images up to and including each place, int64 `[g]`."""
    windows: np.ndarray
    """Number of images before each window, and of all, int64 `[w + 1]`."""


class Blocks:
    """Images in blocks that are read as a whole, and an order that reads few blocks at a time.

    In every epoch the blocks are permuted. Consecutive ones form windows of at least `_WINDOW` images, and
    the images of a window are permuted. So a batch has images of few blocks, and a reader that keeps the
    blocks of one window reads each of them once.

    Args:
        sizes: Number of images in each block, int64 `[g]`, none of them 0.
    """

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes.astype(np.int64)
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def __getstate__(self) -> dict[str, np.ndarray]:
        return {"sizes": self.sizes}

    def __setstate__(self, state: dict[str, np.ndarray]) -> None:
        self.__init__(state["sizes"])

    @cached_property
    def starts(self) -> np.ndarray:
        """First image of every block, int64 `[g]`."""
        return self.sizes.cumsum() - self.sizes

    def indices(self, seed: int, epoch: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Returns the images at position `rank [b]` of each `epoch [b]`, as `permuted_indices` does."""
        found = np.empty(len(rank), np.int64)
        for number in np.unique(epoch).tolist():
            order = self._epoch(seed, number)
            window = np.searchsorted(order.windows, rank, "right") - 1
            for w in np.unique(window[epoch == number]).tolist():
                here = (epoch == number) & (window == w)
                start, end = order.windows[w : w + 2].tolist()
                key = np.full(here.sum(), (number << 32) + w + 1)
                place = start + permuted_indices(~seed, key, rank[here] - start, end - start)
                at = np.searchsorted(order.ends, place, "right")
                block = order.blocks[at]
                found[here] = self.starts[block] + place - (order.ends[at] - self.sizes[block])
        return found

    def _epoch(self, seed: int, number: int) -> _Epoch:
        if (seed, number) not in self._epochs:
            count = len(self.sizes)
            blocks = permuted_indices(seed, np.full(count, number), np.arange(count), count)
            ends = self.sizes[blocks].cumsum()
            windows = [0]
            while windows[-1] < ends[-1]:
                last = np.searchsorted(ends, windows[-1] + _WINDOW)
                windows.append(int(ends[min(last, count - 1)]))
            if len(self._epochs) > 1:  # a batch may lie in two epochs
                self._epochs.clear()
            self._epochs[seed, number] = _Epoch(blocks, ends, np.array(windows))
        return self._epochs[seed, number]

    def sample(self, limit: int) -> list[int]:
        """Returns up to `limit` images of `_SAMPLED_BLOCKS` blocks, or of more if these have too few."""
        n = int(self.sizes.sum())
        if limit >= n:
            return list(range(n))
        chosen: list[int] = []
        for done, block in enumerate(self._epoch(0, 0).blocks.tolist()):
            first, size = int(self.starts[block]), int(self.sizes[block])
            count = min(-(-(limit - len(chosen)) // max(_SAMPLED_BLOCKS - done, 1)), size)
            chosen += [first + i * size // count for i in range(count)]
            if len(chosen) == limit:
                break
        return chosen


def sample_indices(n: int, limit: int, blocks: Blocks | None = None) -> list[int]:
    """Returns up to `limit` of n indices, spread over all of them or few blocks; always the same ones."""
    if blocks is not None:
        return blocks.sample(limit)
    count = min(limit, n)
    return permuted_indices(0, np.zeros(count, np.int64), np.arange(count), n).tolist()


def uniforms(sample_seed: int) -> Iterator[float]:
    """Yields random numbers in [0, 1), of 53 bits each, for the crop and flip of one sample."""
    state = splitmix64((sample_seed ^ _CROP) & _WORD)
    while True:
        state = state + GOLDEN & _WORD
        yield (splitmix64(state) >> 11) * 2.0**-53


def splitmix64(x: int) -> int:
    """Returns the splitmix64 hash of a 64-bit integer."""
    x = (x ^ x >> 30) * _MULTIPLIERS[0] & _WORD
    x = (x ^ x >> 27) * _MULTIPLIERS[1] & _WORD
    return x ^ x >> 31


def _values(key: int, counters: np.ndarray) -> np.ndarray:
    steps = counters.astype(np.uint64) + np.uint64(1)
    return _mix(np.full(steps.shape, key, np.uint64) + steps * np.uint64(GOLDEN))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ x >> np.uint64(30)) * np.uint64(_MULTIPLIERS[0])
    x = (x ^ x >> np.uint64(27)) * np.uint64(_MULTIPLIERS[1])
    return x ^ x >> np.uint64(31)
