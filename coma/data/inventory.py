"""Counts of the images that a search found and of the files it skipped, as one line of text.

The extension decides whether a file is an image; its content decides how it is decoded (see `decode`). Files
without an extension (`IMG_0001`, `scan.001`, `photo.jpg?width=200`) are recognised by their first bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec

from coma.data.decode import EXTENSIONS, WITH_EXTRA, looks_like_image
from coma.messages import counted, printable

NO_EXTENSION = "without extension"
"""Kind of a file whose name has no extension, or one that is not a word."""

_EXTENSION = re.compile(r"\.[a-z][a-z0-9]{1,9}")
_NAMED = 3
"""Examples that are named for each reason."""
_MOST_KINDS = 12
"""Extensions that are listed separately."""

_SYSTEM_FOLDERS = {
    *("__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder"),  # macOS
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),  # Windows
    *("lost+found", "lost.dir", "__pycache__"),  # Linux, Android, Python
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@synoresource"),  # network storage
    *("#recycle", "#snapshot"),
    *("thumbnails", "thumbs", "_thumbnails", "_thumbs"),  # galleries
}


class Inventory:
    """Counts of the images by kind, and of everything that was skipped, by reason."""

    def __init__(self) -> None:
        self.images: Counter[str] = Counter()
        """Number of images of each kind: `.jpg`, `.png`, `without extension`, ..."""
        self.unread: Counter[str] = Counter()
        """Number of files of each other kind."""
        self._skipped: dict[str, tuple[str, int, list[str]]] = {}
        self._readable = {kind for kind, (package, _) in WITH_EXTRA.items() if find_spec(package) is not None}

    def identify(self, name: str, head: Callable[[str], bytes]) -> tuple[str, bool]:
        """Returns the kind of a file, and whether it is an image.

        Args:
            name: File name, with or without folders before it.
            head: Reads the first bytes of the file; called only if the name has no extension.
        """
        kind = kind_of(name)
        if kind == NO_EXTENSION:
            return kind, looks_like_image(head(name))
        return kind, kind in EXTENSIONS or kind in self._readable

    def count_file(self, name: str, head: Callable[[str], bytes]) -> bool:
        """Counts a file and returns whether it is an image. The arguments are those of `identify`."""
        kind, is_image = self.identify(name, head)
        (self.images if is_image else self.unread)[kind] += 1
        return is_image

    def merge(self, other: Inventory, prefix: str = "") -> None:
        """Adds the counts of another search; `prefix` is removed from the names it skipped."""
        self.images += other.images
        self.unread += other.unread
        for one, (many, count, names) in other._skipped.items():
            _, before, named = self._skipped.get(one, (many, 0, []))
            short = [name.removeprefix(prefix) for name in names]
            self._skipped[one] = many, before + count, [*named, *short][:_NAMED]

    def skip(self, one: str, many: str, name: str) -> None:
        """Counts something that is skipped; `one` and `many` say what it is, in singular and plural."""
        _, count, names = self._skipped.get(one, (many, 0, []))
        self._skipped[one] = many, count + 1, [*names, printable(name)][:_NAMED]

    def skip_hidden(self, name: str) -> None:
        """Counts a hidden file or folder."""
        self.skip("hidden file or folder", "hidden files or folders", name)

    def skip_system_folder(self, name: str) -> None:
        """Counts a folder that belongs to an operating system or a program."""
        self.skip("system folder", "system folders", name)

    def summary(self, location: object) -> str:
        """Returns one line: the number of images of each kind, and what was skipped and why."""
        kinds = f" ({_listed(self.images)})" if self.images else ""
        found = f"{printable(str(location))}: {counted(self.images.total(), 'image')}{kinds}"
        skipped = self.skipped()
        return f"{found}; skipped: {skipped}" if skipped else found

    def skipped(self) -> str:
        """Returns what was skipped and why, for messages; empty if nothing was."""
        parts = []
        others = self.unread
        for install in dict.fromkeys(command for _, command in WITH_EXTRA.values()):
            extra = Counter(
                {kind: n for kind, n in others.items() if WITH_EXTRA.get(kind, ("", ""))[1] == install}
            )
            if extra:
                parts.append(f"{_listed(extra)} (to read them: {install})")
            others = others - extra
        if others:
            parts.append(f"{_listed(others)} (not read)")
        for one, (many, count, names) in self._skipped.items():
            more = ", ..." if count > len(names) else ""
            parts.append(f"{counted(count, one, many)} ({', '.join(names)}{more})")
        return ", ".join(parts)


def kind_of(name: str) -> str:
    """Returns the extension of a file name in lower case, or `NO_EXTENSION`."""
    kind = name[name.rfind(".") :].lower()
    return kind if _EXTENSION.fullmatch(kind) else NO_EXTENSION


def is_system_folder(name: str) -> bool:
    """Returns whether folders of this name belong to an operating system or a program."""
    return name.lower() in _SYSTEM_FOLDERS


def _listed(kinds: Counter[str]) -> str:
    """Returns the counts by kind, largest first."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {printable(kind)}" for kind, count in most[:_MOST_KINDS]]
    if rest := most[_MOST_KINDS:]:
        parts.append(f"{sum(count for _, count in rest):,} more of {len(rest)} kinds")
    return ", ".join(parts)
