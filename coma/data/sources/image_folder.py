"""A folder of images, searched recursively; class folders when every image lies in one.

Symbolic links are followed, and each real folder is searched once, so links that run in a circle end. Left
out, counted and named are hidden files and folders, folders that systems and this toolkit write, and what is
no regular file or cannot be read. The order is that of the sorted paths, on every machine.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from coma.data.decode import EXTENSIONS, HEAD
from coma.data.inventory import Inventory, is_system_folder, kind_of
from coma.data.products import product_around, product_at
from coma.data.sources.base import EncodedSource, Names
from coma.errors import BadImage, BadInput
from coma.messages import abridged, printable
from coma.splits import Chosen, choose_images

_CHUNK, _STATS = 1000, 16
"""Files whose sizes are asked for in a row, and how often at the same time: a network answers slowly."""


class FolderSource(EncodedSource):
    """All images below a folder, or those of one of the splits in it.

    Images that all lie in first-level subfolders (two or more) are labelled by them. The splits of one data
    set number their classes alike.
    """

    numbered = False

    def __init__(self, root: Path, split: str | None = None, *, held_out: bool = False) -> None:
        """Search the folder.

        Args:
            root: the folder.
            split: as in `open_source`.
            held_out: as in `open_source`.

        Raises:
            BadInput: no image in it, no such split, a folder that this toolkit wrote, or one that may not be
                read.
        """
        found, inventory = search(root)
        if not found:
            raise BadInput(_nothing_in(root, inventory))
        chosen = choose_images(sorted(found), root, split, held_out)
        location = root / chosen.folder
        class_names = _class_names(chosen)
        number = {name: i for i, name in enumerate(class_names or ())}
        labels = np.array([number[name.partition("/")[0]] for name in chosen.names]) if class_names else None
        super().__init__(location, labels, class_names and tuple(map(printable, class_names)))
        self._names = Names(chosen.names)
        if chosen.folder:
            _, inventory = search(location)  # what lies in other splits is none of this one
        inventory.images = Counter(kind_of(name) for name in chosen.names)
        self.split, self.notes, self.inventory = chosen.split, chosen.notes, inventory
        if class_names is None:
            self.unlabelled = _why_unlabelled(location, chosen)
        else:
            for name in sorted(set(subfolders(location)) - chosen.classes):
                inventory.leave_out("folder without an image", "folders without an image", name)

    def __len__(self) -> int:
        """Number of image files."""
        return len(self._names)

    def path(self, i: int) -> Path:
        """Where the image lies."""
        return self.location / self._names[i]

    def describe(self, i: int) -> str:
        """The file's path."""
        return printable(str(self.path(i)))

    def listing(self) -> tuple[list[str], list[int]]:
        """Paths inside the folder, and sizes; -1 of a file that has gone."""
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
        with ThreadPoolExecutor(_STATS) as pool:
            return names, [size for part in pool.map(sizes, parts) for size in part]

    def encoded(self, i: int) -> bytes:
        """The file's content."""
        try:
            return self.path(i).read_bytes()
        except FileNotFoundError:
            raise BadImage(f"{self.describe(i)}: the file has gone") from None
        except OSError as error:
            raise BadImage(f"{self.describe(i)}: cannot be read ({error.strerror})") from None


def search(root: Path) -> tuple[list[str], Inventory]:
    """Returns the relative paths (with /) of the images below a folder, and the account of the search.

    Raises:
        BadInput: a folder that this toolkit wrote, or one that may not be read.
    """
    inventory = Inventory()
    head = partial(_head, root)
    return [name for name in walk(root, inventory) if inventory.takes(name, head)], inventory


