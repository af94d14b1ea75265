"""Images and label maps: every layout is found, and every fault is named with its file."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import refusal, save, write
from PIL import Image

from downstream.datasets import open_labels
from downstream.datasets.label_classes import default_palette


def save_label(path: Path, values: Any, mode: str = "L", size: tuple[int, int] = (40, 30)) -> Path:
    """A label whose pixels take these values, row after row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = {"L": np.uint8, "P": np.uint8, "I;16": np.uint16}[mode]
    image = Image.fromarray(np.resize(np.asarray(values, dtype), (size[1], size[0])))
    if mode == "P":
        image.putpalette([7, 7, 200] * 256)  # colours that say nothing of the number
    image.save(path)
    return path


def classes(folder: Path, **more: Any) -> Path:
    return write(folder / "classes.json", {"classes": ["sky", "road", "car"], **more})


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """A folder with a train split of two pairs that has nothing wrong."""
    classes(tmp_path)
    for name in ("a", "b"):
        save(tmp_path / "img_dir" / "train" / f"{name}.jpg")
        save_label(tmp_path / "ann_dir" / "train" / f"{name}.png", [0, 0, 1, 2, 255])
    return tmp_path


def test_a_clean_segmentation_split_passes(street):
    split = open_labels(street, "train")
    assert (split.images, split.labels) == (street / "img_dir" / "train", street / "ann_dir" / "train")
    assert (split.pairs, split.image_suffix, split.label_suffix) == (2, ".jpg", ".png")
    assert split.class_names == ("sky", "road", "car") and split.palette == default_palette(3)
    assert (split.ignore_index, split.reduce_zero_label) == (255, False)
    assert split.shares == pytest.approx((0.5, 0.25, 0.25)) and split.ignored == pytest.approx(0.2)
    assert split.warnings == ()


@pytest.mark.parametrize(
    ("split", "images", "labels"),
    [
        ("train", "img_dir/train", "ann_dir/train"),
        ("val", "images/val", "labels/val"),
        ("val", "images/valid", "masks/valid"),
        ("test", "images/test", "annotations/test"),
        ("val", "images/Dev", "labels/Dev"),
        ("train", "img_dir/TRAIN", "ann_dir/TRAIN"),
    ],
)
def test_segmentation_layouts_are_found(tmp_path, split, images, labels):
    classes(tmp_path)
    save(tmp_path / images / "deep" / "er.png")
    save_label(tmp_path / labels / "deep" / "er.png", [0, 1, 2])
    found = open_labels(tmp_path, split)
    assert (found.images, found.labels, found.pairs) == (tmp_path / images, tmp_path / labels, 1)
    assert not found.reduce_zero_label


def test_ade20k_counts_from_one(tmp_path):
    save(tmp_path / "images" / "validation" / "a.jpg")
    save_label(tmp_path / "annotations" / "validation" / "a.png", [0, 1, 150, 150])
    split = open_labels(tmp_path, "val")
    assert split.reduce_zero_label and split.ignore_index == 255
    assert split.class_names[:2] == ("class 1", "class 2") and len(split.class_names) == 150
    assert (split.shares[0], split.shares[149], split.ignored) == pytest.approx((1 / 3, 2 / 3, 0.25))
    assert "classes that never occur: 148 of 150 (class 2, class 3, " in split.warnings[0]
    save_label(tmp_path / "annotations" / "validation" / "a.png", [0, 151])
    said = refusal(lambda: open_labels(tmp_path, "val"))
    assert "(classes are 1 to 150, ignored 0 and 255) (1): a.png: 151" in said
    classes(tmp_path, ignore_index=200)
    assert "must be 255, not 200" in refusal(lambda: open_labels(tmp_path, "val"))
    classes(tmp_path, reduce_zero_label=False)
    save_label(tmp_path / "annotations" / "validation" / "a.png", [0, 1, 2])
    assert open_labels(tmp_path, "val").ignored == 0


