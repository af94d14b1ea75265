"""Progress of long work in every command: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

_SPEED_PERIOD = 600.0
"""Seconds over which the speed is averaged that predicts the time left."""


class Progress:
    """Shows bars on stderr where it is a terminal; prints lines that stay.

    Nothing is shown before the first bar, so that an error message raised earlier stands alone.

    Args:
        quiet: Show nothing (all processes but the first).
        console: Where to write; stderr by default.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self.quiet = quiet
        self.live = self.console.is_terminal and not quiet
        columns = (
            TextColumn("{task.description}", table_column=Column(overflow="fold"), markup=False),
            BarColumn(),
            _Count(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self.rich = RichProgress(
            *columns,
            console=self.console,
            disable=not self.live,
            speed_estimate_period=_SPEED_PERIOD,
        )
        self._step: Bar | None = None
        self._title = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def bar(self, title: str, total: float | None = None, done: float = 0, lines: int = 0) -> Bar:
        """Adds a bar.

        Args:
            title: Name of the work.
            total: Amount of work: a whole number is shown as `3/8`, another one in percent; None: unknown.
            done: Part of `total` that is done already.
            lines: Lines to print over the whole work where there is no terminal.
        """
        self.rich.start()
        return Bar(self, title, total, done, lines)

    def step(self, title: str, done: int = 0, total: int | None = None) -> None:
        """Moves the one bar of work with changing titles; without a terminal, prints every new title."""
        if title != self._title:
            if self._step:
                self._step.remove()
            self._step, self._title = self.bar(title, total, done), title
            if not self.live:
                self.say(title)
        elif self._step:
            self._step.update(done, total=total)

    def say(self, line: str) -> None:
        """Prints a line that stays, above the bars."""
        self.console.print(Text(line), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a warning that stays, above the bars."""
        self.console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    def close(self) -> None:
        """Stops drawing and shows the cursor again."""
        if self._step:
            self._step.remove()
            self._step = None
        self.rich.stop()


class Bar:
    """One bar of a `Progress`; see `Progress.bar`."""

    def __init__(self, progress: Progress, title: str, total: float | None, done: float, lines: int) -> None:
        self._progress, self._title, self._total = progress, title, total
        self._first = self._done = done
        self._every = max(int(total or 0) // lines, 1) if lines and total else 0
        self._began = time.monotonic()
        self._task = progress.rich.add_task(title, total=total, completed=done, text="")  # type: ignore[arg-type]

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the speed so far; None where that is not known yet."""
        done = self._done - self._first
        if done <= 0 or self._total is None:
            return None
        return (time.monotonic() - self._began) * max(self._total - self._done, 0.0) / done

    def update(self, done: float, text: str | None = None, total: float | None = None) -> None:
        """Sets how much is done, and the text behind the bar."""
        before, self._done, self._total = self._done, done, self._total if total is None else total
        self._progress.rich.update(self._task, completed=done, total=self._total)
        if text is not None:
            self._progress.rich.update(self._task, text=text)
        passed = self._every and (done // self._every > before // self._every or done == self._total)
        if passed and not self._progress.live:
            self.line(text or "", self.seconds_left)

    def advance(self, amount: float = 1) -> None:
        """Adds to what is done."""
        self.update(self._done + amount)

    def line(self, text: str, seconds_left: float | None) -> None:
        """Prints how far the work is, on a line that stays."""
        left = "" if seconds_left is None else f"{clock(seconds_left)} left"
        head = f"{self._title} {self._done:g}/{self._total or 0:g}"
        self._progress.say("  ".join(part for part in (head, text, left) if part))

    def remove(self) -> None:
        """Takes the bar away."""
        self._progress.rich.remove_task(self._task)


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        whole = isinstance(task.total, int)
        return Text(f"{task.completed:.0f}/{task.total}" if whole else f"{task.percentage:.0f} %")


def clock(seconds: float) -> str:
    """Returns hours, minutes and seconds: `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
