"""Logs of a run: `metrics.jsonl` with one JSON object per log point, and the same values for TensorBoard.

Values are means over the steps since the last log point. `Window` holds their sums and is part of the
resumable state, so a resumed run writes the same lines as an uninterrupted one.

TensorBoard's own SummaryWriter is not used: when the disk is full (measured), its thread prints a traceback,
its file ends with a broken record, and it never writes again. Here a refused record waits for room.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
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


class MetricsLog:
    """`metrics.jsonl` of a run.

    Args:
        path: The file; existing lines are kept.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def add(self, row: dict[str, Any]) -> None:
        """Appends one line.

        Raises:
            OSError: the disk is full; the line is written with the next one that finds room.
        """
        self._file.add(json.dumps(row, allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Forces everything to the disk.

        Raises:
            OSError: the disk is full.
        """
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardLog:
    """Scalars for TensorBoard, written in this thread so that a full disk is noticed here.

    Args:
        folder: `run/tensorboard`.
        step: Steps done; TensorBoard ignores what earlier files hold from this step on.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = LineFile(folder / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.SessionStatus.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=restart))

    def add(self, row: dict[str, Any]) -> None:
        """Appends all numbers of a row except its step.

        Raises:
            OSError: the disk is full; they are written with the next row that finds room.
        """
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if name != "step" and value is not None
        ]
        self._write(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        from io import BytesIO

        from tensorboard.summary.writer.record_writer import RecordWriter

        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.add(record.getvalue())
