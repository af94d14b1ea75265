"""Where a dataset in COCO's format may keep its files, and what is said where they are not found."""

import pytest
from dataset_files import coco, refusal, save, write

from downstream.datasets import open_coco, read_coco

LAYOUTS = [
    ("val", "annotations/instances_val2017.json", "val2017"),
    ("train", "annotations/instances_train2014.json", "images/train2014"),
    ("train", "annotations/train.json", "train"),
    ("val", "annotations/val.json", "images/val"),
    ("test", "annotations/test.json", "images"),
    ("val", "valid.json", "valid"),
    ("val", "valid/_annotations.coco.json", "valid"),
    ("test", "test/_annotations.coco.json", "test"),
    ("val", "annotations/instances_Validation.json", "images/DEV"),
    ("train", "annotations/Training2017.json", "TRAIN_images"),
    ("val", "Valid/_annotations.coco.json", "Valid"),
]


@pytest.mark.parametrize(("split", "annotations", "images"), LAYOUTS)
def test_layouts_are_found(tmp_path, split, annotations, images):
    write(tmp_path / annotations, coco(1))
    save(tmp_path / images / "1.jpg")
    found = open_coco(tmp_path, split)
    assert (found.annotations, found.images) == (tmp_path / annotations, tmp_path / images)


def test_the_folder_that_holds_the_images_is_taken(coco_folder):
    """`train/` exists, but the file names belong to `images/`; paths inside file names are followed."""
    for n in (1, 2):
        (coco_folder / "images").mkdir(exist_ok=True)
        (coco_folder / "train" / f"{n}.jpg").rename(coco_folder / "images" / f"{n}.jpg")
    assert open_coco(coco_folder, "train").images == coco_folder / "images"
    content = coco()
    for image in content["images"]:
        image["file_name"] = f"images/{image['file_name']}"
    write(coco_folder / "annotations" / "train.json", content)
    assert open_coco(coco_folder, "train").images == coco_folder


def test_what_was_looked_for_is_said(coco_folder):
    said = refusal(lambda: open_coco(coco_folder, "val"))
    for name in (
        "annotations/instances_val2017.json",
        "val/_annotations.coco.json",
        "annotations/train.json",
    ):
        assert name in said
    assert "no such folder" in refusal(
        lambda: read_coco(coco_folder / "annotations/train.json", coco_folder / "photos")
    )
    assert "no folder of a dataset" in refusal(lambda: open_coco(coco_folder / "nowhere", "train"))
    assert "'nonsense' is not a split" in refusal(lambda: open_coco(coco_folder, "nonsense"))
    write(coco_folder / "annotations" / "instances_train2017.json", coco())
    assert "instances_train2017.json, train.json" in refusal(lambda: open_coco(coco_folder, "train"))
    (coco_folder / "annotations" / "train.json").unlink()
    (coco_folder / "train").rename(coco_folder / "photos")
    assert "looked for train2017, images/train2017, train" in refusal(lambda: open_coco(coco_folder, "train"))
