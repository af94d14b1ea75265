"""What TensorRT says while it works: its messages, kept for errors, and its progress, where Ctrl-C enters."""

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
"""Last errors that a message quotes: the first ones are mostly of kernels that were merely tried."""


def make_logger(trt: Any) -> Any:
    """A logger for TensorRT: the last errors are kept, and nothing is printed.

    TensorRT calls errors what it recovers from, too; `logging` has them, and warnings, at level debug.
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
            """The last ones, on one line."""
            return "; ".join(self._errors) or "it gives no reason"

    return Logger()


def make_monitor(trt: Any, cancelled: threading.Event, progress: Progress | None) -> Any:
    """A progress monitor: it tells `progress`, and stops the build once `cancelled` is set.

    An exception of `progress` must not reach TensorRT, which would end the process: it cancels the build, and
    `check()` raises it afterwards.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.get(phase_name, 0))

        def check(self) -> None:
            """Raise what `progress` raised."""
            if self._error is not None:
                raise self._error

        def _tell(self, phase: str, done: int) -> None:
            if progress is None or self._error is not None:
                return
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:  # not to be let through C++
                self._error = error
                cancelled.set()

    return Monitor()
