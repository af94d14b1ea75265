"""A detection dataset of drawn shapes in every label format, written independently of the readers."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Content = dict[str, Any]


def contents(data: Path) -> dict[str, Content]:
    """The COCO content of both splits of `downstream_data.coco`, or of data laid out like it."""
    return {s: json.loads((data / "annotations" / f"{s}.json").read_text()) for s in ("train", "val")}


def objects_of(content: Content, image: Content) -> list[tuple[str, Content]]:
    names = {each["id"]: each["name"] for each in content["categories"]}
    return [(names[a["category_id"]], a) for a in content["annotations"] if a["image_id"] == image["id"]]


def write_all(
    data: Path, out: Path, one: Callable[[Path, str, Content, list[tuple[str, Content]]], None]
) -> Path:
    for split, content in contents(data).items():
        for image in content["images"]:
            one(out, split, image, objects_of(content, image))
    return out


def copied(data: Path, split: str, image: Content, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(data / split / image["file_name"], place / Path(image["file_name"]).name)


def yolo(data: Path, out: Path, polygons: bool = False) -> Path:
    names = [each["name"] for each in contents(data)["train"]["categories"]]

    def one(out: Path, split: str, image: Content, objects: list[tuple[str, Content]]) -> None:
        copied(data, split, image, out / "images" / split)
        lines = []
        for name, each in objects:
            x, y, w, h = each["bbox"]
            size = image["width"], image["height"]
            values = [(x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]]
            if polygons:
                values = [v / size[i % 2] for i, v in enumerate(each["segmentation"][0])]
            lines.append(" ".join([str(names.index(name)), *(f"{v:.8f}" for v in values)]))
        path = out / "labels" / split / f"{Path(image['file_name']).stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    write_all(data, out, one)
    (out / "data.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/val\nnc: {len(names)}\nnames: {json.dumps(names)}\n"
    )
    return out


def voc(data: Path, out: Path) -> Path:
    """As Pascal VOC has it: JPEGImages, Annotations, ImageSets/Main."""
    lists: dict[str, list[str]] = {"train": [], "val": []}

    def one(out: Path, split: str, image: Content, objects: list[tuple[str, Content]]) -> None:
        stem = f"{split}_{Path(image['file_name']).stem}"
        lists[split].append(stem)
        copied(data, split, image, out / "JPEGImages")
        old = out / "JPEGImages" / Path(image["file_name"]).name
        old.rename(old.with_stem(stem))
        parts = [
            f"<object><name>{escape(name)}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for name, each in objects
            for x, y, w, h in [each["bbox"]]
        ]
        path = out / "Annotations" / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"<annotation><filename>{stem}.png</filename><size><width>{image['width']}</width>"
            f"<height>{image['height']}</height><depth>3</depth></size>{''.join(parts)}</annotation>"
        )

    write_all(data, out, one)
    for split, stems in lists.items():
        path = out / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in stems))
    return out


def labelme(data: Path, out: Path, polygons: bool = True) -> Path:
    def one(out: Path, split: str, image: Content, objects: list[tuple[str, Content]]) -> None:
        copied(data, split, image, out / split)
        shapes: list[Content] = []
        for number, (name, each) in enumerate(objects):
            x, y, w, h = each["bbox"]
            if not polygons:
                shapes.append({"label": name, "points": [[x, y], [x + w, y + h]], "shape_type": "rectangle"})
                continue
            for part in each["segmentation"]:
                points = [list(pair) for pair in zip(part[::2], part[1::2], strict=True)]
                shapes.append({"label": name, "points": points, "shape_type": "polygon", "group_id": number})
        name = Path(image["file_name"]).name
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\{name}",
                   "imageHeight": image["height"], "imageWidth": image["width"]}  # fmt: skip
        (out / split / f"{Path(name).stem}.json").write_text(json.dumps(content))

    return write_all(data, out, one)


def open_images(data: Path, out: Path) -> Path:
    """As FiftyOne downloads it: train/data, train/labels/detections.csv, train/metadata/classes.csv."""
    for split, content in contents(data).items():
        rows, ids = [], {each["name"]: f"/m/{each['id']:03}" for each in content["categories"]}
        for image in content["images"]:
            copied(data, split, image, out / split / "data")
            for name, each in objects_of(content, image):
                (x, y, w, h), width, height = each["bbox"], image["width"], image["height"]
                corners = [x / width, (x + w) / width, y / height, (y + h) / height]
                rows.append([Path(image["file_name"]).stem, "xclick", ids[name], 1, *corners, 0, 0, 0, 0, 0])
        for folder in ("labels", "metadata"):
            (out / split / folder).mkdir()
        with (out / split / "labels" / "detections.csv").open("w", newline="") as file:
            columns = (
                "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf"
            )
            csv.writer(file).writerows([[*columns.split(","), "IsDepiction", "IsInside"], *rows])
        with (out / split / "metadata" / "classes.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[mid, name] for name, mid in ids.items()])
    return out


def plain(content: Content, digits: int = 1) -> list[Any]:
    """What every format of boxes holds: names of pictures, sizes, and classes with their boxes."""
    found = []
    for image in content["images"]:
        boxes = sorted(
            (name, [round(v, digits) for v in each["bbox"]], each["iscrowd"])
            for name, each in objects_of(content, image)
        )
        found.append((Path(image["file_name"]).stem.split("_")[-1], image["width"], image["height"], boxes))
    return sorted(found)
