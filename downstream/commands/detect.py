"""Fine-tune and run object detectors on annotated images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from coma.arguments import parse_arguments
from coma.errors import BadInput
from coma.ranges import SHARE, Range
from downstream.cli_options import CheckOptions, PredictOptions, TestOptions, TrainOptions
from downstream.commands import shared, training

if TYPE_CHECKING:
    from downstream.configs.adapt import EncoderSpec
    from downstream.datasets.coco import CocoSplit

USAGE = """
usage: coma detect train ARTIFACT --data DATASET --out runs/detector
       coma detect train --preset tiny --data DATASET --out runs/from-scratch
       coma detect train --resume runs/detector
       coma detect test ARTIFACT --data DATASET
       coma detect predict ARTIFACT IMAGES --out PREDICTIONS
       coma detect check --data DATASET

Fine-tune and run object detectors on annotated images.

DATASET is a folder with a train and a val split in the format of COCO, YOLO, Pascal VOC, LabelMe or Open
Images. Training checks it first. `coma detect train --help` lists the settings of training; every verb has
its own --help.
"""


@dataclass(frozen=True)
class DetectTrain(TrainOptions):
    """Fine-tunes a detector: the encoder, an FPN (plain ViT: a simple feature pyramid) and a head.

    With --config, the configuration holds the training settings; the flags that were given change them.
    """

    model: Annotated[
        Literal["mask-rcnn", "cascade-mask-rcnn", "faster-rcnn", "retinanet"] | None,
        arg(help_behavior_hint="(default: mask-rcnn if every object has a mask, else faster-rcnn)"),
    ] = None
    """Detector."""
    short_side: Annotated[
        int | None,
        Range(32, 16384),
        arg(help_behavior_hint="(default: the median of the training images, at most 800)"),
    ] = None
    """Short side that images are resized to, in pixels."""


@dataclass(frozen=True)
class DetectTest(TestOptions):
    """Measures the average precision (AP) of a detector on labelled images."""


@dataclass(frozen=True)
class DetectPredict(PredictOptions):
    """Detects objects: writes pictures/ or videos/ and label files (--format).

    Of COCO, detections.json holds all objects in the result format, and images.json those of --threshold.
    """

    threshold: Annotated[float, SHARE] = 0.3
    """Lowest score of objects that are drawn and written; detections.json holds all objects."""
    annotations: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """COCO annotations whose image ids are used; otherwise images are numbered from 1."""


@dataclass(frozen=True)
class DetectCheck(CheckOptions):
    """Checks every image and object of a dataset, prints what it holds and draws a contact sheet."""


def run(argv: list[str]) -> None:
    """Runs one verb.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    verbs = {"train": _train, "test": _test, "predict": _predict, "check": _check}
    shared.run_verb(argv, verbs, USAGE, "mmdet")


def _train(argv: list[str]) -> None:
    options = parse_arguments(DetectTrain, argv, prog="coma detect train")
    training.train("detector", options, argv, _config, _set_dataset)


def _config(options: DetectTrain, encoder: EncoderSpec) -> Any:
    from downstream.start import whole_model
    from downstream.tasks.detection import HAS_MASKS, training_config

    data, train, val = _open_splits(options)
    masks = train.has_masks and val.has_masks
    whole = None if options.model else whole_model(encoder, "detector")
    draws_masks = masks if whole is None else "mask_head" in whole.get("roi_head", {})
    model = options.model or ("mask-rcnn" if draws_masks else "faster-rcnn")
    if model in HAS_MASKS and not masks:
        needs = f"--model {model}" if options.model else options.artifact
        raise BadInput(
            f"{needs}: needs a mask for every object; {data} has only boxes: use --model faster-rcnn"
        )
    if options.image_size and options.short_side:
        raise BadInput("--image-size, --short-side: both say how images are resized; give one of them")
    return training_config(encoder, model, train, val, options, options.short_side, whole)


def _set_dataset(config: Any, options: DetectTrain) -> int:
    from downstream.tasks.detection import set_dataset, wants_masks

    masks = wants_masks(config)
    data, train, val = _open_splits(options)
    if masks and not (train.has_masks and val.has_masks):
        raise BadInput(f"--config {options.config}: learns from masks, but {data} has only boxes")
    set_dataset(config, train, val, masks)
    return train.count


def _open_splits(options: DetectTrain) -> tuple[Path, CocoSplit, CocoSplit]:
    from downstream.datasets.coco import check_same_classes, open_coco

    data = shared.require_option(options.data, "--data", "a dataset in COCO format")
    with shared.progress_bar("checking train and val") as progress:
        folder = training.labels_folder(options.out)
        train, val = (open_coco(data, name, progress=progress, converted=folder) for name in ("train", "val"))
    for split in (train, val):
        shared.warn([f"{split.annotations}: {warning}" for warning in split.warnings])
    check_same_classes(train, val)
    return data, train, val


def _test(argv: list[str]) -> None:
    options = parse_arguments(DetectTest, argv, prog="coma detect test")

    from downstream.datasets.coco import open_coco
    from downstream.tasks.detection import test_settings

    def open_split(progress: Any) -> CocoSplit:
        return open_coco(options.data, options.split, progress=progress)

    shared.test("detector", options, open_split, test_settings)


def _predict(argv: list[str]) -> None:
    options = parse_arguments(DetectPredict, argv, prog="coma detect predict")

    images, count = shared.predict("detector", options, options.threshold, options.annotations)
    print(f"\n{count} detections with a score of {options.threshold} or more in {images} images\n")
    shared.print_files(options.out)


def _check(argv: list[str]) -> None:
    options = parse_arguments(DetectCheck, argv, prog="coma detect check")

    from downstream.datasets.coco import check_same_classes, open_coco
    from downstream.label_check import draw_object_sheet, object_rows

    splits = shared.open_all_splits(options, lambda name, bar: open_coco(options.data, name, progress=bar))
    for split in splits.values():
        check_same_classes(splits["train"], split)

    def sizes(split: CocoSplit) -> str:
        return " / ".join(f"{width} x {height}" for width, height in split.image_sizes)

    rows = [
        ("images", [str(split.count) for split in splits.values()]),
        ("size: min / median / max", [sizes(split) for split in splits.values()]),
        ("classes", [str(len(split.class_names)) for split in splits.values()]),
        (
            "objects: small / medium / large",
            [" / ".join(map(str, s.small_medium_large)) for s in splits.values()],
        ),
        ("crowds", [str(split.crowds) for split in splits.values()]),
        ("masks", ["yes" if split.has_masks else "no" for split in splits.values()]),
    ]
    classes = {name: object_rows(split) for name, split in splits.items()}
    shared.print_check(rows, tuple(splits))
    shared.print_classes(splits["train"].class_names, classes, "objects")
    if options.out:
        print(f"contact sheet: {draw_object_sheet(options.out, options.data, splits)}")
