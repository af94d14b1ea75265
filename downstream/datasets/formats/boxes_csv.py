"""Boxes in CSV files: Open Images', whose corners are fractions, and Roboflow's, whose corners are pixels.

    ImageID, LabelName, XMin, XMax, YMin, YMax, ...    class-descriptions-boxable.csv or classes.csv has names
    filename, width, height, class, xmin, ymin, xmax, ymax

Rows of pictures that are not in the folder are left out and counted: parts of Open Images come with all rows.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from coma.errors import BadInput
from downstream.datasets.drawn import Drawn, Labelled, Reading, numbers
from downstream.datasets.files import LARGEST_TABLE, DatasetFiles, splits_by_folder
from downstream.datasets.validation_report import ValidationReport

_FRACTIONS = ("imageid", "labelname", "xmin", "xmax", "ymin", "ymax")
_PIXELS = ("filename", "class", "xmin", "xmax", "ymin", "ymax")


def read(files: DatasetFiles, report: ValidationReport, say: Any) -> Reading | None:
    """Returns the labels of a dataset in CSV files of boxes; None if it has none."""
    tables = {name: found for name in files.ending(".csv") if (found := _kind(files, name))}
    if not tables:
        return None
    names = _class_names(files, tables)
    pictures: dict[str, Labelled] = {}
    lost: Counter[str] = Counter()
    for table, columns in tables.items():
        near: dict[str, str | None] = {}
        for number, row in _rows(files, table):
            key = row.get(columns[0]) or ""
            if key not in near:
                near[key] = files.image_of(f"{PurePosixPath(table).parent}/{key}", key)
            image = near[key]
            if image is None:
                lost[key] += 1
                continue
            try:
                drawn = _object(row, columns, f"{table}:{number}", names)
            except ValueError as error:
                report.add("row is malformed", f"{table}:{number}: {error}")
                continue
            pictures.setdefault(image, Labelled(image, table, [])).objects.append(drawn)
    if lost and not pictures and not report:
        raise BadInput(
            f"{files.root / next(iter(tables))}: none of its {len(lost)} pictures is in {files.root}"
        )
    if lost:
        say(f"rows of {len(lost)} pictures that are not in the folder, left out: {lost.total()}")
    fractions = any(columns is _FRACTIONS for columns in tables.values())
    listed = list(pictures.values())
    return Reading(
        "Open Images" if fractions else "CSV of boxes", None, listed, splits_by_folder(list(pictures))
    )


def _rows(files: DatasetFiles, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line number and the values by column, in lower case.

    Raises:
        BadInput: not a CSV file.
    """
    path = files.root / name
    try:
        if path.stat().st_size > LARGEST_TABLE:
            raise BadInput(f"{path}: has more than {LARGEST_TABLE >> 30} GiB; split it")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            columns = [column.strip().lower() for column in next(reader, [])]
            for row in reader:
                yield reader.line_num, dict(zip(columns, row, strict=False))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not a CSV file ({str(error)[:80]})") from None


def _kind(files: DatasetFiles, name: str) -> tuple[str, ...] | None:
    try:
        _, first = next(_rows(files, name), (0, {}))
    except BadInput:
        return None
    return next((columns for columns in (_FRACTIONS, _PIXELS) if set(columns) <= set(first)), None)


def _class_names(files: DatasetFiles, tables: dict[str, Any]) -> dict[str, str]:
    """Returns the names of classes by their identifiers, from class-descriptions*.csv or classes.csv."""
    found = {}
    for name in files.ending(".csv"):
        last = name.rpartition("/")[2].lower()
        if name in tables or not (last.startswith("class-descriptions") or last == "classes.csv"):
            continue
        for line in csv.reader(files.text(name).splitlines()):
            if len(line) >= 2:
                found[line[0].strip()] = line[1].strip()
    return found


def _object(row: dict[str, str], columns: tuple[str, ...], where: str, names: dict[str, str]) -> Drawn:
    """Reads a row.

    Raises:
        ValueError: a value that is missing or no number.
    """
    label = (row.get(columns[1]) or "").strip()
    if not label:
        raise ValueError(f"has no {columns[1]}")
    x1, x2, y1, y2 = numbers([row.get(key) or "nothing" for key in columns[2:]])
    fractions = columns is _FRACTIONS
    if fractions and max(x1, x2, y1, y2) > 1.5:
        raise ValueError(f"{max(x1, x2, y1, y2):g} is no fraction of the picture")
    confidence = numbers([row["confidence"]])[0] if row.get("confidence") else None
    crowd = row.get("isgroupof", "").strip() == "1"
    score = None if confidence in (None, 1) else confidence
    return Drawn(
        names.get(label, label), where, (x1, y1, x2, y2), fractions=fractions, crowd=crowd, score=score
    )
