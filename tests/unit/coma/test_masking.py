"""Masks: units, partitions, and randomness that belongs to the sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coma.masking.patchify import pad_to_units, patchify, spread, unit_grid, unpatchify
from coma.masking.sampling import group_of, group_sizes, keep, noise, partition

grid_sides = st.integers(1, 9)
seeds_of = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)


@settings(deadline=None)
@given(seeds=seeds_of, h=grid_sides, w=grid_sides, groups=st.integers(2, 5))
def test_groups_partition_the_units_into_equal_shares(seeds, h, w, groups):
    group = partition(torch.tensor(seeds), h, w, groups)
    sizes = group_sizes(h * w, groups)
    assert group.shape == (len(seeds), h, w)
    assert sum(sizes) == h * w and max(sizes) - min(sizes) <= 1
    for sample in group:
        assert tuple(sample.flatten().bincount(minlength=groups).tolist()) == sizes


@settings(deadline=None)
@given(seeds=seeds_of, h=grid_sides, w=grid_sides, data=st.data())
def test_keep_shows_exactly_the_asked_number(seeds, h, w, data):
    count = data.draw(st.integers(0, h * w))
    visible = keep(torch.tensor(seeds), h, w, count)
    assert (visible.flatten(1).sum(1) == count).all()
    assert torch.equal(group_of(visible) == 0, visible)
    assert (group_of(visible)[~visible] == -1).all()


def splitmix64_finaliser(x: int) -> int:
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)


def test_noise_is_splitmix64_as_unbounded_integers_compute_it():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    for salt in (0, 3):
        for row, seed in zip(noise(seeds, 4, salt).tolist(), seeds.tolist(), strict=True):
            start = splitmix64_finaliser(seed + (salt + 1) * 0xD1342543DE82EF95)
            expected = [splitmix64_finaliser(start + (i + 1) * 0x9E3779B97F4A7C15) for i in range(4)]
            assert [value % 2**64 for value in row] == expected


def test_a_sample_has_the_same_masks_in_any_batch():
    seeds = torch.arange(100, 116)
    together = partition(seeds, 7, 7, 2)
    alone = torch.cat([partition(seed[None], 7, 7, 2) for seed in seeds])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_every_unit_falls_into_every_group_equally_often():
    draws, groups = 20_000, 4
    group = partition(torch.arange(draws), 4, 4, groups).flatten(1)
    counts = torch.stack([(group == k).sum(0) for k in range(groups)]).double()
    chi_square = ((counts - draws / groups) ** 2 / (draws / groups)).sum()
    assert chi_square < 82  # 48 degrees of freedom: exceeded once in a thousand draws
    together = (group[:, :1] == group[:, 1:]).double().mean(0)  # neighbours are no more alike than far units
    assert (together - 3 / 15).abs().max() < 0.02


@settings(deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 5), h=grid_sides, w=grid_sides, unit=st.integers(1, 6))
def test_unpatchify_undoes_patchify(b, c, h, w, unit):
    images = torch.arange(b * c * h * w * unit**2).float().view(b, c, h * unit, w * unit)
    units = patchify(images, unit)
    assert units.shape == (b, h, w, unit * unit * c)
    assert torch.equal(unpatchify(units, unit), images)


def test_a_unit_holds_its_own_pixels():
    images = torch.arange(2 * 8 * 8).float().view(1, 2, 8, 8)
    unit = patchify(images, 4)[0, 1, 0].view(4, 4, 2)
    assert torch.equal(unit, images[0, :, 4:8, 0:4].permute(1, 2, 0))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 32), (63, 65), (200, 180)])
def test_padding_reaches_whole_units_and_keeps_the_image(height, width):
    images = torch.randn(1, 3, height, width)
    padded = pad_to_units(images, 32)
    rows, cols = unit_grid(height, width, 32)
    assert padded.shape[-2:] == (rows * 32, cols * 32)
    assert torch.equal(padded[..., :height, :width], images)
    assert padded[..., height:, :].abs().sum() == 0


def test_spread_gives_tokens_their_units_value():
    units = torch.tensor([[[1, 2], [3, 4]]])
    expected = torch.tensor([[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]])
    assert torch.equal(spread(units, 2), expected)
