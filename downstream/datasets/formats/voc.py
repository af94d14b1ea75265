"""Pascal VOC: an XML file for every picture, as LabelImg, CVAT and Roboflow write it too.

    Annotations/a.xml  JPEGImages/a.jpg  ImageSets/Main/train.txt     Pascal VOC
    train/a.xml        train/a.jpg                                    Roboflow

Corners are taken as they are; in files of the VOC benchmarks themselves, whose pixels count from 1, the left
and top edges are shifted by one. Entities and document types are refused by defusedxml.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from coma.errors import BadInput
from downstream.datasets.drawn import Drawn, Labelled, Reading, numbers
from downstream.datasets.files import DatasetFiles, splits_by_folder, splits_by_lists
from downstream.datasets.formats.class_lists import class_list
from downstream.datasets.validation_report import ValidationReport

LISTS = ("classes.txt", "labels.txt", "labelmap.txt", "classes.json")


def read(files: DatasetFiles, report: ValidationReport, say: Any) -> Reading | None:
    """Returns the labels of a dataset in Pascal VOC's format; None if it is in another one."""
    labels = files.ending(".xml")
    if not labels:
        return None
    from coma.library_errors import load_packages  # imports torch: only where it is needed

    load_packages("defusedxml")
    pictures, foreign = [], 0
    for name in labels:
        try:
            root = _parsed(files, name)
        except BadInput as error:
            report.add("label file cannot be read", str(error))
            continue
        if root.tag != "annotation":
            foreign += 1
            continue
        said = (root.findtext("filename") or "").strip(), (root.findtext("path") or "").strip()
        image = files.image_of(name, *(each for each in said if each))
        try:
            pictures.append(Labelled(image or "", name, _objects(root, name), _size(root)))
        except ValueError as error:
            report.add("label file is malformed", str(error))
    if not pictures and not report:
        return None
    if foreign:
        say(f"XML files that hold no annotation, left out: {foreign}")
    lists = [name for name in files.ending(".txt") if "ImageSets/Main/" in f"/{name}"]
    splits = splits_by_lists(files, lists, say) or splits_by_folder([each.image for each in pictures])
    return Reading("Pascal VOC", class_list(files, *LISTS), pictures, splits)


def _parsed(files: DatasetFiles, name: str) -> Any:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        return fromstring(files.read(name), forbid_dtd=True)
    except ParseError as error:
        raise BadInput(f"{name}: not an XML file ({error})") from None
    except DefusedXmlException:
        raise BadInput(f"{name}: declares a document type or entities; remove the declaration") from None
    except (ValueError, LookupError, RecursionError) as error:
        raise BadInput(f"{name}: not an XML file ({error})") from None


def _size(root: Any) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{side}"))) for side in ("width", "height"))
    except (TypeError, ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _objects(root: Any, name: str) -> list[Drawn]:
    """Reads the objects of a file.

    Raises:
        ValueError: one without a name or a box.
    """
    first = 1 if (root.findtext("source/database") or "").startswith("The VOC") else 0
    found = []
    for number, each in enumerate(root.iter("object"), start=1):
        where = f"{PurePosixPath(name)} object {number}"
        label = (each.findtext("name") or "").strip()
        if not label:
            raise ValueError(f"{where}: has no name")
        drawn = Drawn(label, where)
        box = each.find("bndbox")
        try:
            if box is not None:
                x1, y1, x2, y2 = numbers([box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")])
                drawn.box = (x1 - first, y1 - first, x2, y2)
            if (polygon := each.find("polygon")) is not None:
                drawn.polygons = [_polygon(polygon)]
        except (TypeError, ValueError):
            raise ValueError(f"{where}: its bndbox or polygon has a value that is no number") from None
        if drawn.box is None and not drawn.polygons:
            raise ValueError(f"{where}: has neither a bndbox nor a polygon")
        found.append(drawn)
    return found


def _polygon(node: Any) -> list[float]:
    """Returns the points of `<x1>`, `<y1>`, `<x2>`, ... (Roboflow) or `<pt><x/><y/></pt>` (old LabelMe)."""
    if points := node.findall("pt"):
        return numbers([point.findtext(key) for point in points for key in ("x", "y")])
    count = len(node) // 2
    return numbers([node.findtext(f"{axis}{i}") for i in range(1, count + 1) for axis in "xy"])
