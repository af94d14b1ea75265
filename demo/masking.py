"""From a method's name to what a model gets of a picture, and what it has to predict."""

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


@dataclass(frozen=True)
class MaskedPicture:
    """What is hidden.

    Attributes:
        visible: Units that each view sees, bool `[v, h, w]`; of a model that zooms in, none of the border.
        degraded: Pixels `[c, H, W]` in place of the picture's, which may leave 0..1; None: the picture.
        predicts_all: The model predicts all pixels, those of visible units too.
    """

    visible: Tensor
    degraded: Tensor | None = None
    predicts_all: bool = False


def mask_picture(
    model: Model, resized: Resized, method: str, seed: int, ratio: float, painted: np.ndarray | None = None
) -> MaskedPicture:
    """Hide parts of a picture.

    Args:
        model: Who will rebuild them; it matters where it guides the mask, learned to undo a degradation, or
            zooms in: then its masks are drawn on the centre, of which alone it sees something.
        resized: The picture.
        method: A key of `METHODS`.
        seed: Of masks and degradations.
        ratio: Share to hide, where that can be chosen.
        painted: For the brush: painted pixels, bool `[H', W']` over the picture without its letter-box.

    Raises:
        BadInput: a picture of too few units for the method, or a brush that covered nothing, or all.
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
            raise BadInput("This model sees the centre alone: leave some of that for it to see.")
        return MaskedPicture(visible)
    if method == "zoom-in":
        return MaskedPicture(zoom_in_view(h, w))
    if method == "guided":
        image = normalize(resized.pixels[None], rule.mean, rule.std)
        attention = attention_received(model.encoder(), image)[rows : h - rows, cols : w - cols]
        return MaskedPicture(whole(attention_view(attention, seed, ratio)))
    return MaskedPicture(whole(sample_views(method, seed, *inner, ratio)))


def _degraded(pixels: Tensor, seed: int, kind: Kind, rule: Preprocessing) -> Tensor:
    """Pixels `[c, H, W]` as training degrades them: normalised; "decolor" mixes others than plain ones."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    normalised = normalize(pixels[None], rule.mean, rule.std)
    return degrade(normalised, torch.tensor([seed]), kind)[0][0] * std + mean


def _unboxed(painted: np.ndarray, resized: Resized) -> np.ndarray:
    """What was painted on the picture, on the whole of what the model gets."""
    top, left, height, width = resized.content
    small = np.asarray(Image.fromarray(painted).convert("L").resize((width, height), Image.Resampling.BOX))
    whole = np.zeros(resized.pixels.shape[1:], bool)
    whole[top : top + height, left : left + width] = small >= 64
    return whole


PAINTED = 0.1
"""A unit is hidden when the brush covered at least this share of it."""


LARGEST_SEED = 2**31 - 1


_UNLEARNT = "A model that learned this undoes it; others rebuild each half of it from the other half."


