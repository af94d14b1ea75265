"""Subsets of a source: a limited number of images, or a held-out share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coma.data.image import DecodedImage, MinSide
from coma.data.shuffle import Blocks
from coma.data.sources.base import Source


class Subset(Source):
    """Images `indices [m]` of a source, in this order, with its labels and class names.

    Args:
        source: All images.
        indices: int64 `[m]`, at least one.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        super().__init__(source.location, class_names=source.class_names)
        self._describe_as(source, indices)
        self._source = source
        self._indices = torch.from_numpy(indices.astype(np.int64))
        self.index = source.index
        if source.blocks is not None and (np.diff(indices) > 0).all():
            counts = np.bincount(np.searchsorted(source.blocks.starts, indices, "right") - 1)
            self.blocks = Blocks(counts[counts > 0])

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._indices)

    def describe(self, i: int) -> str:
        """Returns the name of an image in the source."""
        return self._source.describe(int(self._indices[i]))

    def label_place(self, i: int) -> str:
        """Returns where the label of an image is written; see `Source.label_place`."""
        return self._source.label_place(int(self._indices[i]))

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns names and sizes of these images; see `Source.listing`."""
        names, sizes = self._source.listing()
        chosen = self._indices.tolist()
        return [names[i] for i in chosen], [sizes[i] for i in chosen]

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """Returns a decoded image; see `Source.decode`."""
        return self._source.decode(int(self._indices[i]), min_side)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Prepares images that are read next; see `Source.prefetch`."""
        self._source.prefetch(self._indices[list(indices)].tolist())

    def read_bytes(self, i: int) -> bytes | None:
        """Returns the content of an image file; see `Source.read_bytes`."""
        return self._source.read_bytes(int(self._indices[i]))


def balanced_subset(source: Source, limit: int, seed: int = 0) -> Source:
    """Returns at most `limit` images of a labelled source, spread as evenly as possible over its classes.

    Args:
        source: Labelled images.
        limit: Number of images; 0 for all.
        seed: Random seed of the choice.
    """
    labels = source.labels
    if labels is None or not 0 < limit < len(source):
        return source
    order = np.random.default_rng(seed).permutation(len(labels))
    ranks, _ = _ranks_in_class(labels[order])
    chosen = order[np.argsort(ranks, kind="stable")[:limit]]
    return Subset(source, np.sort(chosen))


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Returns the images to hold out, bool `[n]`: a random share of every class.

    The number per class is rounded down, but at least 1 if the class has two images. Of images with any
    number of classes, a share of all is drawn.

    Args:
        labels: int64 `[n]`, or `[n, classes]` for any number of classes per image.
        share: Above 0 and below 1.
        seed: Random seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    drawn = (labels if labels.ndim == 1 else labels.new_zeros(len(labels))).cpu()[order]
    ranks, counts = _ranks_in_class(drawn.numpy())
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order] = torch.from_numpy(ranks < np.maximum(np.floor(counts * share + 1e-9), counts > 1))
    return chosen.to(labels.device)


def _ranks_in_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of earlier images of every image's class, and of all of them, both int64 `[n]`."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[np.argsort(classes, kind="stable")] = np.arange(len(labels)) - np.repeat(
        np.cumsum(counts) - counts, counts
    )
    return ranks, counts[classes]
