"""A folder of images, searched recursively; class folders give the labels.

Symbolic links are followed, and every real folder is searched once, so circular links end. Hidden files and
folders, system folders, folders written by this toolkit, special files and unreadable folders are skipped,
counted and named. Images are in the order of their sorted paths, on every machine.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from coma.data.decode import EXTENSIONS, HEAD
from coma.data.inventory import Inventory, is_system_folder, kind_of
from coma.data.run_outputs import enclosing_run_output, run_output_at
from coma.data.sources.base import LocalSource, Names
from coma.errors import BadImage, BadInput
from coma.messages import abridged, printable
from coma.splits import SplitImages, select_images

_CHUNK, _THREADS = 1000, 16
"""Number of files whose sizes one thread asks for in a row, and number of threads: network disks are slow."""


class FolderSource(LocalSource):
    """All images below a folder, or the images of one of its splits.

    If all images lie in first-level subfolders (two or more), these are the classes. All splits of a data set
    share one numbering of the classes.
    """

    labels_are_stored = False

    def __init__(self, root: Path, split: str | None = None, *, held_out: bool = False) -> None:
        """Searches the folder.

        Args:
            root: Folder of images.
            split: See `open_source`.
            held_out: See `open_source`.

        Raises:
            BadInput: The folder has no image or no such split, cannot be read, or is a run output.
        """
        found, inventories = _find(root)
        if not found:
            raise BadInput(_no_images(root, _merged(inventories)))
        chosen = select_images(sorted(found), root, split, held_out)
        location = root / chosen.folder
        class_names = _class_names(chosen)
        number = {name: i for i, name in enumerate(class_names or ())}
        labels = np.array([number[name.partition("/")[0]] for name in chosen.names]) if class_names else None
        self._root = location
        super().__init__(location, labels, class_names and tuple(map(printable, class_names)))
        self._names = Names(chosen.names)
        prefix = f"{chosen.folder}/" if chosen.folder else ""
        self.split, self.notes, self.inventory = chosen.split, chosen.notes, _merged(inventories, prefix)
        self.inventory.images = Counter(kind_of(name) for name in chosen.names)
        if class_names is None:
            self.unlabelled_reason = _why_unlabelled(location, chosen)
            return
        inside = {folder.removeprefix(prefix) for folder in inventories if folder.startswith(prefix)}
        for name in sorted({folder.partition("/")[0] for folder in inside} - {""} - chosen.classes):
            self.inventory.skip("folder without an image", "folders without an image", name)

    def __len__(self) -> int:
        """Returns the number of image files."""
        return len(self._names)

    def path(self, i: int) -> Path:
        """Returns the path of an image."""
        return self._root / self._names[i]

    def describe(self, i: int) -> str:
        """Returns the path of an image, for messages."""
        return printable(str(self.path(i)))

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns the paths inside the folder and the sizes in bytes; -1 for files that no longer exist."""
        names, root = list(self._names), str(self.location)

        def sizes(part: Sequence[str]) -> list[int]:
            found = []
            for name in part:
                try:
                    found.append(os.stat(f"{root}/{name}").st_size)
                except OSError:
                    found.append(-1)
            return found

        parts = [names[at : at + _CHUNK] for at in range(0, len(names), _CHUNK)]
        with ThreadPoolExecutor(_THREADS) as pool:
            return names, [size for part in pool.map(sizes, parts) for size in part]

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        try:
            return self.path(i).read_bytes()
        except FileNotFoundError:
            raise BadImage(f"{self.describe(i)}: the file no longer exists") from None
        except OSError as error:
            raise BadImage(f"{self.describe(i)}: cannot be read ({error.strerror})") from None


def find_images(root: Path) -> tuple[list[str], Inventory]:
    """Returns the relative paths (with /) of the images below a folder, and the counts of the search.

    Raises:
        BadInput: The folder was written by this toolkit, or cannot be read.
    """
    found, inventories = _find(root)
    return found, _merged(inventories)


def _find(root: Path) -> tuple[list[str], dict[str, Inventory]]:
    """The images below a folder, and an inventory of each folder by its relative path (which ends in /)."""
    inventories: dict[str, Inventory] = defaultdict(Inventory)
    head = partial(_head, root)
    found = [
        name
        for name in walk_files(root, inventories.__getitem__)
        if inventories[_parent(name)].count_file(name, head)
    ]
    return found, inventories


def _merged(inventories: dict[str, Inventory], prefix: str = "") -> Inventory:
    """The counts of all folders below `prefix` together, with names relative to it."""
    total = Inventory()
    for folder, inventory in inventories.items():
        if folder.startswith(prefix):
            total.merge(inventory, prefix)
    return total


