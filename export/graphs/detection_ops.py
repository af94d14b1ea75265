"""Detection as functions of tensors whose sizes do not depend on the content of the image.

    map       b a*c h w   output of a dense head at one level: a anchors per position, c values per anchor
    boxes     b n 4       corners x1 y1 x2 y2 in pixels of the image
    scores    b n         0 in slots without a box

No Python branch depends on a value or on a dynamic size, so a trace at one size holds at all sizes: lists are
padded to a fixed length, and only `nms_keep` depends on the number of boxes. Arithmetic is in float32 in all
precisions, because pixel coordinates of a large image need more digits than half precision has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coma.masking.patchify import cover
from export.custom_ops import largest, nms_keep, pool_regions

LONGEST_STEP = -math.log(16 / 1000)
"""Maximum absolute logarithm of the ratio of a box's side to its anchor's, as in mmdet."""
NEVER = -1e4
"""Logit of an empty slot."""
_LARGEST_LOGIT = 80.0  # exp(80) and exp(-80) are finite in float32


@dataclass(frozen=True)
class BoxCode:
    """Encoding of boxes as differences (dx, dy, log dw, log dh) from other boxes.

    Attributes:
        means: Means of the normalised differences.
        stds: Standard deviations of the normalised differences.
        clip: Whether boxes are clipped at the border of the image.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    clip: bool


@dataclass(frozen=True)
class Candidates:
    """Settings that turn the maps of a dense head into boxes.

    Attributes:
        strides: Strides (x, y) of every level in pixels.
        anchors: Anchors of every level, as corners around the origin in pixels.
        code: Encoding of boxes relative to anchors.
        before: Maximum number of boxes per level and image before suppression (the most likely ones).
        smallest: Boxes must be wider and higher than this; None keeps all.
        iou: Overlap (IoU) above which the box with the lower score is suppressed.
        score: Minimum score; 0 for region proposals.
        limit: Maximum number of boxes per image.
    """

    strides: tuple[tuple[float, float], ...]
    anchors: tuple[tuple[tuple[float, ...], ...], ...]
    code: BoxCode
    before: int
    smallest: float | None
    iou: float
    score: float
    limit: int


@dataclass(frozen=True)
class Pooling:
    """Settings of RoIAlign, which pools regions of a pyramid to maps of one size.

    Attributes:
        size: Height and width of the pooled maps.
        strides: Strides of the levels.
        samples: Number of samples along each side of a bin; 0 means one per pixel.
        aligned: Whether the centre of a pixel is at 0.5.
        finest: Regions with a side below twice this number of pixels use the finest level.
    """

    size: tuple[int, int]
    strides: tuple[float, ...]
    samples: int
    aligned: bool
    finest: float


def image_corner(images: Tensor) -> Tensor:
    """Returns the width and height of images `[b, c, H, W]` in pixels, float32 `[2]`."""
    height, width = images.shape[-2:]
    sides = [torch.full((1,), side, dtype=torch.float32, device=images.device) for side in (width, height)]
    return torch.cat(sides)


def pad_images(images: Tensor, divisor: int, value: float) -> Tensor:
    """Pads images `[b, c, H, W]` with `value` at the right and bottom to multiples of `divisor` pixels."""
    height, width = (cover(side, divisor) * divisor for side in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), value=value)


def anchors_at(index: Tensor, anchors: Tensor, stride: tuple[float, float], width: int) -> Tensor:
    """Returns some anchors of a level (Faster R-CNN, Ren et al. 2015, arXiv 1506.01497, sec. 3.1.1).

    Args:
        index: Numbers of the anchors `[...]`, counted by position in rows.
        anchors: Anchors of one position `[a, 4]`, as corners around the origin in pixels.
        stride: Distance between positions, horizontally and vertically, in pixels.
        width: Number of positions in a row.

    Returns:
        Corners `[..., 4]`, in pixels.
    """
    place = index // len(anchors)
    row = place // width
    middle = torch.stack(((place - row * width) * stride[0], row * stride[1]), -1)
    return anchors[index - place * len(anchors)] + torch.cat((middle, middle), -1)


def decode_boxes(anchors: Tensor, deltas: Tensor, code: BoxCode, corner: Tensor) -> Tensor:
    """Decodes boxes (R-CNN, Girshick et al. 2014, arXiv 1311.2524, app. C).

    The centre moves by dx, dy times the sides of the anchor; the sides are multiplied by exp(dw), exp(dh).

    Args:
        anchors: `[..., 4]`, anchors or other boxes, in pixels.
        deltas: dx, dy, dw, dh `[..., 4]`, normalised as in `code`.
        code: Means and standard deviations of the deltas, and whether boxes are clipped.
        corner: Width and height of the image `[2]`.

    Returns:
        Corners `[..., 4]`, in pixels.
    """
    deltas = deltas * deltas.new_tensor(code.stds) + deltas.new_tensor(code.means)
    sides = anchors[..., 2:] - anchors[..., :2]
    middle = (anchors[..., :2] + anchors[..., 2:]) / 2 + sides * deltas[..., :2]
    halves = sides * deltas[..., 2:].clamp(-LONGEST_STEP, LONGEST_STEP).exp() / 2
    ends = (middle - halves, middle + halves)
    if code.clip:
        ends = tuple(torch.minimum(end.clamp(min=0), corner) for end in ends)
    return torch.cat(ends, -1)


