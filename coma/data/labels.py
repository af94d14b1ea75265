"""Labels of images that belong together: matched by name or by value, never by their place in a list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coma.data.sources.base import Source
from coma.data.sources.image_folder import parse_whole_numbers
from coma.errors import BadInput
from coma.messages import abridged


def align_labels(train: Source, test: Source) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Labels of both sets, int64 `[n]` and `[m]`, counted alike from 0, and the classes' names in that order.

    The classes are those that the training set has images of, and the test set plays no part in how they are
    numbered: whole numbers by their value, other names in the training set's order.

    Raises:
        BadInput: no labels, test images of a class that has no training image, or a single class.
    """
    ours, theirs = _names_of_both(train, test)
    known = _class_of_each(train, ours)
    names = list(dict.fromkeys(known[np.argsort(np.asarray(train.labels), kind="stable")].tolist()))
    values = parse_whole_numbers(names)
    classes = tuple(sorted(names, key=values.__getitem__) if values else names)
    asked = _found(_class_of_each(test, theirs), classes, test, f"{train.location} has no image")
    if len(classes) < 2:
        raise BadInput(f"{train.location}: its images are all of one class; a classifier needs two")
    return _places(known, classes), asked, classes


def class_indices(source: Source, classes: Sequence[str], owner: str) -> Tensor:
    """Labels of a source's images as places in a list of classes, int64 `[n]`.

    Args:
        source: with labels.
        classes: names of a model's classes.
        owner: who has these classes, for messages.

    Raises:
        BadInput: no labels, images of other classes, or labels that are bare numbers where the classes have
            names.
    """
    if source.labels is not None and source.class_names is None and parse_whole_numbers(classes) is None:
        raise BadInput(_only_numbers(source, classes, owner))
    return _found(_class_of_each(source, source.class_names), classes, source, f"{owner} knows nothing")


def topk_accuracy(guess: Tensor, labels: Tensor, most: int) -> float:
    """Share of rows of `guess [n, classes]` with the right label among the `most` largest, 0..1."""
    return (guess.topk(most, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def _names_of_both(train: Source, test: Source) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """The class names to go by; None where numbers decide.

    Where one set has names and the other has none, the numbers mean the same if they are the data's own, as
    those of packs are; places in a sorted list of folder names mean nothing to others.
    """
    ours, theirs = train.class_names, test.class_names
    for bare, named in ((train, test), (test, train)):
        if bare.labels is None or bare.class_names is not None or named.class_names is None:
            continue
        if named.labels_are_stored:
            return (None, None) if bare is train else (ours, ours)
        if parse_whole_numbers(named.class_names) is None:
            raise BadInput(_only_numbers(bare, named.class_names, str(named.location)))
    return ours, theirs


def _class_of_each(source: Source, names: Sequence[str] | None) -> np.ndarray:
    """The name of every image's class, `[n]`; its number where there are no names."""
    labels = source.labels
    if labels is None:
        why = source.unlabelled_reason or (
            "give a folder with one folder of images per class, or a pack with labels"
        )
        raise BadInput(f"{source.location}: has no labels; {why}")
    most = np.iinfo(np.int64).max if names is None else len(names) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > most))
    if len(wrong):
        first = int(wrong[0])
        classes = (
            "must be 0 or more" if names is None else f"must be 0 to {most}, as there are {most + 1} classes"
        )
        raise BadInput(f"{source.describe(first)}: its label is {labels[first]}, but labels {classes}")
    numbers, inverse = np.unique(labels, return_inverse=True)
    return np.array([str(n) if names is None else names[n] for n in numbers.tolist()], object)[inverse]


def _found(asked: np.ndarray, classes: Sequence[str], source: Source, whose: str) -> Tensor:
    """Places of names in a list of classes, by value where both are whole numbers."""
    names = list(dict.fromkeys(asked.tolist()))
    ours, theirs = parse_whole_numbers(classes), parse_whole_numbers(names)
    if ours and theirs:
        by_value = {value: name for name, value in ours.items()}
        asked = np.array([by_value.get(theirs[name], name) for name in asked.tolist()], object)
        names = list(dict.fromkeys(asked.tolist()))
    foreign = sorted(set(names) - set(classes))
    if foreign:
        alike = {name.casefold(): name for name in classes}
        hints = [f"{name} is {alike[name.casefold()]} there" for name in foreign if name.casefold() in alike]
        raise BadInput(
            f"{source.location}: classes of which {whose}: {abridged(foreign)}; it has {abridged(classes)}"
            + (f" (names must be the same letter for letter: {abridged(hints)})" if hints else "")
        )
    return _places(asked, classes)


def _places(names: np.ndarray, classes: Sequence[str]) -> Tensor:
    place = {name: number for number, name in enumerate(classes)}
    return torch.tensor([place[name] for name in names.tolist()], dtype=torch.int64)


def _only_numbers(source: Source, classes: Sequence[str], owner: str) -> str:
    return (
        f"{source.location}: its labels are numbers without names, and {owner} has names "
        f"({abridged(classes, 3)}), so nothing says which is which; give the names, as class_names in "
        "the pack or in index.json beside the shards, in the order of the numbers"
    )
