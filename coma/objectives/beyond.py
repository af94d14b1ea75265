"""Beyond Masking: undo other degradations than masks (Tian et al. 2022, arXiv 2203.14313, sec. 3.2 and 4.2).

    zoom-in        the encoder sees the centre of a larger view (224 of 288 px); the whole view is predicted
    zoom-in+mask   and three quarters of that centre are hidden: the best in the paper (83.2 against 82.9
                   for masks alone; ViT-B, 300 epochs, fine-tuned)
    zoom-out+mask  three quarters of the units of a smaller picture are hidden, as in the authors' script
    zoom-in+coma   ours: the centre is shared out over complementary views; each predicts what it does not
                   see, and every one the border
    zoom-out, distort, blur, decolor
                   the encoder sees the whole, degraded (see `coma.objectives.degradations`); all is predicted

The border is whole mask units: a ring of a seventh of the grid, 1 at least, so that 7 units become 9 and 14
become 18, the published 288 for 224 px. The authors stretch a decoder grid of the input's size over the
larger view; here the grid grows by the ring, at the resolution of the rest (ours).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from coma.config import BeyondConfig
from coma.errors import BadInput
from coma.masking.patchify import patchify
from coma.masking.sampling import group_of, group_sizes, keep, partition
from coma.models import Encoder
from coma.objectives.base import MaskedPixels, ObjectiveOutput
from coma.objectives.degradations import Kind, border, centre, degrade
from coma.objectives.targets import Statistics, pixel_targets


class Beyond(MaskedPixels):
    """One of the degradations.

    Images are whole views: zooming in, the encoder sees their centre, which is what --image-size says.

    Args:
        config: Which one, its weights, norm-pix, decoder.
        encoder: Any encoder of this room.

    Raises:
        BadInput: decolor, and an encoder of other than 3 channels.
    """

    config: BeyondConfig

    def __init__(self, config: BeyondConfig, encoder: Encoder) -> None:
        if config.degrade == "decolor" and encoder.config.channels != 3:
            raise BadInput(f"--degrade decolor takes images of 3 channels, not {encoder.config.channels}")
        super().__init__(config, encoder)
        self.picture_note = f"The view is degraded: {config.degrade}."

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Loss of one batch.

        Args:
            images: `[b, c, H, W]`, normalised whole views; H and W whole mask units.
            seeds: int64 `[b]`; masks and degradations are functions of these.
        """
        h, w = self.grid(images)
        visible = self.draw_visible(seeds, h, w)
        shown = self.degraded(images, seeds)
        if self.config.degrade == "zoom-in+coma":
            features = self._encode(shown, visible.long().argmax(dim=0), _sizes(self.config, h, w))
        else:
            features = self._encode(shown, group_of(visible[0]), _sizes(self.config, h, w))
        prediction = self.decoder(features, visible)
        target = pixel_targets(patchify(images, self.encoder.unit), self.config.norm_pix)
        error = (prediction.float() - target).square().mean(dim=-1)
        loss = (error * self.loss_weights(visible)).sum()
        explained = 1 - loss.detach() / target.var().clamp(min=1e-8)
        return ObjectiveOutput(loss, prediction, target, visible, {"explained_variance": explained})

    def loss_weights(self, visible: Tensor) -> Tensor:
        """Returns the weight of every unit in the loss, `[v, b, h, w]`; the weights add up to 1.

        Without a mask all units alike, the visible too: none of them is seen as it is, or (zooming in) they
        are part of the view that is to be rebuilt. With one, the hidden units alone; zooming in, those of the
        centre share 1 - border_weight, and the border the rest.
        """
        if not self.config.masks:
            return torch.full(visible.shape, 1 / visible.numel(), device=visible.device)
        if not self.config.zooms_in:
            return (~visible).float() / (~visible).sum()
        outside = ~_inside(visible.shape[-2], visible.shape[-1], visible.device).expand_as(visible)
        hidden = (~visible & ~outside).float()
        outside = outside.float()
        share = self.config.border_weight
        return hidden * ((1 - share) / hidden.sum().clamp(min=1)) + outside * (share / outside.sum())

    def draw_visible(self, seeds: Tensor, h: int, w: int) -> Tensor:
        """Returns the units of whole views that the encoder sees, see `draw_views`."""
        return draw_views(self.config, seeds, h, w)

    def degraded(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Whole views as the encoder gets them, but for what masks and the border hide."""
        return shown_of(self.config, images, seeds)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Features of the visible units; zooming in, of those in the centre only."""
        return self._encode(images, group_of(visible))

    def reconstruct(self, images: Tensor, visible: Tensor, statistics: Statistics = "visible") -> Tensor:
        """Undo the degradation.

        With masks, and zooming in: hidden units are filled in, among them the border, of which the encoder
        sees nothing even where `visible` says so. Otherwise every unit is predicted from the degraded image.

        Args:
            images: `[b, c, H, W]`, normalised; degraded already. At least 3 mask units a side to zoom in.
            visible: bool `[b, h, w]`.
            statistics: Where mean and contrast come from, see `MaskedPixels.reconstruct`; of an image without
                hidden units they are those of the degraded image either way.
        """
        if self.config.zooms_in:
            visible = visible & _inside(visible.shape[-2], visible.shape[-1], visible.device)
        everywhere = not (self.config.zooms_in or self.config.masks)
        return self.fill_in(images, visible, statistics, everywhere=everywhere)

    def _encode(self, images: Tensor, group: Tensor, sizes: tuple[int, ...] | None = None) -> Tensor:
        # whole views and groups on their grid to features b h w c, zeros outside the centre
        if not self.config.zooms_in:
            return self.encoder.forward_features(images, group, sizes)
        rows, cols = _ring(*group.shape[-2:])
        unit = self.encoder.unit
        seen = centre(images, rows * unit, cols * unit)
        features = self.encoder.forward_features(seen, centre(group, rows, cols), sizes)
        return F.pad(features, (0, 0, cols, cols, rows, rows))


def draw_views(config: BeyondConfig, seeds: Tensor, h: int, w: int) -> Tensor:
    """Returns the units of whole views that an encoder sees: without zoom-in and masks, all.

    Args:
        config: The degradation; a model is not needed.
        seeds: int64 `[b]`.
        h: Rows of units of the whole view.
        w: Columns, likewise.

    Returns:
        bool `[v, b, h, w]`.

    Raises:
        BadInput: too few units to zoom in, or to hide that many of them.
    """
    if not config.zooms_in:
        return keep(seeds, h, w, _sizes(config, h, w)[0])[None]
    rows, cols = _ring(h, w)
    inner = h - 2 * rows, w - 2 * cols
    if config.degrade == "zoom-in+coma":
        group = partition(seeds, *inner, config.views)
        seen = group == torch.arange(config.views, device=group.device)[:, None, None, None]
    else:
        seen = keep(seeds, *inner, _sizes(config, h, w)[0])[None]
    return F.pad(seen, (cols, cols, rows, rows))


def shown_of(config: BeyondConfig, images: Tensor, seeds: Tensor) -> Tensor:
    """Whole views `[b, c, H, W]` as an encoder gets them, but for what masks and the border hide."""
    if config.zooms_in:
        return images
    kind = cast("Kind", config.degrade.removesuffix("+mask"))
    return degrade(images, seeds, kind, config.padding)[0]


def _sizes(config: BeyondConfig, h: int, w: int) -> tuple[int, ...]:
    # units that each view sees
    rows, cols = _ring(h, w) if config.zooms_in else (0, 0)
    units = (h - 2 * rows) * (w - 2 * cols)
    if config.degrade == "zoom-in+coma":
        return group_sizes(units, config.views)
    shown = int(units * (1 - config.mask_ratio)) if config.masks else units
    if shown < 1:
        raise BadInput(f"hiding {config.mask_ratio:.0%} of {units} mask units leaves none to see")
    return (shown,)


def _ring(h: int, w: int) -> tuple[int, int]:
    # rows and columns of units that are border, at either end
    if h < 3 or w < 3:
        raise BadInput(f"a view of {h} x {w} mask units has no centre to zoom in to; it needs 3 x 3")
    return border(h), border(w)


def _inside(h: int, w: int, device: torch.device) -> Tensor:
    # bool h w: the centre of a view
    rows, cols = _ring(h, w)
    inner = torch.ones(h - 2 * rows, w - 2 * cols, dtype=torch.bool, device=device)
    return F.pad(inner, (cols, cols, rows, rows))
