"""WebDataset shards: the same samples as the real `webdataset` package and `tarfile` see, at random."""

import gzip
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.writer import TarWriter

from coma.data import open_source
from coma.data.sources.open import expand_braces
from coma.data.sources.webdataset import index_shard
from coma.errors import BadImage, BadInput


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(path: Path, samples: list[dict]) -> None:
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def test_shards_of_the_webdataset_package(tmp_path):
    for shard in range(3):
        samples = [
            {"__key__": f"{shard}/{i:04d}", "png": png(10 * shard + i), "cls": i % 2, "json": {"a": 1}}
            for i in range(4)
        ]
        write_webdataset(tmp_path / f"set-{shard:02d}.tar", samples)
    for path in (tmp_path, tmp_path / "set-{00..02}.tar", tmp_path / "set-{00,01,02}.tar"):
        source = pickle.loads(pickle.dumps(open_source(path)))
        assert len(source) == 12
        assert source.labels is not None
        assert source.labels.tolist() == [0, 1] * 6
        order = np.random.default_rng(0).permutation(12)
        assert [source.read(i)[0, 0, 0] for i in order] == [i // 4 * 10 + i % 4 for i in order]
    assert open_source(tmp_path).describe(5) == f"{tmp_path}/set-01.tar[1/0001.png]"
    assert len(open_source(tmp_path / "set-01.tar")) == 4


def test_labels_come_from_cls_or_json_or_are_missing(tmp_path):
    def labels_of(*extras: dict[str, bytes]) -> list[int] | None:
        members = {}
        for i, extra in enumerate(extras):
            members |= {f"{i}.png": png(i)} | {f"{i}.{suffix}": text for suffix, text in extra.items()}
        labels = open_source(write_tar(tmp_path / "a.tar", members)).labels
        return None if labels is None else labels.tolist()

    assert labels_of({"cls": b"3"}, {"cls": b" 12\n"}) == [3, 12]
    assert labels_of({"json": b'{"label": 4, "x": 1}'}, {"json": b'{"label": 5}'}) == [4, 5]
    assert labels_of({"json": b'{"label": 4}', "cls": b"1"}) == [4]  # the first that is there
    assert labels_of({"json": b"{}", "CLS": b"1"}) == labels_of({"cls": b"x", "CLS": b"1"}) == [1]
    assert labels_of({"cls": b"3"}, {}) is None
    assert labels_of({"json": b'{"caption": "a cat"}'}, {"json": b"[1]"}) is None
    for text in (b"cat", b"-1", b"1.5", b"9" * 30, b"\xff", b""):
        assert labels_of({"cls": text}, {"cls": b"1"}) is None
    for text in (b"{", b'{"label": true}', b'{"label": 1.5}', b"[" * 100_000):
        assert labels_of({"json": text}) is None


def test_a_sample_without_a_usable_label_is_named(tmp_path):
    def why(last: dict[str, bytes]) -> str:
        members = {
            f"{i}.{kind}": png(i) if kind == "png" else b"1" for i in range(3) for kind in ("png", "cls")
        }
        return open_source(write_tar(tmp_path / "a.tar", members | last)).unlabelled_reason

    assert why({}) == ""
    assert why({"3.png": png(3)}).startswith(
        f"{tmp_path}/a.tar[3.png] has no label (a whole number in a .cls file)"
    )
    assert "a.tar: the label in 3.cls is not a whole number from 0 (so 1 of 4 samples have none)" in why(
        {"3.png": png(3), "3.cls": b"cat"}
    )
    assert (
        open_source(write_tar(tmp_path / "b.tar", {"1.png": png(0), "2.png": png(1)})).unlabelled_reason == ""
    )


def test_one_image_per_sample_whatever_else_it_holds(tmp_path):
    members = {
        "a/x.seg.png": png(1), "a/x.png": png(2), "a/x.txt": b"words",  # seg.png is not the image
        "b/x.JPG": png(3), "b/x.png": png(4),  # the first of two
        "c.txt": b"no image here",
        "._d.png": b"resource fork", ".e.png": png(5),
        "f.tar.png": png(6), "__MACOSX/g.png": png(7), ".cache/h.png": png(8), "./i.png": png(9),
    }  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert [source.read(i)[0, 0, 0] for i in range(len(source))] == [2, 3, 6, 9]
    assert source.summary() == (
        f"{tmp_path}/a.tar: 4 images (3 .png, 1 .jpg); skipped: 1 .txt (not read), "
        "2 further images of samples (a.tar[a/x.seg.png], a.tar[b/x.png]), "
        "3 hidden files or folders (a.tar[._d.png], a.tar[.e.png], a.tar[.cache/h.png]), "
        "1 system folder (a.tar[__MACOSX/g.png])"
    )


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.text("ab/_-é☃", max_size=300).map("k{}k".format), min_size=1, max_size=8, unique=True),
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    sizes=st.lists(st.integers(0, 1500), min_size=8, max_size=8),
)  # fmt: skip
def test_members_lie_where_tarfile_finds_them(tmp_path_factory, names, kind, sizes):
    if kind == tarfile.USTAR_FORMAT:  # holds 100 bytes of name behind 155 of folders
        names = {f"{'folder/' * (len(name) % 20)}{name[:9].replace('/', '_')}": 0 for name in names}
    members = {f"{name}.npy": bytes(size) for name, size in zip(names, sizes, strict=False)}
    path = write_tar(tmp_path_factory.getbasetemp() / "reference.tar", members, kind)
    with tarfile.open(path) as tar:
        want = [(info.name, info.offset_data, info.size) for info in tar]
    assert [tuple(sample.image)[:3] for sample in index_shard(path)[0]] == want


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_beyond_8_gib_do_not_hide_what_follows(tmp_path, kind):
    info = tarfile.TarInfo("large.npy")
    info.size = (8 << 30) + 100
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf(kind))
        start = file.tell()
        file.seek(start + (8 << 30) + 512)  # a hole: takes no space on the disk
        info.name, info.size = "small.npy", 0
        file.write(info.tobuf(kind))
    large, small = (sample.image for sample in index_shard(tmp_path / "a.tar")[0])
    assert (large.name, large.start, large.size) == ("large.npy", start, (8 << 30) + 100)
    assert (small.name, small.size) == ("small.npy", 0)


