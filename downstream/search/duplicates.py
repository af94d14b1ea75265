"""Groups of near-duplicates: images that are linked by pairs of at least a given similarity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from downstream.search.neighbours import Neighbours

NEIGHBOURS = 32
"""Neighbours of each image that are looked at: enough to link a group of any size."""


@dataclass(frozen=True)
class Group:
    """Images that are linked, in the order of the file.

    Attributes:
        members: Positions of the images.
        similarities: The similarity of each member to its most similar image of the group.
    """

    members: list[int]
    similarities: list[float]


def duplicate_groups(neighbours: Neighbours, least: float) -> list[Group]:
    """Returns the groups of images that are linked by pairs of at least `least`, the most similar first.

    Args:
        neighbours: The nearest neighbours of every image.
        least: Smallest cosine similarity of a pair.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(neighbours.indices)
    near = (neighbours.similarities >= least - 1e-6) & (neighbours.indices >= 0)  # products are rounded
    rows, columns = np.nonzero(near)
    pairs = (np.ones(len(rows), np.int8), (rows, neighbours.indices[rows, columns]))
    _, labels = connected_components(coo_matrix(pairs, shape=(n, n)), directed=False)
    closest = np.where(near, neighbours.similarities, -1).max(axis=1, initial=-1)
    np.maximum.at(closest, neighbours.indices[rows, columns], neighbours.similarities[rows, columns])
    linked = np.flatnonzero(np.bincount(labels)[labels] > 1)
    order = linked[np.argsort(labels[linked], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    groups = [
        Group(members.tolist(), closest[members].tolist())
        for members in np.split(order, starts[1:])
        if len(members)
    ]
    return sorted(groups, key=lambda group: -max(group.similarities))
