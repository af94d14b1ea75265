"""Evaluate frozen features on labelled images: nearest neighbours and a linear classifier.

A randomly initialised encoder is measured beside the artifacts: part of every such score comes from the
architecture and from colour alone, and only the rest is what pre-training taught.

Examples:
  coma evaluate runs/first/artifact --data CLASSES
  coma evaluate runs/first/artifact runs/second/artifact --data CLASSES --protocols knn --out evaluation
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from coma.arguments import parse_arguments
from coma.atomic_io import write_json, write_text
from coma.errors import BadInput
from coma.image_size import ImageSize
from coma.paths import Location
from coma.preflight import require_folder
from coma.ranges import BATCH, PROCESSES, SEED, SIDE, Range, Ranged

if TYPE_CHECKING:
    from coma.artifact import ArtifactConfig
    from coma.config import EncoderConfig
    from coma.data import LabelledSplits
    from coma.models import Encoder
    from pretrain.evaluate import Score


@dataclass(frozen=True)
class EvaluateConfig(Ranged):
    """Accuracy of frozen features on labelled images."""

    artifacts: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT ...", help_behavior_hint="")
    ]
    """Artifact directories, of kind backbone or pretrained (run/artifact), and tiny-64, which comes with the
    package."""
    data: Location | None = None
    """Folder that holds train and test (or val): folders with one folder per class, or .npz packs."""
    train: Location | None = None
    """Labelled training images, if they are not in --data."""
    test: Location | None = None
    """Labelled test images of the same classes, if they are not in --data."""
    protocols: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """knn: weighted vote of the nearest training images. linear: softmax regression on frozen features of
    centre crops (not comparable with linear probing that trains on augmented crops)."""
    random_baseline: bool = True
    """Also evaluate a randomly initialised encoder of the same architecture."""
    image_size: Annotated[ImageSize | None, SIDE] = None
    """Size of the images shown to the encoder in pixels: side of a square, or height and width; default: as
    in pre-training."""
    k: Annotated[int, Range(1, 10**6)] = 20
    """Number of neighbours that vote (knn)."""
    temperature: Annotated[float, Range(1e-3, 1e3)] = 0.07
    """Softmax temperature of the vote (knn); lower values weight the nearest neighbours more."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random encoder, and of the training images held out to choose the penalty (linear)."""
    batch_size: Annotated[int, BATCH] = 256
    """Images per forward pass."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that decode images; default: by the number of cores."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    out: Path | None = None
    """Folder for results.json and the table, results.md."""


def run(argv: list[str]) -> None:
    """Parses the command line, evaluates, prints the table and writes it.

    Raises:
        BadInput: artifacts, images or settings that cannot be used.
        CheckFailed: an encoder's features are not finite.
    """
    config = parse(argv)
    scores = evaluate(config)
    _print_table(scores)


def parse(argv: list[str]) -> EvaluateConfig:
    """Returns the settings that `argv` asks for.

    Raises:
        BadInput: values that do not fit.
    """
    return parse_arguments(EvaluateConfig, argv, prog="coma evaluate", description=__doc__)


def evaluate(config: EvaluateConfig) -> list[Score]:
    """Returns the scores of all encoders, and writes them where `config.out` says so.

    Raises:
        BadInput, CheckFailed: as `run`.
    """
    if not config.artifacts:
        raise BadInput("give at least one artifact directory, for example run/artifact")
    resolved = [path.resolve() for path in config.artifacts]
    for path, real in zip(config.artifacts, resolved, strict=True):
        if resolved.count(real) > 1:
            raise BadInput(f"{path}: was given twice; leave one out")
    if not config.protocols:
        raise BadInput("give at least one of --protocols: knn, linear")
    if config.out:
        require_folder(config.out)
    from coma.devices import pick_device

    pick_device(config.device)

    from coma.data import log_missing_classes, open_labelled_splits

    splits = open_labelled_splits(config.data, config.train, config.test)
    log_missing_classes(splits)
    scores = _evaluate(config, splits)
    if config.out:
        _write(config.out, splits, scores)
    return scores


def _encoders(config: EvaluateConfig) -> list[tuple[str, Encoder, ArtifactConfig]]:
    """Returns the artifacts' encoders by name, followed by a random one for each architecture."""
    from coma.artifact import load_encoder
    from pretrain.evaluate import random_encoder

    loaded = [(str(path), load_encoder(path)) for path in config.artifacts]
    encoders = [(name, encoder, encoder.artifact) for name, encoder in loaded]
    if not config.random_baseline:
        return encoders
    alike: dict[tuple[EncoderConfig, ImageSize], list[tuple[str, ArtifactConfig]]] = {}
    for name, _, about in encoders:
        shown = config.image_size or about.image_size
        alike.setdefault((replace(about.model, drop_path=0.0), shown), []).append((name, about))
    for (name, about), *others in alike.values():
        more = f" and {len(others)} more" if others else ""
        encoders.append((f"random, like {name}{more}", random_encoder(about, config.seed), about))
    return encoders


def _evaluate(config: EvaluateConfig, splits: LabelledSplits) -> list[Score]:
    from coma.devices import pick_device
    from coma.progress import Progress
    from pretrain.evaluate import evaluate

    encoders, device = _encoders(config), pick_device(config.device)
    scores = []
    with Progress() as progress:
        for name, encoder, about in encoders:
            scores += evaluate(
                encoder.to(device),
                about,
                splits.train,
                splits.test,
                config.protocols,
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


_HEADINGS = ("encoder", "protocol", "test top-1 %", "test top-5 %", "trained on", "tested on", "seconds")


def _cells(score: Score) -> tuple[str, ...]:
    top5 = "" if score.top5 is None else f"{100 * score.top5:.2f}"
    images = f"{score.train_images}", f"{score.test_images}"
    return score.encoder, score.protocol, f"{100 * score.top1:.2f}", top5, *images, f"{score.seconds:.1f}"


def _print_table(scores: list[Score]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    encoder, protocol, *numbers = _HEADINGS
    table = Table(Column(encoder, overflow="fold"), Column(protocol, no_wrap=True))  # no name is cut
    for heading in numbers:
        table.add_column(heading.replace(" ", "\n", 1), justify="right")
    for score in scores:
        table.add_row(*map(Text, _cells(score)))
    Console().print(table)


def _write(out: Path, splits: LabelledSplits, scores: list[Score]) -> None:
    results = {
        "train": str(splits.train.location),
        "test": str(splits.test.location),
        "scores": [asdict(score) for score in scores],
    }
    rows = [_HEADINGS, ("---", "---", *["---:"] * (len(_HEADINGS) - 2)), *map(_cells, scores)]
    write_text(out / "results.md", "".join(f"| {' | '.join(row)} |\n" for row in rows))
    write_json(out / "results.json", results)
