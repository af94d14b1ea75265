"""Masks and degrades pictures by the methods that the page offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coma.data.transforms import normalize
from coma.errors import BadInput
from coma.masking.patchify import spread, unit_grid
from coma.masking.sampling import keep, partition
from coma.objectives.degradations import Kind, border, degrade
from coma.runtimes.model_spec import Preprocessing
from demo.introspection import attention_received
from demo.models import Model
from demo.resize import Resized

PAINTED = 0.1
"""A unit is masked when the brush covers at least this share of it."""
LARGEST_SEED = 2**31 - 1
_UNLEARNT = "A model trained on this restores the picture; others reconstruct each half from the other."


@dataclass(frozen=True)
class Method:
    """A way to mask or degrade a picture.

    Attributes:
        title: Name on the page.
        about: Description in one sentence.
        views: Number of complementary views; 1 is a single mask.
        ratio: Whether the mask ratio can be chosen.
        seed: Whether the method is random.
        degrades: Degradation of the input (`coma.objectives.degradations`).
    """

    title: str
    about: str
    views: int = 1
    ratio: bool = False
    seed: bool = True
    degrades: Kind | None = None


METHODS: dict[str, Method] = {
    "coma": Method(
        "CoMA: complementary pair",
        "Each patch is visible in one of two views; each view reconstructs what the other one sees.",
        views=2,
    ),
    "coma4": Method(
        "CoMA: four views",
        "Four views see a quarter of the patches each and reconstruct the rest.",
        views=4,
    ),
    "mae": Method("MAE: one random mask", "One view sees a random share of the patches.", ratio=True),
    "guided": Method(
        "CMT: attention-guided mask",
        "Patches are masked with a probability proportional to the attention they receive from the model.",
        ratio=True,
    ),
    "zoom-in": Method(
        "Beyond Masking: zoom in", "The model sees the centre and predicts the border.", seed=False
    ),
    "zoom-out": Method(
        "Beyond Masking: zoom out",
        f"Shrinks the picture and mirrors it at the borders. {_UNLEARNT}",
        degrades="zoom-out",
    ),
    "distort": Method(
        "Beyond Masking: distort",
        f"Distorts like a fisheye lens. {_UNLEARNT}",
        degrades="distort",
    ),
    "blur": Method("Beyond Masking: blur", f"Blurs with a random kernel. {_UNLEARNT}", degrades="blur"),
    "decolor": Method(
        "Beyond Masking: de-colour",
        f"Mixes the channels with random weights. {_UNLEARNT}",
        degrades="decolor",
    ),
    "brush": Method("Brush: paint the mask", "The model sees what you do not paint over.", seed=False),
}


@dataclass(frozen=True)
class MaskedPicture:
    """The input of a model: visible units, and pixels where they differ from the picture's.

    Attributes:
        visible: Units that each view sees, bool `[v, h, w]`; models that zoom in see none of the border.
        degraded: Degraded pixels `[c, H, W]`, which may leave 0..1; None for the picture itself.
        predicts_all: The model predicts all pixels, those of visible units too.
    """

    visible: Tensor
    degraded: Tensor | None = None
    predicts_all: bool = False


def mask_picture(
    model: Model, resized: Resized, method: str, seed: int, ratio: float, painted: np.ndarray | None = None
) -> MaskedPicture:
    """Masks or degrades a picture.

    Args:
        model: Model that reconstructs it. Masks follow its attention (guided), lie in the centre for models
            that zoom in, and are dropped for models that learned to undo the degradation.
        resized: The picture.
        method: Key of `METHODS`.
        seed: Seed of masks and degradations.
        ratio: Mask ratio, for methods that take one.
        painted: Painted pixels of the brush, bool `[H', W']` over the picture without its letter-box.

    Raises:
        BadInput: too few units for the method, or a brush that covers nothing or everything.
    """
    about = model.description("reconstructor")
    rule = about.preprocessing
    height, width = resized.pixels.shape[1:]
    h, w = unit_grid(height, width, about.unit)
    rows, cols = border_units(h, w) if model.zooms_in else (0, 0)
    inner = h - 2 * rows, w - 2 * cols

    def whole(views: Tensor) -> Tensor:
        return F.pad(views, (cols, cols, rows, rows))

    kind = METHODS[method].degrades
    if kind:
        shown = _degraded(resized.pixels, seed, kind, rule)
        if model.undoes == kind:
            return MaskedPicture(torch.ones(1, h, w, dtype=torch.bool), shown, predicts_all=True)
        return MaskedPicture(whole(sample_views("coma", seed, *inner)), shown)
    if method == "brush":
        unboxed = _unboxed(np.zeros((1, 1), bool) if painted is None else painted, resized)
        visible = painted_view(unboxed, height, width, about.unit)
        visible &= whole(torch.ones(1, *inner, dtype=torch.bool))
        if not visible.any():
            raise BadInput("This model sees only the centre: leave a part of it unpainted.")
        return MaskedPicture(visible)
    if method == "zoom-in":
        return MaskedPicture(zoom_in_view(h, w))
    if method == "guided":
        image = normalize(resized.pixels[None], rule.mean, rule.std)
        attention = attention_received(model.encoder(), image)[rows : h - rows, cols : w - cols]
        return MaskedPicture(whole(attention_view(attention, seed, ratio)))
    return MaskedPicture(whole(sample_views(method, seed, *inner, ratio)))


def _degraded(pixels: Tensor, seed: int, kind: Kind, rule: Preprocessing) -> Tensor:
    """Returns the pixels `[c, H, W]` degraded as in training, that is, in normalised values."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    normalised = normalize(pixels[None], rule.mean, rule.std)
    return degrade(normalised, torch.tensor([seed]), kind)[0][0] * std + mean


