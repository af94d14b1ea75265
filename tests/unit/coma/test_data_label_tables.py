"""Labels from CSV files: their forms, their splits, and every way they can be wrong."""

import math
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coma.data import (
    ArraySource,
    Source,
    Subset,
    align_labels,
    balanced_subset,
    class_indices,
    open_labelled,
    open_labelled_splits,
    open_source,
)
from coma.data.listing import changes, list_data
from coma.data.sources.subset import hold_out
from coma.errors import BadImage, BadInput


def table(path: Path, text: str, images: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> Path:
    """A CSV file, and the images beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(images):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (60 * number, 0, 0)).save(path.parent / name)
    path.write_text(text, encoding="utf-8")
    return path


# forms ------------------------------------------------------------------------------------------


def test_one_label_for_each_image(tmp_path):
    source = open_source(table(tmp_path / "t.csv", "image,label\nb.png,dog\na.png,cat\n\nc.png, dog\n"))
    assert source.class_names == ("cat", "dog") and source.multi_hot is None
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1]
    assert os.path.basename(source.describe(0)) == "b.png" and source.label_place(2).endswith("t.csv:5")
    assert source.read(1)[0, 0].tolist() == [0, 0, 0]
    assert source.summary().endswith("t.csv: 3 images, 2 classes")
    assert open_source(tmp_path / "t.csv").class_names == ("cat", "dog")
    numbers = table(tmp_path / "n.csv", "image,class\na.png,10\nb.png,9\n")
    assert open_source(numbers).class_names == ("9", "10")


@pytest.mark.parametrize(
    "text",
    [
        "image,labels\na.png,dog;cat\nb.png,\nc.png,dog\n",
        "image,tags\na.png,cat | dog\nb.png,\nc.png,dog\n",
        "filename, cat, dog\na.png, 1, 1\nb.png, 0, 0\nc.png, 0, 1\n",
        "\ufefffilename,cat,dog\r\na.png,1.0,1.0\r\nb.png,0.0,0.0\r\nc.png,0,1\r\n",
    ],
)
def test_any_number_of_labels(tmp_path, text):
    source = open_source(table(tmp_path / "t.csv", text))
    assert source.class_names == ("cat", "dog") and source.labels is None
    assert source.multi_hot is not None
    assert source.multi_hot.tolist() == [[True, True], [False, False], [False, True]]
    assert source.summary().endswith("3 images, 2 classes, 1 per image, 1 images without any")
    part = pickle.loads(pickle.dumps(Subset(source, np.array([2, 0]))))
    assert part.multi_hot.tolist() == [[False, True], [True, True]]
    assert part.label_place(0) == source.label_place(2)


def test_a_class_of_0_and_1_may_be_called_label(tmp_path):
    source = open_source(table(tmp_path / "t.csv", "image,cat,label\na.png,0,1\nb.png,1,1\n"))
    assert source.class_names == ("cat", "label") and source.labels is None
    assert source.multi_hot is not None and source.multi_hot.tolist() == [[False, True], [True, True]]


def test_classes_are_matched_by_name(tmp_path):
    table(tmp_path / "train.csv", "image,zebra,cat,dog\na.png,0,1,1\nb.png,0,0,1\n")
    table(tmp_path / "test.csv", "image,labels\nc.png,dog\n")
    splits = open_labelled_splits(tmp_path)
    ours, theirs, names = align_labels(splits.train, splits.test)
    assert names == ("cat", "dog")  # no training image is a zebra
    assert ours.tolist() == [[1, 1], [0, 1]] and theirs.tolist() == [[0, 1]]
    assert class_indices(splits.test, ("dog", "cat"), "the model").tolist() == [[1, 0]]


def test_a_share_of_all_images_is_held_out():
    labels = torch.zeros(20, 3)
    assert int(hold_out(labels, 0.2, seed=0).sum()) == 4
    assert torch.equal(hold_out(labels, 0.2, seed=0), hold_out(labels, 0.2, seed=0))


def held_out_slowly(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen[members[: max(math.floor(len(members) * share + 1e-9), len(members) > 1)]] = True
    return chosen


def balanced_slowly(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(len(labels))
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        ranks[labels[order] == label] = np.arange((labels == label).sum())
    return np.sort(order[np.argsort(ranks, kind="stable")[:limit]])


def labelled(labels: np.ndarray) -> Source:
    return ArraySource([np.zeros((1, 1, 3), np.uint8)] * len(labels), labels)


@pytest.mark.parametrize("seed", range(20))
def test_every_class_gives_its_share(seed):
    """Classes of one image, numbers without images, and shares that are no whole numbers included."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, draw.integers(1, 60), 100)
    share, limit = draw.uniform(0.01, 0.99), int(draw.integers(1, 100))
    expected = held_out_slowly(torch.from_numpy(labels), share, seed)
    assert torch.equal(hold_out(torch.from_numpy(labels), share, seed), expected)
    part = balanced_subset(labelled(labels), limit, seed)
    chosen = balanced_slowly(labels, limit, seed)
    assert [part.describe(i) for i in range(len(part))] == [f"array[{i}]" for i in chosen]


def test_many_classes_take_no_longer_than_few():
    labels = np.random.default_rng(0).integers(0, 20_000, 200_000)
    began = time.process_time()
    hold_out(torch.from_numpy(labels), 0.2, seed=0)
    balanced_subset(labelled(labels), 1000)
    assert time.process_time() - began < 5


def test_changed_labels_are_noticed(tmp_path):
    path = table(tmp_path / "t.csv", "image,labels\na.png,x\nb.png,x;y\n")
    before = list_data({"images": open_source(path)})
    path.write_text("image,labels\na.png,y\nb.png,x;y\n")
    assert changes(before, list_data({"images": open_source(path)})) == [
        "the images have changed: 1 of another class (a.png)"
    ]


# splits -----------------------------------------------------------------------------------------


def test_one_file_for_each_split(tmp_path):
    for split, name in (("train", "a.png"), ("valid", "b.png"), ("test", "c.png")):
        table(tmp_path / f"{split}.csv", f"image,labels\n{name},x;y\n")
    splits = open_labelled_splits(tmp_path)
    assert splits.val is not None
    found = [Path(each.describe(0)).name for each in (splits.train, splits.val, splits.test)]
    assert found == ["a.png", "b.png", "c.png"]
    assert [splits.train.split, splits.val.split, splits.test.split] == ["train", "val", "test"]
    assert open_labelled(tmp_path, held_out=True).split == "test"


def test_a_folder_for_each_split_as_roboflow_writes_it(tmp_path):
    for split in ("train", "valid"):
        table(tmp_path / split / "_classes.csv", "filename, x, y\na.png, 1, 0\nb.png, 0, 1\n")
    splits = open_labelled_splits(tmp_path)
    assert splits.val is None and splits.test.split == "val"
    assert splits.test.describe(0) == str(tmp_path / "valid" / "a.png")


@pytest.mark.parametrize("name", ["labels.csv", "all.csv"])
def test_a_column_of_splits(tmp_path, name):
    rows = "image,split,label\na.png,train,x\nb.png,Test,y\nc.png,val,x\n"
    path = table(tmp_path / name, rows)
    data = tmp_path if name == "labels.csv" else path
    for split, image in (("train", "a.png"), ("test", "b.png"), ("val", "c.png")):
        source = open_labelled(data, split)
        assert (len(source), source.split, Path(source.describe(0)).name) == (1, split, image)


# what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("image,label\n", "lists no image"),
        ("image\na.png\n", "t.csv:1: has one column; give paths and labels$"),
        ("image;label\na.png;x\n", "separate its columns by commas"),
        (",image,label\n0,a.png,x\n", "t.csv:1: its first column has no name"),
        ("image,x,x\na.png,1,0\n", "t.csv:1: columns need different names: x"),
        ("image,x,\na.png,1,0\n", r"different names: \(no name\)"),
        ("image,label\na.png,x\nb.png\n", "t.csv:3: has 1 cell for 2 columns"),
        ("image,label\na.png,x,y\n", "t.csv:2: has 3 cells for 2 columns"),
        ("image,label\na.png,x;y\n", "t.csv:2: has 2 labels in the column 'label'; give one, or call"),
        ("image,label\na.png,\n", "t.csv:2: has no label"),
        ("image,labels\na.png,\n", "no image has a label"),
        ("image,x,y\na.png,1,0\nb.png,2,0\n", "t.csv:3: column 'x' holds '2'; give 0 or 1"),
        ("image,cat\na.png,yes\n", "t.csv:2: column 'cat' holds 'yes'"),
        (
            "image,label,verified\na.png,0,1\nb.png,1,0\n",
            "t.csv: has the column 'label' and others beside it: verified; delete the others, or",
        ),
        ("image,Tags,x,split,y\na.png,1,0,train,1\n", "has the column 'Tags' and others beside it: x, y; "),
        ("image,label\na.png,x\nb.png,y\n./a.png,x\n", r"t.csv:4: ./a.png is listed in line 2 too"),
        (
            "image,label\na.png,x\ngone.png,y\n,x\n",
            r"2 images of 3 cannot be found in .*: line 3: gone.png \(No such file or directory\), "
            r"line 4: \(no path\)",
        ),
        ("image,label\na.png\0,x\n", "t.csv"),
        ('image,label\n"a.png,x\n', "t.csv:2: not CSV"),
        ("image,split,label\na.png,later,x\n", "t.csv:2: split is 'later'; give train, val or test"),
        ("image,split\na.png,train\n", "has no column of labels"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        open_source(table(tmp_path / "t.csv", text))


def test_other_files_and_splits_are_refused(tmp_path):
    path = table(tmp_path / "t.csv", "image,label\na.png,x\nb.png,y\n")
    with pytest.raises(BadInput, match="has no column 'split' of train, val and test; add it"):
        open_source(path, "train")
    path.write_bytes("image,label\na.png,\xff\n".encode("latin-1"))
    with pytest.raises(BadInput, match="is not UTF-8 text"):
        open_source(path)
    os.mkfifo(tmp_path / "pipe.png")
    path.write_text("image,label\npipe.png,x\n")
    with pytest.raises(BadInput, match=r"line 2: pipe.png \(not a file\)"):
        open_source(path)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(BadInput, match="is not a regular file"):
        open_source(tmp_path / "pipe.csv")


def test_unknown_classes_are_named_with_file_and_line(tmp_path):
    for kind, labels in (("label", ("x", "y")), ("labels", ("x", "x;y"))):
        train = table(tmp_path / f"train-{kind}.csv", f"image,{kind}\na.png,{labels[0]}\nb.png,{labels[1]}\n")
        test = table(tmp_path / f"test-{kind}.csv", f"image,{kind}\na.png,x\nb.png,X\n")
        with pytest.raises(
            BadInput, match=rf"classes X \(first in .*test-{kind}.csv:3\); it has x, y \(upper"
        ):
            align_labels(open_source(train), open_source(test))
    one, any_number = open_source(tmp_path / "train-label.csv"), open_source(tmp_path / "train-labels.csv")
    with pytest.raises(BadInput, match=r"each image has one class, but those of .* have any number"):
        align_labels(any_number, one)
    with pytest.raises(BadInput, match="its images have any number of classes"):
        align_labels(one, any_number)


def test_images_that_go_later_are_skipped_by_name(tmp_path):
    source = open_source(table(tmp_path / "t.csv", "image,label\na.png,x\nb.png,y\n"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match=r"a\.png: cannot be read"):
        source.read(0)
