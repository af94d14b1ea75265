"""Reconstructs a masked picture with any runtime and measures the result.

PSNR and SSIM (scikit-image, pixels in 0..1) are measured on masked pixels only: visible pixels are copied, so
they would improve the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coma.data.transforms import normalize
from coma.masking.patchify import pad_to_units, patchify, unpatchify
from coma.objectives.targets import Statistics, nearby_statistics, unit_statistics
from coma.runtimes.base import Runtime
from coma.runtimes.preprocessing import to_input
from demo.masking import pixel_view
from demo.resize import Resized


@dataclass(frozen=True)
class Score:
    """Quality of a reconstruction on masked pixels.

    Attributes:
        psnr: Decibels; infinite for identical pixels.
        ssim: -1 to 1; None for pictures smaller than the 7-pixel window.
    """

    psnr: float
    ssim: float | None


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction of a picture from every view. Pixels are float32 in 0..1, without letter-box.

    Attributes:
        original: `[H, W, c]`.
        shown: `[H, W, c]`, the degraded picture before masking; otherwise the original.
        predicts_all: Whether the model predicted all pixels from a degraded picture without a mask.
        hidden: bool `[v, H, W]`, pixels that the view did not see.
        filled: `[v, H, W, c]`, visible pixels unchanged and hidden ones reconstructed.
        merged: `[H, W, c]`, every pixel as the mean of the views that did not see it.
        predicted: bool `[H, W]`, pixels that at least one view reconstructed.
        scores: Score of each view.
        score: Score of `merged`.
        seconds: Time of the runtime.
    """

    original: np.ndarray
    shown: np.ndarray
    predicts_all: bool
    hidden: np.ndarray
    filled: np.ndarray
    merged: np.ndarray
    predicted: np.ndarray
    scores: tuple[Score, ...]
    score: Score
    seconds: float

    @property
    def error(self) -> np.ndarray:
        """Absolute error, averaged over channels, `[H, W]`."""
        return np.abs(self.merged - self.original).mean(axis=-1)


def reconstruct(
    runtime: Runtime,
    resized: Resized,
    visible: Tensor,
    statistics: Statistics = "visible",
    degraded: Tensor | None = None,
    predicts_all: bool = False,
) -> Reconstruction:
    """Reconstructs a picture from its visible units and measures the result.

    Args:
        runtime: Runtime of a reconstructor.
        resized: The picture.
        visible: Units that each view sees, bool `[v, h, w]`.
        statistics: Source of the hidden units' mean and standard deviation (norm-pix models only); `target`
            leaks.
        degraded: Pixels `[c, H, W]` that the model gets instead of the picture. Values outside 0..1 are
            clipped on the page and for runtimes that take integers.
        predicts_all: Whether the model predicts all pixels, whatever is visible (`coma.objectives.beyond`).

    Raises:
        BadInput: a size or a number of views that the runtime does not support.
    """
    about = runtime.spec.preprocessing
    views, (height, width) = len(visible), resized.pixels.shape[1:]
    unit = runtime.spec.unit
    pixels_in = resized.pixels if degraded is None else degraded
    displayed = pixels_in.clamp(0, 1)
    if about.normalize_in_graph:
        pixels_in = displayed
    images = to_input([pixels_in] * views, about)
    began = time.perf_counter()
    out = run(runtime, images, visible=visible)["reconstruction"].float()
    seconds = time.perf_counter() - began
    plain = normalize(resized.pixels[None], about.mean, about.std)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (about.mean, about.std))
    if about.normalize_in_graph:
        out = (out / 255 - mean) / std
    if statistics == "target" and not predicts_all:
        seen = normalize(pixels_in[None], about.mean, about.std)
        out = with_true_statistics(out, seen.expand(views, -1, -1, -1), plain, visible, unit)
    pixels = (out * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    views_seen = pixel_view(visible & (not predicts_all), unit, height, width)
    original = resized.crop(resized.pixels.permute(1, 2, 0).numpy())
    filled = np.stack([resized.crop(each) for each in pixels])
    shown = resized.crop(displayed.permute(1, 2, 0).numpy())
    hidden = np.stack([resized.crop(~each) for each in views_seen])
    filled = np.where(hidden[..., None], filled, shown)  # visible pixels stay bit-identical
    merged, predicted = merge_views(shown, filled, hidden)
    scores = tuple(measure_hidden(original, each, where) for each, where in zip(filled, hidden, strict=True))
    total = measure_hidden(original, merged, predicted)
    return Reconstruction(
        original, shown, predicts_all, hidden, filled, merged, predicted, scores, total, seconds
    )


def run(runtime: Runtime, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """Runs the model and copies its outputs to the CPU, so that the time covers all work."""
    outputs: Mapping[str, Tensor] = runtime(images, **others)
    return {name: each.detach().cpu() for name, each in outputs.items()}


def with_true_statistics(out: Tensor, seen: Tensor, images: Tensor, visible: Tensor, unit: int) -> Tensor:
    """Replaces the estimated mean and standard deviation of hidden units by the true ones.

    This shows the prediction of a norm-pix model, but leaks statistics that it never saw.

    Args:
        out: Reconstructions of the runtime, `[v, c, H, W]`, normalised.
        seen: Input of the model, `[v, c, H, W]`, normalised.
        images: The picture, `[v or 1, c, H, W]`, normalised.
        visible: Visible units, bool `[v, h, w]`.
        unit: Side of a mask unit.

    Returns:
        `[v, c, H, W]`.
    """
    height, width = out.shape[-2:]
    units = patchify(pad_to_units(seen, unit), unit)
    guessed_mean, guessed_std = nearby_statistics(units, visible)
    mean, std = unit_statistics(patchify(pad_to_units(images, unit), unit))
    restated = (patchify(pad_to_units(out, unit), unit) - guessed_mean) / guessed_std * std + mean
    return unpatchify(torch.where(visible[..., None], units, restated), unit)[..., :height, :width]


def merge_views(
    original: np.ndarray, filled: np.ndarray, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the views: every pixel is the mean of the views that did not see it.

    Args:
        original: `[H, W, c]`.
        filled: `[v, H, W, c]`.
        hidden: bool `[v, H, W]`.

    Returns:
        The merged picture `[H, W, c]`, and bool `[H, W]`: pixels that at least one view reconstructed.
    """
    weights = hidden[..., None].astype(np.float32)
    count = weights.sum(axis=0)
    mean = (filled * weights).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, mean, original).astype(np.float32), count[..., 0] > 0


def measure_hidden(original: np.ndarray, rebuilt: np.ndarray, hidden: np.ndarray) -> Score:
    """Returns the PSNR of the hidden pixels and the mean of the SSIM map over them.

    Args:
        original: `[H, W, c]` in 0..1.
        rebuilt: Reconstruction, `[H, W, c]` in 0..1.
        hidden: bool `[H, W]`.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    if not hidden.any():
        return Score(float("inf"), None)
    if np.array_equal(original[hidden], rebuilt[hidden]):
        return Score(float("inf"), 1.0)
    psnr = float(peak_signal_noise_ratio(original[hidden], rebuilt[hidden], data_range=1.0))
    if min(original.shape[:2]) < 7:
        return Score(psnr, None)
    found: Any = structural_similarity(original, rebuilt, data_range=1.0, channel_axis=-1, full=True)
    return Score(psnr, float(found[1][hidden].mean()))
