"""Finds and checks segmentation datasets: images, and label files whose pixels are class numbers.

    img_dir/train/a.jpg                        ann_dir/train/a.png                       mmsegmentation's
    images/training/a.jpg                      annotations/training/a.png                ADE20K, 0: unlabelled
    images/train/a.jpg                         labels|masks|annotations/train/a.png
    leftImg8bit/train/x/a_leftImg8bit.png      gtFine/train/x/a_gtFine_labelTrainIds.png Cityscapes

Colour masks, masks per class and polygons are made into label maps first (`label_conversion`).

Every label is read once. Errors are reported together, in one `BadInput` that lists every kind; warnings go
to `LabelSplit.warnings`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from coma.errors import BadInput
from coma.messages import counted
from coma.splits import parse_split
from downstream.datasets.files import temporary_folder
from downstream.datasets.image_headers import read_header
from downstream.datasets.label_classes import (
    HOW_TO_SAY,
    Classes,
    ade20k_classes,
    cityscapes_classes,
    find_classes,
)
from downstream.datasets.label_conversion import are_maps, convert
from downstream.datasets.label_layouts import Layout, Pairing, find_layout, pair
from downstream.datasets.mask_files import FORMATS
from downstream.datasets.validation_report import Progress, ValidationReport, map_in_threads

log = logging.getLogger(__name__)

MUCH_IGNORED = 0.5
"""A larger share of ignored pixels gives a warning."""

_NUMBERS = ("1", "L", "P", "I", "I;16")
_COUNTED = 65536


@dataclass(frozen=True)
class LabelSplit:
    """A checked split of a dataset."""

    images: Path
    labels: Path
    pairs: int
    image_suffix: str
    label_suffix: str
    """Suffix of labels, which replaces the images' suffix."""
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    reduce_zero_label: bool
    """Whether the files count classes from 1, with 0 ignored."""
    shares: tuple[float, ...]
    """Share of the labelled pixels, by class."""
    ignored: float
    """Share of ignored pixels."""
    warnings: tuple[str, ...]
    stems: tuple[str, ...]
    """Relative paths of the pairs without suffix."""
    classes_by_image: tuple[frozenset[int], ...]
    """Classes that occur in every pair."""
    images_with: tuple[int, ...]
    """Number of images with each class."""
    fewest: tuple[int, ...]
    """Smallest number of pixels of each class in an image that has it; 0 if none has."""
    most: tuple[int, ...]
    """Largest number of pixels of each class in an image."""
    listing: Path | None = None
    """Text file of the images' paths without suffix, where `images` holds others too."""


def open_labels(
    data: Path,
    split: str,
    classes: Path | None = None,
    progress: Progress | None = None,
    converted: Path | None = None,
) -> LabelSplit:
    """Finds a split below `data` and checks it.

    Args:
        data: Folder of the dataset.
        split: train, val or test.
        classes: JSON or text file of class names; by default one of `CLASS_FILES` in `data`, or the standard
            classes of Cityscapes and ADE20K.
        progress: Called with the number of checked pairs and the total.
        converted: Folder for label maps of masks and polygons; by default a temporary one.

    Raises:
        BadInput: a missing split, or one with errors.
    """
    name = parse_split(split)
    layout, known = find_layout(data, name), find_classes(data, classes)
    warnings: list[str] = []
    listing, title, pairing = None, "label maps", None
    if layout is None or not are_maps(data, layout, known):
        title, layout, pairing, known, listing, warnings = convert(
            data, name, known, converted or temporary_folder(), progress
        )
    if known is None and not layout.kind:
        raise BadInput(f"{data}: no list of classes; {HOW_TO_SAY}")
    known = known or (cityscapes_classes() if layout.kind == "cityscapes" else ade20k_classes())
    reduce = layout.kind == "ade20k" if known.reduce_zero_label is None else known.reduce_zero_label
    if reduce and known.ignore_index != 255:
        raise BadInput(f"{data}: with reduce_zero_label ignore_index must be 255, not {known.ignore_index}")
    pairing = pairing or pair(layout, known.image_suffix, known.label_suffix)

    report = ValidationReport(f"{layout.images} and {layout.labels}")
    _check_names(pairing, report, warnings)
    by_image, ignored = _count(layout, pairing, known, reduce, report, warnings, progress)
    counts = by_image.sum(axis=0)
    labelled = int(counts.sum())
    if not report and not labelled:
        report.add("no pixel of a class", "every one is ignored")
    report.raise_if_any()
    found = f"{counted(len(pairing.stems), 'image')}, {counted(len(known.names), 'class', 'classes')}"
    log.info("%s: labels as %s, %s split: %s", data, title, name, found, extra={"once": True})
    share = ignored / (labelled + ignored)
    absent = [name for name, count in zip(known.names, counts, strict=True) if not count]
    if absent:
        few = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        warnings.append(f"classes that never occur: {len(absent)} of {len(known.names)} ({few})")
    if share > MUCH_IGNORED:
        warnings.append(f"ignored pixels: {share:.0%}")
    return LabelSplit(
        images=layout.images,
        labels=layout.labels,
        pairs=len(pairing.stems),
        image_suffix=pairing.image_suffix,
        label_suffix=pairing.label_suffix,
        class_names=known.names,
        palette=known.palette,
        ignore_index=known.ignore_index,
        reduce_zero_label=reduce,
        shares=tuple((counts / labelled).tolist()),
        ignored=share,
        warnings=tuple(warnings),
        stems=tuple(pairing.stems),
        classes_by_image=tuple(frozenset(np.flatnonzero(row).tolist()) for row in by_image),
        images_with=tuple((by_image > 0).sum(axis=0).tolist()),
        fewest=tuple(np.where(by_image > 0, by_image, 1 << 62).min(axis=0).tolist()),
        most=tuple(by_image.max(axis=0).tolist()),
        listing=listing,
    )


