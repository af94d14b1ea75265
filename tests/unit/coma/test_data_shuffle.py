"""The order of the stream: permutations without storage, seeds that never change between versions."""

from collections import Counter
from itertools import islice, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coma.data.shuffle import GOLDEN, permuted_indices, sample_seeds, splitmix64, uniforms

WORD = (1 << 64) - 1
SEEDS = [-2152535657050944081, 7960286522194355700]
ORDER = [6, 7, 2, 8, 3, 1, 0, 9, 5, 4]
UNIFORMS = [0.900663704655, 0.799490935]


def epoch_of(n: int, epoch: int = 0, seed: int = 0) -> list[int]:
    return permuted_indices(seed, np.full(n, epoch), np.arange(n), n).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 1 << 40), st.integers(-(1 << 63), (1 << 63) - 1))
def test_every_epoch_holds_every_image_once(n, epoch, seed):
    assert sorted(epoch_of(n, epoch, seed)) == list(range(n))


def test_a_place_does_not_depend_on_who_asks():
    whole = epoch_of(1000, epoch=3, seed=7)
    picked = [17, 999, 0, 17]
    alone = permuted_indices(7, np.full(4, 3), np.array(picked), 1000)
    assert alone.tolist() == [whole[i] for i in picked]


def test_epochs_and_seeds_give_unrelated_orders():
    base = np.array(epoch_of(2000))
    for other in (epoch_of(2000, epoch=1), epoch_of(2000, seed=1), list(range(2000))):
        assert (base == np.array(other)).mean() < 0.01
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1


def test_all_orders_of_four_images_are_equally_likely():
    epochs = 48_000
    orders = np.stack(
        [permuted_indices(5, np.arange(epochs), np.full(epochs, rank), 4) for rank in range(4)], axis=1
    )
    counts = Counter(map(tuple, orders.tolist()))
    chi_square = sum((counts[order] - 2000) ** 2 / 2000 for order in permutations(range(4)))
    assert chi_square < 49.7  # 23 degrees of freedom: one permutation in a thousand is above


def test_neighbours_in_an_epoch_are_unrelated():
    n = 4096
    order = np.array(epoch_of(n))
    steps = np.bincount((order[1:] - order[:-1]) % n // 64, minlength=64)
    assert steps.std() < 3 * np.sqrt(n / 64)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06


def test_mix_is_splitmix64():
    """The first numbers of the published generator with seed 0."""
    assert [splitmix64(GOLDEN * i & WORD) for i in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_seeds_and_orders_are_frozen():
    """A run that is resumed with a newer version must see the same stream."""
    assert sample_seeds(0, np.arange(2)).tolist() == SEEDS
    assert epoch_of(10, epoch=2, seed=1) == ORDER
    assert [round(value, 12) for value in islice(uniforms(-5), 2)] == UNIFORMS


def test_seeds_are_a_function_of_seed_and_position():
    positions = np.arange(200_000)
    seeds = sample_seeds(3, positions)
    assert seeds.dtype == np.int64
    assert len(np.unique(seeds)) == len(seeds)
    assert (sample_seeds(3, positions[500:600]) == seeds[500:600]).all()
    assert not np.isin(sample_seeds(4, positions), seeds).any()
    for bit in range(64):
        assert ((seeds >> bit) & 1).mean() == pytest.approx(0.5, abs=0.01)


def test_uniforms_are_uniform_and_repeat():
    values = np.array(list(islice(uniforms(42), 20_000)))
    assert values.tolist() == list(islice(uniforms(42), 20_000))
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] - 2000).max() < 200
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03
