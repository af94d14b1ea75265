"""Colour masks, masks per class and polygons become the label maps that they stand for."""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import label_files
import numpy as np
import pytest
from dataset_files import refusal
from downstream_data import coco, labelled
from PIL import Image

from downstream.datasets import LabelSplit, label_conversion, masks, open_labels

NAMES = ["ground", "square", "disc"]
PALETTE = [[0, 0, 0], [200, 0, 0], [0, 9, 255]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled"), train=4, val=2)


def maps(source: Path) -> dict[str, dict[str, np.ndarray]]:
    return {
        split: {path.stem: np.asarray(Image.open(path)) for path in (source / "ann_dir" / split).iterdir()}
        for split in ("train", "val")
    }


def rebuilt(split: LabelSplit) -> dict[str, np.ndarray]:
    """The label maps of a split as mmseg finds them: by its list of stems, and both suffixes."""
    assert split.listing is not None
    stems = split.listing.read_text().splitlines()
    assert all((split.images / f"{stem}{split.image_suffix}").is_file() for stem in stems)
    return {Path(s).name: np.asarray(Image.open(split.labels / f"{s}{split.label_suffix}")) for s in stems}


def equal(split: LabelSplit, wanted: dict[str, np.ndarray]) -> None:
    found = rebuilt(split)
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)


def coloured(source: Path, out: Path) -> Path:
    """`train/a.png` and `train_labels/a.png` in colours, and class_dict.csv, as CamVid on Kaggle."""
    for split, found in maps(source).items():
        shutil.copytree(source / "img_dir" / split, out / split)
        for stem, values in found.items():
            write(out / f"{split}_labels" / f"{stem}.png", np.array(PALETTE, np.uint8)[values])
    lines = [",".join(map(str, [name, *colour])) for name, colour in zip(NAMES, PALETTE, strict=True)]
    (out / "class_dict.csv").write_text("name,r,g,b\n" + "\n".join(lines) + "\n")
    return out


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def by_class_folder(out: Path, split: str, stem: str, name: str) -> Path:
    return out / "masks" / split / name / f"{stem}.png"


def by_picture_folder(out: Path, split: str, stem: str, name: str) -> Path:
    return out / "masks" / split / stem / f"{name}.png"


def by_suffix(out: Path, split: str, stem: str, name: str) -> Path:
    return out / "masks" / split / f"{stem}_{name}.png"


def per_class(source: Path, out: Path, place: Callable[[Path, str, str, str], Path]) -> Path:
    for split, found in maps(source).items():
        shutil.copytree(source / "img_dir" / split, out / "images" / split)
        for stem, values in found.items():
            for number in (1, 2):
                path = place(out, split, stem, NAMES[number])
                write(path, ((values == number) * 255).astype(np.uint8))
    return out


def test_colours_are_classes_by_a_palette(source, tmp_path, caplog):
    data = coloured(source, tmp_path / "data")
    with caplog.at_level("INFO"):
        for name, wanted in maps(source).items():
            split = open_labels(data, name, converted=tmp_path / "run")
            equal(split, wanted)
            assert split.labels == tmp_path / "run" / name
            assert (split.class_names, split.palette[2]) == (tuple(NAMES), (0, 9, 255))
    assert f"{data}: labels as colour masks, train split: 4 images, 3 classes" in caplog.messages
    (data / "class_dict.csv").unlink()
    (data / "labelmap.txt").write_text("# label:color_rgb:parts:actions\na:0,0,0::\nb:200,0,0::x\n")
    pixels = sum(int((values == 2).sum()) for values in maps(source)["train"].values())
    assert f"colour that is no class (1): {pixels} pixels" in refusal(lambda: open_labels(data, "train"))


def test_colours_are_learned_and_shown(source, tmp_path):
    data = coloured(source, tmp_path / "data")
    (data / "class_dict.csv").unlink()
    splits = {name: open_labels(data, name) for name in ("train", "val")}
    assert splits["train"].class_names == ("#000000", "#0009ff", "#c80000") == splits["val"].class_names
    assert "colours taken as classes: #000000 " in splits["train"].warnings[0]
    swapped = {name: np.array([0, 2, 1])[values] for name, values in maps(source)["train"].items()}
    equal(splits["train"], swapped)
    (data / "classes.txt").write_text("\n".join(NAMES))
    assert "the masks have 3 colours (#000000" in refusal(lambda: open_labels(data, "train"))
    (data / "classes.txt").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data / "train_labels" / "0.png")
    assert "more than 64 colours" in refusal(lambda: open_labels(data, "train"))


def test_masks_are_decoded_to_learn_their_colours_and_for_their_split(source, tmp_path, monkeypatch):
    data = coloured(source, tmp_path / "data")
    (data / "class_dict.csv").unlink()
    decoded, decode = Counter(), label_conversion._pixels
    monkeypatch.setattr(label_conversion, "_pixels", lambda *of: decoded.update(of[1:]) or decode(*of))
    for name in ("train", "val"):
        assert len(open_labels(data, name).class_names) == 3
    assert set(decoded.values()) == {2}
    Image.new("RGB", (96, 64), (1, 2, 3)).save(data / "train_labels" / "0.png")
    assert len(open_labels(data, "train").class_names) == 4


def test_colours_in_the_usual_folders_are_read_too(source, tmp_path):
    data = shutil.copytree(source, tmp_path / "data")
    for path in (data / "ann_dir").rglob("*.png"):
        write(path, np.array(PALETTE, np.uint8)[np.asarray(Image.open(path))])
    (data / "classes.json").write_text(json.dumps({"classes": NAMES, "palette": PALETTE}))
    equal(open_labels(data, "train"), maps(source)["train"])


