"""Train, test and run image classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from coma.arguments import from_keywords, parse_arguments, parse_known
from coma.config import FinetuneConfig
from coma.config.serialization import read_config
from coma.errors import BadInput, CheckFailed
from coma.messages import abridged, counted
from coma.paths import Location
from coma.preflight import require_packages
from coma.ranges import Range
from downstream.cli_options import Device, RuntimeOptions, Split
from downstream.commands import shared
from downstream.commands.classify_results import print_scores, summary

if TYPE_CHECKING:
    from downstream.classify.finetune import FinetuneResult
    from downstream.classify.predictions import Predictions

__all__ = ["predict", "test", "train"]

USAGE = """
usage: coma classify train ARTIFACT --data CLASSES --out runs/classifier
       coma classify train ARTIFACT --data CLASSES --out runs/from-scratch --from-scratch
       coma classify train --resume runs/classifier
       coma classify test CLASSIFIER --data CLASSES
       coma classify predict CLASSIFIER IMAGES --out PREDICTIONS
       coma classify check --data CLASSES

Train, test and run image classifiers.

CLASSES is a folder with train/ and test/, and perhaps val/: folders with one folder per class, or .npz packs;
or with train.csv and test.csv, and perhaps val.csv: a path and its labels in every line. CLASSIFIER is
runs/classifier/artifact, a file that `coma export` wrote, or a folder of them. Every verb has its own --help.
"""


IMAGES = tyro.conf.arg(metavar="IMAGES ...", help_behavior_hint="(required)")
FROZEN_OPTIONS = (
    *("artifact", "data", "images", "test", "val", "out", "image_size", "from_scratch", "hold_out", "seed"),
    *("device", "workers", "batch_size", "micro_batch", "frozen", "frozen_stages", "class_balance"),
    "label_share",
)
"""Settings that apply to a linear head on frozen features; `frozen_stages` is refused later."""

_NAMED = 20
"""Most images that an error of `coma classify check` names."""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tunes a classifier: the whole encoder under a linear head, or with --frozen the head alone.

    Every image is cropped, flipped, augmented and mixed anew in every epoch. The checkpoint is chosen by
    top-1 accuracy on centre crops of the validation images: those of --val, of a val split beside test, or
    else a part of the training images (--hold-out), which is not trained on. The test images are used once,
    at the end.
    """

    config: Annotated[FinetuneConfig, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Resume the run in this directory with its saved settings."""
    allow_changed_data: bool = False
    """With --resume: continue although images were added, removed, renamed, changed in size or moved to
    another class; the best checkpoint is then searched anew."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Describe the run, estimate time and memory, and write nothing."""


@dataclass(frozen=True, kw_only=True)
class ClassifyTest(RuntimeOptions):
    """Measures a classifier on labelled images: accuracy, precision and recall, confusions, calibration.

    Classes are matched by name. With one class per image: top-1, top-5 and balanced accuracy. With any number
    of classes: mean average precision (mAP), micro and macro F1.
    """

    artifact: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLASSIFIER")] = field()
    """Artifact of `coma classify train`, a .onnx or .engine file, or a folder of exports."""
    data: Annotated[Location, tyro.conf.arg(metavar="CLASSES")] = field()
    """Labelled images: class folders, .npz packs, or .csv files with a path and labels in every line; also
    the address of shards or parquet files."""
    split: Annotated[
        Split | None, tyro.conf.arg(help_behavior_hint="(default: test, or else val, or else all images)")
    ] = None
    """Split to measure on."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder for scores.json, confusion_matrix.png and reliability.png."""
    device: Device = "auto"
    """Device to compute on; auto is the GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class ClassifyPredict(RuntimeOptions):
    """Labels images: writes predictions.csv, predictions.json and contact_sheet.png.

    A command that was stopped or killed continues when it is given again.
    """

    artifact: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLASSIFIER")] = field()
    """Artifact of `coma classify train`, a .onnx or .engine file, or a folder of exports."""
    images: Annotated[tuple[Location, ...], tyro.conf.Positional, IMAGES] = field()
    """Images, and folders of images (searched recursively); or one pack, .csv file, or address of shards or
    parquet files."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = field()
    """New folder for the predictions and the contact sheet."""
    device: Device = "auto"
    """Device to compute on; auto is the GPU where there is one."""
    top_k: Annotated[
        int | None,
        Range(1, 10**6),
        tyro.conf.arg(help_behavior_hint="(default: 5, or all classes if there are fewer)"),
    ] = None
    """Most probable classes that are written for each image."""


@dataclass(frozen=True)
class ClassifyCheck:
    """Decodes labelled images, prints how many of each class every split has and draws a contact sheet.

    It ends with an error that names images which cannot be decoded; all other commands skip them.
    """

    data: Annotated[Location, tyro.conf.arg(metavar="CLASSES")]
    """Labelled images, as for training."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder for contact_sheet.png: images of every class and split."""


@dataclass(frozen=True)
class _Resume:
    """The flag that decides about the defaults of the others."""

    resume: Path | None = None


def run(argv: list[str]) -> None:
    """Parses the command line and trains.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    verbs = {"train": _train, "test": _test, "predict": _predict, "check": _check}
    shared.run_verb(argv, verbs, USAGE)


def parse(argv: list[str]) -> TrainConfig:
    """Returns the settings that `argv` asks for; a resumed run provides the defaults of its own.

    Raises:
        BadInput: a run that cannot be read, or flags that do not go with --resume.
    """
    folder = parse_known(_Resume, argv, prog="coma classify train").resume
    default = None
    if folder:
        saved = read_config(folder, FinetuneConfig)
        out = folder.parent if folder.is_file() else folder
        default = TrainConfig(replace(saved, run=replace(saved.run, out=out)))
    given = parse_arguments(TrainConfig, argv, prog="coma classify train", default=default)
    if default and given.config.run.out != default.config.run.out:
        raise BadInput("--out does not go with --resume, which continues in the run's own directory")
    if given.allow_changed_data and not default:
        raise BadInput("--allow-changed-data goes with --resume; a new run takes the images as they are")
    idle = [name for name in _names(given.config) if name not in FROZEN_OPTIONS]
    if given.config.optimizer.frozen and (flags := shared.given_flags(argv, idle)):
        raise BadInput(f"{flags}: no effect with --frozen, which fits the head to the optimum; leave it out")
    return given


def _names(config: FinetuneConfig) -> list[str]:
    sections = (config, config.data, config.optimizer, config.run)
    return [each.name for section in sections for each in fields(section)]


def train(artifact: str | Path | None = None, **settings: Any) -> FinetuneResult | None:
    """Trains a classifier, as `coma classify train` does.

        result = coma.classify.train("runs/first/artifact", data="CLASSES", out="runs/classifier", epochs=30)
        print(result.test, result.artifact)

    Args:
        artifact: An artifact of any kind to start from; None with `resume`.
        settings: Flags of the command as keywords: `data`, `out`, `epochs`, `frozen`, `resume`.

    Returns:
        The results of the run; None with `dry_run=True`, which prints what the run is going to do.

    Raises:
        BadInput: settings, artifacts or images that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    return _trained(parse(_words(artifact=artifact, **settings)))


def test(classifier: str | Path, **settings: Any) -> dict[str, Any]:
    """Measures a classifier on labelled images, as `coma classify test` does.

        scores = coma.classify.test("runs/classifier/artifact", data="CLASSES")
        print(scores["top1"], scores["calibration"]["error"])

    Args:
        classifier: An artifact, an exported file, or a folder of exports.
        settings: Flags of the command as keywords: `data`, `split`, `out`, `runtime`.

    Returns:
        What scores.json holds; see `downstream.classify.evaluate.evaluate_classifier`.

    Raises:
        BadInput: a model, images or labels that cannot be used; classes that the classifier does not have.
        CheckFailed: outputs that are not finite.
    """
    words = _words(artifact=classifier, **settings)
    return _tested(parse_arguments(ClassifyTest, words, prog="coma classify test"))


def predict(
    classifier: str | Path, images: str | Path | Sequence[str | Path], **settings: Any
) -> Predictions:
    """Labels images, as `coma classify predict` does.

        found = coma.classify.predict("runs/classifier/artifact", "PHOTOS", out="predictions", top_k=3)
        names = [each["classes"][0]["name"] for each in found]

    Args:
        classifier: An artifact, an exported file, or a folder of exports.
        images: Images and folders of images.
        settings: Flags of the command as keywords: `out`, `top_k`, `runtime`.

    Returns:
        The predictions, which are read from predictions.json, one image at a time.

    Raises:
        BadInput: a model or images that cannot be used.
        CheckFailed: outputs that are not finite.
        ComaError: the disk is full; finished parts are kept.
        Interrupted: Ctrl-C or SIGTERM; finished parts are kept, and the same call continues.
    """
    words = _words(artifact=classifier, images=images, **settings)
    return _predicted(parse_arguments(ClassifyPredict, words, prog="coma classify predict"))


def _words(**settings: Any) -> list[str]:
    return from_keywords(settings, positional=("artifact", "images"))


def _train(argv: list[str]) -> None:
    if result := _trained(parse(argv)):
        print(summary(result))


def _trained(given: TrainConfig) -> FinetuneResult | None:
    require_packages("tensorboard", "matplotlib")

    from coma.devices import pick_device
    from downstream.classify.finetune import describe, finetune

    config, resume = given.config, given.resume is not None
    pick_device(config.run.device)
    if not given.dry_run:
        return finetune(config, resume=resume, allow_changed_data=given.allow_changed_data)
    print("\n".join(describe(config, resume=resume, allow_changed_data=given.allow_changed_data)))
    return None


def _test(argv: list[str]) -> None:
    options = parse_arguments(ClassifyTest, argv, prog="coma classify test")
    print_scores(_tested(options))
    if options.out:
        for path in sorted(options.out.glob("*.*")):
            print(f"  {path}")


def _tested(options: ClassifyTest) -> dict[str, Any]:
    from coma.progress import Progress
    from downstream.classify.evaluate import evaluate_classifier

    with Progress() as progress:
        return evaluate_classifier(
            options.artifact,
            options.data,
            split=options.split,
            out=options.out,
            runtime=options.runtime,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
        )


def _predict(argv: list[str]) -> None:
    options = parse_arguments(ClassifyPredict, argv, prog="coma classify predict")
    found = _predicted(options)
    print(
        f"\n{len(found):,} images labelled\n\n"
        f"  predictions    {options.out / 'predictions.csv'} and .json\n"
        f"  contact sheet  {options.out / 'contact_sheet.png'}"
    )


def _predicted(options: ClassifyPredict) -> Predictions:
    from coma.progress import Progress
    from downstream.classify.predict import predict_classes
    from downstream.classify.predictions import parts_folder

    if not options.images:
        raise BadInput("coma classify predict needs IMAGES; coma classify predict --help lists all settings")
    if not parts_folder(options.out).exists():
        shared.check_empty(options.out)
    with Progress() as progress:
        return predict_classes(
            options.artifact,
            options.images,
            out=options.out,
            top_k=options.top_k,
            runtime=options.runtime,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=progress,
        )


def _check(argv: list[str]) -> None:
    options = parse_arguments(ClassifyCheck, argv, prog="coma classify check")

    import torch

    from coma.data import align_labels, open_labelled_splits, unreadable_images

    if options.out:
        shared.check_empty(options.out)
    splits = open_labelled_splits(options.data)
    sources = {"train": splits.train, "val": splits.val, "test": splits.test}
    there = {name: source for name, source in sources.items() if source is not None}
    aligned = {name: align_labels(splits.train, source) for name, source in there.items()}
    names = aligned["train"][2]
    rows = [("images", [f"{len(source):,}" for source in there.values()])]
    for number, name in enumerate(names):
        counts = [
            (labels == number).sum() if labels.ndim == 1 else labels[:, number].sum().to(torch.int64)
            for _, labels, _ in aligned.values()
        ]
        rows.append((f"images of {name}", [f"{int(count):,}" for count in counts]))
    errors: list[str] = []
    with shared.progress_bar("reading images") as show:
        total, done = sum(map(len, there.values())), 0
        for error in chain.from_iterable(map(unreadable_images, there.values())):
            errors += [error] if error else []
            show(done := done + 1, total)
    shared.print_check(rows, tuple(there), errors)
    if options.out:
        from downstream.label_check import draw_class_sheet

        shown = {name: (source, aligned[name][1]) for name, source in there.items()}
        print(f"contact sheet: {draw_class_sheet(options.out, options.data, names, shown)}")
    if errors:
        unreadable = counted(len(errors), "image that cannot be decoded", "images that cannot be decoded")
        named = abridged(errors, _NAMED, "; ")
        raise CheckFailed(f"{options.data}: {unreadable}: {named}; repair or remove what is named")