def test_folders_links_and_devices_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("other.png")
            info.type, info.linkname = kind, "x.png" * 40  # a long link name takes a header of its own
            tar.addfile(info)
        info = tarfile.TarInfo("x.png")
        info.size = len(png(9))
        tar.addfile(info, io.BytesIO(png(9)))
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 1
    assert source.read(0)[0, 0, 0] == 9
    assert source.summary().endswith(
        "1 image (1 .png); skipped: 1 special file (a.tar[other.png]), "
        "1 link to no file of its shard (a.tar[other.png])"
    )


def test_dots_in_names_hide_no_image(tmp_path):
    """What WebDataset takes for the field of a sample may be the rest of a name: 8 of 12 once vanished."""
    dotted = [f"IMG_2024.05.{day:02d}.jpg" for day in range(1, 9)]
    members = {f"{i}.png": png(i) for i in range(3)} | {"v1.0_final.png": png(3)}
    members |= {name: png(10 + i) for i, name in enumerate(dotted)}
    members |= {"IMG_2024.05.01.cls": b"7", "pair.left.png": png(30), "pair.right.png": png(31)}
    members |= {"photo.png": png(40), "photo.1.png": png(41), "photo.2.png": png(42), "photo.cls": b"5"}
    members |= {"IMG_0001": png(50), "notes": b"words"}
    source = open_source(write_tar(tmp_path / "a.tar", members))
    read = [int(source.read(i)[0, 0, 0]) for i in range(len(source))]
    assert read == [*range(4), *range(10, 18), 30, 31, 40, 41, 42, 50]
    labels = {sample.image.name: sample.label for sample in index_shard(tmp_path / "a.tar")[0]}
    assert (labels["IMG_2024.05.01.jpg"], labels["IMG_2024.05.02.jpg"], labels["photo.1.png"]) == (7, None, 5)
    assert source.summary() == (
        f"{tmp_path}/a.tar: 18 images (9 .png, 8 .jpg, 1 without extension); "
        "skipped: 1 without extension (not read)"
    )


