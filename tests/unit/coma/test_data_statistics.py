"""Mean and deviation of a data set against NumPy, and what cannot be normalised."""

import numpy as np
import pytest
from skimage import data as pictures

from coma.data import ArraySource, compute_mean_std
from coma.errors import BadInput

RNG = np.random.default_rng(0)
TILES = [pictures.astronaut()[y : y + 40, y : y + 60] for y in range(0, 400, 20)]


def reference(tiles: list[np.ndarray], white: float) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.concatenate([tile.reshape(-1, tile.shape[2]) for tile in tiles]).astype(np.float64) / white
    return pixels.mean(axis=0), pixels.std(axis=0)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_measured_values_are_numpys(dtype, white):
    tiles = [(tile / 255 * white).astype(dtype) for tile in TILES]
    mean, std = compute_mean_std(ArraySource(tiles), 3)
    want_mean, want_std = reference(tiles, white)
    assert np.allclose(mean, want_mean, atol=1e-7)
    assert np.allclose(std, want_std, atol=1e-7)
    assert all(isinstance(value, float) for value in mean + std)


def test_float_data_keep_their_range():
    tiles = [RNG.normal(1000, 50, (20, 30, 5)).astype(np.float32) for _ in range(4)]
    mean, std = compute_mean_std(ArraySource(tiles), 5)
    assert np.allclose(mean, 1000, atol=5)
    assert np.allclose(std, 50, rtol=0.05)


def test_every_image_counts_the_same():
    small, large = np.zeros((20, 20, 1), np.uint8), np.full((200, 200, 1), 255, np.uint8)
    assert compute_mean_std(ArraySource([small, large]), 1) == ((0.5,), (0.5,))


def test_the_sample_is_spread_over_the_data_and_always_the_same():
    tiles = [np.full((20, 20), i % 250, np.uint8) for i in range(1000)]
    mean, std = compute_mean_std(ArraySource(tiles), 1, limit=200)
    assert (mean, std) == compute_mean_std(ArraySource(tiles), 1, limit=200)
    assert mean[0] == pytest.approx(124.5 / 255, abs=0.05)
    assert compute_mean_std(ArraySource(tiles), 1, limit=5000) != (mean, std)


def test_workers_change_nothing():
    assert compute_mean_std(ArraySource(TILES), 3, workers=2) == compute_mean_std(
        ArraySource(TILES), 3, workers=0
    )


def test_bad_images_are_passed_over():
    bad = np.full((40, 60, 3), np.nan, np.float32)
    assert np.allclose(
        compute_mean_std(ArraySource([*TILES, bad]), 3), compute_mean_std(ArraySource(TILES), 3), atol=1e-12
    )
    with pytest.raises(
        BadInput, match=r"none of 2 images could be used; the first: array\[[01]\]: every value is nodata"
    ):
        compute_mean_std(ArraySource([bad, bad]), 3)
    with pytest.raises(BadInput, match=r"5 channels, but the model takes 3; `coma pretrain --channels 5`"):
        compute_mean_std(ArraySource([np.zeros((20, 20, 5), np.uint8)]), 3)


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_constant_channels_are_refused(value):
    tiles = [RNG.integers(0, 65536, (20, 30, 5), np.uint16) for _ in range(20)]
    for tile in tiles:
        tile[:, :, 3] = value
    with pytest.raises(
        BadInput, match=r"channel 4 of 5 has the same value in all pixels of 20 images.*--std"
    ):
        compute_mean_std(ArraySource(tiles), 5)
    tiles[0][0, 0, 3] = value ^ 255
    assert compute_mean_std(ArraySource(tiles), 5)[1][3] > 0