@dataclass(frozen=True)
class Method:
    """A way to hide parts of a picture.

    Attributes:
        title: For the picker.
        about: One sentence.
        views: How many complementary views; 1 is a single mask.
        ratio: Whether the share that is hidden can be chosen.
        seed: Whether it is drawn at random.
        degrades: Which degradation of `coma.objectives.degradations` the input gets.
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
        "Every unit is seen by one of two views; each view rebuilds what the other one saw.",
        views=2,
    ),
    "coma4": Method(
        "CoMA: four views",
        "The units are shared out over four views; each sees a quarter and rebuilds the rest.",
        views=4,
    ),
    "mae": Method("MAE: one random mask", "One view sees a random share of the units.", ratio=True),
    "guided": Method(
        "CMT: hide where the model looks",
        "Hidden units are drawn in proportion to the attention that they get from the model itself.",
        ratio=True,
    ),
    "zoom-in": Method(
        "Beyond Masking: zoom in", "The model sees the centre, and draws the border.", seed=False
    ),
    "zoom-out": Method(
        "Beyond Masking: zoom out",
        f"The picture is shrunk and mirrored outwards. {_UNLEARNT}",
        degrades="zoom-out",
    ),
    "distort": Method("Beyond Masking: distort", f"Seen through a fisheye. {_UNLEARNT}", degrades="distort"),
    "blur": Method("Beyond Masking: blur", f"Blurred by a random kernel. {_UNLEARNT}", degrades="blur"),
    "decolor": Method(
        "Beyond Masking: take the colour",
        f"A random mixture of the channels. {_UNLEARNT}",
        degrades="decolor",
    ),
    "brush": Method("Brush: you paint what to hide", "One view sees what you left unpainted.", seed=False),
}


def zoom_in_view(h: int, w: int) -> Tensor:
    """What a view sees that zoomed in, bool `[1, h, w]`: all but the border.

    Raises:
        BadInput: fewer than 3 x 3 units.
    """
    rows, cols = border_units(h, w)
    inner = torch.ones(1, h - 2 * rows, w - 2 * cols, dtype=torch.bool)
    return F.pad(inner, (cols, cols, rows, rows))


def border_units(h: int, w: int) -> tuple[int, int]:
    """Rows and columns of units, at either end, that zooming in leaves out.

    Raises:
        BadInput: fewer than 3 x 3 units.
    """
    if min(h, w) < 3:
        raise BadInput(f"This picture has {h} x {w} mask units; zooming in needs 3 x 3.")
    return border(h), border(w)


def attention_view(attention: Tensor, seed: int, mask_ratio: float) -> Tensor:
    """What a view sees when units were hidden in proportion to `attention [h, w]`: bool `[1, h, w]`."""
    from coma.masking.sampling import draw

    units = attention.numel()
    hidden = min(max(round(units * mask_ratio), 1), units - 1)
    drawn: Callable[..., Tensor] = draw
    return ~drawn(attention[None], torch.tensor([seed]), hidden)


def sample_views(method: str, seed: int, h: int, w: int, mask_ratio: float = 0.75) -> Tensor:
    """Units that each view sees, bool `[v, h, w]`.

    Args:
        method: coma, coma4 or mae.
        seed: 0 to `LARGEST_SEED`.
        h: Rows of units.
        w: Columns of units.
        mask_ratio: Of mae: share of the units to hide; one at least is hidden and one is seen.

    Raises:
        BadInput: too few units for so many views, or a method that draws nothing.
    """
    seeds = torch.tensor([seed])
    views = METHODS[method].views
    if views > 1:
        if h * w < views:
            raise BadInput(f"This picture has {h * w} mask units, too few for {views} views.")
        group = partition(seeds, h, w, views)[0]
        return group == torch.arange(views)[:, None, None]
    if method != "mae":
        raise BadInput(f"{METHODS[method].title}: draws no mask")
    if h * w < 2:
        raise BadInput("This picture is a single mask unit: nothing would be left to see.")
    shown = min(max(round(h * w * (1 - mask_ratio)), 1), h * w - 1)
    return keep(seeds, h, w, shown)


def painted_view(covered: np.ndarray, height: int, width: int, unit: int) -> Tensor:
    """What a view sees when a person painted over the rest.

    Args:
        covered: bool `[H', W']`, painted pixels, at whatever size the brush had.
        height: Pixels of the picture.
        width: Likewise.
        unit: Side of a mask unit in pixels.

    Returns:
        bool `[1, h, w]`, False for units of which at least `PAINTED` was covered.

    Raises:
        BadInput: nothing was painted, or everything.
    """
    paint = torch.from_numpy(np.ascontiguousarray(covered, dtype=np.float32))[None, None]
    fine = F.interpolate(paint, (height, width), mode="area")
    h, w = -(-height // unit), -(-width // unit)
    padded = F.pad(fine, (0, w * unit - width, 0, h * unit - height))
    real = F.pad(torch.ones_like(fine), (0, w * unit - width, 0, h * unit - height))
    share = F.avg_pool2d(padded, unit) / F.avg_pool2d(real, unit)
    visible = share[0] < PAINTED
    if visible.all():
        raise BadInput("Nothing is painted yet: draw over the picture what the model shall not see.")
    if not visible.any():
        raise BadInput("Everything is painted over: leave something for the model to see.")
    return visible


def pixel_view(visible: Tensor, unit: int, height: int, width: int) -> np.ndarray:
    """Views of units `[v, h, w]` as pixels, bool `[v, height, width]`."""
    return spread(visible, unit)[:, :height, :width].numpy()
