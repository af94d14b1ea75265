"""Crops and resampling against Pillow, their bounds, and normalisation."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as pictures

from coma.data import normalize
from coma.data.shuffle import uniforms
from coma.data.transforms import RATIO, centre_crop, random_crop, resize, stack

ASTRONAUT = pictures.astronaut()
SIDES = st.integers(1, 600)


@settings(deadline=None)
@given(SIDES, SIDES, st.floats(0.01, 1), st.floats(0.01, 1), st.integers(-(1 << 63), (1 << 63) - 1))
def test_crops_lie_inside_the_image(height, width, a, b, seed):
    top, left, h, w = random_crop(height, width, (min(a, b), max(a, b)), uniforms(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h > 0
    assert w > 0


def test_crops_have_the_stated_areas_shapes_and_places():
    boxes = np.array([random_crop(800, 800, (0.1, 0.5), uniforms(seed)) for seed in range(4000)])
    top, left, h, w = boxes.T
    area, ratio = h * w / 800**2, w / h
    assert 0.098 < area.min() < 0.12
    assert 0.48 < area.max() < 0.502
    assert area.mean() == pytest.approx(0.3, abs=0.01)
    assert ratio.min() == pytest.approx(RATIO[0], abs=0.02)
    assert ratio.max() == pytest.approx(RATIO[1], abs=0.02)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)  # wide and tall alike
    for start, size in ((top, h), (left, w)):
        assert (start / (800 - size)).mean() == pytest.approx(0.5, abs=0.02)
    assert min(top.min(), left.min(), (800 - top - h).min(), (800 - left - w).min()) == 0


def test_the_whole_image_can_be_asked_for():
    assert random_crop(300, 300, (1.0, 1.0), iter([1.0, 0.5, 0.3, 0.3])) == (0, 0, 300, 300)


def test_images_too_thin_for_any_crop_give_their_middle():
    assert random_crop(10, 1000, (0.9, 1.0), uniforms(0)) == (0, 493, 10, 13)
    assert random_crop(1000, 1, (0.9, 1.0), uniforms(0)) == (499, 0, 1, 1)


def test_centre_crop():
    assert centre_crop(100, 60) == (20, 0, 60, 60)
    assert centre_crop(7, 10) == (0, 1, 7, 7)
    assert centre_crop(100, 60, (32, 64)) == (35, 0, 30, 60)
    assert centre_crop(30, 300, (64, 32)) == (0, 142, 30, 15)
    assert centre_crop(1, 300, (512, 8)) == (0, 149, 1, 1)


@pytest.mark.parametrize("size", [(64, 512), (224, 448), (448, 224)])
def test_crops_have_the_shape_of_what_they_are_resized_to(size):
    boxes = np.array([random_crop(600, 800, (0.2, 1.0), uniforms(seed), size) for seed in range(2000)])
    top, left, h, w = boxes.T
    assert min(top.min(), left.min()) == 0 and (top + h).max() <= 600 and (left + w).max() <= 800
    ratio = (w / h) / (size[1] / size[0])
    assert ratio.min() > RATIO[0] * 0.98 and ratio.max() < RATIO[1] * 1.02
    assert ratio.min() < 0.8 and ratio.max() > 1.25
    assert len({tuple(box) for box in boxes.tolist()}) > 1900  # the middle is what rarely is left


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(("box", "size"), [((40, 30, 301, 223), (96, 96)), ((3, 5, 40, 50), (99, 77))])
def test_resize_agrees_with_pillow(channels, box, size):
    pixels = np.concatenate([ASTRONAUT, ASTRONAUT[::-1]], axis=2)[:, :, :channels]
    top, left, h, w = box
    want = [
        np.asarray(Image.fromarray(np.ascontiguousarray(part)).resize(size[::-1], Image.Resampling.BICUBIC))
        for part in np.moveaxis(pixels[top : top + h, left : left + w], 2, 0)
    ]
    out = resize(pixels, box, *size)
    assert out.dtype == torch.uint8
    assert np.abs(out.numpy().astype(int) - want).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_resize_is_finer_for_deeper_images(dtype):
    scale = 65535 if dtype is np.uint16 else 1
    pixels = (ASTRONAUT / 255 * scale).round(0 if scale > 1 else 9).astype(dtype)
    out = resize(pixels, (0, 0, 512, 512), 64, 64)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(ASTRONAUT / 255).permute(2, 0, 1)[None], (64, 64), mode="bicubic", antialias=True
    )[0].clamp(0, 1)
    assert out.dtype == torch.float32
    assert (out - want).abs().max() < 1e-4
    assert len(out.unique()) > 1000


def test_resize_never_leaves_the_range_of_the_pixels():
    edge = np.zeros((20, 20, 1), np.float32)
    edge[:, 10:] = 1000.0
    out = resize(edge, (0, 0, 20, 20), 50, 50)
    assert out.min() == 0
    assert out.max() == 1000
    both = resize(np.dstack([edge / 1000, edge]), (0, 0, 20, 20), 50, 50)  # each channel has its own unit
    assert both.amax((1, 2)).tolist() == [1, 1000]
    eight_bit = resize((edge > 0).astype(np.uint8) * 100 + 100, (0, 0, 20, 20), 50, 50)
    assert int(eight_bit.max()) - int(eight_bit.min()) >= 100  # uint8 clips at black and white only


def test_a_box_of_the_right_size_is_copied_unchanged():
    out = resize(ASTRONAUT, (10, 20, 32, 32), 32, 32)
    assert (out.permute(1, 2, 0).numpy() == ASTRONAUT[10:42, 20:52]).all()
    out.zero_()
    assert ASTRONAUT[10:42, 20:52].any()


def test_8_bit_images_among_deeper_ones_are_scaled():
    eight, deep = torch.tensor([[[0, 255, 51]]], dtype=torch.uint8), torch.rand(1, 1, 3)
    assert stack([eight, eight]).dtype == torch.uint8
    mixed = stack([eight, deep])
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], torch.tensor([[[0, 1, 0.2]]]))
    assert torch.equal(mixed[1], deep)


def test_normalize():
    images = torch.tensor(list(islice(range(0, 250, 5), 48)), dtype=torch.uint8).view(2, 2, 3, 4)
    mean, std = (0.25, 0.5), (0.5, 0.125)
    out = normalize(images, mean, std)
    want = (images.double().numpy() / 255 - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    assert out.dtype == torch.float32
    assert np.abs(out.numpy() - want).max() < 1e-6
    assert images.dtype == torch.uint8
    assert torch.equal(normalize(images.float() / 255, torch.tensor(mean), torch.tensor(std)), out)