def read_label(path: Path | str) -> tuple[tuple[int, int], np.ndarray] | str:
    """Returns the size of a label and the count of each value, or a short description of the error."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in _NUMBERS:
                return f"mode {image.mode}: colours, not class numbers"
            if image.mode in ("L", "P"):
                return image.size, np.array(image.histogram(), np.int64)
            values = np.asarray(image)
    except UnidentifiedImageError:
        return "not a PNG, TIFF or BMP file" if Path(path).stat().st_size else "empty file"
    except Exception as error:  # OSError, SyntaxError, struct.error, DecompressionBombError, ...
        return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:100]
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.min() < 0 or values.max() >= _COUNTED:
        return f"holds values from {values.min()} to {values.max()}"
    return image.size, np.bincount(values.ravel())


def _check_names(pairing: Pairing, report: ValidationReport, warnings: list[str]) -> None:
    said = f"an image a{pairing.image_suffix} has its label in a{pairing.label_suffix}"
    report.add_all(f"image without label; {said}", pairing.alone, str)
    report.add_all(f"label without image; {said}", pairing.unused, str)
    report.add_all(f"image that does not end in {pairing.image_suffix}", pairing.others, str)


def _count(
    layout: Layout,
    pairing: Pairing,
    known: Classes,
    reduce: bool,
    report: ValidationReport,
    warnings: list[str],
    progress: Progress | None,
) -> tuple[np.ndarray, int]:
    """Checks every pair; returns the pixels of every image and class `[n, classes]`, and of ignored ones."""
    first = 1 if reduce else 0
    last = first + len(known.names) - 1
    ignored_values = {0, known.ignore_index} if reduce else {known.ignore_index}
    allowed = np.zeros(_COUNTED, bool)
    allowed[first : last + 1] = True
    allowed[list(ignored_values)] = True
    meaning = f"classes are {first} to {last}, ignored {' and '.join(map(str, sorted(ignored_values)))}"
    totals = np.zeros(_COUNTED, np.int64)
    by_image = np.zeros((len(pairing.stems), len(known.names)), np.int64)
    turned = 0

    def read(stem: str):
        label = read_label(layout.labels / (stem + pairing.label_suffix))
        return label, read_header(layout.images / (stem + pairing.image_suffix))

    pairs = zip(pairing.stems, map_in_threads(read, pairing.stems, progress), strict=True)
    for row, (stem, (label, header)) in enumerate(pairs):
        image_name, label_name = stem + pairing.image_suffix, stem + pairing.label_suffix
        if isinstance(header, str):
            report.add("image cannot be read", f"{image_name}: {header}")
        if isinstance(label, str):
            colours = "colours" in label
            kind = f"label in colours; {_RECODE}" if colours else "label cannot be read"
            report.add(kind, f"{label_name}: {label}")
            continue
        size, counts = label
        totals[: len(counts)] += counts
        own = counts[first : last + 1]
        by_image[row, : len(own)] = own
        wrong = np.flatnonzero((counts > 0) & ~allowed[: len(counts)]).tolist()
        if wrong:
            values = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
            report.add(f"label value out of range ({meaning})", f"{label_name}: {values}")
        if isinstance(header, str):
            continue
        turned += header.orientation > 1
        if size != header.shown:
            shown = "{} x {}".format(*header.shown)
            turn = f" as shown (EXIF orientation {header.orientation})" if header.orientation > 1 else ""
            report.add(
                "image and label differ in size",
                f"{image_name} is {shown}{turn}, its label {size[0]} x {size[1]}",
            )
    if turned:
        warnings.append(
            f"images turned by their EXIF data, whose labels must fit the upright picture: {turned}"
        )
    if len(known.names) == 2 and not reduce and set(np.flatnonzero(totals)) == {0, 255}:
        report.add("labels hold 0 and 255 alone", "is 255 the second class? It must be 1; 255 is ignored")
    return by_image, int(sum(totals[value] for value in ignored_values))


_RECODE = "every pixel must be one class number: recode the colours by the palette"
