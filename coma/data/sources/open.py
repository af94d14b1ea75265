"""`open_source`: opens the images at a path, whatever their form.

The first that applies:

    folder with .npz packs named like splits       -> the pack of the split
    folder with .tar files                         -> the shards of the split, or all of them, sorted
    folder with split folders of .tar files        -> the shards of the split
    any other folder                               -> the images of the split, or all of them, recursively
    file.npz, file.tar, shards-{000..012}.tar      -> the pack, the shard, the shards
    file.csv                                       -> the images and labels that it lists

`coma.splits` defines the names of splits. Without a requested split, `train` is read; the source's notes name
what is skipped.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from coma.data.sources.base import Source
from coma.data.sources.image_folder import FolderSource, list_files, list_folders
from coma.data.sources.label_table import TableSource
from coma.data.sources.npz import NpzSource
from coma.data.sources.webdataset import INDEX, ShardSource
from coma.errors import BadInput
from coma.preflight import check_regular_file
from coma.splits import Split, all_splits, choose_split, paired_splits, skipped_note, split_of

log = logging.getLogger(__name__)


def open_source(path: Path, split: str | None = None, *, held_out: bool = False) -> Source:
    """Opens the images at `path`, and logs one line that says what was found and skipped.

    Args:
        path: Folder, `.npz` pack, `.tar` shard, brace pattern of shards, or `.csv` table of labels.
        split: "train", "test" or "val"; test replaces val and val replaces test if only one of them exists.
            By default the training split, so that held-out images remain unseen.
        held_out: Without `split`, prefer test or val to the training split.

    Raises:
        BadInput: The path does not exist, is not readable, or has no image or no such split.
    """
    try:
        source = _open(Path(path), split, held_out)
    except PermissionError as error:
        raise BadInput(f"{error.filename or path}: no permission to read it") from None
    except OSError as error:
        raise BadInput(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    for line in (source.summary(), *source.notes):
        log.info(line, extra={"once": True})
    return source


def _open(path: Path, split: str | None, held_out: bool) -> Source:
    if not path.exists():
        if "{" in path.name:
            _refuse_split(path, split)
            return ShardSource(path, [path.with_name(name) for name in expand_braces(path.name)])
        broken = "a broken symbolic link" if path.is_symlink() else "no such file or folder"
        raise BadInput(f"{path}: {broken}")
    if path.is_dir():
        return _open_folder(path, split, held_out)
    if path.suffix.lower() == ".csv":
        return TableSource(path, split, held_out=held_out)
    _refuse_split(path, split)
    check_regular_file(path, "give a folder of images, a .npz pack or .tar shards")
    if path.suffix.lower() == ".npz":
        return NpzSource(path)
    if path.suffix.lower() == ".tar":
        return ShardSource(path, [path])
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise BadInput(f"{path}: compressed shards cannot be read at random; unpack it to a plain .tar")
    raise BadInput(f"{path}: is a single file; give a folder of images, a .npz pack or .tar shards")


def _open_folder(path: Path, split: str | None, held_out: bool) -> Source:
    packs = _files(path, ".npz")
    found: dict[Path, Split] = {file: name for file in packs if (name := split_of(file.stem)) is not None}
    if found:
        chosen, notes = _choose(packs, found, path, split, held_out)
        if len(chosen) > 1:
            same = " and ".join(file.name for file in chosen)
            raise BadInput(
                f"{path}: {same} are both named like the {found[chosen[0]]} split; give one of them"
            )
        source: Source = NpzSource(chosen[0])
    else:
        shards, found = _shards(path)
        to_train = split is None and not held_out
        if not shards or (shards[0].parent != path and to_train and "train" not in found.values()):
            return FolderSource(path, split, held_out=held_out)
        if split is not None and not found:
            raise BadInput(f"{path}: no split {split!r} here; no shard is named train, val, test or the like")
        chosen, notes = _choose(shards, found, path, split, held_out) if found else (shards, ())
        folders = {shard.parent for shard in chosen}
        source = ShardSource(folders.pop() if len(folders) == 1 else path, chosen)
        names = {INDEX, *(shard.name for shard in shards)}
        for name in [*list_folders(source.location), *list_files(source.location)]:
            if name not in names:
                source.inventory.skip("entry beside the shards", "entries beside the shards", name)
    source.split, source.notes = found.get(chosen[0]), (*source.notes, *notes)
    return source


def _shards(path: Path) -> tuple[list[Path], dict[Path, Split]]:
    """Returns the shards in a folder, or in its split folders, and the splits of those that have one."""
    shards = _files(path, ".tar")
    if shards:
        stems = [shard.stem for shard in shards]
        splits = paired_splits(stems) or all_splits(stems)
        return shards, {shard: splits[shard.stem] for shard in shards if shard.stem in splits}
    found: dict[Path, Split] = {
        shard: split
        for name in list_folders(path)
        if (split := split_of(name)) is not None
        for shard in _files(path / name, ".tar")
    }
    return list(found), found


def _files(folder: Path, suffix: str) -> list[Path]:
    return [folder / name for name in list_files(folder) if name.lower().endswith(suffix)]


def _choose(
    files: Sequence[Path], splits: Mapping[Path, Split], path: Path, split: str | None, held_out: bool
) -> tuple[list[Path], tuple[str, ...]]:
    """Returns the files of the split to read, and a note about the others."""
    wanted = choose_split(set(splits.values()), path, split, held_out)
    chosen = [file for file in files if splits.get(file) == wanted]
    others = [str(file.relative_to(path)) for file in files if splits.get(file) != wanted]
    if not others or split is not None or held_out:
        return chosen, ()
    names = [str(file.relative_to(path)) for file in chosen]
    kept = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    return chosen, (skipped_note(path, kept, others),)


def _refuse_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise BadInput(f"{path}: one file has no split {split!r}; give the folder that holds the splits")


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that a pattern matches: `{000..012}` counts with leading zeros, `{a,b}` lists.

    Raises:
        BadInput: A brace is neither.
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
