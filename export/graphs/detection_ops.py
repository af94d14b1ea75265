"""Detection as functions of tensors whose sizes do not depend on what is in the image.

    map       b a*c h w   what a dense head says at one level: a anchors at every place, c numbers for each
    boxes     b n 4       corners x1 y1 x2 y2 in pixels of the image
    scores    b n         0 where there is no box

Python decides nothing by a value or by a size that may change, so a trace at one size holds at any: lists are
padded and then cut to a fixed length, and only `nms_keep` knows how many boxes there really are. Arithmetic
is in float32, whatever the network computes in: pixels of a large image have too many digits for half
precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 - registers roi_align
from torch import Tensor

from coma.masking.patchify import cover
from export.custom_ops import nms_keep

LONGEST_STEP = -math.log(16 / 1000)
"""Largest logarithm, up or down, of a box's side over its anchor's; the number is mmdet's."""
NEVER = -1e4
"""Logit of what is not there."""
_LARGEST_LOGIT = 80.0  # its exponential, up or down, is a float32


@dataclass(frozen=True)
class BoxCode:
    """How boxes are told as differences (dx, dy, log dw, log dh) from others.

    Attributes:
        means: Of the differences that the network tells.
        stds: Likewise.
        clip: Whether boxes end at the image's border.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    clip: bool


@dataclass(frozen=True)
class Candidates:
    """From the maps of a dense head to boxes.

    Attributes:
        strides: Of every level, (x, y), in pixels.
        anchors: Of every level, corners around the origin, in pixels.
        code: From anchors to boxes.
        before: At most so many boxes of every level of an image are looked at: the likeliest.
        smallest: Boxes not wider and higher than this are dropped; None keeps all.
        iou: Overlap above which the less likely of two boxes goes.
        score: Least score; 0 for region proposals.
        limit: Boxes of an image.
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
    """From regions of a pyramid to maps of one size (RoIAlign).

    Attributes:
        size: Of those maps, (height, width).
        strides: Of the levels that are looked at.
        samples: Along each side of a bin; 0 is one per pixel.
        aligned: Whether the middle of a pixel is at 0.5.
        finest: Side of a region in pixels, below twice which the finest level is taken.
    """

    size: tuple[int, int]
    strides: tuple[float, ...]
    samples: int
    aligned: bool
    finest: float


def image_corner(images: Tensor) -> Tensor:
    """Width and height of images `[b, c, H, W]` in pixels, float32 `[2]`."""
    height, width = images.shape[-2:]
    sides = [torch.full((1,), side, dtype=torch.float32, device=images.device) for side in (width, height)]
    return torch.cat(sides)


def pad_images(images: Tensor, divisor: int, value: float) -> Tensor:
    """`[b, c, H, W]` with `value` at the right and bottom, up to whole multiples of `divisor` pixels."""
    height, width = (cover(side, divisor) * divisor for side in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), value=value)


def anchors_at(index: Tensor, anchors: Tensor, stride: tuple[float, float], width: int) -> Tensor:
    """Anchors of a level (Faster R-CNN, Ren et al. 2015, arXiv 1506.01497, sec. 3.1.1), some of them.

    Args:
        index: Number of the anchor, place by place, row by row, `[...]`.
        anchors: Corners around the origin, the same at every place `[a, 4]`, in pixels.
        stride: Pixels from a place to the one on its right and to the one below.
        width: Places from left to right.

    Returns:
        Corners `[..., 4]`, in pixels.
    """
    place = index // len(anchors)
    row = place // width
    middle = torch.stack(((place - row * width) * stride[0], row * stride[1]), -1)
    return anchors[index - place * len(anchors)] + torch.cat((middle, middle), -1)


def decode_boxes(anchors: Tensor, deltas: Tensor, code: BoxCode, corner: Tensor) -> Tensor:
    """Boxes from what the network says of anchors (R-CNN, Girshick et al. 2014, arXiv 1311.2524, app. C).

    The middle moves by dx, dy times the anchor's sides; the sides grow by exp(dw), exp(dh).

    Args:
        anchors: `[..., 4]`, anchors or other boxes, in pixels.
        deltas: dx, dy, dw, dh `[..., 4]`, normalised as in `code`.
        code: Their means and deviations, and whether boxes end at the border.
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
    """Odds p / (1 - p), 0 of what is not there: in the order of the logits.

    Probabilities lose that order: runtimes approximate the sigmoid, ONNX Runtime's has an absolute error of
    1e-7 and is 0 below -18. Which of two unlikely boxes suppresses the other then differs from PyTorch.
    """
    return torch.where(logits > NEVER, logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).exp(), 0)


def probability_of(odds: Tensor) -> Tensor:
    """The inverse, odds / (1 + odds)."""
    return odds / (1 + odds)


def likeliest(values: Tensor, count: int, least: float) -> tuple[Tensor, Tensor]:
    """The largest `count` of `[b, n]` and where they are, both `[b, count]`, largest first.

    Where n is less than `count`, the rest is `least` at place 0.
    """
    values, index = F.pad(values, (0, count), value=least).topk(count)
    return values, torch.where(values > least, index, 0)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of `[b, n, ...]` at `[b, k]`: `[b, k, ...]`."""
    rest = rows.shape[2:]
    return rows.gather(1, index.reshape(*index.shape, *(1 for _ in rest)).expand(-1, -1, *rest))


def level_candidates(
    level: int, logits: Tensor, deltas: Tensor, settings: Candidates, corner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest boxes of a level of a dense head: RPN, or RetinaNet (Lin et al. 2017, arXiv 1708.02002).

    Args:
        level: Its number, from the finest one on.
        logits: Map of `a * c` channels: a logit of each class.
        deltas: Map of `a * 4` channels.
        settings: Anchors, code, and how many boxes.
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

    Level floor(k0 + log2(sqrt(area) / 224)) (FPN, Lin et al. 2017, arXiv 1612.03144, sec. 4.2, eq. 1), from
    the finest level on. Every level is asked for every region, but for those of other levels at a size of
    zero, which costs nothing where samples are one per pixel.

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
    pooled = torch.zeros((), device=boxes.device)
    for number, (stride, x) in enumerate(zip(pooling.strides, features, strict=False)):
        here = (level == number)[:, None]
        found = torch.ops.torchvision.roi_align(
            x.float(), regions * here, 1 / stride, *pooling.size, pooling.samples, pooling.aligned
        )
        pooled = torch.where(here[:, :, None, None], found, pooled)
    return pooled.to(features[0].dtype)


def best_boxes(
    boxes: Tensor, scores: Tensor, iou: float, score: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What suppression leaves, over all classes: the likeliest `limit` boxes.

    Args:
        boxes: `[b, 1, n, 4]`, shared by the classes, or `[b, c, n, 4]`.
        scores: Probabilities or odds `[b, c, n]`.
        iou: Overlap above which the less likely of two boxes of a class goes.
        score: Only scores above it count.
        limit: Boxes of an image.

    Returns:
        Boxes `[b, limit, 4]`, scores `[b, limit]`, likeliest first, and their class, int64 `[b, limit]`;
        0, 0 and -1 where there are no more.
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
