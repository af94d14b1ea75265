"""Labels are matched by name or by value, what cannot be matched is refused, and no class is empty."""

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coma import cli
from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.config import ViTConfig
from coma.data import (
    Source,
    align_labels,
    class_indices,
    log_missing_classes,
    open_labelled_splits,
    open_source,
)
from coma.data.sources.image_folder import parse_whole_numbers
from coma.errors import BadInput
from coma.image_size import ImageSize
from pretrain.evaluate import random_encoder


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path, "PNG")
    return path


def folders(root: Path, *names: str, images: int = 1) -> Path:
    for name in names:
        for number in range(images):
            picture(root / name / f"{number}.png", 20 * (int(name) % 13 if name.isdecimal() else 1))
    return root


def shard(path: Path, labels: Sequence[str | None]) -> Path:
    """Pictures as bright as their labels say, with these texts in .cls files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            image = picture(
                path.with_suffix(".png"), 20 * (int(label) % 13) if label and label.isdecimal() else 0
            )
            members = {"png": image.read_bytes()} | ({} if label is None else {"cls": label.encode()})
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            image.unlink()
    return path


def classes_of(train: Source, test: Source) -> tuple[list[str], list[str]]:
    """Classes of both sets' images as the other labels name them."""
    known, asked, names = align_labels(train, test)
    return [names[i] for i in known], [names[i] for i in asked]


TWELVE = [str(number) for number in range(12)]


