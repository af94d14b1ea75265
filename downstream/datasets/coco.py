"""Finds detection datasets in the common layouts and checks every image and object.

    annotations/instances_train2017.json   train2017/ or images/train2017/    COCO's own
    annotations/train.json, train.json     train/, images/train/ or images/
    train/_annotations.coco.json           beside it                          Roboflow's
    annotations/instances_default.json     images/ or images/default/         CVAT's, without splits

Labels in another format (`downstream.datasets.formats`) are converted to COCO's, and checked as that.

Splits are named train, val (or valid, validation) and test. Errors are reported together, in one `BadInput`
that lists every kind; warnings go to `CocoSplit.warnings`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coma.atomic_io import write_json
from coma.errors import BadInput
from coma.messages import counted
from coma.splits import parse_split
from downstream.datasets.coco_checks import Record, check_ids, check_objects, check_references, records
from downstream.datasets.coco_loading import Loaded, completed, load_json, load_split
from downstream.datasets.files import temporary_folder
from downstream.datasets.image_headers import Header, read_header
from downstream.datasets.validation_report import Progress, ValidationReport, map_in_threads

log = logging.getLogger(__name__)
ONCE = {"once": True}


@dataclass(frozen=True)
class CocoSplit:
    """A checked split of a dataset."""

    annotations: Path
    images: Path
    """Folder that `file_name` is relative to."""
    count: int
    """Number of images."""
    class_names: tuple[str, ...]
    """Names in the order of the file's categories, which is mmdet's order of classes."""
    category_ids: tuple[int, ...]
    """Ids of the categories, in the same order."""
    has_masks: bool
    """Whether every object, crowds too, has polygons or run lengths."""
    objects: int
    """Number of objects that training uses: no crowds, no empty boxes."""
    crowds: int
    small_medium_large: tuple[int, int, int]
    """Number of these objects with an area up to 32 x 32, up to 96 x 96, and above."""
    image_sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """Smallest, median and largest width and height of the images, each side separately."""
    median_short_side: int
    """Median of the images' short sides."""
    warnings: tuple[str, ...]


def open_coco(
    data: Path,
    split: str,
    check_files: bool = True,
    progress: Progress | None = None,
    converted: Path | None = None,
) -> CocoSplit:
    """Finds a split below `data` and checks it.

    Args:
        data: Folder of the dataset, in COCO's format or another one.
        split: train, val or test.
        check_files: Read the header of every image; otherwise only the annotations are checked.
        progress: Called with the number of checked images and the total.
        converted: Folder for a COCO file of labels in another format; by default a temporary one.

    Raises:
        BadInput: a missing split, or one with errors.
    """
    name = parse_split(split)
    return _checked(load_split(data, name, progress), name != "test", check_files, progress, name, converted)


def read_coco(
    annotations: Path,
    images: Path,
    needs_objects: bool = True,
    check_files: bool = True,
    progress: Progress | None = None,
) -> CocoSplit:
    """Checks an annotation file and a folder of images; see `open_coco`.

    Args:
        annotations: JSON file.
        images: Folder that its file names are relative to.
        needs_objects: Refuse a split without objects.
        check_files: Read the header of every image.
        progress: Called with the number of checked images and the total.

    Raises:
        BadInput: a split with errors.
    """
    if not images.is_dir():
        raise BadInput(f"{images}: there is no such folder of images")
    loaded = completed("COCO", annotations, images, load_json(annotations))
    return _checked(loaded, needs_objects, check_files, progress, annotations.stem, None)


