"""Reconstructs one picture with several models from the same mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from coma.errors import BadInput
from coma.masking.patchify import unit_grid
from demo.masking import METHODS, mask_picture
from demo.models import Model, Models
from demo.reconstruction import Reconstruction, reconstruct
from demo.resize import resize_picture

FEWEST, MOST = 2, 4
COMPARABLE = {key: each for key, each in METHODS.items() if not each.degrades and key != "brush"}
"""Methods that only mask: degraded pixels depend on the size of the model."""


def comparable(models: Models) -> list[Model]:
    """Returns the models that reconstruct any mask of a picture that is not degraded."""
    return [each for each in models.having("reconstructor") if not each.undoes and not each.zooms_in]


def compare_models(
    models: Sequence[Model],
    pixels_of: Callable[[int], np.ndarray],
    method: str,
    seed: int,
    ratio: float,
) -> list[Reconstruction]:
    """Reconstructs the centre crop of a picture with each model.

    The mask is drawn on the coarsest grid of mask units, for the model that has it; models of finer grids
    get each of its units as several of theirs.

    Args:
        models: Models to compare.
        pixels_of: Returns the picture, `[H, W, channels]`, for a number of channels.
        method: Key of `COMPARABLE`.
        seed: Seed of the mask.
        ratio: Mask ratio, for methods that take one.

    Raises:
        BadInput: too few or too many models, or grids that do not align.
    """
    if not FEWEST <= len(models) <= MOST:
        raise BadInput(f"Choose {FEWEST} to {MOST} models, not {len(models)}.")
    runtimes = [each.runtime("reconstructor") for each in models]
    rules = [each.spec.preprocessing for each in runtimes]
    sizes = [each.size or (224, 224) for each in rules]
    pictures = [
        resize_picture(pixels_of(len(rule.mean)), size, "crop", rule.mean)
        for rule, size in zip(rules, sizes, strict=True)
    ]
    grids = [unit_grid(*size, each.spec.unit) for size, each in zip(sizes, runtimes, strict=True)]
    coarsest = min(range(len(models)), key=lambda number: grids[number])
    for model, grid, (height, width) in zip(models, grids, sizes, strict=True):
        _check_grid(model, grid, grids[coarsest], same_shape=height * sizes[0][1] == width * sizes[0][0])
    mask = mask_picture(models[coarsest], pictures[coarsest], method, seed, ratio).visible
    return [
        reconstruct(runtime, picture, _refined(mask, grid))
        for runtime, picture, grid in zip(runtimes, pictures, grids, strict=True)
    ]


def _check_grid(model: Model, grid: tuple[int, int], coarsest: tuple[int, int], *, same_shape: bool) -> None:
    if not same_shape or grid[0] % coarsest[0] or grid[1] % coarsest[1]:
        raise BadInput(
            f"{model.name} masks {grid[0]} x {grid[1]} units of a picture, which do not align with the "
            f"{coarsest[0]} x {coarsest[1]} units of another model; choose models of aligned mask units."
        )


def _refined(visible: Tensor, grid: tuple[int, int]) -> Tensor:
    # v h w -> v, grid
    rows, cols = (fine // coarse for fine, coarse in zip(grid, visible.shape[1:], strict=True))
    return visible.repeat_interleave(rows, dim=1).repeat_interleave(cols, dim=2)
