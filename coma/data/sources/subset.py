"""Some images of a source: as many as a quick look needs, or a part that is held out."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from coma.data.image import DecodedImage, MinSide
from coma.data.sources.base import Source


class Subset(Source):
    """Images `indices [m]` of a source, in this order; labels and class names are the source's.

    Args:
        source: Where they come from.
        indices: int64 `[m]`, at least one.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        labels = source.labels
        super().__init__(source.location, None if labels is None else labels[indices], source.class_names)
        self.unlabelled_reason, self.labels_are_stored = source.unlabelled_reason, source.labels_are_stored
        self.split, self.notes, self.inventory = source.split, source.notes, source.inventory
        self._source = source
        self._indices = torch.from_numpy(indices.astype(np.int64))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._indices)

    def describe(self, i: int) -> str:
        """The image's name in the source."""
        return self._source.describe(int(self._indices[i]))

    def listing(self) -> tuple[list[str], list[int]]:
        """Names and sizes of these images; see `Source.listing`."""
        names, sizes = self._source.listing()
        chosen = self._indices.tolist()
        return [names[i] for i in chosen], [sizes[i] for i in chosen]

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """The decoded image; see `Source.decode`."""
        return self._source.decode(int(self._indices[i]), min_side)

    def read_bytes(self, i: int) -> bytes | None:
        """The image's file content, if there is a file; see `Source.encoded`."""
        return self._source.read_bytes(int(self._indices[i]))


def balanced_subset(source: Source, most: int, seed: int = 0) -> Source:
    """At most `most` labelled images, as many of each class as there are; the same for the same seed.

    Args:
        source: With labels.
        most: 0 takes all images.
        seed: Of the draw.
    """
    labels = source.labels
    if labels is None or not 0 < most < len(source):
        return source
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = labels[order]
    ranks = np.empty(len(labels), np.int64)  # of an image among those of its class
    for label in np.unique(labels):
        members = drawn == label
        ranks[members] = np.arange(members.sum())
    chosen = order[np.argsort(ranks, kind="stable")[:most]]
    return Subset(source, np.sort(chosen))


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draws a share of every class, bool `[n]`, rounded down, but at least one image of a class that has two.

    Args:
        labels: int64 `[n]`.
        share: above 0 and below 1.
        seed: the same labels and seed give the same images.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    drawn = labels.cpu()[order]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in drawn.unique():
        members = order[drawn == label]
        chosen[members[: max(math.floor(len(members) * share + 1e-9), len(members) > 1)]] = True
    return chosen.to(labels.device)
