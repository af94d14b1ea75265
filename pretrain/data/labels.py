"""Labels that training and test images share, whatever order each set lists its classes in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.data.source import Source
from pretrain.errors import BadInput


def shared_labels(train: Source, test: Source) -> tuple[Tensor, Tensor, int]:
    """Labels of both sets, counted alike, int64 `[n]` and `[m]`, and the number of classes.

    Where both sets name their classes, names decide, in the training set's order; else numbers do.

    Raises:
        BadInput: no labels, test images of a class that has no training image, or a single class.
    """
    known, asked = _labels(train), _labels(test)
    names: list[str] | None = None
    if train.class_names is not None and test.class_names is not None:
        names = [*train.class_names, *sorted(set(test.class_names) - set(train.class_names))]
        asked = np.array([names.index(name) for name in test.class_names])[asked]
    foreign = np.setdiff1d(asked, known)
    if len(foreign):
        raise BadInput(
            f"{test.location}: classes of which {train.location} has no image: {_few(foreign, names)}; "
            f"it has {_few(np.unique(known), names)}"
        )
    if len(np.unique(known)) < 2:
        raise BadInput(f"{train.location}: its images are all of one class; a classifier needs two")
    return torch.from_numpy(known), torch.from_numpy(asked), int(known.max()) + 1


def top_share(guess: Tensor, labels: Tensor, most: int) -> float:
    """Share of rows of `guess [n, classes]` with the right label among the `most` largest, 0..1."""
    return (guess.topk(most, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def _labels(source: Source) -> np.ndarray:
    if source.labels is None:
        raise BadInput(
            f"{source.location}: has no labels; give a folder with one folder of images per class, "
            "or a pack with labels"
        )
    return source.labels


def _few(labels: np.ndarray, names: list[str] | None, most: int = 10) -> str:
    shown = [str(label) if names is None else names[label] for label in labels[:most]]
    return ", ".join(shown) + (f" and {len(labels) - most} more" if len(labels) > most else "")
