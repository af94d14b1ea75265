"""Masks that follow where a network looks; random, and a function of the sample's seed like all masks."""

from __future__ import annotations

import torch
from torch import Tensor

from coma.masking.sampling import eager, noise, uniform

_GUMBEL, _STRATA = 0x67756D, 0x737472  # apart from the numbers of other masks


@eager
def draw(weights: Tensor, seeds: Tensor, count: int) -> Tensor:
    """Draw `count` units of every image without replacement, each time in proportion to what weight is left.

    The Gumbel top-k trick (Kool et al. 2019, "Stochastic beams and where to find them", sec. 3): the largest
    of log w + Gumbel noise.

    Args:
        weights: `[b, h, w]`, not negative.
        seeds: int64 `[b]`.
        count: Of units, 0 to h*w.

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
    """Share units out over groups of equal size (+-1) and of nearly equal weight.

    Units are ranked by weight; every `groups` consecutive ones are shared out at random, one to each.

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
