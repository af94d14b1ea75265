"""mmcv's compiled operators, implemented with torchvision, torch and NumPy.

    operator                            from
    nms                                 torchvision
    roi_align, avg, forward, backward   torchvision
    softnms, nms_match                  NumPy, here (mmcv calls both with CPU tensors only)
    sigmoid and softmax focal loss      torch, here
    over whole maps                     `mmcv_dense_ops`

Calling conventions are those of mmcv 2.1.0 (`mmcv/ops/csrc`): outputs are arguments, filled in place. Half
precision is computed in float32 and rounded once. `benchmarks/check_ops.py` compares `OPERATORS` with a
compiled mmcv.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from coma.errors import BadInput
from downstream.openmmlab.mmcv_dense_ops import DENSE_OPERATORS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

COMPILE = (
    "`pip uninstall mmcv-lite`, then "
    "`MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir mmcv==2.1.0`"
)
_TINY = 1.1754944e-38  # the smallest normal float32, below which mmcv's focal losses take no logarithm


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression: drops boxes that a better box overlaps by more than the threshold.

    Args:
        boxes: Corners `[n, 4]` (x1, y1, x2, y2).
        scores: `[n]`.
        iou_threshold: Rounded to float32, as mmcv does: an overlap of exactly 0.6 stays at 0.6.
        offset: A box is x2 - x1 + offset wide.

    Returns:
        Indices of the kept boxes, best first, int64 `[m]`.
    """
    import torch
    import torchvision

    boxes = _wide(boxes)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression (Bodla et al. 2017, arXiv 1704.04503): overlap lowers scores.

    The best box is taken; every other score is multiplied by a weight of its overlap o with that box; scores
    below `min_score` go; and again. The very first box is taken whatever its score, as mmcv does. Of equal
    scores the first counts; mmcv's order of equal scores depends on what was dropped before. Two boxes
    without area do not overlap; mmcv's gaussian weight of them is NaN.

    Args:
        boxes: Corners `[n, 4]`, on the CPU.
        scores: `[n]`.
        dets: `[n, 5]`; its first m rows are overwritten with the boxes taken and their lowered scores.
        iou_threshold: Overlap from which methods 0 and 1 act.
        sigma: Of method 2.
        min_score: What a lowered score has to reach.
        method: Weight 0 (naive, 0), 1 - o (linear, 1), each where o reaches the threshold, or
            exp(-o^2 / sigma) everywhere (gaussian, 2).
        offset: A box is x2 - x1 + offset wide.

    Returns:
        Indices of the boxes taken, in that order, int64 `[m]`.
    """
    import numpy as np
    import torch

    rest, score, index = _array(boxes), _array(scores), np.arange(len(boxes))
    taken: list[int] = []
    lowered: list[float] = []
    while len(index):
        best = score.argmax()
        taken.append(int(index[best]))
        lowered.append(float(score[best]))
        overlap = _overlap(rest[best], rest, offset)
        if method == 0:
            weight = overlap < iou_threshold
        elif method == 1:
            weight = 1 - overlap * (overlap >= iou_threshold)
        else:
            weight = np.exp(-overlap * overlap / sigma)
        score = score * weight
        stays = score >= min_score
        stays[best] = False
        rest, score, index = rest[stays], score[stays], index[stays]
    inds = torch.tensor(taken, dtype=torch.int64)
    dets[: len(inds), :4] = boxes[inds]
    dets[: len(inds), 4] = torch.tensor(lowered, dtype=dets.dtype)
    return inds


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups every kept box with the boxes that it suppresses.

    Args:
        dets: Corners and score `[n, 5]`, on the CPU.
        iou_threshold: Overlap from which a box is suppressed.

    Returns:
        A list per kept box, best first: its index, then the indices of its group, best first.
    """
    array = _array(dets)
    order = (-array[:, 4]).argsort(kind="stable")
    groups = []
    while len(order):
        best, others = order[0], order[1:]
        gone = _overlap(array[best, :4], array[others, :4], 0) >= iou_threshold
        groups.append([int(best), *others[gone].tolist()])
        order = others[~gone]
    return groups


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (Mask R-CNN, He et al. 2017, arXiv 1703.06870, sec. 3): averages of bilinear samples.

    Args:
        input: `[b, c, h, w]`.
        rois: Image and corners `[n, 5]`; a corner times `spatial_scale` is in pixels of `input`.
        output: `[n, c, aligned_height, aligned_width]`, overwritten.
        argmax_y: Of max pooling; unused.
        argmax_x: Of max pooling; unused.
        aligned_height: Bins of a region from top to bottom.
        aligned_width: Bins of a region from left to right.
        spatial_scale: Pixels of `input` per unit of `rois`.
        sampling_ratio: Samples along each side of a bin; 0 is one per pixel of the bin, rounded up.
        pool_mode: 1 is avg; 0 is max, which is refused.
        aligned: Whether the middle of a pixel is at 0.5; otherwise it is at 0, and a region is at least one
            pixel wide and high.

    Raises:
        BadInput: max pooling is asked for.
    """
    import torch
    import torchvision  # noqa: F401 - registers the operator

    _average_only(pool_mode)
    x = _wide(input)
    output.copy_(
        torch.ops.torchvision.roi_align(
            x, rois.to(x.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient of `roi_align_forward`'s input, `[b, c, h, w]`, to `grad_input`.

    On a GPU the order of its sums varies, as in mmcv; `torch.use_deterministic_algorithms` refuses it.

    Raises:
        BadInput: max pooling is asked for.
    """
    import torch
    import torchvision  # noqa: F401 - registers the operator

    _average_only(pool_mode)
    grad = _wide(grad_output)
    b, c, h, w = grad_input.shape
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad, rois.to(grad.dtype), spatial_scale, aligned_height, aligned_width, b, c, h, w, sampling_ratio,
        aligned,
    )  # fmt: skip


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Sigmoid focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5).

    With p = sigmoid(input): -alpha (1-p)^gamma log(p) for the target class, -(1-alpha) p^gamma log(1-p) for
    all others. Logarithms are taken of the logits; mmcv's, taken of p in float32, stop at -87.

    Args:
        input: Logits `[n, c]`.
        target: Class, int64 `[n]`; any value outside 0..c-1, such as c, is background: no class is right.
        weight: Of every class `[c]`, or empty; there is none for background, which then fails.
        output: `[n, c]`, overwritten; a row is multiplied by the weight of its target.
        gamma: How much less a well classified example counts.
        alpha: Share of the target class.
    """
    from torch.nn.functional import logsigmoid

    x = _wide(input)
    p, right = x.sigmoid(), _one_hot(target, x.shape[1])
    yes = alpha * (1 - p) ** gamma * logsigmoid(x)
    no = (1 - alpha) * p**gamma * logsigmoid(-x)
    output.copy_(-yes.where(right, no) * _row_weight(weight, target)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Overwrites `grad_input` with the element-wise derivative of `sigmoid_focal_loss_forward`."""
    from torch.nn.functional import logsigmoid

    x = _wide(input)
    p, right = x.sigmoid(), _one_hot(target, x.shape[1])
    yes = alpha * (1 - p) ** gamma * (1 - p - gamma * p * logsigmoid(x))
    no = (1 - alpha) * p**gamma * (gamma * (1 - p) * logsigmoid(-x) - p)
    grad_input.copy_(-yes.where(right, no) * _row_weight(weight, target)[:, None])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Softmax focal loss: -alpha (1-p)^gamma log(p), where p is the probability of the target class.

    Args:
        input: Probabilities `[n, c]`: mmcv takes the softmax before.
        target: Class, int64 `[n]`; a negative one costs nothing.
        weight: Of every class `[c]`, or empty.
        output: `[n]`, overwritten.
        gamma: How much less a well classified example counts.
        alpha: Factor of all.
    """
    p = _of_target(_wide(input), target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=_TINY).log()
    output.copy_((loss * _row_weight(weight, target.clamp(min=0))).where(target >= 0, 0))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Overwrites `grad_input` `[n, c]` with the derivative of the softmax focal loss by the logits.

    `buff` `[n]` receives the derivative by the logarithm of p.
    """
    probabilities = _wide(input)
    p = _of_target(probabilities, target)
    q = (1 - p).clamp(min=_TINY)
    slope = alpha * (gamma * q ** (gamma - 1) * p * p.clamp(min=_TINY).log() - q**gamma)
    buff.copy_((slope * _row_weight(weight, target.clamp(min=0))).where(target >= 0, 0))
    right = _one_hot(target, probabilities.shape[1])
    grad_input.copy_(_wide(buff)[:, None] * (right.to(p.dtype) - probabilities))


