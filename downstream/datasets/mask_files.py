"""Finds the masks of pictures by their folders and names."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from downstream.datasets.files import DatasetFiles, place_of

FORMATS = ("PNG", "TIFF", "BMP")
"""Formats of masks: lossless ones."""
_FOLDERS = re.compile(
    r"(.*[_-]?(annot|annots|annotations?|labels?|masks?)|ann_dir|segmentationclass(raw)?|gt|gtfine|segmentations?)",
    re.IGNORECASE,
)
_OTHERS = re.compile(r"segmentationobject|instances?|pictures", re.IGNORECASE)
_WHOLE = re.compile(
    r"(mask|masks|label|labels|l|gt|seg|segmentation|annotation|classes|.*labelids|.*trainids)", re.I
)
"""Ends of names of masks of all classes: `a_mask.png`."""


class ClassMask(NamedTuple):
    """A mask file of a picture; `label` is its class, empty for masks of all classes."""

    image: str
    path: str
    label: str = ""


def find_masks(files: DatasetFiles) -> tuple[list[ClassMask], DatasetFiles]:
    """Returns the masks of all pictures, and the files without masks; masks of no picture are left out."""
    inside = [
        name
        for name in files.images
        if any(_FOLDERS.fullmatch(part) for part in PurePosixPath(name).parts[:-1])
    ]
    if not inside:
        stems = {PurePosixPath(name).with_suffix("").as_posix() for name in files.images}
        inside = [
            name
            for name in files.images
            if (cut := PurePosixPath(name).with_suffix("").as_posix().rpartition("_"))[0] in stems
            and _WHOLE.fullmatch(cut[2])
        ]
    others = [
        name for name in files.images if any(_OTHERS.fullmatch(p) for p in PurePosixPath(name).parts[:-1])
    ]
    pictures = files.only({*files.images} - {*inside} - {*others})
    found = (_matched(pictures, name) for name in inside)
    return [mask for mask in found if mask is not None], pictures


def _matched(pictures: DatasetFiles, name: str) -> ClassMask | None:
    path = PurePosixPath(name)
    stem, tail = path.stem, ""
    while True:
        image = pictures.image_of(f"{path.parent}/{stem}")
        if image is not None and place_of(image) == place_of(name):
            return ClassMask(image, name, "" if _WHOLE.fullmatch(tail) or not tail else tail)
        stem, separator, last = stem.rpartition("_")
        if not separator:
            break
        tail = f"{last}_{tail}" if tail else last
    folder, label = path.parent, path.parent.name
    image = pictures.image_of(f"{folder.parent}/{path.name}")
    if image is not None and place_of(image) == place_of(f"{folder.parent}/x"):
        return ClassMask(image, name, label)
    image = pictures.image_of(f"{folder.parent}/{label}")
    return None if image is None else ClassMask(image, name, path.stem)
