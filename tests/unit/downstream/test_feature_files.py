"""Files of features: both formats keep everything, and damaged or hostile ones are refused in one line."""

import errno
import json
import os
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_files import SPEC, features, info, vectors

from coma.errors import BadInput
from downstream.features import files as module
from downstream.features.files import FeaturesFile, Rows, storable, write_features

NAMES = ["a.png", "b/c d.png", "ä ö.png", "x" * 300]


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
@pytest.mark.parametrize("shape", [(8,), (8, 2, 3)])
def test_both_formats_keep_everything(tmp_path, suffix, shape):
    values = vectors(4, 8 * int(np.prod(shape[1:]))).reshape(4, *shape)
    path = features(tmp_path / f"f{suffix}", values, NAMES, skipped=("x: broken",))
    file = FeaturesFile(path)
    assert (len(file), file.paths(), file.info.skipped) == (4, NAMES, ("x: broken",))
    groups = list(file.groups())
    assert [name for rows in groups for name in rows.paths] == NAMES
    assert np.array_equal(np.concatenate([rows.values for rows in groups]), values)
    assert file.info.spec == replace(SPEC, shape=shape)


def test_a_parquet_file_is_read_by_any_program_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 3 * 8 * 4)
    values = vectors(10)
    parts = [Rows([f"{i}.png"], values[i : i + 1]) for i in range(10)]
    write_features(tmp_path / "f.parquet", info(count=10), parts, 10)
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 4
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["path", "feature"]
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), values)
    assert json.loads(table.schema.metadata[b"coma.features"])["spec"]["sha256"] == SPEC.sha256


def test_an_npz_file_is_numpys(tmp_path):
    values = vectors(5)
    with np.load(features(tmp_path / "f.npz", values), allow_pickle=False) as pack:
        assert set(pack.files) == {"path", "feature", "metadata"}
        assert np.array_equal(pack["feature"], values)


def test_names_that_are_not_utf8_become_escapes():
    assert storable("ä.png") == "ä.png"
    assert storable(os.fsdecode(b"\xe4.png")) == "\\xe4.png"


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_full_disk_leaves_what_was_there(tmp_path, suffix, monkeypatch):
    path = features(tmp_path / f"f{suffix}", vectors(4))
    before = path.read_bytes()

    def full(number, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        features(path, vectors(40))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


class Exploit:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_pickled_objects_are_never_unpickled(tmp_path):
    trap = tmp_path / "executed"
    np.savez(tmp_path / "f.npz", path=np.array([Exploit(trap)], object), feature=vectors(1), metadata="{}")
    with pytest.raises(BadInput, match=r"damaged, or not a file of features .*allow_pickle"):
        FeaturesFile(tmp_path / "f.npz")
    assert not trap.exists()
    with np.load(tmp_path / "f.npz", allow_pickle=True) as pack:
        _ = pack["path"]
    assert trap.exists()  # the trap works


def _parquet(path, changes):
    plain = {"path": pa.array(["a", "b"]), "feature": pa.array([[1.0] * 8] * 2, pa.list_(pa.float32(), 8))}
    table = pa.table({**plain, **changes})
    text = features(path.with_name("good.parquet"), vectors(2))
    pq.write_table(table.replace_schema_metadata(pq.read_schema(text).metadata), path)


DAMAGE = {
    "missing": (lambda path: None, "no such file"),
    "no-suffix": (lambda path: path.write_bytes(b"x"), "not a file of features"),
    "text.parquet": (lambda path: path.write_text("hello"), "damaged, or not a file of features"),
    "text.npz": (lambda path: path.write_text("hello"), "damaged, or not a file of features"),
    "pickle.npz": (lambda path: path.write_bytes(pickle.dumps({})), "damaged, or not a file of features"),
    "empty.parquet": (lambda path: path.write_bytes(b""), "damaged, or not a file of features"),
    "pipe.parquet": (os.mkfifo, "is not a regular file"),
    "folder.parquet": (lambda path: path.mkdir(), "is not a regular file"),
    "foreign.parquet": (
        lambda path: pq.write_table(pa.table({"path": ["a"], "feature": [[1.0]]}), path),
        "was not written by coma embed",
    ),
    "foreign.npz": (lambda path: np.savez(path, data=np.zeros(3)), "was not written by coma embed"),
    "cut.parquet": (
        lambda path: path.write_bytes(features(path, vectors(50)).read_bytes()[:-40]),
        "damaged, or not a file of features",
    ),
    "cut.npz": (
        lambda path: path.write_bytes(features(path, vectors(50)).read_bytes()[:-40]),
        "damaged, or not a file of features",
    ),
    "types.parquet": (lambda path: _parquet(path, {"path": pa.array([1, 2])}), "its columns are not those"),
    "width.parquet": (
        lambda path: _parquet(path, {"feature": pa.array([[1.0] * 9] * 2, pa.list_(pa.float32(), 9))}),
        r"features of shape \[9\], described as \[8\]",
    ),
    "none.parquet": (lambda path: features(path, vectors(0)), "has no image"),
    "none.npz": (lambda path: features(path, vectors(0)), "has no image"),
    "lengths.npz": (
        lambda path: np.savez(path, path=np.array(["a"]), feature=vectors(2), metadata=np.array("{}")),
        "1 paths for 2 features",
    ),
    "json.npz": (
        lambda path: np.savez(path, path=np.array(["a"]), feature=vectors(1), metadata=np.array("{")),
        "its description is not readable",
    ),
    "newer.npz": (
        lambda path: np.savez(
            path, path=np.array(["a"]), feature=vectors(1), metadata=np.array('{"format_version": 9}')
        ),
        "format 9, but this version reads 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path, name):
    make, message = DAMAGE[name]
    make(tmp_path / name)
    with pytest.raises(BadInput, match=message) as refused:
        list(FeaturesFile(tmp_path / name).groups())
    assert "\n" not in str(refused.value) and name in str(refused.value)


def test_damage_inside_is_found_when_it_is_read(tmp_path):
    path = features(tmp_path / "f.parquet", vectors(200))
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"f.parquet: damaged"):
        list(FeaturesFile(path).groups())


def test_a_member_that_promises_more_than_memory_is_refused(tmp_path):
    path = tmp_path / "f.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in (("path", np.array(["a"])), ("metadata", np.array("{}"))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, value)
        with archive.open("feature.npy", "w") as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 20)}
            np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(BadInput, match=r"f.npz: damaged"):
        FeaturesFile(path)
