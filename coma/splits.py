"""Names of splits: one list for the whole product, and the folders, packs or shards that are splits.

Upper and lower case are equal, and numbers and words such as "images" and "set" are ignored: `train`,
`Training`, `train2017`, `VAL_images`, `trainset` are splits. The rest of the name must match that of another
split: `imagenet_train` and `imagenet_val` are splits, `train_station` and `test_tube` are not.
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
"""Names of the folders, packs and shards of each split, in lower case."""

_NEUTRAL = (
    *("set", "split", "part", "data", "dataset", "dir", "folder", "shard", "shards", "instances"),
    *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"),
    *("jpg", "jpeg", "jpegs", "png", "pngs"),
)
_SPLIT_OF: dict[str, Split] = {
    word + end: split for split, words in SPLITS.items() for word in words for end in ("", *_NEUTRAL)
}
_SPLIT_OF["trainval"] = "train"
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+")


class FolderSplit(NamedTuple):
    """The split that a folder belongs to."""

    split: Split | Literal["beside", ""]
    """"beside" if the folder is next to splits but in none of them; empty if there are no splits around."""
    folder: str
    """Relative path of the split's own folder; with "beside", of the folder next to the splits."""


class SplitImages(NamedTuple):
    """The images of one split of a folder."""

    names: list[str]
    """Paths relative to `folder`."""
    folder: str
    """Relative path of the split's folder; empty if the split has several folders or there are no splits."""
    split: Split | None
    """None if there are no splits."""
    classes: set[str]
    """Names of the class folders in this split and in the splits beside it."""
    notes: tuple[str, ...]
    """Sentences for the user about images that are skipped or may be misread."""


def split_of(name: str) -> Split | None:
    """Returns the split that a name means; None if the name has other words too."""
    split, others = _parsed(name)
    return None if others else split


def split_folders(parent: Path, split: Split) -> list[Path]:
    """Returns the folders directly in `parent` that are named like a split, the usual names first."""
    names = SPLITS[split]
    found = [path for path in parent.glob("*") if split_of(path.name) == split and path.is_dir()]
    usual = {name: number for number, name in enumerate(names)}
    return sorted(found, key=lambda path: (usual.get(path.name.lower(), len(names)), path.name))


def parse_split(name: str) -> Split:
    """Returns the split that a user asks for by name.

    Raises:
        BadInput: The name is not that of a split.
    """
    split = split_of(name)
    if split is None:
        raise BadInput(f"{name!r} is not a split; there are {', '.join(SPLITS)}")
    return split


def paired_splits(names: Iterable[str]) -> dict[str, Split]:
    """Returns the splits among names in one folder; empty unless one is for training and one is held out.

    The other words of their names must be equal, or all names must have a split and one no other word.
    """
    parsed = {name: _parsed(name) for name in names}
    kinds: dict[tuple[str, ...], set[bool]] = {}
    for split, others in parsed.values():
        if split:
            kinds.setdefault(others, set()).add(split == "train")
    matching = {others for others, found in kinds.items() if len(found) == 2}
    if () in kinds and all(split for split, _ in parsed.values()) and len(set().union(*kinds.values())) == 2:
        matching |= kinds.keys()  # train beside val_original
    if matching:
        matching.add(())
    return {
        name: split for name, (split, others) in parsed.items() if split is not None and others in matching
    }


def all_splits(names: Collection[str]) -> dict[str, Split]:
    """Returns the split of every name if all names are those of splits; otherwise an empty dictionary."""
    found: dict[str, Split] = {name: split for name in names if (split := split_of(name)) is not None}
    return found if len(found) == len(names) else {}


def assign_folders(folders: Collection[str]) -> dict[str, FolderSplit]:
    """Returns the split of every folder.

    Splits may be at any depth, as in `images/train` or `bottle/train`. If one level of the tree has splits
    side by side, folders that are named like a split are splits on all levels.

    Args:
        folders: Relative paths (with /) of the folders that contain images; the root is the empty string.
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
    found: dict[str, FolderSplit] = {}
    if any(pairs.values()):
        for parent, names in children.items():
            splits = pairs[parent] or {name: split for name in names if (split := split_of(name))}
            for name in names if splits else ():
                folder = f"{parent}/{name}".lstrip("/")
                found[folder] = FolderSplit(splits.get(name, "beside"), folder)
    else:
        top, names = "", children.get("", set())
        while len(names) == 1 and top not in folders and not all_splits(names):
            top = f"{top}/{next(iter(names))}".lstrip("/")
            names = children.get(top, set())
        if top not in folders:
            for name, split in all_splits(names).items():
                folder = f"{top}/{name}".lstrip("/")
                found[folder] = FolderSplit(split, folder)
    return {folder: _place(folder, found, pairs) for folder in folders}


def choose_split(there: Collection[Split], path: object, split: str | None, held_out: bool) -> Split | None:
    """Returns the split to read; None if there are no splits and none was requested.

    Args:
        there: The splits at `path`.
        path: Data set, for messages.
        split: Requested split; test replaces val and val replaces test if only one of them exists.
        held_out: Without `split`, prefer test or val to the training split.

    Raises:
        BadInput: The requested split does not exist, or there are only held-out images.
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
        f"{path}: has no training images, only the held-out split "
        f"{' and '.join(name for name in SPLITS if name in there)}; to train on it, give its own path"
    )


