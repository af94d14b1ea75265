"""Every label format gives the same COCO content, is found by looking, and says what is odd about it."""

import base64
import io
import json
import shutil
from pathlib import Path

import label_files
import numpy as np
import pytest
from dataset_files import refusal
from downstream_data import coco
from label_files import contents, plain
from PIL import Image

from downstream.datasets import check_same_classes, open_coco


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco(tmp_path_factory.mktemp("coco"), train=5, val=2)


FORMATS = [
    ("YOLO (data.yaml)", label_files.yolo, {}),
    ("YOLO (data.yaml)", label_files.yolo, {"polygons": True}),
    ("Pascal VOC", label_files.voc, {}),
    ("LabelMe", label_files.labelme, {}),
    ("LabelMe", label_files.labelme, {"polygons": False}),
    ("Open Images", label_files.open_images, {}),
]


@pytest.mark.parametrize(("title", "write", "how"), FORMATS)
def test_formats_give_the_same_content(source, tmp_path, caplog, title, write, how):
    data = write(source, tmp_path / "data", **how)
    with caplog.at_level("INFO"):
        splits = {name: open_coco(data, name, converted=tmp_path / "run") for name in ("train", "val")}
    check_same_classes(*splits.values())
    for name, split in splits.items():
        wanted, found = contents(source)[name], json.loads(split.annotations.read_text())
        assert split.annotations == tmp_path / "run" / f"{name}.json"
        assert plain(found) == plain(wanted)
        assert all((split.images / image["file_name"]).is_file() for image in found["images"])
        assert (split.count, split.objects) == (len(wanted["images"]), len(wanted["annotations"]))
        if how.get("polygons") or (write is label_files.labelme and not how):
            rounded = [[round(v, 1) for v in each["segmentation"][0]] for each in found["annotations"]]
            assert rounded == [each["segmentation"][0] for each in wanted["annotations"]]
            assert split.has_masks
        areas = [round(each["area"]) for each in found["annotations"]]
        assert sorted(areas) == sorted(each["area"] for each in wanted["annotations"])
    assert f"{data}: labels as {title}, train split: 5 images, 10 objects, 2 classes" in caplog.messages


