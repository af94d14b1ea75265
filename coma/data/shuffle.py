"""The order of the images and the seed of every sample: pure functions of (run seed, stream position).

The stream is infinite: epoch after epoch, each a permutation of the n images. Position s of the stream is
image `permuted_indices(seed, s // n, s % n, n)` with the seed `sample_seeds(seed, s)`; with r augmented
repeats, s // r selects the image. There is no generator state and no stored permutation, so every process can
start anywhere: the state of the loader is one integer, and an epoch over a billion images costs no memory.

Random numbers are those of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", figure 17): value i of a key is `splitmix64(splitmix64(key) + (i + 1) * GOLDEN)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ORDER, _CROP = 0x6F72646572, 0x63726F70  # purposes of a key: independent numbers for each
_WORD = (1 << 64) - 1
_ROUNDS = 8


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


def sample_indices(n: int, limit: int) -> list[int]:
    """Returns up to `limit` of n indices, spread over all of them; always the same ones."""
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
