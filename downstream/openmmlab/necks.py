"""Simple feature pyramid of a plain ViT (ViTDet, Li et al. 2022, arXiv 2203.16527, sec. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from coma.errors import BadInput


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps at 4, 2, 1 and 1/2 times the resolution of the last input, each from its own layers.

    Args:
        in_channels: Channels of the backbone's map; the last entry of a sequence.
        out_channels: Channels of every output map.
        num_outs: Number of output maps; those beyond 1/2 are subsampled, as in FPN.
        start_level: Number of finest maps to omit, 0 to 3; 1 for RetinaNet.
        init_cfg: As in mmengine.

    Raises:
        BadInput: inconsistent numbers, or channels that are not a multiple of 4.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        num_outs: int = 4,
        start_level: int = 0,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        dim = in_channels if isinstance(in_channels, int) else in_channels[-1]
        if dim % 4:
            raise BadInput(f"SimpleFeaturePyramid: in_channels {dim} must be a multiple of 4")
        if not 0 <= start_level < 4 or num_outs < 4 - start_level:
            raise BadInput(
                f"SimpleFeaturePyramid: start_level {start_level} must be 0 to 3, and num_outs {num_outs} "
                "at least the rest of 4"
            )
        self.num_outs = num_outs
        twice = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        resample = (
            (nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU(),
             nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)),
            (twice,),
            (),
            (nn.MaxPool2d(2),),
        )  # fmt: skip
        widths = (dim // 4, dim // 2, dim, dim)
        self.paths = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for layers, width in list(zip(resample, widths, strict=True))[start_level:]
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps the last of `inputs`, `[b, c, h, w]`, to `[b, out_channels, ...]`, finest first."""
        maps = [path(inputs[-1]) for path in self.paths]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return tuple(maps)
