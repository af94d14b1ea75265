"""Brings the maps of an encoder to the channels and strides of the backbone that it replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from downstream.configs.outputs import Outputs


class OutputAdapter(nn.Module):
    """Chooses the stages of every output by `choose_stages`, projects, resizes and adds them.

    A stage is normalised and, where the channels differ, projected (1x1). Maps are resized bilinearly, or, to
    coarser ones, averaged; of several stages, the coarsest is resized to the next and added to it, and so on.

    Args:
        widths: Channels of the encoder's maps.
        strides: Strides of the encoder's maps; the last map is normalised already.
        outputs: What to output.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], outputs: Outputs) -> None:
        super().__init__()
        self.outputs, self.strides = outputs, tuple(strides)
        self.stages = choose_stages(strides, outputs)
        last = len(widths) - 1

        def path(stage: int, channels: int) -> nn.Module:
            norm = LayerNorm2d(widths[stage]) if stage < last else nn.Identity()
            same = widths[stage] == channels
            return norm if same else nn.Sequential(norm, nn.Conv2d(widths[stage], channels, 1))

        self.paths = nn.ModuleList(
            nn.ModuleList(path(stage, channels) for stage in stages)
            for stages, channels in zip(self.stages, outputs.channels, strict=True)
        )

    def forward(self, images: Tensor, pyramid: Sequence[Tensor]) -> Any:
        """Maps `[b, c, H, W]` and its pyramid to maps `[b, channels_i, ceil(H/s_i), ceil(W/s_i)]`."""
        wanted, maps = self.outputs, []
        for i, (channels, stride) in enumerate(zip(wanted.channels, wanted.strides, strict=True)):
            size = (math.ceil(images.shape[-2] / stride), math.ceil(images.shape[-1] / stride))
            total, before = pyramid[0].new_zeros(1).expand(len(images), channels, *size), stride
            pairs = zip(self.stages[i], self.paths[i], strict=True)  # pyright: ignore[reportArgumentType]
            for number, (stage, path) in enumerate(reversed(list(pairs))):
                map, at = path(pyramid[stage]), self.strides[stage]
                total = map + _resize(total, before, at, map.shape[-2:]) if number else map
                before = at
            total = _resize(total, before, stride, size)
            maps.append(total.contiguous() if self.stages[i] else total)  # some heads take views
        if wanted.single is not None and not self.training:
            return maps[wanted.single]
        if wanted.class_token:
            maps = [[each, each.mean((2, 3))] for each in maps]
        return (images, *maps) if wanted.image else tuple(maps)


def choose_stages(strides: Sequence[int], outputs: Outputs) -> list[tuple[int, ...]]:
    """Returns the numbers of the encoder's stages that every output is made of.

    Each output is the stage with the nearest stride. Where outputs share a stride in the order of their
    depth, as the dilated stages of a ResNet do, later ones get deeper stages. The last one that is used, and
    a single one, also get all stages that are deeper still. Where the strides say nothing about depth
    (decoders, several branches), every output gets all stages from the nearest on. So the last stage always
    has a use.
    """
    count, wanted = len(strides), outputs.strides
    ordered, shared = list(wanted) == sorted(wanted), len(set(wanted)) < len(wanted)
    used = [i for i in range(len(wanted)) if i not in outputs.unused]
    chosen: list[tuple[int, ...]] = []
    for i, stride in enumerate(wanted):
        nearest = min(range(count), key=lambda stage: abs(math.log2(strides[stage] / stride)))
        if i not in used:
            chosen.append(())
        elif not ordered or i in (used[-1], outputs.single):
            chosen.append(tuple(range(nearest, count)))
        else:
            chosen.append((max(nearest, count - len(wanted) + i) if shared else nearest,))
    return chosen


def _resize(map: Tensor, stride: int, wanted: int, size: Sequence[int]) -> Tensor:
    """Resizes a map to another stride; places of both lie over the same pixels."""
    if stride == wanted:
        return map
    if wanted % stride == 0:
        return F.avg_pool2d(map, wanted // stride, ceil_mode=True, count_include_pad=False)
    if stride % wanted == 0:
        finer = F.interpolate(map, scale_factor=stride // wanted, mode="bilinear", align_corners=False)
        return finer[..., : size[0], : size[1]]
    return F.interpolate(map, tuple(size), mode="bilinear", align_corners=False)
