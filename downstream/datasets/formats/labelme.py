"""LabelMe's JSON files, one for every picture, also as X-AnyLabeling and AnyLabeling write them.

Polygons, rectangles, circles, rotated boxes and masks become objects; shapes of one `group_id` and label are
one object. Points and lines are left out and counted.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from coma.errors import BadInput
from downstream.datasets.drawn import Drawn, Labelled, Reading, numbers
from downstream.datasets.files import DatasetFiles, splits_by_folder
from downstream.datasets.formats.class_lists import NO_CLASS, class_list
from downstream.datasets.validation_report import ValidationReport

LISTS = ("classes.txt", "labels.txt", "classes.json")
_CORNERS = 48
"""Corners of the polygon of a circle."""


def read(files: DatasetFiles, report: ValidationReport, say: Any) -> Reading | None:
    """Returns the labels of a dataset in LabelMe's format; None if it is in another one."""
    pictures: list[Labelled] = []
    others: Counter[str] = Counter()
    broken = []
    for name in files.ending(".json"):
        try:
            content = parse_json(files, name)
        except BadInput as error:
            broken.append(str(error))
            continue
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            continue
        image = files.image_of(name, str(content.get("imagePath") or ""))
        try:
            objects = _objects(content["shapes"], name, others)
        except ValueError as error:
            report.add("label file is malformed", str(error))
            objects = []
        pictures.append(Labelled(image or "", name, objects, _size(content)))
    if not pictures:
        return None
    report.add_all("label file cannot be read", broken, str)
    if others:
        what = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        say(f"shapes that are no areas or are to be ignored, left out: {what}")
    splits = splits_by_folder([each.image for each in pictures])
    return Reading("LabelMe", class_list(files, *LISTS), pictures, splits)


def parse_json(files: DatasetFiles, name: str) -> Any:
    """Returns the content of a JSON file.

    Raises:
        BadInput: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name}: not a JSON file ({str(error)[:80]})") from None


def _size(content: dict[str, Any]) -> tuple[int, int] | None:
    width, height = content.get("imageWidth"), content.get("imageHeight")
    return (width, height) if type(width) is int and type(height) is int and min(width, height) > 0 else None


def _objects(shapes: list[Any], name: str, others: Counter[str]) -> list[Drawn]:
    """Reads the shapes of a file.

    Raises:
        ValueError: a shape without label or with malformed points.
    """
    found: dict[Any, Drawn] = {}
    for number, shape in enumerate(shapes, start=1):
        where = f"{name} shape {number}"
        if (
            not isinstance(shape, dict)
            or not isinstance(shape.get("label"), str)
            or not shape["label"].strip()
        ):
            raise ValueError(f"{where}: has no label")
        label, kind = shape["label"].strip(), str(shape.get("shape_type") or "polygon")
        if label in NO_CLASS:
            others[f"of class {label}"] += 1
            continue
        drawn = Drawn(label, where, score=shape.get("score") if type(shape.get("score")) is float else None)
        try:
            if not _add_shape(drawn, kind, shape):
                others[f"{kind[:20]}s"] += 1
                continue
        except Exception as error:  # ValueError, KeyError, OSError, DecompressionBombError, ...
            raise ValueError(f"{where}: its points are malformed ({str(error)[:60]})") from None
        group = shape.get("group_id")
        key = (label, group) if isinstance(group, int | str) and drawn.polygons else (number,)
        if key in found and found[key].polygons:
            found[key].polygons += drawn.polygons
            found[key].box = None  # the box around all parts
        else:
            found[key] = drawn
    return list(found.values())


def _add_shape(drawn: Drawn, kind: str, shape: dict[str, Any]) -> bool:
    """Adds a shape to an object; returns whether it is an area."""
    if kind not in ("polygon", "rectangle", "circle", "rotation", "mask", "oriented_rectangle"):
        return False
    points = [numbers(point) for point in shape["points"]]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if kind == "mask":
        drawn.mask = (round(min(xs)), round(min(ys)), _decoded(shape["mask"]))
    elif kind == "rectangle":
        drawn.box = (min(xs), min(ys), max(xs), max(ys))
    elif kind == "circle":
        (x, y), (x2, y2) = points
        radius = math.hypot(x2 - x, y2 - y)
        turns = [2 * math.pi * i / _CORNERS for i in range(_CORNERS)]
        drawn.polygons = [[v for t in turns for v in (x + radius * math.cos(t), y + radius * math.sin(t))]]
    else:
        if len(points) < 3:
            raise ValueError(f"{len(points)} points; a polygon needs 3")
        drawn.polygons = [[value for x, y in zip(xs, ys, strict=True) for value in (x, y)]]
    return True


def _decoded(text: Any) -> np.ndarray:
    """Returns the mask of a base64 PNG, bool `[h, w]`."""
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
        return np.asarray(image.convert("L")) > 0
