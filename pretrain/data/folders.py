"""A folder of images, searched recursively; class folders when every image lies in one.

Hidden files and folders are skipped, symbolic links followed, and each real folder searched once, so
links that run in a circle end. The order is that of the sorted paths, on every machine.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from pretrain.data.images import EXTENSIONS
from pretrain.data.labels import whole_numbers
from pretrain.data.source import EncodedSource, Names, printable
from pretrain.errors import BadImage, BadInput
from pretrain.splits import Chosen, choose_images


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
            BadInput: no image in it, no such split, or a folder that may not be read.
        """
        found, others = _search(root)
        if not found:
            raise BadInput(_nothing_in(root, others))
        chosen = choose_images(sorted(found), root, split, held_out)
        location = root / chosen.folder
        class_names = _class_names(chosen)
        number = {name: i for i, name in enumerate(class_names or ())}
        labels = np.array([number[name.partition("/")[0]] for name in chosen.names]) if class_names else None
        super().__init__(location, labels, class_names and tuple(map(printable, class_names)))
        self._names = Names(chosen.names)
        self.split, self.notes = chosen.split, chosen.notes
        if class_names is None:
            self.unlabelled = _why_unlabelled(location, chosen)
        else:
            empty = [name for name in subfolders(location) if name not in chosen.classes]
            self.notes += _empty_folders(location, empty)

    def __len__(self) -> int:
        """Number of image files."""
        return len(self._names)

    def path(self, i: int) -> Path:
        """Where the image lies."""
        return self.location / self._names[i]

    def describe(self, i: int) -> str:
        """The file's path."""
        return printable(str(self.path(i)))

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
    few = ", ".join(stray[:3]) + (f" and {len(stray) - 3} more" if len(stray) > 3 else "")
    lie = "lies" if len(stray) == 1 else "lie"
    classes = ", ".join(map(printable, sorted(chosen.classes)[:3]))
    return (
        f"{few} {lie} in {location} itself, beside its class folders "
        f"({classes}{', ...' * (len(chosen.classes) > 3)}); "
        "move what has a class into its folder, and the rest elsewhere"
    )


def _empty_folders(location: Path, empty: list[str]) -> tuple[str, ...]:
    if not empty:
        return ()
    few = ", ".join(map(printable, empty[:5])) + (", ..." if len(empty) > 5 else "")
    return (f"{location}: {len(empty)} folder(s) without an image are no classes: {few}",)


def _nothing_in(root: Path, others: Counter[str]) -> str:
    looked = f"looked for {' '.join(EXTENSIONS)}, in subfolders too"
    if not others:
        return f"{root}: the folder is empty ({looked})"
    there = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(4))
    return f"{root}: no image in this folder ({looked}); it holds {there}"
