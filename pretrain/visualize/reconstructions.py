"""Pictures of reconstructions: what every view saw, and what was reconstructed from it.

A norm-pix model predicts structure, not mean and contrast, so a picture has to take those from elsewhere.
Every sheet says from where, because the true values of a hidden unit would show what the model never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coma.config import BeyondConfig, Degradation
from coma.contact_sheet import Column, draw_sheet, write_png
from coma.data.transforms import normalize
from coma.masking.patchify import spread, unit_grid
from coma.objectives import Objective
from coma.objectives.beyond import draw_views, shown_of
from coma.objectives.targets import Statistics

_ROWS = 8
_SPAN = 3
"""Floats in a unit of their own: black and white are this many standard deviations off the mean."""


def reconstruction_sheet(
    objective: Objective,
    images: Tensor,
    seeds: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    *,
    caption: str = "",
    statistics: Statistics = "visible",
) -> None:
    """Draws a PNG with one row per image: the original, then what each view sees and reconstructs.

    With complementary views, the last column shows predictions only: every pixel was predicted by a view
    that did not see it (the mean where several views did not).

    Args:
        objective: A pre-training objective; its mode and its weights are not changed.
        images: `[b, c, H, W]`, normalised; the first 8 are drawn.
        seeds: int64 `[b]`, which fix the masks.
        mean: Mean of every channel, of pixels scaled to 0..1, to undo the normalisation.
        std: Standard deviation of every channel.
        path: The PNG to write, atomically.
        caption: First line of the sheet, for example the step.
        statistics: Source of mean and contrast for a norm-pix model; see `reconstruct`.
    """
    images, seeds = images[:_ROWS], seeds[:_ROWS]
    height, width = images.shape[-2:]
    unit = objective.encoder.unit
    was_training = objective.training
    objective.eval()
    try:
        visible = objective.draw_visible(seeds, *unit_grid(height, width, unit))  # v b h w
        inputs = objective.degraded(images, seeds)
        filled = torch.stack([objective.reconstruct(inputs, view, statistics) for view in visible])
    finally:
        objective.train(was_training)

    shown = spread(visible.flatten(0, 1), unit)[:, :height, :width].unflatten(0, visible.shape[:2])
    views = len(visible)
    original, given = _pixels(images, mean, std), _pixels(inputs, mean, std)
    columns: list[Column] = [("original", original, None)]
    for number, (seen, reconstruction) in enumerate(zip(shown, filled, strict=True), start=1):
        view, rebuilt = (
            (f"view {number}", f"rebuilt from view {number}") if views > 1 else ("view", "rebuilt")
        )
        columns.append((view, given, seen.cpu().numpy()))
        columns.append((rebuilt, _pixels(reconstruction, mean, std), None))
    if views > 1:
        hidden = (~shown).unsqueeze(2).float()  # v b 1 H W
        merged = (filled.float() * hidden).sum(0) / hidden.sum(0).clamp(min=1)
        predicted = (hidden.sum(0) > 0).squeeze(1).cpu().numpy()
        columns.append(("predictions only", _pixels(merged, mean, std), predicted))
    notes = _explain(objective, visible, images.shape[1], statistics)
    if not _is_scaled(mean, std):
        notes += f" Black to white: the mean of the images -{_SPAN} to +{_SPAN} standard deviations."
    write_png(path, draw_sheet(columns, caption or f"Reconstructions by {_method(objective)}", notes))


def degradation_sheet(
    view: Tensor,
    kinds: Sequence[Degradation],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    *,
    unit: int,
    draws: int = 4,
    seed: int = 0,
) -> None:
    """Draws a PNG of an image and its degradations as `Beyond` shows them, one random draw per row.

    Args:
        view: `[3, H, W]`, uint8, or floats in 0..1.
        kinds: The degradations.
        mean: Mean of every channel, of pixels scaled to 0..1; pixels are normalised first, as in training.
        std: Standard deviation of every channel.
        path: The PNG to write, atomically.
        unit: Side of a mask unit in pixels.
        draws: Random draws of each degradation.
        seed: Seed of the first draw; later draws use the following numbers.

    Raises:
        BadInput: too few mask units to zoom in.
    """
    height, width = view.shape[-2:]
    images = normalize(view.expand(draws, -1, -1, -1), mean, std)
    seeds = torch.arange(draws) + seed
    columns: list[Column] = [("to be rebuilt", _pixels(images, mean, std), None)]
    for kind in kinds:
        config = BeyondConfig(degrade=kind)
        views = draw_views(config, seeds, *unit_grid(height, width, unit))
        pixels = _pixels(shown_of(config, images, seeds), mean, std)
        for number, visible in enumerate(views, start=1):
            heading = f"{kind}, view {number}" if len(views) > 1 else kind
            columns.append((heading, pixels, spread(visible, unit)[:, :height, :width].numpy()))
    about = ("/".join(f"{value:.3g}" for value in values) for values in (mean, std))
    notes = (
        "Every row is another draw. What is blank is not seen and is predicted: the border, zooming in, and "
        "what masks hide ({0} x {0} px a unit). Where nothing is blank, all is predicted. As in training, "
        "pixels were normalised before (mean {1}, standard deviation {2}): it is this that tints decolor."
    ).format(unit, *about)
    ours = "; zoom-in+coma is ours" if "zoom-in+coma" in kinds else ""
    write_png(path, draw_sheet(columns, f"Degradations (Tian et al. 2022{ours})", notes, across=5))


def _method(objective: Objective) -> str:
    return type(objective.config).__name__.removesuffix("Config")


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Returns normalised `[b, c, H, W]` as uint8 `[b, H, W, 3]`; `_SPAN` is for other units than 0..1."""
    centre, scale = (images.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = images.float() * scale + centre if _is_scaled(mean, std) else images.float() / (2 * _SPAN) + 0.5
    pixels = pixels.clamp(0, 1)
    pixels = pixels[:, :3] if images.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _is_scaled(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Returns whether pixels lie in 0..1: what lies there has no larger mean or standard deviation."""
    return all(0 <= m <= 1 and s <= 0.5 for m, s in zip(mean, std, strict=True))


def _explain(objective: Objective, visible: Tensor, channels: int, statistics: Statistics) -> str:
    views, unit = len(visible), objective.encoder.unit
    hidden = 1 - visible.float().mean().item()
    plural = f"{views} views, each with {hidden:.0%}" if views > 1 else f"one view, with {hidden:.0%}"
    notes = [f"{_method(objective)}: {plural} of the {unit} x {unit} px mask units hidden (grey)."]
    notes += [objective.picture_note] if objective.picture_note else []
    if not objective.config.norm_pix:
        notes.append("Pixels are predicted as they are.")
    elif statistics == "visible":
        notes.append(
            "Hidden units get mean and contrast from the visible units nearby: nothing here was taken from "
            "hidden pixels."
        )
    else:
        notes.append(
            "CAUTION: hidden units are shown with their own true mean and contrast, which the model did not "
            "predict: this leaks the target into the picture."
        )
    if channels == 2 or channels > 3:
        notes.append(f"Shown: {'the first' if channels == 2 else 'the first three'} of {channels} channels.")
    return " ".join(notes)
