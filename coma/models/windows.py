"""The order of tokens inside a unit, and windows over it, as pure functions.

Inside a unit of side x side tokens (a power of two) the order is nested: the four quarters of the square one
after another, each in the same order again (Morton's Z-order). A square of 2, 4, 8, ... tokens inside a unit
is then a run of consecutive tokens, so cutting such windows and merging 2x2 tokens are views.

    map [b, h*side, w*side, ...]  <->  units [b, h*w, side*side, ...]

Windows that cross units are cut from the map:

    map [b, h, w, ...]  ->  windows [b*rows*cols, wh*ww, ...]      (row-major, from the top-left corner)

A map that is not a whole number of windows is padded at the right and bottom; padding is a group of its
own, which no token of the map attends to, so it never changes a result.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from coma.masking.patchify import cover

MASKED = -1e4
"""Added to the score of a forbidden pair: exp(-1e4) is exactly 0 in every float type; finite, so that
fp16 and exported graphs stay free of NaN."""

_PADDING = -2  # group of padding; -1 is taken by units that no view sees


def nest(x: Tensor, side: int) -> Tensor:
    """Tokens of a map `[b, h*side, w*side, ...]` unit by unit, nested: `[b, h*w, side*side, ...]`."""
    (b, h, w), rest = x.shape[:3], x.shape[3:]
    rows, cols = h // side, w // side
    halves, axes = _nested_axes(side)
    pair = math.prod(rest) * (2 if halves else 1)
    x = x.reshape(b * rows, *halves, cols, *halves[:-1], pair).permute(axes)
    return x.reshape(b, rows * cols, side * side, *rest)


def unnest(x: Tensor, side: int, rows: int, cols: int) -> Tensor:
    """Undoes `nest` for `rows` x `cols` units: `[b, h*w, side*side, ...]` -> a map."""
    b, rest = x.shape[0], x.shape[3:]
    halves, axes = _nested_axes(side)
    pair = math.prod(rest) * (2 if halves else 1)
    x = x.reshape(b * rows, cols, *[2] * max(2 * len(halves) - 1, 0), pair)
    x = x.permute([axes.index(i) for i in range(x.ndim)])
    return x.reshape(b, rows * side, cols * side, *rest)


def nested_places(side: int, device: torch.device) -> Tensor:
    """Row and column, inside a unit, of its tokens in nested order: int64 `[side*side, 2]`."""
    line = torch.arange(side, device=device)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)
    return nest(places[None], side)[0, 0]


def fit(window: int, h: int, w: int) -> tuple[int, int]:
    """Sides of the window on a map of h x w tokens: 0, or anything larger than the map, is global."""
    return min(window or h, h), min(window or w, w)


def split(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a map `[b, h, w, ...]` into windows `[b*rows*cols, wh*ww, ...]`, padding it with zeros."""
    x = _pad(x, window, 0)
    return rearrange(x, "b (rows wh) (cols ww) ... -> (b rows cols) (wh ww) ...", wh=window[0], ww=window[1])


def merge(windows: Tensor, window: tuple[int, int], h: int, w: int) -> Tensor:
    """Put windows back together as a map `[b, h, w, ...]`; the inverse of `split`."""
    rows, cols = cover(h, window[0]), cover(w, window[1])
    x = rearrange(
        windows,
        "(b rows cols) (wh ww) ... -> b (rows wh) (cols ww) ...",
        rows=rows, cols=cols, wh=window[0], ww=window[1],
    )  # fmt: skip
    return crop(x, h, w)


def crop(x: Tensor, h: int, w: int) -> Tensor:
    """Returns the first h rows and w columns of a map `[b, h', w', ...]`.

    The checks say, where sizes are symbols, that the result has just these.
    """
    if not torch.jit.is_tracing():  # whose sizes are tensors
        torch._check(h <= x.shape[1])
        torch._check(w <= x.shape[2])
    return x[:, :h, :w]


def same_group_bias(group: Tensor, window: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Returns a bias for attention scores that restricts attention to the token's own group.

    Args:
        group: Group of every token, int64 `[b, h, w]`.
        window: Sides of the window in tokens.
        dtype: Type of the queries and keys.

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
    """Returns whether a map of h x w tokens is not a whole number of windows."""
    return bool(h % window[0] or w % window[1])


def _pad(x: Tensor, window: tuple[int, int], value: float) -> Tensor:
    bottom, right = (
        cover(length, side) * side - length for length, side in zip(x.shape[1:3], window, strict=True)
    )
    return F.pad(x, (*(0, 0) * (x.ndim - 3), 0, right, 0, bottom), value=value)


def _nested_axes(side: int) -> tuple[list[int], list[int]]:
    """Halvings of a side, and how `nest` permutes.

    From (b rows, halves of rows, cols, halves of cols) to (b rows, cols, one half of each after the other).
    The last half of the columns stays with the channels: both orders end with it, and at side 8 this makes
    8 axes, the most that TensorRT permutes.
    """
    levels = side.bit_length() - 1
    rows, cols = range(1, 1 + levels), range(2 + levels, 2 + 2 * levels)
    pairs = [axis for pair in zip(rows, cols, strict=True) for axis in pair]
    return [2] * levels, [0, 1 + levels, *(pairs or [2])]
