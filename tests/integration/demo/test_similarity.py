"""Similar patches, regions and pictures: what is alike is found, and nothing else is read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from demo_files import collection
from export_files import backbone, pretrained
from feature_files import features, vectors
from PIL import Image

from coma.artifact import load_encoder
from coma.errors import BadInput
from demo.models import Models
from demo.nearest import SIDE, PictureSearch
from demo.similarity import feature_at, feature_regions, most_similar, similarity_to, stage_features


def test_the_most_similar_patch_is_the_patch_itself(tmp_path):
    encoder = load_encoder(backbone(tmp_path / "a"))
    image = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    for stage, side in ((1, 24), (3, 6), (9, 3)):
        found = stage_features(encoder, image, stage)
        assert found.shape[1] == side and torch.allclose(found.norm(dim=0), torch.tensor(1.0), atol=1e-5)
        similarity = similarity_to(found, feature_at(found, 0.7, 0.3))
        row, col = most_similar(similarity)
        assert (int(row * side), int(col * found.shape[2])) == (int(0.7 * side), int(0.3 * found.shape[2]))
        assert similarity.max() == pytest.approx(1, abs=1e-5) and similarity.min() < 0.99
        expected = F.cosine_similarity(found[:, :1, :1], found, dim=0)
        assert np.allclose(similarity_to(found, found[:, 0, 0]), expected, atol=1e-5)
    assert feature_at(found, 1.0, 1.0).equal(found[:, -1, -1])


def test_regions_are_where_features_differ():
    features_ = torch.zeros(4, 6, 8)
    features_[0], features_[0, :, :2], features_[1, :, :2] = 1, 0, 1
    features_[0, 0, 7], features_[2, 0, 7] = 0, 1
    found = feature_regions(features_, 3)
    assert (found[:, :2] == 1).all() and found[0, 7] == 2 and (found == 0).sum() == 35  # by their size
    assert set(np.unique(feature_regions(torch.ones(4, 2, 2) / 2, 5))) == {0}
    assert feature_regions(features_[:, :1, :2], 8).shape == (1, 2)


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("album")
    artifact = pretrained(folder / "small" / "artifact")
    return artifact, collection(folder, artifact)


def test_the_nearest_picture_is_the_picture_itself(album):
    artifact, file = album
    search = PictureSearch(file, Models([artifact]))
    assert search.title == "small finds the most similar of 4 pictures." and search.channels == 3
    pixels = np.asarray(Image.open(file.parent / "album" / "flower.jpg"))
    found = search.nearest(pixels, 3)  # coma embed decodes a large JPEG smaller, hence not quite 1
    assert [found[0].name, len(found)] == ["flower.jpg", 3]
    assert found[0].similarity == pytest.approx(1, abs=0.02) and found[0].thumbnail.shape[1] == SIDE
    assert found[0].similarity > found[1].similarity >= found[2].similarity


def test_pictures_that_are_gone_or_lie_elsewhere_are_left_out(album, tmp_path):
    artifact, file = album
    shutil.copytree(file.parent / "album", tmp_path / "album")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    spec = PictureSearch(file, Models([artifact]))._model.spec
    names = ["gone.png", "flower.jpg", "../secret.png", "/etc/passwd"]
    images = str(tmp_path / "album")
    values = vectors(4, spec.shape[0])
    listed = features(tmp_path / "f.npz", values, names, images=images, spec=spec)
    search = PictureSearch(listed, Models([artifact]))
    for _ in range(2):
        assert [each.name for each in search.nearest(np.zeros((9, 9, 3), np.uint8), 24)] == ["flower.jpg"]
    assert search._album.failures == []


def test_features_of_other_models_and_lost_pictures_are_said_at_the_start(album, tmp_path):
    artifact, file = album
    other = pretrained(tmp_path / "other" / "artifact", size=64)
    with pytest.raises(BadInput, match="is not on the page; name the artifact that made them"):
        PictureSearch(file, Models([other]))
    spec = PictureSearch(file, Models([artifact]))._model.spec
    lost = features(tmp_path / "f.npz", vectors(2, spec.shape[0]), images=str(tmp_path / "none"), spec=spec)
    with pytest.raises(BadInput, match=r"its images cannot be read: .*none: no such file or folder"):
        PictureSearch(lost, Models([artifact]))
