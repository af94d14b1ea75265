"""Example pictures: photographs of scikit-learn and scikit-image that `coma quickstart` does not train on."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from demo.storage import EXAMPLES, Storage

PICTURES = {
    "temple": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
    "coins": "skimage/data/coins.png",
    "galaxies": "skimage/data/hubble_deep_field.jpg",
}
"""File inside an installed package, by the name on the page."""


def example_pictures(storage: Storage) -> list[str]:
    """Copies the examples into the storage and returns their paths, named as on the page."""
    folder = storage.folder / EXAMPLES
    folder.mkdir(exist_ok=True)
    return [
        shutil.copyfile(path_of(file), str(folder / f"{name}{Path(file).suffix}"))
        for name, file in PICTURES.items()
    ]


def path_of(file: str) -> Path:
    """Returns where a file of an installed package lies."""
    package, _, rest = file.partition("/")
    found = importlib.util.find_spec(package)
    assert found and found.origin
    return Path(found.origin).parent / rest