def select_images(names: Sequence[str], path: Path, split: str | None, held_out: bool) -> SplitImages:
    """Returns the images of the split to read.

    Without `split`, these are the training images and all images in folders that have no splits.

    Args:
        names: Relative paths (with /) of all images below `path`.
        path: Folder of images, for messages.
        split: See `choose_split`.
        held_out: See `choose_split`.

    Raises:
        BadInput: See `choose_split`; or a held-out folder is beside class folders that it contains itself.
    """
    parents = [_parent(name) for name in names]
    folders = set(parents)
    of_folder = assign_folders(folders)
    there = {place.split for place in of_folder.values() if place.split in SPLITS}
    wanted = choose_split(there, path, split, held_out)  # type: ignore[arg-type]
    if wanted is None:
        firsts = {folder.partition("/")[0] for folder in folders if folder}
        _refuse_nested_splits(folders, firsts, path)
        return SplitImages(list(names), "", None, firsts, _not_splits(firsts, path))
    taken = {wanted, ""} if split is None and wanted == "train" else {wanted}
    kept = [name for name, parent in zip(names, parents, strict=True) if of_folder[parent].split in taken]
    owners = {place.folder for place in of_folder.values() if place.split in taken}
    owner = owners.pop() if len(owners) == 1 else ""
    classes = {
        folder.removeprefix(f"{place.folder}/").partition("/")[0]
        for folder, place in of_folder.items()
        if place.split in SPLITS and _parent(place.folder) == _parent(owner) and folder != place.folder
    }
    skipped = Counter(of_folder[parent].folder for parent in parents if of_folder[parent].split not in taken)
    read = Counter(of_folder[parent].folder for parent in parents if of_folder[parent].split in taken)
    notes = _skipped_note(skipped, path, read) if split is None and not held_out else ()
    return SplitImages([name.removeprefix(f"{owner}/") for name in kept], owner, wanted, classes, notes)


def _refuse_nested_splits(folders: Collection[str], firsts: Collection[str], path: Path) -> None:
    for folder in sorted(folders):
        first, _, rest = folder.partition("/")
        if split_of(first) in ("val", "test") and rest.partition("/")[0] in firsts:
            raise BadInput(
                f"{path}: {first}/ holds the folder {rest.partition('/')[0]}/, which also lies beside it, so "
                "it looks like a split of the others; move the others into a folder train/ beside it"
            )


def skipped_note(path: object, read: str, skipped: Sequence[str]) -> str:
    """Returns one sentence about the splits that are not read."""
    return f"{path}: reads {read} and skips {abridged(skipped, 4)}; to use one of these, give its own path"


def _skipped_note(skipped: Counter[str], path: Path, read: Counter[str]) -> tuple[str, ...]:
    if not skipped:
        return ()
    read_folders = abridged(_counted(read, "other folders"), 4)
    return (skipped_note(path, read_folders, _counted(skipped, "images beside them")),)


def _counted(counts: Counter[str], nameless: str) -> list[str]:
    """Folders with their numbers of images."""
    return [
        f"{f'{folder}/' if folder else nameless} ({counted(count, 'image')})"
        for folder, count in sorted(counts.items())
    ]


def _not_splits(firsts: set[str], path: Path) -> tuple[str, ...]:
    """A note about folders that are named like splits but are read like all others."""
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


def _place(folder: str, found: dict[str, FolderSplit], pairs: dict[str, dict[str, Split]]) -> FolderSplit:
    if pairs.get(folder):
        return FolderSplit("beside", folder)  # images next to the splits
    ends = [match.start() for match in re.finditer("/", folder)]
    for end in (*ends, len(folder)):
        if folder[:end] in found:
            return found[folder[:end]]
    return FolderSplit("", "")


def _parsed(name: str) -> tuple[Split | None, tuple[str, ...]]:
    """The split in a name, if there is exactly one, and the other words of the name."""
    words = [word.lower() for word in _WORD.findall(name)]
    split: list[Split] = [_SPLIT_OF[word] for word in words if word in _SPLIT_OF]
    if len(split) != 1:
        return None, ()
    return split[0], tuple(word for word in words if word not in _SPLIT_OF and word not in _NEUTRAL)
