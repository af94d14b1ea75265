"""Labelled images to learn and to count on: the splits that a measurement needs, opened and checked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coma.data.labels import align_labels
from coma.data.sources.base import Source
from coma.data.sources.open import open_source
from coma.data.sources.subset import Subset
from coma.errors import BadImage, BadInput
from coma.messages import abridged, counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSplits:
    """Training and test images of the same classes, and validation images where there are any beside them."""

    train: Source
    val: Source | None
    test: Source


def open_labelled_splits(
    data: Path | None, train: Path | None = None, test: Path | None = None, val: Path | None = None
) -> LabelledSplits:
    """The splits in one folder, or each from its own place.

    Classes of which no image can be read are left out, and said so.

    Args:
        data: holds train and test (or val).
        train: training images in another place.
        test: test images in another place.
        val: validation images in another place.

    Raises:
        BadInput: a place is missing, or holds nothing that can be read, or a split or labels are missing.
    """
    if data and not (train or test):
        sources = [open_source(data, "train"), open_source(data, "test")]
        if val is None and sources[1].split == "test":
            found = open_source(data, "val")
            sources += [found] if found.split == "val" else []
    elif train and test and not data:
        sources = [open_source(train), open_source(test, held_out=True)]
    else:
        raise BadInput("give --data, or both --train and --test")
    if val is not None:
        sources.append(open_source(val, held_out=True))
    if sources[1].split == "val":
        _say(f"{sources[1].location}: stands in for test images, which there are none of")
    readable = [_with_readable_classes(source) for source in sources]
    return LabelledSplits(readable[0], readable[2] if len(readable) > 2 else None, readable[1])


def log_missing_classes(splits: LabelledSplits) -> None:
    """Say which classes of the training images the validation and test images lack.

    Raises:
        BadInput: as `align_labels`.
    """
    for source in (splits.val, splits.test):
        if source is None:
            continue
        _, labels, classes = align_labels(splits.train, source)
        absent = sorted(set(range(len(classes))) - set(labels.tolist()))
        if absent:
            few = ", ".join(classes[i] for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
            _say(f"{source.location}: has no image of {len(absent)} of {len(classes)} classes: {few}")


def _say(line: str) -> None:
    log.info(line, extra={"once": True})


def _with_readable_classes(source: Source) -> Source:
    """The images without those of classes of which none can be read."""
    labels = source.labels
    if labels is None:
        return source
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels[order[0]] - 1))
    unreadable, reasons = [], []
    for members in np.split(order, starts[1:]):
        reason = _first_fault(source, members)
        if reason:
            label = int(labels[members[0]])
            unreadable.append(label)
            name = str(label) if source.class_names is None else source.class_names[label]
            reasons.append(f"{name} ({len(members)}; {reason})")
    if not unreadable:
        return source
    if len(unreadable) == len(starts):
        raise BadInput(f"{source.location}: no image could be read; class {reasons[0]}")
    kept = Subset(source, np.flatnonzero(~np.isin(labels, unreadable)))
    without = counted(len(unreadable), "class", "classes")
    _say(f"{source.location}: {without} left out, as no image there can be read: {abridged(reasons, 3)}")
    return kept


def _first_fault(source: Source, members: np.ndarray) -> str:
    """Why none of these images can be read; empty if one can."""
    first = ""
    for i in members.tolist():
        try:
            source.decode(i, min_side=1)
        except BadImage as error:
            first = first or str(error)
        else:
            return ""
    return first
