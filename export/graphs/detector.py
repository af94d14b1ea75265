"""Detectors of mmdet as one graph: pixels to boxes, every size in it known or named.

mmdet's own code goes through lists whose lengths depend on what is found. Here a level always proposes as
many boxes as it may, an image always has as many detections as it may, and what is not there has score 0
(see `detection`). The networks inside are mmdet's modules themselves, called as they are; their settings say
what lies between them. Nothing of mmdet is imported.

    FasterRCNN, MaskRCNN     boxes from proposals (arXiv 1506.01497, 1703.06870), one pass
    CascadeRCNN              three passes, each from the boxes of the one before (arXiv 1712.00726)
    RetinaNet                boxes from anchors at once (arXiv 1708.02002)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from coma.errors import BadInput
from export.graphs.detection_ops import (
    best_boxes,
    decode_boxes,
    image_corner,
    level_candidates,
    pad_images,
    probability_of,
    region_features,
    take,
)
from export.graphs.detector_config import DetectorSettings, Regions, Settings, read_settings

AFTER_BACKBONE = ("pyramid.neck.*", "[!p]*")
"""Layers of a detector after its encoder, as patterns of module paths: the neck, and all but `pyramid`."""

Detections = tuple[Tensor, ...]
"""Boxes, scores, labels, and masks where there are any."""


def detector(model: nn.Module, head: Settings) -> nn.Module:
    """A detector ready to be exported, a copy in evaluation mode.

        images  b c H W       normalised, any H and W that the encoder takes
        ->
        boxes   b n 4         float32, corners x1 y1 x2 y2 in pixels of the input; 0 without detection
        scores  b n           float32, likeliest first; 0 without detection
        labels  b n           int64, number of the class; -1 without detection
        masks   b n 28 28     float32, with a mask head only: probability that a place of the box (not of the
                              image) belongs to the object; 0 without detection

    n is the settings' `max_per_img`. The networks may be cast to half precision afterwards; what goes in and
    comes out stays float32, and so does everything between the networks.

    Args:
        model: FasterRCNN, MaskRCNN, CascadeRCNN or RetinaNet, as mmdet builds it.
        head: The artifact's plain settings; `head["model"]` are those that `model` was built from.

    Raises:
        BadInput: a detector, a layer or an option that cannot be exported; the message names it.
    """
    settings = read_settings(head["model"])
    _check_modules(model)
    regions = settings.regions
    return (TwoStage(model, settings, regions) if regions else OneStage(model, settings)).eval()


class Pyramid(nn.Module):
    """Images `[b, c, H, W]` to the maps that detectors look at, finest first."""

    def __init__(self, model: Any, settings: DetectorSettings) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = copy.deepcopy(model.backbone)
        self.neck = copy.deepcopy(getattr(model, "neck", None)) or nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pad, then the encoder and the pyramid on it."""
        padded = pad_images(images, self.settings.divisor, self.settings.padding)
        return list(self.neck(self.backbone(padded.to(next(self.parameters()).dtype))))


class OneStage(nn.Module):
    """RetinaNet: the likeliest anchors of all levels, class by class."""

    def __init__(self, model: Any, settings: DetectorSettings) -> None:
        super().__init__()
        self.settings = settings
        self.pyramid = Pyramid(model, settings)
        self.head = copy.deepcopy(model.bbox_head)

    def forward(self, images: Tensor) -> Detections:
        """Images `[b, c, H, W]` to detections; see `detector`."""
        settings, corner = self.settings.candidates, image_corner(images)
        maps = zip(*self.head(self.pyramid(images)), strict=True)
        levels = [level_candidates(i, x, y, settings, corner) for i, (x, y) in enumerate(maps)]
        boxes, odds, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        classes = torch.arange(self.settings.classes, device=labels.device)[:, None]
        by_class = torch.where(labels[:, None] == classes, odds[:, None], 0)  # b c n
        least = settings.score / max(1 - settings.score, 1e-9)
        boxes, odds, labels = best_boxes(boxes[:, None], by_class, settings.iou, least, settings.limit)
        return boxes, probability_of(odds), labels


