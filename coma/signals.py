"""Ctrl-C and SIGTERM become a request that the loop answers after the step it is in.

Where nothing has to be finished first (waiting for images, measuring on the way) it is answered at once: see
`StopRequest.at_once`. A second Ctrl-C ends the program at once. A second SIGTERM does not: job schedulers and
torchrun often send it more than once, to every process of a job, and kill for good only later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

_SOON = 1.0
"""Seconds for what is begun although the run is to stop: the last images of a step, mostly."""


class StopNow(BaseException):
    """Interrupts work that may be interrupted. No `Exception`, so that no handler catches it."""


class StopRequest:
    """While this is entered (in the main thread), `asked` says whether someone wants the run to stop.

    The handlers that were there before are put back at the end.

    Args:
        quiet: Leave it to another process to say that the request was heard.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.asked = False
        self._grace: float | None = None  # seconds, where one may be left
        self._quiet = quiet
        self._alarm: object = None
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

    @contextmanager
    def at_once(self, grace: float = 0.0) -> Iterator[None]:
        """Raise `StopNow` inside when someone wants the run to stop; soon, if that was known before.

        Args:
            grace: Seconds to wait before: for what is better finished, unless it hangs.
        """
        if not self._before:
            yield
            return
        self._grace = grace
        try:
            if self.asked:
                self._leave_soon(grace or _SOON)
            yield
        finally:
            self._grace = None
            if self._alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, self._alarm)  # type: ignore[arg-type]
                self._alarm = None

    def _leave_soon(self, grace: float) -> None:
        if not grace:
            self._leave()
        self._alarm = signal.signal(signal.SIGALRM, self._leave)
        signal.setitimer(signal.ITIMER_REAL, grace)

    def _leave(self, *_: object) -> None:
        if self._grace is not None:
            self._grace = None
            raise StopNow

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.asked = not self.asked, True
        if first and not self._quiet:
            when = "now" if self._grace == 0 else "after this step; Ctrl-C again stops at once"
            with suppress(OSError, ValueError):  # written past all buffers, whose locks may be held
                os.write(sys.stderr.fileno(), f"\nstopping {when}\n".encode())
        if first and self._grace is not None:
            self._leave_soon(self._grace)


@contextmanager
def sigterm_interrupts(consequence: str) -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM, as on Ctrl-C, so that unfinished files are removed.

    Args:
        consequence: End of the message, for example "unfinished files were removed".
    """

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # the clean-up runs undisturbed
        raise KeyboardInterrupt(f"stopped by SIGTERM; {consequence}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until the block has ended, for changes that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)
