"""Balanced sampling: every class equally often, and its images in turn, from seed and position."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from coma.config import DataConfig
from coma.data import ArraySource, BatchLayout, labelled_batches
from coma.data.class_sampling import ClassSampler
from coma.image_size import ImageSize

RARE = torch.tensor([0] * 300 + [1] * 3 + [2] * 30)
"""Labels of which one is a hundred times as frequent as another."""


def drawn(sampler: ClassSampler, start: int, stop: int, seed: int = 5) -> list[int]:
    return sampler.indices(seed, np.arange(start, stop)).tolist()


def test_every_round_has_every_class_and_every_class_all_its_images():
    found = drawn(ClassSampler(RARE), 0, 900)
    for first in range(0, 900, 3):
        assert sorted(RARE[found[first : first + 3]].tolist()) == [0, 1, 2]
    assert len({tuple(RARE[found[i : i + 3]].tolist()) for i in range(0, 90, 3)}) == 6  # in all orders
    times = Counter(found)
    assert all(times[i] == 1 for i in range(300))
    assert all(times[i] == 100 for i in range(300, 303))
    assert all(times[i] == 10 for i in range(303, 333))


def test_labels_need_no_order():
    mixed = RARE[torch.randperm(len(RARE), generator=torch.Generator().manual_seed(0))]
    found = drawn(ClassSampler(mixed), 0, 900)
    assert Counter(mixed[found].tolist()) == {0: 300, 1: 300, 2: 300}
    assert set(found) == set(range(len(mixed)))


def test_the_order_follows_from_seed_and_position():
    sampler = ClassSampler(RARE)
    again = pickle.loads(pickle.dumps(sampler))
    assert drawn(again, 0, 500) == drawn(sampler, 0, 200) + drawn(sampler, 200, 500)
    assert drawn(sampler, 0, 500, seed=6) != drawn(sampler, 0, 500)
    far = 10**12
    assert sorted(RARE[drawn(sampler, far - far % 3, far - far % 3 + 3)].tolist()) == [0, 1, 2]


def test_images_of_several_classes_have_the_turns_of_each_and_those_of_none_their_own():
    labels = torch.zeros(110, 4)  # nothing has the last class
    labels[:100, 0] = 1
    labels[0, 1] = labels[100:104, 2] = 1  # image 0 also has a rare one; 104 to 109 have none
    sampler = ClassSampler(labels)
    assert sampler.counts.tolist() == [100, 1, 4, 6]
    times = Counter(drawn(sampler, 0, 400))
    assert times[0] == 101 and all(times[i] == 1 for i in range(1, 100))
    assert sum(times[i] for i in range(100, 104)) == sum(times[i] for i in range(104, 110)) == 100


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_are_balanced_and_alike_on_any_ranks_and_from_any_start(repeats):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20, 18, 3), np.uint8) for _ in range(len(RARE))]
    source = ArraySource(images, RARE.numpy())
    data = DataConfig(image_size=ImageSize.of(8), workers=0, aug_repeats=repeats)

    def batches(count, start=0, rank=0, world=1, sampler=None):
        stream = labelled_batches(
            source,
            data,
            RARE,
            channels=3,
            seed=1,
            batch=BatchLayout(12, 12 // world, rank, world),
            sampler=sampler or ClassSampler(RARE),
            start=start,
        )
        return [next(stream) for _ in range(count)]

    whole = batches(6)
    labels = torch.cat([batch.labels for batch in whole if batch.labels is not None])
    assert labels.bincount().tolist() == [24, 24, 24]
    resumed = batches(3, start=36)
    halves = zip(batches(6, rank=0, world=2), batches(6, rank=1, world=2), strict=True)
    for one, other in zip(whole[3:], resumed, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)
    for one, (left, right) in zip(whole, halves, strict=True):
        assert torch.equal(one.images, torch.cat([left.images, right.images]))
        assert torch.equal(one.indices, torch.cat([left.indices, right.indices]))
