"""Datasets in COCO's format: every layout is found, and every fault is named with its file and id."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dataset_files import Content, coco, refusal, save, write
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from downstream.datasets import check_same_classes, open_coco, read_coco
from downstream.datasets.masks import decode_run_lengths, mask_error
from downstream.datasets.validation_report import map_in_threads
from downstream.prediction_files import read_image_ids


@pytest.fixture
def data(coco_folder: Path) -> Path:
    return coco_folder


def test_a_clean_split_passes(data):
    split = open_coco(data, "train")
    assert (split.annotations, split.images) == (data / "annotations" / "train.json", data / "train")
    assert (split.count, split.objects, split.crowds, split.has_masks) == (2, 4, 0, True)
    assert (split.class_names, split.category_ids) == (("cat", "dog"), (1, 2))
    assert split.small_medium_large == (4, 0, 0)
    assert split.image_sizes == ((40, 30), (40, 30), (40, 30))
    assert split.warnings == ()
    assert read_coco(split.annotations, split.images) == split


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a JSON file"),
        ("\ufeff{}", "no list 'images'"),
        ("[]", "top level is a list"),
        ('{"images": {}, "annotations": [], "categories": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": []}', "there is no image"),
        ('{"images": [3], "annotations": [], "categories": []}', "images[0] is 3"),
    ],
)
def test_files_that_are_no_coco_file(data, text, reason):
    write(data / "annotations" / "train.json", text)
    said = refusal(lambda: open_coco(data, "train"))
    assert "train.json" in said and reason in said


def test_a_byte_order_mark_is_left_out_of_what_others_read(data, tmp_path):
    path = data / "annotations" / "train.json"
    plain = open_coco(data, "train")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    split = open_coco(data, "train", converted=tmp_path / "run")
    assert split.annotations == tmp_path / "run" / "train.json"
    assert replace(split, annotations=path) == plain
    assert COCO(str(split.annotations)).getImgIds() == [1, 2]
    assert read_image_ids(path) == {"1.jpg": 1, "2.jpg": 2}


FAULTS = [
    (lambda c: c["images"][1].update(id=1), "image id used more than once (1): id 1 2 times"),
    (lambda c: c["images"][1].pop("width"), "image without width (1): image 2"),
    (lambda c: c["images"][1].update(height="30"), "image height is not a whole number (1): image 2: '30'"),
    (lambda c: c["images"][1].update(id="b"), "image id is not a whole number (1): images[1]: 'b'"),
    (lambda c: c["images"][1].update(width=0), "image size is not positive (1): 2.jpg (image 2): 0 x 30"),
    (lambda c: c["images"][1].update(width=41), "2.jpg (image 2): 40 x 30, json 41 x 30"),
    (lambda c: c["images"][1].update(file_name="3.jpg"), "train (1): 3.jpg (image 2)"),
    (lambda c: c["images"][1].update(file_name="../train/2.jpg"), "leads out of"),
    (lambda c: c["images"][1].update(file_name="/2.jpg"), "leads out of"),
    (lambda c: c["annotations"][1].update(id=11), "annotation id used more than once (1): id 11 2 times"),
    (
        lambda c: c["annotations"][1].update(iscrowd=2),
        "iscrowd is neither 0 nor 1 (1): annotation 12 (image 1)",
    ),
    (lambda c: c["annotations"][1].update(image_id=7), "unknown image_id (1): annotation 12 has image_id 7"),
    (
        lambda c: c["annotations"][1].update(category_id=7),
        "unknown category_id (1): annotation 12 has category_id 7",
    ),
    (lambda c: c["categories"][1].pop("name"), "category without name (1): category 2"),
    (lambda c: c["categories"][1].update(name=" "), "category without a name (1): category 2"),
    (lambda c: c["categories"][1].update(name="cat"), "category name used more than once (1): 'cat'"),
    (lambda c: c["categories"].clear(), "annotation 11 has category_id 1; annotation 12"),
    (lambda c: c["annotations"].clear(), "there is no object to learn from"),
]


@pytest.mark.parametrize(("spoil", "reason"), FAULTS, ids=[reason[:40] for _, reason in FAULTS])
def test_faults_are_named(data, spoil, reason):
    content = coco()
    spoil(content)
    write(data / "annotations" / "train.json", content)
    said = refusal(lambda: open_coco(data, "train"))
    assert reason in said
    assert said.startswith(str(data / "annotations" / "train.json"))


BOXES = [
    ([1, 2, 3], "is not four numbers (1): annotation 12 (image 1): [1, 2, 3]"),
    ([1, 2, 3, "4"], "is not four numbers"),
    ([1, 2, 3, True], "is not four numbers"),
    ([1, 2, float("nan"), 4], "is not finite (1): annotation 12 (image 1)"),
    ([1, 2, float("inf"), 4], "is not finite (1)"),
    ([9, 2, -3, 4], "negative width or height (1): annotation 12 (image 1): [9, 2, -3, 4]"),
    ([1, 2, 3, 0], "without width or height (1): annotation 12 (image 1)"),
    (
        [30, 2, 13.5, 4],
        "out of its image (1): annotation 12 (image 1): [30, 2, 13.5, 4] by 3.5 px (image: 40 x 30)",
    ),
    ([-1.5, 2, 10, 4], "by 1.5 px"),
    ([2, -9, 10, 14], "by 9.0 px"),
    ([2, 20, 10, 12], "by 2.0 px"),
]


@pytest.mark.parametrize(("box", "reason"), BOXES)
def test_boxes_that_cannot_be_used(data, box, reason):
    content = coco()
    content["annotations"][1]["bbox"] = box
    write(data / "annotations" / "train.json", content)
    assert reason in refusal(lambda: open_coco(data, "train"))


MASKS = [
    ([1, 2, 3, 4, 5, 6], "list of polygons"),
    ([[1, 2, 3, 4]], "2 points"),
    ([[1, 2, 3, 4, 5, 6, 7]], "7 numbers"),
    ([[1, 2, 3, 4, 5, 6], 7], "something else"),
    ([[1, 2, 3, "4", 5, 6]], "no number"),
    ([[1, 2, 3, float("inf"), 5, 6]], "infinite"),
    ({"size": [40, 30], "counts": [1200]}, "size [40, 30], the image has [30, 40]"),
    ({"size": [30, 40], "counts": [1000, 100]}, "cover 1100 pixels, the image has 1200"),
    ({"size": [30, 40], "counts": [1300, -100]}, "cover 1200 pixels"),
    ({"size": [30, 40], "counts": [1.5]}, "neither whole numbers nor text"),
    ({"size": [30, 40]}, "neither whole numbers nor text"),
    ({"size": [30, 40], "counts": "\x01"}, "does not occur"),
    ({"size": [30, 40], "counts": "P"}, "end inside a number"),
    ("polygon", "is a str"),
]


@pytest.mark.parametrize(("segmentation", "reason"), MASKS)
def test_masks_that_are_malformed(data, segmentation, reason):
    content = coco()
    content["annotations"][1]["segmentation"] = segmentation
    write(data / "annotations" / "train.json", content)
    said = refusal(lambda: open_coco(data, "train"))
    assert "segmentation is malformed (1): annotation 12 (image 1): " in said and reason in said


def test_run_lengths_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 1):
        drawn = np.asfortranarray(rng.random((37, 53)) < density, dtype=np.uint8)
        drawn[5:20, 3:30] |= np.uint8(density > 0)
        column = drawn.ravel(order="F")
        edges = np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1, [column.size]])
        runs = ([0] if column[0] else []) + np.diff(edges).tolist()
        text = str(coco_masks.encode(drawn)["counts"], "ascii")  # type: ignore[arg-type]
        assert decode_run_lengths(text) == runs
        for counts in (text, runs):
            assert mask_error({"size": [37, 53], "counts": counts}, width=53, height=37) == ""
            assert mask_error({"size": [37, 53], "counts": counts[:-1]}, width=53, height=37) != ""


def test_images_that_cannot_be_read(data):
    (data / "train" / "1.jpg").write_bytes(b"")
    (data / "train" / "2.jpg").write_text("no image")
    said = refusal(lambda: open_coco(data, "train"))
    assert "cannot be read (2): 1.jpg (image 1): empty file; 2.jpg (image 2): not an image" in said
    assert open_coco(data, "train", check_files=False).count == 2


def test_sizes_are_those_of_the_upright_picture(data):
    save(data / "train" / "2.jpg", size=(30, 40), orientation=6)
    split = open_coco(data, "train")
    assert split.warnings == (
        "images turned by their EXIF data, whose boxes must fit the upright picture: 1",
    )
    save(data / "train" / "2.jpg", orientation=6)
    said = refusal(lambda: open_coco(data, "train"))
    assert "2.jpg (image 2): 30 x 40, json 40 x 30 as before its rotation (EXIF orientation 6)" in said


def test_all_kinds_come_in_one_error_and_examples_are_few(tmp_path):
    content = coco(9)
    content["annotations"][0]["category_id"] = 5
    write(tmp_path / "train.json", content)
    (tmp_path / "train").mkdir()
    said = refusal(lambda: open_coco(tmp_path, "train"))
    assert said.splitlines()[0].endswith("train.json: 10 problems")
    assert re.search(r"unknown category_id \(1\): annotation 11", said)
    assert re.search(r"missing .* \(9\): 1.jpg .*; 5.jpg \(image 5\); and 4 more$", said)


def test_names_that_are_no_text_do_not_break_the_message(data):
    content = coco()
    content["images"][1]["file_name"] = "a\ud800\nb\0.jpg"
    write(data / "annotations" / "train.json", content)
    said = refusal(lambda: open_coco(data, "train"))
    said.encode()
    assert "(1): a\\ud800\\nb\\x00.jpg (image 2)" in said and len(said.splitlines()) == 2


def test_what_is_only_remarkable_is_a_warning(data):
    content = coco()
    content["categories"].append({"id": 3, "name": "bird"})
    content["images"].append({"id": 3, "file_name": "1.jpg", "width": 40, "height": 30})
    first, second, third, fourth = content["annotations"]
    first.update(id=0, bbox=[20, 5, 20.5, 10])
    second.update(bbox=[4, 5, 1.5, 10])
    third.update(iscrowd=1, segmentation={"size": [30, 40], "counts": [600, 600]})
    fourth.update(area=0, segmentation=[])
    write(data / "annotations" / "train.json", content)
    split = open_coco(data, "train")
    assert (split.objects, split.crowds, split.has_masks) == (2, 1, False)
    assert sorted(split.warnings) == [
        "annotation with id 0, which COCO's evaluation takes for 'not found': count from 1",
        "boxes less than 2 px wide or high: 1",
        "boxes that reach up to 1 px out of their image: 1",
        "categories without object: 1 of 3 (bird)",
        "crowds, neither learned nor counted as misses: 1",
        "image files under more than one id: 1 (1.jpg)",
        "images without object: 1 of 3",
        "objects without area, left out of training: 1 (annotation 22 (image 2))",
        "objects without mask: 1 of 4",
    ]


def test_a_stray_flat_box_among_thousands_is_let_pass(data):
    """COCO's own train2017 holds two."""
    content = coco()
    content["annotations"] = [{**content["annotations"][0], "id": n} for n in range(1, 2001)]
    for flat, passes in ((2, True), (3, False)):
        for annotation in content["annotations"][:flat]:
            annotation["bbox"] = [9.98, 18.5, 5.54, 0.0]
        path = write(data / "annotations" / "train.json", content)
        if passes:
            split = read_coco(path, data / "train")
            assert split.objects == 1998
            assert any(w.startswith("boxes without width or height") for w in split.warnings)
        else:
            assert "without width or height (3): annotation 1 (image 1)" in refusal(
                lambda path=path: read_coco(path, data / "train")
            )