def get_compiler_version() -> str:
    """Returns the entry for mmcv's compiler in environment reports."""
    return f"none: operators of torchvision {version('torchvision')}"


def get_compiling_cuda_version() -> str:
    """Returns what mmcv returns when it is compiled without CUDA."""
    return "not available"


OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        nms_match,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        softmax_focal_loss_forward,
        softmax_focal_loss_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
} | DENSE_OPERATORS
"""Operators of the module that replaces `mmcv._ext`."""


def raise_unsupported(operator: str) -> None:
    """Refuses an operator that needs a compiled mmcv, and says how to install one.

    Raises:
        BadInput: always.
    """
    raise BadInput(f"{operator} needs a compiled mmcv: {COMPILE}")


def _average_only(pool_mode: int) -> None:
    if pool_mode != 1:
        raise_unsupported("roi_align with pool_mode='max'")


def _wide(x: Tensor) -> Tensor:
    """Converts half precision to float32; float64 stays."""
    return x if x.element_size() >= 4 else x.float()


def _array(x: Tensor) -> np.ndarray:
    return _wide(x.detach()).numpy()


def _overlap(box: np.ndarray, boxes: np.ndarray, offset: int) -> np.ndarray:
    """Returns the IoU of a box `[4]` with boxes `[n, 4]`: `[n]`; 0 where both are empty."""
    import numpy as np

    def area(corners: np.ndarray) -> np.ndarray:
        return (corners[..., 2] - corners[..., 0] + offset) * (corners[..., 3] - corners[..., 1] + offset)

    width = np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0]) + offset
    height = np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1]) + offset
    both = width.clip(min=0) * height.clip(min=0)
    either = area(box) + area(boxes) - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """Bool `[n, classes]`."""
    import torch

    return target[:, None] == torch.arange(classes, device=target.device)


def _row_weight(weight: Tensor, target: Tensor) -> Tensor:
    """Returns the weight of every row's class `[n]`, or a one `[1]` if `weight` is empty."""
    weight = _wide(weight)
    return weight.index_select(0, target) if weight.numel() else weight.new_ones(1)


def _of_target(probabilities: Tensor, target: Tensor) -> Tensor:
    return probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
