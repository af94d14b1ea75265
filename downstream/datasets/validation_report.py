"""Many faults of a dataset in one error: how many of each kind, and the first few by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from coma.errors import BadInput
from coma.messages import printable

SHOWN = 5
"""Faults of one kind that a message names; the others are counted."""

Progress = Callable[[int, int], None]
"""Called with the number of files read so far and the number of all."""

_CHUNK = 32
_T = TypeVar("_T")
_R = TypeVar("_R")


class ValidationReport:
    """Collects faults by kind, to report them all at once."""

    def __init__(self, name: str) -> None:
        """An empty collection; `name` is the file or folder the faults are in."""
        self._name = name
        self._found: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, where: str = "") -> None:
        """One more fault of this kind, described by `where`."""
        self.add_all(kind, [where], str)

    def add_all(self, kind: str, places: Sequence[_T], describe: Callable[[_T], str]) -> None:
        """As many faults of this kind as there are places; only the first few are described."""
        if not len(places):
            return
        examples = self._found.setdefault(kind, [])
        for place in places[: max(0, SHOWN - len(examples))]:
            examples.append(printable(describe(place)))
        self._counts[kind] = self._counts.get(kind, 0) + len(places)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Go on if nothing was found.

        Raises:
            BadInput: listing every kind with its count and its first examples.
        """
        if not self._found:
            return
        total = sum(self._counts.values())
        lines = [f"{self._name}: {total} problem{'s' * (total > 1)}"]
        for kind, examples in self._found.items():
            rest = self._counts[kind] - len(examples)
            listed = "; ".join(examples) + (f"; and {rest} more" if rest else "")
            lines.append(f"  {kind} ({self._counts[kind]})" + (f": {listed}" if any(examples) else ""))
        raise BadInput("\n".join(lines))


def map_in_threads(work: Callable[[_T], _R], items: Sequence[_T], progress: Progress | None) -> Generator[_R]:
    """`work` of every item, in order, done by a few threads; whoever stops early waits for no other."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    pool = ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1)), "check")
    done = 0
    try:
        with warnings.catch_warnings():  # of Pillow, about odd metadata: what matters is raised
            warnings.simplefilter("ignore")
            for results in pool.map(lambda chunk: [work(item) for item in chunk], chunks):
                yield from results
                done += len(results)
                if progress is not None:
                    progress(done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)
