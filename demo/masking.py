"""From a method's name to what a model gets of a picture, and what it has to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coma.data.transforms import normalize
from coma.errors import BadInput
from coma.masking.patchify import unit_grid
from coma.objectives.degradations import Kind, degrade
from coma.runtimes.model_spec import Preprocessing
from demo.introspection import attention_received
from demo.masks import METHODS, draw_views, guided_view, painted_view, ring, zoomed_view
from demo.models import Model
from demo.resize import Fitted


@dataclass(frozen=True)
class Hidden:
    """What is hidden.

    Attributes:
        visible: Units that each view sees, bool `[v, h, w]`; of a model that zooms in, none of the border.
        degraded: Pixels `[c, H, W]` in place of the picture's, which may leave 0..1; None: the picture.
        everything: The model predicts all pixels, those of visible units too.
    """

    visible: Tensor
    degraded: Tensor | None = None
    everything: bool = False


def hide(
    model: Model, fitted: Fitted, method: str, seed: int, ratio: float, painted: np.ndarray | None = None
) -> Hidden:
    """Hide parts of a picture.

    Args:
        model: Who will rebuild them; it matters where it guides the mask, learned to undo a degradation, or
            zooms in: then its masks are drawn on the centre, of which alone it sees something.
        fitted: The picture.
        method: A key of `METHODS`.
        seed: Of masks and degradations.
        ratio: Share to hide, where that can be chosen.
        painted: For the brush: painted pixels, bool `[H', W']` over the picture without its letter-box.

    Raises:
        BadInput: a picture of too few units for the method, or a brush that covered nothing, or all.
    """
    about = model.description("reconstructor")
    rule = about.preprocessing
    height, width = fitted.pixels.shape[1:]
    h, w = unit_grid(height, width, about.unit)
    rows, cols = ring(h, w) if model.zooms_in else (0, 0)
    inner = h - 2 * rows, w - 2 * cols

    def whole(views: Tensor) -> Tensor:
        return F.pad(views, (cols, cols, rows, rows))

    kind = METHODS[method].degrades
    if kind:
        shown = _degraded(fitted.pixels, seed, kind, rule)
        if model.undoes == kind:
            return Hidden(torch.ones(1, h, w, dtype=torch.bool), shown, everything=True)
        return Hidden(whole(draw_views("coma", seed, *inner)), shown)
    if method == "brush":
        unboxed = _unboxed(np.zeros((1, 1), bool) if painted is None else painted, fitted)
        visible = painted_view(unboxed, height, width, about.unit)
        visible &= whole(torch.ones(1, *inner, dtype=torch.bool))
        if not visible.any():
            raise BadInput("This model sees the centre alone: leave some of that for it to see.")
        return Hidden(visible)
    if method == "zoom-in":
        return Hidden(zoomed_view(h, w))
    if method == "guided":
        image = normalize(fitted.pixels[None], rule.mean, rule.std)
        attention = attention_received(model.encoder(), image)[rows : h - rows, cols : w - cols]
        return Hidden(whole(guided_view(attention, seed, ratio)))
    return Hidden(whole(draw_views(method, seed, *inner, ratio)))


def _degraded(pixels: Tensor, seed: int, kind: Kind, rule: Preprocessing) -> Tensor:
    """Pixels `[c, H, W]` as training degrades them: normalised; "decolor" mixes others than plain ones."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    normalised = normalize(pixels[None], rule.mean, rule.std)
    return degrade(normalised, torch.tensor([seed]), kind)[0][0] * std + mean


def _unboxed(painted: np.ndarray, fitted: Fitted) -> np.ndarray:
    """What was painted on the picture, on the whole of what the model gets."""
    top, left, height, width = fitted.inside
    small = np.asarray(Image.fromarray(painted).convert("L").resize((width, height), Image.Resampling.BOX))
    whole = np.zeros(fitted.pixels.shape[1:], bool)
    whole[top : top + height, left : left + width] = small >= 64
    return whole
