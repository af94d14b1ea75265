"""Evaluation protocols: `score` computes an accuracy from features, `evaluate` from an encoder and images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from coma.artifact import ArtifactConfig
from coma.data import Source, align_single_labels, check_sample, topk_accuracy
from coma.errors import BadInput
from coma.models import Encoder
from pretrain.evaluate.features import Features, extract_features
from pretrain.evaluate.knn import check_knn, knn_votes
from pretrain.evaluate.linear_probe import fit_linear

if TYPE_CHECKING:
    from coma.progress import Progress

Protocol = Literal["knn", "linear"]


@dataclass(frozen=True)
class Score:
    """Accuracy of one encoder under one protocol.

    Attributes:
        encoder: Name of the encoder.
        protocol: `knn` or `linear`, on frozen features.
        top1: Top-1 accuracy on the test images, 0..1.
        top5: Top-5 accuracy; None for five classes or fewer.
        classes: Number of classes; chance is one over it.
        train_images: Number of training images that were read.
        test_images: Number of test images that were read.
        seconds: Time of the protocol, without that of the features.
        settings: k and temperature (knn), or the penalty that was chosen (linear).
    """

    encoder: str
    protocol: Protocol
    top1: float
    top5: float | None
    classes: int
    train_images: int
    test_images: int
    seconds: float
    settings: dict[str, float]


def score(
    train: Features,
    test: Features,
    classes: int,
    protocol: Protocol,
    *,
    name: str = "encoder",
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
) -> Score:
    """Fits on `train` and returns the accuracy on `test`; see `knn_votes` and `fit_linear`.

    Raises:
        BadInput: no such protocol, or too few training images for it.
    """
    check_protocol(protocol)
    start = time.perf_counter()
    if protocol == "knn":
        settings = {"k": k, "temperature": temperature}
        guess = knn_votes(train.values, train.labels, test.values, classes, k=k, temperature=temperature)
    else:
        classifier = fit_linear(train.values, train.labels, classes, seed=seed)
        settings = {"penalty": classifier.penalty}
        guess = classifier(test.values)
    top1 = topk_accuracy(guess, test.labels, 1)
    top5 = topk_accuracy(guess, test.labels, 5) if classes > 5 else None
    seconds = time.perf_counter() - start
    return Score(name, protocol, top1, top5, classes, len(train.labels), len(test.labels), seconds, settings)


def check_protocol(name: str) -> None:
    """Checks the name of a protocol, before features are computed.

    Raises:
        BadInput: naming the protocols.
    """
    if name not in get_args(Protocol):
        raise BadInput(f"no protocol {name!r}; there are: {', '.join(get_args(Protocol))}")


def evaluate(
    encoder: Encoder,
    config: ArtifactConfig,
    train: Source,
    test: Source,
    protocols: Sequence[Protocol] = ("knn", "linear"),
    *,
    name: str = "encoder",
    image_size: int | tuple[int, int] | None = None,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Returns the scores of an encoder on labelled images, one per protocol; features are computed once.

    Args:
        encoder: Encoder on the device to compute on.
        config: Channels, mean, std and image size of its training.
        train: Labelled training images of the neighbours and the linear classifier.
        test: Labelled test images of the same classes.
        protocols: Protocols to score.
        name: Name of the encoder in tables.
        image_size: Size in pixels of the images shown; as in training by default.
        k: Number of neighbours that vote (knn).
        temperature: Softmax temperature of the vote (knn); lower values weight the nearest neighbours more.
        seed: Seed of the images held out to choose the penalty (linear).
        batch_size: Images per forward pass.
        workers: Number of processes that decode images.
        progress: Shows a bar for each set of images.

    Raises:
        BadInput: labels that are missing or differ, unreadable images, or settings that do not fit them.
        CheckFailed: the encoder's features are not finite.
    """
    for protocol in protocols:
        check_protocol(protocol)
    if "knn" in protocols:
        check_knn(k, temperature, len(train))
    for source in (train, test):
        check_sample(source, config.model.channels, config.mean, config.std, fixed=True)
    known, asked, classes = labelled_features(
        encoder,
        config,
        train,
        test,
        name=name,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    return [
        score(known, asked, classes, protocol, name=name, k=k, temperature=temperature, seed=seed)
        for protocol in protocols
    ]


def labelled_features(
    encoder: Encoder,
    config: ArtifactConfig,
    train: Source,
    test: Source,
    *,
    name: str = "encoder",
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Features, Features, int]:
    """Returns features of training and test images, with the same class numbers, and the number of classes.

    Raises:
        BadInput, CheckFailed: as `evaluate`.
    """
    train_labels, test_labels, names = align_single_labels(train, test)
    known, asked = (
        extract_features(
            encoder,
            config,
            source,
            labels=labels,
            image_size=image_size,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
            title=f"{name}: {part} images",
        )
        for source, labels, part in ((train, train_labels, "training"), (test, test_labels, "test"))
    )
    return known, asked, len(names)