def test_cityscapes_is_known(tmp_path):
    save(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_0_leftImg8bit.png")
    labels = tmp_path / "gtFine" / "val" / "ulm"
    for kind in ("labelIds", "labelTrainIds"):
        save_label(labels / f"ulm_0_gtFine_{kind}.png", [0, 18, 255])
    split = open_labels(tmp_path, "val")
    assert (split.pairs, split.label_suffix) == (1, "_gtFine_labelTrainIds.png")
    assert (split.class_names[0], split.class_names[18], len(split.class_names)) == ("road", "bicycle", 19)
    assert split.palette[18] == (119, 11, 32)
    (labels / "ulm_0_gtFine_labelTrainIds.png").unlink()
    said = refusal(lambda: open_labels(tmp_path, "val"))
    assert "no label ends in _gtFine_labelTrainIds.png" in said and "createTrainIdLabelImgs" in said


def test_what_was_looked_for_in_segmentation_is_said(street):
    assert "no val split; there is train (2)" in refusal(lambda: open_labels(street, "val"))
    shutil.move(street / "ann_dir" / "train", street / "ann_dir" / "photos")
    said = refusal(lambda: open_labels(street, "train"))
    for name in ("img_dir/train with ann_dir/train", "images/train with masks/train", "ann_dir/photos"):
        assert name in said
    (street / "ann_dir" / "photos").rename(street / "ann_dir" / "train")
    (street / "classes.json").unlink()
    said = refusal(lambda: open_labels(street, "train"))
    assert "classes.json" in said and "classes.txt" in said


def test_classes_may_come_as_text_and_from_elsewhere(street):
    (street / "classes.json").unlink()
    write(street / "classes.txt", "sky\nroad\ncar\n\n")
    assert open_labels(street, "train").class_names == ("sky", "road", "car")
    (street / "classes.txt").rename(street / "names.txt")
    assert open_labels(street, "train", classes=street / "names.txt").class_names[2] == "car"
    assert "cannot be read" in refusal(lambda: open_labels(street, "train", classes=street / "no.txt"))
    write(street / "names.txt", "sky\n\nroad\n")
    said = refusal(lambda: open_labels(street, "train", classes=street / "names.txt"))
    assert "names.txt" in said and "class 1 is ''" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a JSON file"),
        ("[]", "no list 'classes'"),
        ({"classes": ["sky"]}, "1; there must be 2 to 254"),
        ({"classes": ["sky", 3]}, "class 1 is 3"),
        ({"classes": ["sky", "car", "sky"]}, "'sky' for 0 and 2"),
        ({"classes": ["sky", "car"], "palette": [[1, 2, 3]]}, "1 colours for 2 classes"),
        ({"classes": ["sky", "car"], "palette": [[1, 2, 3], [1, 2, 256]]}, "class 1: [1, 2, 256]"),
        ({"classes": ["sky", "car"], "palette": [[1, 2, 3], 7]}, "class 1: 7"),
        ({"classes": ["sky", "car"], "ignore_index": 256}, "not 0 to 255"),
        ({"classes": ["sky", "car"], "ignore_index": 1}, "also a class (1): 1 ('car')"),
        ({"classes": ["sky", "car"], "reduce_zero_label": 1}, "neither true nor false"),
        ({"classes": ["sky", "car"], "img_suffix": "jpg"}, "img_suffix is not the end of a file name"),
    ],
)
def test_lists_of_classes_that_cannot_be_used(street, content, reason):
    write(street / "classes.json", content)
    said = refusal(lambda: open_labels(street, "train"))
    assert said.startswith(str(street / "classes.json")) and reason in said


def test_names_must_pair_up(street):
    save(street / "img_dir" / "train" / "c.jpg")
    save(street / "img_dir" / "train" / "a.png")
    save_label(street / "ann_dir" / "train" / "d.png", [0])
    said = refusal(lambda: open_labels(street, "train"))
    assert re.search(r"image without label; .* \(1\): c.jpg", said)
    assert re.search(r"label without image; .* \(1\): d.png", said)
    assert "image that does not end in .jpg (1): a.png" in said


def test_links_in_a_circle_and_folders_of_systems_hold_no_images(street):
    for folder, suffix in (("img_dir", "jpg"), ("ann_dir", "png")):
        place = street / folder / "train"
        (place / "again").symlink_to(".")
        (place / "loop").symlink_to("loop")
        for name in ("@eaDir", ".cache", "__MACOSX"):
            save(place / name / f"a.{suffix}")
    split = open_labels(street, "train")
    assert split.pairs == 2 and not split.warnings


def test_suffixes_are_guessed_or_given(street):
    labels = street / "ann_dir" / "train"
    for name in ("a", "b"):
        (labels / f"{name}.png").rename(labels / f"{name}_mask.png")
    assert open_labels(street, "train").label_suffix == "_mask.png"
    for name in ("a", "b"):
        (street / "img_dir" / "train" / f"{name}.jpg").rename(street / "img_dir" / "train" / f"{name}_x.jpg")
    assert "img_suffix, seg_map_suffix" in refusal(lambda: open_labels(street, "train"))
    classes(street, img_suffix="_x.jpg", seg_map_suffix="_mask.png")
    split = open_labels(street, "train")
    assert (split.pairs, split.image_suffix, split.label_suffix) == (2, "_x.jpg", "_mask.png")
    classes(street, img_suffix="_y.jpg")
    assert "no image ends in _y.jpg; there is a_x.jpg" in refusal(lambda: open_labels(street, "train"))


