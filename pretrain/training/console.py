"""What a person sees of a run: a live bar on a terminal, a line per log point elsewhere, and warnings.

Only process 0 reports, on stderr.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from coma.progress import clock

DATA_WAIT = 0.1
"""Share of time spent waiting for data from which on it is worth a hint."""
PATIENCE = 60.0
"""Seconds of training before that hint."""


class TrainingConsole:
    """Progress and messages of one run.

    Args:
        quiet: Say nothing (all processes but the first).
        console: Where to; stderr by default.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self._quiet = quiet
        self._progress: Progress | None = None
        self._task: Any = None
        self._steps = self._taken = 0
        self._waited = self._seconds = 0.0
        self._hinted = False
        self._probed = ""

    def start(self, step: int, steps: int) -> None:
        """Show the bar, at `step` of `steps`."""
        self._steps = steps
        if self._quiet or not self._console.is_terminal:
            return
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[facts]}"),
        )
        progress = Progress(*columns, console=self._console, expand=True)
        self._task = progress.add_task("training", total=steps, completed=step, facts="")
        progress.start()
        self._progress = progress

    def advance(self, step: int, loss: float, seconds: float, waited: float) -> None:
        """One step is done; `waited` of its `seconds` went by without data."""
        self._taken += 1
        self._seconds += seconds
        self._waited += waited
        if self._progress:
            self._progress.update(self._task, completed=step, description=f"loss {loss:.4f}")
        if self._seconds >= PATIENCE and not self._hinted and self._waited > DATA_WAIT * self._seconds:
            self._hinted = True
            share = self._waited / self._seconds
            self.warn(
                f"{share:.0%} of the time goes into waiting for images: raise --workers if cores are free, "
                "shrink the files once with `coma pack`, or take several crops from each with --aug-repeats 2"
            )

    def row(self, row: dict[str, Any]) -> None:
        """A log point."""
        facts = [f"{row['images_per_s']:.4g} images/s", f"data wait {row['data_wait']:.0%}"]
        if row.get("mfu") is not None:
            facts.append(f"MFU {row['mfu']:.0%}")
        if row.get("skipped"):
            facts.append(f"{row['skipped']} files skipped")
        if self._probed:
            facts.append(self._probed)
        if self._progress:
            self._progress.update(self._task, facts="  ".join(facts))
        elif not self._quiet:
            left = (self._steps - row["step"]) * self._seconds / max(self._taken, 1)
            head = f"step {row['step']}/{self._steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}"
            self.say("  ".join([head, f"lr {row['lr']:.3g}", *facts, f"{clock(left)} left"]))

    def probed(self, step: int, values: dict[str, float]) -> None:
        """What a probe found after `step` steps; its accuracies stay in sight."""
        names = {"knn": "kNN", "linear": "linear"}
        self._probed = "  ".join(f"{names[key]} {values[key]:.1%}" for key in names if key in values)
        spread = (
            f"features' deviation {values['feature_std']:.2f}, effective rank {values['effective_rank']:.1f}"
        )
        self.say(f"step {step}/{self._steps}  probe: {self._probed}  {spread}")

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """One line that should be noticed."""
        self._print(Text.assemble(("warning: ", "bold yellow"), text))

    def close(self) -> None:
        """Take the bar away; the cursor is back where it belongs."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)
