"""From a dataset in COCO's format and an encoder to the configuration of a detector."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from coma.artifact import ArtifactConfig
from downstream.artifacts import check_classes
from downstream.cli_options import TrainingOptions
from downstream.configs.adapt import Described, fit_encoder
from downstream.configs.load import PRESETS, load_config, replace_dataset
from downstream.configs.schedule import fit_schedule, fit_workers
from downstream.datasets.coco import CocoSplit

Detector = Literal["mask-rcnn", "cascade-mask-rcnn", "faster-rcnn", "retinanet"]
HAS_MASKS = ("mask-rcnn", "cascade-mask-rcnn")
LONGEST = 1333 / 800
"""Longest side over the short one that images are resized to (Faster R-CNN's convention on COCO)."""
META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
DEFAULTS = {"epochs": 24, "batch_size": 4, "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.8}


def preset_path(name: Detector) -> Path:
    """The configuration file of one of our detectors."""
    return PRESETS / "mmdet" / f"{name}_dyvit_fpn_1x_coco.py"


def training_config(
    encoder: Described,
    name: Detector,
    train: CocoSplit,
    val: CocoSplit,
    options: TrainingOptions,
    short_side: int | None = None,
) -> Any:
    """The configuration of one of our detectors, for this encoder and these images.

    Raises:
        BadInput: options that do not fit.
    """
    config = load_config(preset_path(name))
    fit_encoder(config, encoder, options)
    masks = name in HAS_MASKS
    fit_dataset(config, train, val, masks)
    fit_pipelines(config, encoder.model.channels, short_side or default_short_side(train), masks)
    best = "coco/segm_mAP" if masks else "coco/bbox_mAP"
    fit_schedule(config, options, train.count, DEFAULTS, best)
    fit_workers(config, options.workers)
    return config


def fit_dataset(config: Any, train: CocoSplit, val: CocoSplit, masks: bool) -> None:
    """Read these images, and give every head as many classes as they have."""
    names = train.class_names
    for loader, split in (("train_dataloader", train), ("val_dataloader", val), ("test_dataloader", val)):
        training = loader == "train_dataloader"
        replace_dataset(config[loader], partial(dataset_of, split, names, training))
    config.val_evaluator = config.test_evaluator = metric_of(val, masks)
    _set_classes(config.model, len(names))


def dataset_of(
    split: CocoSplit, names: tuple[str, ...], training: bool, pipeline: list[Any]
) -> dict[str, Any]:
    """Settings of mmdet's reader of a split; in training, images without objects are left out."""
    return {
        "type": "CocoDataset",
        "data_root": "",
        "ann_file": str(split.annotations.resolve()),
        "data_prefix": {"img": f"{split.images.resolve()}/"},
        "metainfo": {"classes": names},
        "pipeline": pipeline,
        **({"filter_cfg": {"filter_empty_gt": True, "min_size": 1}} if training else {"test_mode": True}),
    }


def metric_of(split: CocoSplit, masks: bool) -> dict[str, Any]:
    """Settings of COCO's average precision over a split."""
    kinds = ["bbox", "segm"] if masks else ["bbox"]
    return {"type": "CocoMetric", "ann_file": str(split.annotations.resolve()), "metric": kinds}


def labels_of(masks: bool) -> dict[str, Any]:
    """The pipeline step that reads boxes, and masks where the model learns them."""
    return {"type": "LoadAnnotations", "with_bbox": True, "with_mask": masks}


def scoring(about: ArtifactConfig, split: CocoSplit) -> tuple[dict[str, Any], dict[str, Any]]:
    """How `tuning.measure` reads this split, and its metric: of masks too, where model and split have them.

    Raises:
        BadInput: the split has other classes than the artifact.
    """
    check_classes(about, split.class_names, split.annotations)
    masks = "mask_head" in (about.head or {})["model"].get("roi_head", {}) and split.has_masks
    loader = {"dataset": dataset_of(split, split.class_names, False, []), "labels": labels_of(masks)}
    return loader, metric_of(split, masks)


def fit_pipelines(config: Any, channels: int, short_side: int, masks: bool) -> None:
    """Read any format; resize to `short_side`, in training to 0.8 to 1.25 times that, and flip."""
    scale = (round(short_side * LONGEST), short_side)
    read = {"type": "ReadImage", "channels": channels}
    config.train_dataloader.dataset.pipeline = [
        read,
        labels_of(masks),
        {"type": "RandomResize", "scale": scale, "ratio_range": (0.8, 1.25), "keep_ratio": True},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PackDetInputs"},
    ]
    testing = [
        read,
        {"type": "Resize", "scale": scale, "keep_ratio": True},
        labels_of(masks),
        {"type": "PackDetInputs", "meta_keys": META},
    ]
    config.val_dataloader.dataset.pipeline = config.test_dataloader.dataset.pipeline = testing


def default_short_side(train: CocoSplit) -> int:
    """The median short side of the training images, at most 800 px, in whole multiples of 32."""
    return max(min(800, round(train.median_short_side / 32) * 32), 32)


def _set_classes(node: Any, classes: int) -> None:
    """Every `num_classes` below `node`; what finds mere objects (RPN) has none in its settings."""
    if isinstance(node, dict):
        if "num_classes" in node:
            node["num_classes"] = classes
        for child in node.values():
            _set_classes(child, classes)
    elif isinstance(node, list | tuple):
        for child in node:
            _set_classes(child, classes)
