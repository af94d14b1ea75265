"""What a labelled dataset holds: its classes in numbers, and a contact sheet with the labels drawn in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from coma.contact_sheet import Cell, Section, draw_sections, write_png
from coma.data.sources.base import Source
from coma.errors import BadImage
from coma.fonts import load_fonts
from coma.messages import abridged, counted
from downstream.datasets.coco import CocoSplit
from downstream.datasets.label_classes import Colour, default_palette
from downstream.datasets.labels import LabelSplit
from downstream.datasets.masks import filled
from downstream.draw import draw_boxes, draw_masks
from downstream.search.pictures import Album, picture_of

SHOWN = 12
"""Most images of a split on a contact sheet."""
SIDE = 320
"""Longer side of an image on it in pixels."""
_LISTED = 24
"""Most classes of the legend."""


class ClassRow(NamedTuple):
    """Numbers of a class in a split, as text."""

    images: str
    amount: str
    """Objects, or the share of the labelled pixels."""
    smallest: str
    largest: str


def object_rows(split: CocoSplit) -> list[ClassRow]:
    """Returns the numbers of every class of a detection split; crowds do not count."""
    content = json.loads(split.annotations.read_text(encoding="utf-8"))
    boxes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    images: dict[int, set[int]] = defaultdict(set)
    for each in content["annotations"]:
        if not each["iscrowd"]:
            boxes[each["category_id"]].append((each["bbox"][2], each["bbox"][3]))
            images[each["category_id"]].add(each["image_id"])
    rows = []
    for number in split.category_ids:
        sizes = sorted(boxes[number], key=lambda size: size[0] * size[1])
        ends = [f"{sizes[end][0]:.0f} x {sizes[end][1]:.0f}" for end in (0, -1)] if sizes else ["", ""]
        rows.append(ClassRow(f"{len(images[number]):,}", f"{len(sizes):,}", *ends))
    return rows


def pixel_rows(split: LabelSplit) -> list[ClassRow]:
    """Returns the numbers of every class of a segmentation split; sizes are pixels in one image."""
    listed = zip(split.images_with, split.shares, split.fewest, split.most, strict=True)
    return [
        ClassRow(f"{images:,}", f"{share:.2%}", *(f"{n:,}" if images else "" for n in ends))
        for images, share, *ends in listed
    ]


def draw_object_sheet(out: Path, data: Path, splits: dict[str, CocoSplit]) -> Path:
    """Draws images of every split with boxes and masks; returns the PNG in the folder `out`."""
    sections = [_object_section(name, split) for name, split in splits.items()]
    return _written(out, data, sections)


def draw_label_sheet(out: Path, data: Path, splits: dict[str, LabelSplit]) -> Path:
    """Draws images of every split tinted in the colours of their classes; returns the PNG in `out`."""
    sections = [_label_section(name, split) for name, split in splits.items()]
    return _written(out, data, sections)


def cover_classes(classes: Sequence[Collection[int]], most: int) -> list[int]:
    """Returns up to `most` images, in order, that show every class if possible: the rarest classes first.

    Args:
        classes: Classes of every image.
        most: Largest number of images.
    """
    images: dict[int, list[int]] = defaultdict(list)
    for number, inside in enumerate(classes):
        for each in inside:
            images[each].append(number)
    chosen: set[int] = set()
    for each in sorted(images, key=lambda one: (len(images[one]), one)):
        if len(chosen) < most and not chosen.intersection(images[each]):
            chosen.add(images[each][0])
    spread = np.linspace(0, len(classes) - 1, len(classes)).round().astype(int)
    for number in spread[:: max(len(classes) // most, 1)].tolist() + spread.tolist():
        if len(chosen) < min(most, len(classes)):
            chosen.add(number)
    return sorted(chosen)


def _written(out: Path, data: Path, sections: list[Section]) -> Path:
    path = out / "contact_sheet.png"
    title = f"{'/'.join(data.resolve().parts[-2:])}"
    write_png(path, draw_sections(sections, title, across=4, side=SIDE))
    return path


def _object_section(name: str, split: CocoSplit) -> Section:
    content = json.loads(split.annotations.read_text(encoding="utf-8"))
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for each in content["annotations"]:
        objects[each["image_id"]].append(each)
    number = {category: i for i, category in enumerate(split.category_ids)}
    images = content["images"]
    classes = [{number[each["category_id"]] for each in objects[image["id"]]} for image in images]
    album = Album(split.images, split.images)
    palette = default_palette(len(split.class_names))
    cells = []
    for i in cover_classes(classes, SHOWN):
        image = images[i]
        inside = [each for each in objects[image["id"]] if min(each["bbox"][2:]) > 0]
        cells.append(_object_cell(album, image, inside, number, split.class_names, palette))
    said = f"{counted(split.count, 'image')}, {counted(split.objects, 'object')}"
    return Section(f"{name}: {said}; {len(cells)} shown", cells)


def _object_cell(
    album: Album,
    image: dict[str, Any],
    objects: list[dict[str, Any]],
    number: dict[int, int],
    names: Sequence[str],
    palette: Sequence[Colour],
) -> Cell:
    picture = album.thumbnail(image["file_name"], SIDE)
    caption = f"{Path(image['file_name']).name}\n{counted(len(objects), 'object')}"
    if picture is None:
        return Cell(None, caption)
    scale = picture.width / image["width"]
    labels = [number[each["category_id"]] for each in objects]
    colours = [palette[label] for label in labels]
    pixels = np.asarray(picture)
    masks = [
        (_small_mask(each, image, picture.size), colour)
        for each, colour in zip(objects, colours, strict=True)
        if each.get("segmentation")
    ]
    pixels = draw_masks(pixels, masks)
    corners = [(x, y, x + w, y + h) for x, y, w, h in (each["bbox"] for each in objects)]
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4) * scale
    words = [
        names[label] + (" (crowd)" if each["iscrowd"] else "")
        for label, each in zip(labels, objects, strict=True)
    ]
    return Cell(Image.fromarray(draw_boxes(pixels, boxes, words, colours)), caption)


def _small_mask(record: dict[str, Any], image: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    mask = Image.fromarray(filled(record["segmentation"], image["height"], image["width"]))
    return np.asarray(mask.resize(size, Image.Resampling.NEAREST))


def _label_section(name: str, split: LabelSplit) -> Section:
    listed = [stem + split.image_suffix for stem in split.stems]
    first = 1 if split.reduce_zero_label else 0
    album = Album(split.images, split.images)
    cells = [Cell(_legend(split.class_names, split.palette), "classes")]
    for i in cover_classes(split.classes_by_image, SHOWN - 1):
        picture = album.thumbnail(listed[i], SIDE)
        inside = [split.class_names[number] for number in sorted(split.classes_by_image[i])]
        caption = f"{Path(listed[i]).name}\n{abridged(inside, 4)}"
        if picture is None:
            cells.append(Cell(None, caption))
            continue
        with Image.open(split.labels / f"{split.stems[i]}{split.label_suffix}") as label:
            values = np.asarray(label.resize(picture.size, Image.Resampling.NEAREST)).astype(np.int64) - first
        tint = np.zeros((*values.shape, 3), np.float64)
        known = (values >= 0) & (values < len(split.palette))
        tint[known] = np.array(split.palette, np.float64)[values[known]]
        mixed = np.where(known[..., None], 0.45 * np.asarray(picture) + 0.55 * tint, np.asarray(picture))
        cells.append(Cell(Image.fromarray(mixed.round().astype(np.uint8)), caption))
    said = f"{counted(split.pairs, 'image')}, {split.ignored:.1%} of the pixels ignored (not tinted)"
    return Section(f"{name}: {said}; {len(cells) - 1} shown", cells)


def _legend(names: Sequence[str], palette: Sequence[Colour]) -> Image.Image:
    """Returns a picture of the classes and their colours."""
    shown = list(zip(names, palette, strict=True))[:_LISTED]
    height = min(SIDE, 14 + 24 * (len(shown) + (len(names) > _LISTED)))
    step = (height - 14) / (len(shown) + (len(names) > _LISTED))
    picture = Image.new("RGB", (SIDE, height), (255, 255, 255))
    draw, (font,) = ImageDraw.Draw(picture), load_fonts(names[:_LISTED], min(14, int(step)))
    for row, (name, colour) in enumerate(shown):
        top = 7 + row * step
        draw.rectangle((8, top, 30, top + step - 3), fill=colour, outline=(60, 60, 60))
        draw.text((38, top), name, (24, 24, 32), font)
    if len(names) > _LISTED:
        draw.text((8, height - 7 - step), f"and {len(names) - _LISTED} more", (24, 24, 32), font)
    return picture


def draw_class_sheet(
    out: Path, data: object, names: Sequence[str], splits: dict[str, tuple[Source, Tensor]]
) -> Path:
    """Draws images of every class, evenly spaced; returns the PNG in the folder `out`.

    Args:
        out: Folder to write to.
        data: Name of the data set.
        names: Names of the classes.
        splits: Images of every split, and their labels: int64 `[n]`, or bool or 0 and 1 `[n, classes]`.
    """
    sections = []
    for number, name in enumerate(names[:_LISTED]):
        cells, said = [], []
        for split, (source, labels) in splits.items():
            inside = np.flatnonzero(labels == number if labels.ndim == 1 else labels[:, number])
            said.append(f"{split} {len(inside):,}")
            most = SHOWN // 2 // len(splits)
            chosen = inside[np.linspace(0, len(inside) - 1, min(most, len(inside))).round().astype(int)]
            cells += [_class_cell(source, int(i), split) for i in chosen]
        sections.append(Section(f"{name}: {', '.join(said)}", cells))
    left_out = len(names) - len(sections)
    notes = f"{counted(left_out, 'class', 'classes')} not shown" if left_out else ""
    path = out / "contact_sheet.png"
    write_png(path, draw_sections(sections, str(data), notes, across=SHOWN // 2))
    return path


def _class_cell(source: Source, index: int, split: str) -> Cell:
    caption = f"{Path(source.describe(index)).name}\n{split}"
    try:
        return Cell(picture_of(source.read(index, min_side=SIDE // 2), SIDE // 2), caption)
    except BadImage:
        return Cell(None, f"{caption}: cannot be read")
