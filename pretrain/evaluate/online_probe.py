"""A quick look at what an encoder has learned so far: accuracy on labelled images, collapse, gates.

The same protocols as `evaluate`, on as many images as were asked for; with all of them, the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coma.artifact import ArtifactConfig
from coma.config import ProbeConfig
from coma.data import Source, align_labels, balanced_subset, open_labelled_splits
from coma.errors import BadInput
from coma.models import Encoder
from pretrain.evaluate.collapse import effective_rank, feature_spread, watched_gates
from pretrain.evaluate.knn import check_knn
from pretrain.evaluate.linear_probe import draw_validation
from pretrain.evaluate.protocols import Protocol, labelled_features, score

_K = 20
"""Neighbours that vote, as in `evaluate`."""


@dataclass(frozen=True)
class Probe:
    """Labelled images to measure encoders on, opened and checked; see `open_probe`."""

    train: Source
    """That neighbours and the linear classifier come from."""
    test: Source
    """To count on."""
    config: ProbeConfig

    def __str__(self) -> str:
        """Says what is measured on what."""
        learned, counted = (
            f"{len(source):,} images of {source.location}" for source in (self.train, self.test)
        )
        return (
            f"probe: accuracy on {counted}, by nearest neighbours or a classifier from {learned}; nothing "
            "that is trained or saved depends on it"
        )

    def measure(
        self, encoder: Encoder, about: ArtifactConfig, *, batch_size: int = 256, workers: int | None = None
    ) -> dict[str, float]:
        """What the encoder has learned, as numbers for a log.

        Args:
            encoder: On the device to compute on.
            about: Mean, std and image size that it is trained with.
            batch_size: Images at a time.
            workers: Processes that decode.

        Returns:
            `knn`, `linear`: top-1 on the test images, 0..1, as far as asked for. `feature_std`,
            `effective_rank`: of the test images' features, see `feature_spread` and `effective_rank`.
            `stage1_window1`, ... `stage1_entropy`, ...: of DM-MSA's gates on all images, see `GateWatch`.

        Raises:
            BadInput: images that can no longer be read.
            CheckFailed: features are not finite.
        """
        with watched_gates(encoder) as gates:
            known, asked, classes = labelled_features(
                encoder, about, self.train, self.test, batch_size=batch_size, workers=workers
            )
        protocols = self.config.probe_protocols
        values = {name: score(known, asked, classes, name, k=_K).top1 for name in protocols}
        values |= {
            "feature_std": feature_spread(asked.values),
            "effective_rank": effective_rank(asked.values),
        }
        return values | gates.summary()


def open_probe(config: ProbeConfig) -> Probe | None:
    """The labelled images that `--probe` names, limited and checked; None where it names none.

    Raises:
        BadInput: labelled images that are missing, unlabelled, of one class, or too few for a protocol.
    """
    return None if config.probe is None else _open(config, config.probe)


def check_labelled(folder: Path, protocols: Sequence[Protocol]) -> None:
    """Refuse labelled images that the protocols cannot work on.

    Raises:
        BadInput: as `open_probe`.
    """
    config = ProbeConfig(folder, probe_protocols=tuple(protocols), probe_train=0, probe_test=0)
    _open(config, folder)


def _open(config: ProbeConfig, folder: Path) -> Probe:
    splits = open_labelled_splits(folder)
    sources = splits.train, splits.test
    align_labels(*sources)
    limits = config.probe_train, config.probe_test
    train, test = (balanced_subset(source, most) for source, most in zip(sources, limits, strict=True))
    try:
        labels, _, _ = align_labels(train, test)
    except BadInput:
        raise BadInput(
            f"--probe-train {limits[0]}: too few for the classes of {folder}; give at least one image of each"
        ) from None
    if "knn" in config.probe_protocols:
        check_knn(_K, 1.0, len(train))
    if "linear" in config.probe_protocols:
        draw_validation(labels, 0)
    return Probe(train, test, config)
