"""Labels find their pictures by name, also where names have dots."""

from pathlib import Path

import pytest
from PIL import Image

from downstream.datasets.files import DatasetFiles, splits_by_lists
from downstream.prediction_files import output_stems


def dataset(folder: Path, *names: str) -> DatasetFiles:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return DatasetFiles(folder)


@pytest.mark.parametrize(
    ("label", "said", "image"),
    [
        ("plant.1", ("plant.1",), "plant.1.jpg"),
        ("plant.1.txt", (), "plant.1.jpg"),
        ("plant.1.jpg.txt", (), "plant.1.jpg"),
        ("plant.json", (), "plant.jpg"),
        ("plant.png", ("plant.png",), "plant.jpg"),
        ("other.xml", ("C:\\\\photos\\\\plant.1.jpg",), "plant.1.jpg"),
        ("frame.0001.txt", (), None),
        ("frame.0001", ("frame.0001",), None),
        ("frame.txt", (), "frame.jpg"),
    ],
)
def test_only_known_endings_are_left_out(tmp_path, label, said, image):
    files = dataset(tmp_path, "plant.jpg", "plant.1.jpg", "frame.jpg")
    assert files.image_of(label, *said) == image


def test_pictures_near_the_label_come_before_those_of_the_exact_name_elsewhere(tmp_path):
    files = dataset(tmp_path, "train/images/a.jpg", "val/images/a.png")
    assert files.image_of("train/masks/a.png") == "train/images/a.jpg"


def test_names_of_our_own_tables_and_of_lists_find_their_pictures(tmp_path):
    names = ["plant.1.jpg", "plant.2.jpg", "plant.jpg"]
    files = dataset(tmp_path, *names)
    stems = output_stems(names)
    assert {name: files.image_of(f"./{stem}", stem) for name, stem in stems.items()} == dict(
        zip(names, names, strict=True)
    )
    listing = tmp_path / "ImageSets" / "Main" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("plant.1\nplant.2 1\n")
    assert splits_by_lists(files, ["ImageSets/Main/train.txt"], pytest.fail) == {"train": names[:2]}
