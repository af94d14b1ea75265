"""NVIDIA DALI makes the samples that our own loader makes. Runs where the extra is installed."""

import importlib.util
import sys
from dataclasses import replace
from itertools import islice
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from skimage import data as pictures

from coma.config import DataConfig
from coma.data import ArraySource, BatchLayout, dali, open_source, training_batches
from coma.data.batches import OpenedImage
from coma.data.dali import CropFetcher, Jpeg
from coma.errors import BadImage, BadInput
from coma.image_size import ImageSize

HERE = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HERE, reason="the extra `dali` is not installed")

DATA = DataConfig(image_size=ImageSize.of(96), workers=0)  # too large for our decoder to reduce the scale
DALI = replace(DATA, loader="dali")
PHOTOS = [pictures.astronaut(), pictures.chelsea(), pictures.coffee(), pictures.rocket()]


@pytest.fixture
def folder(tmp_path):
    """JPEGs of several sizes, one grey, one turned by its EXIF, and a PNG."""
    for i in range(12):
        picture = Image.fromarray(PHOTOS[i % 4]).crop((i, 2 * i, 150 + 9 * i, 120 + 7 * i))
        picture.save(tmp_path / f"{i:02}.jpg", quality=95)
    Image.fromarray(PHOTOS[0][:150, :170]).convert("L").save(tmp_path / "grey.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(PHOTOS[1]).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(PHOTOS[2]).save(tmp_path / "lossless.png")
    return tmp_path


def batches(path, data, count, batch=8, start=0):
    stream = training_batches(
        open_source(path), data, channels=3, seed=0, batch=BatchLayout(batch, batch), start=start
    )
    found = list(islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return found


def assert_alike(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.seeds, other.seeds)
        assert torch.equal(one.indices, other.indices)
        assert one.failures == other.failures
        assert other.images.shape == one.images.shape
        difference = (one.images.int() - other.images.int()).abs().float()
        assert difference.mean(dim=(1, 2, 3)).max() < 1
        assert difference.max() < 60


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_samples_are_the_same(folder, workers, repeats, monkeypatch):
    monkeypatch.setattr(CropFetcher, "without_dali", lambda *_: pytest.fail("DALI did not decode"))
    data = replace(DATA, aug_repeats=repeats)
    assert_alike(batches(folder, data, 6), batches(folder, replace(data, loader="dali", workers=workers), 6))


@needs_dali
def test_it_goes_on_from_anywhere(folder):
    whole = batches(folder, DALI, 6)
    for one, other in zip(whole[2:], batches(folder, DALI, 4, start=16), strict=True):
        assert torch.equal(one.images, other.images)


@needs_dali
def test_damaged_files_are_named_and_replaced(folder):
    content = (folder / "03.jpg").read_bytes()
    (folder / "04.jpg").write_bytes(content[: len(content) // 2])  # caught before DALI: no end of image
    (folder / "05.jpg").write_bytes(content[:200] + content[-2:])  # a header, an end, and nothing between
    (folder / "06.jpg").write_bytes(b"")
    found = batches(folder, DALI, 6)
    assert_alike(batches(folder, DATA, 6), found)
    named = " ".join(failure for batch in found for failure in batch.failures)
    assert all(name in named for name in ("04.jpg", "05.jpg", "06.jpg"))
    with pytest.raises(BadImage, match=r"0[456]\.jpg"):
        batches(folder, replace(DALI, on_bad_image="stop"), 6)


@pytest.fixture
def undecodable(folder, monkeypatch):
    """A folder with two files that DALI is wrongly trusted with."""
    for name in ("02.jpg", "05.jpg"):
        (folder / name).write_bytes(b"\xff\xd8\xff" + bytes(500) + b"\xff\xd9")
    for name in ("lossless.png", "turned.jpg"):
        (folder / name).unlink()
    monkeypatch.setattr("coma.data.dali.plain_jpeg_size", lambda _: (100, 100))
    return folder


@needs_dali
def test_batches_that_dali_fails_on_are_made_without_it(undecodable, monkeypatch):
    remade, decode = [], CropFetcher.without_dali
    monkeypatch.setattr(CropFetcher, "without_dali", lambda self, at: remade.append(at) or decode(self, at))
    found = batches(undecodable, DALI, 6, batch=2)
    assert 0 < len(remade) < 6
    assert "05.jpg" in " ".join(failure for batch in found for failure in batch.failures)
    for one, other in zip(batches(undecodable, DATA, 6, batch=2), found, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert one.failures == other.failures


@needs_dali
def test_a_dali_that_never_works_is_given_up(folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("no decoder")

    monkeypatch.setattr("nvidia.dali.pipeline.Pipeline.run", broken)
    with pytest.raises(BadInput, match=r"does not work here \(no decoder\)"):
        batches(folder, DALI, 6)


@needs_dali
def test_bad_images_stop_the_run_when_their_turn_comes(folder):
    (folder / "05.jpg").write_bytes(b"")
    stops = replace(DATA, on_bad_image="stop")
    good = []
    for data in (stops, replace(stops, loader="dali")):
        stream = training_batches(open_source(folder), data, channels=3, seed=0, batch=BatchLayout(1, 1))
        with pytest.raises(BadImage, match=r"05\.jpg"):
            for batch in stream:
                good.append((data.loader, batch.indices.item()))
    ours, theirs = ([i for loader, i in good if loader == name] for name in ("workers", "dali"))
    assert ours == theirs != []


@needs_dali
def test_data_without_files_pass_through():
    tiles = ArraySource([photo[:100, :120] for photo in PHOTOS])
    stream = (
        training_batches(tiles, data, channels=3, seed=0, batch=BatchLayout(4, 4)) for data in (DATA, DALI)
    )
    one, other = (next(each) for each in stream)
    assert torch.equal(one.images, other.images)


def test_only_plain_jpegs_are_trusted_to_it(folder):
    fetch = CropFetcher(open_source(folder), DALI, 3, 0, 8)
    opened = {fetch.source.describe(i).split("/")[-1]: fetch.open(i, 0) for i in range(len(fetch.source))}
    assert isinstance(opened["00.jpg"], Jpeg)
    assert isinstance(opened["grey.jpg"], Jpeg)
    assert isinstance(opened["turned.jpg"], OpenedImage)
    assert isinstance(opened["lossless.png"], OpenedImage)


def test_dali_runs_again_when_its_pixels_are_copied(folder, monkeypatch):
    """On a GPU the copy is only begun when the batch is handed out."""
    done = []

    class Stream:
        def record_event(self):
            done.append("copy begun")
            return self

        def synchronize(self):
            done.append("copied")

    def build(fetch, begin, *_):
        def run():
            done.append("run")
            pixels = torch.zeros(len(begin()[0]), 3, 96, 96, dtype=torch.uint8)
            return (SimpleNamespace(as_tensor=lambda: pixels),)

        return SimpleNamespace(run=run)

    monkeypatch.setattr(dali, "_build", build)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    fetch = CropFetcher(open_source(folder), DALI, 3, 0, 4)
    made = dali.dali_batches(fetch, range(0, 12, 4), on_gpu=True)
    assert [len(next(made).images) for _ in range(3)] == [4, 4, 4]
    made.close()
    assert done == [*["run", "copy begun", "copied"] * 2, "run", "copy begun"]


def test_what_it_cannot_do_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", ModuleType("nvidia"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(BadInput, match="nvidia-dali-cuda130"):
        batches(folder, DALI, 1)
    monkeypatch.setitem(sys.modules, "nvidia.dali", ModuleType("nvidia.dali"))
    with pytest.raises(BadInput, match="--channels 4"):
        training_batches(open_source(folder), DALI, channels=4, seed=0, batch=BatchLayout(4, 4))
