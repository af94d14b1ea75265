"""Counts of what a search for images found and of what it left out: the line that every command begins with.

A name decides whether a file is opened as an image; its content decides how it is decoded (see `images`).
Files whose name says nothing (`IMG_0001`, `scan.001`, `photo.jpg?width=200`) are judged by their first bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec

from coma.data.decode import EXTENSIONS, HEIF_EXTENSIONS, INSTALL_HEIF, looks_like_image
from coma.messages import counted, printable

NO_EXTENSION = "without extension"
"""Kind of the files whose name has no extension, or one that is no word."""

_EXTENSION = re.compile(r"\.[a-z][a-z0-9]{1,9}")
_NAMED = 3
"""Examples that are named of everything that is left out."""
_MOST_KINDS = 12
"""Extensions that are listed one by one."""

_SYSTEM_FOLDERS = {
    *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder"),  # macOS
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),  # Windows
    *("lost+found", "lost.dir", "__pycache__"),  # Linux, Android, Python
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@synoresource"),  # network storage
    *("#recycle", "#snapshot"),
    *("thumbnails", "thumbs", "_thumbnails", "_thumbs"),  # galleries
}


class Inventory:
    """Images by kind, and everything that was left out, by reason."""

    def __init__(self) -> None:
        self.images: Counter[str] = Counter()
        """How many images there are of each kind: `.jpg`, `.png`, `without extension`, ..."""
        self.unread: Counter[str] = Counter()
        """How many files of other kinds there are."""
        self._left_out: dict[str, tuple[str, int, list[str]]] = {}
        self._reads_heif = find_spec("pillow_heif") is not None

    def judge(self, name: str, head: Callable[[str], bytes]) -> tuple[str, bool]:
        """Returns the kind of a file, and whether it is taken as an image.

        Args:
            name: Its name; folders may stand before it.
            head: Reads the first bytes of the file of that name; called only where the name does not tell.
        """
        kind = kind_of(name)
        if kind in EXTENSIONS or (self._reads_heif and kind in HEIF_EXTENSIONS):
            return kind, True
        if kind != NO_EXTENSION:
            return kind, False
        return NO_EXTENSION, looks_like_image(head(name))

    def takes(self, name: str, head: Callable[[str], bytes]) -> bool:
        """Counts a file; returns whether it is taken as an image. The arguments are those of `judge`."""
        kind, is_image = self.judge(name, head)
        (self.images if is_image else self.unread)[kind] += 1
        return is_image

    def add(self, other: Inventory) -> None:
        """Adds the counts of another search."""
        self.images += other.images
        self.unread += other.unread
        for one, (many, count, names) in other._left_out.items():
            _, before, named = self._left_out.get(one, (many, 0, []))
            self._left_out[one] = many, before + count, [*named, *names][:_NAMED]

    def leave_out(self, one: str, many: str, name: str) -> None:
        """Counts something that is left out: `one` and `many` say what it is, in singular and plural."""
        _, count, names = self._left_out.get(one, (many, 0, []))
        self._left_out[one] = many, count + 1, [*names, printable(name)][:_NAMED]

    def leave_out_hidden(self, name: str) -> None:
        """Counts a hidden file or folder."""
        self.leave_out("hidden file or folder", "hidden files or folders", name)

    def leave_out_system_folder(self, name: str) -> None:
        """Counts a folder that an operating system or a program keeps for itself."""
        self.leave_out("folder that systems leave behind", "folders that systems leave behind", name)

    def line(self, location: object) -> str:
        """Returns the one line: how many images of which kinds, and what is left out and why."""
        count = self.images.total()
        kinds = f" ({listed(self.images)})" if self.images else ""
        found = f"{printable(str(location))}: {counted(count, 'image')}{kinds}"
        left_out = self.left_out()
        return f"{found}; left out: {left_out}" if left_out else found

    def left_out(self) -> str:
        """Returns what is left out, for messages; empty where nothing is."""
        parts = []
        heif = Counter({kind: n for kind, n in self.unread.items() if kind in HEIF_EXTENSIONS})
        if heif:
            parts.append(f"{listed(heif)} (to read them: {INSTALL_HEIF})")
        if others := self.unread - heif:
            parts.append(f"{listed(others)} (not read)")
        for one, (many, count, names) in self._left_out.items():
            more = ", ..." if count > len(names) else ""
            parts.append(f"{counted(count, one, many)} ({', '.join(names)}{more})")
        return ", ".join(parts)


def kind_of(name: str) -> str:
    """Returns the extension of a file's name in lower case, or that it has none that is a word."""
    kind = name[name.rfind(".") :].lower()
    return kind if _EXTENSION.fullmatch(kind) else NO_EXTENSION


def is_system_folder(name: str) -> bool:
    """Returns whether an operating system or a program keeps a folder of this name for itself."""
    return name.lower() in _SYSTEM_FOLDERS


def listed(kinds: Counter[str]) -> str:
    """Returns the counts by kind, the largest first."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {printable(kind)}" for kind, count in most[:_MOST_KINDS]]
    if rest := most[_MOST_KINDS:]:
        parts.append(f"{sum(count for _, count in rest):,} more of {len(rest)} kinds")
    return ", ".join(parts)
