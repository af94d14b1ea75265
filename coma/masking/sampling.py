"""Sampling of masks: the units that each view sees, drawn from the sample's own seed.

Randomness belongs to the sample: noise is a hash of (seed, position), not the next numbers of a
generator. A sample gets the same masks whichever process, batch or device it lands on, so there is no
generator state to save and two processes draw exactly what one would.

`group [b, h, w]` (int64) names the view that a unit belongs to; -1 means that no view sees it.
`visible [v, b, h, w]` (bool) says the same view by view, and allows views to overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_GUMBEL, _STRATA = 0x67756D, 0x737472  # apart from the numbers of other masks
_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed 64-bit integer


def eager(function: F) -> F:
    """Keep a function out of compiled graphs: compilers may not take 64-bit integers to wrap around."""
    return cast("F", torch.compiler.disable(function))


def noise(seeds: Tensor, count: int, salt: int = 0) -> Tensor:
    """Random int64 keys `[b, count]`, a pure function of (seed, position, salt).

    The finaliser of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators") applied twice: to the salted seed, then to the seed's counter sequence.
    """
    start = _mix(seeds.to(torch.int64) + _wrap((salt + 1) * 0xD1342543DE82EF95))
    positions = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    return _mix(start[:, None] + positions * _GOLDEN)


@eager
def uniform(seeds: Tensor, count: int, salt: int = 0) -> Tensor:
    """Random numbers strictly between 0 and 1, float32 `[b, count]`: 23 bits of `noise`, and a half."""
    return (((noise(seeds, count, salt) >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23


@eager
def partition(seeds: Tensor, h: int, w: int, groups: int) -> Tensor:
    """Splits h x w units at random into `groups` groups of equal size (+-1): int64 `[b, h, w]`.

    CoMA (Li et al. 2025): with two groups the views are a mask M and its complement 1 - M.
    """
    order = noise(seeds, h * w).argsort(dim=1, stable=True)
    turn = torch.arange(h * w, device=seeds.device) % groups
    return torch.zeros_like(order).scatter_(1, order, turn.expand_as(order)).view(-1, h, w)


def group_sizes(units: int, groups: int) -> tuple[int, ...]:
    """Returns how many units `partition` gives to each group; the same for every sample."""
    return tuple((units - group + groups - 1) // groups for group in range(groups))


@eager
def keep(seeds: Tensor, h: int, w: int, count: int, salt: int = 0) -> Tensor:
    """Show `count` of the h x w units, at random (MAE sec. 3): bool `[b, h, w]`."""
    order = noise(seeds, h * w, salt).argsort(dim=1, stable=True)
    shown = torch.zeros(order.shape, dtype=torch.bool, device=seeds.device)
    return shown.scatter_(1, order[:, :count], True).view(-1, h, w)


def group_of(visible: Tensor) -> Tensor:
    """Returns one view as a group map: 0 where visible, -1 (seen by no view) elsewhere."""
    return visible.to(torch.int64) - 1


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _wrap(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64 shifts keep the sign otherwise


def _wrap(value: int) -> int:
    value %= 1 << 64  # as a signed 64-bit integer
    return value - (1 << 64) if value >= 1 << 63 else value


@eager
def draw(weights: Tensor, seeds: Tensor, count: int) -> Tensor:
    """Draw `count` units of every image without replacement, each time in proportion to what weight is left.

    The Gumbel top-k trick (Kool et al. 2019, "Stochastic beams and where to find them", sec. 3): the largest
    of log w + Gumbel noise.

    Args:
        weights: `[b, h, w]`, not negative.
        seeds: int64 `[b]`.
        count: Number of units, 0 to h*w.

    Returns:
        bool `[b, h, w]`, true where drawn.
    """
    flat = weights.flatten(1).float().clamp(min=1e-20).log()
    gumbel = -(-uniform(seeds, flat.shape[1], _GUMBEL).log()).log()
    order = (flat + gumbel).argsort(dim=1, descending=True, stable=True)
    drawn = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    return drawn.scatter_(1, order[:, :count], True).view(weights.shape)


@eager
def deal(weights: Tensor, seeds: Tensor, groups: int) -> Tensor:
    """Splits units into groups of equal size (+-1) and nearly equal weight.

    Units are ranked by weight; every `groups` consecutive ones are assigned at random, one to each group.

    Args:
        weights: `[b, h, w]`.
        seeds: int64 `[b]`.
        groups: How many, at least 2.

    Returns:
        int64 `[b, h, w]`; sizes are those of `group_sizes`.
    """
    ranking = weights.flatten(1).argsort(dim=1, descending=True, stable=True)
    b, units = ranking.shape
    strata = -(-units // groups)
    keys = noise(seeds, strata * groups, _STRATA)
    keys[:, units:] = torch.iinfo(torch.int64).max  # the last stratum may be short: its first groups get one
    turn = keys.view(b, strata, groups).argsort(dim=2, stable=True).argsort(dim=2).flatten(1)[:, :units]
    return torch.zeros_like(ranking).scatter_(1, ranking, turn).view(weights.shape)