class TwoStage(nn.Module):
    """Faster, Mask and Cascade R-CNN: proposals, then classes, better boxes and masks of each."""

    def __init__(self, model: Any, settings: DetectorSettings, regions: Regions) -> None:
        super().__init__()
        self.settings = settings
        self.regions = regions
        self.pyramid = Pyramid(model, settings)
        self.rpn = copy.deepcopy(model.rpn_head)
        self.box_heads = _stages(model.roi_head.bbox_head)
        self.mask_heads = _stages(model.roi_head.mask_head) if regions.mask_poolings else nn.ModuleList()

    def forward(self, images: Tensor) -> Detections:
        """Images `[b, c, H, W]` to detections; see `detector`."""
        corner, features, regions = image_corner(images), self.pyramid(images), self.regions
        boxes, scores = self._classify(features, *self._propose(features, corner), corner)
        found = best_boxes(boxes, scores, regions.iou, regions.score, regions.limit)
        return (*found, self._masks(features, *found)) if self.mask_heads else found

    def _propose(self, features: list[Tensor], corner: Tensor) -> tuple[Tensor, Tensor]:
        """Region proposals `[b, n, 4]` and their odds `[b, n]`; levels do not suppress each other."""
        settings = self.settings.candidates
        maps = zip(*self.rpn(features), strict=True)
        levels = [level_candidates(i, x, y, settings, corner)[:2] for i, (x, y) in enumerate(maps)]
        boxes, odds = (torch.stack(parts, 1) for parts in zip(*levels, strict=True))  # b level k
        return best_boxes(boxes, odds, settings.iou, settings.score, settings.limit)[:2]

    def _classify(
        self, features: list[Tensor], boxes: Tensor, proposed: Tensor, corner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proposals `[b, n, 4]` and their odds `[b, n]` to boxes and scores of every class.

        Cascade R-CNN, Cai and Vasconcelos 2018, sec. 4: every stage starts from the boxes of the one before;
        mmdet takes the mean of the stages' logits.

        Returns:
            Boxes `[b, c, n, 4]` (c is 1 where classes share them) and scores `[b, c, n]`.
        """
        regions, count = self.regions, boxes.shape[1]
        total, refined = torch.zeros((), device=boxes.device), boxes[:, :, None]
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(region_features(features, boxes, regions.poolings[stage]))
            logits = logits.float().reshape(-1, count, logits.shape[1])  # b n c+1: the last is none of them
            deltas = deltas.float().reshape(-1, count, deltas.shape[1] // 4, 4)
            refined = decode_boxes(boxes[:, :, None], deltas, regions.codes[stage], corner)  # b n c 4
            boxes = _of_class(refined, logits[..., :-1].argmax(-1), regions.agnostic[stage])
            total = total + logits
        scores = (total / len(self.box_heads)).softmax(-1)[..., :-1].permute(0, 2, 1)
        return refined.permute(0, 2, 1, 3), torch.where(proposed[:, None] > 0, scores, 0)

    def _masks(self, features: list[Tensor], boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Probabilities `[b, n, h, w]` of each box's class; of several stages the mean."""
        masks: list[Tensor] = []
        for stage, head in enumerate(self.mask_heads):
            logits = head(region_features(features, boxes, self.regions.mask_poolings[stage]))
            logits = logits.float().unflatten(0, (-1, boxes.shape[1]))  # b n c h w
            agnostic = self.regions.mask_agnostic[stage]
            masks.append(_of_class(logits, labels.clamp(min=0), agnostic).sigmoid())
        return torch.stack(masks).mean(0) * (scores > 0)[..., None, None]


def _of_class(values: Tensor, labels: Tensor, agnostic: bool) -> Tensor:
    """From `[b, n, c, ...]` what belongs to the classes `[b, n]`: `[b, n, ...]`; c is 1 if `agnostic`."""
    if agnostic:
        return values[:, :, 0]
    return take(values.flatten(0, 1), labels.reshape(-1, 1))[:, 0].unflatten(0, (-1, labels.shape[1]))


def _stages(heads: Any) -> nn.ModuleList:
    """Copies of a cascade's heads, or of the only one."""
    return copy.deepcopy(heads if isinstance(heads, nn.ModuleList) else nn.ModuleList([heads]))


def _check_modules(model: nn.Module) -> None:
    """Refuse layers that are compiled operators, and losses that turn logits into scores in their own way."""
    for name, module in model.named_modules():
        kind, home = type(module).__name__, type(module).__module__
        compiled = home.startswith("mmcv.ops.") and kind != "RoIAlign"
        if compiled or vars(module).get("custom_activation"):
            raise BadInput(f"{name} is a {kind}, which cannot be exported")
