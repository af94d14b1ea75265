"""Configurations of detectors for an encoder and a COCO dataset."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from coma.artifact import ArtifactConfig
from coma.errors import BadInput
from coma.image_size import ImageSize
from downstream.artifacts import check_classes
from downstream.cli_options import TrainOptions
from downstream.configs.adapt import EncoderSpec, set_encoder
from downstream.configs.load import PRESETS, image_reader, load_config, nodes, pipeline_of, replace_dataset
from downstream.configs.schedule import set_schedule, set_workers
from downstream.datasets.coco import CocoSplit
from downstream.tasks.class_counts import set_classes

Detector = Literal["mask-rcnn", "cascade-mask-rcnn", "faster-rcnn", "retinanet"]
HAS_MASKS = ("mask-rcnn", "cascade-mask-rcnn")
LONGEST = 1333 / 800
"""Largest ratio of long to short side of resized images (Faster R-CNN's convention on COCO)."""
META = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")


def preset_path(name: Detector) -> Path:
    """Returns the configuration file of a detector."""
    return PRESETS / "mmdet" / f"{name}_dyvit_fpn_1x_coco.py"


def training_config(
    encoder: EncoderSpec,
    name: Detector,
    train: CocoSplit,
    val: CocoSplit,
    options: TrainOptions,
    short_side: int | None = None,
    whole: Any = None,
) -> Any:
    """Returns the training configuration of a detector for an encoder and a dataset.

    Args:
        encoder: The encoder.
        name: The detector.
        train: Training split.
        val: Validation split.
        options: Options of the command.
        short_side: Short side of resized images; None takes that of the images.
        whole: Settings of a model around this encoder, in place of the detector's.

    Raises:
        BadInput: options that do not fit.
    """
    config = load_config(preset_path(name))
    if whole is not None:
        config.model = whole
    set_encoder(config, encoder, options)
    masks = name in HAS_MASKS
    set_dataset(config, train, val, masks)
    side = short_side or default_short_side(train)
    size = options.image_size or ImageSize(side, round(side * LONGEST))
    set_pipelines(config, encoder.model.channels, size, masks)
    best = "coco/segm_mAP" if masks else "coco/bbox_mAP"
    set_schedule(config, options, train.count, best)
    set_workers(config, options.workers)
    return config


def set_dataset(config: Any, train: CocoSplit, val: CocoSplit, masks: bool) -> None:
    """Sets the dataset and the number of classes of every head."""
    names = train.class_names
    for loader, split in (("train_dataloader", train), ("val_dataloader", val), ("test_dataloader", val)):
        training = loader == "train_dataloader"
        replace_dataset(config[loader], partial(dataset_settings, split, names, training))
    config.val_evaluator = config.test_evaluator = metric_settings(val, masks)
    set_classes(config.model, len(names))


def wants_masks(config: Any) -> bool:
    """Returns whether a configuration learns from the masks of objects.

    Raises:
        BadInput: it learns from label maps as well, which COCO's annotations of objects do not have.
    """
    steps = [step for step in pipeline_of(config.train_dataloader.dataset) if isinstance(step, dict)]
    if any(step["type"] == "LoadPanopticAnnotations" or step.get("with_seg") for step in steps):
        raise BadInput(
            f"{config.filename}: learns from label maps, too (panoptic or semantic segmentation), which a "
            "dataset of objects does not have; use the instance configuration, or name the data in the file"
        )
    return any(step.get("with_mask") for step in steps)


def predicts_masks(model: Any) -> bool:
    """Returns whether a detector has a head with masks."""
    return any({"mask_head", "loss_mask"} & node.keys() for node in nodes(model))


def dataset_settings(
    split: CocoSplit, names: tuple[str, ...], training: bool, pipeline: list[Any]
) -> dict[str, Any]:
    """Returns the settings of mmdet's dataset; training skips images without objects."""
    return {
        "type": "CocoDataset",
        "data_root": "",
        "ann_file": str(split.annotations.resolve()),
        "data_prefix": {"img": f"{split.images.resolve()}/"},
        "metainfo": {"classes": names},
        "pipeline": pipeline,
        **({"filter_cfg": {"filter_empty_gt": True, "min_size": 1}} if training else {"test_mode": True}),
    }


def metric_settings(split: CocoSplit, masks: bool) -> dict[str, Any]:
    """Returns the settings of COCO's average precision on a split."""
    kinds = ["bbox", "segm"] if masks else ["bbox"]
    return {"type": "CocoMetric", "ann_file": str(split.annotations.resolve()), "metric": kinds}


def annotation_step(masks: bool) -> dict[str, Any]:
    """Returns the pipeline step that loads boxes, and masks if asked for."""
    return {"type": "LoadAnnotations", "with_bbox": True, "with_mask": masks}


def test_settings(about: ArtifactConfig, split: CocoSplit) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `loader` and `metric` settings of `finetune.evaluate` for a split.

    Masks are measured too where model and split have them.

    Raises:
        BadInput: the split has other classes than the artifact.
    """
    check_classes(about, split.class_names, split.annotations)
    masks = predicts_masks((about.head or {})["model"]) and split.has_masks
    loader = {
        "dataset": dataset_settings(split, split.class_names, False, []),
        "labels": annotation_step(masks),
    }
    return loader, metric_settings(split, masks)


def set_pipelines(config: Any, channels: int, size: ImageSize, masks: bool) -> None:
    """Sets the pipelines: any image format; resized to fit `size`, in training times 0.8 to 1.25; flips."""
    scale = (size.width, size.height)
    read = image_reader(channels)
    config.train_dataloader.dataset.pipeline = [
        read,
        annotation_step(masks),
        {"type": "RandomResize", "scale": scale, "ratio_range": (0.8, 1.25), "keep_ratio": True},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PackDetInputs"},
    ]
    testing = [
        read,
        {"type": "Resize", "scale": scale, "keep_ratio": True},
        annotation_step(masks),
        {"type": "PackDetInputs", "meta_keys": META},
    ]
    config.val_dataloader.dataset.pipeline = config.test_dataloader.dataset.pipeline = testing


def default_short_side(train: CocoSplit) -> int:
    """Returns the median short side of the training images, at most 800 px, as a multiple of 32."""
    return max(min(800, round(train.median_short_side / 32) * 32), 32)