def test_numbers_in_files_are_those_of_folders(tmp_path):
    named = open_source(folders(tmp_path / "folders", *TWELVE))
    numbered = open_source(shard(tmp_path / "a.tar", TWELVE))
    assert named.class_names == tuple(TWELVE)  # 10 comes after 9
    for train, test in ((named, numbered), (numbered, named)):
        for source, classes in zip((train, test), classes_of(train, test), strict=True):
            assert [str(source.read(i)[0, 0, 0] // 20) for i in range(12)] == classes
            assert sorted(classes) == sorted(TWELVE)


def test_the_command_matches_numbers_by_their_value(tmp_path):
    """12 grey levels: an encoder that has learned nothing tells them apart, and 10 is not the second."""
    train, test = folders(tmp_path / "train", *TWELVE, images=3), shard(tmp_path / "test.tar", TWELVE)
    model = ViTConfig(patch=4, dim=16, depth=1, heads=2)
    about = ArtifactConfig(
        "backbone", model, None, ImageSize.of(8), (0.5,) * 3, (0.25,) * 3, None, {}, library_versions()
    )
    save_artifact(tmp_path / "artifact", tensors=random_encoder(about).state_dict(), config=about)
    argv = ["--train", train, "--test", test, "--protocols", "knn", "--k", 1, "--workers", 0]
    out = ["--no-random-baseline", "--out", tmp_path / "scores"]
    assert cli.main(["evaluate", *map(str, [tmp_path / "artifact", *argv, *out])]) == 0
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["scores"][0]["top1"] == 1


def test_leading_zeros_change_no_value(tmp_path):
    padded = open_source(folders(tmp_path / "padded", "00", "02", "10"))
    for test in (folders(tmp_path / "plain", "0", "2", "10"), shard(tmp_path / "a.tar", ["0", "2", "10"])):
        assert classes_of(padded, open_source(test))[0] == ["00", "02", "10"]
        assert sorted(classes_of(padded, open_source(test))[1]) == ["00", "02", "10"]
    assert (
        parse_whole_numbers(["7", "07"])
        is parse_whole_numbers(["7", "x"])
        is parse_whole_numbers(["-1"])
        is None
    )


def test_sparse_numbers_are_few_classes(tmp_path):
    years = [open_source(folders(tmp_path / part, "2019", "1990", "2025")) for part in ("a", "b")]
    assert align_labels(*years)[2] == ("1990", "2019", "2025")
    huge = [open_source(shard(tmp_path / f"{part}.tar", ["5", "123456789012"])) for part in "cd"]
    known, asked, names = align_labels(*huge)
    assert (known.tolist(), asked.tolist(), names) == ([0, 1], [0, 1], ("5", "123456789012"))


@pytest.mark.parametrize("bare_first", [True, False])
def test_numbers_say_nothing_about_folders_with_names(tmp_path, bare_first):
    both = [
        open_source(shard(tmp_path / "a.tar", ["0", "1"])),
        open_source(folders(tmp_path / "b", "cat", "dog")),
    ]
    with pytest.raises(
        BadInput, match=r"a\.tar: its labels are numbers without names, and .*b has names \(cat, dog"
    ):
        align_labels(*(both if bare_first else reversed(both)))


def test_numbers_of_packs_are_their_own(tmp_path):
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "index.json").write_text(json.dumps({"class_names": ["dog", "cat"]}))
    named = open_source(shard(tmp_path / "named" / "a.tar", ["0", "1", "1"]))
    bare = open_source(shard(tmp_path / "b.tar", ["1", "0"]))
    assert classes_of(named, bare)[1] == ["cat", "dog"]
    assert classes_of(bare, named) == (["1", "0"], ["0", "1", "1"])
    assert classes_of(open_source(folders(tmp_path / "c", "cat", "dog")), named)[1] == ["dog", "cat", "cat"]
    beyond = open_source(shard(tmp_path / "d.tar", ["1", "7"]))
    with pytest.raises(BadInput, match=r"d\.tar\[001\.png\]: its label is 7, but labels must be 0 to 1"):
        align_labels(named, beyond)


def test_what_does_not_match_is_named(tmp_path):
    train = open_source(folders(tmp_path / "train", "cat", "Dog"))
    test = open_source(folders(tmp_path / "test", "cat", "dog", "eel"))
    with pytest.raises(
        BadInput,
        match=r"not have the classes dog, eel; it has Dog, cat .*lower case matter: dog is Dog",
    ):
        align_labels(train, test)
    with pytest.raises(BadInput, match="the model does not have the classes eel; it has cat, dog"):
        class_indices(test, ("cat", "dog"), "the model")
    bare = open_source(shard(tmp_path / "a.tar", ["0", "1"]))
    with pytest.raises(BadInput, match=r"numbers without names, and the model has names \(cat, dog\)"):
        class_indices(bare, ("cat", "dog"), "the model")
    assert class_indices(bare, ("0", "10", "1"), "the model").tolist() == [
        0,
        2,
    ]  # as sorted by older versions


def test_files_that_leave_a_data_set_without_labels_are_named(tmp_path):
    train = folders(tmp_path / "data" / "train", "cat", "dog")
    folders(tmp_path / "data" / "test", "cat", "dog")
    picture(train / "IMG_1.png")
    splits = open_labelled_splits(tmp_path / "data")
    with pytest.raises(
        BadInput, match=r"has no labels; IMG_1\.png lies in .*beside its class folders \(cat, dog\)"
    ):
        align_labels(splits.train, splits.test)
    one = open_source(folders(tmp_path / "one", "cat"))
    with pytest.raises(BadInput, match="has no labels; all lie in one folder, cat; give at least two"):
        align_labels(one, one)
    lacking = open_source(shard(tmp_path / "a.tar", ["0", "1", None]))
    with pytest.raises(BadInput, match=r"has no labels; .*a\.tar\[002\.png\] has no label.*1 of 3 samples"):
        align_labels(lacking, lacking)
    words = open_source(shard(tmp_path / "b.tar", ["0", "cat"]))
    with pytest.raises(BadInput, match=r"b\.tar: the label in 001\.cls is not a whole number"):
        align_labels(words, words)


def test_packing_says_that_labels_are_lost(tmp_path, capsys):
    picture(folders(tmp_path / "photos", "cat", "dog") / "x.png")
    assert cli.main(["pack", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "labels are not packed: x.png lies in" in capsys.readouterr().out


# classes without images --------------------------------------------------------------------------


def test_folders_without_an_image_are_no_classes(tmp_path):
    for part in ("train", "test"):
        folders(tmp_path / part, "cat", "dog")
        for name in ("empty", "notes"):
            (tmp_path / part / name).mkdir()
        (tmp_path / part / "notes" / "a.txt").write_text("no image")
    splits = open_labelled_splits(tmp_path)
    assert splits.train.class_names == ("cat", "dog")
    assert "2 folders without an image (empty, notes)" in splits.train.summary()


def test_classes_of_which_no_image_can_be_read_are_none(tmp_path, caplog):
    caplog.set_level(logging.INFO, "coma")
    for part in ("train", "test"):
        folders(tmp_path / part, "ant", "cat", "dog", images=2)
    for path in (tmp_path / "train" / "ant").iterdir():
        path.write_bytes(b"no image")
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"")
    splits = open_labelled_splits(tmp_path)
    assert "1 class skipped, because no image can be read: ant (2; " in caplog.text
    assert len(splits.train) == 4
    with pytest.raises(BadInput, match="not have the classes ant; it has cat, dog"):
        align_labels(splits.train, splits.test)
    for path in (tmp_path / "test" / "ant").iterdir():
        path.unlink()
    splits = open_labelled_splits(tmp_path)
    assert align_labels(splits.train, splits.test)[2] == ("cat", "dog")
    for path in (tmp_path / "test").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"test: no image could be read; class cat \(2; .*0\.png"):
        open_labelled_splits(tmp_path)


def test_classes_that_the_test_images_lack_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "coma")
    folders(tmp_path / "train", "ant", "cat", "dog")
    folders(tmp_path / "val", "ant", "dog")
    splits = open_labelled_splits(tmp_path)
    assert splits.val is None and splits.test.split == "val"
    assert f"{tmp_path}/val: used as test images, because there is no test split" in caplog.text
    log_missing_classes(splits)
    assert f"{tmp_path}/val: has no image of 1 of 3 classes: cat" in caplog.text


def test_a_val_split_is_apart_from_a_test_split(tmp_path):
    for part in ("Training", "dev", "TEST"):
        folders(tmp_path / part, "cat", "dog")
    splits = open_labelled_splits(tmp_path)
    assert splits.val is not None
    assert [each.location.name for each in (splits.train, splits.val, splits.test)] == [
        "Training",
        "dev",
        "TEST",
    ]
    apart = open_labelled_splits(
        None, tmp_path / "Training", tmp_path, tmp_path / "dev"
    )  # of a folder with splits, test
    assert apart.val is not None and (apart.val.location.name, apart.test.location.name) == ("dev", "TEST")


def test_labels_below_zero_are_named(tmp_path):
    image = picture(tmp_path / "a.png").read_bytes()
    arrays = {"data": np.frombuffer(image * 2, np.uint8), "offsets": [0, len(image), 2 * len(image)]}
    np.savez(tmp_path / "pack.npz", **arrays, labels=np.array([-1, 0]))
    with pytest.raises(BadInput, match=r"pack\.npz: labels run from -1 to 0"):
        open_source(tmp_path / "pack.npz")
