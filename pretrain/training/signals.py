"""Ctrl-C and SIGTERM become a request that the loop answers after the step it is in.

A second Ctrl-C ends the program at once. A second SIGTERM does not: job schedulers and torchrun often send
it more than once, to every process of a job, and kill for good only later.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """While this is entered (in the main thread), `asked` says whether someone wants the run to stop.

    The handlers that were there before are put back at the end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type] # as `signal.signal` returned it
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
