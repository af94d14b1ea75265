"""Finds the folders of a segmentation split and pairs images with labels.

mmsegmentation finds a label by replacing the image's suffix with the label's suffix, so two suffixes describe
a dataset. They are guessed where they are not given.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from coma.errors import BadInput
from coma.splits import SPLITS, Split, split_folders
from downstream.datasets.files import NoSplit

log = logging.getLogger(__name__)

_PAIRS = (("img_dir", "ann_dir"), ("images", "annotations"), ("images", "labels"), ("images", "masks"))
_CITYSCAPES = ("_leftImg8bit.png", "_gtFine_labelTrainIds.png")


class Layout(NamedTuple):
    """Folders of images and labels with the same tree."""

    images: Path
    labels: Path
    kind: str = ""
    """cityscapes or ade20k for their layouts, else empty."""
    image_suffix: str | None = None
    label_suffix: str | None = None


class Pairing(NamedTuple):
    """Images and labels, paired by their names."""

    image_suffix: str
    label_suffix: str
    stems: list[str]
    """Relative paths of the pairs without suffix, sorted."""
    alone: list[str]
    """Relative paths of images without a label."""
    unused: list[str]
    """Relative paths of labels without an image."""
    others: list[str]
    """Images with another suffix, which mmsegmentation would not find."""


def find_layout(data: Path, split: Split) -> Layout | None:
    """Returns the folders of a split; None if they are not there.

    Raises:
        BadInput: no folder of a dataset.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: {'is a file, not' if data.is_file() else 'there is no'} folder of a dataset")
    images, labels = data / "leftImg8bit" / split, data / "gtFine" / split
    if images.is_dir() and labels.is_dir():
        return Layout(images, labels, "cityscapes", *_CITYSCAPES)
    for first, second in _PAIRS:
        for images in split_folders(data / first, split):
            labels = data / second / images.name
            if labels.is_dir():
                words = ("training", "validation")
                ade = (first, second) == ("images", "annotations") and images.name in words
                return Layout(images, labels, "ade20k" if ade else "")
    return None


def nothing_found(data: Path, split: Split, others: str) -> NoSplit:
    """Returns the error that names the folders that were looked for, and other formats."""
    looked = ", ".join(f"{first}/{split} with {second}/{split}" for first, second in _PAIRS)
    there = sorted(str(path.relative_to(data)) for path in data.glob("*/*") if path.is_dir())
    return NoSplit(
        f"{data}: no images and labels of the {split} split, nor polygons as {others}. Looked for {looked} "
        f"(also by the names {', '.join(SPLITS[split][1:])}), leftImg8bit/{split} with gtFine/{split}; "
        f"found {', '.join(there[:8]) or 'no folders'}"
    )


def pair(layout: Layout, image_suffix: str | None, label_suffix: str | None) -> Pairing:
    """Pairs the files of both folders.

    Raises:
        BadInput: no image, or no label.
    """
    from coma.data.inventory import Inventory
    from coma.data.sources.image_folder import (  # imports torch: only where it is needed
        find_images,
        walk_files,
    )

    found, inventory = find_images(layout.images)
    images, labels = sorted(found), sorted(walk_files(layout.labels, lambda _: Inventory()))
    if not images:
        raise BadInput(
            f"{layout.images}: no image in this folder; it holds {inventory.skipped() or 'nothing'}"
        )
    log.info(inventory.summary(layout.images), extra={"once": True})
    image_suffix = image_suffix or layout.image_suffix or _most_common(images)
    ours = {name.removesuffix(image_suffix) for name in images if name.endswith(image_suffix)}
    if not ours:
        raise BadInput(f"{layout.images}: no image ends in {image_suffix}; there is {images[0]}")
    label_suffix = label_suffix or layout.label_suffix or _guess(sorted(ours), labels)
    if label_suffix is None:
        there = f"there is {labels[0]}" if labels else "it is empty"
        raise BadInput(f"{layout.labels}: no label for {images[0]} or another image; {there}. {_SUFFIXES}")
    theirs = {name.removesuffix(label_suffix) for name in labels if name.endswith(label_suffix)}
    if not theirs:
        hint = ""
        if layout.kind == "cityscapes":
            hint = "; createTrainIdLabelImgs of cityscapesscripts makes them from the polygons"
        raise BadInput(f"{layout.labels}: no label ends in {label_suffix}{hint}")
    return Pairing(
        image_suffix,
        label_suffix,
        sorted(ours & theirs),
        [stem + image_suffix for stem in sorted(ours - theirs)],
        [stem + label_suffix for stem in sorted(theirs - ours)],
        [name for name in images if not name.endswith(image_suffix)],
    )


_SUFFIXES = "Where names differ in more than the extension, classes.json says how: img_suffix, seg_map_suffix"


def _most_common(images: Sequence[str]) -> str:
    counts = Counter(os.path.splitext(name)[1] for name in images)
    return max(sorted(counts), key=counts.__getitem__)


def _guess(stems: Sequence[str], labels: Sequence[str]) -> str | None:
    """Returns the most common suffix of labels after an image's stem."""
    sample = stems[:: max(1, len(stems) // 20)]
    follows: Counter[str] = Counter()
    for stem in sample:
        follows.update(
            {name[len(stem) :] for name in labels if name.startswith(stem) and "." in name[len(stem) :]}
        )
    usable = {suffix: n for suffix, n in follows.items() if n and "/" not in suffix}
    return max(sorted(usable, key=len), key=usable.__getitem__) if usable else None