def test_boxes_given_as_fractions_are_no_objects(data):
    content = coco()
    for annotation in content["annotations"]:
        annotation.update(bbox=[0.1, 0.2, 0.5, 0.5], area=0.25)
    write(data / "annotations" / "train.json", content)
    said = refusal(lambda: open_coco(data, "train"))
    assert "no object to learn from among 4" in said and "fractions of the image?" in said


def test_objects_may_lack_masks_and_a_test_split_objects(data):
    content = coco()
    del content["annotations"][0]["segmentation"]
    for annotation in content["annotations"][1:]:
        annotation["segmentation"] = []
    write(data / "annotations" / "train.json", content)
    assert not open_coco(data, "train").has_masks
    write(data / "annotations" / "test.json", {**content, "annotations": []})
    (data / "test").symlink_to(data / "train")
    assert open_coco(data, "test").objects == 0
    path = data / "annotations" / "test.json"
    assert "no object" in refusal(lambda: read_coco(path, data / "train"))
    assert read_coco(path, data / "train", needs_objects=False).count == 2


def test_classes_are_numbered_as_listed_and_must_agree(data):
    train = open_coco(data, "train")
    (data / "val").symlink_to(data / "train")

    def val(categories: list[Content], annotations: list[Content]):
        write(
            data / "annotations" / "val.json",
            {**coco(), "categories": categories, "annotations": annotations},
        )
        return open_coco(data, "val")

    objects = coco()["annotations"]
    cat, dog = coco()["categories"]
    check_same_classes(train, val([cat, dog], objects))
    swapped = val([dog, cat], objects)
    assert swapped.class_names == ("dog", "cat") and swapped.category_ids == (2, 1)
    assert "order differs, first at place 1 (cat, dog)" in refusal(lambda: check_same_classes(train, swapped))
    less = val([cat], objects[::2])
    said = refusal(lambda: check_same_classes(train, less))
    assert "only the former has 2 'dog'" in said and "train.json" in said and "val.json" in said
    assert "only the latter has 2 'dog'" in refusal(lambda: check_same_classes(less, train))


