"""Which units each view sees, drawn from the sample's own seed.

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
    """Share out h x w units over `groups` groups of equal size (+-1), at random: int64 `[b, h, w]`.

    CoMA (Li et al. 2025): with two groups the views are a mask M and its complement 1 - M.
    """
    order = noise(seeds, h * w).argsort(dim=1, stable=True)
    turn = torch.arange(h * w, device=seeds.device) % groups
    return torch.zeros_like(order).scatter_(1, order, turn.expand_as(order)).view(-1, h, w)


def group_sizes(units: int, groups: int) -> tuple[int, ...]:
    """How many units `partition` gives to each group; the same for every sample."""
    return tuple((units - group + groups - 1) // groups for group in range(groups))


@eager
def keep(seeds: Tensor, h: int, w: int, count: int, salt: int = 0) -> Tensor:
    """Show `count` of the h x w units, at random (MAE sec. 3): bool `[b, h, w]`."""
    order = noise(seeds, h * w, salt).argsort(dim=1, stable=True)
    shown = torch.zeros(order.shape, dtype=torch.bool, device=seeds.device)
    return shown.scatter_(1, order[:, :count], True).view(-1, h, w)


def group_of(visible: Tensor) -> Tensor:
    """One view as a group map: 0 where visible, -1 (seen by no view) elsewhere."""
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