def _unboxed(painted: np.ndarray, resized: Resized) -> np.ndarray:
    """Returns the painted pixels at the model's size, with the letter-box."""
    top, left, height, width = resized.content
    small = np.asarray(Image.fromarray(painted).convert("L").resize((width, height), Image.Resampling.BOX))
    whole = np.zeros(resized.pixels.shape[1:], bool)
    whole[top : top + height, left : left + width] = small >= 64
    return whole


def zoom_in_view(h: int, w: int) -> Tensor:
    """Returns the units that a zoomed-in view sees, bool `[1, h, w]`: all but the border.

    Raises:
        BadInput: fewer than 3 x 3 units.
    """
    rows, cols = border_units(h, w)
    inner = torch.ones(1, h - 2 * rows, w - 2 * cols, dtype=torch.bool)
    return F.pad(inner, (cols, cols, rows, rows))


def border_units(h: int, w: int) -> tuple[int, int]:
    """Returns the number of rows and of columns of units, at either end, that zooming in masks.

    Raises:
        BadInput: fewer than 3 x 3 units.
    """
    if min(h, w) < 3:
        raise BadInput(f"This picture has {h} x {w} mask units; zooming in needs at least 3 x 3.")
    return border(h), border(w)


def attention_view(attention: Tensor, seed: int, mask_ratio: float) -> Tensor:
    """Returns the visible units, bool `[1, h, w]`, after masking in proportion to `attention`, `[h, w]`."""
    from coma.masking.sampling import draw

    units = attention.numel()
    hidden = min(max(round(units * mask_ratio), 1), units - 1)
    drawn: Callable[..., Tensor] = draw
    return ~drawn(attention[None], torch.tensor([seed]), hidden)


def sample_views(method: str, seed: int, h: int, w: int, mask_ratio: float = 0.75) -> Tensor:
    """Samples the units that each view sees, bool `[v, h, w]`.

    Args:
        method: coma, coma4 or mae.
        seed: 0 to `LARGEST_SEED`.
        h: Rows of units.
        w: Columns of units.
        mask_ratio: Share of masked units (mae only); at least one is masked and one is visible.

    Raises:
        BadInput: too few units for the number of views, or a method without random masks.
    """
    seeds = torch.tensor([seed])
    views = METHODS[method].views
    if views > 1:
        if h * w < views:
            raise BadInput(f"This picture has {h * w} mask units, too few for {views} views.")
        group = partition(seeds, h, w, views)[0]
        return group == torch.arange(views)[:, None, None]
    if method != "mae":
        raise BadInput(f"{METHODS[method].title}: has no random mask")
    if h * w < 2:
        raise BadInput("This picture is a single mask unit, so nothing would stay visible.")
    shown = min(max(round(h * w * (1 - mask_ratio)), 1), h * w - 1)
    return keep(seeds, h, w, shown)


def painted_view(covered: np.ndarray, height: int, width: int, unit: int) -> Tensor:
    """Returns the units that stay visible under a painted mask.

    Args:
        covered: Painted pixels, bool `[H', W']`, of any size.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        unit: Side of a mask unit in pixels.

    Returns:
        bool `[1, h, w]`, False for units of which at least `PAINTED` is covered.

    Raises:
        BadInput: nothing or everything is painted.
    """
    paint = torch.from_numpy(np.ascontiguousarray(covered, dtype=np.float32))[None, None]
    fine = F.interpolate(paint, (height, width), mode="area")
    h, w = -(-height // unit), -(-width // unit)
    padded = F.pad(fine, (0, w * unit - width, 0, h * unit - height))
    real = F.pad(torch.ones_like(fine), (0, w * unit - width, 0, h * unit - height))
    share = F.avg_pool2d(padded, unit) / F.avg_pool2d(real, unit)
    visible = share[0] < PAINTED
    if visible.all():
        raise BadInput("Nothing is painted yet: paint over the parts to mask.")
    if not visible.any():
        raise BadInput("Everything is painted over: leave a part of the picture visible.")
    return visible


def pixel_view(visible: Tensor, unit: int, height: int, width: int) -> np.ndarray:
    """Expands units `[v, h, w]` to pixels, bool `[v, height, width]`."""
    return spread(visible, unit)[:, :height, :width].numpy()