def test_many_images_with_one_name_before_the_first_dot_are_indexed_in_linear_time(tmp_path):
    def calls(images: int) -> int:
        """Number of function calls, in Python and in C, that index a shard."""
        members = {f"frame.{i:06d}.jpg": b"\xff\xd8\xff\xe0" for i in range(images)}
        path, events = write_tar(tmp_path / "a.tar", {**members, "frame.000007.CLS": b"3"}), []
        sys.setprofile(lambda _, event, __: events.append(event) if event.endswith("call") else None)
        try:
            samples, _ = index_shard(path)
        finally:
            sys.setprofile(None)
        assert [i for i, sample in enumerate(samples) if sample.label == 3] == [7]
        return len(events)

    assert calls(400) < 2.2 * calls(200)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_links_inside_a_shard_are_followed(tmp_path, kind):
    long = "folder/" * 20 + "deep.png"  # a link name of its own header
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for name, value in ((long, 1), ("x.png", 2)):
            info = tarfile.TarInfo(name)
            info.size = len(png(value))
            tar.addfile(info, io.BytesIO(png(value)))
        for name, how, target in (
            ("hard.png", tarfile.LNKTYPE, long),
            ("folder/soft.png", tarfile.SYMTYPE, "../x.png"),
            ("chain.png", tarfile.SYMTYPE, "hard.png"),
            ("outside.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("circle.png", tarfile.SYMTYPE, "circle.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = how, target
            tar.addfile(info)
    source = open_source(tmp_path / "a.tar")
    assert [int(source.read(i)[0, 0, 0]) for i in range(len(source))] == [1, 2, 1, 2, 1]
    assert source.describe(3) == f"{tmp_path}/a.tar[folder/soft.png]"
    assert source.summary().endswith(
        "5 images (5 .png); skipped: 2 links to no file of their shard "
        "(a.tar[outside.png], a.tar[circle.png])"
    )


def test_what_lies_beside_shards_is_counted(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(0)})
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "more").mkdir()
    (tmp_path / "folder.tar").mkdir()
    assert open_source(tmp_path).summary() == (
        f"{tmp_path}: 1 image (1 .png); skipped: 3 entries beside the shards (folder.tar, more, b.png)"
    )


def test_class_names_stand_in_the_index(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": png(0), "1.cls": b"1"})
    (tmp_path / "index.json").write_text(json.dumps({"class_names": ["cat", "dog"]}))
    assert open_source(tmp_path).class_names == ("cat", "dog")
    (tmp_path / "index.json").write_text(json.dumps({"class_names": ["cat"]}))
    with pytest.raises(BadInput, match=r"labels run from 1 to 1, but index\.json names 1 classes"):
        open_source(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(BadInput, match=r"index\.json: not a readable index"):
        open_source(tmp_path)
    (tmp_path / "index.json").write_text('{"finished": false}')
    with pytest.raises(BadInput, match="unfinished; run the same `coma pack` again"):
        open_source(tmp_path)


def test_damaged_shards_are_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.png": png(i) * 20 for i in range(5)}).read_bytes()

    def message(content: bytes) -> str:
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(BadInput) as raised:
            open_source(tmp_path / "a.tar")
        return str(raised.value).removeprefix(f"{tmp_path}/a.tar: ")

    assert message(b"words" * 500) == "not a tar file"
    assert message(whole[:3000]) == "truncated in the middle of 1.png"
    assert message(whole[:200]) == "not a tar file"
    assert message(gzip.compress(whole)).startswith("compressed shards cannot be read at random")
    second = whole.index(b"1.png")
    assert message(whole[:second] + b"?" + whole[second + 1 :]) == f"damaged at byte {second}"
    assert message(b"").startswith("no image in 1 shard (")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(BadInput, match="unpack it to a plain"):
        open_source(tmp_path / "b.tar.gz")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "records",
    [
        b"0 a=b\n",  # never ends if lengths are added up
        b"-6 a=b\n",
        b"99 a=b\n",
        b"hello world=1\n",
        b"7",
        b"11 \xff\xfe=ab\n",
        b"14 size=words\n",
    ],
)
def test_damaged_pax_headers_are_named(tmp_path, records):
    def member(name: str, kind: bytes, content: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(content)
        return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)

    content = member("x", tarfile.XHDTYPE, records) + member("a.png", tarfile.REGTYPE, png(0)) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.tar: (not a tar file|damaged at byte 1024)"):
        open_source(tmp_path / "a.tar")


def test_missing_shards_are_named(tmp_path):
    write_tar(tmp_path / "s-0.tar", {"0.png": png(0)})
    with pytest.raises(BadInput, match=r"s-1\.tar: this shard is missing"):
        open_source(tmp_path / "s-{0..2}.tar")


def test_a_shard_that_shrinks_is_a_bad_image(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1)})
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:1500])
    assert source.read(0).shape == (4, 5, 3)
    with pytest.raises(BadImage, match=r"a\.tar\[1\.png\]: the file became shorter"):
        source.read(1)
    path.unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        source.read(0)


def test_braces():
    assert expand_braces("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert expand_braces("{a,b}-{1..2}.tar") == ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for pattern in ("{5..1}.tar", "{a}.tar", "{a..b}.tar"):
        with pytest.raises(BadInput, match="neither a range"):
            expand_braces(pattern)
