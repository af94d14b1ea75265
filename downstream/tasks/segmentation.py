"""Configurations of UPerNet for an encoder and a dataset of images and label maps."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np

from coma.artifact import ArtifactConfig
from coma.errors import BadInput
from coma.image_size import ImageSize
from downstream.artifacts import check_classes
from downstream.cli_options import TrainOptions
from downstream.configs.adapt import EncoderSpec, set_encoder
from downstream.configs.load import (
    PRESETS,
    as_list,
    image_reader,
    load_config,
    pipeline_of,
    replace_dataset,
)
from downstream.configs.schedule import set_schedule, set_workers
from downstream.datasets.image_headers import Header, read_header
from downstream.datasets.labels import LabelSplit
from downstream.tasks.class_counts import set_classes

PRESET = PRESETS / "mmseg" / "upernet_dyvit_160k_ade20k-512x512.py"
_LARGEST_CROP, _HEADERS = 512, 64
log = logging.getLogger(__name__)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def training_config(
    encoder: EncoderSpec,
    train: LabelSplit,
    val: LabelSplit,
    options: TrainOptions,
    crop: ImageSize | None = None,
    resize: int | None = None,
    whole: Any = None,
) -> Any:
    """Returns the training configuration of UPerNet for an encoder and a dataset.

    Args:
        encoder: The encoder.
        train: Training split.
        val: Validation split.
        options: Options of the command.
        crop: Height and width of the training crops; by default as `default_crop`.
        resize: Short side that images are resized to before cropping; None keeps their size.
        whole: Settings of a model around this encoder, in place of UPerNet's.

    Raises:
        BadInput: options that do not fit.
    """
    unit = encoder.model.unit
    if crop is None:
        crop = default_crop(train, unit, resize)
        log.info("training crops of %s px, from the size of the images; --crop-size sets another", crop)
    elif any(side < unit or side % unit for side in crop):
        flag = "--image-size" if options.image_size else "--crop-size"
        raise BadInput(f"{flag} {crop}: must be a multiple of the encoder's {unit} px mask unit")
    config = load_config(PRESET)
    if whole is not None:
        config.model = whole
    set_encoder(config, encoder, options)
    set_dataset(config, train, val)
    set_pipelines(config, encoder.model.channels, crop, resize, train.reduce_zero_label)
    set_schedule(config, options, train.pairs, "mIoU")
    set_workers(config, options.workers)
    if config.train_dataloader.batch_size < 2:
        raise BadInput("--batch-size: batch normalisation needs at least 2 images per process")
    return config


def default_crop(train: LabelSplit, unit: int, resize: int | None) -> ImageSize:
    """Returns a square of the short side of the images (median of up to 64), or of `resize`, at most 512 px.

    It is rounded down to a multiple of the mask unit `unit`; images that are smaller are padded.
    """
    if resize is None:
        stems = train.stems[:: max(len(train.stems) // _HEADERS, 1)][:_HEADERS]
        headers = [read_header(train.images / f"{stem}{train.image_suffix}") for stem in stems]
        sides = [min(header.shown) for header in headers if isinstance(header, Header)]
        resize = int(np.median(sides)) if sides else _LARGEST_CROP
    return ImageSize.of(max(min(resize, _LARGEST_CROP) // unit, 1) * unit)


def set_dataset(config: Any, train: LabelSplit, val: LabelSplit) -> None:
    """Sets the dataset and the number of classes of every head."""
    for loader, split in (("train_dataloader", train), ("val_dataloader", val), ("test_dataloader", val)):
        replace_dataset(config[loader], partial(dataset_settings, split))
    config.val_evaluator = config.test_evaluator = metric_settings(val)
    model = config.model
    model.data_preprocessor["seg_pad_val"] = train.ignore_index
    set_classes(model, len(train.class_names))
    for head in (*as_list(model.get("decode_head")), *as_list(model.get("auxiliary_head"))):
        head.ignore_index = train.ignore_index
    for loader, split in (("train_dataloader", train), ("val_dataloader", val), ("test_dataloader", val)):
        for step in pipeline_of(config[loader].dataset):
            if step["type"] == "LoadAnnotations":
                step["reduce_zero_label"] = split.reduce_zero_label


def dataset_settings(split: LabelSplit, pipeline: list[Any]) -> dict[str, Any]:
    """Returns the settings of mmseg's dataset."""
    return {
        "type": "BaseSegDataset",
        "data_root": None,
        "data_prefix": {"img_path": str(split.images.resolve()), "seg_map_path": str(split.labels.resolve())},
        "ann_file": str(split.listing or ""),
        "img_suffix": split.image_suffix,
        "seg_map_suffix": split.label_suffix,
        "metainfo": {"classes": split.class_names, "palette": [list(colour) for colour in split.palette]},
        "ignore_index": split.ignore_index,
        "reduce_zero_label": split.reduce_zero_label,
        "pipeline": pipeline,
    }


def metric_settings(split: LabelSplit) -> dict[str, Any]:
    """Returns the settings of the mean intersection over union on a split."""
    return {"type": "IoUMetric", "iou_metrics": ["mIoU"], "ignore_index": split.ignore_index}


def annotation_step(reduce_zero_label: bool) -> dict[str, Any]:
    """Returns the pipeline step that loads label maps."""
    return {"type": "LoadAnnotations", "reduce_zero_label": reduce_zero_label}


def test_settings(about: ArtifactConfig, split: LabelSplit) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `loader` and `metric` settings of `finetune.evaluate` for a split.

    Raises:
        BadInput: the split has other classes than the artifact.
    """
    check_classes(about, split.class_names, split.labels)
    loader = {"dataset": dataset_settings(split, []), "labels": annotation_step(split.reduce_zero_label)}
    return loader, metric_settings(split)


def set_pipelines(
    config: Any, channels: int, crop: ImageSize, resize: int | None, reduce_zero_label: bool
) -> None:
    """Sets the pipelines: any image format; crops at 0.5 to 2 times the size; whole test images."""
    read = image_reader(channels)
    labels = annotation_step(reduce_zero_label)
    exactly = [{"type": "Resize", "scale": (resize * 4, resize), "keep_ratio": True}] if resize else []
    jitter: dict[str, Any] = {
        "type": "RandomChoice",
        "transforms": [[{"type": "Resize", "scale_factor": s, "keep_ratio": True}] for s in SCALES],
    }
    if exactly:
        jitter = {**exactly[0], "type": "RandomResize", "ratio_range": (min(SCALES), max(SCALES))}
    config.train_dataloader.dataset.pipeline = [
        read,
        labels,
        jitter,
        {"type": "RandomCrop", "crop_size": tuple(crop), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        *([{"type": "PhotoMetricDistortion"}] if channels == 3 else []),
        {"type": "PackSegInputs"},
    ]
    testing = [read, *exactly, labels, {"type": "PackSegInputs"}]
    config.val_dataloader.dataset.pipeline = config.test_dataloader.dataset.pipeline = testing
    model = config.model
    model.data_preprocessor["size"] = tuple(crop)
    model.data_preprocessor.pop("size_divisor", None)
    model.test_cfg = {"mode": "whole"}
