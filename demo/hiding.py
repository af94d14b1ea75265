"""From a method's name to what a model gets of a picture, and what it has to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.fit import Fitted
from demo.inside import attention_received
from demo.masks import METHODS, draw_views, guided_view, painted_view, zoomed_view
from demo.models import Model
from pretrain.data.transforms import normalize
from pretrain.degradations import degrade
from pretrain.masking.units import unit_grid


@dataclass(frozen=True)
class Hidden:
    """What is hidden.

    Attributes:
        visible: Units that each view sees, bool `[v, h, w]`.
        degraded: Pixels `[c, H, W]` in 0..1 in place of the picture's; None: the picture.
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
        model: Who will rebuild them; it matters where it guides the mask, or learned to undo a degradation.
        fitted: The picture.
        method: A key of `METHODS`.
        seed: Of masks and degradations.
        ratio: Share to hide, where that can be chosen.
        painted: For the brush: painted pixels, bool `[H', W']` over the picture without its letter-box.

    Raises:
        BadInput: a picture of too few units for the method, or a brush that covered nothing, or all.
    """
    about = model.description("reconstructor")
    height, width = fitted.pixels.shape[1:]
    h, w = unit_grid(height, width, about.unit)
    kind = METHODS[method].degrades
    if kind:
        shown = degrade(fitted.pixels[None], torch.tensor([seed]), kind)[0][0].clamp(0, 1)
        if model.undoes == kind:
            return Hidden(torch.ones(1, h, w, dtype=torch.bool), shown, everything=True)
        return Hidden(draw_views("coma", seed, h, w), shown)
    if method == "brush":
        nothing = np.zeros((1, 1), bool)
        return Hidden(
            painted_view(_unboxed(nothing if painted is None else painted, fitted), height, width, about.unit)
        )
    if method == "zoom-in":
        return Hidden(zoomed_view(h, w))
    if method == "guided":
        rule = about.preprocessing
        image = normalize(fitted.pixels[None], rule.mean, rule.std)
        return Hidden(guided_view(attention_received(model.encoder(), image), seed, ratio))
    return Hidden(draw_views(method, seed, h, w, ratio))


def _unboxed(painted: np.ndarray, fitted: Fitted) -> np.ndarray:
    """What was painted on the picture, on the whole of what the model gets."""
    top, left, height, width = fitted.inside
    small = np.asarray(Image.fromarray(painted).convert("L").resize((width, height), Image.Resampling.BOX))
    whole = np.zeros(fitted.pixels.shape[1:], bool)
    whole[top : top + height, left : left + width] = small >= 64
    return whole
