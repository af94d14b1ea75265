"""One picture, hidden part by part and rebuilt by any runtime, with numbers that say how well.

The numbers are taken where pixels were hidden, and nowhere else: what a view sees is copied, and would only
flatter them. PSNR and SSIM are scikit-image's, of pixels in 0..1.
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
from demo.masking import pixel_view
from demo.resize import Fitted
from export.preprocessing import as_input


@dataclass(frozen=True)
class Score:
    """How near a reconstruction is, over the pixels that were hidden.

    Attributes:
        psnr: Decibels; infinite for equal pixels.
        ssim: -1 to 1; None for pictures smaller than its window of 7 pixels.
    """

    psnr: float
    ssim: float | None


@dataclass(frozen=True)
class Rebuilt:
    """What every view made of a picture. Pixels are float32 in 0..1, without letter-box.

    Attributes:
        original: `[H, W, c]`.
        shown: `[H, W, c]`: what it was degraded to before anything was hidden; else the original.
        everything: The model predicted all pixels from a degraded picture, none of them was hidden from it.
        hidden: bool `[v, H, W]`: pixels that the view did not see, and so had to predict.
        filled: `[v, H, W, c]`: visible pixels as they are, hidden ones rebuilt.
        merged: `[H, W, c]`: every hidden pixel from the views that did not see it (their mean), others as
            they are.
        predicted: bool `[H, W]`: which of them was rebuilt.
        scores: Of each view.
        score: Of `merged`.
        seconds: That the runtime took.
    """

    original: np.ndarray
    shown: np.ndarray
    everything: bool
    hidden: np.ndarray
    filled: np.ndarray
    merged: np.ndarray
    predicted: np.ndarray
    scores: tuple[Score, ...]
    score: Score
    seconds: float

    @property
    def error(self) -> np.ndarray:
        """Mean absolute difference of the channels, `[H, W]`."""
        return np.abs(self.merged - self.original).mean(axis=-1)


def rebuild(
    runtime: Runtime,
    fitted: Fitted,
    visible: Tensor,
    statistics: Statistics = "visible",
    degraded: Tensor | None = None,
    everything: bool = False,
) -> Rebuilt:
    """Hide, rebuild, compare.

    Args:
        runtime: Of a reconstructor.
        fitted: The picture.
        visible: Units that each view sees, bool `[v, h, w]`.
        statistics: Of a norm-pix model only: where hidden units get mean and contrast from; `target` leaks.
        degraded: What the model gets in place of the picture, pixels `[c, H, W]`. What leaves 0..1 is shown
            cut off, and is cut off for a runtime that takes whole numbers; others get it as it is.
        everything: It predicts all pixels from that, whatever is visible (see `coma.objectives.beyond`).

    Raises:
        BadInput: a size or a number of views that the runtime does not take.
    """
    about = runtime.spec.preprocessing
    views, (height, width) = len(visible), fitted.pixels.shape[1:]
    unit = runtime.spec.unit
    pixels_in = fitted.pixels if degraded is None else degraded
    displayed = pixels_in.clamp(0, 1)
    if about.normalize_in_graph:
        pixels_in = displayed
    images = as_input([pixels_in] * views, about)
    began = time.perf_counter()
    out = run(runtime, images, visible=visible)["reconstruction"].float()
    seconds = time.perf_counter() - began
    plain = normalize(fitted.pixels[None], about.mean, about.std)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (about.mean, about.std))
    if about.normalize_in_graph:
        out = (out / 255 - mean) / std
    if statistics == "target" and not everything:
        seen = normalize(pixels_in[None], about.mean, about.std)
        out = with_true_statistics(out, seen.expand(views, -1, -1, -1), plain, visible, unit)
    pixels = (out * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    views_seen = pixel_view(visible & (not everything), unit, height, width)
    original = fitted.crop(fitted.pixels.permute(1, 2, 0).numpy())
    filled = np.stack([fitted.crop(each) for each in pixels])
    shown = fitted.crop(displayed.permute(1, 2, 0).numpy())
    hidden = np.stack([fitted.crop(~each) for each in views_seen])
    filled = np.where(hidden[..., None], filled, shown)  # bit for bit, whatever the runtime rounds
    merged, predicted = merge_views(shown, filled, hidden)
    scores = tuple(measure_hidden(original, each, where) for each, where in zip(filled, hidden, strict=True))
    total = measure_hidden(original, merged, predicted)
    return Rebuilt(original, shown, everything, hidden, filled, merged, predicted, scores, total, seconds)


def run(runtime: Runtime, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
    """Run, and bring what comes out to the CPU, so that a clock around it sees all of the work."""
    outputs: Mapping[str, Tensor] = runtime(images, **others)
    return {name: each.detach().cpu() for name, each in outputs.items()}


def with_true_statistics(out: Tensor, seen: Tensor, images: Tensor, visible: Tensor, unit: int) -> Tensor:
    """Put the hidden units' own mean and contrast in place of those guessed from visible ones.

    This shows what a norm-pix model predicted, at the price of showing pixels' statistics that it never saw.

    Args:
        out: Reconstructions `[v, c, H, W]`, normalised, as runtimes give them.
        seen: What the model got, `[v, c, H, W]`, normalised.
        images: The picture, `[v or 1, c, H, W]`, normalised.
        visible: bool `[v, h, w]`.
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
    """Every pixel from the views that did not see it.

    Args:
        original: `[H, W, c]`.
        filled: `[v, H, W, c]`.
        hidden: bool `[v, H, W]`.

    Returns:
        `[H, W, c]`, and bool `[H, W]`: pixels that some view rebuilt. The others are the original's.
    """
    weights = hidden[..., None].astype(np.float32)
    count = weights.sum(axis=0)
    mean = (filled * weights).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, mean, original).astype(np.float32), count[..., 0] > 0


def measure_hidden(original: np.ndarray, rebuilt: np.ndarray, hidden: np.ndarray) -> Score:
    """PSNR over the hidden pixels, and the mean of SSIM's map over them.

    Args:
        original: `[H, W, c]` in 0..1.
        rebuilt: Likewise.
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
