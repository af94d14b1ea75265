"""What a person sees while many runs go on: a bar with the time that is left, and a line for every event."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from pretrain.sweep.process_pool import Job


class Progress:
    """On stderr: a live bar on a terminal, lines elsewhere.

    Args:
        console: Where to instead.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._total, self._began, self._before = 1.0, time.monotonic(), 0.0

    def start(self, jobs: Sequence[Job]) -> None:
        """Begin anew, with these jobs."""
        self.close()
        self._total = sum(job.work for job in jobs) or 1.0
        self._before = sum(job.work for job in jobs if job.done())
        self._began = time.monotonic()
        if self._console.is_terminal:
            columns = TextColumn("{task.percentage:>3.0f} %"), BarColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=self._console)
            self._bar.add_task("", total=self._total)
            self._bar.start()

    def tell(self, line: str | None, done: float) -> None:
        """So much work is done; and what happened, if something did."""
        left = time_left(time.monotonic() - self._began, done - self._before, self._total - done)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, description=left)
        if line:
            clock = time.strftime("%H:%M:%S")
            self._console.print(
                f"{clock} {line}  ({done / self._total:.0%}, {left})", markup=False, soft_wrap=True
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def time_left(seconds: float, done: float, left: float) -> str:
    """How long `left` will take if `done` took `seconds`."""
    if done <= 0 or seconds < 1:
        return "time left unknown"
    minutes = round(seconds * max(left, 0.0) / done / 60)
    return f"about {minutes // 60}:{minutes % 60:02d} h left"
