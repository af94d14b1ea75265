"""Groups of near-duplicates: images that are linked by pairs of at least a given similarity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from downstream.search.neighbours import Neighbours
from downstream.search.vectors import unit

NEIGHBOURS = 32
"""Neighbours of each image that are looked at first; images with as many near ones are then compared."""
_CHUNK = 512
"""Most images of a group that are compared at a time."""
_ROUNDING = 0.01
"""Radians that an angle between two similar vectors in float32 may be wrong by, and more."""


@dataclass(frozen=True)
class Group:
    """Images that are linked, in the order of the file.

    Attributes:
        members: Positions of the images.
        similarities: The similarity of each member to its most similar image of the group.
    """

    members: list[int]
    similarities: list[float]


def duplicate_groups(values: np.ndarray, neighbours: Neighbours, least: float) -> list[Group]:
    """Returns the groups of images that are linked by pairs of at least `least`, the most similar first.

    Args:
        values: Unit vectors, float32 `[n, c]`.
        neighbours: The nearest neighbours of every image.
        least: Smallest cosine similarity of a pair.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(neighbours.indices)
    least -= 1e-6  # products are rounded
    near = (neighbours.similarities >= least) & (neighbours.indices >= 0)
    rows, columns = np.nonzero(near)
    pairs = (np.ones(len(rows), np.int8), (rows, neighbours.indices[rows, columns]))
    _, labels = connected_components(coo_matrix(pairs, shape=(n, n)), directed=False)
    labels = _joined(values, labels, np.flatnonzero(near.all(axis=1)), least)
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


def _joined(values: np.ndarray, labels: np.ndarray, crowded: np.ndarray, least: float) -> np.ndarray:
    """Joins the groups that are linked by pairs beyond the neighbours that were looked at.

    All neighbours of both images of such a pair are near. So only these images are compared, in chunks of one
    group, and only where two chunks are not too far apart: by the triangle inequality, the angle between two
    images is at least that between the means of their chunks, less the radii of the chunks.

    Args:
        values: Unit vectors, float32 `[n, c]`.
        labels: Group of every image, int `[n]`.
        crowded: Positions of the images whose neighbours are all near.
        least: Smallest cosine similarity of a pair.

    Returns:
        The group of every image, int `[n]`.
    """
    crowded = crowded[np.argsort(labels[crowded], kind="stable")]
    groups = np.split(crowded, np.flatnonzero(np.diff(labels[crowded])) + 1)
    chunks = [group[at : at + _CHUNK] for group in groups for at in range(0, len(group), _CHUNK)]
    if len(chunks) < 2:
        return labels
    means = unit(np.stack([values[chunk].mean(axis=0) for chunk in chunks]), "features")
    radii = [(values[chunk] @ mean).min() for chunk, mean in zip(chunks, means, strict=True)]
    radii = np.arccos(np.clip(radii, -1, 1)) + _ROUNDING
    of_chunk = before = labels[[chunk[0] for chunk in chunks]]
    for number, chunk in enumerate(chunks):
        apart = np.arccos((means @ means[number]).clip(-1, 1)) - radii - radii[number]
        close = (apart <= np.arccos(least)) & (of_chunk != of_chunk[number])
        for other in np.flatnonzero(close[:number]).tolist():
            if (
                of_chunk[other] != of_chunk[number]
                and (values[chunk] @ values[chunks[other]].T).max() >= least
            ):
                of_chunk = np.where(of_chunk == of_chunk[other], of_chunk[number], of_chunk)
    joined = np.arange(len(labels))
    joined[before] = of_chunk
    return joined[labels]
