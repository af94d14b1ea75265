"""Callbacks for TensorRT: a logger that keeps the last errors, and a monitor that can cancel a build."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, steps)`."""
KEPT = 3
"""Number of last errors that a message quotes; earlier ones are mostly about kernels that were only tried."""


def make_logger(trt: Any) -> Any:
    """Returns a logger for TensorRT that keeps the last errors and prints nothing.

    TensorRT also logs errors that it recovers from; `logging` receives them, and warnings, at level debug.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=KEPT)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._errors.append(" ".join(text.split()))
                log.debug("TensorRT error: %s", text)
            elif severity == trt.ILogger.WARNING:
                log.debug("TensorRT warning: %s", text)

        def last_errors(self) -> str:
            """Returns the last errors on one line."""
            return "; ".join(self._errors) or "no reason given"

    return Logger()


def make_monitor(trt: Any, cancelled: threading.Event, progress: Progress | None) -> Any:
    """Returns a progress monitor that calls `progress` and stops the build once `cancelled` is set.

    An exception in `progress` must not reach TensorRT, which would end the process. It cancels the build, and
    `check()` raises it afterwards.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self._steps.get(phase_name, 0))

        def check(self) -> None:
            """Raises the exception that `progress` raised."""
            if self._error is not None:
                raise self._error

        def _report(self, phase: str, done: int) -> None:
            if progress is None or self._error is not None:
                return
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:  # must not pass through C++
                self._error = error
                cancelled.set()

    return Monitor()
