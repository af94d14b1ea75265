"""Train a classifier on images in class folders."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from coma.arguments import parse_arguments, parse_known
from coma.config import FinetuneConfig
from coma.config.serialization import read_config
from coma.errors import BadInput
from coma.preflight import require_packages
from downstream.commands import shared

if TYPE_CHECKING:
    from downstream.classify.finetune import FinetuneResult

USAGE = """
usage: coma classify train ARTIFACT --data CLASSES --out runs/classifier
       coma classify train ARTIFACT --data CLASSES --out runs/from-scratch --from-scratch
       coma classify train --resume runs/classifier

Train a classifier on images in class folders.

CLASSES is a folder with train/ and test/, and perhaps val/: folders with one folder per class, or .npz packs.
`coma classify train --help` lists all settings.
"""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a classifier: the whole encoder under a linear head.

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
    shared.run_verb(argv, {"train": _train}, USAGE)


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
    return given


def _train(argv: list[str]) -> None:
    given = parse(argv)
    require_packages("tensorboard", "matplotlib")

    from coma.devices import pick_device
    from downstream.classify.finetune import finetune

    pick_device(given.config.run.device)
    result = finetune(
        given.config, resume=given.resume is not None, allow_changed_data=given.allow_changed_data
    )
    print(_summary(result))


def _summary(result: FinetuneResult) -> str:
    test, out = result.test, result.config.run.out
    chosen = "the last step, since there are no validation images"
    if result.best and result.last:
        chosen = (
            f"chosen on {result.best.images:,} validation images (top-1 {result.best.top1:.2%} there, "
            f"{result.last.top1:.2%} at the last step)"
        )
    top5 = "" if test.top5 is None else f", top-5 {test.top5:.2%}"
    return f"""
trained on {result.train_images:,} images of {len(result.config.class_names or ())} classes
weights of step {test.step} of {result.steps}: {chosen}
top-1 {test.top1:.2%}{top5} on {test.images:,} test images, used once, at the end

  classifier       {result.artifact} (weights of step {test.step})
  curves           {out / "loss_curve.png"}
  metrics          {out / "metrics.jsonl"}, or: tensorboard --logdir {out / "tensorboard"}

next:
  coma export {shlex.quote(str(result.artifact))}
      write ONNX files and verify them against PyTorch on real images"""
