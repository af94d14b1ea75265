"""Measure artifacts on labelled images: nearest neighbours and a linear classifier.

An encoder that has learned nothing is measured beside them: part of every such score comes from the
architecture and from colour alone, and only the rest is what pre-training taught.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pretrain.errors import BadInput

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from pretrain.artifact import ArtifactConfig
    from pretrain.data import Source
    from pretrain.evaluate import Score
    from pretrain.models import Encoder


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy of frozen features on labelled images."""

    artifacts: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT ...", help_behavior_hint="")
    ]
    """Artifact directories, of kind backbone or pretrained (run/artifact)."""
    data: Path | None = None
    """Folder that holds train and test (or val): folders with one folder per class, or .npz packs."""
    train: Path | None = None
    """Labelled training images, when they do not lie in --data."""
    test: Path | None = None
    """Labelled test images of the same classes, when they do not lie in --data."""
    protocol: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """knn: weighted vote of the nearest training images. linear: softmax regression on frozen features of
    centre crops (not comparable with linear probing that trains on augmented crops)."""
    reference: bool = True
    """Measure a randomly initialised encoder of the same architecture as well."""
    image_size: int | None = None
    """Side in pixels of the images shown to the encoder; default: as it was trained."""
    k: int = 20
    """Neighbours that vote (knn)."""
    temperature: float = 0.07
    """Of their votes (knn): smaller trusts the nearest more."""
    seed: int = 0
    """Of the random encoder, and of the images held out to choose the penalty (linear)."""
    batch_size: int = 256
    """Images at a time through the encoder."""
    workers: int | None = None
    """Processes that decode images; default: by the number of cores."""
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    out: Path | None = None
    """Also write the results to this file, as JSON."""


def run(argv: list[str]) -> None:
    """Parse, measure, print a table.

    Raises:
        BadInput: artifacts, images or settings that cannot be used.
        CheckFailed: an encoder's features are not finite.
    """
    config = tyro.cli(EvaluateConfig, args=argv, prog="coma evaluate", description=__doc__)
    if not config.artifacts:
        raise BadInput("give at least one artifact directory, for example run/artifact")
    if not config.protocol:
        raise BadInput("give at least one --protocol: knn, linear")
    if config.out and config.out.is_dir():
        raise BadInput(f"--out {config.out}: is a directory; give a file name")

    from rich.console import Console

    console = Console()
    train, test = _sources(config)
    scores = _measure(config, _encoders(config), train, test, console)
    console.print(_table(scores))
    if config.out:
        plain = {
            "train": str(train.location),
            "test": str(test.location),
            "scores": [asdict(s) for s in scores],
        }
        config.out.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _sources(config: EvaluateConfig) -> tuple[Source, Source]:
    from pretrain.data import open_source

    if config.data and not (config.train or config.test):
        return open_source(config.data, "train"), open_source(config.data, "test")
    if config.train and config.test and not config.data:
        return open_source(config.train), open_source(config.test)
    raise BadInput("give --data, or both --train and --test")


def _encoders(config: EvaluateConfig) -> list[tuple[str, Encoder, ArtifactConfig]]:
    """The artifacts' encoders by name; behind them, one that has learned nothing for each sort of them."""
    from pretrain.artifact import load_encoder
    from pretrain.evaluate import random_encoder

    encoders = [(str(path), *load_encoder(path)) for path in config.artifacts]
    sorts = {
        (about.model, about.mean, about.std, about.image_size): (name, about) for name, _, about in encoders
    }
    if config.reference:
        for name, about in sorts.values():
            encoders.append((f"random, like {name}", random_encoder(about, config.seed), about))
    return encoders


def _measure(
    config: EvaluateConfig,
    encoders: list[tuple[str, Encoder, ArtifactConfig]],
    train: Source,
    test: Source,
    console: Console,
) -> list[Score]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pretrain.evaluate import evaluate

    device = _device(config.device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(True))
    scores = []
    with Progress(*columns, console=console) as progress:
        for name, encoder, about in encoders:
            scores += evaluate(
                encoder.to(device),
                about,
                train,
                test,
                config.protocol,
                name=name,
                image_size=config.image_size,
                k=config.k,
                temperature=config.temperature,
                seed=config.seed,
                batch_size=config.batch_size,
                workers=config.workers,
                progress=progress,
            )
            encoder.cpu()
    return scores


def _device(name: str) -> torch.device:
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise BadInput(f"--device {name}: not available here; leave it out to take what there is")
    return torch.device(name)


def _table(scores: list[Score]) -> Table:
    from rich.table import Table

    table = Table("encoder", "protocol")
    for heading in ("top-1 %", "top-5 %", "trained on", "tested on", "seconds"):
        table.add_column(heading, justify="right")
    for score in scores:
        top5 = "" if score.top5 is None else f"{100 * score.top5:.2f}"
        counts = (str(score.train_images), str(score.test_images))
        table.add_row(
            score.encoder, score.protocol, f"{100 * score.top1:.2f}", top5, *counts, f"{score.seconds:.1f}"
        )
    return table
