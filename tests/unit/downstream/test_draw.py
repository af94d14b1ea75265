"""Masks are drawn on pictures one by one, in their colours, the first one on top."""

import numpy as np
import pytest
import torch

from downstream.draw import draw_masks

pytestmark = pytest.mark.openmmlab


def test_masks_are_drawn_as_torchvision_draws_them_and_the_first_is_on_top():
    from torchvision.utils import draw_segmentation_masks

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    owner = rng.integers(0, 4, (20, 30))  # 3 is nobody
    colours = [(255, 0, 9), (0, 255, 8), (1, 2, 3)]
    apart = [owner == i for i in range(3)]
    theirs = draw_segmentation_masks(
        torch.from_numpy(picture).permute(2, 0, 1),
        torch.from_numpy(np.stack(apart)),
        alpha=0.5,
        colors=[*colours],
    )
    drawn = draw_masks(picture, zip(apart, colours, strict=True))
    assert np.abs(drawn.astype(int) - theirs.permute(1, 2, 0).numpy()).max() <= 1  # they round otherwise
    below = [owner <= i for i in range(3)]  # the first one hides a part of the second, and so on
    assert np.array_equal(draw_masks(picture, zip(below, colours, strict=True)), drawn)
    assert np.array_equal(draw_masks(picture, []), picture)
