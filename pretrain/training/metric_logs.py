"""The log of a run: `metrics.jsonl` with one JSON object per log point.

Values are means over the steps since the last log point. `Window` holds their sums and is part of the
resumable state, so a resumed run writes the same lines as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coma.atomic_io import LineFile, write_whole


class Window:
    """Sums over the steps since the last log point."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        """Adds the values of a step, except those that are not finite (an fp16 overflow)."""
        for name, value in values.items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """Returns the means and resets the sums."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums as plain data."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


def drop_lines(path: Path, known: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Removes the lines of `metrics.jsonl` that are not `known`, and a line that a kill cut short.

    Returns:
        The remaining rows.
    """
    if not path.exists():
        return []
    rows, kept = [], []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            if known(row):
                rows.append(row)
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, lambda file: file.write(b"".join(kept)))
    return rows


class MetricsLog(LineFile):
    """`metrics.jsonl` of a run."""

    def add_row(self, row: dict[str, Any]) -> None:
        """Appends one line; see `LineFile.add`."""
        self.add(json.dumps(row, allow_nan=False).encode() + b"\n")
