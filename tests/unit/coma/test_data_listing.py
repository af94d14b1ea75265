"""What tells images from others: their names and sizes, whatever kind of source they are in."""

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coma.data import open_source
from coma.data.listing import FILE, changes, check_listing, list_data, read_listing, write_listing
from coma.data.sources.base import ArraySource, Source
from coma.data.sources.subset import Subset
from coma.errors import BadInput

FILES = {"a.png": 10, "b.png": 20, "c.png": 30, "d.png": 40}
LATER = {"a.png": 10, "c.png": 31, "d.png": 40, "e.png": 50}


def folder(path: Path, files: dict[str, int]) -> Source:
    path.mkdir()
    for name, size in files.items():
        (path / name).write_bytes(bytes(size))
    return open_source(path)


def pack(path: Path, files: dict[str, int], **more: Any) -> Source:
    offsets = np.cumsum([0, *files.values()])
    np.savez(
        path.with_suffix(".npz"),
        data=np.zeros(offsets[-1], np.uint8),
        offsets=offsets,
        file_names=[*files],
        **more,
    )
    return open_source(path.with_suffix(".npz"))


def shard(path: Path, files: dict[str, int]) -> Source:
    path.mkdir()
    with tarfile.open(path / "0.tar", "w") as tar:
        for name, size in files.items():
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return open_source(path)


@pytest.mark.parametrize(("kind", "prefix"), [(folder, ""), (pack, ""), (shard, "0.tar/")])
def test_what_changed_is_named(tmp_path, kind, prefix):
    before, now = (
        list_data({"images": kind(tmp_path / str(len(files)), files)})
        for files in (FILES, LATER | {"f.png": 1})
    )
    assert changes(before, before) == []
    assert changes(before, now) == [
        f"the images have changed: 1 removed ({prefix}b.png), 2 added ({prefix}e.png, {prefix}f.png), "
        f"1 of another size ({prefix}c.png 30 -> 31 bytes)"
    ]


def test_arrays_and_parts_are_known_by_their_places(tmp_path):
    one, other = (
        ArraySource([np.zeros((side, 2, 3), np.uint8) for side in sides]) for sides in ((1, 2), (1, 3))
    )
    assert changes(list_data({"images": one}), list_data({"images": other})) == [
        "the images have changed: 1 of another size (1 12 -> 18 bytes)"
    ]
    part = Subset(folder(tmp_path / "photos", FILES), np.array([3, 1]))
    assert part.listing() == (["d.png", "b.png"], [40, 20])


def test_another_order_and_another_class_are_changes(tmp_path):
    files = {name: 1 for name in FILES}
    one = pack(tmp_path / "1", files, labels=np.array([0, 0, 1, 1]))
    relabelled = pack(tmp_path / "2", files, labels=np.array([0, 1, 1, 1]))
    turned = pack(tmp_path / "3", dict(reversed(files.items())), labels=np.array([1, 1, 0, 0]))
    assert changes(list_data({"training images": one}), list_data({"training images": relabelled})) == [
        "the training images have changed: 1 of another class (b.png)"
    ]
    assert changes(*(list_data({"images": each}, labels=False) for each in (one, relabelled))) == []
    assert changes(*(list_data({"images": each}) for each in (one, turned))) == [
        "the images have changed: the same images in another order"
    ]


def test_names_that_are_no_text_and_files_that_have_gone_are_listed(tmp_path):
    photos = tmp_path / "photos"
    folder(photos, FILES)
    (photos / os.fsdecode(b"\xff.png")).write_bytes(b"1")
    (photos / "z.png").write_bytes(b"1")
    source = open_source(photos)
    (photos / "z.png").unlink()
    listing = list_data({"images": source})
    write_listing(tmp_path, listing)
    assert read_listing(tmp_path) == listing
    assert dict(zip(*source.listing(), strict=True))["z.png"] == -1


@pytest.mark.parametrize(
    "content",
    [b"", b"junk", b"[]", b'{"images": {"names": ["a"], "sizes": []}}'],
)
def test_a_damaged_list_is_an_error_with_a_way_out(tmp_path, content):
    (tmp_path / FILE).write_bytes(gzip.compress(content) if content[:1] in (b"[", b"{") else content)
    with pytest.raises(
        BadInput, match=r"data\.json\.gz: the list of the run's images is damaged .*; remove it"
    ):
        check_listing(tmp_path, {}, pytest.fail, allow=False)
