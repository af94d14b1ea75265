"""Quick calls of `coma embed`, and what they wrote."""

from pathlib import Path

import numpy as np

from coma.cli import main
from downstream.features.files import FeaturesFile

COUNT = 23
BROKEN = ("07.png", "19.png")
QUICK = ("--device", "cpu", "--workers", "0", "--batch-size", "4", "--part-images", "6")


def embed(model, images, out, *more) -> int:
    return main(["embed", str(model), str(images), "--out", str(out), *QUICK, *more])


def content(path: Path) -> tuple[list[str], np.ndarray]:
    groups = list(FeaturesFile(path).groups())
    return [name for rows in groups for name in rows.paths], np.concatenate([rows.values for rows in groups])


def same(one: Path, other: Path) -> bool:
    (names, values), (others, wanted) = content(one), content(other)
    return names == others and np.allclose(values, wanted, atol=1e-5)
