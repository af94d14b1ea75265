"""Finds the annotation file and the image folder of a COCO split."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from coma.errors import BadInput
from coma.splits import SPLITS, Split, parse_split, split_folders
from downstream.datasets.files import NoSplit

ROBOFLOW = "_annotations.coco.json"


UNSPLIT = (
    "instances_default.json",  # CVAT
    "result.json",  # Label Studio
    *("annotations.json", "instances.json", "coco.json", "labels.json", "_annotations.coco.json"),
)
"""Names of annotation files of all pictures, in `annotations/` or beside the pictures."""


def find_annotations(data: Path, split: Split) -> Path | None:
    """Returns the annotation file of a split; None if there is none.

    Raises:
        BadInput: more than one file, or no such folder.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: {'is a file, not' if data.is_file() else 'there is no'} folder of a dataset")
    words = "|".join(SPLITS[split])
    pattern = re.compile(rf"(instances_)?({words})(\d{{4}})?\.json", re.IGNORECASE)
    for folder in (data / "annotations", data):
        found = [path for path in _jsons(folder) if pattern.fullmatch(path.name)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise BadInput(f"{folder}: more than one file could be the {split} split ({names}); keep one")
        if found:
            return found[0]
    for folder in split_folders(data, split):
        if (folder / ROBOFLOW).is_file():
            return folder / ROBOFLOW
    return None


def find_unsplit(data: Path) -> Path | None:
    """Returns the annotation file of all pictures of a dataset without splits; None if there is none."""
    places = [folder / name for folder in (data / "annotations", data) for name in UNSPLIT]
    return next((path for path in places if path.is_file()), None)


class NoLabels(NoSplit):
    """A folder without labels of a known format."""


def nothing_found(data: Path, split: Split, others: str) -> NoLabels:
    """Returns the error that names the annotation files that were looked for, and other formats."""
    there = [
        str(path.relative_to(data)) for folder in (data / "annotations", data) for path in _jsons(folder)
    ]
    return NoLabels(
        f"{data}: no COCO annotations of the {split} split, nor labels as {others}. Looked for "
        f"annotations/{split}.json, annotations/instances_{split}2017.json, {split}.json and "
        f"{split}/{ROBOFLOW} (also by the names {', '.join(SPLITS[split][1:])}); found "
        f"{', '.join(there[:8]) or 'no json file'}"
    )


def _jsons(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def find_images(data: Path, annotations: Path, split: str, content: Any) -> Path:
    """Returns the candidate folder that holds most of the first file names.

    Raises:
        BadInput: no folder holds any.
    """
    own = re.sub("^instances_", "", annotations.stem, flags=re.IGNORECASE)
    both = data, data / "images"
    tried = [parent / own for parent in both]
    tried += [folder for parent in both for folder in split_folders(parent, parse_split(split))]
    tried += [parent / split for parent in both]  # for the message
    tried = list(dict.fromkeys([*tried, data / "images" / "default", data / "images", data]))
    folders = [folder for folder in tried if folder.is_dir()]
    listed = content.get("images") if isinstance(content, dict) else None
    sample = listed[:50] if isinstance(listed, list) else []
    names = [image.get("file_name") for image in sample if isinstance(image, dict)]

    def hits(folder: Path) -> int:
        return sum(isinstance(name, str) and os.path.isfile(folder / name) for name in names)

    best = max(folders, key=hits)  # the first of equals
    if best == data and not hits(data):
        looked = ", ".join(str(folder.relative_to(data)) for folder in tried[:-1])
        raise BadInput(f"{data}: no folder with the images of {annotations.name}; looked for {looked}")
    return best
