"""A frozen network that tells another where to look and what to predict.

Not a module: who holds a teacher does not train it, save it, shard it or count its weights. It brings images
to what it knows (size, mean and standard deviation), and its answers to the pupil's grid of mask units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coma.config.objectives import AttentionQuery
from coma.models.attention_maps import attend, on_grid


class Teacher:
    """A frozen network.

    Args:
        model: What `attend` can read; it is frozen.
        features: Channels of its last layer.
        size: Height and width in pixels of the images it takes.
        statistics: Mean and standard deviation per channel of pixels scaled to 0..1 that its images are
            normalised by.
        data_statistics: Those that the images it will get are normalised by.
        block: Block whose attention is read, counted from the last.
        query: Query of the attention; both as for `attend`.
    """

    def __init__(
        self,
        model: nn.Module,
        features: int,
        size: tuple[int, int],
        statistics: tuple[Sequence[float], Sequence[float]],
        data_statistics: tuple[Sequence[float], Sequence[float]],
        *,
        block: int = 1,
        query: AttentionQuery = "auto",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.features = features
        self.size = size
        self._block: int = block
        self._query: AttentionQuery = query
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values)[:, None, None] for values in pair] for pair in (statistics, data_statistics)
        )
        self._scale, self._shift = own_std / std, (own_mean - mean) / std

    @torch.no_grad()
    def __call__(self, images: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Returns features and attention for images.

        Args:
            images: `[b, c, H, W]`, normalised by the data's statistics.
            h: Rows of mask units.
            w: Columns of mask units.

        Returns:
            Features `[b, h, w, c]` and attention `[b, h, w]`, which adds up to 1 for every image; float32.
        """
        device = images.device
        if self._scale.device != device:
            self.model.to(device)
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        own = images * self._scale + self._shift
        if own.shape[-2:] != self.size:
            own = F.interpolate(own, self.size, mode="bicubic", antialias=True, align_corners=False)
        return to_units(*attend(self.model, own, block=self._block, query=self._query), h, w)


def to_units(features: Tensor, attention: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Answers of `attend` on a grid of h x w mask units, float32."""
    maps = on_grid(features.float().permute(0, 3, 1, 2), h, w).permute(0, 2, 3, 1)
    share = on_grid(attention.float()[:, None], h, w)[:, 0]
    return maps, share / share.sum(dim=(1, 2), keepdim=True)