def walk(root: Path, inventory: Inventory) -> Iterator[str]:
    """Yields the relative paths (with /) of all regular files below a folder that may be data.

    What is left out is counted in `inventory`.

    Raises:
        BadInput: a folder that this toolkit wrote, or one that may not be read.
    """
    if product := product_around(root):
        place, what = product
        inside = "is" if place == root.resolve() else f"lies in {printable(str(place))}, which is"
        raise BadInput(
            f"{printable(str(root))}: {inside} {what}, and its pictures are results; give the folder of the "
            "images themselves"
        )
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            status = os.stat(root / prefix)
            if (status.st_dev, status.st_ino) in seen:
                inventory.leave_out("folder reached twice by links", "folders reached twice by links", prefix)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / prefix) as entries:
                here = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise _unreadable(root, error) from None
            inventory.leave_out(
                "folder that cannot be read", "folders that cannot be read", f"{prefix}: {error.strerror}"
            )
            continue
        if prefix and (what := product_at(root / prefix, {entry.name for entry in here}.__contains__)):
            inventory.leave_out("folder written by coma", "folders written by coma", f"{prefix} is {what}")
            continue
        folders = []
        for entry in here:
            path = prefix + entry.name
            if entry.name.startswith("."):
                inventory.leave_out_hidden(path)
            elif _is(entry.is_file):
                yield path
            elif not _is(entry.is_dir):
                what = "special file" if os.path.exists(root / path) else "broken link"
                inventory.leave_out(what, f"{what}s", path)
            elif is_system_folder(entry.name):
                inventory.leave_out_system_folder(path)
            else:
                folders.append(f"{path}/")
        pending.extend(sorted(folders, reverse=True))


def subfolders(root: Path) -> list[str]:
    """Names of the folders directly in `root` that may hold data, sorted: as `walk` enters them.

    Raises:
        BadInput: the folder may not be read.
    """
    names = [entry.name for entry in _shown(root) if _is(entry.is_dir)]
    return [name for name in names if not is_system_folder(name) and not product_at(root / name)]


def files_in(root: Path) -> list[str]:
    """Names of the regular files directly in `root`, hidden ones left out, sorted.

    Raises:
        BadInput: the folder may not be read.
    """
    return [entry.name for entry in _shown(root) if _is(entry.is_file)]


def _shown(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(root, error) from None
    return sorted(shown, key=lambda entry: entry.name)


def _is(ask: Callable[[], bool]) -> bool:
    """Returns the answer of `DirEntry.is_file` or `is_dir`; a link that runs in a circle is neither."""
    try:
        return ask()
    except OSError:
        return False


def _unreadable(folder: Path, error: OSError) -> BadInput:
    return BadInput(f"{printable(str(folder))}: this folder cannot be read ({error.strerror})")


def _head(root: Path, name: str) -> bytes:
    try:
        with open(root / name, "rb", buffering=0) as file:
            return file.read(HEAD)
    except OSError:
        return b""


def _class_names(chosen: Chosen) -> tuple[str, ...] | None:
    """Names of the class folders: whole numbers by their value, so that 10 comes after 9; others sorted."""
    several_places = chosen.split is not None and not chosen.folder
    if several_places or len(chosen.classes) < 2 or not all("/" in name for name in chosen.names):
        return None
    values = whole_numbers(sorted(chosen.classes))
    return tuple(sorted(chosen.classes, key=values.__getitem__ if values else None))


def _why_unlabelled(location: Path, chosen: Chosen) -> str:
    if chosen.split is not None and not chosen.folder:
        return (
            f"its {chosen.split} images lie in several places; give one folder with a folder for each class"
        )
    stray = [printable(name) for name in chosen.names if "/" not in name]
    if not stray or not chosen.classes:
        return ""
    lie = "lies" if len(stray) == 1 else "lie"
    classes = ", ".join(map(printable, sorted(chosen.classes)[:3]))
    return (
        f"{abridged(stray, 3)} {lie} in {location} itself, beside its class folders "
        f"({classes}{', ...' * (len(chosen.classes) > 3)}); "
        "move what has a class into its folder, and the rest elsewhere"
    )


def _nothing_in(root: Path, inventory: Inventory) -> str:
    looked = f"looked for {' '.join(EXTENSIONS)}, in subfolders too"
    left_out = inventory.left_out()
    if not left_out:
        return f"{root}: the folder is empty ({looked})"
    return f"{root}: no image in this folder ({looked}); it holds {left_out}"


def whole_numbers(names: Collection[str]) -> dict[str, int] | None:
    """Values by name, where every name is a whole number and no two (as 7 and 07) are the same; else None."""
    values = {name: int(name) for name in names if re.fullmatch("[0-9]{1,18}", name)}
    return values if len(values) == len(set(names)) == len(set(values.values())) else None
