"""Windows over a token map, as pure functions.

    map [b, h, w, ...]  ->  windows [b*rows*cols, wh*ww, ...]      (row-major, from the top-left corner)

A map that is not a whole number of windows is padded at the right and bottom; padding is a group of its
own, which no token of the map attends to, so it never changes a result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MASKED = -1e4
"""Added to the score of a forbidden pair: exp(-1e4) is exactly 0 in every float type; finite, so that
fp16 and exported graphs stay free of NaN."""

_PADDING = -2  # group of padding; -1 is taken by units that no view sees


def fit(window: int, h: int, w: int) -> tuple[int, int]:
    """Sides of the window on a map of h x w tokens: 0, or anything larger than the map, is global."""
    return min(window or h, h), min(window or w, w)


def split(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a map `[b, h, w, ...]` into windows `[b*rows*cols, wh*ww, ...]`, padding it with zeros."""
    x = _pad(x, window, 0)
    return rearrange(x, "b (rows wh) (cols ww) ... -> (b rows cols) (wh ww) ...", wh=window[0], ww=window[1])


def merge(windows: Tensor, window: tuple[int, int], h: int, w: int) -> Tensor:
    """Put windows back together as a map `[b, h, w, ...]`; the inverse of `split`."""
    rows, cols = -(-h // window[0]), -(-w // window[1])
    x = rearrange(
        windows,
        "(b rows cols) (wh ww) ... -> b (rows wh) (cols ww) ...",
        rows=rows, cols=cols, wh=window[0], ww=window[1],
    )  # fmt: skip
    return x[:, :h, :w]


def same_group_bias(group: Tensor, window: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What to add to attention scores so that tokens attend only inside their own group.

    Args:
        group: Group of every token, int64 `[b, h, w]`.
        window: Sides of the window in tokens.
        dtype: Of the queries and keys.

    Returns:
        `[b*rows*cols, 1, wh*ww, wh*ww]`: 0 within a group, `MASKED` across groups.
    """
    groups = rearrange(
        _pad(group, window, _PADDING),
        "b (rows wh) (cols ww) -> (b rows cols) (wh ww)",
        wh=window[0], ww=window[1],
    )  # fmt: skip
    same = groups[:, None, :, None] == groups[:, None, None, :]
    return torch.zeros(same.shape, dtype=dtype, device=group.device).masked_fill_(~same, MASKED)


def needs_padding(window: tuple[int, int], h: int, w: int) -> bool:
    """Whether a map of h x w tokens is not a whole number of windows."""
    return bool(h % window[0] or w % window[1])


def _pad(x: Tensor, window: tuple[int, int], value: float) -> Tensor:
    h, w = x.shape[1:3]
    trailing = (0, 0) * (x.ndim - 3)
    return F.pad(x, (*trailing, 0, -w % window[1], 0, -h % window[0]), value=value)
