"""The training stream: the same samples however it is cut, started, spread over workers, or damaged."""

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures

from coma.config import DataConfig
from coma.data import (
    ArraySource,
    Batch,
    BatchLayout,
    Source,
    evaluation_batches,
    open_source,
    training_batches,
    transforms,
)
from coma.data.batches import TrainingFetcher
from coma.data.shuffle import sample_seeds
from coma.errors import BadImage, BadInput
from coma.image_size import ImageSize

SIZE = 16
DATA = DataConfig(image_size=ImageSize.of(SIZE), workers=0)
ASTRONAUT = pictures.astronaut()
TILES = ArraySource(
    [ASTRONAUT[y : y + 40, x : x + 56] for y in range(0, 400, 100) for x in range(0, 400, 100)]
)


def stream(source: Source, count: int, *, data=DATA, channels=3, seed=0, batch=None, start=0) -> list[Batch]:
    batches = training_batches(
        source, data, channels=channels, seed=seed, batch=batch or BatchLayout(4, 4), start=start
    )
    found = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return found


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "seeds", "indices")),
        failures=tuple(failure for batch in batches for failure in batch.failures),
    )


def same(one: Batch, other: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("images", "seeds", "indices")
    )
    return tensors and one.failures == other.failures


def test_batches_have_the_stated_shapes():
    (batch,) = stream(TILES, 1)
    assert batch.images.shape == (4, 3, SIZE, SIZE)
    assert batch.images.dtype == torch.uint8
    assert batch.seeds.dtype == batch.indices.dtype == torch.int64
    assert batch.seeds.tolist() == sample_seeds(0, np.arange(4)).tolist()
    assert stream(TILES, 1, channels=1)[0].images.shape == (4, 1, SIZE, SIZE)


def test_every_epoch_shows_every_image_once():
    indices = joined(stream(TILES, 12)).indices.view(3, 16)  # 3 epochs of 16 images
    assert all(sorted(epoch.tolist()) == list(range(16)) for epoch in indices)
    assert not torch.equal(indices[0], indices[1])


def test_the_stream_is_the_same_however_it_is_cut():
    whole = joined(stream(TILES, 3, batch=BatchLayout(24, 24)))
    for micro, world in ((24, 1), (4, 1), (12, 2), (3, 2), (2, 4), (1, 8)):
        ranks = [BatchLayout(24, micro, rank, world) for rank in range(world)]
        parts = [stream(TILES, 3 * ranks[0].accumulation, batch=rank) for rank in ranks]
        passes = [part[i] for i in range(len(parts[0])) for part in parts]  # pass by pass, rank by rank
        assert same(joined(passes), whole)


class Counting(ArraySource):
    """Counts how often an image is decoded."""

    reads = 0

    def decode(self, i, min_side=0):
        self.reads += 1
        return super().decode(i, min_side)