def test_progress_ends_with_all_files(data):
    told = []
    open_coco(data, "train", progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 2)]


def test_threads_keep_the_order_and_stop_when_the_caller_does():
    told = []
    items = range(100)
    assert list(map_in_threads(lambda n: -n, items, lambda *at: told.append(at))) == [-n for n in items]
    assert told == [(min(n, 100), 100) for n in range(8, 105, 8)]
    done = []
    results = map_in_threads(lambda n: done.append(n) or time.sleep(0.001), range(3200), None)
    next(results)
    results.close()
    assert 0 < len(done) < 3200


def test_threads_wait_for_a_slow_caller():
    done = []
    results = map_in_threads(done.append, range(10_000), None)
    for taken in range(3):
        next(results)
        time.sleep(0.2)
        assert taken < len(done) <= 8 * 2 * 8  # threads, chunks ahead of each, items of a chunk
    results.close()


def test_checking_needs_neither_torch_nor_openmmlab():
    code = "import downstream.datasets, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "torchvision", "mmengine", "mmcv", "mmdet", "mmseg"}


def test_what_lies_beside_the_listed_images_is_counted_and_named(data, caplog):
    save(data / "train" / "3.jpg")
    (data / "train" / "4.gif.txt").write_text("")
    with caplog.at_level("INFO"):
        open_coco(data, "train")
    assert (
        f"{data / 'train'}: 2 images (2 .jpg); skipped: 1 .txt (not read), "
        "1 image that train.json does not list (3.jpg)"
    ) in caplog.messages
