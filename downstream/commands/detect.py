"""Train a detector on boxes and masks in COCO's format; test it; draw what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadInput
from coma.preflight import require_file
from coma.ranges import SHARE, Range, Ranged
from downstream.cli_options import FromOptions, TrainingOptions
from downstream.commands import shared

if TYPE_CHECKING:
    from downstream.configs.adapt import Described
    from downstream.datasets.coco import CocoSplit

USAGE = """
usage: coma detect train ARTIFACT --data DATASET --out runs/detector
       coma detect train --preset tiny --data DATASET --out runs/from-scratch
       coma detect train --resume runs/detector
       coma detect test ARTIFACT --data DATASET
       coma detect predict ARTIFACT IMAGES --out PREDICTIONS

Train a detector on boxes and masks in COCO's format; test it; draw what it finds.

DATASET is a folder with annotations/instances_train2017.json and train2017/, or annotations/train.json and
train/, or train/_annotations.coco.json; val likewise. It is checked before training starts. `coma detect
train --help` and so on list all settings.
"""


@dataclass(frozen=True)
class TrainConfig(Ranged):
    """Fine-tune a detector: encoder, FPN (plain ViT: simple feature pyramid) and head."""

    source: tyro.conf.OmitArgPrefixes[FromOptions] = field(default_factory=FromOptions)
    data: Path | None = None
    """Dataset in COCO's format, with train and val."""
    out: Path | None = None
    """New run directory."""
    resume: Path | None = None
    """Go on with the run in this directory, with its own settings."""
    model: Literal["mask-rcnn", "cascade-mask-rcnn", "faster-rcnn", "retinanet"] | None = None
    """Detector (default: mask-rcnn where every object has a mask, else faster-rcnn)."""
    short_side: Annotated[int | None, Range(32, 16384)] = None
    """Pixels that the short side of images is resized to (default: the median of the training images, at
    most 800)."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=TrainingOptions)


@dataclass(frozen=True)
class TestConfig:
    """Average precision of a detector on labelled images."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact of kind detector."""
    data: Path
    """Dataset in COCO's format."""
    split: Literal["train", "val", "test"] = "val"
    out: Path | None = None
    """Also write the scores to this file, as JSON."""


@dataclass(frozen=True)
class PredictConfig(Ranged):
    """Boxes and masks on images: pictures, and detections in COCO's result format."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact of kind detector."""
    images: Annotated[Path, tyro.conf.Positional]
    """An image, or a folder of them (searched recursively)."""
    out: Path
    """New folder for pictures/, detections.json and images.json."""
    score: Annotated[float, SHARE] = 0.3
    """Least score of what is drawn; detections.json holds everything."""
    annotations: Path | None = None
    """COCO json whose image ids to use; without, images are counted from 1."""
    device: shared.Device = "auto"


def run(argv: list[str]) -> None:
    """Parse, and train, test or predict.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    shared.choose_action(argv, {"train": _train, "test": _test, "predict": _predict}, USAGE, "mmdet")


def _train(argv: list[str]) -> None:
    given = parse_arguments(TrainConfig, argv, prog="coma detect train")
    others = {"model": given.model, "short_side": given.short_side}
    shared.train("detector", given, _own, _fit_data, others)


def _own(given: TrainConfig, encoder: Described) -> Any:
    from downstream.tasks.detection import HAS_MASKS, training_config

    data = shared.required(given.data, "--data", "a dataset in COCO's format")
    train, val = _splits(data)
    masks = train.has_masks and val.has_masks
    model = given.model or ("mask-rcnn" if masks else "faster-rcnn")
    if model in HAS_MASKS and not masks:
        raise BadInput(f"--model {model}: needs a mask for every object; {data} has boxes alone: faster-rcnn")
    return training_config(encoder, model, train, val, given.training, given.short_side)


def _fit_data(config: Any, given: TrainConfig) -> None:
    from downstream.tasks.detection import fit_dataset

    train, val = _splits(shared.required(given.data, "--data", "a dataset in COCO's format"))
    masks = "mask_head" in config.model.get("roi_head", {})
    if masks and not (train.has_masks and val.has_masks):
        raise BadInput(f"--config {given.source.config}: has a mask head; {given.data} has boxes alone")
    fit_dataset(config, train, val, masks)


def _splits(data: Path) -> tuple[CocoSplit, CocoSplit]:
    from downstream.datasets.coco import check_same_classes, open_coco

    with shared.checking("checking train and val") as progress:
        train, val = (open_coco(data, name, progress=progress) for name in ("train", "val"))
    for split in (train, val):
        shared.warn([f"{split.annotations}: {warning}" for warning in split.warnings])
    check_same_classes(train, val)
    return train, val


def _test(argv: list[str]) -> None:
    given = parse_arguments(TestConfig, argv, prog="coma detect test")

    import tempfile

    from downstream.artifacts import read_finetuned
    from downstream.datasets.coco import open_coco
    from downstream.finetune import measure
    from downstream.tasks.detection import scoring

    if given.out:
        require_file(given.out)

    about = read_finetuned(given.artifact, "detector").config
    with shared.checking(f"checking {given.split}") as progress:
        split = open_coco(given.data, given.split, progress=progress)
    loader, metric = scoring(about, split)
    with tempfile.TemporaryDirectory() as folder:
        scores = measure(given.artifact, "detector", loader, metric, Path(folder))
    shared.say_scores(scores, given.out, given.split, split.annotations)


def _predict(argv: list[str]) -> None:
    given = parse_arguments(PredictConfig, argv, prog="coma detect predict")

    from downstream.artifacts import load_finetuned
    from downstream.predict import image_numbers, list_images, number_images, predict, write_detections

    device = shared.device_of(given.device)
    shared.check_empty(given.out)
    paths = list_images(given.images)
    numbers = number_images(paths, image_numbers(given.annotations) if given.annotations else None)
    model = load_finetuned(given.artifact, "detector")
    about = model.artifact
    out = shared.new_folder(given.out)
    with shared.predicting(len(paths)) as progress:
        found = predict(model, about, paths, device, numbers, lambda text: shared.warn([f"skipped {text}"]))
        count = write_detections(out, found, about, given.score, progress)
    print(
        f"\n{count} detections with a score of {given.score} or more in {len(paths)} images\n\n"
        f"  pictures     {out / 'pictures'}\n"
        f"  COCO format  {out / 'detections.json'}, image ids in {out / 'images.json'}"
    )
