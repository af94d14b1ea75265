"""The operators `largest`, `nms_keep` and `pool_regions` of exported detectors, and their translations.

`largest` is `torch.topk` where equal values keep their order, as in ONNX's TopK: maps in 16 bits have many
equal values, of which torch takes any.

The number of boxes after non-maximum suppression depends on the data. `nms_keep` returns a mask of fixed size
instead, so the sizes of all other tensors in an exported detector do not depend on the data. `pool_regions`
is RoIAlign from several maps. Both are translated to ONNX's own operators, or to loops of basic ones (see
`plugin_free`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor


@torch.library.custom_op("coma::largest", mutates_args=())
def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the largest `count` values of `[b, n]` in descending order, and their indices.

    Of equal values the one with the lower index comes first.
    """
    values, index = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count].clone(), index[:, :count].clone()


@largest.register_fake
def _(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (values.shape[0], count)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("coma::nms_keep", mutates_args=())
def nms_keep(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int
) -> Tensor:
    """Returns the boxes that remain after non-maximum suppression within each class.

    A box is suppressed if its intersection over union with a remaining box of a higher score exceeds the
    threshold.

    Args:
        boxes: Corners (x1, y1, x2, y2) `[b, n, 4]`, shared by all classes of an image.
        scores: `[b, c, n]`.
        iou_threshold: 0 to 1; rounded to float32, as in ONNX Runtime.
        score_threshold: Minimum score, exclusive.
        limit: Maximum number of remaining boxes per image and class.

    Returns:
        Bool `[b, c, n]`.
    """
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    boxes, scores = boxes.float(), scores.float()
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image, label in (scores > score_threshold).any(2).nonzero().tolist():
        index = (scores[image, label] > score_threshold).nonzero()[:, 0]
        stays = torchvision.ops.nms(boxes[image, index], scores[image, label, index], threshold)
        keep[image, label, index[stays[:limit]]] = True
    return keep


@nms_keep.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.custom_op("coma::pool_regions", mutates_args=())
def pool_regions(
    maps: list[Tensor],
    regions: Tensor,
    level: Tensor,
    scales: list[float],
    size: list[int],
    samples: int,
    aligned: bool,
) -> Tensor:
    """Pools every region from the map of its level (RoIAlign, He et al. 2017, arXiv 1703.06870, sec. 3).

    Args:
        maps: `[b, c, h_i, w_i]`, float32.
        regions: Number of the image and corners in pixels of the image `[r, 5]`.
        level: Number of the map of each region, as float `[r]`.
        scales: Pixels of each map per pixel of the image.
        size: Height and width of the result.
        samples: Number of samples along each side of a bin; 0 means one per pixel.
        aligned: Whether the centre of a pixel is at 0.5.

    Returns:
        `[r, c, height, width]`.
    """
    pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *size)
    for number, (scale, x) in enumerate(zip(scales, maps, strict=True)):
        here = level == number
        pooled[here] = torch.ops.torchvision.roi_align(x, regions[here], scale, *size, samples, aligned)
    return pooled


@pool_regions.register_fake
def _(
    maps: list[Tensor],
    regions: Tensor,
    level: Tensor,
    scales: list[float],
    size: list[int],
    samples: int,
    aligned: bool,
) -> Tensor:
    return maps[0].new_empty(regions.shape[0], maps[0].shape[1], *size)


Translations = dict[Callable[..., Any], Callable[..., Any]]
"""The `custom_translation_table` of `torch.onnx.export`: functions that return operators of opset 18."""


def translations(plugin_free: bool = False) -> Translations:
    """Returns translations to NonMaxSuppression and RoiAlign, or to basic operators if `plugin_free`."""
    if plugin_free:
        from export.plugin_free import keep, pool
    else:
        keep, pool = _native_translations()
    return {
        torch.ops.coma.largest.default: _largest,
        torch.ops.coma.nms_keep.default: keep,
        torch.ops.coma.pool_regions.default: pool,
    }


def _largest(values, count: int):
    from onnxscript import opset18

    op: Any = opset18
    return op.TopK(values, op.Constant(value_ints=[count]), axis=1)


def _native_translations() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from onnxscript import opset18

    op: Any = opset18  # its type stubs do not cover optional results

    def keep(boxes, scores, iou_threshold: float, score_threshold: float, limit: int):
        found = op.NonMaxSuppression(  # [k, 3]: image, class, box
            boxes,
            scores,
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(found, end=1))
        nowhere = op.ConstantOfShape(op.Shape(scores))  # floats: not every runtime scatters booleans
        return op.Greater(op.ScatterND(nowhere, found, ones), op.Constant(value_float=0.5))

    def pool(
        maps: Sequence[Any],
        regions,
        level,
        scales: Sequence[float],
        size: Sequence[int],
        samples: int,
        aligned: bool,
    ):
        # Every map pools all regions, but those of other levels have size zero, which costs little.
        image = op.Cast(op.Gather(regions, op.Constant(value_int=0), axis=1), to=7)
        boxes = op.Gather(regions, op.Constant(value_ints=[1, 2, 3, 4]), axis=1)
        pooled = None
        for number, (x, scale) in enumerate(zip(maps, scales, strict=True)):
            here = op.Equal(level, op.Constant(value_float=float(number)))
            found = op.RoiAlign(
                x,
                op.Where(
                    op.Unsqueeze(here, op.Constant(value_ints=[1])), boxes, op.Constant(value_float=0.0)
                ),
                image,
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                spatial_scale=scale,
                output_height=size[0],
                output_width=size[1],
                sampling_ratio=samples,
            )
            there = op.Unsqueeze(here, op.Constant(value_ints=[1, 2, 3]))
            pooled = found if pooled is None else op.Where(there, found, pooled)
        return pooled

    return keep, pool
