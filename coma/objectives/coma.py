"""CoMA: complementary masked autoencoding (Li et al. 2025, arXiv 2511.05929).

The mask units of an image are shared out into K groups; each group is one view, is encoded from its own
pixels only, and predicts all the other units. Every pixel is supervised in every step, equally often. As
the groups are disjoint, encoding all views, one sequence each, costs about as much as encoding the image.

Earlier work with complementary or parallel masks: MixMAE (arXiv 2205.13137), EMAE (arXiv 2302.14431),
DMJD (arXiv 2301.00230).

Controls: `independent` draws K unrelated masks of the same ratio; `single` keeps one view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coma.config import CoMAConfig
from coma.masking.sampling import group_of, group_sizes, keep, partition
from coma.objectives.base import MaskedPixels, ObjectiveOutput


class CoMA(MaskedPixels):
    """Complementary masks.

    Args:
        config: Number of views, kind of masks, norm-pix, decoder.
        encoder: Any encoder of this room.
    """

    config: CoMAConfig

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Loss of one batch.

        Args:
            images: `[b, c, H, W]`, normalised; H and W whole mask units.
            seeds: int64 `[b]`; the masks are a function of these.
        """
        h, w = self.grid(images)
        if self.config.masks == "complementary":
            group = self.assign_units(images, seeds, h, w)
            features = self.encoder.forward_features(images, group, group_sizes(h * w, self.config.views))
            return self.predict(images, features, self._views_of(group))
        visible = self.draw_visible(seeds, h, w)
        views = len(visible)
        features = self.encoder.forward_features(
            images.repeat(views, 1, 1, 1), group_of(visible.flatten(0, 1)), (self._shown(h, w),)
        )
        return self.predict(images, features.unflatten(0, (views, -1)), visible)

    def assign_units(self, images: Tensor, seeds: Tensor, h: int, w: int) -> Tensor:
        """Returns the view of every unit, int64 `[b, h, w]`, of sizes as in `group_sizes`: here at random."""
        return partition(seeds, h, w, self.config.views)

    def draw_visible(self, seeds: Tensor, h: int, w: int) -> Tensor:
        """Returns the units that each view sees, bool `[v, b, h, w]`, drawn by int64 `seeds [b]`."""
        if self.config.masks == "complementary":
            return self._views_of(partition(seeds, h, w, self.config.views))
        views = self.config.views if self.config.masks == "independent" else 1
        return torch.stack([keep(seeds, h, w, self._shown(h, w), salt=1 + view) for view in range(views)])

    def _views_of(self, group: Tensor) -> Tensor:
        return group == torch.arange(self.config.views, device=group.device)[:, None, None, None]

    def _shown(self, h: int, w: int) -> int:
        return group_sizes(h * w, self.config.views)[0]