def test_names_that_begin_alike_are_not_confused(tmp_path):
    classes(tmp_path)
    for stem in ("1", "1-2", "1-3", "10", "2"):
        save(tmp_path / "images" / "train" / f"{stem}.jpg")
        save_label(tmp_path / "labels" / "train" / f"{stem}.png", [0, 1, 2])
    split = open_labels(tmp_path, "train")
    assert (split.pairs, split.label_suffix) == (5, ".png")


def test_folders_without_files(street):
    for name in ("a", "b"):
        (street / "ann_dir" / "train" / f"{name}.png").unlink()
    assert "no label for a.jpg" in refusal(lambda: open_labels(street, "train"))
    for name in ("a", "b"):
        (street / "img_dir" / "train" / f"{name}.jpg").unlink()
    assert "no image in this folder" in refusal(lambda: open_labels(street, "train"))


def test_values_out_of_range_are_named(street):
    save_label(street / "ann_dir" / "train" / "b.png", [0, 3, 2, 77])
    said = refusal(lambda: open_labels(street, "train"))
    assert "label value out of range (classes are 0 to 2, ignored 255) (1): b.png: 3, 77" in said


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_palettes_and_sixteen_bits_are_class_numbers_too(street, mode):
    save_label(street / "ann_dir" / "train" / "b.png", [0, 0, 1, 2, 255], mode)
    assert open_labels(street, "train").shares == pytest.approx((0.5, 0.25, 0.25))
    save_label(street / "ann_dir" / "train" / "b.png", [0, 1, 4 if mode == "P" else 256], mode)
    assert f"b.png: {4 if mode == 'P' else 256}" in refusal(lambda: open_labels(street, "train"))


def test_labels_that_cannot_be_used(street):
    labels = street / "ann_dir" / "train"
    save(labels / "a.png")
    (labels / "b.png").write_bytes((labels / "b.png").read_bytes()[:60])
    said = refusal(lambda: open_labels(street, "train"))
    assert "the masks have 1 colour (#5a781e 100.0%); say which class has which in classes.json" in said
    save(labels / "b.png")
    save_label(labels / "a.png", [0, 1])
    said = refusal(lambda: open_labels(street, "train"))
    assert re.search(r"recode .* \(1\): b.png: mode RGB: colours, not class numbers", said)
    (labels / "b.png").write_bytes((labels / "b.png").read_bytes()[:60])
    assert re.search(r"label cannot be read \(1\): b.png: ", refusal(lambda: open_labels(street, "train")))
    Image.new("L", (40, 30)).save(labels / "a.jpg")
    (labels / "a.jpg").rename(labels / "a.png")
    assert "a.png: not a PNG" in refusal(lambda: open_labels(street, "train"))


def test_sizes_of_image_and_label_must_agree(street):
    save_label(street / "ann_dir" / "train" / "b.png", [0, 1, 2], size=(30, 40))
    said = refusal(lambda: open_labels(street, "train"))
    assert "differ in size (1): b.jpg is 40 x 30, its label 30 x 40" in said
    save(street / "img_dir" / "train" / "b.jpg", orientation=6)
    assert open_labels(street, "train").warnings == (
        "images turned by their EXIF data, whose labels must fit the upright picture: 1",
    )
    (street / "img_dir" / "train" / "b.jpg").write_bytes(b"")
    assert "image cannot be read (1): b.jpg: empty file" in refusal(lambda: open_labels(street, "train"))


def test_labels_without_content_are_refused_or_remarked_upon(street):
    for name in ("a", "b"):
        save_label(street / "ann_dir" / "train" / f"{name}.png", [255])
    assert "no pixel of a class" in refusal(lambda: open_labels(street, "train"))
    save_label(street / "ann_dir" / "train" / "b.png", [1])
    save_label(street / "ann_dir" / "train" / "a.png", [255, 255, 255, 1])
    assert open_labels(street, "train").warnings == ("classes that never occur: 2 of 3 (sky, car)",)
    save_label(street / "ann_dir" / "train" / "b.png", [255, 255, 255, 1])
    assert open_labels(street, "train").warnings[1] == "ignored pixels: 75%"


def test_black_and_white_masks_are_recognised(street):
    write(street / "classes.txt", "background\ncell\n")
    for name in ("a", "b"):
        save_label(street / "ann_dir" / "train" / f"{name}.png", [0, 255])
    said = refusal(lambda: open_labels(street, "train", classes=street / "classes.txt"))
    assert "0 and 255 alone" in said and "must be 1" in said


def test_default_colours_are_distinct_and_none_is_black():
    colours = default_palette(254)
    assert len(set(colours)) == 254 and (0, 0, 0) not in colours
    assert colours[:3] == ((128, 0, 0), (0, 128, 0), (128, 128, 0))  # PASCAL VOC's


def test_progress_of_labels_ends_with_all_pairs(street):
    told = []
    open_labels(street, "train", progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 2)]
