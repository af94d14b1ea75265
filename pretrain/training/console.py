"""Output of a training run: a bar on a terminal, a line per log point elsewhere, and warnings.

Only process 0 prints, on stderr.
"""

from __future__ import annotations

from typing import Any

from coma.progress import Bar, Progress

DATA_WAIT = 0.1
"""Share of time spent waiting for data from which on a hint is printed."""
PATIENCE = 60.0
"""Seconds of training before that hint."""


class TrainingConsole(Progress):
    """Progress and messages of one run; see `Progress`."""

    _bar: Bar | None = None
    _steps = _taken = 0
    _waited = _seconds = 0.0
    _hinted = False
    _facts = _probed = ""

    def start(self, step: int, steps: int) -> None:
        """Shows the bar at `step` of `steps`."""
        self._steps = steps
        self._bar = self.bar("step", steps, step)

    def advance(self, step: int, loss: float, seconds: float, waited: float) -> None:
        """Moves the bar after a step that took `seconds`, `waited` of them without data."""
        self._taken += 1
        self._seconds += seconds
        self._waited += waited
        if self._bar:
            self._bar.update(step, f"loss {loss:.4f}  {self._facts}")
        if self._seconds >= PATIENCE and not self._hinted and self._waited > DATA_WAIT * self._seconds:
            self._hinted = True
            share = self._waited / self._seconds
            self.warn(
                f"{share:.0%} of the time goes into waiting for images: raise --workers if cores are free, "
                "shrink the files once with `coma pack`, or take several crops from each with --aug-repeats 2"
            )

    def row(self, row: dict[str, Any]) -> None:
        """Shows a log point."""
        facts = [f"{row['images_per_s']:.4g} images/s", f"data wait {row['data_wait']:.0%}"]
        if row.get("mfu") is not None:
            facts.append(f"MFU {row['mfu']:.0%}")
        if row.get("skipped"):
            facts.append(f"{row['skipped']} files skipped")
        if self._probed:
            facts.append(self._probed)
        self._facts = "  ".join(facts)
        head = f"loss {row['loss']:.4f}"
        if self._bar and self.live:
            self._bar.update(row["step"], f"{head}  {self._facts}")
        elif self._bar:
            left = (self._steps - row["step"]) * self._seconds / max(self._taken, 1)
            epoch, rate = f"epoch {row['epoch']:.2f}", f"lr {row['lr']:.3g}"
            self._bar.line("  ".join([epoch, head, rate, self._facts]), left)

    def probed(self, step: int, values: dict[str, float]) -> None:
        """Prints what the online probe measured after `step` steps; its accuracies stay beside the bar."""
        names = {"knn": "kNN", "linear": "linear"}
        self._probed = "  ".join(f"{names[key]} {values[key]:.1%}" for key in names if key in values)
        spread = (
            f"standard deviation of the features {values['feature_std']:.2f}, "
            f"effective rank {values['effective_rank']:.1f}"
        )
        self.say(f"step {step}/{self._steps}  probe: {self._probed}  {spread}")
