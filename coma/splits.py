"""Names of splits: one list for the whole product, and which folders, packs or shards are splits.

A name is that of a split in any case, with numbers or words such as "images" and "set" beside it:
`train`, `Training`, `train2017`, `VAL_images`, `trainset`. What else a name says has to agree:
`imagenet_train` and `imagenet_val` are splits of one another, `train_station` and `test_tube` are not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from coma.errors import BadInput
from coma.messages import abridged, counted

Split = Literal["train", "val", "test"]

SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"),
}
"""What folders, packs and shards of a split are called, in lower case."""

_NEUTRAL = frozenset(
    [
        "set",
        "split",
        "part",
        "data",
        "dataset",
        "dir",
        "folder",
        "shard",
        "shards",
        "image",
        "images",
        "img",
        "imgs",
        "jpg",
        "jpeg",
        "jpegs",
        "png",
        "pngs",
        "photo",
        "photos",
        "picture",
        "pictures",
        "instances",
    ]
)
_SPLIT_OF: dict[str, Split] = {
    word + end: split for split, words in SPLITS.items() for word in words for end in ("", *_NEUTRAL)
}
_SPLIT_OF["trainval"] = "train"
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+")


class Place(NamedTuple):
    """Where an image belongs."""

    split: Split | Literal["beside", ""]
    """beside: next to splits, in none of them. Empty: there are no splits where it lies."""
    folder: str
    """The split's own folder, relative; for `beside` what lies beside the splits."""


class SplitImages(NamedTuple):
    """The images of one split, out of all that lie below a folder."""

    names: list[str]
    """Relative to `folder`."""
    folder: str
    """The split's own folder, relative; empty where images lie in several places, or there are no splits."""
    split: Split | None
    """None: there are no splits."""
    classes: set[str]
    """Names of the folders in this split and in those beside it."""
    notes: tuple[str, ...]
    """What was left out or may be misread, a sentence each."""


def split_of(name: str) -> Split | None:
    """The split that a name stands for; None where it says something else, too."""
    split, others = _parsed(name)
    return None if others else split


def split_folders(parent: Path, split: Split) -> list[Path]:
    """The folders directly in `parent` that are called like a split, its usual names first."""
    names = SPLITS[split]
    found = [path for path in parent.glob("*") if split_of(path.name) == split and path.is_dir()]
    usual = {name: number for number, name in enumerate(names)}
    return sorted(found, key=lambda path: (usual.get(path.name.lower(), len(names)), path.name))


def parse_split(name: str) -> Split:
    """The split that a user asks for.

    Raises:
        BadInput: it is none.
    """
    split = split_of(name)
    if split is None:
        raise BadInput(f"{name!r} is not a split; there are {', '.join(SPLITS)}")
    return split


def paired_splits(names: Iterable[str]) -> dict[str, Split]:
    """The splits among names that lie side by side; none unless one is of training and one is held out.

    What else their names say must be the same, or every name must mention a split and one say nothing else.
    """
    parsed = {name: _parsed(name) for name in names}
    kinds: dict[tuple[str, ...], set[bool]] = {}
    for split, others in parsed.values():
        if split:
            kinds.setdefault(others, set()).add(split == "train")
    agreed = {others for others, found in kinds.items() if len(found) == 2}
    if () in kinds and all(split for split, _ in parsed.values()) and len(set().union(*kinds.values())) == 2:
        agreed |= kinds.keys()  # train beside val_original
    if agreed:
        agreed.add(())
    return {name: split for name, (split, others) in parsed.items() if split is not None and others in agreed}


def all_splits(names: Collection[str]) -> dict[str, Split]:
    """The same names, if each of them is that of a split and says nothing else; otherwise none."""
    found: dict[str, Split] = {name: split for name in names if (split := split_of(name)) is not None}
    return found if len(found) == len(names) else {}


def places(folders: Collection[str]) -> dict[str, Place]:
    """Where the images of every folder belong.

    Splits may lie at any depth, as in `images/train` or `bottle/train`. Where one level of the tree has
    splits side by side, a folder that is called like a split is one elsewhere, too.

    Args:
        folders: that hold images themselves, relative, with /; the root is the empty string.
    """
    children: dict[str, set[str]] = {}
    for folder in folders:
        while folder:
            folder, _, name = folder.rpartition("/")
            names = children.setdefault(folder, set())
            if name in names:
                break
            names.add(name)
    pairs = {parent: paired_splits(names) for parent, names in children.items()}
    found: dict[str, Place] = {}
    if any(pairs.values()):
        for parent, names in children.items():
            splits = pairs[parent] or {name: split for name in names if (split := split_of(name))}
            for name in names if splits else ():
                folder = f"{parent}/{name}".lstrip("/")
                found[folder] = Place(splits.get(name, "beside"), folder)
    else:
        top, names = "", children.get("", set())
        while len(names) == 1 and top not in folders and not all_splits(names):
            top = f"{top}/{next(iter(names))}".lstrip("/")
            names = children.get(top, set())
        if top not in folders:
            for name, split in all_splits(names).items():
                folder = f"{top}/{name}".lstrip("/")
                found[folder] = Place(split, folder)
    return {folder: _place(folder, found, pairs) for folder in folders}


