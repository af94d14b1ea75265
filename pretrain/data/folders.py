"""A folder of images, searched recursively; class folders when every image lies in one.

Hidden files and folders are skipped, symbolic links followed, and each real folder searched once, so
links that run in a circle end. The order is that of the sorted paths, on every machine.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pretrain.data.images import EXTENSIONS
from pretrain.data.source import EncodedSource, Names, printable
from pretrain.errors import BadImage, BadInput

_CHUNK, _STATS = 1000, 16
"""Files whose sizes are asked for in a row, and how often at the same time: a network answers slowly."""


class FolderSource(EncodedSource):
    """All images below a folder.

    Images that all lie in first-level subfolders (two or more) are labelled by them.
    """

    def __init__(self, root: Path, classes: tuple[str, ...] | None = None) -> None:
        """Search the folder.

        Args:
            root: the folder.
            classes: names of class folders that may occur, so that the splits of one data set number
                their classes alike; by default those that hold images.

        Raises:
            BadInput: no image in it, or a folder that may not be read.
        """
        found, others = _search(root)
        if not found:
            raise BadInput(_nothing_in(root, others))
        names = sorted(found)
        firsts = [name.partition("/")[0] if "/" in name else None for name in names]
        class_names = _class_names(firsts, classes)
        number = {name: i for i, name in enumerate(class_names or ())}
        labels = np.array([number[str(first)] for first in firsts]) if class_names else None
        super().__init__(root, labels, class_names and tuple(map(printable, class_names)))
        self._names = Names(names)

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
        """Paths inside the folder, and sizes; -1 where a link leads nowhere."""
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
        path = self.path(i)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            link = "a broken symbolic link" if path.is_symlink() else "the file has gone"
            raise BadImage(f"{self.describe(i)}: {link}") from None
        except OSError as error:
            raise BadImage(f"{self.describe(i)}: cannot be read ({error.strerror})") from None


def subfolders(root: Path) -> list[str]:
    """Names of the folders directly in `root`, hidden ones left out, sorted.

    Raises:
        BadInput: the folder may not be read.
    """
    return sorted(entry.name for entry in _entries(root) if entry.is_dir())


def _search(root: Path) -> tuple[list[str], Counter[str]]:
    """Relative paths of the images (with /), and how many other files there are by extension."""
    found: list[str] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        status = os.stat(root / prefix)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for entry in _entries(root / prefix):
            if entry.is_dir():
                folders.append(f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(EXTENSIONS):  # broken links too: reading names them
                found.append(prefix + entry.name)
            else:
                others[Path(entry.name).suffix.lower()] += 1
        pending.extend(sorted(folders, reverse=True))
    return found, others


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise BadInput(f"{folder}: this folder cannot be read ({error.strerror})") from None


def _class_names(firsts: list[str | None], classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if None in firsts:
        return None
    names = {str(first) for first in firsts} | set(classes or ())
    return tuple(sorted(names)) if len(names) > 1 else None


def _nothing_in(root: Path, others: Counter[str]) -> str:
    looked = f"looked for {' '.join(EXTENSIONS)}, in subfolders too"
    if not others:
        return f"{root}: the folder is empty ({looked})"
    there = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(4))
    return f"{root}: no image in this folder ({looked}); it holds {there}"
