"""Labelled images for an evaluation: training, validation and test splits with the same classes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from coma.data.labels import align_labels
from coma.data.sources.base import Source
from coma.data.sources.label_table import find_table
from coma.data.sources.open import open_source
from coma.data.sources.subset import Subset
from coma.data.worker_pool import map_ordered
from coma.errors import BadImage, BadInput
from coma.messages import abridged, counted
from coma.paths import Location

log = logging.getLogger(__name__)

_PARALLEL_FROM = 5000
"""Number of images from which worker processes decode them: one takes about a millisecond."""


@dataclass(frozen=True)
class LabelledSplits:
    """Training, validation and test images with the same classes."""

    train: Source
    val: Source | None
    test: Source


def open_labelled_splits(
    data: Location | None,
    train: Location | None = None,
    test: Location | None = None,
    val: Location | None = None,
) -> LabelledSplits:
    """Opens the splits of one folder, or each split from its own path.

    Classes without any readable image are skipped and logged.

    Args:
        data: Folder with the splits train and test (or val).
        train: Training images in another place.
        test: Test images in another place.
        val: Validation images in another place.

    Raises:
        BadInput: A path or split does not exist, or has no readable image.
    """
    if data and not (train or test):
        sources = [open_labelled(data, "train"), open_labelled(data, "test")]
        if val is None and sources[1].split == "test":
            found = open_labelled(data, "val")
            sources += [found] if found.split == "val" else []
    elif train and test and not data:
        sources = [open_labelled(train), open_labelled(test, held_out=True)]
    else:
        raise BadInput("give --data, or both --train and --test")
    if val is not None:
        sources.append(open_labelled(val, held_out=True))
    if sources[1].split == "val":
        _log_once(f"{sources[1].location}: used as test images, because there is no test split")
    readable = [_with_readable_classes(source) for source in sources]
    return LabelledSplits(readable[0], readable[2] if len(readable) > 2 else None, readable[1])


def open_labelled(path: Location, split: str | None = None, *, held_out: bool = False) -> Source:
    """Opens images with labels: those that CSV files in a folder list, or else those of `open_source`.

    Args:
        path: See `open_source`.
        split: See `open_source`.
        held_out: See `open_source`.

    Raises:
        BadInput: As `open_source` and `TableSource`.
    """
    if isinstance(path, Path) and (table := find_table(path, split, held_out=held_out)):
        path, split = table
    return open_source(path, split, held_out=held_out)


def log_missing_classes(splits: LabelledSplits) -> None:
    """Logs the classes of the training images that the validation or test images do not have.

    Raises:
        BadInput: See `align_labels`.
    """
    for source in (splits.val, splits.test):
        if source is None:
            continue
        _, labels, classes = align_labels(splits.train, source)
        present = set((labels if labels.ndim == 1 else labels.nonzero()[:, 1]).tolist())
        missing = [name for i, name in enumerate(classes) if i not in present]
        if missing:
            few = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            _log_once(f"{source.location}: has no image of {len(missing)} of {len(classes)} classes: {few}")


def unreadable_images(source: Source) -> Iterator[str]:
    """Yields an error for each image that cannot be decoded, and the empty string for each of the others."""
    workers = None if len(source) >= _PARALLEL_FROM else 0
    return map_ordered(partial(_error_of_all, source), np.arange(len(source))[:, None], workers)


def _log_once(line: str) -> None:
    log.info(line, extra={"once": True})


def _with_readable_classes(source: Source) -> Source:
    """Returns the images without those of classes that have no readable image."""
    labels = source.labels
    if labels is None:
        return source
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels[order[0]] - 1))
    classes = np.split(order, starts[1:])
    errors = map_ordered(
        partial(_error_of_all, source), classes, None if len(classes) >= _PARALLEL_FROM else 0
    )
    unreadable, reasons = [], []
    for members, error in zip(classes, errors, strict=True):
        if error:
            label = int(labels[members[0]])
            unreadable.append(label)
            name = str(label) if source.class_names is None else source.class_names[label]
            reasons.append(f"{name} ({len(members)}; {error})")
    if not unreadable:
        return source
    if len(unreadable) == len(classes):
        raise BadInput(f"{source.location}: no image could be read; class {reasons[0]}")
    kept = Subset(source, np.flatnonzero(~np.isin(labels, unreadable)))
    skipped = counted(len(unreadable), "class", "classes")
    _log_once(f"{source.location}: {skipped} skipped, because no image can be read: {abridged(reasons, 3)}")
    return kept


def _error_of_all(source: Source, members: np.ndarray) -> str:
    """Returns the first error if none of these images can be read; otherwise the empty string."""
    first = ""
    for i in members.tolist():
        try:
            source.decode(i, min_side=1)
        except BadImage as error:
            first = first or str(error)
        else:
            return ""
    return first
