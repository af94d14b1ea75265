"""`open_source`: opens the images at a path, whatever their form.

The first that applies:

    folder with .npz packs named like splits       -> the pack of the split
    folder with .tar files                         -> the shards of the split, or all of them, sorted
    folder with split folders of .tar files        -> the shards of the split
    folder with .parquet files with images, or with a folder data/ or split folders of them
                                                   -> the files of the split, or all of them, sorted
    any other folder                               -> the images of the split, or all of them, recursively
    file.npz, file.tar, shards-{000..012}.tar      -> the pack, the shard, the shards
    file.csv                                       -> the images and labels that it lists
    file.parquet, train-{00..12}.parquet           -> the files; PATH#COLUMN names the column of images

Shards and parquet files may be remote (`s3://bucket/photos`); folders of single images and `.npz` packs may
not.

`coma.splits` defines the names of splits. Without a requested split, `train` is read; the source's notes name
what is skipped.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from coma.data.remote import RemoteFile, describe_files, list_folder, open_file, same_files
from coma.data.retries import RemoteMissing, in_threads
from coma.data.sources.base import LocalSource, Source
from coma.data.sources.image_folder import FolderSource, list_files, list_folders
from coma.data.sources.label_table import TableSource
from coma.data.sources.npz import NpzSource
from coma.data.sources.parquet import NoImageColumn, ParquetSource
from coma.data.sources.tiles import TiledSource
from coma.data.sources.webdataset import INDEX, ShardSource
from coma.errors import BadInput
from coma.messages import abridged, printable
from coma.paths import Address, Location, parse_location
from coma.preflight import check_regular_file
from coma.splits import Split, all_splits, choose_split, paired_splits, skipped_note, split_of

log = logging.getLogger(__name__)

Stored = TypeVar("Stored", Path, str)

_WANTED = "a folder of images, a .npz pack, .tar shards or .parquet files"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


def open_source(
    path: Location | str,
    split: str | None = None,
    *,
    held_out: bool = False,
    listing: Mapping[str, Any] | None = None,
    tiles: int | None = None,
) -> Source:
    """Opens the images at `path`, and logs one line that says what was found and skipped.

    Args:
        path: Folder, `.npz` pack, `.tar` shard, `.parquet` file, brace pattern of shards or files, or `.csv`
            table of labels; or the address of remote shards or parquet files.
        split: "train", "test" or "val"; test replaces val and val replaces test if only one of them exists.
            By default the training split, so that held-out images remain unseen.
        held_out: Without `split`, prefer test or val to the training split.
        listing: Listing of the same images, see `coma.data.listing`. If remote shards have not changed since,
            their headers are not read again.
        tiles: Side in pixels of the windows that larger images are cut into; see `TiledSource`.

    Raises:
        BadInput: The path does not exist, is not readable, or has no image or no such split; or its images
            cannot be cut, because they are not files.
    """
    try:
        place = parse_location(path) if isinstance(path, str) else path
        if isinstance(place, Address):
            source = _open_remote(place, split, held_out, listing)
        else:
            source = _open(Path(place), split, held_out)
        if tiles is not None:
            source = _cut(source, tiles)
    except PermissionError as error:
        raise BadInput(f"{error.filename or path}: no permission to read it") from None
    except OSError as error:
        raise BadInput(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    for line in (source.summary(), *source.notes):
        log.info(line, extra={"once": True})
    return source


def _cut(source: Source, tiles: int) -> Source:
    if not isinstance(source, LocalSource):
        raise BadInput(
            f"{source.location}: --tiles cuts image files on a disk, and these are inside other files; "
            "leave it out, or cut the files before they are packed (coma pack --tiles)"
        )
    return TiledSource(source, tiles)


def _open(path: Path, split: str | None, held_out: bool, column: str = "") -> Source:
    if not path.exists():
        whole, hash_sign, after = str(path).rpartition("#")
        if hash_sign and after and (Path(whole).exists() or "{" in whole):
            return _open(Path(whole), split, held_out, after)
        if "{" in path.name:
            _refuse_split(path, split)
            return _stored(path, [path.with_name(name) for name in expand_braces(path.name)], column)
        broken = "a broken symbolic link" if path.is_symlink() else "no such file or folder"
        raise BadInput(f"{path}: {broken}")
    if path.is_dir():
        return _open_folder(path, split, held_out, column)
    if path.suffix.lower() == ".csv":
        return TableSource(path, split, held_out=held_out)
    _refuse_split(path, split)
    check_regular_file(path, f"give {_WANTED}")
    if path.suffix.lower() == ".parquet":
        return ParquetSource(path, [path], column)
    if path.suffix.lower() == ".npz":
        return NpzSource(path)
    if path.suffix.lower() == ".tar":
        return ShardSource(path, [path])
    if path.name.lower().endswith(_COMPRESSED):
        raise BadInput(f"{path}: compressed shards cannot be read at random; unpack it to a plain .tar")
    raise BadInput(f"{path}: is a single file; give {_WANTED}")


def _open_remote(
    address: Address, split: str | None, held_out: bool, listing: Mapping[str, Any] | None
) -> Source:
    """Opens remote shards or parquet files."""
    if address.lost_secret:
        raise BadInput(
            f"{address}: was saved without its password or query string, which may be secret; give the whole "
            "address again (coma pretrain ADDRESS --resume RUN)"
        )
    place = address.with_path(address.path)
    if place.path.lower().endswith((".npz", *_COMPRESSED)):
        raise BadInput(f"{place}: only .tar shards and .parquet files are read from remote storage")
    if not place.path.lower().endswith((".tar", ".parquet")):
        return _open_remote_folder(place, split, held_out, address.column, listing)
    _refuse_split(place, split)
    names = expand_braces(place.path)
    files = in_threads(open_file, [place.with_path(name) for name in names])
    return _stored(place, files, address.column, listing)


def _open_remote_folder(
    place: Address, split: str | None, held_out: bool, column: str, listing: Mapping[str, Any] | None
) -> Source:
    try:
        top = list_folder(place)
    except RemoteMissing as error:
        if place.scheme in ("http", "https"):
            raise BadInput(f"{error}; of web servers, give the files: shards-{{000..127}}.tar") from None
        raise
    folders = [name for name in top if name.endswith("/")]
    for suffix in (".tar", ".parquet"):
        names, found = _find_stored(suffix, top, folders, lambda folder: list_folder(place / folder))
        if names:
            break
    else:
        beside = f"; it holds {printable(abridged(top, 5))}" if top else ""
        raise BadInput(
            f"{place}: no .tar shard and no .parquet file in this remote folder{beside}; single images are "
            "not read from remote storage: `coma pack` makes shards of them"
        )
    chosen, notes = _split_of_stored(names, found, place, split, held_out)
    parents = {name.rpartition("/")[0] for name in chosen}
    location = place / parents.pop() if len(parents) == 1 and "" not in parents else place
    files = in_threads(open_file, [place / name for name in chosen])
    source = _stored(location, files, column, listing)
    source.split, source.notes = found.get(chosen[0]), (*source.notes, *notes)
    return source


def _stored(
    location: Location,
    files: Sequence[Path] | Sequence[RemoteFile],
    column: str = "",
    listing: Mapping[str, Any] | None = None,
) -> Source:
    """Opens shards, or parquet files."""
    if files[0].name.lower().endswith(".parquet"):
        for file in files:
            if isinstance(file, Path) and not file.is_file():
                raise BadInput(f"{file}: this file is missing")
        return ParquetSource(location, files, column)
    if column:
        raise BadInput(f"{location}: #{column} names a column of parquet files, and shards have none")
    remote = [file for file in files if isinstance(file, RemoteFile)]
    if listing is not None and remote and same_files(listing.get("index"), describe_files(location, remote)):
        try:
            return ShardSource.from_listing(location, remote, listing)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{location}: the run's list of its images is damaged ({error})") from None
    return ShardSource(location, files)


def _open_folder(path: Path, split: str | None, held_out: bool, column: str = "") -> Source:
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
        shards, found = _shards(path, ".tar")
        to_train = split is None and not held_out
        if not shards or (shards[0].parent != path and to_train and "train" not in found.values()):
            return _parquet_folder(path, split, held_out, column) or FolderSource(
                path, split, held_out=held_out
            )
        chosen, notes = _split_of_stored(shards, found, path, split, held_out)
        folders = {shard.parent for shard in chosen}
        folder = folders.pop() if len(folders) == 1 else path
        source = _stored(folder, chosen, column)
        names = {INDEX, *(shard.name for shard in shards)}
        for name in [*list_folders(folder), *list_files(folder)]:
            if name not in names:
                source.inventory.skip("entry beside the shards", "entries beside the shards", name)
    source.split, source.notes = found.get(chosen[0]), (*source.notes, *notes)
    return source


def _parquet_folder(path: Path, split: str | None, held_out: bool, column: str) -> Source | None:
    """Returns the parquet files in a folder; None if there are none with images but there are image files."""
    files, found = _shards(path, ".parquet")
    if not files:
        return None
    chosen, notes = _split_of_stored(files, found, path, split, held_out)
    folders = {file.parent for file in chosen}
    try:
        source = _stored(folders.pop() if len(folders) == 1 else path, chosen, column)
    except NoImageColumn as error:  # files of another kind, such as features
        try:
            return FolderSource(path, split, held_out=held_out)
        except BadInput:
            raise error from None
    source.split, source.notes = found.get(chosen[0]), (*source.notes, *notes)
    return source


def _shards(path: Path, suffix: str) -> tuple[list[Path], dict[Path, Split]]:
    """Returns the shards or parquet files in a folder or its split folders, and the splits of some."""
    names, found = _find_stored(
        suffix,
        list_files(path),
        [f"{name}/" for name in list_folders(path)],
        lambda folder: list_files(path / folder),
    )
    return [path / name for name in names], {path / name: split for name, split in found.items()}


def _find_stored(
    suffix: str, top: Sequence[str], folders: Sequence[str], list_in: Callable[[str], Sequence[str]]
) -> tuple[list[str], dict[str, Split]]:
    """Returns the files with a suffix, and the splits of those that have one.

    Args:
        suffix: `.tar` or `.parquet`.
        top: Names in the folder.
        folders: Names of the folders in it; they end in /.
        list_in: Returns the names in one of them.
    """

    def stored(folder: str, names: Sequence[str]) -> list[str]:
        return [folder + name for name in names if name.lower().endswith(suffix)]

    files = stored("", top)
    if not files and suffix == ".parquet" and "data/" in folders:  # as on the Hugging Face hub
        files = stored("data/", list_in("data/"))
    if files:
        stems = {name: name.rpartition("/")[2][: -len(suffix)] for name in files}
        splits = paired_splits(stems.values()) or all_splits(stems.values())
        return files, {name: splits[stem] for name, stem in stems.items() if stem in splits}
    found: dict[str, Split] = {
        name: split
        for folder in folders
        if (split := split_of(folder.rstrip("/"))) is not None
        for name in stored(folder, list_in(folder))
    }
    return list(found), found


def _split_of_stored(
    files: Sequence[Stored], found: Mapping[Stored, Split], path: Location, split: str | None, held_out: bool
) -> tuple[list[Stored], tuple[str, ...]]:
    """Returns the shards or parquet files to read, and a note about the others."""
    if split is not None and not found:
        raise BadInput(f"{path}: no split {split!r} here; no shard is named train, val, test or the like")
    return _choose(files, found, path, split, held_out) if found else (list(files), ())


def _files(folder: Path, suffix: str) -> list[Path]:
    return [folder / name for name in list_files(folder) if name.lower().endswith(suffix)]


def _choose(
    files: Sequence[Stored], splits: Mapping[Stored, Split], path: Location, split: str | None, held_out: bool
) -> tuple[list[Stored], tuple[str, ...]]:
    """Returns the files of the split to read, and a note about the others."""
    wanted = choose_split(set(splits.values()), path, split, held_out)
    chosen = [file for file in files if splits.get(file) == wanted]
    others = [_inside(file, path) for file in files if splits.get(file) != wanted]
    if not others or split is not None or held_out:
        return chosen, ()
    names = [_inside(file, path) for file in chosen]
    kept = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    return chosen, (skipped_note(path, kept, others),)


def _inside(file: Path | str, path: Location) -> str:
    return str(file.relative_to(path)) if isinstance(file, Path) and isinstance(path, Path) else str(file)


def _refuse_split(path: Location, split: str | None) -> None:
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