@pytest.mark.parametrize("micro", [1, 4, 12])
def test_repeats_are_neighbours_with_crops_and_seeds_of_their_own(micro):
    tiles = Counting([ASTRONAUT[:40, x : x + 56] for x in range(0, 160, 10)])
    thrice = replace(DATA, aug_repeats=3)
    batch = joined(stream(tiles, 48 // micro, data=thrice, batch=BatchLayout(12, micro)))
    assert tiles.reads == {1: 48, 4: 24, 12: 16}[micro]  # once for every pass that an image is part of
    assert torch.equal(batch.indices, joined(stream(tiles, 4)).indices.repeat_interleave(3))
    assert torch.equal(batch.seeds, joined(stream(tiles, 12)).seeds)
    assert len({image.numpy().tobytes() for image in batch.images}) == 48


@pytest.fixture
def large_photos(tmp_path):
    for i in range(3):
        Image.fromarray(ASTRONAUT).resize((900 + 100 * i, 1000)).save(tmp_path / f"{i}.jpg")
    return open_source(tmp_path)


def test_large_jpegs_are_decoded_no_larger_than_their_crops_need(large_photos, monkeypatch):
    boxes = []

    def noted(pixels, box, height, width):
        boxes.append(min(box[2:]))
        return transforms.resize(pixels, box, height, width)

    monkeypatch.setattr("coma.data.batches.resize", noted)
    stream(large_photos, 12, data=replace(DATA, image_size=160))
    assert min(boxes) >= 159  # rounding
    assert max(boxes) < 2 * 160 + 2  # else half the scale would have done


def test_reduced_or_not_a_sample_shows_the_same_part(large_photos, monkeypatch):
    fetch = TrainingFetcher(large_photos, replace(DATA, image_size=160), 3, 0, 1)
    seen = []
    monkeypatch.setattr(
        "coma.data.batches.resize",
        lambda pixels, box, *_: seen.append((pixels.shape, box)) or torch.empty(0),
    )
    for seed in range(300):
        opened = fetch.open(seed % 3, place=seed)
        fetch.view(opened, seed)
        (top, left, height, width), _ = fetch.crop(opened.height, opened.width, seed)
        (rows, cols, _), (y, x, h, w) = seen[-1]
        for reduced, at_full, scale in (
            *((each, full, rows / opened.height) for each, full in ((y, top), (y + h, top + height))),
            *((each, full, cols / opened.width) for each, full in ((x, left), (x + w, left + width))),
        ):
            assert abs(reduced - at_full * scale) <= 0.5
    assert len({shape[0] for shape, _ in seen}) > 1  # at several scales


def test_scaled_decoding_does_not_depend_on_how_the_stream_is_cut(large_photos):
    data = replace(DATA, image_size=160, aug_repeats=3)
    whole = joined(stream(large_photos, 2, data=data, batch=BatchLayout(6, 6)))
    cut = joined(stream(large_photos, 6, data=data, batch=BatchLayout(6, 2)))
    assert same(whole, cut)


@pytest.mark.parametrize("start", [0, 8, 16, 40])  # inside an epoch of 16, at its end, in the third
def test_a_run_goes_on_where_it_stopped(start):
    uninterrupted = stream(TILES, 12, batch=BatchLayout(8, 4))
    resumed = stream(TILES, 12 - start // 4, batch=BatchLayout(8, 4), start=start)
    assert same(joined(uninterrupted[start // 4 :]), joined(resumed)) or not resumed


def test_seeds_change_order_crop_and_flip():
    one, other = joined(stream(TILES, 4, seed=1)), joined(stream(TILES, 4, seed=2))
    assert not torch.equal(one.indices, other.indices)
    assert not torch.isin(one.seeds, other.seeds).any()
    still = ArraySource([ASTRONAUT])
    epochs = joined(stream(still, 4))
    assert len({image.numpy().tobytes() for image in epochs.images}) == 16  # every epoch crops anew


def test_crops_can_be_switched_off_and_flips_are_mirrors():
    square = ArraySource([ASTRONAUT])
    whole = replace(DATA, crop_scale=(1.0, 1.0), flip=False)
    plain, flipped = (
        joined(stream(square, 16, data=whole)),
        joined(stream(square, 16, data=replace(whole, flip=True))),
    )
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain.images, flipped.images, strict=True)]
    upright = [torch.equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, upright, strict=True))
    assert 18 < sum(mirrored) < 46  # half of 64


def test_slices_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="batch size 10 is not a multiple of 8 images per pass"):
        BatchLayout(10, 4, 0, 2)
    with pytest.raises(BadInput, match="at least 1"):
        BatchLayout(0, 0)
    with pytest.raises(ValueError, match="start 6"):
        stream(TILES, 1, start=6)


def test_the_callers_random_generators_are_left_alone():
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]
    stream(TILES, 2)
    stream(TILES, 2, data=replace(DATA, workers=1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert random.getstate() == states[2]


# damaged files and mixed depths -----------------------------------------------------------------


def folder_of(path: Path, good: int, bad: int) -> Path:
    for i in range(good):
        Image.fromarray(ASTRONAUT[i : i + 40, :40]).save(path / f"good-{i:02d}.png")
    for i in range(bad):
        (path / f"bad-{i:02d}.jpg").write_bytes(b"words")
    return path


def test_workers_change_nothing(tmp_path):
    source = open_source(folder_of(tmp_path, 9, 4))
    alone = joined(stream(source, 8, batch=BatchLayout(8, 4)))
    assert alone.failures
    for workers in (1, 3):
        data = replace(DATA, workers=workers)
        assert same(joined(stream(source, 8, data=data, batch=BatchLayout(8, 4))), alone)


def test_bad_images_are_replaced_by_the_next_good_one_and_named(tmp_path):
    source = open_source(folder_of(tmp_path, 9, 4))  # bad ones are 0 to 3
    n, batches = len(source), stream(source, 13, batch=BatchLayout(5, 5))  # 5 epochs
    whole = joined(batches)
    reference = joined(
        stream(ArraySource([ASTRONAUT[:40, :40]] * n), 13, batch=BatchLayout(5, 5))
    ).indices.tolist()
    for epoch in range(5):
        planned = reference[epoch * n : (epoch + 1) * n]
        for place in range(n):
            want = next(i for i in (*planned[place:], *planned[:place]) if i >= 4)
            assert whole.indices[epoch * n + place] == want
    assert len(whole.failures) >= 5 * 4
    assert set(whole.failures) == {
        f"{tmp_path}/bad-{i:02d}.jpg: not an image "
        "(its content is not JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, NPY or DICOM)"
        for i in range(4)
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_stop_the_run_if_asked_to(tmp_path, workers):
    source = open_source(folder_of(tmp_path, 9, 1))
    with pytest.raises(BadImage) as raised:
        stream(source, 3, data=replace(DATA, on_bad_image="stop", workers=workers))
    assert str(raised.value).startswith(f"{tmp_path}/bad-00.jpg: not an image")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_a_good_image_stops_the_run(tmp_path, workers):
    source = open_source(folder_of(tmp_path, 0, 3))
    with pytest.raises(
        BadInput, match=r"3 images in a row could not be used; the last: .*bad-0\d\.jpg: not an"
    ):
        stream(source, 1, data=replace(DATA, workers=workers))


def test_the_search_for_a_good_image_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("coma.data.batches.MAX_ATTEMPTS", 5)
    source = open_source(folder_of(tmp_path, 0, 8))
    with pytest.raises(BadInput, match="5 images in a row"):
        stream(source, 1)


def test_wrong_channels_are_bad_images(tmp_path):
    tiles = [ASTRONAUT[:20, :20], np.zeros((20, 20, 5), np.uint8)]
    with pytest.raises(
        BadImage, match=r"array\[1\]: 5 channels, but the model takes 3; `coma pretrain --channels 5`"
    ):
        stream(ArraySource(tiles), 2, data=replace(DATA, on_bad_image="stop"))


def test_deep_images_among_8_bit_ones_share_a_batch():
    tile = ASTRONAUT[:40, :40]
    source = ArraySource([tile, tile.astype(np.uint16) * 257, (tile / 255).astype(np.float32), tile])
    (mixed,) = stream(source, 1, data=replace(DATA, crop_scale=(1.0, 1.0), flip=False))
    assert mixed.images.dtype == torch.float32
    assert float(mixed.images.max()) <= 1
    assert (mixed.images - mixed.images[0]).abs().max() < 0.005
    (eight,) = stream(ArraySource([tile] * 4), 1)
    assert eight.images.dtype == torch.uint8


def test_multi_channel_images_pass_through():
    source = ArraySource([np.full((20, 30, 13), i * 3000, np.uint16) for i in range(4)])
    (batch,) = stream(source, 1, channels=13)
    assert batch.images.shape == (4, 13, SIZE, SIZE)
    assert torch.allclose(
        batch.images, (batch.indices * 3000 / 65535).view(4, 1, 1, 1).expand_as(batch.images)
    )


# evaluation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_every_image_once_in_order(workers):
    batches = list(evaluation_batches(TILES, image_size=SIZE, channels=3, batch_size=5, workers=workers))
    assert [len(batch.indices) for batch in batches] == [5, 5, 5, 1]
    whole = joined(batches)
    assert whole.indices.tolist() == list(range(16))
    want = Image.fromarray(ASTRONAUT[:40, 8:48]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.abs(whole.images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(want)).max() <= 1


def test_evaluation_leaves_bad_images_out_and_names_them(tmp_path):
    source = open_source(folder_of(tmp_path, 3, 4))  # bad ones first: whole batches of them
    (tmp_path / "good-02.png").write_bytes(b"")
    batches = list(evaluation_batches(source, image_size=SIZE, channels=3, batch_size=2, workers=0))
    assert joined(batches).indices.tolist() == [4, 5]
    assert all(len(batch.indices) for batch in batches)
    assert len(joined(batches).failures) == 5


def test_evaluation_needs_one_image(tmp_path):
    source = open_source(folder_of(tmp_path, 0, 3))
    with pytest.raises(BadInput, match=r"no image could be read; the first: .*bad-00\.jpg"):
        list(evaluation_batches(source, image_size=SIZE, channels=3, batch_size=2, workers=0))


def test_pinning_takes_the_whole_batch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    batches = training_batches(
        TILES, DATA, channels=3, seed=0, batch=BatchLayout(4, 4), device=torch.device("cuda")
    )
    batch = next(batches)
    assert len(pinned) == 3
    assert same(batch, stream(TILES, 1)[0])
    how: dict[str, Any] = {"image_size": SIZE, "channels": 3, "batch_size": 8, "workers": 0}
    assert len(list(evaluation_batches(TILES, **how, device=torch.device("cuda")))) == 2
    assert len(pinned) == 3 + 2 * 3
