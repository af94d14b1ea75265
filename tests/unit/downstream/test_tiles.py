"""Tiles cover pictures, and objects in several tiles are one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream.placed_masks import cut
from downstream.tiles import Tile, detect_in_tiles, join_maps, suppress, tiles_of

pytestmark = pytest.mark.openmmlab


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 200), st.floats(0, 0.9))
def test_tiles_cover_pictures_and_overlap(height, width, side, overlap):
    tiles = tiles_of(height, width, side, overlap)
    times, inner = (
        torch.zeros(height, width, dtype=torch.int64),
        torch.zeros(height, width, dtype=torch.int64),
    )
    for tile in tiles:
        assert tile.right - tile.left == min(side, width) and tile.bottom - tile.top == min(side, height)
        times[tile.top : tile.bottom, tile.left : tile.right] += 1
        left, top, right, bottom = tile.inner
        assert tile.left <= left and tile.top <= top and right <= tile.right and bottom <= tile.bottom
        inner[top:bottom, left:right] += 1
    assert (times >= 1).all() and (inner == 1).all()
    rows = sorted({tile.top for tile in tiles})
    assert all(side - (b - a) >= int(side * overlap) - 1 for a, b in pairwise(rows))
    values = torch.arange(height * width).reshape(1, height, width)
    parts = [values[:, t.top : t.bottom, t.left : t.right] for t in tiles]
    assert torch.equal(join_maps(tiles, parts, height, width), values)


def test_boxes_of_two_tiles_are_one_object_where_they_overlap_or_contain_each_other():
    boxes = torch.tensor(
        [[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 3], [0, 0, 10, 10], [0, 0, 10, 9], [40, 0, 50, 9]]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    labels = torch.tensor([0, 0, 0, 1, 0, 0])
    frames = torch.tensor([[0, 0, 60, 60], [0, 0, 60, 61]])[[0, 1, 1, 1, 0, 1]]
    # the second overlaps, the third is the part of the first that the other tile saw, the fourth is of
    # another class, the fifth comes from the first one's own tile
    kept, best = suppress(boxes.float(), scores, labels, frames)
    assert kept.tolist() == [0, 3, 4, 5] and torch.equal(best, scores[kept])
    assert suppress(boxes.float(), scores, labels, frames[:1].repeat(6, 1))[0].tolist() == [0, 1, 2, 3, 4, 5]
    none = torch.zeros(0)
    assert suppress(torch.zeros(0, 4), none, none, torch.zeros(0, 4))[0].tolist() == []


@pytest.mark.parametrize("scores", [(0.9, 0.95, 0.97), (0.95, 0.9, 0.3), (0.9, 0.95, 0.3), (0.8, 0.9, 0.85)])
def test_whole_objects_are_kept_in_place_of_the_pieces_that_tiles_cut_off(scores):
    boxes = torch.tensor([[100.0, 100, 300, 200], [200, 100, 300, 200], [250, 100, 300, 200]])
    frames = torch.tensor([[0, 0, 400, 400], [200, 0, 600, 400], [250, 0, 650, 400]])
    kept, best = suppress(boxes, torch.tensor(scores), torch.zeros(3), frames)
    assert kept.tolist() == [0] and best.tolist() == pytest.approx([max(scores)])


def test_doubtful_boxes_around_several_objects_do_not_take_their_place():
    boxes = torch.tensor([[210.0, 100, 240, 200], [100, 100, 390, 200]])
    frames = torch.tensor([[200, 0, 600, 400], [0, 0, 400, 400]])
    kept, best = suppress(boxes, torch.tensor([0.95, 0.1]), torch.zeros(2), frames)
    assert kept.tolist() == [0] and best.tolist() == pytest.approx([0.95])


def test_masks_lie_where_their_tiles_do_and_take_no_more_than_their_objects():
    """Whole masks of these two objects would take 80 GB."""
    from mmengine.structures import InstanceData

    side = 200_000
    tiles = [Tile(at, at, at + 64, at + 64, (at, at, at + 64, at + 64)) for at in (0, side - 64)]
    mask = np.zeros((64, 64), dtype=bool)
    mask[2:5, 7:9] = True
    objects = InstanceData(
        bboxes=torch.tensor([[7.0, 2, 9, 5]]), scores=torch.ones(1), labels=torch.zeros(1), masks=[cut(mask)]
    )
    found = detect_in_tiles(tiles, [objects, objects])
    first, last = found.masks
    assert first[:2] == (7, 2) and last[:2] == (side - 64 + 7, side - 64 + 2)
    assert first.pixels.shape == (3, 2) and first.pixels.all()
    assert np.array_equal(first.whole(64, 64), mask)
    assert [len(each.masks) for each in (found[torch.tensor([False, True])], found[:0])] == [1, 0]
    assert not cut(np.zeros((4, 4), dtype=bool)).whole(4, 4).any()
