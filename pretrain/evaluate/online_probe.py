"""Online evaluation during pre-training: accuracy on labelled images, collapse of the features, gates.

It runs the protocols of `evaluate` on a number of images; with all images, it returns the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coma.artifact import ArtifactConfig
from coma.config import ProbeConfig
from coma.data import Source, align_single_labels, balanced_subset, open_labelled_splits
from coma.errors import BadInput
from coma.models import Encoder
from coma.paths import Location
from pretrain.evaluate.collapse import effective_rank, feature_spread, watched_gates
from pretrain.evaluate.knn import check_knn
from pretrain.evaluate.linear_probe import draw_validation
from pretrain.evaluate.protocols import Protocol, labelled_features, score

_K = 20
"""Number of neighbours that vote, as in `evaluate`."""


@dataclass(frozen=True)
class Probe:
    """Labelled images to evaluate encoders on, opened and checked; see `open_probe`."""

    train: Source
    """Training images of the neighbours and the linear classifier."""
    test: Source
    """Test images."""
    config: ProbeConfig

    def __str__(self) -> str:
        """Returns a line that names the images."""
        learned, counted = (
            f"{len(source):,} images of {source.location}" for source in (self.train, self.test)
        )
        return (
            f"probe: accuracy on {counted}, by neighbours among {learned} or a classifier trained on them; "
            "it has no influence on training"
        )

    def measure(
        self, encoder: Encoder, about: ArtifactConfig, *, batch_size: int = 256, workers: int | None = None
    ) -> dict[str, float]:
        """Returns the encoder's scores as numbers for a log.

        Args:
            encoder: Encoder on the device to compute on.
            about: Mean, std and image size of its training.
            batch_size: Images per forward pass.
            workers: Number of processes that decode images.

        Returns:
            `knn`, `linear`: top-1 on the test images, 0..1, for the protocols of the probe. `feature_std`,
            `effective_rank`: statistics of the test images' features, see `feature_spread` and
            `effective_rank`. `stage1_window1`, ... `stage1_entropy`, ...: statistics of DM-MSA's gates on all
            images, see `GateStatistics`.

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
    """Returns the labelled images of `--probe`, limited and checked, or None without it.

    Raises:
        BadInput: labelled images that are missing, unlabelled, of one class, or too few for a protocol.
    """
    return None if config.probe is None else _open(config, config.probe)


def check_labelled(folder: Path, protocols: Sequence[Protocol]) -> None:
    """Checks that the protocols can use these labelled images.

    Raises:
        BadInput: as `open_probe`.
    """
    config = ProbeConfig(folder, probe_protocols=tuple(protocols), probe_train=0, probe_test=0)
    _open(config, folder)


def _open(config: ProbeConfig, folder: Location) -> Probe:
    splits = open_labelled_splits(folder)
    sources = splits.train, splits.test
    align_single_labels(*sources)
    limits = config.probe_train, config.probe_test
    train, test = (balanced_subset(source, most) for source, most in zip(sources, limits, strict=True))
    try:
        labels, _, _ = align_single_labels(train, test)
    except BadInput:
        raise BadInput(
            f"--probe-train {limits[0]}: too few for the classes of {folder}; give at least one image of each"
        ) from None
    if "knn" in config.probe_protocols:
        check_knn(_K, 1.0, len(train))
    if "linear" in config.probe_protocols:
        draw_validation(labels, 0)
    return Probe(train, test, config)