def choose_split(there: Collection[Split], path: Path, split: str | None, held_out: bool) -> Split | None:
    """Which of the splits at `path` to read; None where there are none and none was asked for.

    Args:
        there: the splits that there are.
        path: for messages.
        split: what was asked for; test and val stand for each other where only one exists.
        held_out: without a `split`, test or val where there are any, not the training split.

    Raises:
        BadInput: what was asked for is not there, or there are only held-out images.
    """
    if split is not None:
        wanted = parse_split(split)
        for name in (wanted,) if wanted == "train" else (wanted, "test", "val"):
            if name in there:
                return name
        has = ", ".join(name for name in SPLITS if name in there) or "no splits"
        called = "" if there else ", which are folders, packs or shards called train, val, test or the like"
        raise BadInput(f"{path}: no split {split!r} here; it has {has}{called}")
    if not there:
        return None
    for name in ("test", "val", "train") if held_out else ("train",):
        if name in there:
            return name
    raise BadInput(
        f"{path}: holds no training images, only a split that is kept from training "
        f"({' and '.join(name for name in SPLITS if name in there)}); give that folder or file itself to "
        "train on it"
    )


def select_images(names: Sequence[str], path: Path, split: str | None, held_out: bool) -> SplitImages:
    """The images of the split that is to be read.

    Without a `split`, training images are read with whatever lies where there are no splits.

    Args:
        names: of all images below `path`, relative, with /.
        path: for messages.
        split: as in `choose_split`.
        held_out: as in `choose_split`.

    Raises:
        BadInput: as `choose_split`; or a held-out folder lies among the class folders that it holds itself.
    """
    parents = [_parent(name) for name in names]
    folders = set(parents)
    where = places(folders)
    there = {place.split for place in where.values() if place.split in SPLITS}
    wanted = choose_split(there, path, split, held_out)  # type: ignore[arg-type]
    if wanted is None:
        firsts = {folder.partition("/")[0] for folder in folders if folder}
        _check_mirrors(folders, firsts, path)
        return SplitImages(list(names), "", None, firsts, _not_splits(firsts, path))
    taken = {wanted, ""} if split is None and wanted == "train" else {wanted}
    kept = [name for name, parent in zip(names, parents, strict=True) if where[parent].split in taken]
    owners = {place.folder for place in where.values() if place.split in taken}
    owner = owners.pop() if len(owners) == 1 else ""
    classes = {
        folder.removeprefix(f"{place.folder}/").partition("/")[0]
        for folder, place in where.items()
        if place.split in SPLITS and _parent(place.folder) == _parent(owner) and folder != place.folder
    }
    left_out = Counter(where[parent].folder for parent in parents if where[parent].split not in taken)
    read = Counter(where[parent].folder for parent in parents if where[parent].split in taken)
    notes = _left_out(left_out, path, read) if split is None and not held_out else ()
    return SplitImages([name.removeprefix(f"{owner}/") for name in kept], owner, wanted, classes, notes)


def _check_mirrors(folders: Collection[str], firsts: Collection[str], path: Path) -> None:
    for folder in sorted(folders):
        first, _, rest = folder.partition("/")
        if split_of(first) in ("val", "test") and rest.partition("/")[0] in firsts:
            raise BadInput(
                f"{path}: {first}/ holds the folder {rest.partition('/')[0]}/, which lies beside it, too, so "
                "it looks like a split of the others; move those into a folder train/ beside it"
            )


def left_out_note(path: Path, kept: str, others: Sequence[str]) -> str:
    """One sentence about splits that are not read."""
    left_out = abridged(others, 4)
    return f"{path}: reads {kept}, and leaves out {left_out}; give one of these by its own path to use it"


def _left_out(counts: Counter[str], path: Path, read: Counter[str]) -> tuple[str, ...]:
    if not counts:
        return ()
    read_folders = abridged(_counted(read, "other folders"), 4)
    return (left_out_note(path, read_folders, _counted(counts, "what lies beside them")),)


def _counted(counts: Counter[str], nameless: str) -> list[str]:
    """Folders with how many images they hold."""
    return [
        f"{f'{folder}/' if folder else nameless} ({counted(count, 'image')})"
        for folder, count in sorted(counts.items())
    ]


def _not_splits(firsts: set[str], path: Path) -> tuple[str, ...]:
    """Folders that are called like splits and are read like all others."""
    bare = [name for name in firsts if split_of(name)]
    if not bare or len(firsts) == 1:
        return ()
    listed = ", ".join(f"{name}/" for name in sorted(name for name in firsts if _parsed(name)[0]))
    return (
        f"{path}: {listed} is read like the other folders in it, not as a split: splits are train/ beside "
        "val/ or test/, with nothing else in their names",
    )


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _place(folder: str, found: dict[str, Place], pairs: dict[str, dict[str, Split]]) -> Place:
    if pairs.get(folder):
        return Place("beside", folder)  # images next to the splits
    ends = [match.start() for match in re.finditer("/", folder)]
    for end in (*ends, len(folder)):
        if folder[:end] in found:
            return found[folder[:end]]
    return Place("", "")


def _parsed(name: str) -> tuple[Split | None, tuple[str, ...]]:
    """The split that a name mentions, if it mentions one, and what else it says."""
    words = [word.lower() for word in _WORD.findall(name)]
    split: list[Split] = [_SPLIT_OF[word] for word in words if word in _SPLIT_OF]
    if len(split) != 1:
        return None, ()
    return split[0], tuple(word for word in words if word not in _SPLIT_OF and word not in _NEUTRAL)
