"""Collects the errors of a dataset: the number of each kind, and the first few by name."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from coma.errors import BadInput
from coma.messages import printable

SHOWN = 5
"""Errors of one kind that the report names; the others are counted."""

Progress = Callable[[int, int], None]
"""Called with the number of checked files and the total."""

_CHUNK, _AHEAD = 8, 2
"""Items that a thread takes at a time, and chunks for each thread that are computed ahead of the caller."""
_T = TypeVar("_T")
_R = TypeVar("_R")


class ValidationReport:
    """Collects errors by kind, to report them together."""

    def __init__(self, name: str) -> None:
        """Creates an empty report; `name` is the file or folder with the errors."""
        self._name = name
        self._found: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, where: str = "") -> None:
        """Adds an error of this kind, described by `where`."""
        self.add_all(kind, [where], str)

    def add_all(self, kind: str, places: Sequence[_T], describe: Callable[[_T], str]) -> None:
        """Adds an error of this kind per place; only the first few are described."""
        if not len(places):
            return
        examples = self._found.setdefault(kind, [])
        for place in places[: max(0, SHOWN - len(examples))]:
            examples.append(printable(describe(place)))
        self._counts[kind] = self._counts.get(kind, 0) + len(places)

    def __bool__(self) -> bool:
        """Returns whether there are errors."""
        return bool(self._found)

    def raise_if_any(self) -> None:
        """Raises an error if there are any errors.

        Raises:
            BadInput: listing every kind with its count and first examples.
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
    """Yields `work(item)` in order, computed by a few threads; stopping early cancels the rest.

    Threads wait while they are `_AHEAD` chunks each ahead of the caller, so few results are in memory.
    """
    threads = min(8, 2 * (os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads, "check")
    waiting: deque[Future[list[_R]]] = deque()
    start = done = 0
    try:
        with warnings.catch_warnings():  # Pillow warns about odd metadata; errors are raised
            warnings.simplefilter("ignore")
            while done < len(items):
                while start < len(items) and len(waiting) < _AHEAD * threads:
                    waiting.append(
                        pool.submit(lambda chunk: [*map(work, chunk)], items[start : start + _CHUNK])
                    )
                    start += _CHUNK
                results = waiting.popleft().result()
                yield from results
                done += len(results)
                if progress is not None:
                    progress(done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)