def test_a_dataset_without_splits_is_split_by_name_and_said(source, tmp_path):
    """CVAT's and Label Studio's COCO files, and a flat folder of LabelMe files, have no splits."""
    content = contents(source)["train"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_default.json").write_text(json.dumps(content))
    shutil.copytree(source / "train", tmp_path / "images" / "default")
    flat = label_files.labelme(source, tmp_path / "two") / "train"
    for data in (tmp_path, flat):
        splits = [open_coco(data, name) for name in ("train", "val")]
        names = [
            {Path(i["file_name"]).name for i in json.loads(s.annotations.read_text())["images"]}
            for s in splits
        ]
        assert [len(each) for each in names] == [4, 1] and len(names[0] | names[1]) == 5
        assert "1 of 5 pictures, chosen by their names, are val" in splits[0].warnings[0]
        assert "no test split" in refusal(lambda data=data: open_coco(data, "test"))


def test_area_and_iscrowd_are_computed_where_they_are_missing(source, tmp_path):
    data = shutil.copytree(source, tmp_path / "data")
    path = data / "annotations" / "train.json"
    content = json.loads(path.read_text())
    wanted = [each.pop("area") for each in content["annotations"]]
    for each in content["annotations"]:
        each.pop("iscrowd")
    content["annotations"][0]["segmentation"] = []  # the box has the same area
    path.write_text(json.dumps(content))
    split = open_coco(data, "train", converted=tmp_path / "run")
    found = json.loads((tmp_path / "run" / "train.json").read_text())["annotations"]
    assert [each["area"] for each in found] == wanted and {each["iscrowd"] for each in found} == {0}
    assert split.annotations == tmp_path / "run" / "train.json"
    assert split.warnings[:2] == (
        "objects without area, which was computed from mask or box: 10",
        "objects without iscrowd, which was taken as 0: 10",
    )
    assert json.loads(path.read_text()) == content  # the user's file is never changed


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


YOLO = "labels/train/1.txt"
YOLO_FAULTS = [
    (YOLO, "0 0.1 0.1 nan 0.1\n", "1.txt:1: nan is no coordinate"),
    (YOLO, "7 0.1 0.1 0.1 0.1\n", "1.txt:1: class 7, but there are 2 (0 to 1)"),
    (YOLO, "0 0.1 0.1 0.1\n", "1.txt:1: 4 values; a box has 5, a polygon 7 or more"),
    (YOLO, "0 10 20 30 5\n", "1.txt:1: 30 is no fraction of the picture"),
    (YOLO, "cat 0.1 0.1 0.1 0.1\n", "1.txt:1: could not convert string to float: 'cat'"),
    (YOLO, "0 0.9 0.9 0.5 0.1\n", "box reaches out of its image (1): labels/train/1.txt:1"),
    (YOLO, "0 0.5 0.5 0.0 0.1\n", "bbox without width or height (1): labels/train/1.txt:1"),
    (YOLO, b"\xff\xfe0", "not a text file in UTF-8"),
    (
        "labels/train/99.txt",
        "0 0.1 0.1 0.1 0.1\n",
        "is missing, or has the name of another (1): labels/train/99.txt",
    ),
    ("images/train/1.png", "", "picture cannot be read (1): images/train/1.png: empty file"),
    ("data.yaml", "names: [a, b]\nnc: 3\n", "nc is 3, but there are 2 names"),
    ("data.yaml", "names: {0: a, 2: b}\n", "must be 0 to 1 without gaps"),
    ("data.yaml", "names: [a, b]\ntrain: ../../etc\nval: images/val\n", "../../etc has no pictures here"),
    ("data.yaml", "names: [a, b]\ntrain: images/../../..\n", "leads out of"),
    ("data.yaml", "names: [\n", "not a YAML file"),
    ("data.yaml", "names: &a [x]\nother: !!python/object/apply:os.system [ls]\n", "not a YAML file"),
    ("data.yaml", "names: 3\n", "names must be a list of class names"),
]


@pytest.mark.parametrize(("name", "content", "reason"), YOLO_FAULTS)
def test_faults_of_yolo_labels_are_named(source, tmp_path, name, content, reason):
    data = label_files.yolo(source, tmp_path / "data")
    (data / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in refusal(lambda: open_coco(data, "train"))


def test_yolo_paths_of_other_machines_and_lists_are_followed(source, tmp_path):
    data = label_files.yolo(source, tmp_path / "data")
    names = "names: {0: square, 1: disc}\n"
    for text in (
        "path: /content/datasets/data\ntrain: images/train\nval: images/val\n",
        "train: ../images/train\nval: ../images/val\n",  # Roboflow's
        "train: /home/me/data/images/train\nval: C:\\data\\images\\val\n",
        "train: train.txt\nval: [images/val]\n",
    ):
        (data / "data.yaml").write_text(names + text)
        (data / "train.txt").write_text("".join(f"./images/train/{n}.png\n" for n in range(1, 6)))
        assert [open_coco(data, name).count for name in ("train", "val")] == [5, 2]
    (data / "train.txt").write_text("images/train/1.png\n/etc/passwd\n")
    assert "lists 1 pictures that are missing: /etc/passwd" in refusal(lambda: open_coco(data, "train"))


def test_yolo_pictures_without_labels_scores_and_keypoints(source, tmp_path):
    data = label_files.yolo(source, tmp_path / "data")
    (data / YOLO).unlink()
    edit(data / "labels/train/2.txt", "\n", " 0.875\n")
    split = open_coco(data, "train")
    assert (
        "pictures without labels, taken as pictures without objects: 1 (images/train/1.png)" in split.warnings
    )
    found = json.loads(split.annotations.read_text())["annotations"]
    assert (split.count, split.objects, found[0]["score"]) == (5, 8, 0.875)
    edit(data / "data.yaml", "nc:", "kpt_shape: [2, 2]\nnc:")
    for path in (data / "labels").rglob("*.txt"):
        path.write_text(
            "".join(
                f"{' '.join(line.split()[:5])} 0.1 0.2 0.3 0.4\n" for line in path.read_text().splitlines()
            )
        )
    split = open_coco(data, "train")
    assert split.objects == 8 and not split.has_masks


def test_darknet_files_with_obj_names_are_read(source, tmp_path):
    """As CVAT writes YOLO 1.1: labels beside pictures, and train.txt with other paths than here."""
    data = label_files.yolo(source, tmp_path / "data")
    flat = tmp_path / "flat" / "obj_train_data"
    shutil.copytree(data / "images" / "train", flat)
    shutil.copytree(data / "labels" / "train", flat, dirs_exist_ok=True)
    (flat.parent / "obj.names").write_text("square\ndisc\n")
    (flat.parent / "train.txt").write_text("".join(f"data/obj_train_data/{n}.png\n" for n in range(1, 5)))
    (flat.parent / "valid.txt").write_text("data/obj_train_data/5.png\n")
    assert [open_coco(flat.parent, name).count for name in ("train", "val")] == [4, 1]
    (flat.parent / "obj.names").unlink()
    assert "neither a data.yaml with names nor a classes.txt" in refusal(
        lambda: open_coco(flat.parent, "train")
    )
    (flat.parent / "classes.txt").write_text("square\nsquare\n")
    assert "classes.txt: lists 'square' twice" in refusal(lambda: open_coco(flat.parent, "train"))


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>'
VOC_FAULTS = [
    (BOMB, "train_1.xml: declares a document type or entities; remove the declaration"),
    (OUTSIDE, "train_1.xml: declares a document type or entities"),
    ("<annotation>", "train_1.xml: not an XML file"),
    ("", "train_1.xml: not an XML file"),
    (("<xmin>", "<xmin>nan"), "object 1: its bndbox or polygon has a value that is no number"),
    (("<name>square</name>", ""), "object 1: has no name"),
    (("<xmax>", "<xmax>9"), "box reaches out of its image"),
    (("<width>96", "<width>97"), "JPEGImages/train_1.png: 96 x 64, not 97 x 64"),
]


@pytest.mark.parametrize(("change", "reason"), VOC_FAULTS)
def test_faults_of_pascal_voc_files_are_named(source, tmp_path, change, reason):
    data = label_files.voc(source, tmp_path / "data")
    path = data / "Annotations" / "train_1.xml"
    if isinstance(change, str):
        path.write_text(change)
    else:
        edit(path, *change)
    assert reason in refusal(lambda: open_coco(data, "train"))


def test_pascal_voc_classes_are_listed_and_its_own_files_count_from_one(source, tmp_path):
    data = label_files.voc(source, tmp_path / "data")
    (data / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nsquare:1,2,3::\n"
    )
    assert "unknown class (5): Annotations/train_1.xml object 2: 'disc'" in refusal(
        lambda: open_coco(data, "train")
    )
    (data / "labelmap.txt").unlink()
    before = json.loads(open_coco(data, "train").annotations.read_text())["annotations"][0]["bbox"]
    edit(
        data / "Annotations" / "train_1.xml",
        "<size>",
        "<source><database>The VOC2007 Database</database></source><size>",
    )
    after = json.loads(open_coco(data, "train").annotations.read_text())["annotations"][0]["bbox"]
    assert after == [before[0] - 1, before[1] - 1, before[2] + 1, before[3] + 1]
    (data / "ImageSets" / "Main" / "train.txt").write_text("train_1 1\ntrain_2 -1\nnowhere\n")
    split = open_coco(data, "train")
    assert (
        split.count == 2 and "names in ImageSets/Main/train.txt without a picture: 1 of 3" in split.warnings
    )
    assert "pictures in no split, left out: 3" in split.warnings


LABELME_FAULTS = [
    ({"points": [[1, 2], [3]]}, "train/1.json shape 1: its points are malformed"),
    ({"points": [[1, 2], [3, float("nan")], [4, 4]]}, "its points are malformed (nan is no coordinate)"),
    ({"points": [[1, 2], [3, 4]]}, "its points are malformed (2 points; a polygon needs 3)"),
    ({"label": ""}, "train/1.json shape 1: has no label"),
    ({"shape_type": "mask", "mask": "no png"}, "its points are malformed"),
]


@pytest.mark.parametrize(("change", "reason"), LABELME_FAULTS)
def test_faults_of_labelme_files_are_named(source, tmp_path, change, reason):
    data = label_files.labelme(source, tmp_path / "data")
    path = data / "train" / "1.json"
    content = json.loads(path.read_text())
    content["shapes"][0] |= change
    path.write_text(json.dumps(content))
    assert reason in refusal(lambda: open_coco(data, "train"))


def test_labelme_shapes_become_objects(source, tmp_path):
    data = label_files.labelme(source, tmp_path / "data")
    path = data / "train" / "1.json"
    content = json.loads(path.read_text())
    png = io.BytesIO()
    Image.fromarray(np.full((6, 4), 255, np.uint8)).save(png, format="PNG")
    content["shapes"] = [
        {"label": "disc", "points": [[20, 30], [20, 40]], "shape_type": "circle"},
        {
            "label": "disc",
            "points": [[5, 7], [9, 13]],
            "shape_type": "mask",
            "mask": base64.b64encode(png.getvalue()).decode(),
        },
        {"label": "square", "points": [[1, 1], [3, 1], [3, 3]], "shape_type": "polygon", "group_id": 7},
        {"label": "square", "points": [[9, 9], [11, 9], [11, 13]], "shape_type": "polygon", "group_id": 7},
        {"label": "disc", "points": [[1, 1]], "shape_type": "point"},
        {"label": "__ignore__", "points": [[1, 1], [3, 1], [3, 3]]},
    ]
    path.write_text(json.dumps(content))
    split = open_coco(data, "train")
    circle, mask, square = json.loads(split.annotations.read_text())["annotations"][:3]
    assert circle["bbox"] == [10, 20, 20, 20] and abs(circle["area"] - np.pi * 100) < 2
    assert (mask["bbox"], mask["area"], mask["segmentation"]["size"]) == ([5, 7, 4, 6], 24, [64, 96])
    assert square["bbox"] == [1, 1, 10, 12] and len(square["segmentation"]) == 2
    assert (
        "shapes that are no areas or are to be ignored, left out: 1 of class __ignore__, 1 points"
        in split.warnings
    )
    assert split.has_masks


def test_rows_of_open_images(source, tmp_path):
    data = label_files.open_images(source, tmp_path / "data")
    table = data / "train" / "labels" / "detections.csv"
    rows = table.read_text()
    table.write_text(
        rows + "ffff,xclick,/m/001,1,0.1,0.2,0.1,0.2,0,0,0,0,0\n1,x,/m/009,0.5,0.1,0.2,0.1,0.2,0,0,1,0,0\n"
    )
    split = open_coco(data, "train")
    assert "rows of 1 pictures that are not in the folder, left out: 1" in split.warnings
    assert (split.objects, split.crowds) == (10, 1) and "/m/009" in split.class_names
    table.write_text(rows + "1,x,/m/001,1,0.1,much,0.1,0.2,0,0,0,0,0\n")
    assert "detections.csv:12: could not convert string to float: 'much'" in refusal(
        lambda: open_coco(data, "train")
    )
    for place in ("train", "val"):
        (data / place / "labels" / "detections.csv").unlink()
        (data / place / "_annotations.csv").write_text(
            "filename,width,height,class,xmin,ymin,xmax,ymax\n1.png,96,64,square,1,2,11,22\n"
        )
    found = json.loads(open_coco(data, "train").annotations.read_text())
    assert found["annotations"][0]["bbox"] == [1, 2, 10, 20]


def test_two_formats_and_two_pictures_of_a_name_are_refused(source, tmp_path):
    data = label_files.yolo(source, tmp_path / "data")
    shutil.copytree(
        label_files.labelme(source, tmp_path / "other") / "train",
        data / "images" / "train",
        dirs_exist_ok=True,
    )
    assert "has labels as YOLO (data.yaml) and LabelMe; keep one of them" in refusal(
        lambda: open_coco(data, "train")
    )
    data = label_files.labelme(source, tmp_path / "third")
    shutil.copy(data / "train" / "1.png", data / "train" / "1.jpg")
    assert open_coco(data, "train").count == 5  # imagePath says which
    edit(data / "train" / "1.json", "1.png", "")
    assert "is missing, or has the name of another (1): train/1.json" in refusal(
        lambda: open_coco(data, "train")
    )
    (data / "train" / "1.jpg").unlink()
    shutil.copy(data / "train" / "1.json", data / "train" / "1.png.json")
    assert "two label files (1): train/1.png by train/1.json and" in refusal(lambda: open_coco(data, "train"))


def test_huge_files_and_numbers_are_refused(source, tmp_path, monkeypatch):
    data = label_files.labelme(source, tmp_path / "data")
    content = contents(source)["train"]
    content["images"][0]["width"] = 10**400
    content["annotations"][0]["bbox"][0] = 10**400
    target = shutil.copytree(source, tmp_path / "coco")
    (target / "annotations" / "train.json").write_text(json.dumps(content))
    said = refusal(lambda: open_coco(target, "train"))
    assert "image width is not a whole number (1)" in said
    monkeypatch.setattr("downstream.datasets.coco_loading.LARGEST_TABLE", 10)
    assert "has more than 0 GiB; split it" in refusal(lambda: open_coco(target, "train"))
    (data / "train" / "1.json").write_text("[" * 100_000)
    assert "label file cannot be read (1): train/1.json: not a JSON file" in refusal(
        lambda: open_coco(data, "train")
    )
