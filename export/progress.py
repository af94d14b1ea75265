"""Progress of `coma export` and `coma benchmark`."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol


class ProgressListener(Protocol):
    """Receives progress updates."""

    def step(self, title: str, done: int = 0, total: int | None = None) -> None:
        """A step begins, or `done` of its `total` parts are finished."""
        ...

    def say(self, line: str) -> None:
        """A result is known."""
        ...


class Bar:
    """Progress bar on standard error with the current step, its progress, elapsed and remaining time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
        self._title = ""

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, title: str, done: int = 0, total: int | None = None) -> None:
        """Updates the bar; without a terminal, prints one line when a step begins."""
        if title != self._title:
            self._title = title
            self._progress.reset(self._task, description=title, total=total)
            if not self._console.is_terminal:
                self._console.print(title, soft_wrap=True)
        self._progress.update(self._task, completed=done, total=total)

    def say(self, line: str) -> None:
        """Prints a line that stays on the screen."""
        self._console.print(line, soft_wrap=True)
