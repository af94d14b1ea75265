"""`coma pack`: images survive as they should, webdataset reads them, nothing half-done is left."""

import gc
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import data as pictures
from webdataset.compat import WebDataset

from coma.config.pack import PackConfig
from coma.data import ArraySource, Source, open_labelled, open_source
from coma.data.decode import decode
from coma.data.encode import encode, reduce_to_short_side
from coma.data.image import DecodedImage
from coma.data.pack import PackReport, pack
from coma.errors import BadInput, ComaError, Interrupted
from pretrain.commands.pack import run

ASTRONAUT = pictures.astronaut()
RNG = np.random.default_rng(0)


def pack_small(
    source: Source, out: Path, size: int = 64, shard_images: int = 4, workers: int = 0, **how
) -> PackReport:
    config = PackConfig(Path("images"), out, size, shard_images=shard_images, workers=workers)
    return pack(source, config, **how)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten photographs in two class folders, and one file that is none."""
    for i in range(10):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ASTRONAUT[i * 10 : i * 10 + 200, :300]).save(folder / f"photo.{i}.jpg", quality=95)
    (tmp_path / "photos" / "cat" / "bad.jpg").write_bytes(b"words")
    return tmp_path / "photos"


# what happens to an image -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (64, 5000), (65, 65)])
def test_large_images_are_reduced_to_the_short_side(shape):
    small = reduce_to_short_side(DecodedImage(np.zeros((*shape, 3), np.uint8)), 64).pixels
    assert min(small.shape[:2]) == 64
    assert small.shape[0] / small.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.01)


def test_small_images_are_never_enlarged():
    picture = DecodedImage(ASTRONAUT[:40, :500])
    assert reduce_to_short_side(picture, 64) is picture


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_reducing_keeps_depth_and_brightness(dtype):
    white = 1 if dtype is np.float32 else np.iinfo(dtype).max
    pixels = (ASTRONAUT / 255 * white).astype(dtype)
    small = reduce_to_short_side(DecodedImage(pixels), 64).pixels
    assert small.dtype == dtype
    assert (small / white).mean() == pytest.approx((pixels / white).mean(), abs=0.005)


@pytest.mark.parametrize(
    ("pixels", "alpha", "suffix"),
    [
        (ASTRONAUT, False, ".jpg"),
        (ASTRONAUT[:, :, :1], False, ".jpg"),
        (np.dstack([ASTRONAUT, ASTRONAUT[:, :, 0]]), True, ".png"),
        (np.dstack([ASTRONAUT, ASTRONAUT[:, :, 0]]), False, ".tif"),
        (ASTRONAUT[:, :, :2], True, ".png"),
        (RNG.integers(0, 65536, (30, 40, 1), np.uint16), False, ".png"),
        (RNG.integers(0, 65536, (30, 40, 3), np.uint16), False, ".png"),
        (RNG.integers(0, 65536, (30, 40, 4), np.uint16), True, ".png"),
        (RNG.integers(0, 65536, (30, 40, 13), np.uint16), False, ".tif"),
        (RNG.random((30, 40, 1), np.float32), False, ".tif"),
        (RNG.random((30, 40, 5), np.float32), False, ".tif"),
        *((RNG.random((30, 40, channels), np.float32), True, ".tif") for channels in (2, 4)),
        (RNG.integers(0, 256, (4, 65_501, 1), np.uint8), False, ".png"),  # no JPEG is so long
        (RNG.integers(0, 256, (65_501, 4, 3), np.uint8), False, ".png"),
    ],
)
def test_what_is_written_reads_back(pixels, alpha, suffix):
    extension, content = encode(DecodedImage(pixels, alpha), quality=95)
    back = decode(content, "x")
    assert extension == suffix
    assert back.pixels.dtype == pixels.dtype
    assert back.alpha == alpha
    if suffix == ".jpg":
        assert np.abs(back.pixels.astype(int) - pixels).mean() < 3
    else:
        assert (back.pixels == pixels).all()


# whole packs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pack_holds_the_same_images_labels_and_names(photos, tmp_path, workers):
    source = open_source(photos)
    report = pack_small(source, tmp_path / "out", workers=workers)
    packed = open_source(tmp_path / "out")
    assert (report.images, len(report.shards), len(packed)) == (10, 3, 10)
    assert packed.class_names == ("cat", "dog")
    assert packed.labels is not None
    assert packed.labels.tolist() == [0] * 5 + [1] * 5
    assert report.failures == [
        f"{photos}/cat/bad.jpg: not an image "
        "(its content is not JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, NPY or DICOM)"
    ]
    assert packed.describe(0) == f"{tmp_path}/out/shard-000000.tar[00000001-photo_1.jpg]"
    for i in range(10):
        small = packed.read(i)
        assert small.shape == (64, 96, 3)
        want = Image.fromarray(source.read(i + 1)).resize((96, 64), Image.Resampling.BICUBIC)
        assert np.abs(small.astype(int) - np.asarray(want)).mean() < 4


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its shards open
def test_the_webdataset_package_reads_a_pack(photos, tmp_path):
    pack_small(open_source(photos), tmp_path / "out")
    urls = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    dataset = WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
    samples = list(iter(dataset))  # type: ignore[call-overload]
    del dataset
    gc.collect()
    ours = open_source(tmp_path / "out")
    assert ours.labels is not None
    assert [label for _, label in samples] == ours.labels.tolist()
    for i, (image, _) in enumerate(samples):
        assert (np.asarray(image) == ours.read(i)).all()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its shards open
def test_webdataset_reads_all_that_is_packed_whatever_the_names(tmp_path):
    """Names with dots, links and hidden members: what is read is packed, and what is packed is read back."""
    names = [f"IMG_2024.05.{day:02d}.jpg" for day in range(1, 9)]
    names += ["v1.0.png", "a b.c d.jpg", "__key__.png", "-x.jpg", "ü.é.png", "x.seg.jpg", "x[1].jpg", "noext"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(names):
            buffer = io.BytesIO()
            Image.fromarray(ASTRONAUT[number : number + 70, :80]).save(buffer, "JPEG")
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            buffer.seek(0)
            tar.addfile(info, buffer)
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, names[0]
        tar.addfile(info)
    source = open_source(tmp_path / "a.tar")
    assert len(source) == len(names) + 1
    pack_small(source, tmp_path / "out", shard_images=100)
    packed = open_source(tmp_path / "out")
    assert packed.summary() == f"{tmp_path}/out: {len(source)} images ({len(source)} .jpg)"
    assert packed.describe(0).endswith("[00000000-IMG_2024_05_01.jpg]")
    url = str(tmp_path / "out" / "shard-000000.tar")
    dataset = WebDataset(url, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg")
    read = [np.asarray(image) for (image,) in iter(dataset)]  # type: ignore[call-overload]
    del dataset
    gc.collect()
    assert len(read) == len(source)
    assert all((image == packed.read(i)).all() for i, image in enumerate(read))


def test_small_jpegs_keep_their_bytes_unless_they_must_be_turned(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ASTRONAUT[:40, :50]).save(folder / "a.jpg", quality=50)
    Image.fromarray(ASTRONAUT[:40, :50]).save(folder / "b.jpg", exif=exif.tobytes())
    Image.fromarray(ASTRONAUT[:40, :50]).convert("CMYK").save(folder / "c.jpg")
    Image.fromarray(ASTRONAUT[:40, :50]).save(
        folder / "d.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
    )  # damaged
    pack_small(open_source(folder), tmp_path / "out")
    packed = open_source(tmp_path / "out")
    kept, turned, converted, damaged = (packed.read_bytes(i) for i in range(4))
    assert kept == (folder / "a.jpg").read_bytes()
    assert damaged == (folder / "d.jpg").read_bytes()
    assert kept is not None and turned is not None and converted is not None
    with Image.open(io.BytesIO(turned)) as image:
        assert image.size == (40, 50)
        assert 0x0112 not in image.getexif()
    with Image.open(io.BytesIO(converted)) as image:
        assert image.mode == "RGB"


def test_deep_and_multi_channel_images_survive(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    grey = RNG.integers(0, 65536, (40, 50), np.uint16)
    bands = RNG.random((40, 50, 6), np.float32)
    (folder / "a.png").write_bytes(imagecodecs.png_encode(grey))
    tifffile.imwrite(folder / "b.tif", bands, photometric="minisblack", planarconfig="contig")
    np.save(folder / "c.npy", np.moveaxis(bands, 2, 0))
    pack_small(open_source(folder), tmp_path / "out")
    packed = open_source(tmp_path / "out")
    assert (packed.read(0)[:, :, 0] == grey).all()
    assert (packed.read(1) == bands).all()
    assert (packed.read(2) == bands).all()


def test_arrays_and_packs_can_be_packed(tmp_path):
    source = ArraySource([ASTRONAUT[:80, :80], ASTRONAUT[:90, :100]], np.array([1, 0]), ("a", "b"))
    pack_small(source, tmp_path / "one")
    pack_small(open_source(tmp_path / "one"), tmp_path / "two")
    again = open_source(tmp_path / "two")
    assert again.class_names == ("a", "b")
    assert again.read_bytes(1) == open_source(tmp_path / "one").read_bytes(1)
    assert again.describe(1) == f"{tmp_path}/two/shard-000000.tar[00000001-1.jpg]"


# stopping and going on --------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(images: int):
    def progress(done: int) -> None:
        if done >= images:
            raise Stop

    return progress


def test_an_interrupted_pack_goes_on_and_ends_the_same(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("coma.data.pack._CHUNK", 2)
    source, out = open_source(photos), tmp_path / "out"
    with pytest.raises(Stop):
        pack_small(source, out, progress=stop_after(6))
    assert sorted(path.name for path in out.iterdir()) == [
        "index.json",
        "shard-000000.tar",
    ]  # nothing half-done
    with pytest.raises(BadInput, match="unfinished"):
        open_source(out)
    first = (out / "shard-000000.tar").stat()
    seen: list[int] = []
    report = pack_small(source, out, progress=seen.append)
    assert report.resumed == seen[0] == 4
    assert report.images == 10
    assert len(report.failures) == 1  # of the first attempt
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first.st_mtime_ns
    pack_small(source, tmp_path / "whole")
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_an_unfinished_pack_is_not_gone_on_with_from_other_images(photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack_small(open_source(photos), out, progress=stop_after(6))
    first = min(photos.rglob("*.jpg"))
    first.rename(first.with_name("another.jpg"))
    with pytest.raises(BadInput, match=r"the images in .* have changed since this pack was started"):
        pack_small(open_source(photos), out)


def test_a_finished_shard_that_was_damaged_is_made_again(photos, tmp_path):
    source, out = open_source(photos), tmp_path / "out"
    with pytest.raises(Stop):
        pack_small(source, out, progress=stop_after(11))
    (out / "shard-000000.tar").write_bytes(b"short")
    assert pack_small(source, out).resumed == 0
    assert len(open_source(out)) == 10


def test_folders_that_hold_something_else_are_left_alone(photos, tmp_path):
    source = open_source(photos)
    with pytest.raises(BadInput, match="already has other files"):
        pack_small(source, photos)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        pack_small(source, tmp_path / "file")
    pack_small(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(BadInput, match="already finished; delete the folder"):
        pack_small(source, tmp_path / "out")
    with pytest.raises(BadInput, match=r"is another pack \(size 64\)"):
        pack_small(source, tmp_path / "out", size=32)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text("[]")
    with pytest.raises(BadInput, match="not the index of a pack"):
        pack_small(source, tmp_path / "foreign")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_settings_that_make_no_sense_are_refused():
    settings: Any
    for settings in ({"size": 0}, {"shard_images": 0}, {"quality": 0}, {"quality": 96}):
        with pytest.raises(BadInput):
            PackConfig(Path("images"), Path("out"), **settings)


def test_a_source_without_one_good_image_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(
        BadInput, match=r"none of 1 images could be read; the first: .*a\.jpg: the file is empty"
    ):
        pack_small(open_source(tmp_path), tmp_path / "out")


# the command ------------------------------------------------------------------------------------


def test_the_command_packs_and_sums_up(photos, tmp_path, capsys):
    run([str(photos), "--out", str(tmp_path / "out"), "--size", "64", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "10 images in 1 shard: " in printed
    assert "images/s" in printed
    assert "1 skipped" in printed
    assert f"{photos}/cat/bad.jpg: not an image" in printed
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["finished"] is True
    assert index["shards"][0]["bytes"] == (tmp_path / "out" / "shard-000000.tar").stat().st_size


def test_the_command_packs_the_split_that_is_asked_for(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / "in" / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(ASTRONAUT[:50, :50]).save(tmp_path / "in" / split / f"{i}.png")
    for split in ("train", "val"):
        run(
            [str(tmp_path / "in"), "--out", str(tmp_path / "out" / split), "--split", split, "--workers", "0"]
        )
    assert len(open_source(tmp_path / "out")) == 3  # the shards of the training split
    assert len(open_source(tmp_path / "out", "test")) == 2


def test_a_long_image_is_packed_and_one_that_cannot_be_encoded_is_named(tmp_path, monkeypatch, capsys):
    def encode_light(image: DecodedImage, quality: int) -> tuple[str, bytes]:
        if not image.pixels.any():
            raise OSError("encoder error -2")
        return encode(image, quality)

    (tmp_path / "in").mkdir()
    for name, size, value in (("a", (40, 50), 1), ("dark", (9, 9), 0), ("long", (70_000, 16), 1)):
        Image.new("L", size, value).save(tmp_path / "in" / f"{name}.png")
    monkeypatch.setattr("coma.data.pack.encode", encode_light)
    run([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert len(open_source(tmp_path / "out")) == 2
    assert "in/dark.png: cannot be packed (encoder error -2)" in capsys.readouterr().out


def test_the_command_packs_the_labels_of_a_csv_file_and_not_those_of_folders_beside_it(photos, tmp_path):
    table, out = photos / "labels.csv", tmp_path / "out"
    table.write_text(
        "image,label,split\ncat/photo.1.jpg,b,train\ncat/photo.3.jpg,a,train\ndog/photo.0.jpg,b,val\n"
    )
    with pytest.raises(
        BadInput, match=rf"the labels of labels.csv; give {re.escape(str(table))} as the images,"
    ):
        run([str(photos), "--out", str(out), "--workers", "0"])
    run([str(table), "--out", str(out), "--workers", "0"])
    packed, labelled = open_source(out), open_labelled(photos, "train")
    assert packed.labels is not None and labelled.labels is not None
    assert packed.labels.tolist() == labelled.labels.tolist() == [1, 0]
    assert packed.class_names == labelled.class_names == ("a", "b")


def test_a_csv_file_of_one_split_is_packed_without_a_split(photos, tmp_path):
    (photos / "train.csv").write_text("image,label\ncat/photo.1.jpg,a\n")
    with pytest.raises(BadInput, match=r"train\.csv as the images, without --split, or move"):
        run([str(photos), "--out", str(tmp_path / "out"), "--split", "train", "--workers", "0"])


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (KeyboardInterrupt(), Interrupted, "run the same command again to resume"),
        (
            OSError(28, "No space left on device", "shard.tar"),
            ComaError,
            "shard.tar: No space left on device; ",
        ),
        (OSError("no reason"), ComaError, "out: no reason; when this is solved, run the same command"),
    ],
)
def test_what_stops_the_command_says_how_to_go_on(photos, tmp_path, monkeypatch, raised, expected, message):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("coma.data.pack._add", fail)
    with pytest.raises(expected, match=message):
        run([str(photos), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.json"]
