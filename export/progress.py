"""The interface through which exports and benchmarks report their progress; see `coma.progress.Progress`."""

from __future__ import annotations

from typing import Protocol


class ProgressListener(Protocol):
    """Receives progress updates."""

    def step(self, title: str, done: int = 0, total: int | None = None) -> None:
        """A step begins, or `done` of its `total` parts are finished."""
        ...

    def say(self, line: str) -> None:
        """A result is known."""
        ...
