"""Writes what models find as label files: COCO JSON, YOLO text, LabelMe JSON, or CSV.

    detections.json, images.json       COCO's result format (all objects), COCO file of the objects drawn
    yolo/labels/a.txt, classes.txt     class x y width height score, or class x1 y1 x2 y2 ... score
    labelme/a.json                     rectangles or polygons, to correct in LabelMe
    predictions.csv                    Open Images' columns; of segmentors, the pixels of every class

Images, objects and rows are appended to files as they come: they take no memory, and after kill -9 the folder
has all rows so far in predictions.csv, and the lists of the JSON files, an entry per line, in *.jsonl.part.

`--data` reads all of them beside the pictures; see `downstream.datasets`. Segmentors give one object per
class (COCO) or connected region (YOLO, LabelMe).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from coma.atomic_io import Descriptor, LineFile, write_json, write_text, write_whole
from coma.errors import BadInput
from downstream.datasets.coco_loading import load_json
from downstream.datasets.masks import decode_runs, mask_area
from downstream.features.files import storable

FORMATS = ("coco", "yolo", "labelme", "csv")
_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded")
_PIXELS = ("image", "class", "pixels", "share")


class PredictionFiles:
    """Collects the objects of pictures, and writes label files.

    Args:
        out: Folder of the predictions.
        formats: Some of `FORMATS`.
        names: Names of the classes.
        ids: COCO's number of every class.
        areas: Whether the model is a segmentor.
    """

    def __init__(
        self, out: Path, formats: Sequence[str], names: Sequence[str], ids: Sequence[int], areas: bool
    ) -> None:
        self._out, self._formats, self._names, self._ids = out, formats, tuple(names), tuple(ids)
        self._areas = areas
        self._count = 0
        self._lists: dict[str, LineFile] = {}
        if "coco" in formats or not areas:
            for name in ("images", "annotations", *([] if areas else ["detections"])):
                self._lists[name] = LineFile(self._part(name))
        if "csv" in formats:
            self._table = LineFile(out / "predictions.csv")
            self._table.add(_csv_lines([_PIXELS if areas else _COLUMNS]))

    def _part(self, name: str) -> Path:
        return self._out / f"{name}.jsonl.part"

    def add(
        self,
        name: str,
        stem: str,
        path: Path,
        number: int,
        size: tuple[int, int],
        results: list[dict[str, Any]],
        score: float,
    ) -> None:
        """Adds a picture.

        Args:
            name: Its relative path.
            stem: Relative path of its label files without suffix; see `output_stems`.
            path: Its file.
            number: Its id.
            size: Width and height in pixels.
            results: Its objects in COCO's result format; `regions` are polygons of a segmentor's class.
            score: Least score of objects in label files; detections.json holds all.
        """
        width, height = size
        kept = [each for each in results if each["score"] >= score]
        if self._lists:
            self._add_to_lists(
                {"id": number, "file_name": name, "width": width, "height": height}, results, score
            )
        if "yolo" in self._formats:
            write_text(self._out / "yolo" / "labels" / f"{stem}.txt", self._yolo(kept, width, height))
        if "labelme" in self._formats:
            target = self._out / "labelme" / f"{stem}.json"
            write_json(target, self._labelme(kept, target, path, width, height))
        if "csv" in self._formats:
            rows = self._csv(storable(name if self._areas else stem), kept, width, height)
            self._table.add(_csv_lines(rows))

    def _add_to_lists(self, image: dict[str, Any], results: list[dict[str, Any]], score: float) -> None:
        plain = [{key: value for key, value in each.items() if key != "regions"} for each in results]
        objects = []
        for each in plain:
            if each["score"] >= score:
                self._count += 1
                runs = each.get("segmentation")
                area = mask_area(runs) if runs else each["bbox"][2] * each["bbox"][3]
                objects.append(each | {"id": self._count, "area": area, "iscrowd": 0})
        for name, entries in (("images", [image]), ("annotations", objects), ("detections", plain)):
            if name in self._lists:
                self._lists[name].add("".join(json.dumps(each) + "\n" for each in entries).encode())

    def close(self) -> None:
        """Writes the files that hold all pictures."""
        for file in self._lists.values():
            file.close()
        if self._lists:
            categories = [{"id": i, "name": n} for i, n in zip(self._ids, self._names, strict=True)]
            write_whole(self._out / "images.json", lambda file: self._write_coco(file, categories))
        if "detections" in self._lists:
            write_whole(
                self._out / "detections.json", lambda file: self._write_list(file, "detections", "\n")
            )
        for name in self._lists:
            self._part(name).unlink()
        if "csv" in self._formats:
            self._table.close()
        if "yolo" in self._formats:
            write_text(self._out / "yolo" / "classes.txt", "".join(f"{name}\n" for name in self._names))

    def _write_coco(self, file: Descriptor, categories: list[dict[str, Any]]) -> None:
        file.write(b'{"images": ')
        self._write_list(file, "images", "")
        file.write(f', "categories": {json.dumps(categories)}, "annotations": '.encode())
        self._write_list(file, "annotations", "}\n")

    def _write_list(self, file: Descriptor, name: str, end: str) -> None:
        """Writes the entries of a list as JSON, and then `end`."""
        file.write(b"[")
        with self._part(name).open("rb") as lines:
            for number, line in enumerate(lines):
                file.write((b", " if number else b"") + line.rstrip())
        file.write(f"]{end}".encode())

    def _number(self, result: dict[str, Any]) -> int:
        return self._ids.index(result["category_id"])

    def _yolo(self, results: list[dict[str, Any]], width: int, height: int) -> str:
        lines = []
        for each in results:
            x, y, w, h = each["bbox"]
            shapes = [[(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]]
            if polygons := polygons_of(each, self._areas):
                shapes = [[v / (height if i % 2 else width) for i, v in enumerate(part)] for part in polygons]
            for shape in shapes:
                values = (f"{value:.6f}" for value in shape)
                score = [] if self._areas else [f"{each['score']:.5f}"]
                lines.append(" ".join([str(self._number(each)), *values, *score]) + "\n")
        return "".join(lines)

    def _labelme(
        self, results: list[dict[str, Any]], target: Path, path: Path, width: int, height: int
    ) -> dict[str, Any]:
        shapes = []
        for each in results:
            x, y, w, h = each["bbox"]
            drawn = [("rectangle", [[x, y], [x + w, y + h]])]
            if polygons := polygons_of(each, self._areas):
                drawn = [
                    ("polygon", [[*p] for p in zip(part[::2], part[1::2], strict=True)]) for part in polygons
                ]
            name = self._names[self._number(each)]
            shapes += [
                {"label": name, "points": points, "group_id": None, "shape_type": kind, "flags": {},
                 "score": float(each["score"])}
                for kind, points in drawn
            ]  # fmt: skip
        where = os.path.relpath(path.resolve(), target.resolve().parent)
        size = {"imageHeight": height, "imageWidth": width}
        return {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": where,
            "imageData": None,
            **size,
        }

    def _csv(self, name: str, results: list[dict[str, Any]], width: int, height: int) -> list[list[Any]]:
        rows: list[list[Any]] = []
        for each in results:
            label = self._names[self._number(each)]
            if self._areas:
                pixels = mask_area(each["segmentation"])
                rows.append([name, label, pixels, f"{pixels / (width * height):.6f}"])
                continue
            x, y, w, h = each["bbox"]
            corners = (f"{v:.6f}" for v in (x / width, (x + w) / width, y / height, (y + h) / height))
            rows.append([name, "coma", label, each["score"], *corners, 0])
        return rows


def _csv_lines(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def output_stems(names: Sequence[str]) -> dict[str, str]:
    """Returns the relative path of the results of every file: its own without suffix.

    Files that would share it, such as a.jpg and a.png, keep their suffixes.
    """
    stems = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    while len(counts := Counter(stems.values())) < len(stems):
        stems = {name: name if counts[stem] > 1 else stem for name, stem in stems.items()}
    return stems


def polygons_of(result: dict[str, Any], every: bool) -> list[list[float]]:
    """Returns the outlines of a result's mask as x1, y1, x2, y2, ...; empty without a mask.

    Args:
        result: A result in COCO's format.
        every: Return the outline of every region; otherwise that of the largest one. Outlines have no
            holes: what lies in a region is another, smaller region of a segmentor.
    """
    if not result.get("segmentation"):
        return []
    import cv2

    mask = np.ascontiguousarray(decode_runs(result["segmentation"]).astype(np.uint8))
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = tree[0, :, 3] if tree is not None else []
    contours = [contour for contour, parent in zip(contours, parents, strict=True) if parent < 0]
    ordered = sorted(contours, key=cv2.contourArea, reverse=True)
    chosen = ordered if every else ordered[:1]
    found: list[list[float]] = [contour.reshape(-1).tolist() for contour in chosen]
    return [
        points * (3 if len(points) == 2 else 1) + (points[:2] if len(points) == 4 else []) for points in found
    ]


def read_image_ids(annotations: Path) -> dict[str, int]:
    """Returns the image ids of a COCO file, by file name.

    Raises:
        BadInput: not a COCO file.
    """
    try:
        return {str(image["file_name"]): int(image["id"]) for image in load_json(annotations)["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{annotations}: not a COCO annotation file ({type(error).__name__}: {error})"
        ) from None