@pytest.mark.parametrize("place", [by_class_folder, by_picture_folder, by_suffix])
def test_one_mask_per_class(source, tmp_path, place):
    data = per_class(source, tmp_path / "data", place)
    wanted = {stem: np.array([0, 2, 1])[values] for stem, values in maps(source)["train"].items()}
    split = open_labels(data, "train")
    assert split.class_names == ("background", "disc", "square")
    equal(split, wanted)
    (data / "classes.txt").write_text("square\ndisc\n")
    split = open_labels(data, "train")
    equal(split, {stem: np.array([255, 0, 1])[values] for stem, values in maps(source)["train"].items()})
    both = place(data, "train", "0", "square")
    Image.fromarray(np.asarray(Image.open(both)) | 255).save(both)
    taken = int((maps(source)["train"]["0"] == 2).sum())
    said = f"pixels in the masks of two classes, which the last one gets: {taken}"
    assert said in open_labels(data, "train").warnings
    (data / "classes.txt").write_text("square\nround\n")
    assert "mask of an unknown class (6)" in refusal(lambda: open_labels(data, "train"))


def test_pascal_voc_and_roboflow_masks_with_numbers(source, tmp_path):
    voc, roboflow = tmp_path / "voc", tmp_path / "roboflow"
    for split, found in maps(source).items():
        for stem, values in found.items():
            image = source / "img_dir" / split / f"{stem}.png"
            for path in (voc / "JPEGImages" / f"{split}_{stem}.png", roboflow / split / f"{stem}.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, path)
            write(voc / "SegmentationClass" / f"{split}_{stem}.png", values)
            write(voc / "SegmentationObject" / f"{split}_{stem}.png", values * 7)
            write(roboflow / split / f"{stem}_mask.png", values)
        lists = voc / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(f"{split}_{stem}\n" for stem in found))
    for data in (voc, roboflow):
        assert "no list of classes" in refusal(lambda data=data: open_labels(data, "train"))
        (data / "classes.txt").write_text("\n".join(NAMES))
        found = rebuilt(open_labels(data, "train"))
        wanted = maps(source)["train"]
        assert {name.removeprefix("train_"): values.tolist() for name, values in found.items()} == {
            name: values.tolist() for name, values in wanted.items()
        }
        assert open_labels(data, "val").pairs == 2


@pytest.mark.parametrize("write_labels", [label_files.labelme, label_files.yolo, None])
def test_polygons_of_every_format_are_filled(tmp_path, write_labels):
    objects = coco(tmp_path / "coco", train=3, val=1)
    data = objects
    if write_labels:
        how = {"polygons": True}
        data = write_labels(objects, tmp_path / "data", **how)
    split = open_labels(data, "train", converted=tmp_path / "run")
    assert split.class_names[0] == "background" and set(split.class_names[1:]) == {"square", "disc"}
    found = rebuilt(split)
    for image in label_files.contents(objects)["train"]["images"]:
        values = found[Path(image["file_name"]).stem]
        outside = np.ones(values.shape, bool)
        for name, each in label_files.objects_of(label_files.contents(objects)["train"], image):
            x, y, w, h = each["bbox"]
            assert (values[y : y + h, x : x + w] == split.class_names.index(name)).all()
            outside[y : y + h + 1, x : x + w + 1] = False
        assert not values[outside].any()


def test_polygons_are_filled_in_several_threads_with_progress(tmp_path, monkeypatch):
    data = coco(tmp_path / "coco", train=3, val=1)
    told, threads = [], []

    def filled(*arguments: Any) -> np.ndarray:
        threads.append(threading.current_thread())
        return masks.filled(*arguments)

    monkeypatch.setattr(label_conversion, "filled", filled)
    found = label_conversion.convert(
        data, "train", None, tmp_path / "maps", lambda done, total: told.append((done, total))
    )
    assert told == [(3, 3)] and len(threads) == 6 and threading.main_thread() not in threads
    assert found.pairing.stems == ["1", "2", "3"]


def test_small_objects_lie_over_large_ones_and_crowds_are_ignored(tmp_path):
    data = coco(tmp_path / "coco", train=1, val=1)
    path = data / "annotations" / "train.json"
    content = json.loads(path.read_text())
    square, disc = content["annotations"]
    disc["segmentation"], disc["area"] = [[10, 10, 20, 10, 20, 20, 10, 20]], 100
    square["segmentation"], square["area"] = [[5, 5, 40, 5, 40, 40, 5, 40]], 1225
    counts = [0, 64, 96 * 64 - 64]  # the first column
    content["annotations"] = [disc, square, disc | {"id": 9, "iscrowd": 1, "area": 64,
                              "segmentation": {"size": [64, 96], "counts": counts}}]  # fmt: skip
    path.write_text(json.dumps(content))
    values = rebuilt(open_labels(data, "train"))["1"]
    assert (values[15, 15], values[30, 30], values[50, 60]) == (2, 1, 0)
    assert (values[:, 0] == 255).all() and not (values[:, 1] == 255).any()


def test_boxes_alone_and_foreign_folders_are_refused(tmp_path):
    boxes = coco(tmp_path / "coco", train=1, val=1, masks=False)
    assert "its 2 objects have boxes alone; segmentation needs masks" in refusal(
        lambda: open_labels(boxes, "train")
    )
    (tmp_path / "none").mkdir()
    said = refusal(lambda: open_labels(tmp_path / "none", "train"))
    assert "nor polygons as COCO, YOLO, Pascal VOC, LabelMe or Open Images" in said
    path = boxes / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "../../other.png"
    content["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    path.write_text(json.dumps(content))
    assert "leads out of" in refusal(lambda: open_labels(boxes, "train"))
