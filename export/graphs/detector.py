"""Detectors of mmdet as one graph from pixels to boxes, in which every size is fixed or a named dynamic axis.

mmdet's own code uses lists whose lengths depend on the detections. Here every level proposes its maximum
number of boxes, every image has its maximum number of detections, and empty slots have score 0 (see
`detection_ops`). The networks are mmdet's own modules; the settings of the artifact define the steps between
them. This module does not import mmdet.

    FasterRCNN, MaskRCNN     boxes from proposals (arXiv 1506.01497, 1703.06870), one pass
    CascadeRCNN              three passes, each from the boxes of the one before (arXiv 1712.00726)
    RetinaNet                boxes from anchors at once (arXiv 1708.02002)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
"""Patterns of the layers after the encoder of a detector: the neck, and all modules except `pyramid`."""

OUTPUTS = ("boxes", "scores", "labels", "masks")
"""Outputs in order; masks with a mask head only."""


class Steps(dict[str, Tensor]):
    """Values that the steps of a detector compute, by name, in the order of computation.

    Selection magnifies rounding: two proposals that are almost equally likely may change places. To compare
    a file with PyTorch step by step, every step can start from the file's values instead of PyTorch's.

    Args:
        given: Values to continue with, by name.
    """

    def __init__(self, given: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.given = given or {}

    def put(self, name: str, value: Tensor) -> Tensor:
        """Stores a computed value and returns the value that the next steps start from."""
        self[name] = value
        return self.given.get(name, value)

    def put_each(self, name: str, values: Iterable[Tensor]) -> list[Tensor]:
        """Stores the values of all levels or stages."""
        return [self.put(f"{name}/{number}", value) for number, value in enumerate(values)]


class Detector(nn.Module):
    """A detector whose intermediate values can be read and replaced; see `detector`."""

    settings: DetectorSettings
    recorded: tuple[str, ...] = ()
    """Steps that `forward` returns after the detections; see `recording`."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images `[b, c, H, W]` to detections; see `detector`."""
        steps = self.steps(images)
        return tuple(steps[name] for name in (*OUTPUTS, *self.recorded) if name in steps)

    @abstractmethod
    def steps(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Steps:
        """Returns the values of all steps; every step starts from the values in `given`."""

    @abstractmethod
    def step_names(self) -> list[str]:
        """Returns the names of all steps before the detections."""


@contextmanager
def recording(module: nn.Module) -> Iterator[list[str]]:
    """Makes a detector in `module` return its steps too, for tracing; yields their names (none without)."""
    found = [each for each in module.modules() if isinstance(each, Detector)]
    names = [name for each in found for name in each.step_names()]
    for each in found:
        each.recorded = tuple(names)
    try:
        yield names
    finally:
        for each in found:
            each.recorded = ()


def _numbered(names: Iterable[str], count: int) -> list[str]:
    return [f"{name}/{number}" for name in names for number in range(count)]


def detector(model: nn.Module, head: Settings) -> Detector:
    """Returns a copy of a detector in evaluation mode that can be exported.

        images  b c H W       normalised, any H and W that the encoder takes
        ->
        boxes   b n 4         float32, corners x1 y1 x2 y2 in pixels of the input; 0 without detection
        scores  b n           float32, likeliest first; 0 without detection
        labels  b n           int64, number of the class; -1 without detection
        masks   b n 28 28     float32, with a mask head only: probability that a place of the box (not of the
                              image) belongs to the object; 0 without detection

    n is `max_per_img` of the settings. The networks may be cast to half precision afterwards; inputs, outputs
    and the steps between the networks stay in float32.

    Args:
        model: FasterRCNN, MaskRCNN, CascadeRCNN or RetinaNet, as mmdet builds it.
        head: Settings of the artifact; `model` was built from `head["model"]`.

    Raises:
        BadInput: the detector, a layer or an option cannot be exported; the message names it.
    """
    settings = read_settings(head["model"])
    _check_modules(model)
    regions = settings.regions
    return (TwoStage(model, settings, regions) if regions else OneStage(model, settings)).eval()


class Pyramid(nn.Module):
    """Images `[b, c, H, W]` to the feature pyramid of a detector, finest map first."""

    def __init__(self, model: Any, settings: DetectorSettings) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = copy.deepcopy(model.backbone)
        self.neck = copy.deepcopy(getattr(model, "neck", None)) or nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pads the images, then runs the encoder and the neck."""
        padded = pad_images(images, self.settings.divisor, self.settings.padding)
        return list(self.neck(self.backbone(padded.to(next(self.parameters()).dtype))))


class OneStage(Detector):
    """RetinaNet: detections from the anchors of all levels."""

    def __init__(self, model: Any, settings: DetectorSettings) -> None:
        super().__init__()
        self.settings = settings
        self.pyramid = Pyramid(model, settings)
        self.head = copy.deepcopy(model.bbox_head)

    def steps(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Steps:
        """Returns logits and deltas of every level, and the detections."""
        settings, corner, steps = self.settings.candidates, image_corner(images), Steps(given)
        logits, deltas = self.head(self.pyramid(images))
        maps = zip(steps.put_each("logits", logits), steps.put_each("deltas", deltas), strict=True)
        levels = [level_candidates(i, x, y, settings, corner) for i, (x, y) in enumerate(maps)]
        boxes, odds, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        classes = torch.arange(self.settings.classes, device=labels.device)[:, None]
        by_class = torch.where(labels[:, None] == classes, odds[:, None], 0)  # b c n
        least = settings.score / max(1 - settings.score, 1e-9)
        boxes, odds, labels = best_boxes(boxes[:, None], by_class, settings.iou, least, settings.limit)
        for name, value in zip(OUTPUTS, (boxes, probability_of(odds), labels), strict=False):
            steps.put(name, value)
        return steps

    def step_names(self) -> list[str]:
        """Returns the names of all steps before the detections."""
        return _numbered(("logits", "deltas"), len(self.settings.candidates.strides))


class TwoStage(Detector):
    """Faster, Mask and Cascade R-CNN: region proposals, then their classes, refined boxes and masks."""

    def __init__(self, model: Any, settings: DetectorSettings, regions: Regions) -> None:
        super().__init__()
        self.settings = settings
        self.regions = regions
        self.pyramid = Pyramid(model, settings)
        self.rpn = copy.deepcopy(model.rpn_head)
        self.box_heads = _stages(model.roi_head.bbox_head)
        self.mask_heads = _stages(model.roi_head.mask_head) if regions.mask_poolings else nn.ModuleList()

    def steps(self, images: Tensor, given: Mapping[str, Tensor] | None = None) -> Steps:
        """Returns features, region proposals, outputs of the heads and the detections."""
        corner, regions, steps = image_corner(images), self.regions, Steps(given)
        features = steps.put_each("features", self.pyramid(images))
        proposals = self._propose(features, corner, steps)
        boxes, scores = self._classify(features, *proposals, corner, steps)
        boxes, scores, labels = best_boxes(boxes, scores, regions.iou, regions.score, regions.limit)
        boxes, scores = steps.put("boxes", boxes), steps.put("scores", scores)
        labels = steps.put("labels", labels)
        if self.mask_heads:
            steps.put("masks", self._masks(features, boxes, scores, labels, steps))
        return steps

    def step_names(self) -> list[str]:
        """Returns the names of all steps before the detections."""
        levels, stages = len(self.settings.candidates.strides), range(len(self.box_heads))
        of_stages = [f"{name}/{stage}" for stage in stages for name in ("logits", "deltas", "refined")]
        return [
            *_numbered(("features", "rpn_logits", "rpn_deltas"), levels),
            *("proposals", "proposal_odds"),
            *of_stages[:-1],  # the last stage's boxes are the detector's
            *_numbered(["mask_logits"], len(self.mask_heads)),
        ]

    def _propose(self, features: list[Tensor], corner: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
        """Returns region proposals `[b, n, 4]` and their odds `[b, n]`; levels are suppressed separately."""
        settings = self.settings.candidates
        logits, deltas = self.rpn(features)
        maps = zip(steps.put_each("rpn_logits", logits), steps.put_each("rpn_deltas", deltas), strict=True)
        levels = [level_candidates(i, x, y, settings, corner)[:2] for i, (x, y) in enumerate(maps)]
        boxes, odds = (torch.stack(parts, 1) for parts in zip(*levels, strict=True))  # b level k
        boxes, odds, _ = best_boxes(boxes, odds, settings.iou, settings.score, settings.limit)
        return steps.put("proposals", boxes), steps.put("proposal_odds", odds)

    def _classify(
        self, features: list[Tensor], boxes: Tensor, proposed: Tensor, corner: Tensor, steps: Steps
    ) -> tuple[Tensor, Tensor]:
        """Maps proposals `[b, n, 4]` and their odds `[b, n]` to boxes and scores of every class.

        In Cascade R-CNN (Cai and Vasconcelos 2018, sec. 4) every stage starts from the boxes of the previous
        one; the logits are the mean over the stages, as in mmdet.

        Returns:
            Boxes `[b, c, n, 4]` (c is 1 if the classes share them) and scores `[b, c, n]`.
        """
        regions, count = self.regions, boxes.shape[1]
        total, refined = torch.zeros((), device=boxes.device), boxes[:, :, None]
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(region_features(features, boxes, regions.poolings[stage]))
            logits = logits.float().reshape(-1, count, logits.shape[1])  # b n c+1: the last is background
            deltas = deltas.float().reshape(-1, count, deltas.shape[1] // 4, 4)
            logits, deltas = steps.put(f"logits/{stage}", logits), steps.put(f"deltas/{stage}", deltas)
            refined = decode_boxes(boxes[:, :, None], deltas, regions.codes[stage], corner)  # b n c 4
            if stage + 1 < len(self.box_heads):
                boxes = _of_class(refined, logits[..., :-1].argmax(-1), regions.agnostic[stage])
                boxes = steps.put(f"refined/{stage}", boxes)
            total = total + logits
        scores = (total / len(self.box_heads)).softmax(-1)[..., :-1].permute(0, 2, 1)
        return refined.permute(0, 2, 1, 3), torch.where(proposed[:, None] > 0, scores, 0)

    def _masks(
        self, features: list[Tensor], boxes: Tensor, scores: Tensor, labels: Tensor, steps: Steps
    ) -> Tensor:
        """Returns mask probabilities `[b, n, h, w]` for each box's class, as the mean over the stages."""
        masks: list[Tensor] = []
        for stage, head in enumerate(self.mask_heads):
            logits = head(region_features(features, boxes, self.regions.mask_poolings[stage]))
            logits = logits.float().unflatten(0, (-1, boxes.shape[1]))  # b n c h w
            logits = steps.put(f"mask_logits/{stage}", logits)
            agnostic = self.regions.mask_agnostic[stage]
            masks.append(_of_class(logits, labels.clamp(min=0), agnostic).sigmoid())
        return torch.stack(masks).mean(0) * (scores > 0)[..., None, None]


def _of_class(values: Tensor, labels: Tensor, agnostic: bool) -> Tensor:
    """Selects the classes `[b, n]` from `[b, n, c, ...]`: `[b, n, ...]`; c is 1 if `agnostic`."""
    if agnostic:
        return values[:, :, 0]
    return take(values.flatten(0, 1), labels.reshape(-1, 1))[:, 0].unflatten(0, (-1, labels.shape[1]))


def _stages(heads: Any) -> nn.ModuleList:
    """Returns copies of the heads of all stages."""
    return copy.deepcopy(heads if isinstance(heads, nn.ModuleList) else nn.ModuleList([heads]))


def _check_modules(model: nn.Module) -> None:
    """Refuses compiled operators, and losses with their own activation of the logits."""
    for name, module in model.named_modules():
        kind, home = type(module).__name__, type(module).__module__
        compiled = home.startswith("mmcv.ops.") and kind != "RoIAlign"
        if compiled or vars(module).get("custom_activation"):
            raise BadInput(f"{name} is a {kind}, which cannot be exported")
