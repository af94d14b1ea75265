"""A map of the images: similar ones lie near each other (t-SNE, van der Maaten and Hinton 2008).

scikit-learn computes it, from the first principal components and from their first two as a start, so that the
same file gives the same map. umap-learn is not used: it needs numba, which follows new versions of Python and
NumPy late.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coma.preflight import require_packages

_COMPONENTS = 50
_PERPLEXITY = 30.0
_FEWEST = 5
"""Images below which t-SNE has nothing to tell apart: their principal components are the map."""


def map_positions(values: np.ndarray) -> np.ndarray:
    """Returns places in the unit square, float64 `[n, 2]`, that are the same in every call.

    Args:
        values: Unit vectors `[n, c]`.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; `coma.cli` says what to install.
    """
    require_packages("sklearn")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, width = values.shape
    components = min(_COMPONENTS, n, width)
    reduced = values.astype(np.float64)
    reduced -= reduced.mean(axis=0)
    if np.abs(reduced).max(initial=0) < 1e-6:  # all alike
        return np.full((n, 2), 0.5)
    reduced = PCA(components, random_state=0, svd_solver="full").fit_transform(reduced)
    reduced = np.pad(reduced, ((0, 0), (0, max(2 - components, 0))))
    if n >= _FEWEST:
        reduced = TSNE(
            perplexity=min(_PERPLEXITY, (n - 1) / 3), init=_start(reduced), random_state=0, n_jobs=1
        ).fit_transform(reduced)
    low, high = reduced[:, :2].min(axis=0), reduced[:, :2].max(axis=0)
    return (reduced[:, :2] - low) / np.where(high > low, high - low, 1)


def _start(reduced: np.ndarray) -> Any:
    """Returns the first two components, scaled as scikit-learn scales its own start."""
    first = reduced[:, :2].astype(np.float32)
    return first / max(first[:, 0].std(), 1e-9) * 1e-4


def grid_cells(positions: np.ndarray, across: int, reach: int = 6) -> np.ndarray:
    """Returns column and row of a free cell near every place, int64 `[n, 2]`; -1 where there is none.

    Args:
        positions: Places in the unit square `[n, 2]`.
        across: Cells of the grid in each direction.
        reach: Cells by which an image may be moved at most.
    """
    steps = np.arange(-reach, reach + 1)
    moves = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    free = np.ones((across, across), bool)
    cells = np.full((len(positions), 2), -1)
    exact = positions * across - 0.5
    home = exact.round().astype(np.int64).clip(0, across - 1)
    for i in np.argsort(np.linalg.norm(exact - home, axis=1), kind="stable").tolist():
        near = home[i] + moves
        near = near[((near >= 0) & (near < across)).all(axis=1)]
        near = near[free[near[:, 0], near[:, 1]]]
        if len(near):
            cells[i] = near[np.linalg.norm(near - exact[i], axis=1).argmin()]
            free[cells[i, 0], cells[i, 1]] = False
    return cells
