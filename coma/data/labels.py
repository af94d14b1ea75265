"""Labels of several data sets, matched by class name or by value, never by their position in a list."""

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
    """Returns the labels of both sets in one numbering from 0, int64 `[n]` and `[m]`, and the class names.

    The classes are those with training images; the test set does not influence their order. Names that are
    whole numbers are sorted by value, other names are in the order of the training set. Labels of images with
    any number of classes are float32 `[n, classes]` and `[m, classes]` of 0 and 1.

    Raises:
        BadInput: A set has no labels, a class of the test images has no training image, there is only one
            class, or the images of only one set may have several classes.
    """
    if train.multi_hot is not None:
        if test.multi_hot is None:
            raise BadInput(
                f"{test.location}: each image has one class, but those of {train.location} have any number; "
                "give both in the same form"
            )
        present = _present(train, train.multi_hot)
        owner = str(train.location)
        return class_indices(train, present, owner), class_indices(test, present, owner), tuple(present)
    ours, theirs = _names_of_both(train, test)
    known = _class_of_each(train, ours)
    names = list(dict.fromkeys(known[np.argsort(np.asarray(train.labels), kind="stable")].tolist()))
    values = parse_whole_numbers(names)
    classes = tuple(sorted(names, key=values.__getitem__) if values else names)
    asked = _positions_of(_class_of_each(test, theirs), classes, test, str(train.location))
    if len(classes) < 2:
        raise BadInput(f"{train.location}: all images are of one class; a classifier needs two")
    return _positions(known, classes), asked, classes


def align_single_labels(train: Source, test: Source) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Returns the labels of both sets as `align_labels`, for protocols in which an image has one class.

    Raises:
        BadInput: As `align_labels`; or the images may have any number of classes.
    """
    if train.multi_hot is not None:
        raise BadInput(
            f"{train.location}: its images may have any number of classes, but top-1 accuracy needs one for "
            "each; `coma classify train` takes them (with --frozen, a linear head on frozen features)"
        )
    return align_labels(train, test)


def class_indices(source: Source, classes: Sequence[str], owner: str) -> Tensor:
    """Returns the labels of a source as positions in a list of classes, int64 `[n]`.

    For images with any number of classes, float32 `[n, classes]` of 0 and 1.

    Args:
        source: Labelled images.
        classes: Names of a model's classes.
        owner: Owner of the classes, for messages, such as "the model".

    Raises:
        BadInput: The source has no labels or images of other classes, or its labels are numbers without names
            but the classes have names.
    """
    if source.multi_hot is not None:
        return _columns_of(source, source.multi_hot, classes, owner)
    if source.labels is not None and source.class_names is None and parse_whole_numbers(classes) is None:
        raise BadInput(_only_numbers(source, classes, owner))
    return _positions_of(_class_of_each(source, source.class_names), classes, source, owner)


def topk_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Returns the share of rows of `logits [n, classes]` whose label is among the `k` largest, 0..1."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def _names_of_both(train: Source, test: Source) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Returns the class names of both sets; None to compare labels by number.

    If only one set has names, the numbers of both are comparable if the data store them, as packs do;
    positions of sorted folder names are not comparable.
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
    """Returns the class name of every image, `[n]`; the number if there are no names."""
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


def _positions_of(asked: np.ndarray, classes: Sequence[str], source: Source, owner: str) -> Tensor:
    """Returns the positions of names in a list of classes, by value if all of them are whole numbers."""
    names = list(dict.fromkeys(asked.tolist()))
    ours, theirs = parse_whole_numbers(classes), parse_whole_numbers(names)
    if ours and theirs:
        by_value = {value: name for name, value in ours.items()}
        asked = np.array([by_value.get(theirs[name], name) for name in asked.tolist()], object)
        names = list(dict.fromkeys(asked.tolist()))
    foreign = sorted(set(names) - set(classes))
    if foreign:
        where = source.label_place(int(np.flatnonzero(np.isin(asked, foreign))[0]))
        raise BadInput(_foreign(source, foreign, where, classes, owner))
    return _positions(asked, classes)


def _columns_of(source: Source, multi_hot: np.ndarray, classes: Sequence[str], owner: str) -> Tensor:
    """Returns the classes of images with any number of them, in the order of a list of classes."""
    names = list(source.class_names or ())
    if foreign := sorted(set(_present(source, multi_hot)) - set(classes)):
        first = multi_hot[:, [names.index(name) for name in foreign]].any(axis=1).argmax()
        raise BadInput(_foreign(source, foreign, source.label_place(int(first)), classes, owner))
    columns = torch.zeros(len(multi_hot), len(classes))
    for place, name in enumerate(classes):
        if name in names:
            columns[:, place] = torch.from_numpy(multi_hot[:, names.index(name)])
    return columns


def _present(source: Source, multi_hot: np.ndarray) -> list[str]:
    """Returns the names of the classes that an image has."""
    used = np.flatnonzero(multi_hot.any(axis=0)).tolist()
    return [(source.class_names or ())[i] for i in used]


def _foreign(source: Source, foreign: Sequence[str], where: str, classes: Sequence[str], owner: str) -> str:
    alike = {name.casefold(): name for name in classes}
    hints = [f"{name} is {alike[name.casefold()]} there" for name in foreign if name.casefold() in alike]
    return (
        f"{source.location}: {owner} does not have the classes {abridged(foreign)}"
        + (f" (first in {where})" if where else "")
        + f"; it has {abridged(classes)}"
        + (f" (upper and lower case matter: {abridged(hints)})" if hints else "")
    )


def _positions(names: np.ndarray, classes: Sequence[str]) -> Tensor:
    place = {name: number for number, name in enumerate(classes)}
    return torch.tensor([place[name] for name in names.tolist()], dtype=torch.int64)


def _only_numbers(source: Source, classes: Sequence[str], owner: str) -> str:
    return (
        f"{source.location}: its labels are numbers without names, and {owner} has names "
        f"({abridged(classes, 3)}), so they cannot be matched; add the names in the order of "
        "the numbers, as class_names in the pack or in index.json beside the shards"
    )