def check_same_classes(train: CocoSplit, val: CocoSplit) -> None:
    """Checks that two splits list the same categories in the same order, which numbers the classes.

    Raises:
        BadInput: naming the categories that differ, or the first position where the order differs.
    """
    ours, theirs = (list(zip(s.category_ids, s.class_names, strict=True)) for s in (train, val))
    if ours == theirs:
        return
    told = []
    for one, other, name in ((ours, theirs, "the former"), (theirs, ours, "the latter")):
        alone = [f"{i} {label!r}" for i, label in one if (i, label) not in other]
        if alone:
            told.append(f"only {name} has {', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}")
    if not told:
        place = next(n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        told.append(f"the order differs, first at place {place + 1} ({ours[place][1]}, {theirs[place][1]})")
    raise BadInput(f"{train.annotations} and {val.annotations} have different categories: {'; '.join(told)}")


def _checked(
    loaded: Loaded,
    needs_objects: bool,
    check_files: bool,
    progress: Progress | None,
    name: str,
    converted: Path | None,
) -> CocoSplit:
    annotations, images, report = loaded.source, loaded.images, loaded.report
    warnings = list(loaded.warnings)
    listed = records(loaded.content, report)
    check_ids(listed, report)
    objects = check_objects(listed, report, warnings)
    check_references(listed, warnings)
    check_images(listed.images, images, check_files, report, warnings, progress)
    if not report and not listed.images:
        report.add("there is no image")
    if not report and not listed.categories:
        report.add("there is no category")
    if not report and needs_objects and not objects.learned:
        report.add(f"there is no object to learn from among {len(listed.objects)}", _why_none(warnings))
    report.raise_if_any()
    if annotations.is_file():
        _say_left_out(annotations, images, {os.path.normpath(image["file_name"]) for image in listed.images})
    found = f"{counted(len(listed.images), 'image')}, {counted(len(listed.objects), 'object')}"
    classes = counted(len(listed.categories), "class", "classes")
    log.info(
        "%s: labels as %s, %s split: %s, %s", annotations, loaded.title, name, found, classes, extra=ONCE
    )
    if objects.crowds:
        warnings.append(f"crowds, neither learned nor counted as misses: {objects.crowds}")
    if 0 < objects.masks < len(listed.objects):
        warnings.append(
            f"objects without mask: {len(listed.objects) - objects.masks} of {len(listed.objects)}"
        )
    sizes = np.array([[image["width"], image["height"]] for image in listed.images])
    smallest, median, largest = (
        tuple(f(sizes, axis=0).astype(int).tolist()) for f in (np.min, np.median, np.max)
    )
    if loaded.changed:
        annotations = (converted or temporary_folder()) / f"{name}.json"
        write_json(annotations, loaded.content, indent=None)
    return CocoSplit(
        annotations=annotations,
        images=images,
        count=len(listed.images),
        class_names=tuple(category["name"] for category in listed.categories),
        category_ids=tuple(category["id"] for category in listed.categories),
        has_masks=objects.masks == len(listed.objects) > 0,
        objects=objects.learned,
        crowds=objects.crowds,
        small_medium_large=objects.small_medium_large,
        image_sizes=(smallest, median, largest),
        median_short_side=int(np.median(sizes.min(axis=1))),
        warnings=tuple(warnings),
    )


def _say_left_out(annotations: Path, images: Path, listed: set[str]) -> None:
    """Logs the number of images by kind, and the files that are left out."""
    from coma.data.inventory import kind_of
    from coma.data.sources.image_folder import find_images  # imports torch: only where it is needed

    found, inventory = find_images(images)
    for name in found:
        if name not in listed:
            what = f"that {annotations.name} does not list"
            inventory.skip(f"image {what}", f"images {what}", name)
    inventory.images = Counter(map(kind_of, listed))
    log.info(inventory.summary(images), extra=ONCE)


def _why_none(warnings: list[str]) -> str:
    return "; ".join(remark for remark in warnings if remark.startswith(("boxes", "objects")))


def check_images(
    images: list[Record],
    folder: Path,
    check_files: bool,
    report: ValidationReport,
    warnings: list[str],
    progress: Progress | None,
) -> None:
    """Checks the sizes and paths of images; `check_files` compares the sizes with the headers of the files.

    Faults are added to `report`, oddities to `warnings`.
    """
    sizeless = [image for image in images if min(image["width"], image["height"]) < 1]
    report.add_all("image size is not positive", sizeless, lambda image: f"{_name(image)}: {_size(image)}")
    astray = [image for image in images if _escapes(image["file_name"])]
    report.add_all(f"file_name leads out of {folder}", astray, _name)
    if not check_files:
        return
    inside = [image for image in images if not _escapes(image["file_name"])]
    turned = 0
    headers = map_in_threads(
        lambda image: read_header(os.path.join(folder, image["file_name"])), inside, progress
    )
    for image, header in zip(inside, headers, strict=True):
        if isinstance(header, str):
            missing = header == "missing"
            kind = f"image missing in {folder}" if missing else f"image in {folder} cannot be read"
            report.add(kind, _name(image) if missing else f"{_name(image)}: {header}")
            continue
        turned += header.orientation > 1
        if (image["width"], image["height"]) != header.shown:
            report.add(f"image in {folder} has another size than the json says", _misfit(image, header))
    if turned:
        warnings.append(
            f"images turned by their EXIF data, whose boxes must fit the upright picture: {turned}"
        )


def _misfit(image: Record, header: Header) -> str:
    width, height = header.shown
    text = f"{_name(image)}: {width} x {height}, json {_size(image)}"
    if (image["width"], image["height"]) == (header.width, header.height):
        return f"{text} as before its rotation (EXIF orientation {header.orientation}): save it upright"
    return text


def _escapes(name: str) -> bool:
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep, 1)[0] == ".."


def _name(image: Record) -> str:
    return f"{image['file_name']} (image {image['id']})"


def _size(image: Record) -> str:
    return f"{image['width']} x {image['height']}"
