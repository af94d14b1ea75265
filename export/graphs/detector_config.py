"""Reads a detector's settings (those of mmdet): anchors, boxes, regions and suppression.

Reading is strict: a type or an option that `detection_ops` does not implement is refused by its name.
Defaults are those of mmdet 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coma.errors import BadInput
from export.graphs.detection_ops import BoxCode, Candidates, Pooling

Settings = Mapping[str, Any]
Architecture = Literal["two-stage", "cascade", "one-stage"]
ARCHITECTURES: dict[str, Architecture] = {
    "FasterRCNN": "two-stage",
    "MaskRCNN": "two-stage",
    "CascadeRCNN": "cascade",
    "RetinaNet": "one-stage",
}
BOX_HEADS = ("BBoxHead", "ConvFCBBoxHead", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead")


@dataclass(frozen=True)
class Regions:
    """Settings of the stages that refine region proposals.

    Attributes:
        poolings: Pooling of every stage.
        codes: Box encoding of every stage.
        mask_poolings: Mask pooling of every stage; empty without masks.
        agnostic: Whether all classes share the boxes, for every stage.
        mask_agnostic: Whether all classes share the masks, for every stage.
        classes: Number of classes.
        iou: Overlap (IoU) above which the box of a class with the lower score is suppressed.
        score: Minimum score.
        limit: Maximum number of detections per image.
    """

    poolings: tuple[Pooling, ...]
    codes: tuple[BoxCode, ...]
    mask_poolings: tuple[Pooling, ...]
    agnostic: tuple[bool, ...]
    mask_agnostic: tuple[bool, ...]
    classes: int
    iou: float
    score: float
    limit: int


@dataclass(frozen=True)
class DetectorSettings:
    """Settings of a detector.

    Attributes:
        architecture: Architecture of the detector.
        divisor: Images are padded to multiples of this number of pixels.
        padding: Value of padded pixels.
        candidates: Settings of the region proposals or, with one stage, of the detections.
        classes: Number of classes.
        regions: Settings of the later stages; None with one stage.
    """

    architecture: Architecture
    divisor: int
    padding: float
    candidates: Candidates
    classes: int
    regions: Regions | None


def read_settings(model: Settings) -> DetectorSettings:
    """Reads `config.head["model"]` of a detector's artifact.

    Raises:
        BadInput: a setting that cannot be exported; the message names it.
    """
    kind = _name(model.get("type"))
    if kind not in ARCHITECTURES:
        raise BadInput(f"a detector of type {kind} cannot be exported; these can: {', '.join(ARCHITECTURES)}")
    pixels, test = model.get("data_preprocessor") or {}, model.get("test_cfg") or {}
    architecture = ARCHITECTURES[kind]
    regions = None
    if architecture == "one-stage":
        head = model["bbox_head"]
        _expect(head, "bbox_head", ("RetinaHead",))
        candidates, classes = (
            _candidates(head, "bbox_head", test, "test_cfg"),
            int(head.get("num_classes", 80)),
        )
    else:
        head = model["rpn_head"]
        _expect(head, "rpn_head", ("RPNHead",))
        proposals = {**(test.get("rpn") or {}), "score_thr": 0.0}
        candidates = _candidates(head, "rpn_head", proposals, "test_cfg.rpn")
        regions = _regions(model["roi_head"], test.get("rcnn") or {}, architecture)
        classes = regions.classes
    return DetectorSettings(
        architecture,
        divisor=int(pixels.get("pad_size_divisor", 1)),
        padding=float(pixels.get("pad_value", 0)),
        candidates=candidates,
        classes=classes,
        regions=regions,
    )


def _candidates(head: Settings, where: str, test: Settings, there: str) -> Candidates:
    if not (head.get("loss_cls") or {}).get("use_sigmoid", False):
        raise BadInput(f"{where}.loss_cls without use_sigmoid cannot be exported")
    strides, anchors = _anchors(head.get("anchor_generator") or {}, f"{where}.anchor_generator")
    smallest = float(test.get("min_bbox_size", -1))
    return Candidates(
        strides=strides,
        anchors=anchors,
        code=_code(head.get("bbox_coder") or {}, f"{where}.bbox_coder"),
        before=_count(test, "nms_pre", there),
        smallest=None if smallest < 0 else smallest,
        iou=_iou(test, there),
        score=_score(test),
        limit=_count(test, "max_per_img", there),
    )


def _regions(head: Settings, test: Settings, architecture: Architecture) -> Regions:
    _expect(head, "roi_head", ("StandardRoIHead" if architecture == "two-stage" else "CascadeRoIHead",))
    if head.get("shared_head"):
        raise BadInput(f"roi_head.shared_head {_name(head['shared_head'].get('type'))} cannot be exported")
    stages = int(head.get("num_stages", 1)) if architecture == "cascade" else 1
    boxes = _staged(head["bbox_head"], stages)
    masks = _staged(head["mask_head"], stages) if head.get("mask_head") else []
    for box in boxes:
        _expect(box, "roi_head.bbox_head", BOX_HEADS)
        if not (box.get("with_cls", True) and box.get("with_reg", True)):
            raise BadInput("roi_head.bbox_head without classes or without boxes cannot be exported")
    for mask in masks:
        _expect(mask, "roi_head.mask_head", ("FCNMaskHead",))
    own = "mask_roi_extractor" if head.get("mask_roi_extractor") else "bbox_roi_extractor"
    return Regions(
        poolings=_poolings(head, "bbox_roi_extractor", stages),
        codes=tuple(_code(box.get("bbox_coder") or {}, "roi_head.bbox_head.bbox_coder") for box in boxes),
        mask_poolings=_poolings(head, own, stages) if masks else (),
        agnostic=tuple(bool(box.get("reg_class_agnostic", False)) for box in boxes),
        mask_agnostic=tuple(bool(mask.get("class_agnostic", False)) for mask in masks),
        classes=int(boxes[0].get("num_classes", 80)),
        iou=_iou(test, "test_cfg.rcnn"),
        score=_score(test),
        limit=_count(test, "max_per_img", "test_cfg.rcnn"),
    )


def _anchors(
    settings: Settings, where: str
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[tuple[float, ...], ...], ...]]:
    """Returns strides and anchors of every level (Faster R-CNN sec. 3.1.1); a ratio is height over width."""
    known = ("strides", "ratios", "scales", "base_sizes", "scale_major", "octave_base_scale",
             "scales_per_octave", "center_offset", "use_box_type")  # fmt: skip
    _expect(settings, where, ("AnchorGenerator",), known)
    strides = tuple(_pair(stride) for stride in settings["strides"])
    scales = settings.get("scales")
    if scales is None:  # RetinaNet sec. 4: scales within an octave
        octave = int(settings["scales_per_octave"])
        scales = [settings["octave_base_scale"] * 2 ** (i / octave) for i in range(octave)]
    shapes = [(scale, math.sqrt(ratio)) for ratio in settings["ratios"] for scale in scales]
    if not settings.get("scale_major", True):
        shapes = [(scale, math.sqrt(ratio)) for scale in scales for ratio in settings["ratios"]]
    levels = []
    for size in settings.get("base_sizes") or [min(stride) for stride in strides]:
        middle = float(settings.get("center_offset", 0)) * size
        halves = [(size * scale / root / 2, size * scale * root / 2) for scale, root in shapes]
        levels.append(tuple((middle - x, middle - y, middle + x, middle + y) for x, y in halves))
    return strides, tuple(levels)


def _code(settings: Settings, where: str) -> BoxCode:
    known = ("target_means", "target_stds", "clip_border", "add_ctr_clamp", "ctr_clamp", "use_box_type")
    _expect(settings, where, ("DeltaXYWHBBoxCoder",), known, add_ctr_clamp=False)
    return BoxCode(
        means=tuple(map(float, settings.get("target_means", (0, 0, 0, 0)))),
        stds=tuple(map(float, settings.get("target_stds", (1, 1, 1, 1)))),
        clip=bool(settings.get("clip_border", True)),
    )


def _poolings(head: Settings, name: str, stages: int) -> tuple[Pooling, ...]:
    where, poolings = f"roi_head.{name}", []
    for extractor in _staged(head[name], stages):
        known = ("roi_layer", "out_channels", "featmap_strides", "finest_scale", "init_cfg")
        _expect(extractor, where, ("SingleRoIExtractor",), known)
        layer = extractor["roi_layer"]
        known = ("output_size", "sampling_ratio", "pool_mode", "aligned", "use_torchvision")
        _expect(layer, f"{where}.roi_layer", ("RoIAlign",), known, pool_mode="avg")
        height, width = _pair(layer["output_size"])
        poolings.append(
            Pooling(
                size=(int(height), int(width)),
                strides=tuple(map(float, extractor["featmap_strides"])),
                samples=max(int(layer.get("sampling_ratio", 0)), 0),
                aligned=bool(layer.get("aligned", True)),
                finest=float(extractor.get("finest_scale", 56)),
            )
        )
    return tuple(poolings)


def _iou(test: Settings, where: str) -> float:
    nms = test.get("nms") or {}
    known = ("iou_threshold", "split_thr", "class_agnostic")
    _expect(nms, f"{where}.nms", ("nms",), known, class_agnostic=False)
    return float(nms["iou_threshold"])


def _score(test: Settings) -> float:
    return max(float(test.get("score_thr", 0)), 0.0)


def _count(test: Settings, name: str, where: str) -> int:
    if int(test.get(name, -1)) < 1:
        raise BadInput(
            f"{where}.{name} must be at least 1, because an exported detector always returns that many boxes"
        )
    return int(test[name])


def _expect(
    settings: Settings, where: str, types: tuple[str, ...], known: tuple[str, ...] | None = None, **only: Any
) -> None:
    """Refuses other types, options that are not `known`, and other values of the options in `only`."""
    kind = _name(settings.get("type"))
    if kind not in types:
        raise BadInput(f"{where} of type {kind} cannot be exported; of type {' or '.join(types)} it can")
    for name, value in settings.items():
        if (known and name not in (*known, "type")) or (name in only and value != only[name]):
            raise BadInput(f"{where}.{name} = {value!r} cannot be exported")


def _name(kind: Any) -> str:
    """Returns the name of a type without its library."""
    return str(kind).rpartition(".")[2]


def _staged(settings: Any, stages: int) -> list[Settings]:
    return list(settings) if isinstance(settings, list | tuple) else [settings] * stages


def _pair(value: Any) -> tuple[float, float]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return first, second
