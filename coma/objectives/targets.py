"""Prediction targets, and reconstruction of images from predictions.

Pixels of a mask unit, either as they are or normalised by the unit's own mean and standard deviation
("norm-pix", MAE sec. 4.1). A norm-pix prediction holds structure but no mean and contrast: to show it, those
must come from somewhere. Taking the hidden unit's true ones leaks the target into the picture; the honest way
is to carry over the statistics of the visible units around it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Statistics = Literal["visible", "target"]

_EPS = 1e-6


def unit_statistics(units: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every unit's values: `[b, h, w, p]` -> two of `[b, h, w, 1]`."""
    variance, mean = torch.var_mean(units, dim=-1, keepdim=True)
    return mean, (variance + _EPS).sqrt()


def pixel_targets(units: Tensor, norm_pix: bool) -> Tensor:
    """Targets `[b, h, w, p]` in float32 for units `[b, h, w, p]` (MAE sec. 4.1)."""
    units = units.float()
    if not norm_pix:
        return units
    mean, std = unit_statistics(units)
    return (units - mean) / std


def hidden_loss(prediction: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the hidden units of all views (MAE sec. 3; CoMA: the union is every unit).

    Args:
        prediction: `[v, b, h, w, p]`.
        target: `[b, h, w, p]`.
        visible: bool `[v, b, h, w]`.

    Returns:
        Scalar, float32.
    """
    error = (prediction.float() - target).square().mean(dim=-1)
    hidden = (~visible).float()
    return (error * hidden).sum() / hidden.sum().clamp(min=1)


def nearby_statistics(units: Tensor, visible: Tensor, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every unit, guessed from the visible units around it.

    Averages with weights exp(-d^2 / (2 reach^2)), d the distance in units; far units count where no near
    one is visible. Visible units keep their own statistics.

    Args:
        units: Pixels `[b, h, w, p]`; hidden ones have no influence.
        visible: bool `[b, h, w]`.
        reach: Deviation of the weights, in units.

    Returns:
        Two of `[b, h, w, 1]`.
    """
    b, h, w, _ = units.shape
    rows = torch.arange(h, device=units.device)[:, None].expand(h, w).flatten().float()
    cols = torch.arange(w, device=units.device).expand(h, w).flatten().float()
    squared = (rows[:, None] - rows).square() + (cols[:, None] - cols).square()
    scores = (-squared / (2 * reach**2)).expand(b, -1, -1)
    shown = visible.flatten(1)
    weights = scores.masked_fill(~shown[:, None, :], torch.finfo(scores.dtype).min).softmax(dim=-1)
    guesses = []
    for own in unit_statistics(units):
        flat = own.flatten(1)  # b n
        flat = torch.where(shown, flat, 0)
        guess = (weights @ flat[..., None]).squeeze(-1)
        guesses.append(torch.where(shown, flat, guess).view(b, h, w, 1))
    return guesses[0], guesses[1]
