"""What a contact sheet of labels shows, and the numbers beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream_data import COLOURS, coco, labelled
from PIL import Image

from coma.data import ArraySource
from downstream.commands.classify import run as classify
from downstream.datasets import open_coco, open_labels
from downstream.label_check import (
    cover_classes,
    draw_class_sheet,
    draw_label_sheet,
    draw_object_sheet,
    object_rows,
    pixel_rows,
)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_rare_classes_are_shown_first_and_the_rest_evenly():
    classes = [{0}] * 40 + [{1}] + [{0}] * 20 + [{2, 0}] + [{0}] * 5
    chosen = cover_classes(classes, 6)
    assert {40, 61} <= set(chosen) and len(chosen) == 6 and chosen == sorted(chosen)
    assert max(np.diff(chosen)) <= 40
    assert cover_classes([{0}, set(), {1}], 12) == [0, 1, 2]
    assert cover_classes([set()] * 3, 2) in ([0, 1], [0, 2])


def test_boxes_and_masks_are_drawn_where_they_are(tmp_path):
    data = coco(tmp_path / "data", train=2, val=1, size=(320, 200))
    splits = {name: open_coco(data, name) for name in ("train", "val")}
    path = draw_object_sheet(tmp_path, data, splits)
    sheet = pixels(path)
    assert sheet.shape[1] == 2 * 24 + 3 * 328 - 8
    frames = ((128, 0, 0), (0, 128, 0))  # the first colours of the palette: square, disc
    for colour in frames:
        assert (abs(sheet - colour).sum(axis=2) < 6).sum() > 200
    left = sheet[:, : 24 + 320]  # the first column: the first image of train, below it that of val
    content = json.loads((data / "annotations" / "train.json").read_text())
    x, y, w, h = content["annotations"][0]["bbox"]
    top = int(np.flatnonzero((left[:, 24:] < 250).all(axis=(1, 2)))[0])
    inside = left[top + y + h - 5, 24 + x + w - 5]  # below the label
    assert abs(inside - (np.array(COLOURS["square"]) + frames[0]) / 2).max() < 40


def test_classes_are_counted(tmp_path):
    data = coco(tmp_path / "data", train=3, val=1)
    path = data / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    for each in content["annotations"][2::2]:
        each["category_id"] = 2
    path.write_text(json.dumps(content))
    square, disc = object_rows(open_coco(data, "train"))
    assert square == ("0", "0", "", "") and disc[:2] == ("3", "5")
    sizes = sorted(each["bbox"][2] for each in content["annotations"] if not each["iscrowd"])
    assert disc[2:] == (f"{sizes[0]} x {sizes[0]}", f"{sizes[-1]} x {sizes[-1]}")

    scenes = labelled(tmp_path / "scenes", train=3, val=1)
    split = open_labels(scenes, "train")
    values = [pixels(path) for path in (scenes / "ann_dir" / "train").iterdir()]
    counts = [int((each[..., 0] == 2).sum()) for each in values]
    assert pixel_rows(split)[2][2:] == (str(min(counts)), str(max(counts))) and pixel_rows(split)[2][0] == "3"
    sheet = draw_label_sheet(tmp_path, scenes, {"train": split})
    assert pixels(sheet).shape[1] == 2 * 24 + 4 * 328 - 8


def test_a_sheet_of_classes_takes_numbers_and_sets_of_classes(tmp_path):
    pictures = [np.full((30, 40, 3), 60 * number, np.uint8) for number in range(4)]
    numbers = torch.tensor([0, 1, 1, 2])
    sheets = []
    for labels in (numbers, torch.eye(3)[numbers], torch.eye(3)[numbers].bool()):
        source = ArraySource(pictures, numbers.numpy())
        sheets.append(
            pixels(draw_class_sheet(tmp_path, "data", ("a", "b", "c"), {"train": (source, labels)}))
        )
    assert all(np.array_equal(each, sheets[0]) for each in sheets)


@pytest.mark.parametrize("many", [False, True])
def test_classes_of_pictures_get_a_sheet_too(tmp_path, capsys, many):
    for split in ("train", "test"):
        for number in range(30 if many else 2):
            folder = tmp_path / "data" / split / f"class{number:02}"
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (8 * number, 90, 40 * i)).save(folder / f"{i}.png")
    classify(["check", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "sheet")])
    assert "contact sheet: " in capsys.readouterr().out
    assert len(pixels(tmp_path / "sheet" / "contact_sheet.png")) > (2000 if many else 300)
