"""Files of features made without a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from downstream.features.files import FeaturesInfo, FeatureSpec, Rows, write_features

SPEC = FeatureSpec("runs/first/artifact", "ab" * 32, (48, 48), (0.5,), (0.2,), None, "mean", (8,))


def info(images: Path | str = "photos", count: int = 0, **changes) -> FeaturesInfo:
    plain = FeaturesInfo(SPEC, str(images), str(images), None, "0" * 64, count, "torch, cpu", {})
    return replace(plain, **changes)


def vectors(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def features(path: Path, values: np.ndarray, names: list[str] | None = None, **changes) -> Path:
    """Writes a file of features, `[n, ...]`, of images of these names."""
    names = names or [f"{i}.png" for i in range(len(values))]
    about = info(count=len(names), **changes)
    if "spec" not in changes:
        about = replace(about, spec=replace(SPEC, shape=values.shape[1:]))
    half = len(names) // 2
    parts = [Rows(names[:half], values[:half]), Rows(names[half:], values[half:])]
    write_features(path, about, parts, len(names))
    return path
