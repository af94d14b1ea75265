"""Search: neighbours against brute force, groups, maps, and pictures of hostile names."""

import os

import numpy as np
import pytest
from feature_files import SPEC, features, vectors
from PIL import Image
from scipy.sparse.csgraph import connected_components

from coma.errors import BadImage, BadInput
from downstream.features.files import Rows
from downstream.search.duplicates import duplicate_groups
from downstream.search.layout import grid_cells, map_positions
from downstream.search.neighbours import Neighbours, nearest, neighbours_of_all
from downstream.search.pictures import Album, picture_of, read_image_file
from downstream.search.vectors import open_files, read_vectors, unit


def brute_force(values, count):
    similarity = values @ values.T
    np.fill_diagonal(similarity, -2)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(similarity, order, axis=1)


def test_exact_neighbours_are_those_of_brute_force():
    values = unit(vectors(300, 16), "test")
    found = neighbours_of_all(values, 7)
    order, similarity = brute_force(values, 7)
    assert found.exact and np.array_equal(found.indices, order)
    assert np.allclose(found.similarities, similarity, atol=1e-6)


def test_the_graph_finds_nearly_all_neighbours():
    values = unit(vectors(3000, 32), "test")
    found = neighbours_of_all(values, 10, exact_up_to=0)
    order, _ = brute_force(values, 10)
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found.indices, order, strict=True)])
    assert not found.exact and recall > 0.97
    assert (found.indices != np.arange(3000)[:, None]).all()


def test_no_image_is_its_own_neighbour_even_among_equals():
    values = unit(np.ones((9, 4), np.float32), "test")
    found = neighbours_of_all(values, 20)
    assert found.indices.shape == (9, 8)
    assert all(sorted(row) == [j for j in range(9) if j != i] for i, row in enumerate(found.indices.tolist()))


def test_one_query_is_compared_with_every_part():
    values = unit(vectors(100), "test")
    names = [f"{i}.png" for i in range(100)]
    parts = [(0, Rows(names[at : at + 9], values[at : at + 9])) for at in range(0, 100, 9)]
    order = np.argsort(-(values @ values[5]), kind="stable")
    hits = nearest(parts, values[5], 4)
    assert [hit.path for hit in hits] == [names[i] for i in order[:4]]
    others = nearest(parts, values[5], 4, without=(0, "5.png"))
    assert [hit.path for hit in others] == [names[i] for i in order[1:5]]
    assert len(nearest(parts, values[5], 1000)) == 100


def test_long_and_zero_vectors_have_no_overflow():
    values = unit(np.array([[1e30, 1e30], [0, 0], [1e-30, 0]], np.float32), "test")
    assert np.allclose(values, [[0.5**0.5, 0.5**0.5], [0, 0], [1, 0]])
    with pytest.raises(BadInput, match=r"f.parquet: damaged \(a feature is not finite\)"):
        unit(np.array([[np.nan, 1]], np.float32), "f.parquet")


def test_groups_are_linked_pairs():
    values = unit(vectors(40, 16), "test")
    values[7], values[30] = values[3], values[3]  # three alike
    values[20] = unit(values[[12]] + 0.01 * vectors(1, 16, seed=9), "test")[0]
    groups = duplicate_groups(values, neighbours_of_all(values, 32), 0.98)
    assert [group.members for group in groups] == [[3, 7, 30], [12, 20]]
    assert groups[0].similarities == pytest.approx([1, 1, 1])
    assert 0.98 < groups[1].similarities[0] < 1
    assert duplicate_groups(values[:3], neighbours_of_all(values[:3], 32), 0.98) == []


def test_groups_are_linked_in_one_direction_too():
    """An HNSW graph may find a pair from one side only."""
    found = Neighbours(np.array([[1], [2], [1]]), np.array([[0.99], [0.5], [0.5]], np.float32), False)
    (group,) = duplicate_groups(np.eye(3, dtype=np.float32), found, 0.9)
    assert group.members == [0, 1] and group.similarities == pytest.approx([0.99, 0.99])


@pytest.mark.parametrize("count", [20, 40, 100])
def test_two_bursts_of_one_scene_are_one_group(count):
    """The neighbours of every image are of its own burst, however near the other one is."""
    bursts = unit(np.array([[1, 0, 0], [1, 0.12, 0]], np.float32), "test").repeat(count, axis=0)
    for noise in (0, 1e-3):
        values = unit(bursts + noise * vectors(2 * count, 3), "test")
        assert (values @ values.T).min() > 0.99
        (group,) = duplicate_groups(values, neighbours_of_all(values, 32), 0.98)
        assert group.members == list(range(2 * count))


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_groups_are_those_of_all_pairs(chunk, monkeypatch):
    monkeypatch.setattr("downstream.search.duplicates._CHUNK", chunk)
    numbers = []
    for seed in range(20):
        centres, noise = vectors(12, 3, seed), vectors(240, 3, seed + 1000)
        values = unit(centres.repeat(20, axis=0) + 0.05 * noise, "test")
        least = 0.999 - 0.0003 * seed
        _, labels = connected_components(values @ values.T >= least - 1e-6)
        wanted = [np.flatnonzero(labels == label).tolist() for label in range(labels.max() + 1)]
        found = duplicate_groups(values, neighbours_of_all(values, 3), least)
        assert sorted(group.members for group in found) == [each for each in wanted if len(each) > 1]
        numbers.append(len(found))
    assert len(set(numbers)) > 3


