"""Mask units: the squares of an image that are shown or hidden as a whole.

A unit is `unit x unit` pixels; an image of H x W pixels has a grid of h x w units. The pure functions
here go back and forth between pixels and units, and between units and the tokens of a stage:

    images  [b, c, h*unit, w*unit]   <->   units  [b, h, w, unit*unit*c]   (pixels of a unit, row by row)
    unit map [b, h, w, ...]           ->   token map [b, h*side, w*side, ...]   (side tokens per unit edge)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, unit: int) -> Tensor:
    """Cut images `[b, c, h*unit, w*unit]` into units `[b, h, w, unit*unit*c]`."""
    return rearrange(images, "b c (h p) (w q) -> b h w (p q c)", p=unit, q=unit)


def unpatchify(units: Tensor, unit: int) -> Tensor:
    """Put units `[b, h, w, unit*unit*c]` back together as images `[b, c, h*unit, w*unit]`."""
    return rearrange(units, "b h w (p q c) -> b c (h p) (w q)", p=unit, q=unit)


def pad_to_units(images: Tensor, unit: int) -> Tensor:
    """Pad `[b, c, H, W]` with zeros (the mean colour) at the right and bottom to whole units."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, cover(width, unit) * unit - width, 0, cover(height, unit) * unit - height))


def cover(length: int, side: int) -> int:
    """Returns how many pieces of `side` cover `length`: their quotient, rounded up.

    Written for exported graphs too: their whole-number division rounds towards zero, so none is negative,
    and a size that is always computed in this one way is known to be equal to itself.
    """
    return (length + side - 1) // side


def unit_grid(height: int, width: int, unit: int) -> tuple[int, int]:
    """Returns rows and columns of units that cover an image of `height x width` pixels."""
    return cover(height, unit), cover(width, unit)


def mask_of(listed: Tensor, rows: int, cols: int) -> Tensor:
    """Returns the mask of a list of units: int64 `[s]` to bool `[rows, cols]`, true where listed."""
    mask = torch.zeros(rows * cols, dtype=torch.bool, device=listed.device)
    return mask.index_fill(0, listed, True).view(rows, cols)


def spread(unit_map: Tensor, side: int) -> Tensor:
    """Give every token its unit's value: `[b, h, w, ...]` -> `[b, h*side, w*side, ...]`."""
    return unit_map.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
