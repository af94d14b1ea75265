"""Progress bar of a training run, with an inner bar for validations."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coma.progress import clock

LINES = 20
"""Number of lines per run without a terminal."""


class ProgressBar:
    """A live bar on a terminal, and a few lines elsewhere.

    Args:
        quiet: Print nothing (all processes but the first).
        console: Console to print to; stderr by default.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=quiet, highlight=False)
        text, left = TextColumn("{task.description}"), TimeRemainingColumn(compact=True)
        columns = (text, BarColumn(), MofNCompleteColumn(), left)
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: Any = None
        self._part: Any = None
        self._steps = self._first = 0
        self._began = time.monotonic()

    def start(self, title: str, steps: int, done: int = 0) -> None:
        """Shows the bar with `done` of `steps` steps."""
        self._steps, self._first, self._began = steps, done, time.monotonic()
        self._progress.start()
        self._task = self._progress.add_task(title, total=steps, completed=done)

    def step(self, done: int, text: str) -> None:
        """Updates the number of finished steps."""
        self._progress.update(self._task, completed=done, description=text)
        every = max(self._steps // LINES, 1)
        if not self._console.is_terminal and (done % every == 0 or done == self._steps):
            rate = (time.monotonic() - self._began) / (done - self._first)
            self.say(f"step {done}/{self._steps}  {text}  {clock((self._steps - done) * rate)} left")

    def start_inner(self, title: str, total: int) -> None:
        """Shows the inner bar."""
        self._progress.start()
        self._part = self._progress.add_task(title, total=total)

    def advance_inner(self) -> None:
        """Advances the inner bar by one."""
        if self._part is not None:
            self._progress.advance(self._part)

    def end_inner(self) -> None:
        """Removes the inner bar."""
        if self._part is not None:
            self._progress.remove_task(self._part)
            self._part = None

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Removes the bar and restores the cursor."""
        self._progress.stop()
