"""What a step of `benchmarks/gpu.py` is given: a device, a time budget, and where its results go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """One row of a step's table.

    Attributes:
        name: What was measured, unique within the step.
        values: Column names to numbers or short texts.
        ok: Whether it is as it should be; None where nothing can be wrong.
        note: What a reader has to know of this row.
    """

    name: str
    values: dict[str, float | str] = field(default_factory=dict)
    ok: bool | None = None
    note: str = ""


class Skip(Exception):
    """A step cannot run here, and that is no failure: a package is missing, for example."""


class Session:
    """A running step.

    Args:
        device: Where to compute. On a CPU everything is reduced: it shows that a step works.
        seconds: Time budget; the process is ended when it is over.
        folder: Scratch space of this step.
        out: For the few files that are kept beside the results.
        rows: File that results are appended to, one JSON object a line.
        have: Results of an earlier call, which need not be measured again.
    """

    def __init__(
        self, device: torch.device, seconds: float, folder: Path, out: Path, rows: Path, have: list[Result]
    ) -> None:
        self.device, self.seconds = device, seconds
        self.repeat = seconds / 60
        """Seconds for which a measurement is repeated."""
        self.folder, self.out = folder, out
        self.results = {result.name: result for result in have}
        self._rows = rows
        self._end = time.monotonic() + seconds

    @property
    def small(self) -> bool:
        """Whether sizes are reduced: on a CPU."""
        return self.device.type == "cpu"

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._end - time.monotonic()

    def wants(self, name: str, seconds: float = 0.0) -> bool:
        """Whether a result is still to be measured, and the `seconds` that it takes are there."""
        if name in self.results:
            return False
        if self.left() < seconds:
            print(f"{name}: left out, {self.left():.0f} s left of the {seconds:.0f} s it takes", flush=True)
            return False
        return True

    def add(
        self,
        name: str,
        values: Mapping[str, Any] | None = None,
        *,
        ok: bool | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """Record a result at once; columns are `values`, and keywords with spaces for underscores."""
        columns = {**(values or {}), **{key.replace("_", " "): value for key, value in more.items()}}
        shown = {key: _plain(value) for key, value in columns.items() if value is not None}
        result = Result(name, shown, ok, note)
        self.results[name] = result
        with self._rows.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an error inside as the result `name`, and go on behind it."""
        try:
            yield
        except Exception as error:
            message = str(error).strip().partition("\n")[0][:200]
            self.add(name, ok=False, note=f"{type(error).__name__}: {message}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def run(self, *command: str, seconds: float | None = None) -> str:
        """Run Python with these arguments on the source tree; its output.

        Raises:
            RuntimeError: it failed, with the end of what it said.
        """
        limit = min(seconds or self.left(), max(self.left(), 1.0))
        try:
            done = subprocess.run(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=os.environ,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            print(str(error.stdout or "")[-4000:], flush=True)
            raise RuntimeError(f"{' '.join(command[:4])} took more than {limit:.0f} s") from None
        print(done.stdout[-4000:], flush=True)
        if done.returncode:
            last = [line for line in done.stdout.splitlines() if line.strip()][-3:]
            raise RuntimeError(f"exit code {done.returncode}: {' | '.join(last)[:400]}")
        return done.stdout


def _plain(value: Any) -> float | str:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value if isinstance(value, int | str) else str(value)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(
    action: Callable[[], object], device: torch.device, *, warm: int = 2, least: int = 3, seconds: float = 2.0
) -> float:
    """Median time of an action: at least `least` repeats, and for about `seconds`."""
    for _ in range(warm):
        action()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 200):
        wait(device)
        started = time.perf_counter()
        action()
        wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def free(device: torch.device) -> None:
    """Give memory of deleted models back."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