def walk_files(root: Path, inventory_of: Callable[[str], Inventory]) -> Iterator[str]:
    """Yields the relative paths (with /) of the regular files below a folder, except in skipped folders.

    Args:
        root: Folder to search.
        inventory_of: Returns the inventory that counts what is skipped in a folder, given its relative path.

    Raises:
        BadInput: The folder was written by this toolkit, or cannot be read.
    """
    if output := enclosing_run_output(root):
        place, what = output
        inside = "is" if place == root.resolve() else f"lies in {printable(str(place))}, which is"
        raise BadInput(
            f"{printable(str(root))}: {inside} {what}, and its pictures are results; give the folder of the "
            "images themselves"
        )
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        parent = inventory_of(_parent(prefix[:-1]))
        try:
            status = os.stat(root / prefix)
            if (status.st_dev, status.st_ino) in seen:
                parent.skip("folder reached twice by links", "folders reached twice by links", prefix)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / prefix) as entries:
                here = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise _unreadable(root, error) from None
            name = f"{prefix}: {error.strerror}"
            parent.skip("folder that cannot be read", "folders that cannot be read", name)
            continue
        if prefix and (what := run_output_at(root / prefix, {entry.name for entry in here}.__contains__)):
            parent.skip("folder written by coma", "folders written by coma", f"{prefix} is {what}")
            continue
        inventory, folders = inventory_of(prefix), []
        for entry in here:
            path = prefix + entry.name
            if entry.name.startswith("."):
                inventory.skip_hidden(path)
            elif _is(entry.is_file):
                yield path
            elif not _is(entry.is_dir):
                what = "special file" if os.path.exists(root / path) else "broken link"
                inventory.skip(what, f"{what}s", path)
            elif is_system_folder(entry.name):
                inventory.skip_system_folder(path)
            else:
                folders.append(f"{path}/")
        pending.extend(sorted(folders, reverse=True))


def list_folders(root: Path) -> list[str]:
    """Returns the sorted names of the folders directly in `root` that `walk_files` enters.

    Raises:
        BadInput: The folder cannot be read.
    """
    names = [entry.name for entry in _entries(root) if _is(entry.is_dir)]
    return [name for name in names if not is_system_folder(name) and not run_output_at(root / name)]


def list_files(root: Path) -> list[str]:
    """Returns the sorted names of the regular files directly in `root`, without hidden ones.

    Raises:
        BadInput: The folder cannot be read.
    """
    return [entry.name for entry in _entries(root) if _is(entry.is_file)]


def _entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(root, error) from None
    return sorted(shown, key=lambda entry: entry.name)


def _is(ask: Callable[[], bool]) -> bool:
    """Returns the answer of `DirEntry.is_file` or `is_dir`; False for a link that points to itself."""
    try:
        return ask()
    except OSError:
        return False


def _parent(path: str) -> str:
    """The folder of a relative path: `a/b/c.png` gives `a/b/`, and `c.png` the empty string."""
    return path[: path.rfind("/") + 1]


def _unreadable(folder: Path, error: OSError) -> BadInput:
    return BadInput(f"{printable(str(folder))}: this folder cannot be read ({error.strerror})")


def _head(root: Path, name: str) -> bytes:
    try:
        with open(root / name, "rb", buffering=0) as file:
            return file.read(HEAD)
    except OSError:
        return b""


def _class_names(chosen: SplitImages) -> tuple[str, ...] | None:
    """Names of the class folders: whole numbers by their value, so that 10 follows 9; others sorted."""
    several_places = chosen.split is not None and not chosen.folder
    if several_places or len(chosen.classes) < 2 or not all("/" in name for name in chosen.names):
        return None
    values = parse_whole_numbers(sorted(chosen.classes))
    return tuple(sorted(chosen.classes, key=values.__getitem__ if values else None))


def _why_unlabelled(location: Path, chosen: SplitImages) -> str:
    if chosen.split is not None and not chosen.folder:
        return (
            f"its {chosen.split} images lie in several places; give one folder with a folder for each class"
        )
    stray = [printable(name) for name in chosen.names if "/" not in name]
    if not stray and len(chosen.classes) == 1:
        return (
            f"all lie in one folder, {printable(*chosen.classes)}; give at least two, a folder for each class"
        )
    if not stray or not chosen.classes:
        return ""
    lie = "lies" if len(stray) == 1 else "lie"
    classes = ", ".join(map(printable, sorted(chosen.classes)[:3]))
    return (
        f"{abridged(stray, 3)} {lie} in {location} itself, beside its class folders "
        f"({classes}{', ...' * (len(chosen.classes) > 3)}); "
        "move what has a class into its folder, and the rest elsewhere"
    )


def _no_images(root: Path, inventory: Inventory) -> str:
    looked = f"looked for {' '.join(EXTENSIONS)}, in subfolders too"
    if not (skipped := inventory.skipped()):
        return f"{root}: the folder is empty ({looked})"
    return f"{root}: no image in this folder ({looked}); it holds {skipped}"


def parse_whole_numbers(names: Collection[str]) -> dict[str, int] | None:
    """Returns the values by name; None unless all names are whole numbers of different values (7 is 07)."""
    values = {name: int(name) for name in names if re.fullmatch("[0-9]{1,18}", name)}
    return values if len(values) == len(set(names)) == len(set(values.values())) else None
