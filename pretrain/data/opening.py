"""`open_source`: from what the user points at to a source.

What is looked for, in this order:

    folder with train.npz (test.npz)            -> the pack of the split
    folder with train/ and test/ or val/        -> the split's folder; `train` unless asked otherwise
    folder with .tar files                      -> all of them, sorted
    any other folder                            -> its images, recursively
    file.npz, file.tar, shards-{000..012}.tar   -> the pack, the shard, the shards
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from pretrain.data.folders import FolderSource, subfolders
from pretrain.data.npz import NpzSource
from pretrain.data.shards import ShardSource
from pretrain.data.source import Source
from pretrain.errors import BadInput

_HELD_OUT = ("test", "val", "valid", "validation")


def open_source(path: Path, split: str | None = None, *, held_out: bool = False) -> Source:
    """The images at `path`.

    Args:
        path: a folder, a `.npz` pack, a `.tar` shard or a brace pattern of shards.
        split: "train", "test" or "val" of data that have splits; test and val stand for each other where
            only one exists. By default the training split, so that held-out images stay unseen.
        held_out: By default test or val, where there are any.

    Raises:
        BadInput: nothing there, nothing readable there, no image there, or no such split.
    """
    try:
        return _open(Path(path), split, held_out)
    except PermissionError as error:
        raise BadInput(f"{error.filename or path}: no permission to read it") from None


def _open(path: Path, split: str | None, held_out: bool) -> Source:
    if not path.exists():
        if "{" in path.name:
            _no_split(path, split)
            return ShardSource(path, [path.with_name(name) for name in expand_braces(path.name)])
        broken = "a symbolic link that leads nowhere" if path.is_symlink() else "no such file or folder"
        raise BadInput(f"{path}: {broken}")
    if path.is_dir():
        return _open_folder(path, split, held_out)
    _no_split(path, split)
    if not path.is_file():
        raise BadInput(f"{path}: is a device or pipe; give a folder of images, a .npz pack or .tar shards")
    if path.suffix.lower() == ".npz":
        return NpzSource(path)
    if path.suffix.lower() == ".tar":
        return ShardSource(path, [path])
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise BadInput(f"{path}: compressed shards cannot be read at random; unpack it to a plain .tar")
    raise BadInput(f"{path}: is a single file; give a folder of images, a .npz pack or .tar shards")


def _open_folder(path: Path, split: str | None, held_out: bool) -> Source:
    known = (*_HELD_OUT, "train") if held_out else ("train", *_HELD_OUT)
    packs = [name for name in known if (path / f"{name}.npz").is_file()]
    if packs:
        return NpzSource(path / f"{_choose(path, packs, split)}.npz")
    folders = subfolders(path)
    splits = [name for name in known if name in folders]
    if split is not None or ("train" in splits and len(splits) > 1):
        chosen = _choose(path, splits, split)
        classes = {name for folder in splits for name in subfolders(path / folder)}
        return _open_plain(path / chosen, tuple(sorted(classes)))
    return _open_plain(path, None)


def _open_plain(folder: Path, classes: tuple[str, ...] | None) -> Source:
    shards = sorted(shard for shard in folder.glob("*.tar") if not shard.name.startswith("."))
    return ShardSource(folder, shards) if shards else FolderSource(folder, classes)


def _choose(path: Path, there: list[str], split: str | None) -> str:
    if split is None:
        return there[0]
    names = [split, *_HELD_OUT] if split in _HELD_OUT else [split]
    for name in names:
        if name in there:
            return name
    raise BadInput(f"{path}: no split {split!r} here; it has {', '.join(there) or 'no splits'}")


def _no_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise BadInput(f"{path}: one file has no split {split!r}; give the folder that holds the splits")


def expand_braces(pattern: str) -> list[str]:
    """The names a pattern stands for: `{000..012}` counts with leading zeros, `{a,b}` lists.

    Raises:
        BadInput: a brace that is neither.
    """
    choices = [
        _alternatives(part[1:-1], pattern) if part.startswith("{") else [part]
        for part in re.split(r"(\{[^{}]*\})", pattern)
    ]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise BadInput(f"{pattern}: {{{inside}}} is neither a range like {{000..012}} nor a list like {{a,b}}")