def odds_of(logits: Tensor) -> Tensor:
    """Returns the odds p / (1 - p), which keep the order of the logits; 0 for empty slots.

    Probabilities may lose that order: runtimes approximate the sigmoid, and ONNX Runtime's has an absolute
    error of 1e-7 and is 0 below -18, so suppression among unlikely boxes would differ from PyTorch.
    """
    return torch.where(logits > NEVER, logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).exp(), 0)


def probability_of(odds: Tensor) -> Tensor:
    """Returns the probability odds / (1 + odds)."""
    return odds / (1 + odds)


def likeliest(values: Tensor, count: int, least: float) -> tuple[Tensor, Tensor]:
    """Returns the largest `count` values of `[b, n]` in descending order, and their indices.

    If n is less than `count`, the remaining slots hold `least` and index 0.
    """
    values, index = largest(F.pad(values, (0, count), value=least), count)
    return values, torch.where(values > least, index, 0)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Gathers the rows `[b, k]` of `[b, n, ...]` into `[b, k, ...]`."""
    rest = rows.shape[2:]
    return rows.gather(1, index.reshape(*index.shape, *(1 for _ in rest)).expand(-1, -1, *rest))


def level_candidates(
    level: int, logits: Tensor, deltas: Tensor, settings: Candidates, corner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the most likely boxes of one level of an RPN or RetinaNet (Lin et al. 2017, arXiv 1708.02002).

    Args:
        level: Number of the level, 0 for the finest one.
        logits: Map of `a * c` channels with a logit for each class.
        deltas: Map of `a * 4` channels.
        settings: Anchors, encoding and numbers of boxes.
        corner: Width and height of the image `[2]`.

    Returns:
        Boxes `[b, k, 4]`, odds `[b, k]`, class int64 `[b, k]`; k is `settings.before`.
    """
    width = logits.shape[-1]
    anchors = logits.new_tensor(settings.anchors[level], dtype=torch.float32)
    classes = logits.shape[1] // len(anchors)
    logits, deltas = (x.float().permute(0, 2, 3, 1) for x in (logits, deltas))  # b h w a*c
    best, index = likeliest(logits.flatten(1), settings.before, NEVER)
    place = index // classes  # number of the anchor
    around = anchors_at(place, anchors, settings.strides[level], width)
    told = take(deltas.reshape(deltas.shape[0], -1, 4), place)
    boxes, odds = decode_boxes(around, told, settings.code, corner), odds_of(best)
    if settings.smallest is not None:
        sides = boxes[..., 2:] - boxes[..., :2]
        odds = torch.where((sides > settings.smallest).all(-1), odds, 0)
    return boxes, odds, index - place * classes


def region_features(features: list[Tensor], boxes: Tensor, pooling: Pooling) -> Tensor:
    """RoIAlign (Mask R-CNN, He et al. 2017, arXiv 1703.06870, sec. 3) from the level that fits a region.

    The level is floor(k0 + log2(sqrt(area) / 224)) (FPN, Lin et al. 2017, arXiv 1612.03144, sec. 4.2, eq. 1).

    Args:
        features: Maps `[b, c, h_i, w_i]`, finest first.
        boxes: `[b, n, 4]`.
        pooling: Sizes, strides and samples.

    Returns:
        `[b * n, c, height, width]`, in the type of `features`.
    """
    batch, count = boxes.shape[:2]
    image = torch.arange(batch, dtype=boxes.dtype, device=boxes.device)[:, None, None].expand(-1, count, 1)
    regions = torch.cat((image, boxes), 2).flatten(0, 1)  # b*n 5
    sides = regions[:, 3:] - regions[:, 1:3]
    level = (sides.prod(1).sqrt() / pooling.finest + 1e-6).log2().floor()
    level = level.clamp(0, len(pooling.strides) - 1)
    maps = [x.float() for x in features[: len(pooling.strides)]]
    scales = [1 / stride for stride in pooling.strides]
    pooled = pool_regions(maps, regions, level, scales, list(pooling.size), pooling.samples, pooling.aligned)
    return pooled.to(features[0].dtype)


def best_boxes(
    boxes: Tensor, scores: Tensor, iou: float, score: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the most likely `limit` boxes of all classes after suppression.

    Args:
        boxes: `[b, 1, n, 4]` if all classes share them, else `[b, c, n, 4]`.
        scores: Probabilities or odds `[b, c, n]`.
        iou: Overlap (IoU) above which the box of a class with the lower score is suppressed.
        score: Minimum score, exclusive.
        limit: Maximum number of boxes per image.

    Returns:
        Boxes `[b, limit, 4]`, scores `[b, limit]` in descending order and classes, int64 `[b, limit]`; empty
        slots hold 0, 0 and -1.
    """
    classes, count = scores.shape[1:]
    if boxes.shape[1] == 1:
        keep = nms_keep(boxes[:, 0], scores, iou, score, min(limit, count))
        boxes = boxes.expand(-1, classes, -1, -1)
    else:
        alone = scores.reshape(-1, 1, count)  # b*c 1 n
        keep = nms_keep(boxes.flatten(0, 1), alone, iou, score, min(limit, count)).reshape(scores.shape)
    kept = torch.where(keep, scores, 0).flatten(1)
    found, index = likeliest(kept, limit, 0.0)
    there = found > 0
    chosen = take(boxes.flatten(1, 2), index) * there[..., None]
    return chosen, found, torch.where(there, index // count, -1)
