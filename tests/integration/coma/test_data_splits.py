"""Splits by any of their names, at any depth, in every kind of data: held-out images are not trained on."""

import io
import logging
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coma import cli
from coma.data import Source, open_source
from coma.errors import BadInput
from coma.splits import paired_splits, parse_split, select_images, split_of


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def make(root: Path, names: Iterable[str]) -> Path:
    """Pictures, and packs and shards of one picture each."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(path, data=np.frombuffer(png(), np.uint8), offsets=[0, len(png())])
        elif path.suffix == ".tar":
            with tarfile.open(path, "w") as tar:
                info = tarfile.TarInfo("0.png")
                info.size = len(png())
                tar.addfile(info, io.BytesIO(png()))
        else:
            path.write_bytes(png())
    return root


def shown(source: Source, root: Path) -> list[str]:
    return [os.path.relpath(source.describe(i).partition("[")[0], root) for i in range(len(source))]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        ("train Train TRAINING trn train2017 trainset Train-Set train_images images-train trainval", "train"),
        ("val VALID Validation dev val2014 val_images ValSet", "val"),
        ("test Testing tst TEST2015 eval evaluation hold-0-out-holdout test.images", "test"),
        ("contest trains valley device retest train_test train_station mytest attest images", None),
    ],
)
def test_names_of_splits(names, split):
    assert {split_of(name) for name in names.replace("hold-0-out-", "").split()} == {split}


def test_what_else_names_say_has_to_agree():
    assert paired_splits(["x_train", "x_val", "y_test", "z"]) == {"x_train": "train", "x_val": "val"}
    assert paired_splits(["train", "val_original"]) == {"train": "train", "val_original": "val"}
    for names in (
        ["train_station", "test_tube"],
        ["train", "bus"],
        ["val", "test"],
        ["train", "test_tube", "cat"],
    ):
        assert paired_splits(names) == {}
    with pytest.raises(BadInput, match="'nonsense' is not a split; there are train, val, test"):
        parse_split("nonsense")


LAYOUTS = {
    "by other names": ("training/1.png", "validation/2.png"),
    "in any case": ("Train/1.png", "DEV/2.png", "Test/3.png"),
    "with numbers": ("train2017/1.png", "val2017/2.png"),
    "below images": ("images/train/1.png", "images/val/2.png"),
    "named after the data": ("imagenet_train/1.png", "imagenet_val/2.png"),
    "in every class": ("cup/train/1.png", "cup/test/2.png", "pan/train/3.png", "pan/truth/4.png"),
    "in some classes": ("cup/train/1.png", "cup/test/2.png", "pan/test/4.png"),
    "beside others": ("train/1.png", "val/2.png", "more/3.png", "4.png"),
    "shards": ("train-000.tar", "train-001.tar", "val-000.tar"),
    "shards named after the data": ("a-train-0.tar", "a-val-0.tar", "b.tar"),
    "folders of shards": ("Training/0.tar", "Validation/0.tar"),
    "packs": ("Training.npz", "VALID.npz"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_training_images_alone_are_read_and_the_others_are_said(tmp_path, names):
    source = open_source(make(tmp_path, names))
    trained = [name for name in names if "train" in name.lower()]
    assert sorted(shown(source, tmp_path)) == sorted(trained)
    (note,) = source.notes
    assert f"{tmp_path}: reads " in note and "to use one of these, give its own path" in note
    for name in set(names) - set(trained):
        assert name in note or f"{name.rpartition('/')[0]}/ (1 image)" in note or name == "4.png"
    assert source.split == "train" and open_source(tmp_path, "train").notes == ()
    held_out = open_source(tmp_path, "test")
    assert held_out.split in ("val", "test") and not set(shown(held_out, tmp_path)) & set(trained)
    assert shown(open_source(tmp_path, held_out=True), tmp_path) == shown(held_out, tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("val/a/1.png", "val/b/2.png"),
        ("Validation/1.png", "test/2.png"),
        ("data/images/val/1.png",),
        ("val-000.tar",),
        ("test.npz",),
    ],
)
def test_held_out_images_alone_are_not_trained_on(tmp_path, names):
    make(tmp_path, names)
    with pytest.raises(BadInput, match=r"has no training images, only the held-out split "):
        open_source(tmp_path)
    assert open_source(tmp_path, held_out=True).split in ("val", "test")
    place = tmp_path / names[0]  # pointed at, they are
    assert open_source(place.parent if "/" in names[0] else place).split is None


def test_a_lone_training_split_is_read_as_one(tmp_path):
    source = open_source(make(tmp_path, ["data/train/cat/1.png", "data/train/dog/2.png"]))
    assert (source.location, source.class_names) == (tmp_path / "data" / "train", ("cat", "dog"))


@pytest.mark.parametrize("name", ["test", "dev", "train"])
def test_a_class_that_is_called_like_a_split_is_a_class_and_that_is_said(tmp_path, name):
    source = open_source(make(tmp_path, [f"{name}/1.png", "bus/2.png", "test_tube/3.png"]))
    assert source.class_names == tuple(sorted((name, "bus", "test_tube")))
    assert f"{name}/" in source.notes[0] and "is read like the other folders" in source.notes[0]
    split = open_source(make(tmp_path / "x", [f"train/{c}/1.png" for c in (name, "bus")] + ["val/bus/1.png"]))
    assert split.class_names == tuple(sorted((name, "bus")))


def test_a_split_among_the_classes_that_it_holds_is_refused(tmp_path):
    make(tmp_path, ["cat/1.png", "dog/2.png", "test/cat/3.png"])
    with pytest.raises(
        BadInput, match=r"test/ holds the folder cat/.*move the others into a folder train/ beside it"
    ):
        open_source(tmp_path)


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    make(tmp_path, ["train.npz", "training.npz"])
    with pytest.raises(BadInput, match=r"train\.npz and training\.npz are both named like the train split"):
        open_source(tmp_path)
    make(tmp_path / "shards", ["0.tar", "1.tar"])
    with pytest.raises(BadInput, match="no split 'test' here; no shard is named train, val, test"):
        open_source(tmp_path / "shards", "test")


def test_the_commands_say_what_they_leave_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, "coma")
    make(tmp_path / "data", ["training/1.png", "training/2.png", "validation/3.png"])
    assert (
        cli.main(["pack", str(tmp_path / "data"), "--out", str(tmp_path / "shards"), "--workers", "0"]) == 0
    )
    text = "data: reads training/ (2 images) and skips validation/ (1 image); to use one of these"
    assert text in caplog.text
    caplog.clear()
    flags = [
        "--model",
        "vit-tiny",
        "--image-size",
        "16",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    small = ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--objective.decoder.dim", "24"]
    run = ["--out", str(tmp_path / "run"), "--device", "cpu", "--objective.decoder.depth", "1"]
    assert cli.main(["pretrain", str(tmp_path / "data"), *flags, *small, *run]) == 0
    assert text in caplog.text


def test_every_folder_that_is_read_is_named():
    names = ["ann_dir/train/a.png", "ann_dir/val/b.png", "img_dir/train/a.jpg", "img_dir/val/b.jpg"]
    (note,) = select_images(names, Path("data"), None, held_out=False).notes
    assert "reads ann_dir/train/ (1 image), img_dir/train/ (1 image) and skips ann_dir/val/" in note
