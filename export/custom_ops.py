"""The one operator that detectors need and torch lacks, and what it becomes in an ONNX file.

Non-maximum suppression finds a number of boxes that depends on the data. `nms_keep` hands out a map of fixed
size in its place: true where a box stays. What depends on the data remains inside the operator, so every
other tensor of an exported detector has a size that is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor


@torch.library.custom_op("coma::nms_keep", mutates_args=())
def nms_keep(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int
) -> Tensor:
    """Which boxes stay when better ones suppress those that they overlap, class by class.

    A box goes when its intersection over union with a better one that stays is more than the threshold.

    Args:
        boxes: Corners (x1, y1, x2, y2) `[b, n, 4]`, shared by the classes of an image.
        scores: `[b, c, n]`.
        iou_threshold: 0 to 1; rounded to float32, as ONNX Runtime does.
        score_threshold: Only scores above it take part.
        limit: At most so many boxes stay of each image and class: the best.

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


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(..., custom_translation_table=...)`: standard operators, from opset 18 on."""
    from onnxscript import opset18

    op: Any = opset18  # its signatures leave no room for results that may be None

    def onnx_nms_keep(boxes, scores, iou_threshold: float, score_threshold: float, limit: int):
        found = op.NonMaxSuppression(  # [k, 3]: image, class, box
            boxes,
            scores,
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(found, end=1))
        nowhere = op.ConstantOfShape(op.Shape(scores))  # numbers: not every runtime scatters booleans
        return op.Greater(op.ScatterND(nowhere, found, ones), op.Constant(value_float=0.5))

    return {torch.ops.coma.nms_keep.default: onnx_nms_keep}
