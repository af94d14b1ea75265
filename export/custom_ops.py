"""The operator `nms_keep`, which exported detectors need, and its translation to ONNX.

The number of boxes after non-maximum suppression depends on the data. `nms_keep` returns a mask of fixed size
instead, so the sizes of all other tensors in an exported detector do not depend on the data.
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


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns the `custom_translation_table` of `torch.onnx.export`, with standard operators of opset 18."""
    from onnxscript import opset18

    op: Any = opset18  # its type stubs do not cover optional results

    def onnx_nms_keep(boxes, scores, iou_threshold: float, score_threshold: float, limit: int):
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

    return {torch.ops.coma.nms_keep.default: onnx_nms_keep}
