"""Loads a split of a detection dataset as COCO content, whatever its format."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any, NamedTuple

from coma.errors import BadInput
from coma.splits import Split
from downstream.datasets.coco_layouts import (
    ROBOFLOW,
    find_annotations,
    find_images,
    find_unsplit,
    nothing_found,
)
from downstream.datasets.drawn import polygon_area, to_coco
from downstream.datasets.files import LARGEST_TABLE, DatasetFiles, choose_split
from downstream.datasets.formats import find_reading
from downstream.datasets.formats.find import FORMATS
from downstream.datasets.masks import mask_area
from downstream.datasets.validation_report import Progress, ValidationReport


class Loaded(NamedTuple):
    """COCO content of a split, not checked yet."""

    title: str
    """Name of the format that was found."""
    source: Path
    """Annotation file, or folder of the dataset."""
    images: Path
    """Folder that `file_name` is relative to."""
    content: Any
    changed: bool
    """Whether the content differs from the annotation file, and has to be written before others read it."""
    report: ValidationReport
    warnings: list[str]


def load_split(data: Path, split: Split, progress: Progress | None = None) -> Loaded:
    """Finds a split below `data` in any format and returns it as COCO content.

    Raises:
        BadInput: no labels, labels in several formats, or files that cannot be read.
    """
    annotations = find_annotations(data, split)
    if annotations is not None:
        content = load_json(annotations)
        images = annotations.parent
        if annotations.name != ROBOFLOW:
            images = find_images(data, annotations, split, content)
        return completed("COCO", annotations, images, content)
    if (annotations := find_unsplit(data)) is not None:
        return _part_of_unsplit(data, annotations, split)
    files = DatasetFiles(data)
    found = find_reading(files)
    if found is None:
        raise nothing_found(data, split, FORMATS)
    reading, report, warnings = found
    content = to_coco(reading, files, split, report, warnings, progress)
    return Loaded(reading.title, data, data, content, True, report, warnings)


def load_json(path: Path) -> Any:
    """Returns the content of an annotation file.

    Raises:
        BadInput: it cannot be read, is too large, or is no JSON.
    """
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise BadInput(f"{path}: has more than {LARGEST_TABLE >> 30} GiB; split it")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a JSON file ({error})") from None


def completed(title: str, annotations: Path, images: Path, content: Any) -> Loaded:
    """Returns content whose objects without `area` or `iscrowd` have them.

    It counts as changed also if the file begins with a byte order mark, which mmdet does not read.
    """
    warnings = []
    listed = content.get("annotations") if isinstance(content, dict) else None
    counts = {"area": 0, "iscrowd": 0}
    for record in listed if isinstance(listed, list) else ():
        if not isinstance(record, dict):
            continue
        if record.get("iscrowd") is None:
            record["iscrowd"] = 0
            counts["iscrowd"] += 1
        if record.get("area") is None and (area := _area(record)) is not None:
            record["area"] = area
            counts["area"] += 1
    for key, count in counts.items():
        if count:
            how = "computed from mask or box" if key == "area" else "taken as 0"
            warnings.append(f"objects without {key}, which was {how}: {count}")
    with annotations.open("rb") as file:
        marked = file.read(len(BOM_UTF8)) == BOM_UTF8
    report = ValidationReport(str(annotations))
    return Loaded(title, annotations, images, content, bool(warnings) or marked, report, warnings)


def _area(record: dict[str, Any]) -> float | None:
    """Returns the area of the mask, or else of the box; None if it is malformed, which is reported later."""
    segmentation = record.get("segmentation")
    try:
        if isinstance(segmentation, dict):
            return mask_area(segmentation)
        if segmentation:
            return round(sum(map(polygon_area, segmentation)), 3)
        return record["bbox"][2] * record["bbox"][3]
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def _part_of_unsplit(data: Path, annotations: Path, split: Split) -> Loaded:
    content = load_json(annotations)
    loaded = completed("COCO", annotations, find_images(data, annotations, split, content), content)
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        chosen = set(choose_split({}, sorted(names.values()), split, data, loaded.warnings.append))
        kept = {number for number, name in names.items() if name in chosen}
        part = content | {
            "images": [image for image in content["images"] if image["id"] in kept],
            "annotations": [each for each in content["annotations"] if each["image_id"] in kept],
        }
    except (KeyError, TypeError):
        raise BadInput(f"{annotations}: not a COCO file: images need an id and a file_name") from None
    return loaded._replace(content=part, changed=True)
