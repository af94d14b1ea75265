"""A labelled data set of noise."""

from pathlib import Path

import numpy as np
from PIL import Image


def class_folders(folder: Path, train: int = 24, test: int = 12, classes: int = 2) -> Path:
    """Noise that is brighter from class to class."""
    rng = np.random.default_rng(1)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            label = number % classes
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (20, 20, 3), dtype=np.uint8) + np.uint8(60 * label)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder
