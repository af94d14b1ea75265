"""Train a segmentor on images and label maps; test it; draw what it sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments
from coma.errors import BadInput
from coma.preflight import require_file
from coma.ranges import SIDE, Range, Ranged
from downstream.cli_options import FromOptions, TrainingOptions
from downstream.commands import shared

if TYPE_CHECKING:
    from downstream.configs.adapt import Described
    from downstream.datasets.labels import LabelSplit

USAGE = """
usage: coma segment train ARTIFACT --data DATASET --out runs/segmentor
       coma segment train --preset tiny --data DATASET --out runs/from-scratch
       coma segment train --resume runs/segmentor
       coma segment test ARTIFACT --data DATASET
       coma segment predict ARTIFACT IMAGES --out PREDICTIONS

Train a segmentor on images and label maps; test it; draw what it sees.

DATASET is a folder with img_dir/train and ann_dir/train (or images/ and labels/, ADE20K's or Cityscapes'
layout), val likewise, and classes.json or classes.txt. It is checked before training starts. `coma segment
train --help` and so on list all settings.
"""


@dataclass(frozen=True)
class TrainConfig(Ranged):
    """Fine-tune UPerNet on the encoder."""

    source: tyro.conf.OmitArgPrefixes[FromOptions] = field(default_factory=FromOptions)
    data: Path | None = None
    """Folder of images and label maps, with train and val."""
    classes: Path | None = None
    """Class names, one a line, or JSON (default: classes.json or classes.txt in --data)."""
    out: Path | None = None
    """New run directory."""
    resume: Path | None = None
    """Go on with the run in this directory, with its own settings."""
    crop_size: Annotated[int | None, SIDE] = None
    """Side of the square training crop in pixels (default: 512)."""
    short_side: Annotated[int | None, Range(32, 16384)] = None
    """Resize images to this short side first (default: as they are)."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=TrainingOptions)


@dataclass(frozen=True)
class TestConfig:
    """Mean intersection over union of a segmentor on labelled images."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact of kind segmentor."""
    data: Path
    """Folder of images and label maps."""
    classes: Path | None = None
    """Class names (default: classes.json or classes.txt in --data)."""
    split: Literal["train", "val", "test"] = "val"
    out: Path | None = None
    """Also write the scores to this file, as JSON."""


@dataclass(frozen=True)
class PredictConfig:
    """Label maps of images, and overlays."""

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact of kind segmentor."""
    images: Annotated[Path, tyro.conf.Positional]
    """An image, or a folder of them (searched recursively)."""
    out: Path
    """New folder for pictures/ and labels/."""
    device: shared.Device = "auto"


def run(argv: list[str]) -> None:
    """Parse, and train, test or predict.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    shared.choose_action(argv, {"train": _train, "test": _test, "predict": _predict}, USAGE, "mmseg")


def _train(argv: list[str]) -> None:
    given = parse_arguments(TrainConfig, argv, prog="coma segment train")
    others = {"crop_size": given.crop_size, "short_side": given.short_side}
    shared.train("segmentor", given, _own, _fit_data, others)


def _own(given: TrainConfig, encoder: Described) -> Any:
    from downstream.tasks.segmentation import training_config

    train, val = _splits(given)
    return training_config(encoder, train, val, given.training, given.crop_size or 512, given.short_side)


def _fit_data(config: Any, given: TrainConfig) -> None:
    from downstream.tasks.segmentation import fit_dataset

    fit_dataset(config, *_splits(given))


def _splits(given: TrainConfig) -> tuple[LabelSplit, LabelSplit]:
    from downstream.datasets.labels import open_labels

    data = shared.required(given.data, "--data", "a folder of images and label maps")
    with shared.checking("checking train and val") as progress:
        train, val = (open_labels(data, name, given.classes, progress) for name in ("train", "val"))
    for split in (train, val):
        shared.warn([f"{split.labels}: {warning}" for warning in split.warnings])
    if train.class_names != val.class_names:
        raise BadInput(f"{data}: train and val have different classes")
    return train, val


def _test(argv: list[str]) -> None:
    given = parse_arguments(TestConfig, argv, prog="coma segment test")

    import tempfile

    from downstream.artifacts import read_finetuned
    from downstream.datasets.labels import open_labels
    from downstream.finetune import measure
    from downstream.tasks.segmentation import scoring

    if given.out:
        require_file(given.out)

    about = read_finetuned(given.artifact, "segmentor").config
    with shared.checking(f"checking {given.split}") as progress:
        split = open_labels(given.data, given.split, given.classes, progress)
    loader, metric = scoring(about, split)
    with tempfile.TemporaryDirectory() as folder:
        scores = measure(given.artifact, "segmentor", loader, metric, Path(folder))
    shared.say_scores(scores, given.out, given.split, split.labels)


def _predict(argv: list[str]) -> None:
    given = parse_arguments(PredictConfig, argv, prog="coma segment predict")

    from downstream.artifacts import load_finetuned
    from downstream.predict import list_images, number_images, predict, write_segmentations

    device = shared.device_of(given.device)
    shared.check_empty(given.out)
    paths = list_images(given.images)
    model = load_finetuned(given.artifact, "segmentor")
    about = model.artifact
    out = shared.new_folder(given.out)
    with shared.predicting(len(paths)) as progress:
        found = predict(
            model,
            about,
            paths,
            device,
            number_images(paths, None),
            lambda text: shared.warn([f"skipped {text}"]),
        )
        write_segmentations(out, found, about, progress)
    print(f"\n  overlays    {out / 'pictures'}\n  label maps  {out / 'labels'} (class numbers from 0)")
