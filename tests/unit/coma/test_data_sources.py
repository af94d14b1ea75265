"""Finding images: folders, class folders, splits and `.npz` packs, and every way they can be wrong."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coma.data import ArraySource, Source, open_source
from coma.data.sources.base import Names
from coma.data.sources.image_folder import FolderSource
from coma.errors import BadImage, BadInput


def save(path: Path, value: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, "PNG")
    return path


def names(source: Source) -> list[str]:
    return [os.path.relpath(source.describe(i), str(source.location)) for i in range(len(source))]


# folders ----------------------------------------------------------------------------------------


def test_folders_are_searched_recursively_in_sorted_order(tmp_path):
    shown = ["B/0.webp", "a.JpEg", "b/1.png", "b/deep/er/2.PNG", "c.tif", "z.npy.png"]
    for name in (*reversed(shown), ".hidden.png", ".git/x.png"):
        save(tmp_path / name)
    for name in ("notes.txt", "jpg", "b/labels.csv"):
        (tmp_path / name).write_text("no image")
    source = open_source(tmp_path)
    assert names(source) == shown
    assert source.labels is None
    assert source.class_names is None
    assert source.read(0).shape == (6, 8, 3)


def test_links_are_followed_and_circles_end(tmp_path):
    save(tmp_path / "photos" / "1.png")
    save(tmp_path / "elsewhere" / "2.png")
    folder = tmp_path / "photos"
    (folder / "again").symlink_to(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert names(open_source(folder)) == ["1.png", "more/2.png"]


def test_files_that_go_after_they_were_found_are_named(tmp_path):
    source = open_source(save(tmp_path / "a.png").parent)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match=r"a\.png: the file no longer exists"):
        source.read(0)


def test_names_that_are_no_text_can_be_read_and_printed(tmp_path):
    save(tmp_path / "plain.png", 7).rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert source.read(0)[0, 0, 0] == 7
    source.describe(0).encode("utf-8")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "the folder is empty"),
        (lambda path: (path / "a.txt").write_text(""), r"no image .*\.jpg .*\.npy.* it holds 1 \.txt"),
        (lambda path: save(path / ".cache" / "a.png"), r"it holds 1 hidden file or folder \(\.cache\)"),
    ],
)
def test_a_folder_without_images_says_what_was_looked_for(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(BadInput, match=message) as raised:
        open_source(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        open_source(tmp_path / "missing")
    with pytest.raises(BadInput, match=r"a\.png: is a single file; give a folder"):
        open_source(save(tmp_path / "a.png"))


def test_folders_that_may_not_be_read_are_counted_and_one_alone_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_source(tmp_path).summary() == (
        f"{tmp_path}: 1 image (1 .png); skipped: 1 folder that cannot be read (locked/: Permission denied)"
    )
    with pytest.raises(BadInput, match=r"locked: this folder cannot be read \(Permission denied\)"):
        open_source(tmp_path / "locked")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permissions_of_the_real_file_system(tmp_path):
    save(tmp_path / "a.png").chmod(0)
    with pytest.raises(BadImage, match="cannot be read"):
        open_source(tmp_path).read(0)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    assert "1 folder that cannot be read" in open_source(tmp_path).summary()
    locked.chmod(0o700)


# classes and splits -----------------------------------------------------------------------------


def test_class_folders_are_labels(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/more/3.png", "eel/4.png"):
        save(tmp_path / name)
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog", "eel")
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1, 2]
    save(tmp_path / "loose.png")
    assert open_source(tmp_path).labels is None  # one image outside: not class folders


def test_one_folder_is_no_classification(tmp_path):
    save(tmp_path / "images" / "1.png")
    assert open_source(tmp_path).labels is None


@pytest.fixture
def splits(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "train/eel/3.png", "val/cat/4.png", "val/eel/5.png"):
        save(tmp_path / name)
    return tmp_path


def test_held_out_images_stay_unseen_unless_asked_for(splits):
    assert open_source(splits).location == splits / "train"
    assert names(open_source(splits)) == names(open_source(splits, "train"))
    assert len(open_source(splits, "val")) == 2
    assert open_source(splits, held_out=True).location == splits / "val"
    assert len(open_source(splits / "train", held_out=True)) == 3  # no splits in there


def test_test_and_val_stand_for_each_other(splits):
    assert open_source(splits, "test").location == splits / "val"
    save(splits / "test" / "cat" / "6.png")
    assert open_source(splits, "test").location == splits / "test"


def test_splits_number_their_classes_alike(splits):
    held_out = open_source(splits, "val")  # without a dog
    assert held_out.class_names == open_source(splits, "train").class_names == ("cat", "dog", "eel")
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [0, 2]


def test_missing_splits_are_named(splits, tmp_path):
    with pytest.raises(BadInput, match="'nonsense' is not a split; there are train, val, test"):
        open_source(splits, "nonsense")
    with pytest.raises(BadInput, match="no split 'test' here; it has no splits"):
        open_source(splits / "train", "test")


# .npz packs -------------------------------------------------------------------------------------


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pack_arrays(count: int = 5) -> dict[str, Any]:
    files = [png(i) for i in range(count)]
    return {
        "data": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(count) % 2,
        "class_names": np.array(["even", "odd"]),
        "file_names": np.array([f"{i}.png" for i in range(count)]),
    }


@pytest.mark.parametrize("save_pack", [np.savez, np.savez_compressed])
def test_packs_hold_images_labels_and_names(tmp_path, save_pack):
    save_pack(tmp_path / "train.npz", **pack_arrays())
    for source in (open_source(tmp_path / "train.npz"), open_source(tmp_path)):
        source = pickle.loads(pickle.dumps(source))
        assert [source.read(i)[0, 0, 0] for i in range(len(source))] == [0, 1, 2, 3, 4]
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1, 0, 1, 0]
        assert source.class_names == ("even", "odd")
        assert source.describe(3) == f"{tmp_path}/train.npz[3.png]"


def test_packs_need_only_data_and_offsets(tmp_path):
    arrays = pack_arrays()
    np.savez(tmp_path / "bare.npz", data=arrays["data"], offsets=arrays["offsets"])
    source = open_source(tmp_path / "bare.npz")
    assert source.labels is None
    assert source.describe(3) == f"{tmp_path}/bare.npz[3]"


def test_names_in_packs_are_printed_on_one_line(tmp_path):
    arrays = {**pack_arrays(1), "labels": np.zeros(1, np.int64), "file_names": np.array(["a\x1b[31m\nb"])}
    np.savez(tmp_path / "pack.npz", **arrays)
    assert open_source(tmp_path / "pack.npz").describe(0) == rf"{tmp_path}/pack.npz[a\x1b[31m\nb]"


def test_splits_of_packs(tmp_path):
    np.savez(tmp_path / "train.npz", **pack_arrays(5))
    np.savez(tmp_path / "test.npz", **pack_arrays(3))
    assert [len(open_source(tmp_path, split)) for split in (None, "train", "test", "val")] == [5, 5, 3, 3]
    assert len(open_source(tmp_path, held_out=True)) == 3
    with pytest.raises(BadInput, match="one file has no split 'test'"):
        open_source(tmp_path / "train.npz", "test")


def test_what_a_worker_is_sent_does_not_grow_with_the_data(tmp_path):
    arrays = pack_arrays()
    arrays["data"] = np.concatenate([arrays["data"], np.zeros(5_000_000, np.uint8)])
    np.savez(tmp_path / "large.npz", **arrays)
    source = open_source(tmp_path / "large.npz")
    assert len(pickle.dumps(source)) < 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "this pack lacks data"),
        ({"offsets": None}, "this pack lacks offsets"),
        ({"data": np.zeros((9, 9), np.uint8)}, r"data is uint8 \[9, 9\], expected uint8 \[bytes\]"),
        ({"data": np.zeros(9, np.int32)}, "data is int32"),
        ({"offsets": np.array([0, 5, 3, 9, 10, 11])}, "must not decrease"),
        ({"offsets": np.array([-1, 5, 6, 9, 10, 11])}, ">= 0"),
        ({"offsets": np.array([0, 5, 6, 9, 10, 10**9])}, "offsets end at 1000000000, beyond the"),
        ({"offsets": np.array([0.0, 1.0])}, "offsets are float64"),
        ({"offsets": np.array([0])}, "has no image"),
        ({"labels": np.arange(4)}, "4 labels for 5 images"),
        ({"labels": np.arange(5)}, "labels run from 0 to 4 of 2 classes"),
        ({"labels": np.zeros(5)}, "labels are float64"),
        ({"file_names": np.array(["a"])}, "1 file_names for 5 images"),
        ({"labels": np.int64(1)}, r"labels have the shape \[\], expected one dimension"),
        ({"class_names": np.array("cat")}, r"class_names have the shape \[\]"),
        ({"file_names": np.array("a")}, r"file_names have the shape \[\]"),
        ({"file_names": np.array([["a"]] * 5)}, r"file_names have the shape \[5, 1\]"),
        ({"file_names": np.array(["\ud800"] * 5)}, "not a readable .npz pack"),
    ],
)
def test_packs_that_do_not_fit_are_refused(tmp_path, change, message):
    arrays = {key: value for key, value in (pack_arrays() | change).items() if value is not None}
    np.savez(tmp_path / "pack.npz", **arrays)
    with pytest.raises(BadInput, match=rf"pack\.npz: .*{message}"):
        open_source(tmp_path / "pack.npz")


def test_damaged_packs_are_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", **pack_arrays())
    data = (tmp_path / "whole.npz").read_bytes()
    flags = data.index(b"PK\1\2") + 8  # of the first member, in the central directory
    locked = data[:flags] + b"\1" + data[flags + 1 :]
    damaged = {"words": b"not a pack", "empty": b"", "half": data[: len(data) // 2], "locked": locked}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}\.npz: not a readable"):
            open_source(path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(BadInput, match=r"single\.npz: not a readable"):
        open_source(tmp_path / "single.npz")


def test_packs_are_never_unpickled(tmp_path):
    arrays: dict[str, Any] = {**pack_arrays(), "class_names": np.array(["a", None], object)}
    np.savez(tmp_path / "pack.npz", **arrays)
    with pytest.raises(BadInput, match="not a readable"):
        open_source(tmp_path / "pack.npz")


# the rest ---------------------------------------------------------------------------------------


def test_arrays_are_a_source():
    images = [np.zeros((20, 30), np.uint8), np.ones((20, 30, 3), np.uint16), np.full((40, 50, 3), np.nan)]
    source = ArraySource(images, labels=np.array([1, 0, 1]), location=Path("memory"))
    assert source.read(0).shape == (20, 30, 1)
    assert source.read(0, channels=3).shape == (20, 30, 3)
    assert source.read(1).dtype == np.uint16
    with pytest.raises(BadImage, match=r"memory\[2\]: every value is nodata, NaN"):
        source.read(2)


def test_labels_at_hand_do_not_change_when_the_source_goes_to_workers():
    """Sending it moves its tensors to shared memory: what looked into the old one would look at anything."""
    source = ArraySource([np.zeros((4, 4), np.uint8)] * 3, labels=np.array([2, 0, 1]))
    assert source.labels is not None and source._labels is not None
    assert not np.shares_memory(source.labels, source._labels.numpy())
    assert source.labels.tolist() == [source.label(i) for i in range(3)] == [2, 0, 1]
    assert ArraySource([np.zeros((4, 4), np.uint8)]).label(0) is None


def test_names_keep_any_string():
    strings = ["", "a", "ü/☃.png", "\udce9", "a" * 1000]
    kept = Names(strings)
    assert list(kept) == strings
    assert len(Names([])) == 0


def test_many_names_cost_little():
    strings = [f"n{i:08d}/image_{i}.jpg" for i in range(50_000)]
    assert len(pickle.dumps(Names(strings))) < 1.5 * sum(map(len, strings))


def test_a_folder_source_knows_its_root(tmp_path):
    save(tmp_path / "a.png")
    assert FolderSource(tmp_path).location == tmp_path
