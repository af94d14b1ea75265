"""Fine-tune and run semantic segmentation models on images and label maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from coma.arguments import parse_arguments
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.ranges import BATCH, EPOCHS, SHARE, SIDE, Range
from downstream.cli_options import CheckOptions, PredictOptions, TestOptions, TrainOptions
from downstream.commands import shared, training

if TYPE_CHECKING:
    from downstream.configs.adapt import EncoderSpec
    from downstream.datasets.labels import LabelSplit

USAGE = """
usage: coma segment train ARTIFACT --data DATASET --out runs/segmentor
       coma segment train --preset tiny --data DATASET --out runs/from-scratch
       coma segment train --resume runs/segmentor
       coma segment test ARTIFACT --data DATASET
       coma segment predict ARTIFACT IMAGES --out PREDICTIONS
       coma segment check --data DATASET

Fine-tune and run semantic segmentation models on images and label maps.

DATASET is a folder with img_dir/train and ann_dir/train (or images/ and labels/, or the layout of ADE20K or
Cityscapes), val likewise, and classes.json or classes.txt; or with colour masks, one mask per class, or
polygons. Training checks it first. `coma segment train --help` lists the settings of training; every verb
has its own --help.
"""
CLASSES = arg(metavar="FILE", help_behavior_hint="(default: classes.json or classes.txt in --data)")


@dataclass(frozen=True)
class SegmentTrain(TrainOptions):
    """Fine-tunes a segmentor: the encoder and UPerNet.

    With --config, the configuration holds the training settings; the flags that were given change them.
    """

    epochs: Annotated[float, EPOCHS] = 100
    batch_size: Annotated[int, BATCH] = 8
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 0.75
    head_channels: Annotated[int | None, Range(1, 8192), arg(help_behavior_hint="(default: 512)")] = None
    classes: Annotated[Path | None, CLASSES] = None
    """Class names: JSON, or text with one name per line."""
    crop_size: Annotated[
        int | None, SIDE, arg(help_behavior_hint="(default: short side of the images, at most 512)")
    ] = None
    """Side of the square training crop, in pixels."""
    image_size: Annotated[ImageSize | None, Range(32, 16384), arg(help_behavior_hint="")] = None
    """Height and width of the training crop in pixels, instead of --crop-size; one number for both."""
    short_side: Annotated[
        int | None, Range(32, 16384), arg(help_behavior_hint="(default: images keep their size)")
    ] = None
    """Short side that images are resized to before cropping, in pixels."""


@dataclass(frozen=True)
class SegmentTest(TestOptions):
    """Measures the mean intersection over union (mIoU) of a segmentor on labelled images."""

    classes: Annotated[Path | None, CLASSES] = None
    """Class names: JSON, or text with one name per line."""


@dataclass(frozen=True)
class SegmentPredict(PredictOptions):
    """Segments images: writes label maps (labels/), overlays (pictures/, videos/), label files (--format)."""

    threshold: Annotated[float, SHARE] = 0.0
    """Lowest probability of a pixel's class; pixels below it are 255 in label maps, and not tinted."""


@dataclass(frozen=True)
class SegmentCheck(CheckOptions):
    """Checks every image and label of a dataset, prints what it holds and draws a contact sheet."""

    classes: Annotated[Path | None, CLASSES] = None
    """Class names: JSON, or text with one name per line."""


def run(argv: list[str]) -> None:
    """Runs one verb.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    verbs = {"train": _train, "test": _test, "predict": _predict, "check": _check}
    shared.run_verb(argv, verbs, USAGE, "mmseg")


def _train(argv: list[str]) -> None:
    options = parse_arguments(SegmentTrain, argv, prog="coma segment train")
    training.train("segmentor", options, argv, _config, _set_dataset)


def _config(options: SegmentTrain, encoder: EncoderSpec) -> Any:
    from downstream.start import whole_model
    from downstream.tasks.segmentation import training_config

    train, val = _open_splits(options)
    crop = options.image_size or (ImageSize.of(options.crop_size) if options.crop_size else None)
    whole = whole_model(encoder, "segmentor")
    return training_config(encoder, train, val, options, crop, options.short_side, whole)


def _set_dataset(config: Any, options: SegmentTrain) -> int:
    from downstream.tasks.segmentation import set_dataset

    train, val = _open_splits(options)
    set_dataset(config, train, val)
    return train.pairs


def _open_splits(options: SegmentTrain) -> tuple[LabelSplit, LabelSplit]:
    from downstream.datasets.labels import open_labels

    data = shared.require_option(options.data, "--data", "a folder of images and label maps")
    with shared.progress_bar("checking train and val") as progress:
        folder = training.labels_folder(options.out)
        train, val = (open_labels(data, name, options.classes, progress, folder) for name in ("train", "val"))
    for split in (train, val):
        shared.warn([f"{split.labels}: {warning}" for warning in split.warnings])
    if train.class_names != val.class_names:
        raise BadInput(f"{data}: train and val have different classes")
    return train, val


def _test(argv: list[str]) -> None:
    options = parse_arguments(SegmentTest, argv, prog="coma segment test")

    from downstream.datasets.labels import open_labels
    from downstream.tasks.segmentation import test_settings

    def open_split(progress: Any) -> LabelSplit:
        return open_labels(options.data, options.split, options.classes, progress)

    shared.test("segmentor", options, open_split, test_settings)


def _predict(argv: list[str]) -> None:
    options = parse_arguments(SegmentPredict, argv, prog="coma segment predict")

    images, _ = shared.predict("segmentor", options, options.threshold, None)
    print(f"\n{images} images; label maps hold class numbers from 0\n")
    shared.print_files(options.out)


def _check(argv: list[str]) -> None:
    options = parse_arguments(SegmentCheck, argv, prog="coma segment check")

    from downstream.datasets.labels import open_labels
    from downstream.label_check import draw_label_sheet, pixel_rows

    splits = shared.open_all_splits(
        options, lambda name, bar: open_labels(options.data, name, options.classes, bar)
    )
    rows = [
        ("images", [str(split.pairs) for split in splits.values()]),
        ("classes", [str(len(split.class_names)) for split in splits.values()]),
        ("ignored pixels", [f"{split.ignored:.1%}" for split in splits.values()]),
    ]
    classes = {name: pixel_rows(split) for name, split in splits.items()}
    shared.print_check(rows, tuple(splits))
    shared.print_classes(splits["train"].class_names, classes, "pixels")
    if options.out:
        print(f"contact sheet: {draw_label_sheet(options.out, options.data, splits)}")
