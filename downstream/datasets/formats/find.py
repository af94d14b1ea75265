"""Finds the label format of a dataset by looking at its files."""

from __future__ import annotations

from typing import NamedTuple

from coma.errors import BadInput
from downstream.datasets.drawn import Reading
from downstream.datasets.files import DatasetFiles
from downstream.datasets.formats import boxes_csv, labelme, voc, yolo
from downstream.datasets.validation_report import ValidationReport

READERS = (yolo.read, voc.read, labelme.read, boxes_csv.read)
FORMATS = "YOLO, Pascal VOC, LabelMe or Open Images"


class Found(NamedTuple):
    """Labels, their faults, and sentences on what was left out."""

    reading: Reading
    report: ValidationReport
    said: list[str]


def find_reading(files: DatasetFiles) -> Found | None:
    """Returns the labels of a dataset in the format that its files have; None if it is none of these.

    Raises:
        BadInput: labels in more than one format, or a list of classes that cannot be used.
    """
    found = []
    for read in READERS:
        report, said = ValidationReport(str(files.root)), []
        reading = read(files, report, said.append)
        if reading is not None:
            found.append(Found(reading, report, said))
    if len(found) > 1:
        titles = " and ".join(each.reading.title for each in found)
        raise BadInput(f"{files.root}: has labels as {titles}; keep one of them in this folder")
    if not found:
        return None
    reading, report, _ = found[0]
    lost = [each.label for each in reading.pictures if not each.image]
    report.add_all("label file whose picture is missing, or has the name of another", lost, str)
    reading.pictures = [each for each in reading.pictures if each.image]
    return found[0]
