"""Tiled inference: large pictures are cut into overlapping tiles, and what is found in them is joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

SAME_IOU, SAME_INSIDE = 0.5, 0.8
"""Two boxes of one class in different tiles are one object if their IoU is above the first, or if the second
share of the smaller one lies in the larger one: a tile cuts objects at its edge."""


class Tile(NamedTuple):
    """A tile in pixels of the picture, and the part of it that no other tile is nearer to."""

    left: int
    top: int
    right: int
    bottom: int
    inner: tuple[int, int, int, int]


def tiles_of(height: int, width: int, side: int, overlap: float) -> list[Tile]:
    """Returns the tiles of a picture, row by row; all have `side` px, or the picture's side if that is less.

    Args:
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.
        side: Side of a tile in pixels.
        overlap: Least share of a tile that also lies in the next one.
    """
    rows, columns = _spans(height, side, overlap), _spans(width, side, overlap)
    return [
        Tile(left, top, right, bottom, (inner_left, inner_top, inner_right, inner_bottom))
        for top, bottom, inner_top, inner_bottom in rows
        for left, right, inner_left, inner_right in columns
    ]


def _spans(length: int, side: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Returns start, end, and start and end of the inner part of the tiles along one axis."""
    if length <= side:
        return [(0, length, 0, length)]
    step = max(int(side * (1 - overlap)), 1)
    count = -(-(length - side) // step) + 1
    starts = np.linspace(0, length - side, count).round().astype(int).tolist()
    cuts = [(end + start) // 2 for end, start in zip([s + side for s in starts], starts[1:], strict=False)]
    return [
        (start, start + side, low, high)
        for start, low, high in zip(starts, [0, *cuts], [*cuts, length], strict=True)
    ]


def detect_in_tiles(tiles: Sequence[Tile], found: Sequence[Any]) -> Any:
    """Returns the objects of all tiles in pixels of the picture, the best first, each one once.

    Objects of the same tile do not suppress each other: the detector has decided about those.

    Args:
        tiles: The tiles.
        found: InstanceData of every tile, with `bboxes`, `scores`, `labels` and perhaps `masks`, a list of
            `PlacedMask`.
    """
    from mmengine.structures import InstanceData

    frames = torch.tensor([tile[:4] for tile in tiles], dtype=torch.float32)
    frames = frames.repeat_interleave(torch.tensor([len(each) for each in found]), dim=0)
    boxes = torch.cat([each.bboxes.float() for each in found]) + frames[:, :2].repeat(1, 2)
    scores, labels = (torch.cat([each[key] for each in found]) for key in ("scores", "labels"))
    kept, best = suppress(boxes, scores, labels, frames)
    joined = InstanceData(bboxes=boxes[kept], scores=best, labels=labels[kept])
    if all("masks" in each for each in found):
        moved = [
            mask.moved(tile.left, tile.top)
            for tile, of in zip(tiles, found, strict=True)
            for mask in of.masks
        ]
        joined.masks = [moved[i] for i in kept.tolist()]
    return joined


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers of the boxes to keep and their scores, the best first.

    This is greedy non-maximum suppression between tiles, but of a piece that a tile's edge has cut off and
    the whole object in another tile, the whole is kept, with the higher of both scores.

    Args:
        boxes: Corners `[n, 4]`.
        scores: Scores `[n]`.
        labels: Classes `[n]`.
        frames: Corners of the tile of every box `[n, 4]`.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels, frames = boxes[order], labels[order], frames[order]
    alive = torch.ones(len(order), dtype=torch.bool)
    areas = box_area(boxes).clamp(min=1e-6)
    kept, best = [], []
    for i, score in enumerate(scores[order]):
        if not alive[i]:
            continue
        whole = i
        while True:
            others = alive & (labels == labels[whole]) & (frames != frames[whole]).any(dim=1)
            wholes = others & (areas > areas[whole]) & _is_piece(boxes[whole], frames[whole], boxes)
            if not wholes.any():
                break
            alive[whole] = False
            whole = int(wholes.nonzero()[0])
        iou = box_iou(boxes[whole : whole + 1], boxes)[0]
        shared = iou * (areas[whole] + areas) / (1 + iou)
        same = (iou > SAME_IOU) | (shared / torch.minimum(areas, areas[whole]) > SAME_INSIDE)
        alive &= ~(others & same)
        alive[whole] = False
        kept.append(whole)
        best.append(score)
    return order[kept], scores.new_tensor(best)


def _is_piece(box: Tensor, frame: Tensor, boxes: Tensor) -> Tensor:
    """Returns whether a tile `frame` would see nothing but `box` of each of the `boxes`, bool `[n]`."""
    left, top, right, bottom = frame
    xs, ys = boxes[:, 0::2].clamp(left, right), boxes[:, 1::2].clamp(top, bottom)
    seen = torch.stack([xs[:, 0], ys[:, 0], xs[:, 1], ys[:, 1]], dim=1)
    return box_iou(box[None], seen)[0] > SAME_IOU


def join_maps(tiles: Sequence[Tile], found: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Returns maps `[c, height, width]` made of the inner parts of the tiles' maps `[c, h, w]`."""
    joined = torch.zeros(found[0].shape[0], height, width, dtype=found[0].dtype)
    for tile, part in zip(tiles, found, strict=True):
        left, top, right, bottom = tile.inner
        joined[:, top:bottom, left:right] = part[
            :, top - tile.top : bottom - tile.top, left - tile.left : right - tile.left
        ]
    return joined


def predict_tiles(
    predict: Callable[[np.ndarray], Any], pixels: np.ndarray, side: int | None, overlap: float
) -> Any:
    """Returns the data sample of a picture `[H, W, c]`, predicted in tiles if it is larger than `side`."""
    height, width = pixels.shape[:2]
    if side is None or max(height, width) <= side:
        return predict(pixels)
    from mmengine.structures import PixelData

    tiles = tiles_of(height, width, side, overlap)
    samples = [predict(pixels[t.top : t.bottom, t.left : t.right]) for t in tiles]
    whole = samples[0].new()
    whole.set_metainfo({**samples[0].metainfo, "ori_shape": (height, width), "img_shape": (height, width)})
    if "pred_instances" in samples[0]:
        whole.pred_instances = detect_in_tiles(tiles, [s.pred_instances for s in samples])
    else:
        for name in ("pred_sem_seg", "confidence"):
            if name in samples[0]:
                parts = [getattr(sample, name).data for sample in samples]
                setattr(whole, name, PixelData(data=join_maps(tiles, parts, height, width)))
    return whole