def test_maps_keep_clusters_together_and_are_the_same_every_time():
    centres = np.eye(3, 8, dtype=np.float32) * 5
    values = unit(np.concatenate([centres[i] + 0.1 * vectors(20, seed=i) for i in range(3)]), "test")
    positions = map_positions(values)
    assert np.array_equal(positions, map_positions(values))
    assert positions.min() == 0 and positions.max() == 1
    means = positions.reshape(3, 20, 2).mean(axis=1)
    inside = np.linalg.norm(positions.reshape(3, 20, 2) - means[:, None], axis=2).max()
    apart = min(np.linalg.norm(means[i] - means[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert apart > inside


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_small_sets_and_sets_of_equals_have_maps(count):
    for values in (vectors(count), np.ones((count, 8), np.float32), vectors(count, 1)):
        positions = map_positions(unit(values, "test"))
        assert positions.shape == (count, 2) and np.isfinite(positions).all()
        assert positions.min() >= 0 and positions.max() <= 1


def test_cells_are_taken_once_and_near():
    positions = np.random.default_rng(0).random((300, 2)) ** 2
    cells = grid_cells(positions, 20, reach=3)
    kept = cells[cells[:, 0] >= 0]
    assert len({*map(tuple, kept.tolist())}) == len(kept) > 150
    far = np.abs(kept - (positions[cells[:, 0] >= 0] * 20 - 0.5).round()).max()
    assert far <= 3 and kept.min() >= 0 and kept.max() < 20


def test_features_of_different_models_or_settings_are_refused(tmp_path):
    from dataclasses import replace

    first = features(tmp_path / "a.parquet", vectors(3))
    other = features(tmp_path / "b.parquet", vectors(3), spec=replace(SPEC, sha256="cd" * 32))
    with pytest.raises(BadInput, match=r"a.parquet and .*b.parquet: features of another model"):
        open_files([first, other])
    larger = features(tmp_path / "c.parquet", vectors(3), spec=replace(SPEC, image_size=(64, 64)))
    with pytest.raises(BadInput, match="other settings: image_size 48 x 48 and 64 x 64"):
        open_files([first, larger])
    maps = features(tmp_path / "d.npz", vectors(3, 32).reshape(3, 8, 2, 2))
    with pytest.raises(BadInput, match=r"maps of features \(8 x 2 x 2 per image\)"):
        open_files([maps])
    again = features(tmp_path / "e.npz", vectors(3, seed=1), spec=replace(SPEC, model="elsewhere"))
    both = read_vectors(open_files([first, again]))
    assert both.files.tolist() == [0, 0, 0, 1, 1, 1] and len(both.paths) == 6


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 20), (200, 10, 10)).save(folder / "red.png")
    (folder / "text.png").write_text("root:x:0:0")
    os.mkfifo(folder / "pipe.png")
    (folder / "null.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return Album(folder, folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.png", "no longer exists"),
        ("text.png", "is not an image"),
        ("pipe.png", "is not a regular file"),
        ("null.png", "is not a regular file"),
        ("folder.png", "is not a regular file"),
        ("../outside.png", "does not lie in the folder"),
        ("a/../../outside.png", "does not lie in the folder"),
        ("/etc/passwd", "does not lie in the folder"),
        ("..", "does not lie in the folder"),
        ("a\0b.png", "does not lie in the folder"),
        ("x" * 5000, "cannot be read"),
        ("", "is not a regular file"),
        ("line\nbreak.png", "no longer exists"),
        ("shard.tar/a.png", "cannot be read|no longer exists|no image|no such"),
    ],
)
def test_only_images_below_the_folder_are_opened(album, name, reason):
    if ".tar/" not in name:
        with pytest.raises(BadImage, match=reason):
            read_image_file(album.location, name)
    assert album.thumbnail(name, 16) is None
    assert len(album.failures) == 1 and "\n" not in album.failures[0]


def test_windows_are_shown_and_only_of_images_below_the_folder(album):
    window = album.pixels("red.png#xywh=5,2,10,8", 0)
    assert window.shape == (8, 10, 3) and (window == (200, 10, 10)).all()
    for name in (
        "red.png#xywh=35,2,10,8",
        "../outside.png#xywh=0,0,4,4",
        "pipe.png#xywh=0,0,4,4",
        "text.png#frame=2",
    ):
        with pytest.raises(BadImage):
            album.pixels(name, 0)


def test_thumbnails_keep_their_shape(album):
    picture = album.thumbnail("red.png", 16)
    assert picture is not None and picture.size == (16, 8) and picture.getpixel((3, 3)) == (200, 10, 10)
    for pixels in (
        np.zeros((9, 9, 1), np.uint16),
        np.full((9, 9, 5), -3.5, np.float32),
        np.zeros((9, 9, 2), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
    ):
        assert picture_of(pixels, 6).size == (6, 6)
