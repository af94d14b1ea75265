"""Nearest neighbours by cosine similarity.

One query is compared with every image, a part of the file at a time: exact, whatever the size. The neighbours
of all images come from faiss: up to `EXACT` images all pairs are compared; beyond that an HNSW graph finds
nearly all of them in a fraction of the time (Malkov and Yashunin 2016, arXiv 1603.09320).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from coma.preflight import require_packages
from downstream.features.files import Rows

EXACT = 20_000
"""Most images of which all pairs are compared."""
_LINKS, _CANDIDATES = 32, 128
"""Links of a node of the HNSW graph, and candidates that are kept while it is built and searched."""
_BLOCK = 1 << 14
"""Images that are searched for at a time."""


@dataclass(frozen=True)
class Hit:
    """An image that is near the query."""

    file: int
    path: str
    similarity: float


def nearest(
    parts: Iterable[tuple[int, Rows]], query: np.ndarray, most: int, without: tuple[int, str] | None = None
) -> list[Hit]:
    """Returns the images that are most similar to a query, the nearest first; of equals, the earlier one.

    Args:
        parts: Position of a file, and some of its rows as unit vectors.
        query: Unit vector `[c]`.
        most: Number of images.
        without: File and path of the query itself, if it is one of the images.
    """
    best: list[Hit] = []
    for number, rows in parts:
        similarity = rows.values @ query
        order = np.argsort(-similarity, kind="stable")[: most + 1]
        hits = [Hit(number, rows.paths[i], float(similarity[i])) for i in order.tolist()]
        best += [hit for hit in hits if (hit.file, hit.path) != without]
        best = sorted(best, key=lambda hit: -hit.similarity)[:most]
    return best


@dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of every image, without itself.

    Attributes:
        indices: int64 `[n, k]`, the nearest first; -1 where there is none.
        similarities: Cosine similarities, float32 `[n, k]`.
        exact: Whether all pairs were compared.
    """

    indices: np.ndarray
    similarities: np.ndarray
    exact: bool


def neighbours_of_all(values: np.ndarray, count: int, exact_up_to: int = EXACT) -> Neighbours:
    """Returns the `count` nearest neighbours of every image.

    Args:
        values: Unit vectors, float32 `[n, c]`.
        count: Number of neighbours; fewer where there are not as many images.
        exact_up_to: Most images of which all pairs are compared.

    Raises:
        ModuleNotFoundError: faiss is missing; `coma.cli` says what to install.
    """
    require_packages("faiss")
    import faiss

    n, width = values.shape
    count = min(count, n - 1)
    exact = n <= exact_up_to
    if exact:
        index = faiss.IndexFlatIP(width)
    else:
        index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _CANDIDATES
        index.hnsw.efSearch = max(_CANDIDATES, 2 * count)
    index.add(values)  # type: ignore[call-arg]  # faiss replaces the method, with numpy's arrays
    found = [_search(index, values, at, count) for at in range(0, n, _BLOCK)]
    return Neighbours(
        np.concatenate([indices for indices, _ in found]),
        np.concatenate([similarities for _, similarities in found]).clip(-1, 1),
        exact,
    )


def _search(index: object, values: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and similarities of the neighbours of a block of images, without the images."""
    block = values[start : start + _BLOCK]
    similarities, indices = index.search(block, count + 1)  # type: ignore[attr-defined]
    own = indices == np.arange(start, start + len(block))[:, None]
    own[~own.any(axis=1), -1] = True  # hidden by equals of it: the last one goes in its place
    shape = (len(block), count)
    return indices[~own].reshape(shape), similarities[~own].reshape(shape)
