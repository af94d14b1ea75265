"""Similarity of the features of patches: to one patch, in the same or another picture, and as regions."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coma.models import Encoder

REGIONS = (2, 8)
"""Fewest and most regions."""


@torch.no_grad()
def stage_features(encoder: Encoder, image: Tensor, stage: int) -> Tensor:
    """Returns the features of a stage, `[c, h, w]`, each of length 1.

    Args:
        encoder: Encoder in evaluation mode.
        image: Normalised image, `[1, c, H, W]`.
        stage: Stage, counted from 1; the last one for encoders that have fewer.
    """
    maps = encoder.pyramid(image)
    return F.normalize(maps[min(stage, len(maps)) - 1][0].float(), dim=0)


def similarity_to(features: Tensor, query: Tensor) -> np.ndarray:
    """Returns the cosine similarity of features `[c, h, w]` and one of them `[c]`: `[h, w]`, -1 to 1."""
    return torch.einsum("chw,c->hw", features, query).clamp(-1, 1).numpy()


def feature_at(features: Tensor, row: float, col: float) -> Tensor:
    """Returns the feature, `[c]`, at a vertical and a horizontal position, 0 to 1."""
    h, w = features.shape[1:]
    return features[:, min(int(row * h), h - 1), min(int(col * w), w - 1)]


def most_similar(similarity: np.ndarray) -> tuple[float, float]:
    """Returns the vertical and horizontal position, 0 to 1, of the centre of the most similar patch."""
    h, w = similarity.shape
    row, col = divmod(int(similarity.argmax()), w)
    return (row + 0.5) / h, (col + 0.5) / w


def feature_regions(features: Tensor, count: int) -> np.ndarray:
    """Returns `count` regions of similar features by k-means: int `[h, w]`, the largest region first.

    Args:
        features: `[c, h, w]`, each of length 1.
        count: Number of regions; fewer where there are fewer different features.
    """
    from sklearn.cluster import KMeans

    h, w = features.shape[1:]
    rows = features.flatten(1).T.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different features than regions
        found = KMeans(min(count, h * w), random_state=0).fit_predict(rows)
    order = np.bincount(found, minlength=count).argsort(kind="stable")[::-1]
    return order.argsort()[found].reshape(h, w)
