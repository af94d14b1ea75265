"""Remote shards: images as on a local disk, servers that fail, and no secrets in messages."""

import io
import json
import logging
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from remote_files import FileServer, impatient, server  # noqa: F401 (fixtures)

from coma.config import PretrainConfig
from coma.config.serialization import from_plain, to_plain
from coma.data import ArraySource, open_source, remote, retries
from coma.data.listing import changes, list_data
from coma.data.loader import evaluation_batches
from coma.data.remote import RemoteFile, RemoteReader, open_file
from coma.data.retries import RetryPolicy
from coma.errors import BadImage, BadInput
from coma.paths import Address, local_path, parse_location

SECRET = "sig=hush&token=quiet"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, first: int, count: int = 4) -> Path:
    """Writes pictures with labels, and one file without an extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            name = f"{i:03}" + (".png" if i % 4 else "")
            for member, content in {name: png(i), f"{i:03}.cls": str(i % 3).encode()}.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(server: FileServer) -> FileServer:  # noqa: F811
    for k in range(3):
        write_shard(server.folder / f"photos-{k:02}.tar", 4 * k)
    return server


def red(source) -> list[int]:
    return [int(source.read(i)[0, 0, 0]) for i in range(len(source))]


# the same images --------------------------------------------------------------------------------


def test_images_are_those_on_the_local_disk(shards):
    local = open_source(shards.folder)
    there = open_source(f"{shards.url}/photos-{{00..02}}.tar")
    assert red(there) == red(local) == list(range(12))
    assert there.labels is not None
    assert local.labels is not None
    assert there.labels.tolist() == local.labels.tolist()
    assert there.listing() == local.listing()
    assert there.describe(5) == f"{shards.url}/photos-01.tar[005.png]"
    assert len(pickle.dumps(there)) < 5000
    assert red(pickle.loads(pickle.dumps(there))) == red(local)


def test_headers_are_read_in_windows_and_images_many_at_a_time(shards):
    source = open_source(f"{shards.url}/photos-00.tar")
    assert len(shards.requests) < 5  # size, one window, no index.json
    before = len(shards.requests)
    source.prefetch(range(4))
    assert red(source) == [0, 1, 2, 3]
    assert len(shards.requests) - before == 4


def test_memory_and_class_names_and_splits(tmp_path):
    files = fsspec.filesystem("memory")
    for name, first in (("train-0", 0), ("train-1", 4), ("test-0", 8)):
        files.pipe(f"/pack/{name}.tar", write_shard(tmp_path / f"{name}.tar", first).read_bytes())
    files.pipe("/pack/index.json", json.dumps({"class_names": ["a", "b", "c"]}).encode())
    try:
        train, test = open_source("memory://pack"), open_source("memory://pack/", "test")
        assert red(train) == list(range(8))
        assert red(test) == [8, 9, 10, 11]
        assert train.class_names == ("a", "b", "c")
        assert (train.split, test.split) == ("train", "test")
        assert "test-0.tar" in train.notes[0]
        with pytest.raises(BadInput, match=r"memory://pack/none: no such file or folder"):
            open_source("memory://pack/none")
        files.pipe("/photos/a.jpg", b"")
        with pytest.raises(BadInput, match=r"no \.tar shard .* it holds a.jpg; .*coma pack"):
            open_source("memory://photos")
        for folder in ("pack", "photos"):
            with pytest.raises(BadInput, match=r"lacks|only .tar|is a folder|no such|no \.tar"):
                open_source(f"memory://{folder}/x.npz")
    finally:
        files.rm("/pack", recursive=True)
        files.rm("/photos", recursive=True)


# faults of servers ------------------------------------------------------------------------------


def test_every_tenth_request_fails(shards, caplog):
    shards.fails_every = 10
    with caplog.at_level(logging.WARNING):
        source = open_source(f"{shards.url}/photos-{{00..02}}.tar")
        for _ in range(2):
            assert red(source) == list(range(12))
        list(evaluation_batches(source, image_size=4, channels=3, batch_size=4, workers=0))
    assert "1 request was repeated; the last: " in caplog.text
    repeated = len(shards.requests) // 10
    assert repeated > 3
    assert f"{repeated} requests were repeated; the last: {shards.url}/photos-0" in caplog.text
    assert "the server answers 503" in caplog.text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"seconds": 0.5}, r"no answer within 0\.1 seconds; gave up after 4 attempts .* check the address"),
        ({"status": 500}, r"the server answers 500 .*; gave up after 4 attempts"),
        ({"status": 403}, r"the server answers 403 Forbidden; check the credentials$"),
        ({"status": 404}, r"no such file or folder$"),
        ({"has_ranges": False}, r"the server ignores requests for ranges of bytes.*copy the files"),
    ],
    ids=lambda each: str(each)[:20],
)
def test_what_does_not_pass_is_one_message(shards, monkeypatch, fault, message):
    if "seconds" in fault:
        monkeypatch.setattr(retries, "POLICY", RetryPolicy(attempts=4, first_pause=0.01, seconds=0.1))
    for name, value in fault.items():
        setattr(shards, name, value)
    with pytest.raises(BadInput, match=message) as caught:
        open_source(f"{shards.url}/photos-00.tar?{SECRET}")
    assert str(caught.value).startswith(f"{shards.url}/photos-00.tar?***: ")
    assert "hush" not in str(caught.value)
    if fault.get("status") in (403, 404) or "has_ranges" in fault:
        assert len(shards.requests) == 1


def test_a_server_that_dies_ends_in_one_message(shards):
    source = open_source(f"{shards.url}/photos-{{00..02}}.tar")
    shards.status = 502
    with pytest.raises(BadInput, match=r"photos-00.tar: the server answers 502.*--resume"):
        next(evaluation_batches(source, image_size=4, channels=3, batch_size=4, workers=0))
    nobody = Address("http://127.0.0.1:9/a.tar")
    with pytest.raises(BadInput, match=r"Cannot connect to host.*gave up"):
        open_file(nobody)


def test_a_server_that_sends_whole_files_sends_little(shards):
    source = open_source(f"{shards.url}/photos-00.tar")
    (shards.folder / "photos-00.tar").write_bytes(bytes(1 << 24))
    shards.has_ranges = False
    with pytest.raises(BadInput, match="ignores requests for ranges"):
        source.read_bytes(0)
    assert not shards.sent > 1 << 24


def test_shards_that_changed_are_named(shards):
    address = f"{shards.url}/photos-{{00..02}}.tar"
    before = list_data({"images": open_source(address)})
    before = json.loads(json.dumps(before))
    count = len(shards.requests)
    again = open_source(address, listing=before["images"])
    assert len(shards.requests) - count == 3  # sizes and versions alone
    assert red(again) == list(range(12))
    assert not changes(before, json.loads(json.dumps(list_data({"images": again}))))
    path = shards.folder / "photos-01.tar"
    data, facts = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1  # in the padding: names and sizes stay
    path.write_bytes(data)
    now = list_data({"images": open_source(address, listing=before["images"])})
    (line,) = changes(before, json.loads(json.dumps(now)))
    assert "1 file changed (photos-01.tar (10,240 bytes, ETag" in line
    moved = before | {
        "images": before["images"] | {"index": before["images"]["index"] | {"location": "s3://b"}}
    }
    assert not changes(moved, json.loads(json.dumps(now)))  # other storages have other versions
    damaged = before["images"] | {"index": before["images"]["index"] | {"starts": [10**9] * 12}}
    path.write_bytes(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(BadInput, match="list of its images is damaged"):
        open_source(address, listing=damaged)


# untrusted content ------------------------------------------------------------------------------


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize(
    "block",
    [
        header("a.png", b"77777777777"),
        header("a.png", b"-0000000777"),
        header("pax", b"00020000000", tarfile.XHDTYPE),
    ],
    ids=["beyond the end", "negative", "a name of 4 MB"],
)
@pytest.mark.parametrize("local", [True, False])
def test_sizes_in_headers_are_checked(shards, block, local):
    path = shards.folder / "bad.tar"
    path.write_bytes(block + bytes(5 << 20 if block[:3] == b"pax" else 1024))
    with pytest.raises(BadInput, match=r"bad.tar: (truncated|not a tar)"):
        open_source(path if local else f"{shards.url}/bad.tar")


def test_images_have_a_limit(shards, monkeypatch):
    source = open_source(f"{shards.url}/photos-00.tar")
    monkeypatch.setattr(remote, "MAX_IMAGE", 10)
    with pytest.raises(BadImage, match="bytes are more than the limit of 10 for one image"):
        source.read_bytes(0)


def test_damaged_and_empty_shards(shards):
    for name, content, message in (
        ("a.tar", b"", "no image in 1 shard"),
        ("b.tar", b"junk" * 999, "not a tar file"),
        ("c.tar", b"\x1f\x8b" + bytes(999), "compressed shards"),
    ):
        (shards.folder / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            open_source(f"{shards.url}/{name}")


# addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://host/a.tar?{SECRET}", "https://host/a.tar?***"),
        ("https://me:word@host/a.tar", "https://***@host/a.tar"),
        ("https://token@host/a.tar", "https://***@host/a.tar"),
        ("s3://KEY:SECRET@bucket/a", "s3://***@bucket/a"),
        ("abfs://box@account.example/a", "abfs://box@account.example/a"),
        ("hf://datasets/org/name@rev/data", "hf://datasets/org/name@rev/data"),
        ("HTTP://h/a.parquet?x#img", "http://h/a.parquet?***#img"),
    ],
)
def test_secrets_are_never_shown_or_saved(text, shown):
    address = parse_location(text)
    assert isinstance(address, Address)
    assert str(address) == shown
    assert shown in repr(address)
    config = PretrainConfig()
    config = replace(config, data=replace(config.data, images=address))
    plain = to_plain(config)
    assert plain["data"]["images"] == shown
    saved = from_plain(plain, PretrainConfig, source="test").data.images
    assert str(saved) == shown
    if "***" in shown:
        with pytest.raises(BadInput, match=r"was saved without its password.*give the whole address again"):
            open_source(saved)


@pytest.mark.parametrize(
    "text",
    [
        "file:///etc/passwd",
        "simplecache::s3://b/a.tar",
        "zip://a.tar::file:///x.zip",
        "filecache://x",
        "local://x",
    ],
)
def test_addresses_that_lead_elsewhere_are_refused(text):
    with pytest.raises(BadInput, match="addresses inside addresses and addresses of local files"):
        parse_location(text)


def test_missing_packages_are_named(monkeypatch):
    for text, package in (("s3://bucket/a.tar", "s3fs"), ("gs://bucket/photos", "gcsfs")):
        with pytest.raises(
            BadInput, match=rf"{text}: reading \w+:// needs a package: pip install {package}$"
        ):
            open_source(text)
    with pytest.raises(BadInput, match=r"unheard://x/a.tar: .*not known"):
        open_source("unheard://x/a.tar")


def test_what_is_written_stays_local():
    with pytest.raises(BadInput, match=r"s3://\*\*\*@b/x: only images are read from remote storage"):
        local_path("s3://k:hush@b/x")


def test_a_remote_file_as_a_file_object(shards):
    data = (shards.folder / "photos-00.tar").read_bytes()
    file = open_file(Address(f"{shards.url}/photos-00.tar"))
    assert isinstance(file, RemoteFile)
    reader = io.BufferedReader(RemoteReader(file))
    assert reader.read() == data
    assert reader.seek(-10, io.SEEK_END) == len(data) - 10
    assert reader.read(99) == data[-10:]
    with pytest.raises(BadInput, match="shorter"):
        file.read(len(data) - 1, 2)


def test_local_sources_have_no_index(tmp_path):
    write_shard(tmp_path / "a.tar", 0)
    for source in (open_source(tmp_path), ArraySource([np.zeros((4, 4), np.uint8)])):
        assert "index" not in list_data({"images": source})["images"]
