"""Ctrl-C and SIGTERM become a request that the loop answers after the step it is in.

A second Ctrl-C ends the program at once. A second SIGTERM does not: job schedulers and torchrun often send
it more than once, to every process of a job, and kill for good only later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType


class StopRequest:
    """While this is entered (in the main thread), `asked` says whether someone wants the run to stop.

    The handlers that were there before are put back at the end.

    Args:
        quiet: Leave it to another process to say that the request was heard.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.asked = False
        self._quiet = quiet
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
        if not self.asked and not self._quiet:
            with suppress(OSError, ValueError):  # written past all buffers, whose locks may be held
                os.write(sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n")
        self.asked = True
