"""An order of the images in which every class has its turn, as often as every other.

Class-aware sampling (Shen, Lin, Huang 2016, arXiv 1512.05830): classes are drawn in turn, and of a class its
images in turn. Here, position p of the order belongs to round p // k of k classes. Every round has all
classes, in an order of its own, and draw t of a class with m images is image t % m of its permutation t // m.
All of it follows from the run's seed and the position, as in `shuffle`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coma.data.shuffle import permuted_indices, splitmix64

_CLASS = 0x636C617373  # makes these random numbers independent of those of other orders


class ClassSampler:
    """Draws every class equally often.

    With any number of classes per image, an image has the turns of all its classes, and images without a
    class have turns of their own, as if that was a class. A class without images has none.

    Args:
        labels: int64 `[n]`, or `[n, classes]` of 0 and 1 for any number of classes per image.
    """

    def __init__(self, labels: Tensor) -> None:
        if labels.ndim == 1:
            classes, images = labels.sort(stable=True)
        else:
            bare = (labels.sum(dim=1, keepdim=True) == 0).to(labels.dtype)
            classes, images = torch.cat([labels, bare], dim=1).T.nonzero(as_tuple=True)
        self._images = images.contiguous()  # those of the first class, then those of the second, ...
        self._counts = classes.unique_consecutive(return_counts=True)[1]

    @property
    def counts(self) -> Tensor:
        """Number of images that have the turns of each class, int64 `[k]`."""
        return self._counts

    def indices(self, seed: int, places: np.ndarray) -> np.ndarray:
        """Returns the images at `places [b]` of the order, int64 `[b]`."""
        counts = self._counts.numpy()
        starts = counts.cumsum() - counts
        rounds = places // len(counts)
        turn = permuted_indices(seed ^ _CLASS, rounds, places % len(counts), len(counts))
        found = np.empty(len(places), np.int64)
        for number in np.unique(turn).tolist():
            here, count = turn == number, int(counts[number])
            own = splitmix64((seed ^ _CLASS) + number & (1 << 64) - 1)
            rank = permuted_indices(own, rounds[here] // count, rounds[here] % count, count)
            found[here] = self._images.numpy()[starts[number] + rank]
        return found
