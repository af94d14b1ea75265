"""Objects as label files hold them, and the COCO content that is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coma.splits import Split
from downstream.datasets.files import DatasetFiles, Splits, choose_split
from downstream.datasets.image_headers import Header, read_header
from downstream.datasets.masks import encode_runs
from downstream.datasets.validation_report import Progress, ValidationReport, map_in_threads

LABELLED_IN = "labelled_in"
"""Key of an annotation that was converted: its place in the label files."""


@dataclass
class Drawn:
    """One object of a picture.

    Attributes:
        label: Name of its class.
        where: Its place in the label file, for messages: `a.txt:3`.
        box: x1, y1, x2, y2; None: the box around the polygons or the mask.
        polygons: x1, y1, x2, y2, ... of every part.
        mask: Left, top and bool `[h, w]`, in pixels.
        fractions: Whether coordinates are fractions of the picture's width and height, else pixels.
        crowd: Whether it is a group that is not learned.
        score: Score, where a model found it.
    """

    label: str
    where: str
    box: tuple[float, float, float, float] | None = None
    polygons: list[list[float]] = field(default_factory=list)
    mask: tuple[int, int, np.ndarray] | None = None
    fractions: bool = False
    crowd: bool = False
    score: float | None = None


@dataclass
class Labelled:
    """A picture and its objects; `size` is the width and height that the label file says, if it does."""

    image: str
    label: str
    objects: list[Drawn]
    size: tuple[int, int] | None = None


@dataclass
class Reading:
    """All labels of a dataset.

    Attributes:
        title: Name of the format.
        names: Names of the classes in their order; None: those that occur, sorted.
        pictures: Every picture with labels, of all splits.
        splits: Pictures by split; empty if the dataset has none.
        empty_are_labelled: Whether a picture without labels is one without objects; else it is left out.
    """

    title: str
    names: tuple[str, ...] | None
    pictures: list[Labelled]
    splits: Splits
    empty_are_labelled: bool = False


def to_coco(
    reading: Reading,
    files: DatasetFiles,
    split: Split,
    report: ValidationReport,
    warnings: list[str],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the COCO content of a split; file names are relative to the dataset's folder.

    Sizes come from the pictures themselves. Area and box are computed where a format has none. Faults are
    added to `report`, oddities to `warnings`.
    """
    by_image: dict[str, Labelled] = {}
    twice = []
    for each in reading.pictures:
        if by_image.setdefault(each.image, each) is not each:
            twice.append(f"{each.image} by {by_image[each.image].label} and {each.label}")
    report.add_all("picture with two label files", twice, str)
    names = reading.names or tuple(sorted({each.label for one in reading.pictures for each in one.objects}))
    every = files.images if reading.empty_are_labelled or not by_image else list(by_image)
    chosen = choose_split(reading.splits, every, split, files.root, warnings.append)
    bare = [name for name in chosen if name not in by_image]
    if bare:
        treated = "taken as pictures without objects" if reading.empty_are_labelled else "left out"
        warnings.append(f"pictures without labels, {treated}: {len(bare)} ({bare[0]})")
    if not reading.empty_are_labelled:
        chosen = [name for name in chosen if name in by_image]

    number = {name: i for i, name in enumerate(names, start=1)}
    headers = map_in_threads(lambda name: read_header(files.root / name), chosen, progress)
    images, annotations = [], []
    for name, header in zip(chosen, headers, strict=True):
        if isinstance(header, str):
            report.add("picture cannot be read", f"{name}: {header}")
            continue
        labelled = by_image.get(name, Labelled(name, "", []))
        _compare_sizes(labelled, header, report)
        image_id, (width, height) = len(images) + 1, header.shown
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for drawn in labelled.objects:
            if drawn.label not in number:
                report.add(
                    "unknown class", f"{drawn.where}: {drawn.label!r}; known are {', '.join(names[:8])}"
                )
                continue
            record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": number[drawn.label]}
            record |= _shape(drawn, width, height)
            annotations.append(record | {"iscrowd": int(drawn.crowd), LABELLED_IN: drawn.where})
    categories = [{"id": i, "name": name} for name, i in number.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _compare_sizes(labelled: Labelled, header: Header, report: ValidationReport) -> None:
    if labelled.size and labelled.size != header.shown:
        there = "{} x {}".format(*header.shown)
        said = "{} x {}".format(*labelled.size)
        report.add(
            "picture has another size than its label file says", f"{labelled.image}: {there}, not {said}"
        )


def _shape(drawn: Drawn, width: int, height: int) -> dict[str, Any]:
    """Returns bbox, area and segmentation of an object in pixels."""
    across, down = (width, height) if drawn.fractions else (1, 1)
    polygons = [
        [value * (down if i % 2 else across) for i, value in enumerate(part)] for part in drawn.polygons
    ]
    segmentation: Any = [[round(value, 3) for value in part] for part in polygons]
    area = sum(map(polygon_area, polygons))
    whole = np.zeros((height, width), bool) if drawn.mask else None
    if drawn.mask and whole is not None:
        left, top, part = drawn.mask
        part = part[max(-top, 0) : height - top, max(-left, 0) : width - left]
        left, top = max(left, 0), max(top, 0)
        whole[top : top + part.shape[0], left : left + part.shape[1]] = part
        segmentation, area = encode_runs(whole), int(part.sum())
    if drawn.box:
        x1, y1, x2, y2 = (value * scale for value, scale in zip(drawn.box, (across, down) * 2, strict=True))
    elif whole is not None:
        x1, y1, x2, y2 = mask_box(whole)
    else:
        xs, ys = [x for part in polygons for x in part[::2]], [y for part in polygons for y in part[1::2]]
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    box = [_rounded(value) for value in (x1, y1, x2 - x1, y2 - y1)]
    found = {"bbox": box, "area": _rounded(area or box[2] * box[3]), "segmentation": segmentation}
    return found if drawn.score is None else found | {"score": drawn.score}


def polygon_area(points: Sequence[float]) -> float:
    """Returns the area of a polygon x1, y1, x2, y2, ... (the shoelace formula)."""
    x, y = np.asarray(points[::2], np.float64), np.asarray(points[1::2], np.float64)
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns x1, y1, x2, y2 around a mask, bool `[h, w]`; zeros for an empty one."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return 0, 0, 0, 0
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _rounded(value: float) -> float:
    return round(value, 3) if math.isfinite(value) else value


def numbers(texts: Sequence[Any]) -> list[float]:
    """Returns finite numbers.

    Raises:
        ValueError: something that is no number, or is not finite.
    """
    found = [float(text) for text in texts]
    for value in found:
        if not math.isfinite(value) or abs(value) > 1e9:
            raise ValueError(f"{value} is no coordinate")
    return found
