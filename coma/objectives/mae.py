"""MAE: masked autoencoding, the baseline (He et al. 2021, arXiv 2111.06377, sec. 3).

A quarter of the units is shown, the rest predicted; the loss is on hidden units only. Hidden tokens are
dropped before the encoder, which is what makes MAE cheap: on a plain ViT and on DyViT alike.
"""

from __future__ import annotations

from torch import Tensor

from coma.config import MAEConfig
from coma.errors import BadInput
from coma.masking.sampling import group_of, keep
from coma.objectives.base import MaskedPixels, ObjectiveOutput


class MAE(MaskedPixels):
    """One random mask.

    Args:
        config: Hidden ratio, norm-pix, decoder.
        encoder: Any encoder of this room.
    """

    config: MAEConfig

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Loss of one batch.

        Args:
            images: `[b, c, H, W]`, normalised; H and W whole mask units.
            seeds: int64 `[b]`; the masks are a function of these.
        """
        h, w = self.grid(images)
        visible = self.draw_visible(seeds, h, w)
        features = self.encoder.forward_features(images, group_of(visible[0]), (self._shown(h, w),))
        return self.predict(images, features, visible)

    def draw_visible(self, seeds: Tensor, h: int, w: int) -> Tensor:
        """Returns the units that the one view sees, bool `[1, b, h, w]`, drawn by int64 `seeds [b]`."""
        return keep(seeds, h, w, self._shown(h, w))[None]

    def _shown(self, h: int, w: int) -> int:
        shown = int(h * w * (1 - self.config.mask_ratio))
        if shown < 1:
            raise BadInput(f"hiding {self.config.mask_ratio:.0%} of {h * w} mask units leaves none to see")
        return shown
