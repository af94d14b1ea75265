"""Models compared on one mask, settings from an address, and pictures of the training data."""

from pathlib import Path

import pytest
from export_files import pretrained
from skimage import data

from coma.errors import BadInput
from demo.compare_models import compare_models
from demo.models import Models
from demo.pages.page_state import restore
from demo.training_data import TrainingImages

pytestmark = pytest.mark.filterwarnings("ignore")  # torch, of what the fixtures do


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models([pretrained(folder / f"px{size}" / "artifact", size=size) for size in (96, 48, 80)])


def test_every_model_has_a_name_of_its_own(tmp_path):
    runs = ("m (2)", "a/m", "b/m", "c/m")
    given = [pretrained(tmp_path / run / "artifact", size=48 + 16 * i) for i, run in enumerate(runs)]
    models = Models(given)
    assert models.names == ["m (2)", "m", "m (3)", "m (4)"]
    assert [models[name].artifact for name in models.names] == given


def test_finer_grids_get_the_mask_of_the_coarsest_one(models):
    chosen = [models[name] for name in ("px96", "px48")]
    fine, coarse = compare_models(chosen, lambda _: data.astronaut(), "mae", 3, 0.5)
    assert coarse.hidden.shape == (1, 48, 48) and 0.3 < coarse.hidden.mean() < 0.7
    assert all((fine.hidden[:, i::2, i::2] == coarse.hidden).all() for i in (0, 1))


def test_grids_that_do_not_align_are_refused(models):
    chosen = [models[name] for name in ("px96", "px80")]
    with pytest.raises(BadInput, match="px96 masks 6 x 6 units"):
        compare_models(chosen, lambda _: data.astronaut(), "mae", 3, 0.5)


def test_an_address_gives_settings_of_this_page_alone(models):
    examples = ["/tmp/x/coins.png"]
    full = {"model": "px48", "method": "mae", "ratio": "0.5", "seed": "7", "example": "coins"}
    assert restore(full, models, examples) == {**full, "ratio": 0.5, "seed": 7, "example": examples[0]}
    bad = {"model": ["px"], "method": [""], "ratio": ["nan", "1"], "seed": ["-1", "9" * 5000],
           "example": ["../x/coins", examples[0]]}  # fmt: skip
    for name, value in [(name, each) for name, values in bad.items() for each in values]:
        assert restore({name: value}, models, examples) == {}, (name, value)


def test_training_images_are_known_by_name_and_size(models, tmp_path):
    from coma.data.listing import write_listing

    write_listing(tmp_path, {"images": {"names": ["n1/my dog (2).jpg"], "sizes": [77], "labels": None}})
    images = TrainingImages(tmp_path / "artifact")
    assert ("my dog 2.jpg", 77) in images  # as gradio writes it
    assert ("my dog 2.jpg", 78) not in images and ("dog.jpg", 77) not in images
    assert models["px48"].trained_on is None
    with pytest.raises(BadInput, match="no list"):
        TrainingImages(tmp_path / "other" / "artifact")


def test_a_listing_in_the_current_folder_is_not_of_the_shipped_weights(tmp_path, monkeypatch):
    from coma.data.listing import write_listing

    write_listing(tmp_path, {"images": {"names": ["dog.jpg"], "sizes": [77], "labels": None}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no list"):
        TrainingImages(Path("tiny-64"))
