"""What `coma export` and `coma benchmark` show while they work."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """One line that says what is being done, how far it is, since when and how long it will take."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (
            *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20)),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        )
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
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
        """Something begins, or is so far; without a terminal, a line when it begins."""
        if title != self._title:
            self._title = title
            self._progress.reset(self._task, description=title, total=total)
            if not self._console.is_terminal:
                self._console.print(title, soft_wrap=True)
        self._progress.update(self._task, completed=done, total=total)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, soft_wrap=True)
